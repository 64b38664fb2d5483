// Adds the headers of cross-origin isolation to what the server sends. Keeps nothing, and asks nobody else.

self.addEventListener("install", () => self.skipWaiting());
self.addEventListener("activate", (event) => event.waitUntil(self.clients.claim()));
self.addEventListener("fetch", (event) => {
  if (new URL(event.request.url).origin === location.origin) event.respondWith(isolated(event.request));
});

async function isolated(request) {
  const answer = await fetch(request);
  if (answer.type === "opaqueredirect" || answer.status === 304) return answer;
  const headers = new Headers(answer.headers);
  headers.set("Cross-Origin-Opener-Policy", "same-origin");
  headers.set("Cross-Origin-Embedder-Policy", "require-corp");
  return new Response(answer.body, { status: answer.status, statusText: answer.statusText, headers });
}
