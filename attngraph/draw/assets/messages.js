"use strict";
// Messages: rows of nodes, before and after each layer; whom a chosen node hears, and who hears it.

const LEFT = 58,
  RIGHT = 56;
const geometry = { top: 30, gap: 30, width: 0 };
const x = (node, size) => LEFT + ((node + 0.5) * (geometry.width - LEFT - RIGHT)) / Math.max(size, 1);
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
  const { row, node, head } = state,
    canvas = $("messages-canvas");
  canvas.setAttribute("aria-valuemax", Math.max(0, sizes()[row] - 1));
  canvas.setAttribute("aria-valuenow", node);
  if (!answers.isKnown || !(data.n && data.m)) {
    state.spread = null;
    drawMessages();
    $("said").textContent = unknown();
    return;
  }
  const across = Math.max(1, Math.round((room - LEFT - RIGHT) * (window.devicePixelRatio || 1)));
  ask("spread", { row, node, head, across }, answer => {
    state.spread = answer;
    drawMessages();
    if (playing) return;
    if (!isQuiet) say();
    else if (!telling)
      telling = setTimeout(() => {
        telling = 0;
        say();
      }, QUIET);
  });
}

/** Why nothing is known of the edges. */
function unknown() {
  if (!data.n || !data.m) return "There are no nodes.";
  if (data.graphs.some(graph => graph.chosen_by_data))
    return "Queries and keys choose these edges: record a model to see them.";
  if (data.graphs.every(graph => graph.parts.length))
    return "Too many edges to follow one by one: Mask shows their shares.";
  return "Which edges there are is not found at once: draw.page(graph) looks.";
}

const shareOf = weight => (weight && weight < 0.01 ? "below 0.01" : weight.toFixed(2));
const counted = (count, name) => `${number(count)} ${name}${count === 1 ? "" : "s"}`;

let telling = 0;
function say() {
  const { row, node, spread } = state,
    size = sizes();
  if (!spread) return;
  const told = [`Node ${labelOf(node, row === 0)}, ${rowName(row)}`];
  if (row > 0)
    told.push(
      `hears ${counted(spread.degree, "key")} directly, and through all layers above it ${number(spread.sizes[0])} of ${counted(size[0], isStack() ? "input" : "key")}`,
    );
  if (row < size.length - 1)
    told.push(
      `is heard by ${number(spread.sizes[size.length - 1])} of ${counted(data.n, isStack() ? "output" : "query").replace("querys", "queries")}`,
    );
  if (row > 0 && Math.max(...size) > Engine.CIRCLES && !weightsOf(row, node) && spread.degree > LINES)
    told.push(`${number(LINES)} of its messages are drawn, evenly chosen`);
  const heavy = weightsOf(row, node);
  if (heavy)
    told.push(
      `most from ${heavy
        .slice(0, 3)
        .map(([key, weight]) => `${labelOf(key, true)} ${shareOf(weight)}`)
        .join(", ")}; head ${state.head}, keys that are not drawn ${shareOf(restOf(row, node))}`,
    );
  $("said").textContent = `${told.join("; ")}.`;
  $("messages-canvas").setAttribute("aria-valuetext", told.join("; "));
  fields();
}

function drawMessages() {
  const size = sizes(),
    rows = size.length;
  geometry.gap = rows > 64 ? Math.max(3, 1500 / rows) : rows > 14 ? 24 : rows > 8 ? 34 : rows > 3 ? 62 : 150;
  geometry.width = room;
  const isTurned = areLong(size),
    below = isTurned ? 92 : 34;
  geometry.top = isTurned ? 92 : 30;
  const canvas = $("messages-canvas"),
    { brush, width } = prepared(canvas, geometry.top + (rows - 1) * geometry.gap + below);
  const named = Math.ceil(14 / geometry.gap); // each so many rows have room for a name
  brush.textBaseline = "middle";
  const { spread, row, node } = state;
  for (let r = 0; r < rows; r++) {
    if (r % named && r !== row && r !== rows - 1) continue;
    brush.fillStyle = r === row ? colors.text : colors.quiet;
    brush.fillText(rowName(r), 4, y(r));
    if (spread && Math.abs(r - row) <= state.shown) {
      brush.textAlign = "right";
      brush.fillText(number(spread.sizes[r]), width - 4, y(r));
      brush.textAlign = "start";
    }
  }
  if (!spread) {
    brush.fillStyle = colors.quiet;
    brush.fillText(unknown(), LEFT, y(0) + 20);
    drawImage();
    return;
  }
  drawImage();
  const isShown = r => Math.abs(r - row) <= state.shown;
  if (Math.max(...size) <= Engine.CIRCLES) drawCircles(brush, size, isShown);
  else drawBars(brush, size, isShown);
  drawLeak(brush, size);
  if (Math.max(...size) > Engine.CIRCLES) {
    brush.fillStyle = colors.text;
    brush.beginPath();
    brush.arc(x(node, size[row]), y(row), 4, 0, 7);
    brush.fill();
    nameEnds(brush, size);
  }
}

/** Whether names of nodes, which are drawn one by one, are too long to stand side by side. */
function areLong(size) {
  const names = [...(data.labels || []), ...(data.key_labels || [])],
    length = Math.max(...size);
  if (length > Engine.CIRCLES) return false;
  const space = (geometry.width - LEFT - RIGHT) / Math.max(1, length);
  return names.some(name => 7 * String(name).length > space);
}

/** Of many nodes, the names of the chosen one and of the keys that it hears most. */
function nameEnds(brush, size) {
  const { row, node } = state,
    heavy = weightsOf(row, node),
    ends = [[node, row, y(row) + 16]];
  if (!data.labels || row === 0) return;
  if (heavy) for (const [key] of heavy.slice(0, 4)) ends.push([key, row - 1, y(row - 1) - 14]);
  brush.textAlign = "center";
  const taken = [];
  for (const [index, r, height] of ends) {
    const names = (r === 0 && data.key_labels) || data.labels,
      text = String(names[index]).slice(0, 16),
      half = brush.measureText(text).width / 2 + 3,
      at = Math.max(LEFT + half, Math.min(x(index, size[r]), geometry.width - RIGHT - half));
    if (taken.some(other => other.r === r && Math.abs(other.at - at) < other.half + half)) continue;
    taken.push({ r, at, half });
    brush.fillText(text, at, height);
  }
  brush.textAlign = "start";
}

function drawBars(brush, size, isShown) {
  const { spread, row, node } = state,
    scale = window.devicePixelRatio || 1,
    across = spread.shares[0].length;
  const tall = Math.max(
    1,
    Math.round((geometry.gap > 22 ? Math.min(14, geometry.gap - 8) : 0.7 * geometry.gap) * scale),
  );
  const stripe = Math.round(2 * scale);
  size.forEach((_, r) => {
    const isBelow = r > row,
      shown = isShown(r),
      line = new ImageData(across, tall),
      shares = spread.shares[r];
    const words = new Uint32Array(line.data.buffer),
      color = isBelow ? colors.heard : colors.hears;
    const plain = levels(color, 1),
      hatched = isBelow ? levels(color, 0.55) : plain; // not by colour alone
    for (let p = 0; p < across; p++) {
      const level = shown && shares[p] ? Math.ceil(shares[p] * 255) : 0;
      for (let q = 0; q < tall; q++)
        words[q * across + p] = isBelow && level && (p + q) % (3 * stripe) < stripe ? hatched[level] : plain[level];
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
    brush.beginPath();
    brush.moveTo(x(key, size[row - 1]), y(row - 1) + 8);
    brush.lineTo(x(node, size[row]), y(row) - 8);
    brush.stroke();
  }
  brush.globalAlpha = 1;
}

function drawCircles(brush, size, isShown) {
  const { spread, row, node, head } = state,
    layers = answers.stack(head);
  const radius = Math.max(3, Math.min(10, (geometry.width - LEFT - RIGHT) / Math.max(...size) / 3));
  layers.forEach((graph, l) => {
    const above = y(l) + radius,
      below = y(l + 1) - radius,
      others = new Path2D(),
      heard = new Path2D();
    const places = Array.from({ length: size[l] }, (_, key) => x(key, size[l])),
      isDrawn = isShown(l) && isShown(l + 1);
    const isSparse = Engine.edges(graph) <= MANY_LINES,
      color = l < row ? colors.hears : colors.heard;
    brush.setLineDash(l >= row ? [5, 3] : []);
    for (let q = 0; q < graph.n; q++) {
      const heavy = weightsOf(l + 1, q),
        at = x(q, size[l + 1]),
        hearsSome = isDrawn && spread.fields[l + 1][q];
      if (heavy)
        for (const [key, weight] of heavy) {
          const inField = hearsSome && spread.fields[l][key];
          brush.strokeStyle = inField ? color : colors.faint;
          brush.globalAlpha = inField ? 0.2 + 0.8 * weight : 0.5;
          brush.lineWidth = 0.5 + 5 * weight;
          brush.beginPath();
          brush.moveTo(places[key], above);
          brush.lineTo(at, below);
          brush.stroke();
        }
      else if (hearsSome || isSparse)
        Engine.eachKey(graph, q, key => {
          const inField = hearsSome && spread.fields[l][key];
          if (!inField && !isSparse) return;
          const path = inField ? heard : others;
          path.moveTo(places[key], above);
          path.lineTo(at, below);
        });
    }
    brush.globalAlpha = 0.7;
    brush.lineWidth = 0.7;
    brush.strokeStyle = colors.faint;
    brush.stroke(others);
    brush.globalAlpha = 0.8;
    brush.lineWidth = isSparse ? 1.4 : 0.8;
    brush.strokeStyle = color;
    brush.stroke(heard);
  });
  brush.setLineDash([]);
  brush.globalAlpha = 1;
  size.forEach((length, r) => {
    for (let i = 0; i < length; i++) {
      const inField = spread.fields[r][i] && isShown(r),
        isChosen = r === row && i === node;
      brush.beginPath();
      brush.arc(x(i, length), y(r), isChosen ? radius + 2 : radius, 0, 7);
      brush.fillStyle = isChosen ? colors.text : inField ? (r <= row ? colors.hears : colors.heard) : colors.ground;
      brush.strokeStyle = inField ? (r <= row ? colors.hears : colors.heard) : colors.line;
      brush.lineWidth = 1.2;
      brush.fill();
      brush.stroke();
      const label =
        r === size.length - 1
          ? data.labels && data.labels[i]
          : r === 0
            ? (data.key_labels || data.labels || [])[i]
            : null;
      const isEnd = r === 0 || r === size.length - 1,
        isTurned = areLong(size);
      if (isEnd && (length <= 32 || i % 8 === 0 || isTurned)) {
        brush.fillStyle = colors.quiet;
        const space = ((geometry.width - LEFT - RIGHT) / length) * (length <= 32 ? 1 : 8),
          text = String(label ?? i).slice(0, isTurned ? 12 : Math.max(1, Math.floor(space / 7))),
          height = r === 0 ? y(r) - radius - 8 : y(r) + radius + 10;
        brush.save();
        brush.translate(x(i, length), height);
        if (isTurned) brush.rotate(-Math.PI / 2);
        brush.textAlign = !isTurned ? "center" : r === 0 ? "start" : "end";
        brush.fillText(text, 0, 0);
        brush.restore();
      }
    }
  });
}

/** The image of which nodes are patches: the darker a patch is veiled, the less the chosen node hears it. */
function drawImage() {
  const canvas = $("image"),
    { image, spread, row, node } = { image: data.image, ...state };
  canvas.hidden = !image;
  if (!image || !spread) return;
  const { width, height, rgb: raw, rows, columns, before } = image,
    bytes = atob(raw),
    times = Math.max(1, Math.round(280 / width));
  canvas.width = width * times;
  canvas.height = height * times;
  const brush = canvas.getContext("2d"),
    picture = new ImageData(canvas.width, canvas.height);
  const heavy = row > 0 && weightsOf(row, node),
    weights = new Map(heavy || (row > 0 ? spread.keys.map(key => [key, 1]) : []));
  const largest = Math.max(1e-9, ...[...weights].filter(([key]) => key >= before).map(([, weight]) => weight));
  for (let y = 0; y < canvas.height; y++)
    for (let x = 0; x < canvas.width; x++) {
      const patch =
        before + Math.floor((y * rows) / canvas.height) * columns + Math.floor((x * columns) / canvas.width);
      const share = row > 0 ? 0.15 + (0.85 * (weights.get(patch) || 0)) / largest : 1,
        at = 4 * (y * canvas.width + x);
      const from = 3 * (Math.floor(y / times) * width + Math.floor(x / times));
      for (let c = 0; c < 3; c++) picture.data[at + c] = bytes.charCodeAt(from + c) * share;
      picture.data[at + 3] = 255;
    }
  brush.putImageData(picture, 0, 0);
  if (node < before) return;
  const across = canvas.width / columns,
    down = canvas.height / rows;
  brush.strokeStyle = colors.leak;
  brush.lineWidth = 3;
  brush.strokeRect(((node - before) % columns) * across, Math.floor((node - before) / columns) * down, across, down);
}

/** The first way by which the future is heard: dashed, and named. */
function drawLeak(brush, size) {
  const found = state.leaks[0];
  if (!found || !$("show-leak") || $("show-leak").getAttribute("aria-pressed") !== "true") return;
  const { layer, key, query } = found;
  brush.strokeStyle = colors.leak;
  brush.fillStyle = colors.leak;
  brush.lineWidth = 2.5;
  brush.setLineDash([7, 4]);
  brush.beginPath();
  brush.moveTo(x(key, size[0]), y(0));
  brush.lineTo(x(key, size[layer]), y(layer));
  brush.lineTo(x(query, size[layer + 1]), y(layer + 1));
  brush.lineTo(x(query, size[size.length - 1]), y(size.length - 1));
  brush.stroke();
  brush.setLineDash([]);
  brush.fillText("future", Math.min(x(key, size[0]) + 8, geometry.width - 44), (y(layer) + y(layer + 1)) / 2);
}

let playing = 0;
function play() {
  clearTimeout(playing);
  if (!state.spread) return;
  const last = Math.max(state.row, sizes().length - 1 - state.row);
  if (few.matches) {
    state.shown = Infinity;
    refresh();
    return;
  }
  state.shown = 0;
  const next = () => {
    drawMessages();
    const { row, shown, spread } = state,
      told = [];
    if (row > 0) told.push(`${counted(spread.sizes[Math.max(0, row - shown)], "node")} heard`);
    if (row < spread.sizes.length - 1)
      told.push(`heard by ${counted(spread.sizes[Math.min(spread.sizes.length - 1, row + shown)], "node")}`);
    $("said").textContent = `After ${counted(shown, "layer")}: ${told.join(", ")}.`;
    if (state.shown++ < last) playing = setTimeout(next, 450);
    else {
      playing = 0;
      state.shown = Infinity;
      say();
    }
  };
  next();
}

function turn(isTurned = state.row !== 0) {
  $("turn").setAttribute("aria-pressed", String(isTurned));
  select(isTurned ? 0 : sizes().length - 1, state.node);
}

let pending = null;
function messagesPointer(event) {
  const box = $("messages-canvas").getBoundingClientRect(),
    size = sizes();
  const row = event.shiftKey
    ? 0
    : Math.max(0, Math.min(size.length - 1, Math.round((event.clientY - box.top - geometry.top) / geometry.gap)));
  const node = Math.floor(((event.clientX - box.left - LEFT) * size[row]) / Math.max(1, geometry.width - LEFT - RIGHT));
  if (pending === null)
    requestAnimationFrame(() => {
      const [r, i] = pending;
      pending = null;
      const start = performance.now();
      select(r, i, true);
      page.times.push(performance.now() - start);
    });
  pending = [row, node];
}

function messagesKey(event) {
  const far = Math.max(1, Math.round(sizes()[state.row] / 16));
  const moves = {
    ArrowLeft: [0, -1],
    ArrowRight: [0, 1],
    ArrowUp: [-1, 0],
    ArrowDown: [1, 0],
    PageUp: [0, -far],
    PageDown: [0, far],
    Home: [0, -1e12],
    End: [0, 1e12],
  };
  if (event.key in moves) {
    const [rows, nodes] = moves[event.key];
    select(state.row + rows, state.node + nodes);
  } else if (event.key === " ") play();
  else {
    isShiftAlone = event.key === "Shift";
    return;
  }
  isShiftAlone = false;
  event.preventDefault();
}

let isShiftAlone = false; // it turns when it is let go, and nothing was pressed with it
function messagesKeyUp(event) {
  if (event.key === "Shift" && isShiftAlone) turn();
  isShiftAlone = false;
}
