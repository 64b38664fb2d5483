// The student, off the page's thread so that the page answers while it runs. One worker has one session.

import { labelMap, square } from "./pixels.js";

let ort, session, about, state;

const tasks = {
  /** Loads a model; `gpu`: on WebGPU, else on so many WASM `threads`. Runs it once, as what can't run fails there. */
  async open({ description, file, gpu, threads }) {
    about = description;
    const script = gpu ? "./runtime/ort.webgpu.js" : "./runtime/ort.wasm.js";
    ort = await import(script).catch((error) => {
      throw new Error(`onnxruntime-web can't be loaded from ${script}: ${error.message}`);
    });
    ort.env.wasm.numThreads = threads;
    ort.env.logLevel = "error";
    const answer = await fetch(file);
    if (!answer.ok) throw new Error(`There is no ${file} beside this page (${answer.status} ${answer.statusText})`);
    const model = new Uint8Array(await answer.arrayBuffer());
    session = await ort.InferenceSession.create(model, { executionProviders: [gpu ? "webgpu" : "wasm"] });
    await step(new Float32Array(about.size * about.size * 3), true);
    return [{}];
  },

  /** The labels (scale * height, scale * width) of a frame of RGBA pixels, which come back; `first` of its video? */
  async segment({ rgba, width, height, scale, first }) {
    const times = [performance.now()];
    const pixels = square(rgba, width, height, about.size);
    times.push(performance.now());
    const masks = await step(pixels, first);
    times.push(performance.now());
    const labels = labelMap(masks, about.num_slots, about.grid, scale * width, scale * height);
    times.push(performance.now());
    const [prepare, run, draw] = [1, 2, 3].map((n) => times[n] - times[n - 1]);
    return [{ rgba, labels, ms: { prepare, run, draw } }, [rgba.buffer, labels.buffer]];
  },
};

/** One frame through the model: its masks (slots, grid, grid). What comes of the state is kept for the next one. */
async function step(pixels, first) {
  if (first) {
    const noise = about.noise ?? new Float32Array(about.num_slots * about.slot_size);
    state = new ort.Tensor("float32", Float32Array.from(noise), [1, about.num_slots, about.slot_size]);
  }
  const { masks, next_state } = await session.run(
    {
      frames: new ort.Tensor("float32", pixels, [1, about.size, about.size, 3]),
      state,
      first: new ort.Tensor("bool", [first], [1]),
    },
    ["masks", "next_state"],
  );
  state = next_state;
  return masks.data;
}

self.onmessage = async ({ data: { id, task, ...words } }) => {
  try {
    const [result, moved] = await tasks[task](words);
    self.postMessage({ id, result }, moved ?? []);
  } catch (error) {
    self.postMessage({ id, error: error?.message ?? String(error) });
  }
};
