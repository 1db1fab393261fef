/** From the form to the body of a request, and back. */

import { read } from "./api.js";
import { kindOf, schedulesOf, SENDING, takes } from "./fields.js";
import { get, set } from "./store.js";

const FORM = "instep-form";
const KEPT = ["prompt", "negative_prompt", "seed", "n"]; // when another model is chosen

let choices = 0;

/** Keep what the form says for the next visit. */
export function remember({ model, values, locked }) {
  try {
    if (model) localStorage.setItem(FORM, JSON.stringify({ id: model.id, values, locked }));
  } catch {
    // a private window keeps nothing
  }
}

/** What the form said at the last visit: { id, values, locked }, or {}. */
export function remembered() {
  try {
    return JSON.parse(localStorage.getItem(FORM)) ?? {};
  } catch {
    return {};
  }
}

/** Where a model is; its id may have slashes. */
export function addressOf(id) {
  return `v1/models/${id.split("/").map(encodeURIComponent).join("/")}`;
}

/** The body that the form asks for, with a seed. */
export function bodyOf({ model, values, locked }) {
  const seed = locked && values.seed !== undefined ? values.seed : crypto.getRandomValues(new Uint32Array(1))[0];
  const asked = Object.entries(values).filter(([name, value]) => value !== undefined && name in model.fields);
  const previews = kindOf(model.fields.partial_images).maximum;
  const body = { ...Object.fromEntries(asked), model: model.id, seed, partial_images: previews };
  if (!schedulesOf(model, body).includes(body.schedule)) delete body.schedule;
  if (model.condition === "prompt") return { prompt: "", ...body };
  delete body.prompt; // it stays in the form, for a model that draws prompts
  if (/^\d+$/.test(body.class_label)) body.class_label = Number(body.class_label);
  return body;
}

/** Set one field; undefined is the model's default. */
export function change(name, value) {
  set({ values: { ...get().values, [name]: value } });
}

/** Fill the form with the body of a picture, its model first. Fields that the page does not show stay as they are. */
export async function fill({ model, ...facts }) {
  const known = get().models.find((one) => one.id === model || one.aliases.includes(model));
  if (known && known.id !== get().model?.id) await choose(known.id);
  if (!get().model || (known && known.id !== get().model.id)) return; // it is gone meanwhile, as the page says
  const { values, left } = fitting(get().model, facts);
  const isMissing = !known && typeof model === "string";
  const missing = isMissing ? `This server has no model ${model}; the form has the rest. ` : "";
  const without = left.length ? `${get().model.id} does not take its ${left.slice(0, 5).join(", ")}.` : "";
  set({ values, locked: "seed" in values, compare: null, fault: missing + without });
}

/**
 * What of a body from elsewhere a model takes: { values, left }, the fields and the names of the others.
 *
 * Of a sheet of several pictures it is the first.
 */
export function fitting({ fields }, facts) {
  const first = (name, value) => (["prompt", "class_label"].includes(name) && Array.isArray(value) ? value[0] : value);
  const asked = Object.entries(facts).filter(([name, value]) => value !== null && ![...SENDING, "grid"].includes(name));
  const pairs = asked.map(([name, value]) => [name, first(name, value)]);
  const fits = ([name, value]) => Object.hasOwn(fields, name) && takes(fields[name], value);
  const left = pairs.filter((pair) => !fits(pair)).map(([name]) => name.replaceAll("_", " "));
  return { values: Object.fromEntries(pairs.filter(fits)), left };
}

/** Choose a model. What the person wrote stays, the settings are those of the new model. */
export async function choose(id) {
  const turn = ++choices;
  try {
    const model = await read(addressOf(id));
    if (turn !== choices) return;
    const kept = KEPT.filter((name) => name in model.fields && get().values[name] !== undefined);
    const values = Object.fromEntries(kept.map((name) => [name, get().values[name]]));
    const compare = get().compare && { ...get().compare, values: undefined };
    set({ model, values, compare, fault: "", asksKey: false });
  } catch (error) {
    if (turn === choices) set(error.status === 401 ? { asksKey: true } : { fault: error.message });
  }
}
