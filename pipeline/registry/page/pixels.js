// From frames to the model's square input, and from its masks to a slot for each pixel: the same numbers as
// pipeline/models/pixels.py (and so PyTorch) gives, up to rounding. A canvas resizes in another way.

/** Bicubic kernel with a = -0.5. */
function cubic(x) {
  x = Math.abs(x);
  if (x < 1) return (1.5 * x - 2.5) * x * x + 1;
  if (x < 2) return ((-0.5 * x + 2.5) * x - 4) * x + 2;
  return 0;
}

/** For each pixel of `to`, the pixels of `from` that it is made of and their weights, anti-aliased. */
function taps(from, to) {
  const scale = from / to;
  const wide = Math.max(scale, 1); // the kernel's: it grows where the picture shrinks
  return Array.from({ length: to }, (_, i) => {
    const centre = scale * (i + 0.5);
    const first = Math.max(0, Math.trunc(centre - 2 * wide + 0.5));
    const last = Math.min(from, Math.trunc(centre + 2 * wide + 0.5));
    const weights = new Float32Array(last - first);
    for (let k = 0; k < weights.length; k++) weights[k] = cubic((first + k - centre + 0.5) / wide);
    const sum = weights.reduce((a, b) => a + b, 0);
    return { first, weights: weights.map((weight) => weight / sum) };
  });
}

/** RGBA pixels (height, width) as the model takes them: RGB (side, side, 3), float32 from 0 to 255. */
export function square(rgba, width, height, side) {
  const rows = new Float32Array(height * side * 3); // each row resized
  taps(width, side).forEach(({ first, weights }, x) => {
    for (let y = 0; y < height; y++) {
      let [r, g, b] = [0, 0, 0];
      for (let k = 0, from = 4 * (y * width + first); k < weights.length; k++, from += 4) {
        r += weights[k] * rgba[from];
        g += weights[k] * rgba[from + 1];
        b += weights[k] * rgba[from + 2];
      }
      rows.set([r, g, b], 3 * (y * side + x));
    }
  });
  const pixels = new Float32Array(side * side * 3);
  taps(height, side).forEach(({ first, weights }, y) => {
    for (let i = 0; i < 3 * side; i++) {
      let sum = 0;
      for (let k = 0; k < weights.length; k++) sum += weights[k] * rows[(first + k) * 3 * side + i];
      pixels[3 * side * y + i] = Math.min(255, Math.max(0, sum));
    }
  });
  return pixels;
}

/** Of a grid as export.json has it: one number where it is square. */
export function rowsAndColumns(grid) {
  return Array.isArray(grid) ? grid : [grid, grid];
}

/** Runs of pixels that lie between the same two cells of a grid, each with the pixels' weights of the second. */
function spans(grid, length) {
  const found = [];
  for (let i = 0; i < length; i++) {
    const position = Math.max(0, ((i + 0.5) * grid) / length - 0.5);
    const low = Math.floor(position);
    if (found.at(-1)?.low !== low) found.push({ low, high: Math.min(low + 1, grid - 1), first: i, weights: [] });
    found.at(-1).weights.push(position - low);
  }
  return found;
}

/**
 * The slot of each pixel (height, width): masks (slots, ...grid) resized bilinearly, the largest of them.
 *
 * Between four cells no slot exceeds its largest corner, so those that stay below another's smallest need no look:
 * mostly one is left.
 */
export function labelMap(masks, slots, grid, width, height) {
  const labels = new Uint8Array(width * height);
  const [down, across] = rowsAndColumns(grid);
  const columns = spans(across, width);
  for (const y of spans(down, height)) {
    for (const x of columns) {
      const corners = [];
      for (let n = 0; n < slots; n++) {
        const [top, bottom] = [(n * down + y.low) * across, (n * down + y.high) * across];
        corners.push([masks[top + x.low], masks[top + x.high], masks[bottom + x.low], masks[bottom + x.high]]);
      }
      const least = Math.max(...corners.map((values) => Math.min(...values)));
      const slotsLeft = [...corners.keys()].filter((n) => Math.max(...corners[n]) >= least);
      fill(labels, width, y, x, slotsLeft, corners);
    }
  }
  return labels;
}

function fill(labels, width, y, x, slots, corners) {
  y.weights.forEach((down, row) => {
    const start = (y.first + row) * width + x.first;
    if (slots.length === 1) {
      labels.fill(slots[0], start, start + x.weights.length);
      return;
    }
    const left = slots.map((n) => corners[n][0] + down * (corners[n][2] - corners[n][0]));
    const right = slots.map((n) => corners[n][1] + down * (corners[n][3] - corners[n][1]));
    for (let column = 0; column < x.weights.length; column++) {
      let [best, most] = [0, -Infinity];
      for (let s = 0; s < slots.length; s++) {
        const value = left[s] + x.weights[column] * (right[s] - left[s]);
        if (value > most) [best, most] = [s, value];
      }
      labels[start + column] = slots[best];
    }
  });
}
