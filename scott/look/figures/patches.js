// Masks, as scott.masking draws them: Uint8Array of rows * cols, 1 = visible.

const visibleCount = (rows, cols, ratio) => Math.ceil((1 - ratio) * rows * cols - 1e-6);

// The `visible` largest scores.
function best(score, visible) {
  const keep = new Uint8Array(score.length);
  const order = [...score.keys()].sort((a, b) => score[b] - score[a]);
  for (const i of order.slice(0, visible)) keep[i] = 1;
  return keep;
}

function uniform(rows, cols, ratio, random) {
  return best(Array.from({length: rows * cols}, random), visibleCount(rows, cols, ratio));
}

// The patches of a block [top row, left column, height, width].
const patchesOf = ([y, x, h, w], cols) =>
  Array.from({length: h * w}, (_, i) => (y + Math.floor(i / w)) * cols + x + i % w);

// A random block [y, x, h, w] for a mask that lacks `left` patches; null if it doesn't fit.
function propose(rows, cols, left, random) {
  const smallest = Math.min(16, Math.floor(rows * cols / 3), (Math.min(rows, cols) - 1) ** 2);
  const area = smallest + (left - smallest) * random();
  const shape = .3 ** (1 - 2 * random());
  const h = Math.round(Math.sqrt(area * shape)), w = Math.round(Math.sqrt(area / shape));
  if (h >= rows || w >= cols) return null;
  return [Math.floor(random() * (rows - h + 1)), Math.floor(random() * (cols - w + 1)), h, w];
}

// Blocks are made visible until the count is reached; a block that adds nothing or too much is drawn again.
function blockwise(rows, cols, ratio, random) {
  const keep = new Uint8Array(rows * cols), visible = visibleCount(rows, cols, ratio);
  let left = visible;
  for (let tries = 0; left && tries < 2000; tries++) {
    const block = propose(rows, cols, left, random);
    if (!block) continue;
    const added = patchesOf(block, cols).filter(i => !keep[i]);
    if (!added.length || added.length > left) continue;
    for (const i of added) keep[i] = 1;
    left -= added.length;
  }
  return left ? best(Array.from(keep, k => k + random()), visible) : keep;
}

// One large context block minus four target blocks; a rank fills up or cuts down to the exact count.
function multiblock(rows, cols, ratio, random) {
  const block = (scales, shapes) => {
    const [scale, shape] = [scales, shapes].map(([low, high]) => low + (high - low) * random());
    const side = (n, part) => Math.min(n, Math.max(1, Math.round(n * Math.sqrt(part))));
    const h = side(rows, scale * shape), w = side(cols, scale / shape);
    return [Math.floor(random() * (rows - h + 1)), Math.floor(random() * (cols - w + 1)), h, w];
  };
  const rank = new Uint8Array(rows * cols).fill(1);
  for (const i of patchesOf(block([.85, 1], [1, 1]), cols)) rank[i] = 2;
  for (let t = 0; t < 4; t++)
    for (const i of patchesOf(block([.15, .2], [.75, 1.5]), cols)) rank[i] = 0;
  return best(Array.from(rank, r => r + random()), visibleCount(rows, cols, ratio));
}

// A drawn picture to hide: three flowers on a meadow.
function flowers(size) {
  const canvas = make('canvas', {width: size, height: size}), pen = canvas.getContext('2d');
  const ground = pen.createLinearGradient(0, 0, size * .4, size);
  ground.addColorStop(0, '#7d9c55');
  ground.addColorStop(1, '#39542c');
  pen.fillStyle = ground;
  pen.fillRect(0, 0, size, size);
  for (const [x, y, radius, petals, color] of [[.36, .36, .31, 7, '#e58aa8'], [.74, .74, .24, 5, '#f0cd52'],
                                               [.83, .2, .16, 9, '#9a86d8']]) {
    for (let k = 0; k < petals; k++) {
      pen.save();
      pen.translate(x * size, y * size);
      pen.rotate(2 * Math.PI * k / petals);
      pen.fillStyle = color;
      pen.strokeStyle = '#0003';
      pen.beginPath();
      pen.ellipse(radius * size * .58, 0, radius * size * .44, radius * size * 1.5 / petals, 0, 0, 7);
      pen.fill();
      pen.stroke();
      pen.restore();
    }
    pen.fillStyle = '#6b4a1f';
    pen.beginPath();
    pen.arc(x * size, y * size, radius * size * .24, 0, 7);
    pen.fill();
  }
  return canvas;
}
