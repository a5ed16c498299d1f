// How long a moving average remembers: target = m * target + (1 - m) * encoder, after every step.

const MOMENTA = [0, .5, .7, .8, .9, .95, .97, .98, .99, .992, .994, .996, .997, .998, .999, .9995, .9998, .9999, 1];
const STEPS = [100, 200, 500, 1000, 2000, 5000, 10000, 20000, 38100, 100000];  // 38,100: the paper's run

// The momentum of step k = 1 ... total, as scott.schedule.linear gives it; without `rises` it stays.
const momentumAt = (k, total, m, rises) => rises ? m + (1 - m) * k / total : m;

// What the encoders of steps 0 ... now weigh in the target after step `now` (0: the one that both began with).
function memoryOf(now, total, m, rises) {
  const weights = new Float64Array(now + 1);
  let later = 1;
  for (let k = now; k > 0; k--) {
    const mk = momentumAt(k, total, m, rises);
    weights[k] = (1 - mk) * later;
    later *= mk;
  }
  weights[0] = later;
  return weights;
}

// Steps after which an encoder's weight has halved, if the momentum stays.
const halfLife = m => m === 0 ? 0 : m === 1 ? Infinity : Math.log(2) / -Math.log(m);

// How many of the youngest encoders make up half of the target; Infinity if the one of step 0 has more than half.
function half(weights) {
  let sum = 0;
  for (let k = weights.length - 1; k > 0; k--)
    if ((sum += weights[k]) >= .5 - 1e-12) return weights.length - k;
  return Infinity;
}

// The target's place after steps 0 ... total, when the encoder stands at k after step k.
function follow(total, m, rises) {
  const place = new Float64Array(total + 1);
  for (let k = 1; k <= total; k++) {
    const mk = momentumAt(k, total, m, rises);
    place[k] = mk * place[k - 1] + (1 - mk) * k;
  }
  return place;
}

// A picture over the steps 0 ... total and values 0 ... high, as SVG text; `content` draws with what it is given.
const FRAME = {left: 66, right: 12, top: 30, bottom: 42, width: 400, height: 280};
const THIN = 'stroke="var(--ink)" stroke-width="1.5"', THICK = 'stroke="var(--field)" stroke-width="2.5"';

function plot({total, high, format, title, axis}, content) {
  const {left, right, top, bottom, width, height} = FRAME, floor = height - bottom;
  const X = k => left + (width - left - right) * k / total, Y = v => floor - (floor - top) * v / high;
  const text = (x, y, anchor, words, fill = 'ink') =>
    `<text x="${x}" y="${y}" text-anchor="${anchor}" fill="var(--${fill})">${words}</text>`;
  const curve = (values, style) => {
    const stride = Math.max(1, Math.floor(values.length / 600));
    const points = [...values.keys()].filter(k => !isNaN(values[k]) && (k % stride === 0 || k === values.length - 1))
      .map(k => `${X(k).toFixed(1)},${Y(values[k]).toFixed(1)}`);
    return `<polyline points="${points.join(' ')}" fill="none" ${style}/>`;
  };
  const upright = (k, from, to, style) => `<path d="M${X(k)},${Y(from)}V${Y(to)}" ${style}/>`;
  const ticks = [0, .5, 1].map(t => text(X(t * total), floor + 17, t === 1 ? 'end' : 'middle', grouped(t * total))
                                    + text(left - 6, Y(t * high) + 4, 'end', format(t * high)));
  return `<svg viewBox="0 0 ${width} ${height}" role="img"><title>${title}</title>${content({X, Y, text, curve, upright})}`
    + `<path d="M${left},${top}V${floor}H${width - right}" fill="none" stroke="var(--soft)"/>${ticks.join('')}`
    + `${text(left, 16, 'start', axis)}${text(X(total / 2), height - 5, 'middle', 'optimizer step')}</svg>`;
}

const TITLES = ['Weight of each past encoder in the target', 'An encoder that moves evenly, and its target'];
const END = FRAME.width - FRAME.right;
const number = x => x === Infinity ? '∞' : x >= 100 ? grouped(x) : x.toFixed(1);

function weightPlot({now, total}, weights, young) {
  const high = weights.slice(1).reduce((a, b) => Math.max(a, b), 0) || 1, from = now - Math.min(young, now);
  const drawn = Float64Array.from(weights, (w, k) => k ? w : NaN);  // the start is often as heavy as a hundred others
  const words = `shaded: ${young === Infinity ? 'less than' : 'the younger'} half, up to step ${grouped(now)}`;
  return plot({total, high, format: v => `${+v.toPrecision(2)}`, title: TITLES[0], axis: 'weight'},
              ({X, Y, text, curve, upright}) =>
    `<path d="M${X(from)},${Y(0)}V${Y(high)}H${X(now)}V${Y(0)}" fill="var(--field)" opacity=".18"/>`
    + curve(drawn, THICK) + upright(now, 0, high, `${THIN} stroke-dasharray="4 3"`) + text(END, 16, 'end', words));
}

function lagPlot({now, total}, place) {
  return plot({total, high: total, format: grouped, title: TITLES[1], axis: 'place'}, ({X, Y, text, curve, upright}) =>
    curve(place.map((_, k) => k), THIN) + curve(place, THICK)
    + upright(now, now, place[now], 'stroke="var(--leak)" stroke-width="4"')
    + text(X(.55 * total), Y(.55 * total) - 8, 'end', 'encoder')
    + text(END, Y(0) - 9, 'end', `target, ${number(now - place[now])} steps behind`, 'field'));
}

start('memory', figure => {
  const state = {m: .996, total: 1000, now: 600, rises: false};
  const drag = event => { if (event.buttons) point(event); };
  const pictures = [0, 1].map(() => make('div', {onpointerdown: point, onpointermove: drag}));
  const readout = make('p', {class: 'readout', 'aria-live': 'polite'});

  function point(event) {
    const box = event.currentTarget.getBoundingClientRect(), unit = box.width / FRAME.width;
    const share = (event.clientX - box.left - FRAME.left * unit) / (box.width - (FRAME.left + FRAME.right) * unit);
    set({now: Math.round(state.total * Math.min(1, Math.max(0, share)))});
  }
  function set(change) {
    if (change.total) change.now = Math.round(state.now / state.total * change.total);
    Object.assign(state, change);
    at.input.max = state.total;
    at.set(state.now);
    draw();
  }

  function draw() {
    const {m, total, now, rises} = state, mk = momentumAt(now, total, m, rises);
    const weights = memoryOf(now, total, m, rises), place = follow(total, m, rises), young = half(weights);
    const limit = m === 1 ? Infinity : m / (1 - m), lag = now - place[now];
    pictures[0].innerHTML = weightPlot(state, weights, young);
    pictures[1].innerHTML = lagPlot(state, place);
    readout.textContent = `At step ${grouped(now)}, m = ${+mk.toFixed(6)}: half-life ln 2 / −ln m = `
      + `${number(halfLife(mk))} steps. ` + (young === Infinity
        ? 'More than half of the target is still the network of step 0. '
        : `The last ${grouped(young)} encoders make up half of the target. `)
      + `The network of step 0 weighs ${percent(weights[0])}. The target lags ${number(lag)} steps behind an encoder that `
      + `moves evenly${rises ? '' : `; after a long time, m / (1 − m) = ${number(limit)}`}.`;
  }

  const at = slider({name: 'Look at step', min: 0, max: state.total, value: state.now, text: grouped,
                     change: now => set({now})});
  figure.append(
    make('div', {class: 'controls'},
      slider({name: 'Momentum m', min: 0, max: MOMENTA.length - 1, value: MOMENTA.indexOf(state.m),
              text: i => `${MOMENTA[i]}`, change: i => set({m: MOMENTA[i]})}).node,
      choice({name: 'During the run, m', value: 'stays', change: how => set({rises: how === 'rises'}),
              options: [['stays', 'stays'], ['rises', 'rises to 1']]}),
      slider({name: 'Steps of the run', min: 0, max: STEPS.length - 1, value: STEPS.indexOf(state.total),
              text: i => grouped(STEPS[i]), change: i => set({total: STEPS[i]})}).node,
      at.node),
    make('div', {class: 'panels wide'},
      ...pictures.map((picture, i) => make('div', {class: 'panel'}, make('h4', {}, TITLES[i]), picture))),
    readout,
    make('p', {class: 'hint'}, 'Drag in a plot, or use the slider, to look at another step.'));
  return {draw, state, set, memoryOf, halfLife, half, follow};
});
