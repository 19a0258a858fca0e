"use strict";
// The page: an expression for each layer, three pictures, the facts. What the pictures need to know of graphs, Engine
// answers: at once where nodes are few, in a worker where they are many.

(() => {
  const $ = id => document.getElementById(id);
  const MANY = 16384;      // nodes, from which on a worker answers
  const MANY_LINES = 1000; // between two rows, from which on those that do not spread are left out
  const LINES = 600;       // messages that are drawn to one node
  const PATIENCE = 60;     // ms without a change before an expression is sent that somebody writes
  const QUIET = 150;       // ms, within which a moving pointer is told of once
  const few = matchMedia("(prefers-reduced-motion: reduce)");
  const thousands = new Intl.NumberFormat("en-US"), number = value => thousands.format(value);

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

  // ---------------------------------------------------------------------------------------------------- its state

  const tour = [];
  let data = null, live = null, colors = {}, step = 0;
  const state = { view: "messages", row: 0, node: 0, head: null, layer: 0, window: null, cell: { query: 0, key: 0 },
                  shown: Infinity, spread: null, leaks: [] };

  const labelOf = (node, isKey = false) => {
    const labels = isKey && data.key_labels ? data.key_labels : data.labels;
    return labels && node in labels ? `${node} “${labels[node]}”` : number(node);
  };
  const sizes = () => [data.m, ...data.layers.map(() => data.n)];
  const isStack = () => data.n === data.m;
  const graphAt = layer => data.graphs[data.layers[layer]];

  /** Whether a server answers about other expressions, and this is a stack that a person may change. */
  const isEditable = () => Boolean(live) && (!tour.length || Boolean(tour[step].own)) && isStack();

  /** Runs of layers with the same graph: [{first, last, graph}]. */
  function groups() {
    const found = [];
    data.layers.forEach((graph, layer) => {
      const before = found[found.length - 1];
      if (before && before.graph === graph) before.last = layer; else found.push({ first: layer, last: layer, graph });
    });
    return found;
  }
  const named = ({ first, last }) => (first === last ? `layer ${first}` : `layers ${first}–${last}`);

  // ------------------------------------------------------------------------------------------------ who answers

  let answers = null, worker = null, count = 0;
  const asked = new Map();  // what the worker is asked, by its number: [place, done]
  const busyWith = new Map();  // the places of questions under way, and the question that follows there, or null

  function load() {
    if (worker) worker.terminate();
    worker = null; asked.clear(); busyWith.clear();
    answers = new Engine.Answers(data);
    state.leaks = [];
    if (Math.max(data.n, data.m) < MANY) return;
    try {
      worker = new Worker(URL.createObjectURL(new Blob([$("engine").textContent], { type: "text/javascript" })));
    } catch { return; }  // then the page itself answers
    worker.onmessage = ({ data: { number: which, answer } }) => {
      const [place, done] = asked.get(which), follows = busyWith.get(place);
      asked.delete(which); busyWith.delete(place);
      done(answer);
      if (follows) ask(...follows, place);
    };
    const { n, m, parts, graphs, layers } = data;
    worker.postMessage({ question: "load", about: { n, m, parts, graphs, layers } });
  }

  /** Ask, and do something with the answer. Of questions for one place only the last waits for the one under way. */
  function ask(question, about, done, place = question) {
    if (!worker) { done(answers[question](about)); return; }
    if (busyWith.has(place)) { busyWith.set(place, [question, about, done]); return; }
    busyWith.set(place, null);
    asked.set(++count, [place, done]);
    worker.postMessage({ number: count, question, about });
  }

  // -------------------------------------------------------------------------------------------------- canvases

  function readColors() {
    const style = getComputedStyle(document.documentElement);
    for (const name of ["ground", "panel", "line", "text", "quiet", "hears", "heard", "leak", "faint"]) {
      colors[name] = style.getPropertyValue(`--${name}`).trim();
    }
  }
  const rgb = color => [1, 3, 5].map(at => parseInt(color.slice(at, at + 2), 16));

  let room = 600;  // CSS pixels across, which are looked at when the window or the view changes
  const measure = () => { room = $(state.view).clientWidth || room; };

  /** The pixels of shares from nothing to all in 256 levels, in a colour over the faint one: made once. */
  function levels(color, dim) {
    return made.get(`${color} ${colors.faint} ${dim}`) || (() => {
      const to = rgb(color), from = rgb(colors.faint), found = new Uint32Array(256);
      for (let i = 0; i < 256; i++) {
        const share = i ? 0.25 + 0.75 * i / 255 : 0;
        found[i] = [0, 1, 2].reduce((word, c) => word | Math.round((from[c] + (to[c] - from[c]) * share) * dim) << (8 * c), 0xff << 24);
      }
      made.set(`${color} ${colors.faint} ${dim}`, found);
      return found;
    })();
  }
  const made = new Map();

  /** A canvas of the size that it is shown at, cleared. */
  function prepared(canvas, height) {
    const scale = window.devicePixelRatio || 1, width = room;
    if (canvas.width !== Math.round(width * scale) || canvas.height !== Math.round(height * scale)) {
      canvas.width = Math.round(width * scale); canvas.height = Math.round(height * scale);
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
    const picture = new ImageData(width, height), to = rgb(colors.hears), from = rgb(colors.ground);
    for (let i = 0; i < shares.length; i++) {
      const share = shares[i] > 1e-6 ? 0.18 + 0.82 * shares[i] : 0;
      for (let c = 0; c < 3; c++) picture.data[4 * i + c] = from[c] + (to[c] - from[c]) * share;
      picture.data[4 * i + 3] = 255;
    }
    return picture;
  }

  // -------------------------------------------------------------------------------------------------- messages

  const LEFT = 58, RIGHT = 56;
  const geometry = { top: 30, gap: 30, width: 0 };
  const x = (node, size) => LEFT + (node + 0.5) * (geometry.width - LEFT - RIGHT) / Math.max(size, 1);
  const y = row => geometry.top + row * geometry.gap;
  const rowName = row => (row === 0 ? (isStack() ? "input" : "keys") : isStack() ? `layer ${row - 1}` : "queries");

  /** Choose a node; quiet: of many in short time, the last is told. */
  function select(row, node, isQuiet = false) {
    const size = sizes();
    state.row = Math.max(0, Math.min(row, size.length - 1));
    state.node = Math.max(0, Math.min(node, size[state.row] - 1));
    if (state.view === "messages") refresh(isQuiet);
  }

  function refresh(isQuiet = false) {
    const { row, node, head } = state, canvas = $("messages-canvas");
    canvas.setAttribute("aria-valuemax", Math.max(0, sizes()[row] - 1));
    canvas.setAttribute("aria-valuenow", node);
    if (!answers.isKnown || !(data.n && data.m)) { state.spread = null; drawMessages(); return; }
    const across = Math.max(1, Math.round((room - LEFT - RIGHT) * (window.devicePixelRatio || 1)));
    ask("spread", { row, node, head, across }, answer => {
      state.spread = answer;
      drawMessages();
      if (playing) return;
      if (!isQuiet) say();
      else if (!telling) telling = setTimeout(() => { telling = 0; say(); }, QUIET);
    });
  }

  let telling = 0;
  function say() {
    const { row, node, spread } = state, size = sizes();
    if (!spread) return;
    const told = [`Node ${labelOf(node, row === 0)}, ${rowName(row)}`];
    if (row > 0) told.push(`hears ${number(spread.degree)} keys directly, and through all layers above it ${number(spread.sizes[0])} of ${number(size[0])} inputs`);
    if (row < size.length - 1) told.push(`is heard by ${number(spread.sizes[size.length - 1])} of ${number(data.n)} outputs`);
    const heavy = weightsOf(row, node);
    if (heavy) told.push(`most from ${heavy.slice(0, 3).map(([key, weight]) => `${labelOf(key, true)} ${weight.toFixed(2)}`).join(", ")}; keys that are not drawn, ${restOf(row, node).toFixed(2)}`);
    $("said").textContent = `${told.join("; ")}.`;
    $("messages-canvas").setAttribute("aria-valuetext", told.join("; "));
    fields();
  }

  function drawMessages() {
    const size = sizes(), rows = size.length;
    geometry.gap = rows > 14 ? 24 : rows > 8 ? 34 : rows > 3 ? 62 : 150;
    const canvas = $("messages-canvas"), { brush, width } = prepared(canvas, geometry.top + (rows - 1) * geometry.gap + 34);
    geometry.width = width;
    brush.textBaseline = "middle";
    const { spread, row, node } = state;
    for (let r = 0; r < rows; r++) {
      brush.fillStyle = r === row ? colors.text : colors.quiet;
      brush.fillText(rowName(r), 4, y(r));
      if (spread && Math.abs(r - row) <= state.shown) {
        brush.textAlign = "right"; brush.fillText(number(spread.sizes[r]), width - 4, y(r)); brush.textAlign = "start";
      }
    }
    if (!spread) {
      brush.fillStyle = colors.quiet;
      brush.fillText(data.n && data.m ? data.graphs.every(graph => graph.parts.length) ? "Too many edges to follow one by one: Mask shows their shares." : "Which edges there are is not found at once: draw.page(graph) looks." : "There are no nodes.", LEFT, y(0) + 20);
      return;
    }
    drawImage();
    const isShown = r => Math.abs(r - row) <= state.shown;
    if (Math.max(...size) <= Engine.CIRCLES) drawCircles(brush, size, isShown); else drawBars(brush, size, isShown);
    drawLeak(brush, size);
    if (Math.max(...size) > Engine.CIRCLES) {
      brush.fillStyle = colors.text;
      brush.beginPath(); brush.arc(x(node, size[row]), y(row), 4, 0, 7); brush.fill();
    }
  }

  function drawBars(brush, size, isShown) {
    const { spread, row, node } = state, scale = window.devicePixelRatio || 1, across = spread.shares[0].length;
    const tall = Math.max(1, Math.round(Math.min(14, geometry.gap - 8) * scale));
    size.forEach((_, r) => {
      const isBelow = r > row, shown = isShown(r), line = new ImageData(across, tall), shares = spread.shares[r];
      const words = new Uint32Array(line.data.buffer), color = isBelow ? colors.heard : colors.hears;
      const plain = levels(color, 1), hatched = isBelow ? levels(color, 0.72) : plain;  // not by colour alone
      for (let p = 0; p < across; p++) {
        const level = shown && shares[p] ? Math.ceil(shares[p] * 255) : 0;
        for (let q = 0; q < tall; q++) words[q * across + p] = isBelow && (p + q) % 6 < 2 ? hatched[level] : plain[level];
      }
      brush.putImageData(line, Math.round(LEFT * scale), Math.round(y(r) * scale - tall / 2));
    });
    if (row > 0 && isShown(row - 1)) messagesTo(brush, row, node, size, spread.keys);
  }

  function messagesTo(brush, row, node, size, keys) {
    const heavy = weightsOf(row, node);
    const drawn = heavy || keys.filter((_, i) => i % Math.ceil(keys.length / LINES) === 0).map(key => [key, null]);
    for (const [key, weight] of drawn) {
      brush.strokeStyle = colors.hears;
      brush.globalAlpha = weight === null ? 0.55 : 0.15 + 0.85 * Math.sqrt(weight);
      brush.lineWidth = weight === null ? 1 : 0.6 + 5 * weight;
      brush.beginPath(); brush.moveTo(x(key, size[row - 1]), y(row - 1) + 8); brush.lineTo(x(node, size[row]), y(row) - 8); brush.stroke();
    }
    brush.globalAlpha = 1;
  }

  function drawCircles(brush, size, isShown) {
    const { spread, row, node, head } = state, layers = answers.stack(head);
    const radius = Math.max(3, Math.min(10, (geometry.width - LEFT - RIGHT) / Math.max(...size) / 3));
    layers.forEach((graph, l) => {
      const above = y(l) + radius, below = y(l + 1) - radius, others = new Path2D(), heard = new Path2D();
      const places = Array.from({ length: size[l] }, (_, key) => x(key, size[l])), isDrawn = isShown(l) && isShown(l + 1);
      const isSparse = Engine.edges(graph) <= MANY_LINES, color = l < row ? colors.hears : colors.heard;
      brush.setLineDash(l >= row ? [5, 3] : []);
      for (let q = 0; q < graph.n; q++) {
        const heavy = weightsOf(l + 1, q), at = x(q, size[l + 1]), hearsSome = isDrawn && spread.fields[l + 1][q];
        if (heavy) for (const [key, weight] of heavy) {
          const inField = hearsSome && spread.fields[l][key];
          brush.strokeStyle = inField ? color : colors.faint; brush.globalAlpha = inField ? 0.2 + 0.8 * weight : 0.5;
          brush.lineWidth = 0.5 + 5 * weight;
          brush.beginPath(); brush.moveTo(places[key], above); brush.lineTo(at, below); brush.stroke();
        } else if (hearsSome || isSparse) Engine.eachKey(graph, q, key => {
          const inField = hearsSome && spread.fields[l][key];
          if (!inField && !isSparse) return;
          const path = inField ? heard : others;
          path.moveTo(places[key], above); path.lineTo(at, below);
        });
      }
      brush.globalAlpha = 0.7; brush.lineWidth = 0.7; brush.strokeStyle = colors.faint; brush.stroke(others);
      brush.globalAlpha = 0.8; brush.lineWidth = isSparse ? 1.4 : 0.8; brush.strokeStyle = color; brush.stroke(heard);
    });
    brush.setLineDash([]); brush.globalAlpha = 1;
    size.forEach((length, r) => {
      for (let i = 0; i < length; i++) {
        const inField = spread.fields[r][i] && isShown(r), isChosen = r === row && i === node;
        brush.beginPath(); brush.arc(x(i, length), y(r), isChosen ? radius + 2 : radius, 0, 7);
        brush.fillStyle = isChosen ? colors.text : inField ? (r <= row ? colors.hears : colors.heard) : colors.ground;
        brush.strokeStyle = inField ? (r <= row ? colors.hears : colors.heard) : colors.line;
        brush.lineWidth = 1.2; brush.fill(); brush.stroke();
        const label = r === size.length - 1 ? data.labels && data.labels[i] : r === 0 ? (data.key_labels || data.labels || [])[i] : null;
        const isEnd = r === 0 || r === size.length - 1;
        if (isEnd && (length <= 32 || i % 8 === 0)) {
          brush.fillStyle = colors.quiet; brush.textAlign = "center";
          const space = (geometry.width - LEFT - RIGHT) / length * (length <= 32 ? 1 : 8), text = String(label ?? i);
          brush.fillText(text.slice(0, Math.max(1, Math.floor(space / 7))), x(i, length), r === 0 ? y(r) - radius - 8 : y(r) + radius + 10);
          brush.textAlign = "start";
        }
      }
    });
  }

  /** The image of which nodes are patches: the darker a patch is veiled, the less the chosen node hears it. */
  function drawImage() {
    const canvas = $("image"), { image, spread, row, node } = { image: data.image, ...state };
    canvas.hidden = !image;
    if (!image || !spread) return;
    const { width, height, rgb: raw, rows, columns, before } = image, bytes = atob(raw), times = Math.max(1, Math.round(280 / width));
    canvas.width = width * times; canvas.height = height * times;
    const brush = canvas.getContext("2d"), picture = new ImageData(canvas.width, canvas.height);
    const heavy = row > 0 && weightsOf(row, node), weights = new Map(heavy || (row > 0 ? spread.keys.map(key => [key, 1]) : []));
    const largest = Math.max(1e-9, ...[...weights].filter(([key]) => key >= before).map(([, weight]) => weight));
    for (let y = 0; y < canvas.height; y++) for (let x = 0; x < canvas.width; x++) {
      const patch = before + Math.floor(y * rows / canvas.height) * columns + Math.floor(x * columns / canvas.width);
      const share = row > 0 ? 0.15 + 0.85 * (weights.get(patch) || 0) / largest : 1, at = 4 * (y * canvas.width + x);
      const from = 3 * (Math.floor(y / times) * width + Math.floor(x / times));
      for (let c = 0; c < 3; c++) picture.data[at + c] = bytes.charCodeAt(from + c) * share;
      picture.data[at + 3] = 255;
    }
    brush.putImageData(picture, 0, 0);
    if (node < before) return;
    const across = canvas.width / columns, down = canvas.height / rows;
    brush.strokeStyle = colors.leak; brush.lineWidth = 3;
    brush.strokeRect((node - before) % columns * across, Math.floor((node - before) / columns) * down, across, down);
  }

  /** The first way by which the future is heard: dashed, and named. */
  function drawLeak(brush, size) {
    const found = state.leaks[0];
    if (!found || !$("show-leak") || $("show-leak").getAttribute("aria-pressed") !== "true") return;
    const { layer, key, query } = found;
    brush.strokeStyle = colors.leak; brush.fillStyle = colors.leak; brush.lineWidth = 2.5; brush.setLineDash([7, 4]);
    brush.beginPath(); brush.moveTo(x(key, size[0]), y(0));
    brush.lineTo(x(key, size[layer]), y(layer)); brush.lineTo(x(query, size[layer + 1]), y(layer + 1));
    brush.lineTo(x(query, size[size.length - 1]), y(size.length - 1)); brush.stroke(); brush.setLineDash([]);
    brush.fillText("future", Math.min(x(key, size[0]) + 8, geometry.width - 44), (y(layer) + y(layer + 1)) / 2);
  }

  let playing = 0;
  function play() {
    clearTimeout(playing);
    if (!state.spread) return;
    const last = Math.max(state.row, sizes().length - 1 - state.row);
    if (few.matches) { state.shown = Infinity; refresh(); return; }
    state.shown = 0;
    const next = () => {
      drawMessages();
      const r = state.row - state.shown;
      $("said").textContent = `After ${state.shown} layers: ${number(state.spread.sizes[Math.max(0, r)])} nodes are heard.`;
      if (state.shown++ < last) playing = setTimeout(next, 450);
      else { playing = 0; state.shown = Infinity; say(); }
    };
    next();
  }

  function turn(isTurned = state.row !== 0) {
    $("turn").setAttribute("aria-pressed", String(isTurned));
    select(isTurned ? 0 : sizes().length - 1, state.node);
  }

  let pending = null;
  function messagesPointer(event) {
    const box = $("messages-canvas").getBoundingClientRect(), size = sizes();
    const row = event.shiftKey ? 0 : Math.max(0, Math.min(size.length - 1, Math.round((event.clientY - box.top - geometry.top) / geometry.gap)));
    const node = Math.floor((event.clientX - box.left - LEFT) * size[row] / Math.max(1, geometry.width - LEFT - RIGHT));
    if (pending === null) requestAnimationFrame(() => { const [r, i] = pending; pending = null; const start = performance.now(); select(r, i, true); page.times.push(performance.now() - start); });
    pending = [row, node];
  }

  function messagesKey(event) {
    const far = Math.max(1, Math.round(sizes()[state.row] / 16));
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0], PageUp: [0, -far], PageDown: [0, far], Home: [0, -1e12], End: [0, 1e12] };
    if (event.key in moves) { const [rows, nodes] = moves[event.key]; select(state.row + rows, state.node + nodes); }
    else if (event.key === " ") play();
    else if (event.key === "Shift") turn();
    else return;
    event.preventDefault();
  }

  // ------------------------------------------------------------------------------------------------------ weights

  /** The heaviest keys of a query, [[key, weight]], heads in the mean or one of them; null where none were recorded. */
  function weightsOf(row, node) {
    const found = data.recorded && data.recorded[row - 1];
    if (!found) return null;
    const decoded = answers.once(`weights ${row - 1}`, () => found.heads.map(head => ({ at: head.keys.map ? head.keys : Engine.unpack(head.keys), weights: atob(head.weights), rest: atob(head.rest) })));
    const chosen = state.head === null ? decoded : [decoded[found.numbers.indexOf(state.head)] || decoded[0]];
    const sum = new Map();
    for (const each of chosen) {
      for (let i = node * found.top; i < (node + 1) * found.top; i++) {
        const weight = each.weights.charCodeAt(i) / 255 / chosen.length;
        if (each.at[i] >= 0 && weight) sum.set(each.at[i], (sum.get(each.at[i]) || 0) + weight);
      }
    }
    return [...sum].sort((a, b) => b[1] - a[1]);
  }

  /** The weight of all keys of a query but the heaviest, heads as in `weightsOf`. */
  function restOf(row, node) {
    const { numbers, heads } = data.recorded[row - 1];
    const chosen = state.head === null ? heads : [heads[numbers.indexOf(state.head)] || heads[0]];
    return chosen.reduce((sum, head) => sum + atob(head.rest).charCodeAt(node) / 255 / chosen.length, 0);
  }

  // --------------------------------------------------------------------------------------------------------- mask

  const whole = () => ({ top: 0, bottom: data.n, left: 0, right: data.m });
  const EDGE = { left: 62, top: 38 };
  let maskPlace = null;

  function drawMask() {
    if (!data.n || !data.m || !graphAt(state.layer).parts.length) {
      $("mask-hint").textContent = data.n && data.m ? "Which edges there are is not found at once." : "There are no nodes.";
      return;
    }
    const view = state.window || (state.window = whole()), canvas = $("mask-canvas");
    const across = Math.min(room, 640) - EDGE.left - 8;
    const down = Math.max(60, Math.min(560, across * (view.bottom - view.top) / (view.right - view.left)));
    const scale = window.devicePixelRatio || 1, pixels = [Math.round(across * scale), Math.round(down * scale)];
    ask("mask", { graph: data.layers[state.layer], head: state.head, view, width: pixels[0], height: pixels[1] }, shares => {
      const { brush } = prepared(canvas, down + EDGE.top + 22);
      brush.putImageData(image(shares, ...pixels), Math.round(EDGE.left * scale), Math.round(EDGE.top * scale));
      maskPlace = { across, down, view };
      const cell = across / (view.right - view.left);
      brush.strokeStyle = colors.line; brush.lineWidth = 1;
      brush.strokeRect(EDGE.left - 0.5, EDGE.top - 0.5, across + 1, down + 1);
      if (cell >= 7) {
        brush.globalAlpha = 0.35; brush.beginPath();
        for (let k = Math.ceil(view.left); k < view.right; k++) { const at = EDGE.left + (k - view.left) * cell; brush.moveTo(at, EDGE.top); brush.lineTo(at, EDGE.top + down); }
        for (let q = Math.ceil(view.top); q < view.bottom; q++) { const at = EDGE.top + (q - view.top) * down / (view.bottom - view.top); brush.moveTo(EDGE.left, at); brush.lineTo(EDGE.left + across, at); }
        brush.stroke(); brush.globalAlpha = 1;
      }
      ticks(brush, view, across, down);
      const { query, key } = state.cell, tall = down / (view.bottom - view.top);
      if (query >= view.top - 1 && query < view.bottom && key >= view.left - 1 && key < view.right) {
        brush.strokeStyle = colors.leak; brush.lineWidth = 2;
        brush.strokeRect(EDGE.left + (key - view.left) * cell, EDGE.top + (query - view.top) * tall, Math.max(cell, 4), Math.max(tall, 4));
      }
      tellCell();
    });
  }

  function ticks(brush, view, across, down) {
    brush.fillStyle = colors.quiet; brush.textBaseline = "middle";
    brush.textAlign = "start"; brush.fillText("key →", EDGE.left, 8);
    brush.save(); brush.translate(7, EDGE.top + down / 2); brush.rotate(-Math.PI / 2); brush.textAlign = "center"; brush.fillText("← query", 0, 0); brush.restore();
    for (const [low, high, length, isKey] of [[view.left, view.right, across, true], [view.top, view.bottom, down, false]]) {
      const step = Math.max(1, niceStep((high - low) / Math.max(2, length / 90)));
      for (let i = Math.ceil(low / step) * step; i < high; i += step) {
        const at = (i + (high - low < 64 ? 0.5 : 0) - low) / (high - low) * length;
        brush.textAlign = isKey ? "center" : "right";
        const labels = isKey && data.key_labels ? data.key_labels : data.labels;
        const text = labels && high - low <= 40 && i in labels ? String(labels[i]).slice(0, 7) : number(i);
        brush.fillText(text, isKey ? Math.max(EDGE.left + 8, Math.min(EDGE.left + at, EDGE.left + across - 14)) : EDGE.left - 5, isKey ? EDGE.top - 10 : EDGE.top + Math.max(6, at));
      }
    }
    brush.textAlign = "start";
  }
  function niceStep(least) {
    const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
    return [1, 2, 5, 10].map(times => times * power).find(step => step >= least);
  }

  function tellCell() {
    const { query, key } = state.cell, part = data.parts[graphAt(state.layer).parts[0]];
    const of = named(groups().find(group => state.layer <= group.last));
    if (!part || !part.cells) {
      $("mask-hint").textContent = "So many edges are shown as the share of each cell's pairs that are edges.";
      return;
    }
    const about = { graph: data.layers[state.layer], head: state.head, query, key };
    ask("hears", about, isEdge => {
      const told = `${of[0].toUpperCase()}${of.slice(1)}: query ${labelOf(query)} ${isEdge ? "hears" : "does not hear"} key ${labelOf(key, true)}.`;
      if (state.view === "mask") $("said").textContent = told;
      $("mask-canvas").setAttribute("aria-label", `mask, queries down and keys across. ${told}`);
    });
    $("mask-hint").textContent = `Wheel, + and − zoom; drag or the arrow keys move.${isEditable() ? " Click, or Enter: add or remove the edge." : ""}`;
  }

  function zoom(factor, at = null) {
    const view = state.window || whole(), { query, key } = at || { query: (view.top + view.bottom) / 2, key: (view.left + view.right) / 2 };
    const part = (low, high, middle, most) => {
      const length = Math.max(Math.min(8, most), Math.min(most, (high - low) * factor)), share = (middle - low) / (high - low);
      const start = Math.max(0, Math.min(most - length, middle - share * length));
      return [start, start + length];
    };
    const [top, bottom] = part(view.top, view.bottom, query, data.n), [left, right] = part(view.left, view.right, key, data.m);
    state.window = { top, bottom, left, right };
    drawMask();
  }

  function moved(rows, columns) {
    const view = state.window, clamp = (low, high, by, most) => { const d = Math.max(-low, Math.min(most - high, by)); return [low + d, high + d]; };
    const [top, bottom] = clamp(view.top, view.bottom, rows, data.n), [left, right] = clamp(view.left, view.right, columns, data.m);
    state.window = { top, bottom, left, right };
  }

  function cellAt(event) {
    const box = $("mask-canvas").getBoundingClientRect(), { across, down, view } = maskPlace;
    const key = view.left + (event.clientX - box.left - EDGE.left) / across * (view.right - view.left);
    const query = view.top + (event.clientY - box.top - EDGE.top) / down * (view.bottom - view.top);
    if (key < view.left || key >= view.right || query < view.top || query >= view.bottom) return null;
    return { query, key };
  }

  let drag = null;
  function maskPointer(event) {
    if (!maskPlace) return;
    const at = cellAt(event);
    if (event.type === "pointerdown") { drag = { x: event.clientX, y: event.clientY, far: 0 }; event.target.setPointerCapture(event.pointerId); return; }
    if (event.type === "pointerup") {
      const wasClick = drag && drag.far < 4;
      drag = null;
      if (wasClick && at) toggle();
      return;
    }
    if (drag) {
      const { across, down, view } = maskPlace;
      drag.far += Math.abs(event.clientX - drag.x) + Math.abs(event.clientY - drag.y);
      if (drag.far >= 4) moved((drag.y - event.clientY) / down * (view.bottom - view.top), (drag.x - event.clientX) / across * (view.right - view.left));
      drag.x = event.clientX; drag.y = event.clientY;
    }
    if (at) state.cell = { query: Math.floor(at.query), key: Math.floor(at.key) };
    if (at || drag) requestOnce("mask", drawMask);
  }
  const requested = new Set();
  function requestOnce(name, draw) {
    if (requested.has(name)) return;
    requested.add(name);
    requestAnimationFrame(() => { requested.delete(name); draw(); });
  }

  function maskKey(event) {
    const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
    if (event.key in moves) {
      const [rows, columns] = moves[event.key], view = state.window;
      state.cell = { query: Math.max(0, Math.min(data.n - 1, state.cell.query + rows)), key: Math.max(0, Math.min(data.m - 1, state.cell.key + columns)) };
      const { query, key } = state.cell;
      moved(query < view.top ? query - view.top : query >= view.bottom ? query + 1 - view.bottom : 0, key < view.left ? key - view.left : key >= view.right ? key + 1 - view.right : 0);
      drawMask();
    } else if (event.key === "+" || event.key === "=") zoom(0.5, state.cell);
    else if (event.key === "-") zoom(2, state.cell);
    else if (event.key === "Enter") toggle();
    else return;
    event.preventDefault();
  }

  // -------------------------------------------------------------------------------------------------------- heads

  function drawHeads() {
    const graph = graphAt(state.layer), sheet = $("sheet"), recorded = data.recorded && data.recorded[state.layer];
    const heads = recorded ? recorded.numbers : graph.parts.map((_, head) => head);
    sheet.replaceChildren();
    overview();
    if (!recorded && graph.parts.length === 1) {
      sheet.append(make("p", { class: "hint" }, `All ${data.heads} heads have this graph: ${graph.text}`));
    }
    for (const head of heads.slice(0, 128)) {
      const canvas = make("canvas", { "aria-hidden": "true" }), own = graph.parts.length > 1 ? graph.parts[head] : graph.parts[0];
      const told = graph.parts.length > 1 ? `head ${head}${graph.edges ? `: ${number(graph.edges[head])} edges` : ""}` : recorded ? `head ${head}` : "all heads";
      sheet.append(make("button", { "aria-pressed": String(state.head === head), onclick: () => { state.head = state.head === head ? null : head; show(state.view); } }, make("div", {}, canvas), told));
      if (recorded) drawWeights(canvas, recorded, head);
      else if (own !== undefined) ask("mask", { graph: data.layers[state.layer], head: graph.parts.length > 1 ? head : null, view: whole(), width: 96, height: 96 }, shares => {
        canvas.width = canvas.height = 96;
        canvas.getContext("2d").putImageData(image(shares, 96, 96), 0, 0);
      }, `head ${head}`);
    }
    const chosen = state.head === null ? "all heads" : `head ${state.head}`;
    $("said").textContent = `Layer ${state.layer}, ${chosen}. Choosing a head shows it alone in the other views.`;
  }

  function drawWeights(canvas, recorded, head) {
    const at = recorded.numbers.indexOf(head), { top, heads } = recorded, keys = Engine.unpack(heads[at].keys), weights = atob(heads[at].weights);
    const size = 96, sums = new Float32Array(size * size);
    for (let i = 0; i < keys.length; i++) if (keys[i] >= 0) {
      const q = Math.floor(Math.floor(i / top) * size / data.n), k = Math.floor(keys[i] * size / data.m);
      sums[q * size + k] = Math.max(sums[q * size + k], weights.charCodeAt(i) / 255);
    }
    canvas.width = canvas.height = size;
    canvas.getContext("2d").putImageData(image(sums, size, size), 0, 0);
  }

  /** Entropy and distance of all heads that were recorded, to find those to look at. */
  function overview() {
    const place = $("overview");
    place.replaceChildren();
    if (!data.recorded) return;
    const rows = Object.entries(data.recorded).map(([layer, { numbers, heads }]) => make("tr", {}, make("th", { scope: "row" }, `layer ${layer}`), ...numbers.map((head, at) => {
      const { entropy, distance } = heads[at];
      const most = Math.max(1e-9, ...Object.values(data.recorded).flatMap(each => each.heads.map(one => one.entropy)));
      return make("td", {}, make("meter", { min: 0, max: most, value: entropy, "aria-hidden": "true" }), make("button", { "aria-label": `layer ${layer}, head ${head}: entropy ${entropy.toFixed(2)} bits, mean distance ${distance.toFixed(1)} nodes`,
        onclick: () => { state.layer = Number(layer); state.row = state.layer + 1; state.head = head; show("messages"); } }, `${entropy.toFixed(1)} · ${distance.toFixed(0)}`));
    })));
    place.append(make("p", { class: "hint" }, "Entropy in bits · mean distance in nodes, by layer and head; choose one to see its messages."), make("table", {}, make("tbody", {}, ...rows)));
  }

  // -------------------------------------------------------------------------------------------------------- facts

  function drawFacts() {
    const place = $("facts");
    place.replaceChildren(make("h2", {}, "Facts"));
    if (state.leaks.length) {
      const { layer, key, query } = state.leaks[0], before = Array(layer + 1).fill(key), after = Array(data.layers.length - layer).fill(query);
      const button = make("button", { id: "show-leak", "aria-pressed": "false", onclick: () => { button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true")); drawMessages(); } }, "Show the way");
      const isAlarm = state.leaks.length < data.layers.length;  // else none of the layers is meant to be causal
      place.append(make("div", { class: isAlarm ? "leak" : "note" }, make("strong", {}, isAlarm ? "⚠ The future is heard. " : "Later keys are heard. "),
        `In layer ${layer} query ${number(query)} hears the later key ${number(key)}; from input to output ${shortened([...before, ...after])}. `, button));
    }
    place.append(make("dl", {}, ...data.facts.flatMap(([name, told]) => [make("dt", {}, name), make("dd", {}, told)])));
    place.append(make("div", { id: "fields" }));
    if (data.text) place.append(make("h2", {}, "Plan"), make("pre", { tabindex: "0" }, data.text));
    const { backends, chosen, source } = graphAt(state.layer);
    if (backends) {
      place.append(make("h2", {}, `Expected time, ${named(groups().find(group => state.layer <= group.last))}`),
        make("table", {}, make("tbody", {}, ...backends.map(([name, told]) => make("tr", { class: chosen.includes(name) ? "chosen" : null }, make("th", { scope: "row" }, name + (chosen.includes(name) ? " ✓" : "")), make("td", {}, told))))),
        make("p", { class: "source" }, source));
    }
    fields();
  }
  const shortened = way => (way.length > 8 ? [...way.slice(0, 3), "…", ...way.slice(-3)] : way).map(node => (typeof node === "number" ? number(node) : node)).join(" → ");

  function fields() {
    const place = $("fields");
    if (!place || !state.spread) return;
    const { row, spread } = state, size = sizes();
    place.replaceChildren(make("h2", {}, `From node ${number(state.node)}, ${rowName(row)}`), make("table", {}, make("tbody", {}, ...spread.sizes.map((found, r) => make("tr", { class: r === row ? "chosen" : null },
      make("th", { scope: "row" }, rowName(r)), make("td", { class: "number" }, number(found)), make("td", { class: "number" }, `${(100 * found / Math.max(1, size[r])).toPrecision(3)}%`))))));
  }

  // ------------------------------------------------------------------------------------------------------- layers

  function drawLayers() {
    const place = $("layers");
    place.replaceChildren(make("h2", {}, "Connectivity"));
    if (isEditable()) place.append(sizeField(), make("p", { class: "error", role: "alert", id: "failed", hidden: true }));
    for (const group of groups()) {
      const { text } = data.graphs[group.graph], isChosen = group.first <= state.layer && state.layer <= group.last;
      const box = make("div", { class: isChosen ? "layer chosen" : "layer" });
      box.append(make("button", { "aria-pressed": String(isChosen), onclick: () => { state.layer = group.first; state.window = null; show(state.view); drawLayers(); drawFacts(); } }, named(group)));
      if (isEditable()) editable(box, group, text); else box.append(make("p", {}, make("code", {}, text)));
      place.append(box);
    }
    if (!live && !tour.length) place.append(make("p", { class: "hint" }, "A saved page shows what it was made of; python -m attngraph show edits it."));
  }

  /** An expression with integers that can be dragged, or changed by the arrow keys, and a field to write another. */
  function editable(box, group, text) {
    const line = make("p", { class: "text" });
    text.split(/(?<![\w.])(-?\d+)(?![\w.])/).forEach((part, at) => {
      if (at % 2 === 0) { line.append(part); return; }
      const before = text.split(/(?<![\w.])(-?\d+)(?![\w.])/).slice(0, at).join("");
      const replaced = value => before + value + text.slice(before.length + part.length);
      const change = value => edit(group, replaced(Math.max(0, value)), at);
      let from = null;
      const spin = make("span", { class: "integer", role: "spinbutton", tabindex: "0", "aria-valuenow": part, "aria-valuetext": part, "aria-label": `number ${(at + 1) / 2} of ${named(group)}`, "data-at": at,
        onkeydown: event => {
          const moves = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 16, PageDown: -16 };
          if (event.key in moves) { event.preventDefault(); change(Number(part) + moves[event.key]); }
        },
        onpointerdown: event => { from = event.clientX; isDragging = true; event.target.setPointerCapture(event.pointerId); },
        onpointermove: event => {
          if (from === null) return;
          const far = event.clientX - from, value = Math.max(0, Number(part) + Math.sign(far) * Math.round(Math.abs(far / 3) ** 1.25));
          spin.textContent = value; spin.setAttribute("aria-valuenow", value);
          edit(group, replaced(value), null);
        },
        onpointerup: () => { from = null; isDragging = false; change(Number(spin.textContent)); },
      }, part);
      line.append(spin);
    });
    const label = `expression of ${named(group)}`;
    const field = make("input", { type: "text", value: text, "aria-label": label, spellcheck: "false", oninput: () => edit(group, field.value, null, PATIENCE) });
    box.append(line, field, make("p", { class: "error", role: "alert", hidden: true, "data-first": group.first }));
  }

  function sizeField() {
    const field = make("input", { type: "number", min: "1", value: data.n, "aria-label": "nodes", onchange: () => send({ n: Number(field.value) }, null) });
    return make("p", { class: "row" }, "nodes", field);
  }

  // ---------------------------------------------------------------------------------------------------- the server

  const LONG = 1000;       // ms, after which a newer question no longer waits for the one under way
  let timer = 0, current = 0, since = 0, next = null, isDragging = false;

  function edit(group, text, focus, patience = 0) {
    clearTimeout(timer);
    const begun = performance.now();
    const change = () => {
      const texts = data.layers.map(graph => data.graphs[graph].text);
      for (let layer = group.first; layer <= group.last; layer++) texts[layer] = text;
      send({ texts }, group, focus, begun);
    };
    if (patience) timer = setTimeout(change, patience); else change();
  }

  function toggle() {
    const group = groups().find(each => state.layer <= each.last);
    if (isEditable()) send({ toggle: { ...state.cell, text: data.graphs[group.graph].text, first: group.first, last: group.last } }, group);
  }

  /** Ask for other graphs. While a question is under way, the last of those that follow waits, but not for long. */
  async function send(change, group = null, focus = null, begun = performance.now()) {
    if (current && performance.now() - since < LONG) {
      next = [change, group, focus, begun];
      setTimeout(() => { if (next && current) sendNext(true); }, LONG);
      return;
    }
    const own = current = ++count; since = performance.now();
    const place = () => (group && document.querySelector(`.error[data-first="${group.first}"]`)) || $("failed");
    try {
      const body = { texts: data.layers.map(graph => data.graphs[graph].text), n: data.n, heads: data.heads, head_dim: data.head_dim, ...change };
      const found = await post(body);
      if (own !== current) return;
      accept(found, focus);
      page.edits.push(performance.now() - begun);
    } catch (error) {
      if (own === current) { place().hidden = false; place().textContent = error.message; }
    } finally {
      if (own === current) { current = 0; sendNext(); }
    }
  }

  function sendNext(isLate = false) {
    if (!next) return;
    const waited = next;
    next = null;
    if (isLate) since = -Infinity;
    send(...waited);
  }

  async function post(body) {
    const reply = await fetch("/graphs", { method: "POST", headers: { "content-type": "application/json", "x-token": live }, body: JSON.stringify(body) });
    const found = await reply.json();
    if (!reply.ok) throw new Error(found.error);
    return found;
  }

  function accept(found, focus = null) {
    const field = document.activeElement, isWriting = field && field.matches && field.matches(".layer input") && focus === null;
    const label = field && field.getAttribute && field.getAttribute("aria-label"), cursor = isWriting ? field.selectionStart : 0, written = isWriting ? field.value : "";
    const isResized = !data || found.n !== data.n || found.m !== data.m;
    data = found;
    load();
    state.layer = Math.min(state.layer, data.layers.length - 1);
    if (isResized) { state.window = null; state.cell = { query: 0, key: 0 }; state.row = data.layers.length; state.node = Math.max(0, data.n - 1); }
    state.row = Math.min(state.row, data.layers.length);
    if (!graphAt(state.layer) || state.head >= data.heads) state.head = null;
    $("title").textContent = data.title;
    if (!isDragging) drawLayers();  // else its number would go from under the pointer
    drawFacts(); show(state.view);
    if (answers.isKnown) ask("leaks", {}, leaks => { state.leaks = leaks; if (leaks.length) drawFacts(); });
    const again = label && [...document.querySelectorAll("#layers [aria-label]")].find(each => each.getAttribute("aria-label") === label);
    if (again) { again.focus(); if (isWriting) { again.value = written; again.setSelectionRange(cursor, cursor); } }
  }

  // ------------------------------------------------------------------------------------------------------ the tour

  function visit(place) {
    step = Math.max(0, Math.min(tour.length - 1, place));
    const { title, text, data: own, focus, numbers } = tour[step];
    $("tour").hidden = false;
    $("tour-title").textContent = title;
    $("tour-text").replaceChildren(...text.split("\n\n").map(each => make("p", {}, each)));
    $("tour-place").textContent = `${step + 1} of ${tour.length}`;
    $("tour-back").disabled = step === 0; $("tour-on").disabled = step === tour.length - 1;
    Object.assign(state, { head: null, layer: 0, window: null, view: "messages", ...focus });
    data = null;
    accept(own);
    if (focus) { Object.assign(state, focus); show(state.view); }
    arithmetic(numbers);
  }

  /** One query and a few keys by their numbers, which can be changed: scores, weights, and the output. */
  function arithmetic(numbers) {
    const place = $("numbers");
    place.hidden = !numbers;
    if (!numbers) return;
    const { query, keys, values, shows } = numbers, fixed = value => value.toFixed(3);
    const body = make("tbody"), out = make("p", { role: "status" });
    const cells = (vector, name) => vector.map((value, i) => make("input", { type: "number", step: "0.1", value, "aria-label": `${name}, number ${i + 1}`, oninput: event => { vector[i] = Number(event.target.value) || 0; compute(); } }));
    const results = keys.map(() => [make("td", { class: "number" }), make("td", { class: "number" })]);
    keys.forEach((key, j) => body.append(make("tr", {}, make("th", { scope: "row" }, `node ${j}`), make("td", {}, ...cells(key, `key of node ${j}`)), make("td", {}, ...cells(values[j], `value of node ${j}`)), ...(shows.includes("score") ? [results[j][0]] : []), ...(shows.includes("weight") ? [results[j][1]] : []))));
    const heading = ["", "key", "value", ...(shows.includes("score") ? ["score q·k/√D"] : []), ...(shows.includes("weight") ? ["weight"] : [])];
    function compute() {
      const scores = keys.map(key => key.reduce((sum, each, i) => sum + each * query[i], 0) / Math.sqrt(query.length));
      const largest = Math.max(...scores), powers = scores.map(score => Math.exp(score - largest)), total = powers.reduce((a, b) => a + b, 0);
      scores.forEach((score, j) => { results[j][0].textContent = fixed(score); results[j][1].textContent = fixed(powers[j] / total); });
      const heard = values[0].map((_, i) => values.reduce((sum, value, j) => sum + value[i] * powers[j] / total, 0));
      out.textContent = shows.includes("weight") ? `What the node hears: Σ weight · value = (${heard.map(fixed).join(", ")})` : "";
    }
    place.replaceChildren(make("p", {}, "query of the node ", ...cells(query, "query")), make("table", {}, make("thead", {}, make("tr", {}, ...heading.map(each => make(each ? "th" : "td", each ? { scope: "col" } : {}, each)))), body), out);
    compute();
  }

  // --------------------------------------------------------------------------------------------------------- all of it

  function show(view) {
    state.view = view;
    for (const name of ["messages", "mask", "heads"]) {
      const tab = $(`tab-${name}`), isChosen = name === view;
      tab.setAttribute("aria-selected", String(isChosen)); tab.tabIndex = isChosen ? 0 : -1;
      $(name).hidden = !isChosen;
    }
    measure();
    ({ messages: refresh, mask: drawMask, heads: drawHeads })[view]();
  }

  function listen() {
    for (const name of ["messages", "mask", "heads"]) $(`tab-${name}`).addEventListener("click", () => show(name));
    document.querySelector("[role=tablist]").addEventListener("keydown", event => {
      const names = ["messages", "mask", "heads"], by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
      if (!by) return;
      show(names[(names.indexOf(state.view) + by + 3) % 3]);
      $(`tab-${state.view}`).focus();
    });
    const messages = $("messages-canvas"), mask = $("mask-canvas");
    messages.addEventListener("pointermove", messagesPointer);
    messages.addEventListener("pointerdown", messagesPointer);
    messages.addEventListener("keydown", messagesKey);
    for (const kind of ["pointermove", "pointerdown", "pointerup"]) mask.addEventListener(kind, maskPointer);
    mask.addEventListener("wheel", event => { event.preventDefault(); const at = maskPlace && cellAt(event); if (at) zoom(event.deltaY < 0 ? 0.8 : 1.25, at); }, { passive: false });
    mask.addEventListener("keydown", maskKey);
    $("play").addEventListener("click", play);
    $("turn").addEventListener("click", () => turn());
    $("closer").addEventListener("click", () => zoom(0.5, state.cell));
    $("farther").addEventListener("click", () => zoom(2, state.cell));
    $("whole").addEventListener("click", () => { state.window = null; drawMask(); });
    $("tour-back").addEventListener("click", () => visit(step - 1));
    $("tour-on").addEventListener("click", () => visit(step + 1));
    addEventListener("resize", () => show(state.view));
    matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => { readColors(); show(state.view); });
  }

  async function start() {
    readColors();
    listen();
    let found = JSON.parse($("data").textContent);
    if (found.live) {
      live = location.hash.slice(1);
      try { found = await post({}); } catch (error) { $("said").textContent = error.message; return; }
    }
    if (found.tour) { tour.push(...found.tour); visit(0); } else accept(found);
    requestAnimationFrame(() => requestAnimationFrame(() => { page.ready = performance.now(); }));
  }

  const page = { ready: 0, times: [], edits: [], state, select, show, get answers() { return answers; }, get data() { return data; } };
  window.page = page;
  start();
})();
