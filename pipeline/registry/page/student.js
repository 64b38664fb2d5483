// Where the student can run here, and the page's end of the line to its worker.

/** A student in a worker of its own. */
export class Student {
  #worker = new Worker("worker.js", { type: "module" });
  #waiting = new Map();
  #asked = 0;

  constructor() {
    this.#worker.onmessage = ({ data: { id, result, error } }) => {
      const [resolve, reject] = this.#waiting.get(id);
      this.#waiting.delete(id);
      if (error === undefined) resolve(result);
      else reject(new Error(error));
    };
    this.#worker.onerror = ({ message }) => {
      const reason = message ?? "worker.js can't be loaded";
      for (const [, reject] of this.#waiting.values()) reject(new Error(`The student can't run: ${reason}`));
      this.#waiting.clear();
    };
  }

  open(description, file, { gpu, threads }) {
    return this.#ask("open", { description, file, gpu, threads });
  }

  /** `rgba` is moved away, and comes back in the answer. */
  segment(rgba, width, height, scale, first) {
    return this.#ask("segment", { rgba, width, height, scale, first }, [rgba.buffer]);
  }

  close() {
    this.#worker.terminate();
  }

  #ask(task, words, moved = []) {
    const id = this.#asked++;
    return new Promise((...ends) => {
      this.#waiting.set(id, ends);
      this.#worker.postMessage({ id, task, ...words }, moved);
    });
  }
}

/** The ways to run here, the quickest first, and why one is not among them. */
export async function backends(isolation) {
  const found = [];
  const adapter = await navigator.gpu?.requestAdapter().catch(() => null);
  // A software adapter is slower than WASM.
  if (adapter && !adapter.info?.isFallbackAdapter) found.push({ name: "WebGPU", gpu: true, threads: 1 });
  const cores = navigator.hardwareConcurrency;
  // Half of them, as two logical ones are often one core.
  const threads = Math.min(8, Math.max(2, Math.ceil(cores / 2)));
  if (self.crossOriginIsolated && cores > 1) found.push({ name: `WASM, ${threads} threads`, gpu: false, threads });
  found.push({ name: "WASM, 1 thread", gpu: false, threads: 1 });
  const reason = self.crossOriginIsolated ? "this machine has one core" : isolation;
  const note = found.some(({ threads }) => threads > 1) ? "" : `No WASM threads: ${reason}.`;
  return { found, note };
}
