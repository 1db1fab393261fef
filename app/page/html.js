import htm from "./lib/htm.js";
import { h } from "./lib/preact.js";

/** Templates that make preact's elements. */
export const html = htm.bind(h);
