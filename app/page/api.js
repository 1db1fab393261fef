/** Calls of the server that sent this page, by addresses relative to it, with the key of this tab. */

const KEY = "instep-key";

/** The route of requests that start from a picture. */
export const EDIT = "v1/images/edits";
const PATIENCE = 3000; // milliseconds

let kept = storage((store) => store.getItem(KEY)) ?? "";

/** The key of this tab; "" if there is none. */
export function key() {
  return kept;
}

/** Keep a key until the tab is closed; an empty one forgets it. */
export function keepKey(value) {
  kept = value;
  storage((store) => (value ? store.setItem(KEY, value) : store.removeItem(KEY)));
}

/** NOTE: a browser that blocks cookies throws at the name alone. */
function storage(use) {
  try {
    return use(sessionStorage);
  } catch {
    return null; // the key lives until a reload
  }
}

/** Where the server is, without a slash at the end. */
export function origin() {
  return new URL(".", document.baseURI).href.replace(/\/$/, "");
}

/** An answer that is an error, with the server's words. status: 0 where there was no answer. */
export class Fault extends Error {
  constructor(status, message) {
    super(message ?? `The server answered ${status}.`);
    this.status = status;
  }
}

async function call(path, options = {}) {
  const headers = { ...(key() && { Authorization: `Bearer ${key()}` }), ...options.headers };
  let response;
  try {
    response = await fetch(path, { ...options, headers });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, "The server does not answer. Is it running?");
  }
  if (response.ok) return response;
  const body = await response.json().catch(() => ({}));
  throw new Fault(response.status, body?.error?.message);
}

/** The JSON at this address. Throws a Fault. */
export async function read(path) {
  return (await call(path)).json();
}

/** The text at this address. Throws a Fault, also if it does not come within some seconds. */
export async function text(path) {
  return (await call(path, { signal: AbortSignal.timeout(PATIENCE) })).text();
}

/**
 * Post a body and yield the data of each server-sent event as it comes. Throws a Fault, or an AbortError.
 *
 * EventSource can neither post nor send a header.
 */
export async function* events(path, body, signal) {
  const headers = { "Content-Type": "application/json", Accept: "text/event-stream" };
  const response = await call(path, { method: "POST", body: JSON.stringify(body), headers, signal });
  const reader = response.body.pipeThrough(new TextDecoderStream()).getReader();
  let rest = "";
  try {
    for (;;) {
      const { done, value } = await reader.read();
      if (done) return;
      const blocks = (rest + value).split("\n\n");
      rest = blocks.pop();
      yield* blocks.map(dataOf).filter(Boolean);
    }
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new Fault(0, "The connection to the server broke.");
  } finally {
    reader.cancel().catch(() => {});
  }
}

function dataOf(block) {
  const lines = block.split("\n").filter((line) => line.startsWith("data:"));
  return lines.length ? JSON.parse(lines.map((line) => line.slice(5)).join("")) : null;
}
