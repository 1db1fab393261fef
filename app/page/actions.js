import { key, origin } from "./api.js";
import { html } from "./html.js";
import { useState } from "./lib/hooks.js";
import { download } from "./picture.js";
import * as pictures from "./pictures.js";
import { change, fill } from "./request.js";
import { curl, python } from "./snippets.js";
import { startFrom } from "./source.js";
import { get, set } from "./store.js";

const COPIED = 1500; // milliseconds for which a button says that it has copied

/** What can be done with a finished picture. */
export function Actions({ record }) {
  const [copied, setCopied] = useState("");
  const facts = record.facts ?? {};
  const copy = async (name, write) => {
    const { path, mask } = record;
    await toClipboard(write({ origin: origin(), path, facts, closed: Boolean(key()), masked: Boolean(mask) }));
    setCopied(name);
    setTimeout(() => setCopied(""), COPIED);
  };
  const name = `instep-${facts.seed ?? record.created}.png`;
  const button = (words, act) => html`<button type="button" onClick=${act}>${words}</button>`;
  return html`<div class="actions">
    ${button("Use this seed", () => useSeed(facts.seed))}
    ${button("Use its settings", () => restore(record))}
    ${button("Edit", () => startFrom(record.blob, name))}
    ${button(copied === "curl" ? "Copied" : "Copy as curl", () => copy("curl", curl))}
    ${button(copied === "python" ? "Copied" : "Copy as Python", () => copy("python", python))}
    ${button("Download", () => download(record.blob, name))}
    ${record.source && button("Download the source", () => download(record.source, "source.png"))}
    ${record.mask && button("Download the mask", () => download(record.mask, "mask.png"))}
    ${button("Delete", () => remove(record))}
  </div>`;
}

function useSeed(seed) {
  change("seed", seed);
  set({ locked: true, opened: null });
}

async function restore({ facts, source, mask }) {
  set({ opened: null, source: source && { blob: source, name: "its source", mask } });
  await fill(facts ?? {});
}

/** NOTE: a picture leaves the page once it has left the gallery's store, so that a reload cannot bring it back. */
async function remove({ id }) {
  await pictures.remove(id);
  set({ pictures: get().pictures.filter((one) => one.id !== id), opened: null });
  for (const run of get().runs) run.cells = run.cells.filter((cell) => cell.record?.id !== id);
  set({ runs: get().runs.filter((run) => run.cells.length) });
}

/** NOTE: without https only this machine's own pages may use the clipboard's interface. */
async function toClipboard(words) {
  try {
    return await navigator.clipboard.writeText(words);
  } catch {
    // it is not there, or the browser does not allow it
  }
  const area = Object.assign(document.createElement("textarea"), { value: words });
  (document.querySelector("dialog[open]") ?? document.body).append(area);
  area.select();
  document.execCommand("copy");
  area.remove();
}
