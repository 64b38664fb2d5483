// WASM threads share memory, which browsers allow only pages that come with two headers. Few static servers send
// them, so a service worker (service-worker.js) adds them to what the server sends, from the second load on.

const TRIED = "isolation tried"; // so that the page is not loaded again and again
const WAIT = 15_000; // ms

/** Loads the page again where that isolates it, and then never returns; else returns why it is not isolated. */
export async function isolate() {
  if (self.crossOriginIsolated) {
    sessionStorage.removeItem(TRIED);
    return "";
  }
  if (!self.isSecureContext) return "the page comes neither by https nor from localhost";
  if (!navigator.serviceWorker) return "this browser allows no service worker here";
  try {
    await Promise.race([start(), new Promise((_, reject) => setTimeout(reject, WAIT, new Error("no answer")))]);
  } catch (error) {
    return `its service worker does not start (${error.message})`;
  }
  if (sessionStorage.getItem(TRIED)) return "this browser does not isolate the page";
  sessionStorage.setItem(TRIED, "yes");
  location.reload();
  return new Promise(() => {});
}

async function start() {
  await navigator.serviceWorker.register("service-worker.js");
  await navigator.serviceWorker.ready;
}
