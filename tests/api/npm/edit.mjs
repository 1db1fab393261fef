// Edits and varies a picture by the unmodified client. Arguments: the server's URL, the picture, the mask.
// Prints a JSON line for each answer: its type or "reply", the base64 of its pictures, and what else is in it.
import { File } from "node:buffer";
import fs from "node:fs";
import OpenAI, { toFile } from "openai";

globalThis.File ??= File; // Node 18 has it in node:buffer alone
const [url, image, mask] = process.argv.slice(2);
const client = new OpenAI({ baseURL: `${url}/v1`, apiKey: "none", maxRetries: 0 });
const say = (value) => console.log(JSON.stringify(value));
const asked = { model: "gpt-image-1", prompt: "a cat", size: "auto", seed: 5, strength: 0.75, mask_blur: 0 };

say(await client.images.edit({ ...asked, image: fs.createReadStream(image), n: 2 }));
const files = [await toFile(fs.createReadStream(image), "image.png", { type: "image/png" })];
const masked = () => ({ ...asked, image: files, mask: fs.createReadStream(mask) });
say(await client.images.edit(masked()));
for await (const event of await client.images.edit({ ...masked(), stream: true, partial_images: 2 })) say(event);
say(await client.images.createVariation({ image: fs.createReadStream(image), response_format: "b64_json" }));
try {
  await client.images.edit({ ...asked, image: fs.createReadStream(image), strength: 2 });
} catch (error) {
  say({ status: error.status, code: error.code, param: error.param });
}
