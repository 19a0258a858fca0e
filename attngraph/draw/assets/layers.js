"use strict";
// The expressions at the left, and the server that answers about others.

function drawLayers() {
  const place = $("layers");
  place.replaceChildren(make("h2", {}, "Connectivity"));
  if (isEditable()) place.append(sizeField(), make("p", { class: "error", role: "alert", id: "failed", hidden: true }));
  for (const group of groups()) {
    const { text } = data.graphs[group.graph],
      isChosen = group.first <= state.layer && state.layer <= group.last;
    const box = make("div", { class: isChosen ? "layer chosen" : "layer" });
    box.append(
      make(
        "button",
        {
          "aria-pressed": String(isChosen),
          onclick: () => {
            state.layer = group.first;
            state.window = null;
            show(state.view);
            drawLayers();
            drawFacts();
          },
        },
        named(group),
      ),
    );
    if (isEditable()) editable(box, group, text);
    else box.append(make("p", {}, make("code", {}, text)));
    place.append(box);
  }
  if (!live && !tour.length)
    place.append(
      make("p", { class: "hint" }, "A saved page shows what it was made of; python -m attngraph show edits it."),
    );
}

/** An expression with integers that can be dragged, or changed by the arrow keys, and a field to write another. */
function editable(box, group, text) {
  const line = make("p", { class: "text" });
  text.split(/(?<![\w.])(-?\d+)(?![\w.])/).forEach((part, at) => {
    if (at % 2 === 0) {
      line.append(part);
      return;
    }
    const before = text
      .split(/(?<![\w.])(-?\d+)(?![\w.])/)
      .slice(0, at)
      .join("");
    const replaced = value => before + value + text.slice(before.length + part.length);
    const change = value => {
      spin.textContent = value; // the next step is from here, whether it was answered or not
      spin.setAttribute("aria-valuenow", value);
      spin.setAttribute("aria-valuetext", value);
      edit(group, replaced(value), at);
    };
    let from = null;
    const spin = make(
      "span",
      {
        class: "integer",
        role: "spinbutton",
        tabindex: "0",
        "aria-valuenow": part,
        "aria-valuetext": part,
        "aria-label": `number ${(at + 1) / 2} of ${named(group)}`,
        onkeydown: event => {
          const moves = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 16, PageDown: -16 };
          if (event.key in moves) {
            event.preventDefault();
            change(Math.max(0, Number(spin.textContent) + moves[event.key]));
          }
        },
        onpointerdown: event => {
          from = event.clientX;
          isDragging = true;
          event.target.setPointerCapture(event.pointerId);
        },
        onpointermove: event => {
          if (from === null) return;
          const far = event.clientX - from;
          change(Math.max(0, Number(part) + Math.sign(far) * Math.round(Math.abs(far / 3) ** 1.25)));
        },
        onpointerup: () => {
          from = null;
          isDragging = false;
          if (!current) drawLayers();
        },
      },
      part,
    );
    line.append(spin);
  });
  const label = `expression of ${named(group)}`;
  const field = make("textarea", {
    rows: "2",
    "aria-label": label,
    spellcheck: "false",
    oninput: () => edit(group, field.value.replaceAll("\n", " "), null, PATIENCE),
  });
  field.value = text;
  box.append(line, field, make("p", { class: "error", role: "alert", hidden: true, "data-first": group.first }));
}

function sizeField() {
  const field = make("input", {
    type: "number",
    min: "1",
    value: data.n,
    "aria-label": "nodes",
    onchange: () => send({ n: Number(field.value), resize: true }, null),
  });
  return make("p", { class: "row" }, "nodes", field);
}

// ---------------------------------------------------------------------------------------------------- the server

const LONG = 1000; // ms, after which a newer question no longer waits for the one under way
const SLOW = 300; // ms, after which it is said that something is computed
let timer = 0,
  late = 0,
  current = 0,
  since = 0,
  next = null,
  isDragging = false;

function edit(group, text, focus, patience = 0) {
  clearTimeout(timer);
  const begun = performance.now();
  const change = () => {
    const texts = data.layers.map(graph => data.graphs[graph].text);
    for (let layer = group.first; layer <= group.last; layer++) texts[layer] = text;
    send({ texts }, group, focus, begun);
  };
  if (patience) timer = setTimeout(change, patience);
  else change();
}

function toggle() {
  const group = groups().find(each => state.layer <= each.last);
  if (isEditable() && isStack())
    send(
      { toggle: { ...state.cell, text: data.graphs[group.graph].text, first: group.first, last: group.last } },
      group,
    );
}

/** Ask for other graphs. While a question is under way, the last of those that follow waits, but not for long. */
async function send(change, group = null, focus = null, begun = performance.now()) {
  const waited = performance.now() - since;
  if (current && waited < LONG) {
    next = [change, group, focus, begun];
    clearTimeout(late);
    late = setTimeout(() => sendNext(true), LONG - waited);
    return;
  }
  const own = (current = ++count);
  since = performance.now();
  const slow = setTimeout(() => {
    $("said").textContent = "Computing …";
  }, SLOW);
  document.querySelector("main").setAttribute("aria-busy", "true");
  for (const told of document.querySelectorAll(".error")) told.hidden = true;
  const place = () => (group && document.querySelector(`.error[data-first="${group.first}"]`)) || $("failed");
  try {
    const body = {
      texts: data.layers.map(graph => data.graphs[graph].text),
      n: data.n,
      heads: data.heads,
      head_dim: data.head_dim,
      ...change,
    };
    const found = await post(body, () => own === current);
    if (own !== current) return;
    accept(found, focus);
    page.edits.push(performance.now() - begun);
  } catch (error) {
    if (own === current && place()) {
      place().hidden = false;
      place().textContent = error.message;
      if ($("said").textContent === "Computing …") $("said").textContent = "The picture is that of the graphs before.";
    }
  } finally {
    clearTimeout(slow);
    if (own === current) {
      current = 0;
      clearTimeout(late);
      document.querySelector("main").removeAttribute("aria-busy");
      sendNext();
    }
  }
}

function sendNext(isLate = false) {
  if (!next || (isLate && !current)) return;
  const waited = next;
  next = null;
  if (isLate) since = -Infinity;
  send(...waited);
}

/** The answer of the server; where another page asked meanwhile, it is asked again as long as this is wanted. */
async function post(body, isWanted = () => true) {
  const headers = { "content-type": "application/json", "x-token": live };
  let reply;
  try {
    do {
      reply = await fetch("/graphs", { method: "POST", headers, body: JSON.stringify(body) });
      if (reply.status === 409) await new Promise(done => setTimeout(done, 50 + 200 * Math.random()));
    } while (reply.status === 409 && isWanted());
  } catch {
    throw new Error("the server has ended: python -m attngraph show starts another");
  }
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

function accept(found, focus = null) {
  const field = document.activeElement,
    isWriting = field && field.matches && field.matches(".layer textarea") && focus === null;
  const label = field && field.getAttribute && field.getAttribute("aria-label"),
    cursor = isWriting ? field.selectionStart : 0,
    written = isWriting ? field.value : "";
  const isResized = !data || found.n !== data.n || found.m !== data.m;
  data = found;
  if (tour.length && tour[step].own) tour[step].data = found; // what a person made is there when they come back
  state.spread = null;
  load();
  state.layer = Math.min(state.layer, data.layers.length - 1);
  if (isResized) {
    state.window = null;
    state.cell = { query: 0, key: 0 };
    state.row = data.layers.length;
    state.node = Math.max(0, data.n - 1);
  }
  state.row = Math.min(state.row, data.layers.length);
  const recorded = data.recorded && data.recorded[state.layer];
  if (state.head >= data.heads) state.head = null;
  if (recorded && !recorded.numbers.includes(state.head)) state.head = recorded.numbers[0];
  $("title").textContent = data.title;
  if (!isDragging && !next) drawLayers(); // else a number would go from under the pointer, or the keys
  drawFacts();
  show(state.view);
  if (answers.isKnown)
    ask("leaks", {}, leaks => {
      state.leaks = leaks;
      if (leaks.length) drawFacts();
    });
  const again =
    label &&
    [...document.querySelectorAll("#layers [aria-label]")].find(each => each.getAttribute("aria-label") === label);
  if (again) {
    again.focus();
    if (isWriting) {
      again.value = written;
      again.setSelectionRange(cursor, cursor);
    }
  }
}
