// The turns of a conversation: who speaks, and what.

import { make, newId } from "./dom.js";
import { change, state } from "./state.js";

const ROLES = ["system", "user", "assistant"];

export function drawTurns(box) {
  box.replaceChildren(...state.turns.map((turn, rank) => {
    const id = newId("turn");
    const put = (part) => change({ turns: state.turns.map((each, other) => (other === rank ? { ...each, ...part } : each)) });
    const role = make("select", { "aria-label": `role of turn ${rank + 1}`, on: { change: (event) => put({ role: event.target.value }) } },
      ...ROLES.map((each) => make("option", { value: each, text: each, selected: each === turn.role })));
    const content = make("textarea", { id, rows: 2, spellcheck: "false", "aria-label": `turn ${rank + 1}`, on: { input: (event) => put({ content: event.target.value }) } });
    content.value = turn.content;
    const away = make("button", { type: "button", class: "quiet", "aria-label": `remove turn ${rank + 1}`, text: "✕", disabled: state.turns.length < 2,
      on: { click: () => { change({ turns: state.turns.filter((_, other) => other !== rank) }); drawTurns(box); } } });
    return make("div", { class: "turn" }, role, away, content);
  }));
}

export function addTurn(box, content = "") {
  const last = state.turns.at(-1);
  change({ turns: [...state.turns, { role: last?.role === "user" ? "assistant" : "user", content }] });
  drawTurns(box);
  box.lastElementChild?.querySelector("textarea")?.focus();
}
