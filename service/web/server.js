// Calls the server that this page came from. Every failure becomes a ServerProblem with a text for the user.

export class ServerProblem extends Error {
  // Takes a problem document (RFC 9457), or an object of the same shape.
  constructor({ type = "", title = "Something went wrong", status = 0, detail = "" }, retryAfterS = 0) {
    super(detail || title);
    Object.assign(this, { kind: type.split(":").pop(), title, status, detail, retryAfterS });
  }
}

const ASK_MS = 10_000; // a hanging server accepts connections and never answers
const SEND_MS = 15_000; // below the server's limit for a body, as browsers keep resending what was answered with 408

const unreachable = (detail, type = "unreachable") =>
  new ServerProblem({ type, title: "The server does not answer", detail });

const stranger = () =>
  new ServerProblem({
    title: "Something else answers in the server's place",
    detail: "It may be a proxy in front that wants you to sign in again: reload this page.",
  });

// Errors thrown by fetch have no useful message.
function told(error) {
  if (error.name === "TimeoutError")
    return unreachable("It has not responded for a while: it hangs, or the network is slow.", "silent");
  if (error instanceof SyntaxError) return stranger(); // the server always sends valid JSON
  if (error instanceof TypeError)
    return unreachable("It may have been stopped, or the network is down. This page continues by itself once it is back.");
  return error;
}

// A time limit that can be lifted.
function limit(ms, signal) {
  const late = new AbortController();
  const timer = setTimeout(() => late.abort(new DOMException("too late", "TimeoutError")), ms);
  return { signal: AbortSignal.any([late.signal, ...(signal ? [signal] : [])]), lift: () => clearTimeout(timer) };
}

async function send(path, options) {
  const response = await fetch(path, { cache: "no-store", redirect: "manual", ...options });
  if (response.ok) return response;
  if (response.type === "opaqueredirect") throw stranger(); // the server never redirects
  const problem = await response.json().catch(() => ({}));
  const title = `The server answered ${response.status}`;
  const detail = "It gave no reason: the answer may come from a proxy in front of it.";
  throw new ServerProblem(
    { title, detail, ...problem, status: response.status },
    Number(response.headers.get("Retry-After")) || 0,
  );
}

// Sends a request and reads the answer; `signal` cancels it.
async function call(path, options, read, ms = ASK_MS) {
  const { signal, lift } = limit(ms, options?.signal);
  try {
    return await read(await send(path, { ...options, signal }));
  } catch (error) {
    throw told(error);
  } finally {
    lift();
  }
}

export const readJson = (path, options, ms) => call(path, options, (response) => response.json(), ms);
export const readText = (path) => call(path, {}, (response) => response.text());
export const readFile = (path) => call(path, { cache: "default" }, (response) => response.blob());

// Whether a later retry may succeed.
export const passes = ({ kind, status }) => ["unreachable", "silent"].includes(kind) || [429, 502, 503, 504].includes(status);

const TYPES = new Set(["image/png", "image/jpeg", "image/webp", "image/bmp", "image/gif"]);

// Files of other types are sent as octet-stream, so that the server detects the format from their bytes.
const imageRequest = (body, signal) => ({
  method: "POST",
  body,
  signal,
  headers: { "Content-Type": TYPES.has(body.type) ? body.type : "application/octet-stream" },
});

export const classify = (body, signal) => readJson("classify?top_k=1", imageRequest(body, signal), SEND_MS);

// Yields one object per exit that the image goes on from, then the answer ("final": true).
export async function* classifyStream(body, signal) {
  const first = limit(SEND_MS, signal); // later lines are read as slowly as they are shown
  let text = "";
  let final = false;
  try {
    const response = await send("classify/stream?top_k=1", imageRequest(body, first.signal));
    first.lift();
    const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
    for (;;) {
      const { value, done } = await reader.read();
      if (done) break;
      const lines = (text + value).split("\n");
      text = lines.pop();
      for (const line of lines.filter(Boolean)) {
        const said = JSON.parse(line);
        if (said.status >= 400) throw new ServerProblem(said);
        final ||= said.final;
        yield said;
      }
    }
  } catch (error) {
    throw told(error);
  } finally {
    first.lift();
  }
  if (!final) throw unreachable("Its answer broke off. It may have been stopped: send the picture again.");
}

// Sends the whole budget: without `latency_ms`, the server would drop its latency target.
export const setBudget = (fraction, latencyMs, token) =>
  readJson("budget", {
    method: "PUT",
    body: JSON.stringify(latencyMs === undefined ? { fraction } : { fraction, latency_ms: latencyMs }),
    headers: { "Content-Type": "application/json", ...authority(token) },
  });

export const readAccess = (token) => readJson("budget/access", { headers: authority(token) });

const authority = (token) => (token ? { Authorization: `Bearer ${token}` } : {});
