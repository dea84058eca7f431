// Talks to the server that this page came from. Whatever goes wrong becomes a ServerProblem that a person can read.

export class ServerProblem extends Error {
  // A problem document (RFC 9457), or something of the same shape.
  constructor({ type = "", title = "Something went wrong", status = 0, detail = "" }, retryAfterS = 0) {
    super(detail || title);
    Object.assign(this, { kind: type.split(":").pop(), title, status, detail, retryAfterS });
  }
}

const unreachable = () =>
  new ServerProblem({
    type: "unreachable",
    title: "The server does not answer",
    detail: "It may have been stopped, or the network is down. This page goes on by itself once it is back.",
  });

async function send(path, options) {
  let response;
  try {
    response = await fetch(path, { cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw unreachable();
  }
  if (response.ok) return response;
  const told = await response.json().catch(() => ({}));
  throw new ServerProblem(
    { title: `The server answered ${response.status}`, status: response.status, ...told },
    Number(response.headers.get("Retry-After")) || 0,
  );
}

export const readJson = async (path, options) => (await send(path, options)).json();
export const readText = async (path, options) => (await send(path, options)).text();

const TYPES = new Set(["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"]);

// What a file is, the server tells from its first bytes: a type it does not know must not keep it from looking.
const imageRequest = (body, signal) => ({
  method: "POST",
  body,
  signal,
  headers: { "Content-Type": TYPES.has(body.type) ? body.type : "application/octet-stream" },
});

export const classify = (body, signal) => readJson("classify?top_k=1", imageRequest(body, signal));

// One object per exit that the image passes, the whole answer last ("final": true).
export async function* classifyStream(body, signal) {
  const response = await send("classify/stream?top_k=3", imageRequest(body, signal));
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let text = "";
  let final = false;
  for (;;) {
    const { value, done } = await reader.read().catch((error) => {
      throw error.name === "AbortError" ? error : unreachable();
    });
    if (done) break;
    const lines = (text + value).split("\n");
    text = lines.pop();
    for (const line of lines.filter(Boolean)) {
      const told = JSON.parse(line);
      if (told.status >= 400) throw new ServerProblem(told);
      final ||= told.final;
      yield told;
    }
  }
  if (!final) throw unreachable();
}

// The whole of it: a latency target that is not sent again would end.
export const setBudget = (fraction, latencyMs, token) =>
  readJson("budget", {
    method: "PUT",
    body: JSON.stringify(latencyMs === undefined ? { fraction } : { fraction, latency_ms: latencyMs }),
    headers: { "Content-Type": "application/json", ...authority(token) },
  });

export const readAccess = (token) => readJson("budget/access", { headers: authority(token) });

const authority = (token) => (token ? { Authorization: `Bearer ${token}` } : {});
