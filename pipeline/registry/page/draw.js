// A frame under its slots' colours, or one object of it alone.

/** Colours of slots, as `slotmatch segment` has them: [red, green, blue], neighbours far apart. */
export function slotColours(slots) {
  return Array.from({ length: slots }, (_, n) => {
    const [saturation, value] = [0.75, n % 2 === 0 ? 0.95 : 0.75];
    const hue = (0.08 + n * 0.618034) % 1;
    return [5, 3, 1].map((shift) => {
      const k = (shift + hue * 6) % 6;
      return Math.trunc(255 * value * (1 - saturation * Math.max(0, Math.min(k, 4 - k, 1))));
    });
  });
}

/** How often a frame's sides are multiplied for the picture, so that a small one has fine outlines; odd, so that each
 * pixel of the frame has one of the picture at its centre. */
export function magnification(width, height) {
  const most = 720 / Math.max(width, height);
  return Math.max(1, 2 * Math.floor((most - 1) / 2) + 1);
}

export class Picture {
  #canvas;
  #frame = document.createElement("canvas");
  #cover = document.createElement("canvas");
  #shown = null;

  constructor(canvas) {
    this.#canvas = canvas;
  }

  /** Takes the ImageData of a frame, and its labels, `scale` times as large. */
  show(image, labels, scale) {
    this.#shown = { labels, scale, width: image.width * scale, height: image.height * scale };
    const { width, height } = this.#shown;
    if (this.#canvas.width !== width || this.#canvas.height !== height) {
      for (const canvas of [this.#canvas, this.#cover]) Object.assign(canvas, { width, height });
      this.#canvas.style.setProperty("--ratio", width / height);
    }
    Object.assign(this.#frame, { width: image.width, height: image.height });
    this.#frame.getContext("2d").putImageData(image, 0, 0);
  }

  /** Draws it. `alone`: the slot to show without all others, null for all. */
  draw(colours, opacity, alone) {
    if (!this.#shown) return;
    const { labels, width, height } = this.#shown;
    const cover = new ImageData(width, height);
    const pixels = new Uint32Array(cover.data.buffer);
    const paints = colours.map((colour, n) => {
      if (alone === null) return packed(colour, opacity);
      return n === alone ? 0 : packed([17, 17, 17], 1);
    });
    for (let i = 0; i < pixels.length; i++) pixels[i] = paints[labels[i]];
    if (alone === null) outline(pixels, labels, width, packed([255, 255, 255], Math.min(1, 2 * opacity)));
    this.#cover.getContext("2d").putImageData(cover, 0, 0);
    const context = this.#canvas.getContext("2d");
    context.drawImage(this.#frame, 0, 0, width, height);
    context.drawImage(this.#cover, 0, 0);
  }

  /** The slot at a point of the picture, x and y from 0 to 1. */
  slotAt(x, y) {
    if (!this.#shown) return null;
    const { labels, width, height } = this.#shown;
    const [column, row] = [Math.floor(x * width), Math.floor(y * height)];
    return labels[Math.min(height - 1, row) * width + Math.min(width - 1, column)];
  }

  /** The labels of the frame's own pixels. */
  labels() {
    const { labels, scale, width, height } = this.#shown;
    const middle = (scale - 1) / 2;
    const found = [];
    for (let y = middle; y < height; y += scale) {
      for (let x = middle; x < width; x += scale) found.push(labels[y * width + x]);
    }
    return { width: width / scale, height: height / scale, labels: found };
  }
}

/** A pixel of ImageData as one number; all machines that browsers run on have the least byte first. */
function packed([red, green, blue], opacity) {
  return ((Math.round(255 * opacity) << 24) | (blue << 16) | (green << 8) | red) >>> 0;
}

function outline(pixels, labels, width, paint) {
  for (let i = 1; i < labels.length; i++) {
    const left = i % width !== 0 && labels[i] !== labels[i - 1];
    if (left || (i >= width && labels[i] !== labels[i - width])) pixels[i] = paint;
  }
}
