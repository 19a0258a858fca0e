"use strict";
// The facts at the right: leaks, costs, and how many nodes are reached.

function drawFacts() {
  const place = $("facts");
  place.replaceChildren(make("h2", {}, "Facts"));
  if (state.leaks.length) {
    const { layer, key, query } = state.leaks[0],
      before = Array(layer + 1).fill(key),
      after = Array(data.layers.length - layer).fill(query);
    const button = make(
      "button",
      {
        id: "show-leak",
        "aria-pressed": "false",
        onclick: () => {
          button.setAttribute("aria-pressed", String(button.getAttribute("aria-pressed") !== "true"));
          drawMessages();
        },
      },
      "Show the way",
    );
    const isAlarm = state.leaks.length < data.layers.length; // else none of the layers is meant to be causal
    place.append(
      make(
        "div",
        { class: isAlarm ? "leak" : "note" },
        make("strong", {}, isAlarm ? "⚠ The future is heard. " : "Later keys are heard. "),
        `In layer ${layer} query ${number(query)} hears the later key ${number(key)}; from input to output ${shortened([...before, ...after])}. `,
        button,
      ),
    );
  }
  place.append(make("dl", {}, ...data.facts.flatMap(([name, told]) => [make("dt", {}, name), make("dd", {}, told)])));
  place.append(make("div", { id: "fields" }));
  if (data.text) place.append(make("h2", {}, "Plan"), make("pre", { tabindex: "0" }, data.text));
  const { backends, chosen, source } = graphAt(state.layer);
  if (backends) {
    place.append(
      make("h2", {}, `Expected time, ${named(groups().find(group => state.layer <= group.last))}`),
      backendTable(
        backends.filter(([, , can]) => can),
        chosen,
      ),
      make(
        "details",
        {},
        make("summary", {}, "What else was asked, and why it is not taken"),
        backendTable(
          backends.filter(([, , can]) => !can),
          chosen,
        ),
      ),
      make("p", { class: "source" }, source),
    );
  }
  fields();
}
function backendTable(backends, chosen) {
  const rows = backends.map(([name, told]) => {
    const isChosen = chosen.includes(name);
    const heading = make("th", { scope: "row" }, name + (isChosen ? " ✓" : ""));
    return make("tr", { class: isChosen ? "chosen" : null }, heading, make("td", {}, told));
  });
  return make("table", {}, make("tbody", {}, ...rows));
}

const shortened = way =>
  (way.length > 8 ? [...way.slice(0, 3), "…", ...way.slice(-3)] : way)
    .map(node => (typeof node === "number" ? number(node) : node))
    .join(" → ");

function fields() {
  const place = $("fields");
  if (!place || !state.spread) return;
  const { row, spread } = state,
    size = sizes();
  place.replaceChildren(
    make("h2", {}, `From node ${number(state.node)}, ${rowName(row)}`),
    make(
      "table",
      {},
      make(
        "tbody",
        {},
        ...spread.sizes.map((found, r) =>
          make(
            "tr",
            { class: r === row ? "chosen" : null },
            make("th", { scope: "row" }, rowName(r)),
            make("td", { class: "number" }, number(found)),
            make("td", { class: "number" }, `${((100 * found) / Math.max(1, size[r])).toPrecision(3)}%`),
          ),
        ),
      ),
    ),
  );
}
