"use strict";
// Mask: the queries and keys of a layer, to zoom and to move in.

const whole = () => ({ top: 0, bottom: data.n, left: 0, right: data.m });
const EDGE = { left: 62, top: 38 };
let maskPlace = null;

function drawMask() {
  if (!data.n || !data.m || !graphAt(state.layer).parts.length) {
    prepared($("mask-canvas"), 60);
    maskPlace = null;
    $("mask-hint").textContent = "";
    $("said").textContent = unknown();
    return;
  }
  const view = state.window || (state.window = whole()),
    canvas = $("mask-canvas");
  const across = Math.min(room, 640) - EDGE.left - 8;
  const down = Math.max(60, Math.min(560, (across * (view.bottom - view.top)) / (view.right - view.left)));
  const scale = window.devicePixelRatio || 1,
    pixels = [Math.round(across * scale), Math.round(down * scale)];
  ask(
    "mask",
    { graph: data.layers[state.layer], head: state.head, view, width: pixels[0], height: pixels[1] },
    shares => {
      const { brush } = prepared(canvas, down + EDGE.top + 22);
      brush.putImageData(image(shares, ...pixels), Math.round(EDGE.left * scale), Math.round(EDGE.top * scale));
      maskPlace = { across, down, view };
      const cell = across / (view.right - view.left);
      brush.strokeStyle = colors.line;
      brush.lineWidth = 1;
      brush.strokeRect(EDGE.left - 0.5, EDGE.top - 0.5, across + 1, down + 1);
      if (cell >= 7) {
        brush.globalAlpha = 0.35;
        brush.beginPath();
        for (let k = Math.ceil(view.left); k < view.right; k++) {
          const at = EDGE.left + (k - view.left) * cell;
          brush.moveTo(at, EDGE.top);
          brush.lineTo(at, EDGE.top + down);
        }
        for (let q = Math.ceil(view.top); q < view.bottom; q++) {
          const at = EDGE.top + ((q - view.top) * down) / (view.bottom - view.top);
          brush.moveTo(EDGE.left, at);
          brush.lineTo(EDGE.left + across, at);
        }
        brush.stroke();
        brush.globalAlpha = 1;
      }
      ticks(brush, view, across, down);
      const { query, key } = state.cell,
        tall = down / (view.bottom - view.top);
      if (query >= view.top - 1 && query < view.bottom && key >= view.left - 1 && key < view.right) {
        brush.strokeStyle = colors.leak;
        brush.lineWidth = 2;
        brush.strokeRect(
          EDGE.left + (key - view.left) * cell,
          EDGE.top + (query - view.top) * tall,
          Math.max(cell, 4),
          Math.max(tall, 4),
        );
      }
      tellCell();
    },
  );
}

function ticks(brush, view, across, down) {
  brush.fillStyle = colors.quiet;
  brush.textBaseline = "middle";
  brush.textAlign = "start";
  brush.fillText("key →", EDGE.left, 8);
  brush.save();
  brush.translate(7, EDGE.top + down / 2);
  brush.rotate(-Math.PI / 2);
  brush.textAlign = "center";
  brush.fillText("← query", 0, 0);
  brush.restore();
  for (const [low, high, length, isKey] of [
    [view.left, view.right, across, true],
    [view.top, view.bottom, down, false],
  ]) {
    const step = Math.max(1, niceStep((high - low) / Math.max(2, length / 90)));
    for (let i = Math.ceil(low / step) * step; i < high; i += step) {
      const at = ((i + (high - low < 64 ? 0.5 : 0) - low) / (high - low)) * length;
      brush.textAlign = isKey ? "center" : "right";
      const labels = isKey && data.key_labels ? data.key_labels : data.labels;
      const text = labels && high - low <= 40 && i in labels ? String(labels[i]).slice(0, 7) : number(i);
      brush.fillText(
        text,
        isKey ? Math.max(EDGE.left + 8, Math.min(EDGE.left + at, EDGE.left + across - 14)) : EDGE.left - 5,
        isKey ? EDGE.top - 10 : EDGE.top + Math.max(6, at),
      );
    }
  }
  brush.textAlign = "start";
}
function niceStep(least) {
  const power = 10 ** Math.floor(Math.log10(Math.max(least, 1)));
  return [1, 2, 5, 10].map(times => times * power).find(step => step >= least);
}

function tellCell() {
  const { query, key } = state.cell,
    part = data.parts[graphAt(state.layer).parts[0]];
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
  const edits = state.head === null ? "add or remove the edge" : "add or remove the edge of all heads";
  const how = isEditable() && isStack() ? ` Click, or Enter: ${edits}.` : "";
  $("mask-hint").textContent = `Wheel, + and − zoom; drag or the arrow keys move.${how}`;
}

function zoom(factor, at = null) {
  const view = state.window || whole(),
    { query, key } = at || { query: (view.top + view.bottom) / 2, key: (view.left + view.right) / 2 };
  const part = (low, high, middle, most) => {
    const length = Math.max(Math.min(8, most), Math.min(most, (high - low) * factor)),
      share = (middle - low) / (high - low);
    const start = Math.max(0, Math.min(most - length, middle - share * length));
    return [start, start + length];
  };
  const [top, bottom] = part(view.top, view.bottom, query, data.n),
    [left, right] = part(view.left, view.right, key, data.m);
  state.window = { top, bottom, left, right };
  drawMask();
}

function moved(rows, columns) {
  const view = state.window,
    clamp = (low, high, by, most) => {
      const d = Math.max(-low, Math.min(most - high, by));
      return [low + d, high + d];
    };
  const [top, bottom] = clamp(view.top, view.bottom, rows, data.n),
    [left, right] = clamp(view.left, view.right, columns, data.m);
  state.window = { top, bottom, left, right };
}

function cellAt(event) {
  const box = $("mask-canvas").getBoundingClientRect(),
    { across, down, view } = maskPlace;
  const key = view.left + ((event.clientX - box.left - EDGE.left) / across) * (view.right - view.left);
  const query = view.top + ((event.clientY - box.top - EDGE.top) / down) * (view.bottom - view.top);
  if (key < view.left || key >= view.right || query < view.top || query >= view.bottom) return null;
  return { query, key };
}

let drag = null;
function maskPointer(event) {
  if (!maskPlace) return;
  const at = cellAt(event);
  if (event.type === "pointerdown") {
    drag = { x: event.clientX, y: event.clientY, far: 0 };
    event.target.setPointerCapture(event.pointerId);
    return;
  }
  if (event.type === "pointerup") {
    const wasClick = drag && drag.far < 4;
    drag = null;
    if (wasClick && at) toggle();
    return;
  }
  if (drag) {
    const { across, down, view } = maskPlace;
    drag.far += Math.abs(event.clientX - drag.x) + Math.abs(event.clientY - drag.y);
    if (drag.far >= 4)
      moved(
        ((drag.y - event.clientY) / down) * (view.bottom - view.top),
        ((drag.x - event.clientX) / across) * (view.right - view.left),
      );
    drag.x = event.clientX;
    drag.y = event.clientY;
  }
  if (at) state.cell = { query: Math.floor(at.query), key: Math.floor(at.key) };
  if (at || drag) requestOnce("mask", drawMask);
}
const requested = new Set();
function requestOnce(name, draw) {
  if (requested.has(name)) return;
  requested.add(name);
  requestAnimationFrame(() => {
    requested.delete(name);
    draw();
  });
}

function maskKey(event) {
  const moves = { ArrowLeft: [0, -1], ArrowRight: [0, 1], ArrowUp: [-1, 0], ArrowDown: [1, 0] };
  if (event.key in moves) {
    const [rows, columns] = moves[event.key],
      view = state.window;
    state.cell = {
      query: Math.max(0, Math.min(data.n - 1, state.cell.query + rows)),
      key: Math.max(0, Math.min(data.m - 1, state.cell.key + columns)),
    };
    const { query, key } = state.cell;
    moved(
      query < view.top ? query - view.top : query >= view.bottom ? query + 1 - view.bottom : 0,
      key < view.left ? key - view.left : key >= view.right ? key + 1 - view.right : 0,
    );
    drawMask();
  } else if (event.key === "+" || event.key === "=") zoom(0.5, state.cell);
  else if (event.key === "-") zoom(2, state.cell);
  else if (event.key === "Enter") toggle();
  else return;
  event.preventDefault();
}
