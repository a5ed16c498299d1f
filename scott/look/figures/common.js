// What the figures share: a place of their own on the page, controls, colors.

// An element with attributes (functions become listeners) and children.
function make(tag, attributes = {}, ...children) {
  const node = document.createElement(tag);
  for (const [key, value] of Object.entries(attributes))
    if (typeof value === 'function') node.addEventListener(key.slice(2), value);
    else node.setAttribute(key, value);
  node.append(...children);
  return node;
}

// A slider; its value is shown beside its name as text(value).
function slider({name, min, max, step = 1, value, text, change}) {
  const shown = make('b');
  const input = make('input', {type: 'range', min, max, step, value, 'aria-label': name});
  const say = () => {
    shown.textContent = text(+input.value);
    input.setAttribute('aria-valuetext', shown.textContent);
  };
  input.addEventListener('input', () => { say(); change(+input.value); });
  say();
  const node = make('label', {class: 'control'}, make('span', {class: 'name'}, `${name}: `, shown), input);
  return {node, input, say, set: v => { input.value = v; say(); }};
}

// One of several options, as radio buttons.
let groups = 0;
function choice({name, options, value, change}) {
  const group = `${name}${groups++}`;
  const labels = options.map(([key, text]) => {
    const input = make('input', {type: 'radio', name: group, value: key, onchange: () => change(key)});
    input.checked = key === value;
    return make('label', {}, input, make('span', {}, text));
  });
  return make('fieldset', {class: 'control'}, make('legend', {class: 'name'}, name),
              make('div', {class: 'options'}, ...labels));
}

const button = (text, press) => make('button', {type: 'button', onclick: press}, text);

const percent = share => `${(100 * share).toFixed(share > 0 && share < .095 ? 1 : 0)}\u00a0%`;
const grouped = n => Math.round(n).toLocaleString('en');

// Small, fast random numbers in [0, 1) from a seed (mulberry32).
function randomFrom(seed) {
  return () => {
    seed = (seed + 0x6D2B79F5) | 0;
    let t = Math.imul(seed ^ (seed >>> 15), 1 | seed);
    t = (t + Math.imul(t ^ (t >>> 7), 61 | t)) ^ t;
    return ((t ^ (t >>> 14)) >>> 0) / 4294967296;
  };
}

// Whether the page around a node writes in a light color.
function onDarkPage(node) {
  const pen = document.createElement('canvas').getContext('2d');
  pen.fillStyle = getComputedStyle(node).color;
  pen.fillRect(0, 0, 1, 1);
  const [r, g, b] = pen.getImageData(0, 0, 1, 1).data;
  return .3 * r + .6 * g + .1 * b > 128;
}

// Build every figure of this name that isn't built yet. `build(figure, color)` fills the figure and returns
// {draw, ...}: draw() repaints it, the rest is for tests. A shadow root keeps styles and names apart from the page's,
// and hides the still picture that stands in the host for readers without scripts.
function start(name, build) {
  for (const host of document.querySelectorAll(`.scott-movable[data-figure="${name}"]`)) {
    if (host.shadowRoot) continue;
    const figure = make('div', {class: 'figure', role: 'group', 'aria-label': host.dataset.title});
    host.attachShadow({mode: 'open'}).append(make('style', {}, STYLE), figure);
    host.setAttribute('data-lm-suppress-shortcuts', 'true');  // in JupyterLab arrow keys would leave the cell
    const color = key => getComputedStyle(figure).getPropertyValue(`--${key}`);
    const theme = () => { figure.dataset.theme = onDarkPage(host) ? 'dark' : 'light'; };
    theme();
    host.figure = build(figure, color);
    host.figure.draw();
    const again = () => { theme(); host.figure.draw(); };
    matchMedia('(prefers-color-scheme: dark)').addEventListener('change', again);
    const watch = new MutationObserver(() => { again(); setTimeout(again, 400); });  // a style sheet may come later
    for (const node of [document.documentElement, document.body]) watch.observe(node, {attributes: true});
  }
}
