import { read } from "./api.js";
import { CompareFields, requestsOf } from "./compare.js";
import { EDITING, kindOf, labelOf, MAIN, others, schedulesOf, sizesOf, valueOf } from "./fields.js";
import { html } from "./html.js";
import { useEffect, useState } from "./lib/hooks.js";
import { addressOf, change, choose } from "./request.js";
import { start } from "./runs.js";
import { Source } from "./source.js";
import { get, set, useStore } from "./store.js";

/** The form: everything that a request for the chosen model can say. */
export function Form() {
  const { models, model, values, compare, source, fault } = useStore();
  const why = fault ? "There is no model." : "Loading the models ...";
  if (!model) return html`<form class="form"><p class="muted">${why}</p></form>`;
  const field = (name) => html`<${Field} key=${name} name=${name} />`;
  const here = (names) => names.filter((name) => name in model.fields);
  const draw = (event) => {
    event.preventDefault();
    submit();
  };
  const sendByKey = (event) => {
    if (event.key !== "Enter" || event.shiftKey || event.isComposing) return;
    event.preventDefault();
    event.target.form.requestSubmit();
  };
  const unfold = (event) => event.target.closest("details")?.setAttribute("open", ""); // else nobody sees what is wrong
  return html`
    <form class="form" onSubmit=${draw} onInvalidCapture=${unfold} aria-label="What to draw">
      ${source && html`<${Source} />`}
      ${model.condition === "prompt" && html`<label class="field wide">
        <span>Prompt</span>
        <textarea rows="3" dir="auto" required=${!source} maxlength=${kindOf(model.fields.prompt).maxLength}
          placeholder="red apple on a blue background" value=${values.prompt ?? ""} onKeyDown=${sendByKey}
          onInput=${(event) => change("prompt", event.target.value)}></textarea>
      </label>`}
      ${model.condition === "class_label" && html`<${Class} />`}
      <div class="draw">
        <button class="primary" type="submit">${wordsOf(get())}</button>
      </div>
      <label class="field wide"><span>Model</span>
        <select value=${model.id} onChange=${(event) => choose(event.target.value)}>
          ${models.map(({ id, downloaded }) => html`<option value=${id} disabled=${!downloaded}>
            ${id}${downloaded ? "" : " (not downloaded)"}</option>`)}
        </select>
      </label>
      ${model.description && html`<p class="muted wide">${model.description}</p>`}
      ${here(MAIN).map(field)}
      ${source && here(EDITING).map(field)}
      <${Seed} />
      ${"negative_prompt" in model.fields && html`<label class="field wide"><span>Negative prompt</span>
        <input type="text" dir="auto" value=${values.negative_prompt ?? ""} placeholder="what guidance moves away from"
          onInput=${(event) => change("negative_prompt", event.target.value || undefined)} /></label>`}
      <${Loras} />
      <${Refiner} />
      ${!source && html`<${CompareFields} />`}
      <details class="wide"><summary>More fields</summary>
        <div class="fields">${others(model.fields).map(field)}</div></details>
    </form>`;
}

function wordsOf(state) {
  if (state.compare) return `Draw ${requestsOf(state).length} side by side`;
  return state.source ? "Draw from the picture" : "Draw";
}

/** Draw what the form says. */
export function submit() {
  const state = get();
  set({ fault: "" });
  try {
    const requests = requestsOf(state);
    if (!requests.length) return set({ fault: "There is nothing to compare: give one value at least." });
    start(requests, state.source);
  } catch (error) {
    set({ fault: error.message });
  }
}

function Field({ name }) {
  const { model, values } = useStore();
  const schema = model.fields[name];
  const kind = { ...kindOf(schema), ...limitsOf(name, model, values) };
  const value = values[name];
  const put = (event) => change(name, valueOf(kind, event.target.value));
  const plain = { title: schema.description, value: value ?? "", onInput: put };
  if (kind.type === "boolean") {
    const checked = value ?? kind.initial ?? false;
    const turn = (event) => change(name, event.target.checked);
    return html`<label class="check wide" title=${schema.description}>
      <input type="checkbox" checked=${checked} onChange=${turn} />${labelOf(name)}</label>`;
  }
  if (kind.type === "enum") {
    const chosen = kind.options.includes(value) ? value : "";
    return html`<label class="field"><span>${labelOf(name)}</span><select ...${plain} value=${chosen}>
      <option value="">${kind.initial ?? "default"}</option>
      ${kind.options.filter((one) => one !== kind.initial).map((one) => html`<option value=${one}>${one}</option>`)}
    </select></label>`;
  }
  if (name === "size") {
    return html`<label class="field"><span>Size</span>
      <input ...${plain} placeholder=${kind.initial} pattern="[0-9]+x[0-9]+|auto" list="sizes" autocomplete="off" />
      <datalist id="sizes">${sizesOf(model).map((size) => html`<option value=${size} />`)}</datalist></label>`;
  }
  const number = kind.type === "integer" || kind.type === "number";
  const shown = Array.isArray(value) ? value.join(", ") : value ?? "";
  const step = kind.type === "integer" ? 1 : "any";
  const bounds = number ? { type: "number", min: kind.minimum, max: kind.maximum, step, inputmode: "decimal" } : {};
  return html`<label class="field"><span>${labelOf(name)}</span>
    <input ...${bounds} ...${plain} value=${shown} placeholder=${kind.initial ?? ""} /></label>`;
}

/** What some fields depend on beside the model: the sampler, and how many images a request may have. */
function limitsOf(name, model, values) {
  if (name === "num_inference_steps") return { maximum: model.most_steps[values.sampler ?? model.defaults.sampler] };
  if (name === "schedule") return { options: schedulesOf(model, values) };
  return {};
}

function Class() {
  const { model, values } = useStore();
  const [found, setFound] = useState([]);
  const typed = String(values.class_label ?? "");
  useEffect(() => {
    let current = true;
    const timer = setTimeout(async () => {
      const path = `${addressOf(model.id)}/classes?q=${encodeURIComponent(typed)}`;
      const { data } = await read(path).catch(() => ({ data: [] }));
      if (current) setFound(data.slice(0, 50));
    }, 120);
    return () => {
      current = false;
      clearTimeout(timer);
    };
  }, [model.id, typed]);
  const twice = (entry) => found.some((other) => other.name === entry.name && other.id !== entry.id);
  return html`<label class="field wide"><span>Class</span>
    <input type="search" value=${typed} list="classes" autocomplete="off" required
      placeholder=${`search ${model.classes} classes by name or number`}
      onInput=${(event) => change("class_label", event.target.value || undefined)} />
    <datalist id="classes">${found.map((one) => html`<option value=${twice(one) ? one.id : one.name}>
      ${one.id} ${one.name}</option>`)}</datalist>
  </label>`;
}

function Seed() {
  const { values, locked } = useStore();
  const put = (event) => {
    const seed = event.target.value === "" ? undefined : Number(event.target.value);
    set({ values: { ...get().values, seed }, locked: seed !== undefined });
  };
  return html`<div class="field seed wide">
    <label><span>Seed</span><input type="number" min="0" max=${Number.MAX_SAFE_INTEGER} step="1" inputmode="numeric"
      placeholder="a new one each time" value=${locked ? values.seed ?? "" : ""} onInput=${put} /></label>
    <label class="check"><input type="checkbox" checked=${locked} disabled=${values.seed === undefined}
      onChange=${(event) => set({ locked: event.target.checked })} />Lock seed</label>
  </div>`;
}

function Loras() {
  const { model, values } = useStore();
  const chosen = values.loras ?? [];
  const names = [...new Set([...model.loras, ...chosen.map((one) => one.name)])];
  if (!names.length) return null;
  const range = kindOf(model.fields.loras).items?.properties.weight ?? {};
  const put = (name, weight) => {
    const rest = chosen.filter((one) => one.name !== name);
    const loras = weight === undefined ? rest : [...rest, { name, weight }];
    change("loras", loras.length ? loras : undefined);
  };
  return html`<fieldset class="wide"><legend>LoRAs</legend>
    ${names.map((name) => {
      const weight = chosen.find((one) => one.name === name)?.weight;
      return html`<div class="row">
        <label class="check"><input type="checkbox" checked=${weight !== undefined}
          onChange=${(event) => put(name, event.target.checked ? range.default : undefined)} />${name}</label>
        ${weight !== undefined && html`<input type="number" min=${range.minimum} max=${range.maximum} step="0.05"
          value=${weight} aria-label=${`Weight of ${name}`}
          onInput=${(event) => put(name, Number(event.target.value))} />`}
      </div>`;
    })}
  </fieldset>`;
}

function Refiner() {
  const { model, values } = useStore();
  if (!model.refiners.length && !model.defaults.refiner) return null;
  const chosen = values.refiner;
  const usual = kindOf(model.fields.refiner).properties.switch_at.default;
  const put = (changes) => change("refiner", changes.model === "" ? undefined : { ...chosen, ...changes });
  return html`<fieldset class="wide"><legend>Refiner</legend><div class="fields">
    <label class="field"><span>Refiner model</span><select value=${chosen?.model ?? ""}
      onChange=${(event) => put({ model: event.target.value })}>
      <option value="">${model.defaults.refiner?.model ?? "none"}</option>
      ${model.defaults.refiner && html`<option value="none">none</option>`}
      ${model.refiners.map((one) => html`<option value=${one}>${one}</option>`)}
    </select></label>
    ${chosen && chosen.model !== "none" && html`<label class="field"><span>Switch at</span>
      <input type="number" min="0.01" max="0.99" step="0.01" value=${chosen.switch_at ?? usual}
        onInput=${(event) => put({ switch_at: Number(event.target.value) })} /></label>`}
  </div></fieldset>`;
}
