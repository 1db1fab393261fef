/** The fields of a model, as `GET /v1/models/{id}` has them: what control each takes, and how it is labelled. */

const LABELS = {
  num_inference_steps: "Steps",
  guidance_scale: "Guidance",
  true_cfg_scale: "True guidance",
  negative_prompt: "Negative prompt",
  class_label: "Class",
  n: "Images",
  loras: "LoRAs",
  clip_skip: "CLIP skip",
  max_sequence_length: "Text length",
  mask_blur: "Mask blur",
  overlay: "Keep what is not masked exactly",
};

/** Fields with a place of their own in the form, in this order. */
export const MAIN = ["num_inference_steps", "guidance_scale", "true_cfg_scale", "sampler", "schedule", "size", "n"];

/** Fields of a request that starts from a picture. */
export const EDITING = ["strength", "resize", "mask_blur", "overlay"];

/** Fields of how pictures are sent, which the page fills in by itself. */
export const SENDING = [
  ...["stream", "progress", "partial_images"],
  ...["response_format", "output_format", "output_compression"],
];

/** Fields that the page has controls of another kind for, or fills in. */
const APART = ["prompt", "class_label", "negative_prompt", "seed", "loras", "refiner", "model", "grid", ...SENDING];

/** Fields that belong under "More". */
export function others(fields) {
  return Object.keys(fields).filter((name) => ![...MAIN, ...EDITING, ...APART].includes(name));
}

/** The words beside a field's control. */
export function labelOf(name) {
  const words = name.replaceAll("_", " ");
  return LABELS[name] ?? words[0].toUpperCase() + words.slice(1);
}

/** What a field's values are: { type, options, minimum, maximum, maxLength, items, properties, initial }. */
export function kindOf(schema) {
  const parts = [schema, ...(schema.anyOf ?? [])];
  const types = parts.map((part) => part.type).filter((type) => type && type !== "null");
  const options = parts.find((part) => part.enum)?.enum.filter((one) => one !== null && one !== "");
  const { minimum, maximum, maxLength, items, properties } = Object.assign({}, ...parts.toReversed());
  const type = options ? "enum" : types[0];
  return { type, options, minimum, maximum, maxLength, items, properties, initial: schema.default };
}

/** The schedules that go with the sampler that the form has. */
export function schedulesOf({ schedules, defaults }, { sampler }) {
  return schedules[sampler ?? defaults.sampler] ?? [];
}

/** Whether a value of unknown origin is one of a field. */
export function takes(schema, value) {
  const { type, anyOf, items, minimum, maximum, pattern, properties = {}, required = [] } = schema;
  const most = schema.maxLength ?? schema.maxItems;
  return (
    (!type || TYPES[type](value)) &&
    (!anyOf || anyOf.some((one) => takes(one, value))) &&
    (!schema.enum || schema.enum.includes(value)) &&
    !(value < minimum || value > maximum || value?.length > most) &&
    (!pattern || new RegExp(pattern).test(value)) &&
    (!items || value.every((one) => takes(items, one))) &&
    required.every((name) => Object.hasOwn(value, name)) &&
    Object.keys(properties).every((name) => !Object.hasOwn(value, name) || takes(properties[name], value[name]))
  );
}

const TYPES = {
  string: (value) => typeof value === "string",
  number: Number.isFinite,
  integer: Number.isSafeInteger,
  boolean: (value) => typeof value === "boolean",
  array: Array.isArray,
  object: (value) => typeof value === "object" && value !== null && !Array.isArray(value),
  null: (value) => value === null,
};

/** What a person typed as a value of this kind; undefined for nothing, which is the model's default. */
export function valueOf(kind, typed) {
  if (typed === "" || typed === undefined) return undefined;
  if (kind.type === "integer" || kind.type === "number") return Number(typed);
  if (kind.type === "array") return typed.split(/[ ,x]+/).filter(Boolean).map(Number);
  return typed;
}

/** Sizes to choose from: the model's own and, where it draws others, common shapes of about the same area. */
export function sizesOf({ limits, defaults }) {
  const { min, max, multiple, square } = limits.sizes;
  const [width, height] = defaults.size.split("x").map(Number);
  const fit = (side) => Math.min(max, Math.max(min, Math.round(side / multiple) * multiple));
  const shapes = square ? [1] : [1, 4 / 3, 3 / 4, 3 / 2, 2 / 3, 16 / 9, 9 / 16];
  const areas = square ? [0.25, 1, 4] : [1];
  const sized = (area, shape) => `${fit(Math.sqrt(area * shape))}x${fit(Math.sqrt(area / shape))}`;
  const found = areas.flatMap((share) => shapes.map((shape) => sized(share * width * height, shape)));
  return [...new Set([defaults.size, ...found])];
}
