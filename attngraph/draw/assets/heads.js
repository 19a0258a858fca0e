"use strict";
// Heads: recorded weights, and a small picture of each head.

/** The heaviest keys of a query in the chosen head, [[key, weight]]; null where none were recorded. */
function weightsOf(row, node) {
  const found = data.recorded && data.recorded[row - 1];
  if (!found) return null;
  const decoded = answers.once(`weights ${row - 1}`, () =>
    found.heads.map(head => ({
      at: Engine.unpack(head.keys),
      weights: atob(head.weights),
    })),
  );
  const { at, weights } = decoded[found.numbers.indexOf(state.head)] || decoded[0],
    heavy = [];
  for (let i = node * found.top; i < (node + 1) * found.top; i++) {
    if (at[i] >= 0) heavy.push([at[i], weights.charCodeAt(i) / 255]);
  }
  return heavy;
}

/** The weight of all keys of a query but the heaviest, in the same head. */
function restOf(row, node) {
  const { numbers, heads } = data.recorded[row - 1];
  return atob((heads[numbers.indexOf(state.head)] || heads[0]).rest).charCodeAt(node) / 255;
}

// ------------------------------------------------------------------------------------------------------ pictures

function drawHeads() {
  const graph = graphAt(state.layer),
    sheet = $("sheet"),
    recorded = data.recorded && data.recorded[state.layer];
  const heads = recorded ? recorded.numbers : graph.parts.map((_, head) => head);
  sheet.replaceChildren();
  overview();
  if (!recorded && graph.parts.length === 1) {
    sheet.append(make("p", { class: "hint" }, `All ${data.heads} heads have this graph: ${graph.text}`));
  }
  for (const head of heads.slice(0, 128)) {
    const canvas = make("canvas", { "aria-hidden": "true" }),
      own = graph.parts.length > 1 ? graph.parts[head] : graph.parts[0];
    const told =
      graph.parts.length > 1
        ? `head ${head}${graph.edges ? `: ${number(graph.edges[head])} edges` : ""}`
        : recorded
          ? `head ${head}`
          : "all heads";
    sheet.append(
      make(
        "button",
        {
          "aria-pressed": String(state.head === head),
          onclick: () => {
            state.head = state.head === head && !recorded ? null : head;
            show(state.view);
          },
        },
        make("div", {}, canvas),
        told,
      ),
    );
    if (recorded) drawWeights(canvas, recorded, head);
    else if (own !== undefined)
      ask(
        "mask",
        {
          graph: data.layers[state.layer],
          head: graph.parts.length > 1 ? head : null,
          view: whole(),
          width: 96,
          height: 96,
        },
        shares => {
          canvas.width = canvas.height = 96;
          canvas.getContext("2d").putImageData(image(shares, 96, 96), 0, 0);
        },
        `head ${head}`,
      );
  }
  const chosen = state.head === null ? "all heads" : `head ${state.head}`;
  $("said").textContent = `Layer ${state.layer}, ${chosen}. Choosing a head shows it alone in the other views.`;
}

function drawWeights(canvas, recorded, head) {
  const at = recorded.numbers.indexOf(head),
    { top, heads } = recorded,
    keys = Engine.unpack(heads[at].keys),
    weights = atob(heads[at].weights);
  const size = 96,
    sums = new Float32Array(size * size);
  for (let i = 0; i < keys.length; i++)
    if (keys[i] >= 0) {
      const q = Math.floor((Math.floor(i / top) * size) / data.n),
        k = Math.floor((keys[i] * size) / data.m);
      sums[q * size + k] = Math.max(sums[q * size + k], weights.charCodeAt(i) / 255);
    }
  const most = sums.reduce((one, other) => Math.max(one, other), 1e-9); // each picture goes to its own most
  canvas.width = canvas.height = size;
  canvas.getContext("2d").putImageData(
    image(
      sums.map(each => each / most),
      size,
      size,
    ),
    0,
    0,
  );
}

/** Entropy and distance of all heads that were recorded, to find those to look at. */
function overview() {
  const place = $("overview");
  place.replaceChildren();
  if (!data.recorded) return;
  const rows = Object.entries(data.recorded).map(([layer, { numbers, heads }]) =>
    make(
      "tr",
      {},
      make("th", { scope: "row" }, `layer ${layer}`),
      ...numbers.map((head, at) => {
        const { entropy, distance } = heads[at];
        const most = Math.max(
          1e-9,
          ...Object.values(data.recorded).flatMap(each => each.heads.map(one => one.entropy)),
        );
        return make(
          "td",
          {},
          make("meter", { min: 0, max: most, value: entropy, "aria-hidden": "true" }),
          make(
            "button",
            {
              "aria-label": `layer ${layer}, head ${head}: entropy ${entropy.toFixed(2)} bits, mean distance ${distance.toFixed(1)} nodes`,
              onclick: () => {
                state.layer = Number(layer);
                state.row = state.layer + 1;
                state.head = head;
                show("messages");
              },
            },
            `${entropy.toFixed(1)} bits · ${distance.toFixed(0)}`,
          ),
        );
      }),
    ),
  );
  place.append(
    make(
      "p",
      { class: "hint" },
      "Entropy in bits · mean distance in nodes, by layer and head; choose one to see its messages.",
    ),
    make("table", {}, make("tbody", {}, ...rows)),
  );
}
