// Measures of a token, and how each is shown: a class for the colour, and a mark beneath the token that says the same
// without colour. Sequential measures have the classes s0..s4, others c0..c5.

import { make } from "./dom.js";

export const mainOf = (trace) => Object.keys(trace.members)[0];

const top = (candidates) => candidates?.[0]?.token;

// What each member added to the fused probability: its weight times the probability that it gave to the token.
export function parts(trace) {
  return Object.keys(trace.members).map((member) => ({
    member,
    weight: trace.weights[member] ?? 0,
    given: trace.given[member] ?? null,
    part: (trace.weights[member] ?? 0) * (trace.given[member] ?? 0),
  }));
}

export function carrier(trace) {
  return parts(trace).reduce((best, each) => (each.part > best.part ? each : best)).member;
}

export function verdict(trace) {
  const main = mainOf(trace);
  const others = Object.values(trace.agreed);
  if (others.length === 0) return trace.consulted && !trace.draft ? "single" : "alone";
  const own = top(trace.members[main]) === trace.token;
  if (own) return others.every(Boolean) ? "all" : "main";
  return others.some(Boolean) ? "overruled" : "nobody";
}

function fate(trace) {
  const draft = trace.draft;
  if (!draft) return 0;
  if (!draft.kept) return 1;
  if (draft.certified) return 3;
  return draft.needed ? 4 : 2;
}

const binned = (edges) => (value) => edges.filter((edge) => value >= edge).length;
const probability = binned([0.1, 0.3, 0.6, 0.9]);
const entropy = binned([0.25, 0.75, 1.5, 2.5]);
const unmapped = binned([0.001, 0.01, 0.05, 0.2]);
const verdicts = ["all", "overruled", "main", "nobody", "alone"];

export const MEASURES = {
  agreement: {
    title: "agreement",
    kind: "c",
    labels: ["all agree", "main is overruled", "main has its way", "nobody's first choice", "main alone"],
    of: (trace) => verdicts.indexOf(verdict(trace)),
  },
  carried: {
    title: "who carried it",
    kind: "c",
    labels: (members) => members,
    of: (trace, members) => members.indexOf(carrier(trace)),
  },
  prob: {
    title: "probability",
    kind: "s",
    labels: ["under 10 %", "10 to 30 %", "30 to 60 %", "60 to 90 %", "over 90 %"],
    of: (trace) => probability(trace.prob),
  },
  entropy: {
    title: "entropy",
    kind: "s",
    labels: ["under 0.25 nats", "to 0.75", "to 1.5", "to 2.5", "over 2.5"],
    of: (trace) => entropy(trace.entropy),
  },
  unmapped: {
    title: "unmapped mass",
    kind: "s",
    labels: ["under 0.1 %", "to 1 %", "to 5 %", "to 20 %", "over 20 %"],
    of: (trace) => unmapped(Math.max(0, ...Object.values(trace.unmapped))),
  },
  draft: {
    title: "draft",
    kind: "c",
    labels: ["not drafted", "draft replaced", "draft agreed on", "draft certified", "draft fused and kept"],
    of: fate,
  },
  none: { title: "nothing", kind: "", labels: [], of: () => 0 },
};

export function classOf(measure, trace, members) {
  const { kind, of } = MEASURES[measure];
  const rank = kind && trace ? of(trace, members) : -1;
  return rank < 0 ? "tok" : `tok ${kind}${rank % 6}`;
}

export function labelsOf(measure, members) {
  const { labels } = MEASURES[measure];
  return typeof labels === "function" ? labels(members) : labels;
}

export function legend(list, measure, members, compared = false) {
  const { kind } = MEASURES[measure];
  const entries = labelsOf(measure, members).map((label, rank) =>
    make("li", {}, make("span", { class: `tok ${kind}${rank % 6}`, "aria-hidden": "true", text: "abc" }), label));
  if (compared) entries.push(make("li", {}, make("span", { class: "tok differs", "aria-hidden": "true", text: "abc" }), "not in the ensemble's text"));
  list.replaceChildren(...entries);
}

// A shape beside a member's name, so that its colour is not the only sign.
const SHAPES = ["●", "■", "▲", "◆", "✚", "★"];

export function badge(member, members) {
  const rank = Math.max(members.indexOf(member), 0) % 6;
  return make("span", { class: `badge m${rank}` }, make("span", { "aria-hidden": "true", text: SHAPES[rank] }), ` ${member}`);
}

export const rankOf = (member, members) => Math.max(members.indexOf(member), 0) % 6;
