// A council as a tree: its calls by node and round, and its votes, scores, rounds or responses.

import { make, percent } from "./dom.js";

export function councilTree(report, usage, servedBy) {
  const box = make("details", { open: true }, make("summary", {}, make("h4", { text: "Council" }), servedBy ? make("span", { class: "hint", text: `answered by ${servedBy}` }) : null));
  for (const [name, notes] of Object.entries(report ?? {})) box.append(told(name, notes));
  if (usage?.calls) box.append(make("h5", { text: "Calls" }), calls(usage.calls));
  return box;
}

function told(name, notes) {
  const part = make("div", { class: "council-part" }, make("h5", {}, name, make("small", { text: notes.kind ?? "" })));
  if (notes.votes) part.append(votes(notes.votes, notes.winner));
  if (notes.scores) part.append(shares(notes.scores, "Scores"));
  if (notes.selected && Object.keys(notes.selected).length) part.append(shares(notes.selected, "Shares"));
  if (notes.weights) part.append(shares(notes.weights, "Weights of the answers"));
  if (notes.rounds) part.append(...notes.rounds.map(round));
  if (notes.responses) part.append(responses(notes.responses, notes.order));
  return part;
}

function votes(found, winner) {
  const all = Object.values(found).reduce((sum, voters) => sum + voters.length, 0) || 1;
  const lines = Object.entries(found).map(([answer, voters]) => make("li", { class: answer === winner ? "is-chosen" : "" },
    make("span", { class: "vote", text: answer }), meter(voters.length / all), make("span", { class: "num", text: `${voters.length} of ${all}: ${voters.join(", ")}` })));
  return make("ul", { class: "votes", "aria-label": "Votes" }, ...lines);
}

function shares(found, title) {
  const numbers = Object.entries(found).filter(([, value]) => typeof value === "number");
  const low = Math.min(0, ...numbers.map(([, value]) => value));
  const span = Math.max(...numbers.map(([, value]) => value)) - low || 1;
  const lines = numbers.map(([name, value]) => make("li", {}, make("span", { class: "vote", text: name }), meter((value - low) / span), make("span", { class: "num", text: value.toFixed(3) })));
  return make("ul", { class: "votes", "aria-label": title }, ...lines);
}

function meter(share) {
  return make("span", { class: "bar fused", vars: { "--share": share }, "aria-hidden": "true" });
}

function round(opinions, rank) {
  const lines = opinions.map((opinion) => make("li", {}, ...Object.entries(opinion).map(([name, value]) =>
    make("span", { class: "said" }, make("b", { text: name }), ` ${typeof value === "number" && name === "confidence" ? percent(value) : value}`))));
  return make("details", {}, make("summary", { text: rank === 0 ? "First answers" : `Round ${rank}` }), make("ul", { class: "opinions" }, ...lines));
}

function responses(found, order) {
  const names = order ?? Object.keys(found);
  return make("ol", { class: "opinions" }, ...names.map((node) => make("li", {}, make("b", { text: node }), make("p", { class: "response", text: found[node] ?? "writes the answer" }))));
}

// Nodes within councils are named outer/inner: a tree of lists.
function calls(found) {
  const root = { inner: new Map(), calls: [] };
  for (const call of found) {
    let place = root;
    for (const part of call.node.split("/")) {
      if (!place.inner.has(part)) place.inner.set(part, { inner: new Map(), calls: [] });
      place = place.inner.get(part);
    }
    place.calls.push(call);
  }
  return branch(root);
}

function branch(place) {
  return make("ul", { class: "tree" }, ...[...place.inner].map(([name, below]) => make("li", {}, make("b", { text: name }),
    ...below.calls.map((call) => make("div", { class: "call" }, `${call.model} · round ${call.round}, sample ${call.sample} · ${call.completion_tokens} tokens in ${call.seconds.toFixed(2)} s · ${call.outcome}`)),
    below.inner.size ? branch(below) : null)));
}
