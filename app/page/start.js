import { App } from "./app.js";
import { html } from "./html.js";
import { render } from "./lib/preact.js";

const root = document.getElementById("app");
root.replaceChildren();
render(html`<${App} />`, root);
