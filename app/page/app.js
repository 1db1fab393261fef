import { keepKey, key, read } from "./api.js";
import { Form } from "./form.js";
import { Dialog, Gallery, Opened } from "./gallery.js";
import { html } from "./html.js";
import { useEffect, useState } from "./lib/hooks.js";
import { Picture } from "./picture.js";
import * as pictures from "./pictures.js";
import { readFacts } from "./png.js";
import { choose, fill, fitting, remember, remembered } from "./request.js";
import { cancel } from "./runs.js";
import { startFrom } from "./source.js";
import { Stage } from "./stage.js";
import { get, set, useStore } from "./store.js";

const KINDS = ["image/png", "image/jpeg", "image/webp"];

/** The whole page. */
export function App() {
  const { asksKey, fault } = useStore();
  useEffect(() => {
    load();
    pictures.all().then(join);
    return listen({ dragover, dragleave, drop, paste, keydown });
  }, []);
  useEffect(() => remember(get()));
  return html`
    <header class="bar">
      <h1><svg width="20" height="20" viewBox="0 0 32 32" fill="currentColor" aria-hidden="true">
        <rect x="2" y="20" width="8" height="10" rx="2" /><rect x="12" y="11" width="8" height="19" rx="2" />
        <rect x="22" y="2" width="8" height="28" rx="2" /></svg>Instep</h1>
      <label class="button">Open a picture
        <input class="unseen" type="file" accept=${KINDS.join(",")} onChange=${opened} /></label>
      ${key() && !asksKey && html`<button type="button" onClick=${forget}>Forget the key</button>`}
      <a href="docs">API</a>
    </header>
    ${fault && html`<p class="fault banner" role="alert">${fault}${" "}
      <button type="button" onClick=${() => set({ fault: "" })}>Dismiss</button></p>`}
    <main>
      ${asksKey ? html`<${AskKey} />` : html`<${Form} />`}
      <div class="right"><${Stage} /><${Gallery} /></div>
    </main>
    <${Opened} />
    <${Dropped} />`;
}

async function load() {
  try {
    const { data } = await read("v1/models");
    const { id, values, locked } = remembered();
    const known = data.find((one) => one.id === id);
    const first = known ?? data.find((one) => one.downloaded) ?? data[0];
    set({ models: data, asksKey: false, fault: data.length ? "" : "This server has no models." });
    if (first) await choose(first.id);
    const { model } = get();
    if (!known || known.id !== model?.id) return;
    set({ values: fitting(model, Object(values)).values, locked: Boolean(locked) });
  } catch (error) {
    set(error.status === 401 ? { asksKey: true } : { fault: error.message });
  }
}

/** Put the pictures of earlier visits behind those that were drawn meanwhile. */
function join(all) {
  const drawn = get().pictures;
  set({ pictures: [...drawn, ...all.filter(({ id }) => drawn.every((one) => one.id !== id))] });
}

function forget() {
  keepKey("");
  set({ models: [], model: null });
  load();
}

function AskKey() {
  const [wrong, setWrong] = useState(false);
  const send = async (event) => {
    event.preventDefault();
    keepKey(new FormData(event.target).get("key").trim());
    await load();
    setWrong(get().asksKey && !get().fault);
  };
  return html`<form class="form" onSubmit=${send} aria-label="Key">
    <label class="field wide"><span>API key</span>
      <input name="key" type="password" autocomplete="off" required autofocus pattern="\\s*[!-~]+\\s*"
      title="letters, digits and signs without spaces" /></label>
    ${wrong && html`<p class="fault wide" role="alert">This server does not know this key.</p>`}
    <p class="muted wide">This server draws for those who have a key. It stays in this tab until you close it.</p>
    <div class="draw"><button class="primary" type="submit">Continue</button></div>
  </form>`;
}

function listen(handlers) {
  for (const [name, handler] of Object.entries(handlers)) window.addEventListener(name, handler);
  return () => {
    for (const [name, handler] of Object.entries(handlers)) window.removeEventListener(name, handler);
  };
}

function dragover(event) {
  if (!event.dataTransfer.types.includes("Files")) return; // text that goes into a field
  event.preventDefault();
  document.body.classList.add("dropping");
}

function dragleave(event) {
  if (!event.relatedTarget) document.body.classList.remove("dropping");
}

/** Escape cancels what was started last, where there is no window and no list of a field for it to close. */
function keydown(event) {
  if (event.key !== "Escape" || event.isComposing) return;
  if (event.target.matches("select, [list]") || document.querySelector("dialog[open]")) return;
  const run = get().runs.find(({ status }) => status !== "ended");
  if (run) cancel(run);
}

function drop(event) {
  document.body.classList.remove("dropping");
  if (!event.dataTransfer.types.includes("Files")) return;
  event.preventDefault();
  offer(event.dataTransfer.files[0]);
}

function paste(event) {
  const { files, types } = event.clipboardData;
  if (!types.includes("text/plain")) offer(files[0]); // else it is text that also comes as a picture of it
}

function opened(event) {
  offer(event.target.files[0]);
  event.target.value = "";
}

/** Ask what to do with a picture from outside. */
async function offer(file) {
  if (!file) return;
  if (!KINDS.includes(file.type)) {
    set({ fault: `${file.name} is no PNG, JPEG or WebP.` });
    return;
  }
  const { facts } = await readFacts(file);
  set({ dropped: { blob: file, name: file.name, facts }, fault: "" });
}

function Dropped() {
  const { dropped, model } = useStore();
  if (!dropped) return null;
  const { blob, name, facts } = dropped;
  const close = () => set({ dropped: null });
  const use = () => {
    close();
    fill(facts);
  };
  return html`<${Dialog} label=${name} onClose=${close}>
    <${Picture} blob=${blob} alt=${name} />
    ${facts && html`<p>It says how it was drawn: ${facts.prompt ?? facts.class_label ?? ""}</p>`}
    <div class="actions">
      ${model && html`<button type="button" class="primary" onClick=${() => startFrom(blob, name)}>
        Draw from this picture</button>`}
      ${model && facts && html`<button type="button" onClick=${use}>Use its settings</button>`}
    </div>
  <//>`;
}
