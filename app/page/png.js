/** The request that is written inside a picture: in text chunks of a PNG, in XMP and EXIF of a JPEG or WebP. */

const MOST_READ = 64 * 2 ** 20; // bytes of a file
const MOST_TEXT = 8 * 2 ** 20; // bytes of one text
const MOST_PIECES = 100_000;
const MOST_LINE = 20_000; // characters of A1111's last line

const NOTHING = { facts: null, parameters: null };
const PNG = "\x89PNG\r\n\x1a\n";
const XMP = "http://ns.adobe.com/xap/1.0/\0";
const EXIF = "Exif\0\0";
const [IFD_OF_EXIF, USER_COMMENT] = [0x8769, 0x9286];

const LINE = /(\w[\w /-]{0,40}):\s*("(?:\\.|[^\\"])*"|[^,]*)(?:,|$)/g;
const OURS = [
  ..."ddim ddpm euler euler_ancestral heun dpmpp_2m dpmpp_2m_sde lcm".split(" "),
  ..."flow_euler flow_heun flow_dpmpp_2m flow_dpmpp_2m_sd3".split(" "),
];
const SAMPLERS = new Map([...OURS.map((name) => [plain(name), name]), ["eulera", "euler_ancestral"]]);
const SCHEDULES = new Map(["karras", "exponential", "sgm_uniform"].map((name) => [plain(name), name]));

/** Read a PNG: `{ facts, parameters }`, the request as an object and the text that A1111 writes, or null. */
export async function readPng(blob) {
  return reading(blob, pngTexts);
}

/** Read a PNG, JPEG or WebP file: `{ facts, parameters }`, as `readPng`. A file that is broken has neither. */
export async function readFacts(blob) {
  return reading(blob, (bytes) => {
    if (latin1(bytes, 0, 8) === PNG) return pngTexts(bytes);
    if (latin1(bytes, 0, 2) === "\xff\xd8") return jpegTexts(bytes);
    return latin1(bytes, 0, 4) === "RIFF" && latin1(bytes, 8, 4) === "WEBP" ? webpTexts(bytes) : {};
  });
}

async function reading(blob, texts) {
  try {
    const found = await texts(new Uint8Array(await blob.slice(0, MOST_READ).arrayBuffer()));
    const parameters = found.parameters ?? null;
    return { facts: objectOf(found.instep) ?? (parameters && factsOf(parameters)), parameters };
  } catch {
    return NOTHING;
  }
}

/** The JSON object in a text, or null. A seed that a number of JavaScript cannot hold is left out. */
function objectOf(text) {
  try {
    const facts = JSON.parse(text);
    if (typeof facts !== "object" || Array.isArray(facts)) return null;
    if (facts && !Number.isSafeInteger(facts.seed)) delete facts.seed;
    return facts;
  } catch {
    return null;
  }
}

/** The fields of a body in A1111's text: prompt, negative prompt and a line of `Name: value` pairs. */
function factsOf(text) {
  const lines = text.trim().split("\n");
  const pairs = Object.fromEntries(
    [...lines.at(-1).slice(0, MOST_LINE).matchAll(LINE)].map(([, name, value]) => [name.toLowerCase(), value.trim()]),
  );
  if (!pairs.steps) return null;
  const words = lines.slice(0, -1);
  const negative = words.findIndex((line) => line.startsWith("Negative prompt:"));
  const [before, after] = negative < 0 ? [words, []] : [words.slice(0, negative), words.slice(negative)];
  const facts = {
    prompt: before.join("\n").trim(),
    negative_prompt: after.join("\n").slice("Negative prompt:".length).trim(),
    num_inference_steps: number(pairs.steps, Number.isSafeInteger),
    guidance_scale: number(pairs["cfg scale"], Number.isFinite),
    seed: number(pairs.seed, Number.isSafeInteger),
    size: /^\d{1,5}x\d{1,5}$/.test(pairs.size) ? pairs.size : null,
    ...samplerOf(pairs.sampler ?? "", pairs["schedule type"] ?? ""),
  };
  return Object.fromEntries(Object.entries(facts).filter(([, value]) => value !== null && value !== ""));
}

function number(text, valid) {
  return text && valid(Number(text)) ? Number(text) : null;
}

/** Our sampler and schedule for A1111's names: a schedule has a field of its own, or ends the sampler's name. */
function samplerOf(name, type) {
  const whole = plain(name);
  const ending = [...SCHEDULES.keys()].find((end) => whole.endsWith(end)) ?? "";
  const sampler = SAMPLERS.get(whole.slice(0, whole.length - ending.length));
  return sampler ? { sampler, schedule: SCHEDULES.get(plain(type)) ?? SCHEDULES.get(ending) ?? null } : {};
}

function plain(name) {
  return name.toLowerCase().replace(/[ _-]/g, "").replaceAll("+", "p");
}

/** The texts of the PNG chunks `instep` and `parameters`. Each name is read once. */
async function pngTexts(bytes) {
  const texts = {};
  if (latin1(bytes, 0, 8) !== PNG) return texts;
  const view = viewOf(bytes);
  for (let at = 8, count = 0; at + 12 <= bytes.length && count < MOST_PIECES; count += 1) {
    const size = view.getUint32(at);
    const kind = latin1(bytes, at + 4, 4);
    const body = bytes.subarray(at + 8, at + 8 + size);
    const [name, rest] = split(body.subarray(0, MOST_TEXT));
    const wanted = (name === "instep" || name === "parameters") && !(name in texts);
    if (wanted && body.length === size && kind in CHUNKS) texts[name] = await CHUNKS[kind](rest).catch(() => null);
    at += 12 + size;
  }
  return texts;
}

const CHUNKS = {
  tEXt: async (rest) => latin1(rest),
  zTXt: async (rest) => latin1(await inflated(rest.subarray(1))),
  iTXt: async (rest) => {
    const [, translated] = split(rest.subarray(2), Infinity);
    const [, text] = split(translated, Infinity);
    return new TextDecoder().decode(rest[0] ? await inflated(text) : text);
  },
};

/** What stands before the first NUL, and the bytes behind it. */
function split(bytes, most = 80) {
  const end = bytes.subarray(0, most).indexOf(0);
  return end < 0 ? ["", bytes.subarray(0, 0)] : [latin1(bytes, 0, end), bytes.subarray(end + 1)];
}

/** The bytes that zlib's are made of. Throws where they are broken, or more than MOST_TEXT. */
async function inflated(bytes) {
  const stream = new Blob([bytes]).stream().pipeThrough(new DecompressionStream("deflate"));
  const pieces = [];
  let size = 0;
  for (const reader = stream.getReader(); ; ) {
    const { done, value } = await reader.read();
    if (done) return new Uint8Array(await new Blob(pieces).arrayBuffer());
    pieces.push(value);
    size += value.length;
    if (size > MOST_TEXT) {
      reader.cancel().catch(() => {});
      throw new RangeError("the text is too long");
    }
  }
}

/** The texts in the segments before a JPEG's picture. */
function jpegTexts(bytes) {
  const texts = {};
  const view = viewOf(bytes);
  for (let at = 2, count = 0; at + 4 <= bytes.length && count < MOST_PIECES; count += 1) {
    if (bytes[at] !== 0xff || bytes[at + 1] === 0xda) break;
    const size = view.getUint16(at + 2);
    const body = bytes.subarray(at + 4, at + 2 + size);
    if (body.length + 2 !== size) break;
    if (bytes[at + 1] === 0xe1 && latin1(body, 0, XMP.length) === XMP) texts.instep ??= inXmp(body);
    if (bytes[at + 1] === 0xe1 && latin1(body, 0, EXIF.length) === EXIF) texts.parameters ??= inExif(body.subarray(6));
    at += 2 + size;
  }
  return texts;
}

/** The texts in the chunks of a WebP. */
function webpTexts(bytes) {
  const texts = {};
  const view = viewOf(bytes);
  for (let at = 12, count = 0; at + 8 <= bytes.length && count < MOST_PIECES; count += 1) {
    const size = view.getUint32(at + 4, true);
    const kind = latin1(bytes, at, 4);
    const body = bytes.subarray(at + 8, at + 8 + size);
    if (body.length !== size || size > MOST_TEXT) break;
    if (kind === "XMP ") texts.instep ??= inXmp(body);
    if (kind === "EXIF") texts.parameters ??= inExif(latin1(body, 0, EXIF.length) === EXIF ? body.subarray(6) : body);
    at += 8 + size + (size % 2);
  }
  return texts;
}

/** The text of `instep:Request` in an XMP packet as this server writes it. */
function inXmp(bytes) {
  const text = new TextDecoder().decode(bytes);
  const start = text.indexOf("<instep:Request>") + "<instep:Request>".length;
  const end = text.indexOf("</instep:Request>", start);
  if (start < "<instep:Request>".length || end < 0) return null;
  const escaped = text.slice(start, end);
  return escaped.replaceAll("&lt;", "<").replaceAll("&gt;", ">").replaceAll("&amp;", "&");
}

/** The UserComment of EXIF (TIFF), which is UTF-16 or ASCII. */
function inExif(bytes) {
  try {
    const view = viewOf(bytes);
    const little = latin1(bytes, 0, 2) === "II";
    const exif = entry(view, view.getUint32(4, little), IFD_OF_EXIF, little);
    const comment = entry(view, view.getUint32(exif + 8, little), USER_COMMENT, little);
    const start = view.getUint32(comment + 8, little);
    const body = bytes.subarray(start, start + view.getUint32(comment + 4, little));
    const unicode = latin1(body, 0, 8) === "UNICODE\0";
    return new TextDecoder(unicode ? (little ? "utf-16le" : "utf-16be") : "utf-8").decode(body.subarray(8));
  } catch {
    return null;
  }
}

/** Where the entry of a tag is in a directory. Throws a RangeError if it has none. */
function entry(view, directory, tag, little) {
  const count = view.getUint16(directory, little);
  for (let at = directory + 2; at < directory + 2 + 12 * count; at += 12) {
    if (view.getUint16(at, little) === tag) return at;
  }
  throw new RangeError("there is no such tag");
}

function viewOf(bytes) {
  return new DataView(bytes.buffer, bytes.byteOffset, bytes.byteLength);
}

/** Bytes as Latin-1, one character each; TextDecoder's "latin1" is another encoding. */
function latin1(bytes, start = 0, size = bytes.length) {
  const pieces = [];
  const end = Math.min(bytes.length, start + size);
  for (let at = start; at < end; at += 4096) {
    pieces.push(String.fromCharCode(...bytes.subarray(at, Math.min(end, at + 4096))));
  }
  return pieces.join("");
}
