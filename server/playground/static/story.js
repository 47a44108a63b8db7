// The story of one token: what each member wanted, what the ensemble chose, and why.

import { badge, carrier, mainOf, parts, rankOf, verdict } from "./colours.js";
import { make, percent, visible } from "./dom.js";

const MOST_ROWS = 8;
const REASONS = {
  all: "All members put it first.",
  main: "Main put it first; others wanted something else.",
  overruled: "Main was overruled.",
  nobody: "It was no member's first choice, but the likeliest of all together.",
  alone: "Main decided alone: nobody else was asked here.",
  single: "One model alone: its own choice.",
};

export function nothing(box) {
  const keys = make("p", { class: "hint" }, "Hover or tap a token, or walk with ", make("kbd", { text: "←" }), " ", make("kbd", { text: "→" }), ".");
  box.replaceChildren(make("p", { text: "Each token keeps its story: what every member wanted, and why this one was chosen." }), keys);
}

export function tell(box, record, index, total, members) {
  const trace = record.trace;
  const head = make("p", { class: "story-head" }, make("span", { class: "story-token", text: visible(trace?.token ?? record.text) }),
    make("span", { class: "hint", text: `token ${index + 1} of ${total}` }));
  if (!trace) {
    box.replaceChildren(head, make("p", { class: "hint", text: "A council settled this text; its members' tokens were not traced." }));
    return;
  }
  const told = [head, make("p", { class: "story-why", text: sentence(trace) }), table(trace, members), contributions(trace, members), facts(trace)];
  box.replaceChildren(...told.filter(Boolean));
}

// One sentence, said to screen readers, too.
export function sentence(trace) {
  const main = mainOf(trace);
  const wanted = trace.members[main]?.[0]?.token;
  const drawn = trace.token !== trace.fused[0]?.token;
  const found = verdict(trace);
  const first = found === "all" && !trace.consulted ? "All members put it first, so nothing was fused." : REASONS[found];
  const instead = wanted !== undefined && wanted !== trace.token ? ` ${main} wanted ${visible(wanted)}.` : "";
  if (drawn && found === "nobody") return `Sampling drew it: nobody put it first.${instead}`;
  return `${first}${instead}${drawn ? " Sampling drew it; it was not the likeliest." : ""}`;
}

export function said(record, index, total) {
  const trace = record.trace;
  if (!trace) return `${record.text}, ${index + 1} of ${total}`;
  return `${visible(trace.token)}, ${percent(trace.prob)}. ${sentence(trace)}`;
}

function rows(trace) {
  const found = new Map();
  const put = (column, list) => {
    for (const { token, prob } of list) {
      if (!found.has(token)) found.set(token, {});
      found.get(token)[column] ??= prob;
    }
  };
  put("", trace.fused);
  for (const [member, list] of Object.entries(trace.members)) put(member, list);
  const own = found.get(trace.token) ?? {};
  own[""] = trace.prob;
  for (const [member, given] of Object.entries(trace.given)) if (given !== null) own[member] = given;
  found.set(trace.token, own);
  const weight = ([token, shares]) => (token === trace.token ? 2 : 0) + (shares[""] ?? 0) + Math.max(...Object.values(shares)) / 100;
  return [...found].sort((a, b) => weight(b) - weight(a)).slice(0, MOST_ROWS);
}

function table(trace, members) {
  const own = Object.keys(trace.members);
  const titles = [make("th", { scope: "col", text: "Token" }), make("th", { scope: "col", text: "Fused" }),
    ...own.map((member) => make("th", { scope: "col" }, badge(member, members)))];
  const lines = rows(trace).map(([token, shares]) => {
    const chosen = token === trace.token;
    const name = make("th", { scope: "row", title: token }, make("span", { class: "cand", text: visible(token) }), chosen ? make("span", { class: "sr", text: " (chosen)" }) : null);
    const cells = ["", ...own].map((column) => bar(shares[column], column === "" ? "fused" : `m${rankOf(column, members)}`));
    return make("tr", { class: chosen ? "is-chosen" : "" }, name, ...cells);
  });
  const caption = make("caption", { class: "sr", text: "Candidates of the ensemble and of each member" });
  return make("div", { class: "scroll-x", tabindex: "0", role: "region", "aria-label": "Candidates" },
    make("table", { class: "bars" }, caption, make("thead", {}, make("tr", {}, ...titles)), make("tbody", {}, ...lines)));
}

function bar(share, kind) {
  if (share === undefined) return make("td", { class: "none", text: "·" });
  return make("td", {}, make("span", { class: `bar ${kind}`, vars: { "--share": share }, "aria-hidden": "true" }), make("span", { class: "num", text: percent(share) }));
}

// Weight times probability of each member: who carried the token.
function contributions(trace, members) {
  const found = parts(trace);
  if (found.length < 2 || !trace.consulted) return null;
  const total = found.reduce((sum, each) => sum + each.part, 0) || 1;
  const strip = make("div", { class: "strip", "aria-hidden": "true" },
    ...found.map((each) => make("span", { class: `m${rankOf(each.member, members)}`, vars: { "--part": each.part / total } })));
  const lines = found.map((each) => make("li", {}, badge(each.member, members),
    make("span", { class: "num", text: `${each.weight.toFixed(2)} × ${each.given === null ? "no such token" : percent(each.given)}` })));
  return make("div", { class: "carried" }, make("h3", { text: `${carrier(trace)} carried it` }), strip, make("ul", {}, ...lines));
}

function facts(trace) {
  const list = make("dl", { class: "facts" });
  const put = (name, value) => list.append(make("div", {}, make("dt", { text: name }), make("dd", { text: value })));
  put("Probability", percent(trace.prob));
  put("Entropy", `${trace.entropy.toFixed(2)} nats`);
  const agreed = Object.entries(trace.agreed).filter(([, yes]) => yes).map(([member]) => member);
  if (Object.keys(trace.agreed).length) put("Agreed", agreed.join(", ") || "no assistant");
  for (const [member, mass] of Object.entries(trace.unmapped)) if (mass > 0) put(`Unmapped of ${member}`, percent(mass));
  if (trace.draft) put("Draft", drafted(trace.draft));
  for (const [member, reason] of Object.entries(trace.left_out)) put(`${member} left out`, reason);
  return list;
}

function drafted(draft) {
  const fate = draft.kept ? "kept" : "replaced";
  const why = draft.certified ? "no assistant could change it" : draft.needed ? "the ensemble decided" : draft.sound ? "the assistants agreed" : "no shared boundary here";
  return `${visible(draft.token)} by ${draft.drafter}, ${fate}: ${why}`;
}
