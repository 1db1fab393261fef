import { html } from "./html.js";
import { useLayoutEffect, useRef } from "./lib/hooks.js";

/** An image of a blob. Its address lives as long as the blob is shown, and is revoked afterwards. */
export function Picture({ blob, alt, ...more }) {
  const image = useRef(null);
  useLayoutEffect(() => {
    const url = URL.createObjectURL(blob);
    image.current.src = url;
    return () => URL.revokeObjectURL(url);
  }, [blob]);
  return html`<img ref=${image} alt=${alt} ...${more} />`;
}

/** Save a blob as a file. */
export function download(blob, name) {
  const url = URL.createObjectURL(blob);
  Object.assign(document.createElement("a"), { href: url, download: name }).click();
  setTimeout(() => URL.revokeObjectURL(url), 1000);
}
