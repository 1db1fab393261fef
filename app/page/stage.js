import { Actions } from "./actions.js";
import { html } from "./html.js";
import { useEffect, useRef } from "./lib/hooks.js";
import { Picture } from "./picture.js";
import { again, cancel, dismiss } from "./runs.js";
import { set, useStore } from "./store.js";

/** What is being drawn and what was drawn last, newest first. */
export function Stage() {
  const { runs, tally } = useStore();
  return html`<section class="stage" aria-label="Drawing">
    <p class="tally" role="status">${tally && html`<${Tally} ...${tally} />`}</p>
    ${!runs.length && html`<div class="empty">
      <p>Say what to draw, and press Draw. Pictures appear here while they are made.</p>
      <p class="muted">Drop a picture anywhere to draw from it, or to read its settings.</p></div>`}
    ${runs.map((run) => html`<${Run} key=${run.id} run=${run} />`)}
  </section>`;
}

function Tally({ images, forwards, alone }) {
  const counted = (count, what) => `${count} ${what}${count === 1 ? "" : "s"}`;
  return html`<strong>${`${counted(images, "image")} in ${counted(forwards, "forward")}`}</strong>
    ${alone > forwards && html`<span class="muted"> One after another they would take ${alone}.</span>`}`;
}

function Run({ run }) {
  const article = useRef(null);
  useEffect(() => article.current.scrollIntoView({ block: "nearest" }), []);
  const ended = run.status === "ended";
  const { prompt, class_label } = run.requests[0].body;
  const failed = run.cells.some((cell) => cell.status === "failed");
  return html`<article ref=${article} class="run" aria-busy=${!ended}>
    <header class="row">
      <h2 dir="auto">${prompt || class_label || "no prompt"}</h2>
      ${ended && failed && html`<button type="button" onClick=${() => again(run)}>Try again</button>`}
      ${ended
        ? html`<button type="button" aria-label="Take off the page" onClick=${() => dismiss(run)}>✕</button>`
        : html`<button type="button" onClick=${() => cancel(run)}>Cancel</button>`}
    </header>
    ${run.fault && html`<p class="fault" role="alert">${run.fault}</p>`}
    <div class=${`cells ${run.cells.length > 1 ? "several" : ""}`}>
      ${run.cells.map((cell) => html`<${Cell} key=${`${cell.request}-${cell.image}`} cell=${cell} run=${run} />`)}
    </div>
  </article>`;
}

function Cell({ cell, run }) {
  const { record, preview, label, seed } = cell;
  const drawn = cell.body.prompt ?? String(cell.body.class_label);
  const which = label || (cell.body.n > 1 ? `image ${cell.image + 1}` : "");
  const what = [drawn || "a picture", which].filter(Boolean).join(", ");
  const left = cell.steps ? 1 - cell.step / cell.steps : 1;
  const shape = { "--shape": shapeOf(cell) };
  return html`<figure class=${`cell ${cell.status}`}>
    ${record && html`<button type="button" class="frame" style=${shape} aria-label=${`Open ${what}`}
      onClick=${() => set({ opened: record })}>
      <${Picture} blob=${record.blob} alt=${what} /></button>`}
    ${!record && html`<div class="frame" style=${shape}>
      ${preview && html`<${Picture} blob=${preview} alt=${`Preview of ${what}`} />`}
      ${isOpen(cell) && html`<div class="noise" style=${{ opacity: preview ? left / 2 : left }}></div>`}
    </div>`}
    <figcaption>
      ${label && html`<strong>${label}</strong>`}
      ${isOpen(cell) && html`<progress aria-label=${`Progress of ${what}`}
        max=${cell.steps || 1} value=${cell.step}></progress>`}
      <span class="muted numbers">${stateOf(cell, seed, run.loading)}</span>
      ${cell.fault && cell.fault !== run.fault && html`<span class="fault" role="alert">${cell.fault}</span>`}
      ${warningsOf(record).map((warning) => html`<span class="muted">${warning}</span>`)}
      ${record && run.cells.length === 1 && html`<${Actions} record=${record} />`}
    </figcaption>
  </figure>`;
}

/** Width through height. */
function shapeOf({ body, record }) {
  const [width, height] = (record?.reply.size ?? body.size ?? "").split("x").map(Number);
  return width && height ? width / height : 1;
}

function isOpen({ status }) {
  return status === "waiting" || status === "queued" || status === "drawing";
}

/** The server's warnings, but for those about previews, which nobody asked for by name. */
function warningsOf(record) {
  return (record?.reply.warnings ?? []).filter((warning) => !warning.startsWith("partial_images"));
}

/** One line about a cell: where it waits, its step, or how long it took. */
function stateOf({ status, step, steps, position, ready, record }, seed, loading) {
  if (status === "queued" && loading) return `${loading} is being loaded`;
  if (status === "queued") {
    const seconds = Math.max(0, Math.round((ready - Date.now()) / 1000));
    const line = position ? `${position} before it in the queue` : "first in the queue";
    return seconds ? `${line}, about ${seconds} s` : line;
  }
  if (status === "drawing") return `step ${step} of ${steps}`;
  if (status === "done") {
    const { timings = {} } = record.reply;
    const seconds = (timings.queue ?? 0) + (timings.encode ?? 0) + (timings.denoise ?? 0) + (timings.decode ?? 0);
    const shared = (timings.shared ?? 1).toFixed(1);
    const taken = timings.steps === 1 ? "1 step" : `${timings.steps} steps`;
    return `${taken} in ${seconds.toFixed(seconds < 10 ? 1 : 0)} s, ${shared} images a forward, seed ${seed}`;
  }
  return { waiting: "waiting for a connection", cancelled: "cancelled" }[status] ?? "";
}
