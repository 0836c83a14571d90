#!/bin/sh
# onnxruntime-web from npm, into vendor/; nano's graphs, into decoder/. Then: python -m http.server
set -e
cd "$(dirname "$0")"
mkdir -p vendor
archive=$(npm pack --silent onnxruntime-web@1.30.0)
tar -xzf "$archive" --strip-components=2 -C vendor package/dist/ort.webgpu.bundle.min.mjs \
    package/dist/ort-wasm-simd-threaded.asyncify.mjs package/dist/ort-wasm-simd-threaded.asyncify.wasm
rm "$archive"
test -d decoder || pixeldecoder export "${1:-nano}" decoder
