// What was asked before, in this browser's storage: states and the beginnings of texts, never a key.

import { make } from "./dom.js";
import { checked } from "./state.js";

const NAME = "unisono.playground.history";
const MOST = 30;

function read() {
  try {
    const found = JSON.parse(localStorage.getItem(NAME) ?? "[]");
    return Array.isArray(found) ? found : [];
  } catch {
    return [];
  }
}

function write(entries) {
  try {
    localStorage.setItem(NAME, JSON.stringify(entries));
  } catch {
    // A browser without storage, or a full one: the history is then empty.
  }
}

export function remember(state, text) {
  const asked = JSON.stringify(state);
  const others = read().filter((entry) => JSON.stringify(entry.state) !== asked);
  write([{ when: Date.now(), state, text: text.slice(0, 200) }, ...others].slice(0, MOST));
}

export function forget() {
  write([]);
}

export function drawHistory(list, restore) {
  const entries = read();
  list.replaceChildren(...entries.map((entry) => {
    const state = checked(entry.state);
    if (!state) return "";
    const asked = state.form === "chat" ? state.turns.findLast((turn) => turn.role === "user")?.content ?? "" : state.prompt;
    const when = new Date(entry.when).toLocaleString([], { dateStyle: "short", timeStyle: "short" });
    return make("li", {}, make("button", { type: "button", on: { click: () => restore(state) } },
      make("span", { class: "asked", text: asked.slice(0, 120) }), make("span", { class: "answered", text: String(entry.text ?? "") }), make("small", { text: `${state.model} · ${when}` })));
  }));
  if (!entries.length) list.replaceChildren(make("li", { class: "hint", text: "Nothing yet." }));
}
