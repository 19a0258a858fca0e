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
    const change = value => edit(group, replaced(Math.max(0, value)), at);
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
        "data-at": at,
        onkeydown: event => {
          const moves = { ArrowUp: 1, ArrowRight: 1, ArrowDown: -1, ArrowLeft: -1, PageUp: 16, PageDown: -16 };
          if (event.key in moves) {
            event.preventDefault();
            change(Number(part) + moves[event.key]);
          }
        },
        onpointerdown: event => {
          from = event.clientX;
          isDragging = true;
          event.target.setPointerCapture(event.pointerId);
        },
        onpointermove: event => {
          if (from === null) return;
          const far = event.clientX - from,
            value = Math.max(0, Number(part) + Math.sign(far) * Math.round(Math.abs(far / 3) ** 1.25));
          spin.textContent = value;
          spin.setAttribute("aria-valuenow", value);
          edit(group, replaced(value), null);
        },
        onpointerup: () => {
          from = null;
          isDragging = false;
          change(Number(spin.textContent));
        },
      },
      part,
    );
    line.append(spin);
  });
  const label = `expression of ${named(group)}`;
  const field = make("input", {
    type: "text",
    value: text,
    "aria-label": label,
    spellcheck: "false",
    oninput: () => edit(group, field.value, null, PATIENCE),
  });
  box.append(line, field, make("p", { class: "error", role: "alert", hidden: true, "data-first": group.first }));
}

function sizeField() {
  const field = make("input", {
    type: "number",
    min: "1",
    value: data.n,
    "aria-label": "nodes",
    onchange: () => send({ n: Number(field.value) }, null),
  });
  return make("p", { class: "row" }, "nodes", field);
}

// ---------------------------------------------------------------------------------------------------- the server

const LONG = 1000; // ms, after which a newer question no longer waits for the one under way
let timer = 0,
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
  if (isEditable())
    send(
      { toggle: { ...state.cell, text: data.graphs[group.graph].text, first: group.first, last: group.last } },
      group,
    );
}

/** Ask for other graphs. While a question is under way, the last of those that follow waits, but not for long. */
async function send(change, group = null, focus = null, begun = performance.now()) {
  if (current && performance.now() - since < LONG) {
    next = [change, group, focus, begun];
    setTimeout(() => {
      if (next && current) sendNext(true);
    }, LONG);
    return;
  }
  const own = (current = ++count);
  since = performance.now();
  const place = () => (group && document.querySelector(`.error[data-first="${group.first}"]`)) || $("failed");
  try {
    const body = {
      texts: data.layers.map(graph => data.graphs[graph].text),
      n: data.n,
      heads: data.heads,
      head_dim: data.head_dim,
      ...change,
    };
    const found = await post(body);
    if (own !== current) return;
    accept(found, focus);
    page.edits.push(performance.now() - begun);
  } catch (error) {
    if (own === current) {
      place().hidden = false;
      place().textContent = error.message;
    }
  } finally {
    if (own === current) {
      current = 0;
      sendNext();
    }
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
  const reply = await fetch("/graphs", {
    method: "POST",
    headers: { "content-type": "application/json", "x-token": live },
    body: JSON.stringify(body),
  });
  const found = await reply.json();
  if (!reply.ok) throw new Error(found.error);
  return found;
}

function accept(found, focus = null) {
  const field = document.activeElement,
    isWriting = field && field.matches && field.matches(".layer input") && focus === null;
  const label = field && field.getAttribute && field.getAttribute("aria-label"),
    cursor = isWriting ? field.selectionStart : 0,
    written = isWriting ? field.value : "";
  const isResized = !data || found.n !== data.n || found.m !== data.m;
  data = found;
  load();
  state.layer = Math.min(state.layer, data.layers.length - 1);
  if (isResized) {
    state.window = null;
    state.cell = { query: 0, key: 0 };
    state.row = data.layers.length;
    state.node = Math.max(0, data.n - 1);
  }
  state.row = Math.min(state.row, data.layers.length);
  if (!graphAt(state.layer) || state.head >= data.heads) state.head = null;
  $("title").textContent = data.title;
  if (!isDragging) drawLayers(); // else its number would go from under the pointer
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
