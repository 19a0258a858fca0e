"use strict";
// What the page shows, who answers its questions, and how it draws: what all of its parts share. Each file of the
// page is a script of its own; they see each other's names, and page.js, the last, begins.

const $ = id => document.getElementById(id);
const MANY = 16384; // nodes, from which on a worker answers
const MANY_LINES = 1000; // between two rows, from which on those that do not spread are left out
const LINES = 600; // messages that are drawn to one node
const PATIENCE = 60; // ms without a change before an expression is sent that somebody writes
const QUIET = 150; // ms, within which a moving pointer is told of once
const few = matchMedia("(prefers-reduced-motion: reduce)");
const thousands = new Intl.NumberFormat("en-US"),
  number = value => thousands.format(value);

/** An element with attributes and children; text only ever as text. */
function make(tag, attributes = {}, ...children) {
  const made = document.createElement(tag);
  for (const [name, value] of Object.entries(attributes)) {
    if (name.startsWith("on")) made.addEventListener(name.slice(2), value);
    else if (value !== null && value !== false) made.setAttribute(name, value === true ? "" : value);
  }
  made.append(...children);
  return made;
}

// ----------------------------------------------------------------------------------------------------- its state

const tour = [];
let data = null,
  live = null,
  colors = {},
  step = 0;
const state = {
  view: "messages",
  row: 0,
  node: 0,
  head: null,
  layer: 0,
  window: null,
  cell: { query: 0, key: 0 },
  shown: Infinity,
  spread: null,
  leaks: [],
};

const labelOf = (node, isKey = false) => {
  const labels = isKey && data.key_labels ? data.key_labels : data.labels;
  return labels && node in labels ? `${node} “${labels[node]}”` : number(node);
};
const sizes = () => [data.m, ...data.layers.map(() => data.n)];
const isStack = () => data.n === data.m;
const graphAt = layer => data.graphs[data.layers[layer]];

/** Whether a server answers about other expressions, and this is a stack that a person may change. */
const isEditable = () => Boolean(live) && (!tour.length || Boolean(tour[step].own));

/** Runs of layers with the same graph: [{first, last, graph}]. */
function groups() {
  const found = [];
  data.layers.forEach((graph, layer) => {
    const before = found[found.length - 1];
    if (before && before.graph === graph) before.last = layer;
    else found.push({ first: layer, last: layer, graph });
  });
  return found;
}
const named = ({ first, last }) => (first === last ? `layer ${first}` : `layers ${first}–${last}`);

// --------------------------------------------------------------------------------------------------- who answers

let answers = null,
  worker = null,
  count = 0;
const asked = new Map(); // what the worker is asked, by its number: [place, done]
const busyWith = new Map(); // the places of questions under way, and the question that follows there, or null

function load() {
  if (worker) worker.terminate();
  worker = null;
  asked.clear();
  busyWith.clear();
  answers = new Engine.Answers(data);
  state.leaks = [];
  if (Math.max(data.n, data.m) < MANY) return;
  try {
    worker = new Worker(URL.createObjectURL(new Blob([$("script-engine").textContent], { type: "text/javascript" })));
  } catch {
    return;
  } // then the page itself answers
  worker.onmessage = ({ data: { number: which, answer } }) => {
    const [place, done] = asked.get(which),
      follows = busyWith.get(place);
    asked.delete(which);
    busyWith.delete(place);
    done(answer);
    if (follows) ask(...follows, place);
  };
  const { n, m, parts, graphs, layers } = data;
  worker.postMessage({ question: "load", about: { n, m, parts, graphs, layers } });
}

/** Ask, and do something with the answer. Of questions for one place only the last waits for the one under way. */
function ask(question, about, done, place = question) {
  if (!worker) {
    done(answers[question](about));
    return;
  }
  if (busyWith.has(place)) {
    busyWith.set(place, [question, about, done]);
    return;
  }
  busyWith.set(place, null);
  asked.set(++count, [place, done]);
  worker.postMessage({ number: count, question, about });
}

// ------------------------------------------------------------------------------------------------------ canvases

function readColors() {
  const style = getComputedStyle(document.documentElement);
  for (const name of ["ground", "panel", "line", "text", "quiet", "hears", "heard", "leak", "faint"]) {
    colors[name] = style.getPropertyValue(`--${name}`).trim();
  }
}
const rgb = color => [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));

let room = 600; // CSS pixels across, which are looked at when the window or the view changes
const measure = () => {
  room = $(state.view).clientWidth || room;
};

/** The pixels of shares from nothing to all in 256 levels, in a colour over the faint one: made once. */
function levels(color, dim) {
  return (
    made.get(`${color} ${colors.faint} ${dim}`) ||
    (() => {
      const to = rgb(color),
        from = rgb(colors.faint),
        found = new Uint32Array(256);
      for (let i = 0; i < 256; i++) {
        const share = i ? 0.25 + (0.75 * i) / 255 : 0;
        found[i] = [0, 1, 2].reduce(
          (word, c) => word | (Math.round((from[c] + (to[c] - from[c]) * share) * dim) << (8 * c)),
          0xff << 24,
        );
      }
      made.set(`${color} ${colors.faint} ${dim}`, found);
      return found;
    })()
  );
}
const made = new Map();

/** A canvas of the size that it is shown at, cleared. */
function prepared(canvas, height) {
  const scale = window.devicePixelRatio || 1,
    width = room;
  if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
    canvas.width = Math.round(width * scale);
    canvas.height = Math.round(height * scale);
    canvas.style.height = `${height}px`;
  }
  const brush = canvas.getContext("2d");
  brush.setTransform(scale, 0, 0, scale, 0, 0);
  brush.clearRect(0, 0, width, height);
  brush.font = "12px system-ui, sans-serif";
  return { brush, width, height };
}

/** Shares of pixels, from nothing to all, as a picture; whatever is not nothing can be seen. */
function image(shares, width, height) {
  const picture = new ImageData(width, height),
    to = rgb(colors.hears),
    from = rgb(colors.ground);
  for (let i = 0; i < shares.length; i++) {
    const share = shares[i] > 1e-6 ? 0.18 + 0.82 * shares[i] : 0;
    for (let c = 0; c < 3; c++) picture.data[4 * i + c] = from[c] + (to[c] - from[c]) * share;
    picture.data[4 * i + 3] = 255;
  }
  return picture;
}
