import { Actions } from "./actions.js";
import { labelOf } from "./fields.js";
import { html } from "./html.js";
import { useEffect, useRef, useState } from "./lib/hooks.js";
import { Picture } from "./picture.js";
import * as pictures from "./pictures.js";
import { set, useStore } from "./store.js";

const PAGE = 24; // pictures that are shown before one asks for more

/** The pictures that this browser keeps. */
export function Gallery() {
  const { pictures: all } = useStore();
  const [shown, setShown] = useState(PAGE);
  return html`<section class="gallery" aria-label="Gallery">
    <header class="row"><h2>Gallery</h2>
      ${all.length > 0 && html`
        <span class="muted">${all.length} ${all.length === 1 ? "picture" : "pictures"}, kept in this browser</span>
        <button type="button" onClick=${clear}>Delete all</button>`}</header>
    ${!all.length && html`<p class="muted">Pictures that you draw stay here, also after a reload.</p>`}
    ${all.length > 0 && !pictures.lasting() && html`<p class="muted">
      This browser keeps nothing: the pictures are gone after a reload.</p>`}
    <ul class="thumbs">${all.slice(0, shown).map((record) => html`<li key=${record.id}>
      <button type="button" class="frame" aria-label=${`Open ${nameOf(record)}`}
        onClick=${() => set({ opened: record })}>
        <${Picture} blob=${record.blob} alt=${nameOf(record)} /></button></li>`)}</ul>
    ${all.length > shown && html`<button type="button" onClick=${() => setShown(shown + PAGE)}>Show more</button>`}
  </section>`;
}

function nameOf({ facts, reply }) {
  return String(facts?.prompt ?? reply?.revised_prompt ?? facts?.class_label ?? "picture") || "picture";
}

async function clear() {
  if (!confirm("Delete all pictures that this browser keeps?")) return;
  await pictures.clear();
  set({ pictures: [] });
}

/** One picture, large, with its settings. */
export function Opened() {
  const { opened } = useStore();
  const facts = Object.entries(opened?.facts ?? {}).filter(([, value]) => value !== "");
  return opened && html`<${Dialog} label=${nameOf(opened)} onClose=${() => set({ opened: null })}>
    <${Picture} blob=${opened.blob} alt=${nameOf(opened)} />
    <dl class="facts">${facts.map(([name, value]) => html`<div key=${name}><dt>${labelOf(name)}</dt>
      <dd dir="auto">${typeof value === "string" ? value : JSON.stringify(value)}</dd></div>`)}</dl>
    <${Actions} record=${opened} />
  <//>`;
}

/** A window over the page, which Escape and its button close. */
export function Dialog({ label, onClose, children }) {
  const dialog = useRef(null);
  useEffect(() => {
    const before = document.activeElement;
    dialog.current.showModal();
    return () => before?.focus?.();
  }, []);
  const beside = (event) => event.target === dialog.current && onClose();
  return html`<dialog ref=${dialog} aria-label=${label} onClose=${onClose} onClick=${beside}>
    <div class="window">
      <header class="row"><h2 dir="auto">${label}</h2>
        <button type="button" aria-label="Close" onClick=${onClose}>✕</button></header>
      ${children}
    </div>
  </dialog>`;
}
