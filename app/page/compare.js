import { kindOf, labelOf, schedulesOf } from "./fields.js";
import { html } from "./html.js";
import { bodyOf } from "./request.js";
import { get, set, useStore } from "./store.js";

const FIELDS = ["num_inference_steps", "guidance_scale", "sampler", "schedule", "model"];
const SHARED = [
  ...["prompt", "class_label", "negative_prompt", "num_inference_steps", "guidance_scale", "seed", "partial_images"],
];

/** The requests that the form asks for: one, or one for each value that is compared, all with the same seed. */
export function requestsOf(state) {
  const body = bodyOf(state);
  if (!state.compare || state.source) return [{ label: "", body }];
  const { field } = state.compare;
  const values = { ...state.values, n: 1, seed: body.seed };
  const bodyWith = (value) => {
    if (field === "model") return { ...onlyShared(body), n: 1, model: value };
    return bodyOf({ ...state, locked: true, values: { ...values, [field]: value } });
  };
  return valuesOf(state).map((value) => ({ label: wordsOf(field, value), body: bodyWith(value) }));
}

/** A model may not take the settings of another: it gets those that all have. */
function onlyShared(body) {
  return Object.fromEntries(Object.entries(body).filter(([name]) => SHARED.includes(name)));
}

function wordsOf(field, value) {
  if (field === "num_inference_steps") return value === 1 ? "1 step" : `${value} steps`;
  if (field === "guidance_scale") return `guidance ${value}`;
  return value;
}

/** The values that are compared, each once, in order. */
function valuesOf(state) {
  const { field, values } = state.compare;
  const choices = choicesOf(field, state);
  if (choices) return values?.filter((one) => choices.includes(one)) ?? choices.slice(0, 2);
  const usual = field === "num_inference_steps" ? usualSteps(kindOf(state.model.fields[field])) : "1, 3, 5, 8";
  const typed = values ?? usual;
  const numbers = typed.split(/[ ,;]+/).filter(Boolean).map(Number).filter(Number.isFinite);
  return [...new Set(numbers)];
}

function usualSteps({ initial }) {
  return [...new Set([1, Math.ceil(initial / 4), Math.ceil(initial / 2), initial])].join(", ");
}

/** What can be chosen for a field; undefined for one that has numbers. */
function choicesOf(field, { model, models, values }) {
  const isAlike = (one) => one.downloaded && one.condition === model.condition;
  if (field === "model") return models.filter(isAlike).map((one) => one.id);
  if (field === "schedule") return schedulesOf(model, values);
  return kindOf(model.fields[field]).options;
}

/** What differs between pictures that are drawn side by side. */
export function CompareFields() {
  const { model, compare } = useStore();
  const known = FIELDS.filter((field) => field === "model" || field in model.fields);
  const fields = known.filter((field) => field === compare?.field || (choicesOf(field, get())?.length ?? 2) > 1);
  const put = (changes) => set({ compare: { ...get().compare, ...changes } });
  const turn = (event) => set({ compare: event.target.checked ? { field: fields[0] } : null });
  const choices = compare && choicesOf(compare.field, get());
  return html`<fieldset class="wide compare">
    <legend><label class="check">
      <input type="checkbox" checked=${Boolean(compare)} onChange=${turn} />Compare side by side</label></legend>
    ${compare && html`<div class="fields">
      <label class="field wide"><span>What differs</span>
        <select value=${compare.field} onChange=${(event) => put({ field: event.target.value, values: undefined })}>
          ${fields.map((field) => html`<option value=${field}>${labelOf(field)}</option>`)}
        </select></label>
      ${choices
        ? html`<${Choices} field=${compare.field} choices=${choices} chosen=${valuesOf(get())}
          onChange=${(values) => put({ values })} />`
        : html`<label class="field wide"><span>Values, with commas between them</span>
          <input type="text" inputmode="decimal" value=${compare.values ?? valuesOf(get()).join(", ")}
            onInput=${(event) => put({ values: event.target.value })} /></label>`}
      <p class="muted wide">One seed, and all of them share forward passes.</p>
    </div>`}
  </fieldset>`;
}

function Choices({ field, choices, chosen, onChange }) {
  const toggle = (one) => onChange(choices.filter((other) => (other === one) !== chosen.includes(other)));
  return html`<fieldset class="wide choices"><legend>${labelOf(field)}</legend>
    ${choices.map((one) => html`<label class="check">
      <input type="checkbox" checked=${chosen.includes(one)} onChange=${() => toggle(one)} />${one}</label>`)}
  </fieldset>`;
}
