#!/bin/sh
# onnxruntime-web from npm, into vendor/; a decoder's graphs, nano's if none is named, into decoder/.
set -e
here=$(dirname "$0")
if [ $# -gt 0 ] || ! [ -d "$here/decoder" ]; then
    rm -rf "$here/decoder.new"
    pixeldecoder export "${1:-nano}" "$here/decoder.new" # which may fail, and then the one that is there stays
    rm -rf "$here/decoder"
    mv "$here/decoder.new" "$here/decoder"
fi
cd "$here"
mkdir -p vendor
archive=$(npm pack --silent onnxruntime-web@1.30.0)
tar -xzf "$archive" --strip-components=2 -C vendor package/dist/ort.webgpu.bundle.min.mjs \
    package/dist/ort-wasm-simd-threaded.asyncify.mjs package/dist/ort-wasm-simd-threaded.asyncify.wasm
rm "$archive"
