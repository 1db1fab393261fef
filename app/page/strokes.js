/** A mask as pixels, with its last strokes: white and opaque where it is painted, else transparent. */

const MOST_SIDE = 2048; // pixels that are painted on; the mask of a larger picture is enlarged at the end
const MOST_PIXELS = 16 * 2 ** 20; // of a file; some browsers have no larger canvas, and the server enlarges a mask
const MOST_STROKES = 30; // that can be undone
const WHOLE = { clear: "destination-out", invert: "source-out" }; // how a canvas that is white all over is put onto it

/** A canvas of this size. */
export function canvasOf(width, height) {
  return Object.assign(document.createElement("canvas"), { width, height });
}

/**
 * The mask of a picture of this size.
 *
 * A stroke is `{ points: [[x, y], ...], size, erase }` in pixels of `canvas`, or `{ whole: "clear" | "invert" }`.
 */
export class Mask {
  constructor(width, height) {
    const scale = Math.min(1, MOST_SIDE / Math.max(width, height));
    const sides = [width, height].map((side) => Math.max(1, Math.round(side * scale)));
    this.file = width * height > MOST_PIXELS ? sides : [width, height];
    this.canvas = canvasOf(...sides); // with all strokes
    this.ground = canvasOf(...sides); // without those that can be undone
    this.strokes = [];
    for (const canvas of [this.canvas, this.ground]) canvas.getContext("2d", { willReadFrequently: true });
  }

  /** Begin a stroke, or do a whole one. */
  add(stroke) {
    this.strokes.push(stroke);
    if (this.strokes.length > MOST_STROKES) draw(this.ground, this.strokes.shift());
    draw(this.canvas, stroke);
  }

  /** Go on with the last stroke to this point. */
  extend(point) {
    const stroke = this.strokes.at(-1);
    stroke.points.push(point);
    draw(this.canvas, { ...stroke, points: stroke.points.slice(-2) });
  }

  /** Take the last stroke back. */
  undo() {
    this.strokes.pop();
    this.restore();
  }

  /** Take over a mask, white where it is painted, or null; nothing of it can be undone. */
  load(bitmap) {
    const { width, height } = this.canvas;
    const context = this.ground.getContext("2d");
    context.clearRect(0, 0, width, height);
    if (bitmap) context.drawImage(bitmap, 0, 0, width, height);
    const pixels = context.getImageData(0, 0, width, height);
    binary(pixels, (red, alpha) => red >= 128 && alpha >= 128, 0);
    context.putImageData(pixels, 0, 0);
    this.strokes = [];
    this.restore();
  }

  /** A PNG, white where the mask is painted and black elsewhere; null if it is painted nowhere. */
  async blob() {
    const { width, height } = this.canvas;
    const pixels = this.canvas.getContext("2d").getImageData(0, 0, width, height);
    if (!binary(pixels, (red, alpha) => alpha >= 128, 255)) return null;
    const sharp = canvasOf(width, height);
    sharp.getContext("2d").putImageData(pixels, 0, 0);
    const file = canvasOf(...this.file);
    const context = file.getContext("2d");
    context.imageSmoothingEnabled = false;
    context.drawImage(sharp, 0, 0, ...this.file);
    return new Promise((resolve) => file.toBlob(resolve, "image/png"));
  }

  /** Draw all strokes anew, each as one line: what was drawn while it grew has other edges. */
  restore() {
    const context = this.canvas.getContext("2d");
    context.clearRect(0, 0, this.canvas.width, this.canvas.height);
    context.drawImage(this.ground, 0, 0);
    for (const stroke of this.strokes) draw(this.canvas, stroke);
  }
}

/**
 * Make pixels either painted or not, by their red and alpha. elsewhere: the alpha of those that are not, in black.
 *
 * Returns how many are painted.
 */
function binary({ data }, isPainted, elsewhere) {
  let painted = 0;
  for (let at = 0; at < data.length; at += 4) {
    const on = isPainted(data[at], data[at + 3]);
    data[at] = data[at + 1] = data[at + 2] = on ? 255 : 0;
    data[at + 3] = on ? 255 : elsewhere;
    painted += on;
  }
  return painted;
}

function draw(canvas, { whole, points, size, erase }) {
  const context = canvas.getContext("2d");
  context.save();
  context.globalCompositeOperation = WHOLE[whole] ?? (erase ? "destination-out" : "source-over");
  context.fillStyle = "white";
  if (whole) context.fillRect(0, 0, canvas.width, canvas.height);
  else line(context, points, size);
  context.restore();
}

function line(context, points, size) {
  Object.assign(context, { lineWidth: size, lineCap: "round", lineJoin: "round", strokeStyle: "white" });
  context.beginPath();
  const [[x, y]] = points;
  context.moveTo(x, y - 0.01); // a line of no length is not drawn
  for (const point of points) context.lineTo(...point);
  context.stroke();
}
