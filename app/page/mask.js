import { html } from "./html.js";
import { useLayoutEffect, useReducer, useRef, useState } from "./lib/hooks.js";
import { canvasOf, Mask } from "./strokes.js";

const SHOWN = 1024; // pixels of the longer side of what is shown over the picture
const STRIPE = 24; // pixels of those from one stripe to the next
const TALLEST = 60; // percent of the window's height
const ARROWS = { ArrowLeft: [-1, 0], ArrowRight: [1, 0], ArrowUp: [0, -1], ArrowDown: [0, 1] };

/**
 * A picture with a brush for its mask.
 *
 * picture, value: blobs of the picture and of its mask, or null. onChange(mask) gets a PNG as large as the picture
 * after each stroke, white where it is painted and black elsewhere; null where nothing is painted.
 */
export function MaskEditor({ picture, value, onChange }) {
  const [mask, setMask] = useState(null);
  const [size, setSize] = useState(1);
  const [erase, setErase] = useState(false);
  const [, again] = useReducer((count) => count + 1, 0);
  const [shown, tint, ring] = [useRef(null), useRef(null), useRef(null)];
  const state = useRef({ at: [0, 0], painting: false, turn: 0, sent: null }).current;

  useLayoutEffect(() => {
    let current = true;
    setMask(null);
    createImageBitmap(picture).then((bitmap) => {
      if (!current) return bitmap.close();
      const made = new Mask(bitmap.width, bitmap.height);
      const { width, height } = made.canvas;
      Object.assign(shown.current, { width, height }).getContext("2d").drawImage(bitmap, 0, 0, width, height);
      const scale = SHOWN / Math.max(width, height);
      Object.assign(tint.current, { width: Math.ceil(width * scale), height: Math.ceil(height * scale) });
      bitmap.close();
      Object.assign(state, { at: [width / 2, height / 2], painting: false, sent: null });
      setSize(Math.max(1, Math.round(Math.max(width, height) / 10)));
      setMask(made);
    }, () => current && setMask(false));
    return () => {
      current = false;
      state.turn += 1; // what is on its way is the mask of another picture
    };
  }, [picture]);

  // Before the browser goes on, so that no later stroke has been sent: else an own mask looked like one from outside.
  useLayoutEffect(() => {
    if (mask && value !== state.sent) takeOver(value);
  }, [mask, value]);

  useLayoutEffect(() => void (mask && place()), [mask, size]);

  const takeOver = async (blob) => {
    const turn = ++state.turn;
    state.sent = blob;
    const bitmap = blob && (await createImageBitmap(blob).catch(() => null));
    if (turn === state.turn) {
      mask.load(bitmap);
      show();
      again();
    }
    bitmap?.close();
  };

  const send = async () => {
    const turn = ++state.turn;
    again();
    const blob = await mask.blob();
    if (turn !== state.turn) return;
    state.sent = blob;
    onChange(blob);
  };

  const show = () => hatch(tint.current, mask.canvas);

  const place = () => {
    const { width, height } = mask.canvas;
    const [left, top, across] = [state.at[0] / width, state.at[1] / height, size / width];
    Object.assign(ring.current.style, { left: `${100 * left}%`, top: `${100 * top}%`, width: `${100 * across}%` });
  };

  const begin = () => {
    state.painting = true;
    mask.add({ points: [state.at], size, erase });
    show();
  };

  const move = (points) => {
    for (state.at of points) if (state.painting) mask.extend(state.at);
    place();
    if (state.painting) show();
  };

  const end = () => {
    if (!state.painting) return;
    state.painting = false;
    mask.restore();
    show();
    send();
  };

  const whole = (change) => {
    end();
    change();
    show();
    send();
  };

  const pointOf = ({ clientX, clientY }) => {
    const { left, top, width, height } = tint.current.getBoundingClientRect();
    return [((clientX - left) / width) * mask.canvas.width, ((clientY - top) / height) * mask.canvas.height];
  };

  const down = (event) => {
    if (!mask || event.button || !event.isPrimary) return;
    tint.current.setPointerCapture(event.pointerId);
    end();
    move([pointOf(event)]);
    begin();
  };

  const moved = (event) => {
    if (!mask || !event.isPrimary) return;
    const all = event.getCoalescedEvents?.() ?? [];
    move((all.length ? all : [event]).map(pointOf));
  };

  const pressed = (event) => {
    if (!mask) return;
    if (event.key === "z" && (event.ctrlKey || event.metaKey)) whole(() => mask.undo());
    else if (event.key === " " && !event.repeat) begin();
    else if (ARROWS[event.key]) move([stepped(ARROWS[event.key], event.shiftKey ? size : size / 4)]);
    else if (event.key !== " ") return;
    event.preventDefault();
  };

  const stepped = (direction, far) =>
    [mask.canvas.width, mask.canvas.height].map((side, axis) =>
      Math.min(side, Math.max(0, state.at[axis] + direction[axis] * Math.max(1, far))),
    );

  if (mask === false) return html`<p class="fault" role="alert">This browser cannot show the picture.</p>`;
  const { width = 1, height = 1 } = mask?.canvas ?? {};
  const box = { aspectRatio: `${width} / ${height}`, width: `min(100%, ${(TALLEST * width) / height}vh)` };
  const widest = Math.ceil(Math.max(width, height) / 2);
  const acts = {
    onPointerDown: down,
    onPointerMove: moved,
    onLostPointerCapture: end,
    onKeyDown: pressed,
    onKeyUp: (event) => event.key === " " && end(),
    onBlur: end,
  };
  const button = (name, isOn, act) => html`<button type="button" disabled=${!isOn} onClick=${act}>${name}</button>`;
  return html`<div class="mask-editor">
    <div class="mask-stage" style=${box} aria-busy=${!mask}>
      <canvas ref=${shown} class="mask-picture"></canvas>
      <canvas ref=${tint} class="mask-tint" tabindex="0" role="application" aria-label="Mask"
        aria-describedby="mask-keys" ...${acts}></canvas>
      <div ref=${ring} class="mask-ring"></div>
      <p id="mask-keys" class="mask-keys">Arrow keys move the brush, Space paints, Ctrl+Z undoes.</p>
    </div>
    <div class="mask-tools">
      <label>Brush size <input type="range" min="1" max=${widest} value=${size}
        onInput=${(event) => setSize(event.target.valueAsNumber)} /></label>
      <button type="button" aria-pressed=${erase} onClick=${() => setErase(!erase)}>Erase</button>
      ${button("Invert", mask, () => whole(() => mask.add({ whole: "invert" })))}
      ${button("Undo", mask?.strokes.length, () => whole(() => mask.undo()))}
      ${button("Clear mask", mask && value, () => whole(() => mask.add({ whole: "clear" })))}
    </div>
  </div>`;
}

/** Show the mask: tinted, with stripes of black and white, of which one is visible on any picture. */
function hatch(canvas, mask) {
  const context = canvas.getContext("2d");
  const fill = (style) => {
    context.fillStyle = style;
    context.fillRect(0, 0, canvas.width, canvas.height);
  };
  context.globalCompositeOperation = "copy";
  context.drawImage(mask, 0, 0, canvas.width, canvas.height);
  context.globalCompositeOperation = "source-in";
  fill(getComputedStyle(canvas).color);
  context.globalCompositeOperation = "source-atop";
  fill(context.createPattern(stripes(), "repeat"));
}

function stripes() {
  const tile = canvasOf(STRIPE, STRIPE);
  const context = tile.getContext("2d");
  for (const [strokeStyle, shift] of [["black", 0], ["white", 3]]) {
    Object.assign(context, { strokeStyle, lineWidth: 2.5 });
    context.beginPath();
    for (const left of [-STRIPE, 0, STRIPE]) {
      context.moveTo(left + shift - 4, STRIPE + 4);
      context.lineTo(left + shift + STRIPE + 4, -4);
    }
    context.stroke();
  }
  return tile;
}
