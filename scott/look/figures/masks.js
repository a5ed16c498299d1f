// Draw and re-draw masks; how often is each patch visible?

const KINDS = {uniform, blockwise, multiblock};
const SCALE = [[68, 1, 84], [59, 82, 139], [33, 145, 140], [94, 201, 98], [253, 231, 37]];  // viridis at 0, ¼ … 1

function heatColor(share) {
  const at = Math.min(3, Math.floor(4 * share)), part = 4 * share - at;
  return `rgb(${SCALE[at].map((low, i) => Math.round(low + part * (SCALE[at + 1][i] - low)))})`;
}

// Share of the hidden patches that have a visible one among their eight neighbors.
function touching(keep, side) {
  let hidden = 0, near = 0;
  for (let i = 0; i < keep.length; i++) {
    if (keep[i]) continue;
    hidden++;
    const r = Math.floor(i / side), c = i % side;
    near += [-1, 0, 1].some(a => [-1, 0, 1].some(b => r + a >= 0 && r + a < side && c + b >= 0 && c + b < side
                                                    && keep[(r + a) * side + c + b]));
  }
  return near / hidden;
}

start('masks', (figure, color) => {
  const SIZE = 336, random = randomFrom(1), picture = flowers(SIZE);
  const state = {kind: 'blockwise', side: 14, ratio: .6, drawn: 0, near: 0, counts: null, keep: null, running: false};
  const canvas = () => make('canvas', {width: SIZE, height: SIZE, role: 'img'});
  const mask = canvas(), heat = canvas(), readout = make('p', {class: 'readout', 'aria-live': 'polite'});

  function add(count) {
    for (let i = 0; i < count; i++) {
      state.keep = KINDS[state.kind](state.side, state.side, state.ratio, random);
      state.keep.forEach((k, n) => { state.counts[n] += k; });
      state.near += touching(state.keep, state.side);
    }
    state.drawn += count;
    draw();
  }
  function restart() {
    Object.assign(state, {drawn: 0, near: 0, counts: new Uint32Array(state.side ** 2)});
    add(1);
  }
  const set = change => { Object.assign(state, change); restart(); };

  function step() {
    if (!state.running) return;
    add(1 + Math.floor(state.drawn / 60));
    if (state.drawn >= 5000) run(false);
    else requestAnimationFrame(step);
  }
  function run(on) {
    state.running = on;
    readout.setAttribute('aria-live', on ? 'off' : 'polite');  // not sixty times a second
    more.textContent = on ? 'Pause' : 'Keep drawing';
    if (on) requestAnimationFrame(step);
  }

  // Mean share of visible masks over the patches whose row and column are both among `rows`.
  function shareAt(rows) {
    const at = rows.flatMap(r => rows.map(c => state.counts[r * state.side + c] / state.drawn));
    return at.reduce((a, b) => a + b) / at.length;
  }

  function draw() {
    const {side, counts, keep} = state, cell = SIZE / side, visible = visibleCount(side, side, state.ratio);
    const [left, right] = [mask, heat].map(c => c.getContext('2d'));
    left.drawImage(picture, 0, 0);
    left.fillStyle = color('hidden');
    left.strokeStyle = color('paper');
    for (let i = 0; i < side * side; i++) {
      const place = [(i % side) * cell, Math.floor(i / side) * cell, cell, cell];
      if (!keep[i]) { left.fillRect(...place); left.strokeRect(...place); }
      right.fillStyle = heatColor(counts[i] / state.drawn);
      right.fillRect(...place);
    }
    const corner = shareAt([0, side - 1]), center = shareAt([Math.floor((side - 1) / 2), Math.floor(side / 2)]);
    mask.setAttribute('aria-label', `A mask of ${side} by ${side} patches, ${visible} of them visible`);
    heat.setAttribute('aria-label', `Visible in the center ${percent(center)}, in the corners ${percent(corner)}`);
    readout.textContent = `Masks drawn: ${grouped(state.drawn)}. Each shows ${visible} of ${side * side} patches. `
      + `A patch in the center is visible in ${percent(center)} of them, a corner in ${percent(corner)}. Of the hidden patches, `
      + `${percent(state.near / state.drawn)} touch a visible one.`;
  }

  const scale = `linear-gradient(90deg, ${[0, .25, .5, .75, 1].map(heatColor)})`;
  const more = button('Keep drawing', () => run(!state.running));
  figure.append(
    make('div', {class: 'controls'},
      choice({name: 'Kind of mask', value: state.kind, change: kind => set({kind}),
              options: [['uniform', 'uniform'], ['blockwise', 'blockwise'], ['multiblock', 'multi-block']]}),
      choice({name: 'Grid of patches', value: 14, change: side => set({side}),
              options: [6, 7, 8, 14].map(n => [n, `${n} × ${n}`])}),
      slider({name: 'Ratio hidden', min: .1, max: .9, step: .01, value: state.ratio, text: v => v.toFixed(2),
              change: ratio => set({ratio})}).node,
      make('div', {class: 'options'}, button('Draw one', () => add(1)), button('Draw 100', () => add(100)), more,
           button('Start over', restart))),
    make('div', {class: 'panels'},
      make('div', {class: 'panel'}, make('h4', {}, 'The last mask'), mask),
      make('div', {class: 'panel'}, make('h4', {}, 'How often visible'), heat,
           make('div', {class: 'scale', 'aria-hidden': 'true', style: `background: ${scale} no-repeat top / 100% 10px`},
                ...['never', 'half', 'always'].map(t => make('span', {}, t))))),
    readout);
  restart();
  return {draw, state, uniform, blockwise, multiblock, visibleCount, touching, randomFrom};
});
