/** What is drawn: each run is one request or several that are compared, each cell one image of it. */

import { EDIT, events, Fault, read, text } from "./api.js";
import { addressOf } from "./request.js";
import { get, set } from "./store.js";
import * as pictures from "./pictures.js";
import { readFacts } from "./png.js";

const STREAMS = 4; // a browser opens six connections to a host, and the form needs some
const LOOK = 1000; // milliseconds between two looks at a model that is being loaded
const SHOWN = 8; // runs that stay on the page
const DRAW = "v1/images/generations";
const BATCH = "v1/images/batch";

const waiting = [];
let streams = 0;
let before = null; // the counters when the first of the present runs began
let count = 0;

/**
 * Begin to draw. requests: [{ label, body }], several to compare them. source: { blob, mask } to start from.
 *
 * Every body has a seed, and its `n` images count up from it.
 */
export function start(requests, source = null) {
  const cells = requests.flatMap(({ label, body }, request) =>
    Array.from({ length: body.n ?? 1 }, (_, image) => newCell(label, body, request, image)),
  );
  const run = { id: ++count, requests, source, cells, controller: new AbortController(), status: "waiting", fault: "" };
  const old = get().runs.filter((one) => one.status === "ended").slice(SHOWN - 1);
  set({ runs: [run, ...get().runs.filter((one) => !old.includes(one))] });
  waiting.push(run);
  next();
  return run;
}

/** Give a run up: the server stops drawing it at the next step. */
export function cancel(run) {
  if (run.status === "ended") return;
  run.controller.abort();
  if (waiting.includes(run)) {
    waiting.splice(waiting.indexOf(run), 1);
    end(run);
  }
}

/** Take a run off the page. Its pictures stay in the gallery. */
export function dismiss(run) {
  cancel(run);
  set({ runs: get().runs.filter((one) => one !== run) });
}

/** Draw a run again, with the same requests. */
export function again(run) {
  dismiss(run);
  start(run.requests, run.source);
}

/** Whether anything is being drawn. */
export function busy() {
  return get().runs.some((run) => run.status !== "ended");
}

function newCell(label, body, request, image) {
  const seed = body.seed + image;
  const state = { status: "waiting", step: 0, steps: 0, preview: null, record: null, fault: "" };
  return { label, body, request, image, seed, ...state };
}

function next() {
  while (waiting.length && streams < STREAMS) {
    const run = waiting.shift();
    streams += 1;
    draw(run).finally(() => {
      streams -= 1;
      end(run);
      next();
    });
  }
}

async function draw(run) {
  run.status = "running";
  set({ tally: null });
  before ??= counters();
  try {
    await before;
    const [path, body] = await message(run);
    followLoad(run);
    for await (const event of events(path, body, run.controller.signal)) await take(run, event, path);
    fail(run.cells, "The stream ended before the picture was done.");
  } catch (error) {
    if (error.name === "AbortError") return;
    run.fault = error.message;
    if (error instanceof Fault && error.status === 401) set({ asksKey: true });
    if (!(error instanceof Fault)) console.error(error);
  }
}

/** Until its first step, look whether the model of a run is being loaded. */
async function followLoad(run) {
  const { model } = run.requests[0].body;
  while (run.status === "running" && !run.cells.some((cell) => cell.step || cell.record)) {
    const { state } = await read(addressOf(model)).catch(() => ({}));
    run.loading = state === "loading" ? model : "";
    set({});
    await new Promise((resolve) => setTimeout(resolve, LOOK));
  }
}

/** The address and the body of a run. */
async function message({ requests, source }) {
  const bodies = requests.map(({ body }) => ({ ...body, progress: true }));
  if (bodies.length > 1) return [BATCH, { requests: bodies }];
  const body = { ...bodies[0], stream: true };
  if (!source) return [DRAW, body];
  const mask = source.mask && { mask_image: await base64(source.mask) };
  return [EDIT, { ...body, image: await base64(source.blob), ...mask }];
}

async function take(run, event, path) {
  const { request_index: request } = event; // an event without it is about the whole stream
  const cells = run.cells.filter((cell) => request === undefined || cell.request === request);
  const cell = cells.find(({ image }) => image === (event.image_index ?? 0));
  const kind = event.error ? "error" : event.type.split(".").at(-1);
  if (kind === "error") fail(cells, event.error.message);
  if (kind === "accepted") {
    const ready = Date.now() + 1000 * event.estimated_wait;
    cells.forEach((one) => Object.assign(one, { status: "queued", position: event.queue_position, ready }));
  }
  if (kind === "error" || kind === "accepted") return set({});
  if (!cell) return;
  if (kind === "progress") Object.assign(cell, { status: "drawing", step: event.step, steps: event.steps });
  if (kind === "partial_image") cell.preview = blobOf(event.b64_json);
  if (kind === "completed") await complete(run, cell, event, path === BATCH ? DRAW : path);
  set({});
}

async function complete(run, cell, event, path) {
  const { b64_json: encoded, ...reply } = event;
  const blob = blobOf(encoded);
  const { facts } = await readFacts(blob);
  const { blob: source = null, mask = null } = run.source ?? {};
  const id = crypto.getRandomValues(new Uint32Array(2)).join("-");
  cell.record = { id, created: Date.now(), blob, facts, path, reply, source, mask };
  Object.assign(cell, { status: "done", preview: null });
  set({ pictures: [cell.record, ...get().pictures].slice(0, pictures.MOST) });
  pictures.add(cell.record).then(() => set({})); // the stream goes on meanwhile
}

function fail(cells, fault, status = "failed") {
  cells.filter(open).forEach((cell) => Object.assign(cell, { status, fault }));
}

function open(cell) {
  return cell.status !== "done" && cell.status !== "failed";
}

function end(run) {
  run.status = "ended";
  fail(run.cells, run.fault, run.controller.signal.aborted ? "cancelled" : "failed");
  run.cells.forEach((cell) => (cell.preview = null));
  set({});
  if (!busy()) tally();
}

/** Count the images and the forward passes since the first of the runs that have just ended. */
async function tally() {
  const started = await before;
  before = null;
  const now = await counters();
  if (!started || !now || busy()) return;
  const done = get().runs.flatMap((run) => run.cells).filter((cell) => cell.record?.created >= started.at);
  const steps = done.reduce((sum, cell) => sum + (cell.record.reply.timings?.steps ?? 0), 0);
  const images = now.images - started.images;
  const forwards = now.forwards - started.forwards;
  if (images > 0 && forwards > 0) set({ tally: { images, forwards, alone: images === done.length ? steps : 0 } });
}

async function counters() {
  const at = Date.now();
  const lines = await text("metrics").then((all) => all.split("\n"), () => null);
  const values = (name) => lines.filter((line) => line.startsWith(`${name}{`)).map((line) => line.split(" ").at(-1));
  const sum = (name) => values(name).reduce((total, value) => total + Number(value), 0);
  return lines && { at, images: sum("instep_images_total"), forwards: sum("instep_denoise_step_seconds_count") };
}

function blobOf(encoded) {
  const letters = atob(encoded);
  const bytes = new Uint8Array(letters.length);
  for (let at = 0; at < bytes.length; at += 1) bytes[at] = letters.charCodeAt(at);
  return new Blob([bytes], { type: "image/png" });
}

async function base64(blob) {
  const reader = new FileReader();
  const loaded = new Promise((resolve, reject) => Object.assign(reader, { onload: resolve, onerror: reject }));
  reader.readAsDataURL(blob);
  await loaded.catch(() => {
    throw new Fault(0, "This picture can no longer be read. Open it again.");
  });
  return reader.result.slice(reader.result.indexOf(",") + 1);
}
