import { html } from "./html.js";
import { useEffect, useRef } from "./lib/hooks.js";
import { MaskEditor } from "./mask.js";
import { get, set, useStore } from "./store.js";

/** The picture that the next one starts from, with the brush for its mask. */
export function Source() {
  const { source } = useStore();
  const section = useRef(null);
  useEffect(() => section.current.scrollIntoView({ block: "nearest" }), [source.blob]);
  return html`<section ref=${section} class="source wide" aria-label="Picture to start from">
    <div class="row"><h2>Start from ${source.name}</h2>
      <button type="button" onClick=${() => set({ source: null })}>Remove the picture</button></div>
    <${MaskEditor} picture=${source.blob} value=${source.mask} onChange=${keep} />
    <p class="muted">Paint what is drawn anew; Strength 1 leaves nothing of it.
      ${" "}Without a mask the whole picture changes.</p>
  </section>`;
}

function keep(mask) {
  set({ source: { ...get().source, mask } });
}

/** Start the next picture from this one. */
export function startFrom(blob, name) {
  set({ source: { blob, name, mask: null }, compare: null, opened: null, dropped: null });
}
