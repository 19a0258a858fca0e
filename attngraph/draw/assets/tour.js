"use strict";
// The tour, and the arithmetic of one node by its numbers.

function visit(place) {
  step = Math.max(0, Math.min(tour.length - 1, place));
  const { title, text, data: own, focus, numbers } = tour[step];
  $("tour").hidden = false;
  $("tour-title").textContent = title;
  $("tour-text").replaceChildren(...text.split("\n\n").map(each => make("p", {}, each)));
  $("tour-place").textContent = `${step + 1} of ${tour.length}`;
  $("tour-back").disabled = step === 0;
  $("tour-on").disabled = step === tour.length - 1;
  Object.assign(state, { head: null, layer: 0, window: null, view: "messages", ...focus });
  data = null;
  accept(own);
  $("title").textContent = "attngraph: a tour";
  if (focus) {
    Object.assign(state, focus);
    show(state.view);
  }
  arithmetic(numbers);
}

/** One query and a few keys by their numbers, which can be changed: scores, weights, and the output. */
function arithmetic(numbers) {
  const place = $("numbers");
  place.hidden = !numbers;
  if (!numbers) return;
  const { query, keys, values, shows } = numbers,
    fixed = value => value.toFixed(3);
  const body = make("tbody"),
    out = make("p", { role: "status" });
  const cells = (vector, name) =>
    vector.map((value, i) =>
      make("input", {
        type: "number",
        step: "0.1",
        value,
        "aria-label": `${name}, number ${i + 1}`,
        oninput: event => {
          vector[i] = Number(event.target.value) || 0;
          compute();
        },
      }),
    );
  const results = keys.map(() => [make("td", { class: "number" }), make("td", { class: "number" })]);
  keys.forEach((key, j) =>
    body.append(
      make(
        "tr",
        {},
        make("th", { scope: "row" }, `node ${j}`),
        make("td", {}, ...cells(key, `key of node ${j}`)),
        make("td", {}, ...cells(values[j], `value of node ${j}`)),
        ...(shows.includes("score") ? [results[j][0]] : []),
        ...(shows.includes("weight") ? [results[j][1]] : []),
      ),
    ),
  );
  const heading = [
    "",
    "key",
    "value",
    ...(shows.includes("score") ? ["score q·k/√D"] : []),
    ...(shows.includes("weight") ? ["weight"] : []),
  ];
  function compute() {
    const scores = keys.map(key => key.reduce((sum, each, i) => sum + each * query[i], 0) / Math.sqrt(query.length));
    const largest = Math.max(...scores),
      powers = scores.map(score => Math.exp(score - largest)),
      total = powers.reduce((a, b) => a + b, 0);
    scores.forEach((score, j) => {
      results[j][0].textContent = fixed(score);
      results[j][1].textContent = fixed(powers[j] / total);
    });
    const heard = values[0].map((_, i) => values.reduce((sum, value, j) => sum + (value[i] * powers[j]) / total, 0));
    out.textContent = shows.includes("weight")
      ? `What the node hears: Σ weight · value = (${heard.map(fixed).join(", ")})`
      : "";
  }
  place.replaceChildren(
    make("p", {}, "query of the node ", ...cells(query, "query")),
    make(
      "table",
      {},
      make(
        "thead",
        {},
        make("tr", {}, ...heading.map(each => make(each ? "th" : "td", each ? { scope: "col" } : {}, each))),
      ),
      body,
    ),
    out,
  );
  compute();
}
