/** The request for a picture as text that a person pastes: a curl for a shell, and Python with OpenAI's client. */

import { EDIT } from "./api.js";
import { SENDING } from "./fields.js";

const OF_OPENAI = ["model", "prompt", "size", "n", "quality", "background", "moderation", "user"];

/**
 * The curl that draws a picture again as picture.png.
 *
 * path: the route, as "v1/images/edits". facts: the body. closed: whether the server has keys, which is then in
 * INSTEP_KEY. masked: whether an edit has mask.png beside source.png.
 */
export function curl({ origin, path, facts, closed, masked = false }) {
  const key = closed ? [`-H "Authorization: Bearer $INSTEP_KEY"`] : [];
  const body = bodyOf(facts);
  const posted = path === EDIT ? form(body, masked) : ["-H", "Content-Type: application/json", "-d", json(body)];
  const options = ["-H", "Accept: image/png", ...posted, "-o", "picture.png"].map(quoted);
  return [`curl ${quoted(`${origin}/${path}`)}`, ...key, ...options].join(" ");
}

/** The Python that draws a picture again as picture.png. The arguments are those of `curl`. */
export function python({ origin, path, facts, closed, masked = false }) {
  const body = { prompt: "", ...bodyOf(facts) };
  const isEdit = path === EDIT;
  const files = isEdit ? [`image=open("source.png", "rb")`, ...(masked ? [`mask=open("mask.png", "rb")`] : [])] : [];
  const own = Object.entries(body).filter(([name]) => OF_OPENAI.includes(name));
  const extra = Object.fromEntries(Object.entries(body).filter(([name]) => !OF_OPENAI.includes(name)));
  const lines = [
    ...files,
    ...own.map(([name, value]) => `${name}=${literal(value)}`),
    ...(Object.keys(extra).length ? [`extra_body=${literal(extra)}`] : []),
  ];
  return `import base64
${closed ? "import os\n" : ""}
from openai import OpenAI

client = OpenAI(base_url=${literal(`${origin}/v1`)}, api_key=${closed ? `os.environ["INSTEP_KEY"]` : `"none"`})
reply = client.images.${isEdit ? "edit" : "generate"}(
${lines.map((line) => `    ${line},\n`).join("")})
with open("picture.png", "wb") as file:
    file.write(base64.b64decode(reply.data[0].b64_json))
`;
}

/** The fields that decide a picture: those of how it is sent are left out, and what is null is the default. */
function bodyOf(facts) {
  return Object.fromEntries(Object.entries(facts).filter(([name, value]) => value !== null && !SENDING.includes(name)));
}

/**
 * The options of curl that send a form. A list has an option for each entry.
 *
 * --form-string takes "@", "<" and ";" as they are.
 */
function form(body, masked) {
  const files = ["-F", "image=@source.png", ...(masked ? ["-F", "mask_image=@mask.png"] : [])];
  const pairs = Object.entries(body).flatMap(([name, value]) =>
    Array.isArray(value) ? value.map((one) => [`${name}[]`, one]) : [[name, value]],
  );
  const words = pairs.map(([name, value]) => `${name}=${typeof value === "string" ? value : json(value)}`);
  return [...files, ...words.flatMap((word) => ["--form-string", word])];
}

/** One word of a POSIX shell. Control characters, which could end a terminal's paste, are left out. */
function quoted(text) {
  const clean = text.replace(/[\0-\x08\x0b-\x1f\x7f-\x9f]/g, "");
  return /^[\w@%+=:,./-]+$/.test(clean) ? clean : `'${clean.replaceAll("'", `'\\''`)}'`;
}

/** JSON without control characters. */
function json(value) {
  const escaped = (letter) => `\\u${letter.charCodeAt(0).toString(16).padStart(4, "0")}`;
  return JSON.stringify(value).replace(/[\x7f-\x9f\u2028\u2029]/g, escaped);
}

/** A JSON value in Python: the strings are written alike. */
function literal(value) {
  if (value === null) return "None";
  if (typeof value === "boolean") return value ? "True" : "False";
  if (typeof value !== "object") return json(value);
  if (Array.isArray(value)) return `[${value.map(literal).join(", ")}]`;
  return `{${Object.entries(value).map(([name, one]) => `${json(name)}: ${literal(one)}`).join(", ")}}`;
}
