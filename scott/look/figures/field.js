// The receptive field of a token of scott.tokenizer.SparseTokenizer, back through its layers, masked and dense.

const GRID = 7, PATCH = 16, SIZE = GRID * PATCH;
const SIZES = [SIZE, SIZE / 2, SIZE / 4, SIZE / 8, SIZE / 16];  // image, conv 1, pool 1, conv 2, pool 2
const NAMES = ['image', 'conv 1', 'pool 1', 'conv 2', 'tokens'];

// On how many ways output i of a layer reads input q, along one axis: [[q, ways], ...] for each i.
const convReads = size => Array.from({length: size / 2}, (_, i) =>
  [0, 1, 2, 3, 4, 5, 6].map(a => [2 * i + a - 3, 1]).filter(([q]) => q >= 0 && q < size));
const poolReads = size => Array.from({length: size / 2}, (_, i) =>
  [1, 2, 1].map((ways, a) => [2 * i + a - 1, ways]).filter(([p]) => p >= 0 && p < size - 1)  // the blur
    .flatMap(([p, ways]) => [[p, ways], [p + 1, ways]]));                                    // the 2x2 maximum
const READS = [convReads(SIZES[0]), poolReads(SIZES[1]), convReads(SIZES[2]), poolReads(SIZES[3])];

// From a layer's outputs back to its inputs: ways(q, r) = sum over outputs (i, j) that read input (q, r).
function back(ways, reads, size) {
  const half = size / 2, from = new Float64Array(size * size);
  for (let i = 0; i < half; i++)
    for (let j = 0; j < half; j++)
      if (ways[i * half + j])
        for (const [q, a] of reads[i])
          for (const [r, b] of reads[j]) from[q * size + r] += ways[i * half + j] * a * b;
  return from;
}

// Whether place p of a map (size, size), or of one of several channels, lies on a visible patch.
const shown = (keep, size, p) =>
  keep[Math.floor(Math.floor(p / size) % size * GRID / size) * GRID + Math.floor(p % size * GRID / size)];

const masked = (map, size, keep) => keep ? map.map((v, p) => v * shown(keep, size, p)) : map;

// Ways on which a token reads each place of each map, image first; keep = null: no mask anywhere.
function receptiveField(row, column, keep) {
  let ways = new Float64Array(GRID * GRID);
  ways[row * GRID + column] = 1;
  const maps = [ways = masked(ways, GRID, keep)];
  for (let layer = 3; layer >= 0; layer--) {
    ways = masked(back(ways, READS[layer], SIZES[layer]), SIZES[layer], keep);
    maps.unshift(ways);
  }
  return maps;
}

// A small tokenizer with random weights (Kaiming's rule): 3 channels, then 4, then 8.
function weights(random) {
  const normal = () => Math.sqrt(-2 * Math.log(1 - random())) * Math.cos(2 * Math.PI * random());
  const kernels = (from, to) =>
    Float64Array.from({length: to * from * 49}, () => normal() * Math.sqrt(2 / (49 * from)));
  return [kernels(3, 4), kernels(4, 8)];
}

function convReLU(x, size, weight, from, to) {
  const half = size / 2, y = new Float64Array(to * half * half);
  for (let o = 0; o < to; o++)
    for (let i = 0; i < half; i++)
      for (let j = 0; j < half; j++) {
        let sum = 0;
        for (let c = 0; c < from; c++)
          for (let a = Math.max(0, 3 - 2 * i); a < 7 && 2 * i + a - 3 < size; a++)
            for (let b = Math.max(0, 3 - 2 * j); b < 7 && 2 * j + b - 3 < size; b++)
              sum += weight[((o * from + c) * 7 + a) * 7 + b] * x[(c * size + 2 * i + a - 3) * size + 2 * j + b - 3];
        y[(o * half + i) * half + j] = Math.max(0, sum);
      }
  return y;
}

function maxBlurPool(x, size, channels) {
  const half = size / 2, y = new Float64Array(channels * half * half);
  for (let c = 0; c < channels; c++) {
    const at = (p, q) => x[(c * size + p) * size + q];
    const max = (p, q) => p < 0 || q < 0 || p > size - 2 || q > size - 2 ? 0
      : Math.max(at(p, q), at(p + 1, q), at(p, q + 1), at(p + 1, q + 1));
    for (let i = 0; i < half; i++)
      for (let j = 0; j < half; j++)
        for (let a = -1; a < 2; a++)
          for (let b = -1; b < 2; b++)
            y[(c * half + i) * half + j] += (2 - Math.abs(a)) * (2 - Math.abs(b)) / 16 * max(2 * i + a, 2 * j + b);
  }
  return y;
}

// The forward pass: image (3, 112, 112) -> tokens (8, 7, 7), flat.
function tokenize(image, keep, [first, second]) {
  let x = masked(image, SIZES[0], keep);
  x = masked(convReLU(x, SIZES[0], first, 3, 4), SIZES[1], keep);
  x = masked(maxBlurPool(x, SIZES[1], 4), SIZES[2], keep);
  x = masked(convReLU(x, SIZES[2], second, 4, 8), SIZES[3], keep);
  return masked(maxBlurPool(x, SIZES[3], 8), SIZES[4], keep);
}

// How far a token moves, relative to its length, when the hidden pixels change.
function change(before, after, token) {
  let moved = 0, length = 0;
  for (let d = 0; d < 8; d++) {
    moved += (after[d * GRID * GRID + token] - before[d * GRID * GRID + token]) ** 2;
    length += before[d * GRID * GRID + token] ** 2;
  }
  return moved ? Math.sqrt(moved / length) : 0;
}

start('field', (figure, color) => {
  const SHOWN = 448, random = randomFrom(5), picture = flowers(SHOWN);
  const net = weights(random), pixels = imageOf(flowers(SIZE));
  const state = {row: 3, column: 3, keep: null, tokens: {}};

  function imageOf(canvas) {
    const data = canvas.getContext('2d').getImageData(0, 0, SIZE, SIZE).data;
    const value = (channel, p) => (data[4 * p + channel] / 255 - .45) / .25;  // about mean 0, variance 1
    return Float64Array.from({length: 3 * SIZE ** 2}, (_, i) => value(Math.floor(i / SIZE ** 2), i % SIZE ** 2));
  }
  const hidden = p => !shown(state.keep, SIZE, p);

  // Tokens of the picture, and of the picture with noise at the hidden pixels, in both ways.
  function measure() {
    const noisy = pixels.map((v, p) => hidden(p) ? 6 * random() - 3 : v);
    for (const [name, keep] of [['masked', state.keep], ['dense', null]])
      state.tokens[name] = [pixels, noisy].map(image => tokenize(image, keep, net));
  }
  function show(change) {
    Object.assign(state, change);
    if (change.keep) measure();
    draw();
  }
  const token = () => state.row * GRID + state.column;
  const toggle = () => show({keep: state.keep.map((k, i) => i === token() ? 1 - k : k)});

  function press(event) {
    const move = {ArrowUp: [-1, 0], ArrowDown: [1, 0], ArrowLeft: [0, -1], ArrowRight: [0, 1]}[event.key];
    const inside = n => Math.min(GRID - 1, Math.max(0, n));
    if (move) show({row: inside(state.row + move[0]), column: inside(state.column + move[1])});
    else if (event.key === ' ' || event.key === 'Enter') toggle();
    else return;
    event.preventDefault();
  }
  function click(event) {
    const box = event.currentTarget.getBoundingClientRect();
    const at = (x, low, length) => Math.min(GRID - 1, Math.max(0, Math.floor(GRID * (x - low) / length)));
    show({row: at(event.clientY, box.top, box.height), column: at(event.clientX, box.left, box.width)});
  }

  const label = layer => `${NAMES[layer]}, ${SIZES[layer]}\u00a0×\u00a0${SIZES[layer]}`;
  const panels = Object.fromEntries([['masked', 'Masked'], ['dense', 'Dense: no mask']].map(([name, title]) => {
    const big = make('canvas', {width: SHOWN, height: SHOWN, tabindex: 0, role: 'application',
                                onclick: click, onkeydown: press,
                                'aria-label': `${title}. Arrow keys choose a token, space hides or shows its patch.`});
    const small = [4, 3, 2, 1].map(k => make('canvas', {width: SIZES[k], height: SIZES[k], 'aria-hidden': 'true'}));
    const text = make('p');
    const maps = make('div', {class: 'maps'}, ...small.map((c, i) => make('div', {}, c, label(4 - i))));
    const below = make('div', {class: 'below'}, label(0));
    const node = make('div', {class: 'panel'}, make('h4', {}, title), big, below, maps, text);
    return [name, {big, small, text, node}];
  }));

  // A map of ways: read places in color (hidden ones in the color of the leak), hidden places gray.
  function paint(canvas, ways, veil, behind) {
    const size = Math.sqrt(ways.length), most = Math.max(...ways);
    const layer = make('canvas', {width: size, height: size});
    const [under, over] = [canvas, layer].map(c => c.getContext('2d'));
    const [paper, gray, blue, orange] = ['paper', 'hidden', 'field', 'leak'].map(color);
    under.fillStyle = paper;
    under.fillRect(0, 0, canvas.width, canvas.width);
    if (behind) under.drawImage(behind, 0, 0);
    for (let p = 0; p < ways.length; p++) {
      const i = Math.floor(p / size), j = p % size, seen = shown(state.keep, size, p);
      if (!seen) {
        over.globalAlpha = veil;
        over.fillStyle = gray;
        over.fillRect(j, i, 1, 1);
      }
      if (!ways[p]) continue;
      over.globalAlpha = .35 + .5 * Math.sqrt(ways[p] / most);
      over.fillStyle = seen ? blue : orange;
      over.fillRect(j, i, 1, 1);
    }
    under.imageSmoothingEnabled = false;
    under.drawImage(layer, 0, 0, canvas.width, canvas.width);
  }
  // The patches' borders, and the chosen one.
  function grid(canvas) {
    const pen = canvas.getContext('2d'), cell = SHOWN / GRID;
    pen.strokeStyle = color('paper');
    pen.lineWidth = 1.5;
    for (let k = 1; k < GRID; k++) {
      pen.strokeRect(k * cell, -9, 0, SHOWN + 18);
      pen.strokeRect(-9, k * cell, SHOWN + 18, 0);
    }
    for (const [ink, width] of [[color('paper'), 9], [color('ink'), 4]]) {
      pen.strokeStyle = ink;
      pen.lineWidth = width;
      pen.strokeRect(state.column * cell, state.row * cell, cell, cell);
    }
  }

  const count = (ways, test) => ways.reduce((n, w, p) => n + (w > 0 && test(p)), 0);

  function draw() {
    const seen = state.keep[token()], numbers = {};
    for (const [name, {big, small, text}] of Object.entries(panels)) {
      const maps = receptiveField(state.row, state.column, name === 'masked' ? state.keep : null);
      paint(big, maps[0], name === 'masked' ? .93 : .6, picture);
      grid(big);
      small.forEach((canvas, i) => paint(canvas, maps[4 - i], 1));
      const read = count(maps[0], () => true), leak = count(maps[0], hidden);
      const moved = change(...state.tokens[name], token());
      numbers[name] = {read, leak, moved};
      text.replaceChildren(
        name === 'masked' && !seen ? 'Hidden: the token is exactly 0. ' : `Reads ${grouped(read)} pixels, `,
        ...(name === 'masked' && !seen ? [] : [make('b', {}, `${grouped(leak)} of them hidden`), '. ']),
        `With noise there, the token changes by ${moved ? percent(moved) : 'exactly 0'}.`);
    }
    state.numbers = numbers;
    chosen.textContent = `Token in row ${state.row + 1}, column ${state.column + 1}: ${seen ? 'visible' : 'hidden'}. `
      + `Hidden pixels read: ${grouped(numbers.masked.leak)} masked, ${grouped(numbers.dense.leak)} dense.`;
    flip.textContent = seen ? 'Hide this patch' : 'Show this patch';
  }

  const chosen = make('span', {'aria-live': 'polite'}), flip = button('Hide this patch', toggle);
  figure.append(
    make('div', {class: 'controls'}, make('div', {class: 'options'}, flip,
      button('New mask', () => show({keep: blockwise(GRID, GRID, .6, random)})),
      button('New noise', () => { measure(); draw(); })), chosen),
    make('div', {class: 'panels'}, panels.masked.node, panels.dense.node),
    make('p', {class: 'hint'}, 'Click a patch, or use the arrow keys; the space bar hides or shows it. Gray: hidden. '
      + 'Blue: visible places that the token reads, stronger where it reads them on more ways. '
      + 'Orange: hidden places that flow in.'));
  state.keep = blockwise(GRID, GRID, .6, random);
  state.keep[token()] = 1;
  measure();
  return {draw, state, receptiveField, tokenize, net};
});
