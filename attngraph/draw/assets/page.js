"use strict";
// The page: it begins here, when all its parts are there.

function show(view) {
  state.view = view;
  for (const name of ["messages", "mask", "heads"]) {
    const tab = $(`tab-${name}`),
      isChosen = name === view;
    tab.setAttribute("aria-selected", String(isChosen));
    tab.tabIndex = isChosen ? 0 : -1;
    $(name).hidden = !isChosen;
  }
  measure();
  ({ messages: refresh, mask: drawMask, heads: drawHeads })[view]();
}

function listen() {
  for (const name of ["messages", "mask", "heads"]) $(`tab-${name}`).addEventListener("click", () => show(name));
  document.querySelector("[role=tablist]").addEventListener("keydown", event => {
    const names = ["messages", "mask", "heads"],
      by = { ArrowRight: 1, ArrowLeft: -1 }[event.key];
    if (!by) return;
    show(names[(names.indexOf(state.view) + by + 3) % 3]);
    $(`tab-${state.view}`).focus();
  });
  const messages = $("messages-canvas"),
    mask = $("mask-canvas");
  messages.addEventListener("pointermove", messagesPointer);
  messages.addEventListener("pointerdown", messagesPointer);
  messages.addEventListener("keydown", messagesKey);
  messages.addEventListener("keyup", messagesKeyUp);
  for (const kind of ["pointermove", "pointerdown", "pointerup"]) mask.addEventListener(kind, maskPointer);
  mask.addEventListener(
    "wheel",
    event => {
      event.preventDefault();
      const at = maskPlace && cellAt(event);
      if (at) zoom(event.deltaY < 0 ? 0.8 : 1.25, at);
    },
    { passive: false },
  );
  mask.addEventListener("keydown", maskKey);
  $("play").addEventListener("click", play);
  $("turn").addEventListener("click", () => turn());
  $("closer").addEventListener("click", () => zoom(0.5, state.cell));
  $("farther").addEventListener("click", () => zoom(2, state.cell));
  $("whole").addEventListener("click", () => {
    state.window = null;
    drawMask();
  });
  $("tour-back").addEventListener("click", () => visit(step - 1));
  $("tour-on").addEventListener("click", () => visit(step + 1));
  addEventListener("resize", () => show(state.view));
  matchMedia("(prefers-color-scheme: dark)").addEventListener("change", () => {
    readColors();
    show(state.view);
  });
}

async function start() {
  readColors();
  listen();
  let found = JSON.parse($("data").textContent);
  if (found.live) {
    live = location.hash.slice(1);
    try {
      found = await post({});
    } catch (error) {
      $("said").textContent = error.message;
      return;
    }
  }
  if (found.tour) {
    tour.push(...found.tour);
    visit(0);
  } else accept(found);
  requestAnimationFrame(() =>
    requestAnimationFrame(() => {
      page.ready = performance.now();
    }),
  );
}

const page = {
  ready: 0,
  times: [],
  edits: [],
  state,
  select,
  show,
  get answers() {
    return answers;
  },
  get data() {
    return data;
  },
};
window.page = page;
start();
