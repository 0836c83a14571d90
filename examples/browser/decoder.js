// A photo or latents in, a picture out, by onnxruntime-web: pixeldecoder.portable.run_onnx in JavaScript.

import * as ort from "./vendor/ort.webgpu.bundle.min.mjs";

const VERSION = 1;
ort.env.wasm.wasmPaths = new URL("./vendor/", import.meta.url).href;

const tensor = (data, dims) => new ort.Tensor("float32", data, dims);

// N(0, 1) from a seed: mulberry32 and Box and Muller's transform. Other numbers than PyTorch's of that seed.
export function normalOf(seed) {
  let state = seed >>> 0;
  const uniform = () => {
    state = (state + 0x6d2b79f5) >>> 0;
    let x = Math.imul(state ^ (state >>> 15), 1 | state);
    x = (x + Math.imul(x ^ (x >>> 7), 61 | x)) ^ x;
    return ((x ^ (x >>> 14)) >>> 0) / 4294967296;
  };
  return (length) =>
    Float32Array.from({ length }, () => Math.sqrt(-2 * Math.log(1 - uniform())) * Math.cos(2 * Math.PI * uniform()));
}

export class Decoder {
  // The graphs in a folder that `pixeldecoder export` wrote; onStatus is told what is being loaded.
  static async load(folder, onStatus = () => {}) {
    const answer = await fetch(`${folder}/manifest.json`);
    if (!answer.ok) throw new Error(`${folder}: no graphs there: run vendor.sh first`);
    const manifest = await answer.json();
    if (manifest.version !== VERSION || manifest.format !== "onnx")
      throw new Error(`${folder}: ${manifest.format} graphs of version ${manifest.version}, expected onnx of version ${VERSION}`);
    if (manifest.text_embed_dim !== null) throw new Error(`${folder}: this page gives a decoder no text`);
    const decoder = new Decoder();
    decoder.manifest = manifest;
    const gpu = await navigator.gpu?.requestAdapter();
    decoder.device = gpu ? "webgpu" : "wasm";
    decoder.graphs = {};
    for (const [name, file] of Object.entries(manifest.graphs)) {
      onStatus(`loading ${name}`);
      const options = { executionProviders: gpu ? ["webgpu", "wasm"] : ["wasm"] };
      decoder.graphs[name] = await ort.InferenceSession.create(`${folder}/${file}`, options);
    }
    return decoder;
  }

  // RGB in [-1, 1], (1, 3, H, W), H and W multiples of 8 -> latents.
  async encode(image, height, width) {
    if (!this.graphs.encode_image) throw new Error("this decoder has no encoder of its own");
    const { latents } = await this.graphs.encode_image.run({ image: tensor(image, [1, 3, height, width]) });
    return latents;
  }

  // Latents (1, C, h, w) -> { data, height, width }, planes of RGB in [-1, 1]. normal(n) gives n numbers of N(0, 1).
  async decode(latents, normal, sigma = 0, onStep = async () => {}) {
    const { scale, latent_downscale_factor: factor, cells, times, sampler } = this.manifest;
    const [height, width] = latents.dims.slice(2).map((side) => side * factor * scale);
    if (latents.dims.slice(2).some((side) => side % cells)) throw new Error(`expected sides of a multiple of ${cells}`);
    const dims = [1, 3, height, width];
    const length = 3 * height * width;
    const noise = tensor([sigma], [1]);
    const { encode_latents: graph } = this.graphs;
    const read = graph.inputNames.includes("sigma") ? { latents, sigma: noise } : { latents }; // for a base
    const told = { ...(await graph.run(read)), sigma: noise };
    let image = normal(length);
    for (let step = 0; step < times.length; step++) {
      const t = times[step];
      const after = times[step + 1] ?? 0;
      const inputs = { ...told, image: tensor(image, dims), t: tensor([t], [1]) };
      const v = (await this.graphs.velocity.run(inputs)).velocity.data;
      const noise = sampler === "lcm" && after > 0 ? normal(length) : null;
      const next = new Float32Array(length);
      for (let i = 0; i < length; i++)
        next[i] =
          sampler === "lcm" // a clean image, and fresh noise
            ? (1 - after) * (image[i] - t * v[i]) + (noise ? after * noise[i] : 0)
            : image[i] + (after - t) * v[i];
      image = next;
      await onStep(step + 1, times.length);
    }
    return { data: image.map((x) => Math.min(1, Math.max(-1, x))), height, width };
  }
}

// Pixels of a canvas -> planes of RGB in [-1, 1], and back.
export function planes({ data, width, height }) {
  const area = width * height;
  return Float32Array.from({ length: 3 * area }, (_, i) => data[4 * (i % area) + Math.floor(i / area)] / 127.5 - 1);
}

export function pixels({ data, height, width }) {
  const image = new ImageData(width, height);
  const area = width * height;
  for (let i = 0; i < area; i++) {
    for (let c = 0; c < 3; c++) image.data[4 * i + c] = Math.round((data[c * area + i] + 1) * 127.5);
    image.data[4 * i + 3] = 255;
  }
  return image;
}

export { tensor };
