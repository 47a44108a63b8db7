// The live panel: what the server does now, from the differences of two readings of /metrics.

import { getText } from "./api.js";
import { make, percent, svg } from "./dom.js";

const EVERY = 2000; // milliseconds
const KEPT = 60; // readings in the small chart

// Prometheus' text -> [{name, labels, value}].
export function parsed(text) {
  const found = [];
  for (const line of text.split("\n")) {
    const parts = /^([a-zA-Z_:][\w:]*)(?:\{(.*)\})? (\S+)/.exec(line);
    if (!parts) continue;
    const labels = Object.fromEntries([...(parts[2] ?? "").matchAll(/(\w+)="((?:[^"\\]|\\.)*)"/g)].map(([, key, value]) => [key, value]));
    found.push({ name: parts[1], labels, value: parts[3] === "+Inf" ? Infinity : Number(parts[3]) });
  }
  return found;
}

// Sums of a metric over all labels, or by one label.
export function total(samples, name, by) {
  const sums = {};
  for (const { name: own, labels, value } of samples) if (own === `unisono_${name}`) sums[by ? labels[by] : ""] = (sums[by ? labels[by] : ""] ?? 0) + value;
  return by ? sums : sums[""] ?? 0;
}

// The q-quantile of what a histogram has counted between two readings, by its buckets; null where it counted nothing.
export function quantile(before, after, name, q) {
  const old = total(before, `${name}_bucket`, "le");
  const edges = Object.entries(total(after, `${name}_bucket`, "le")).map(([edge, count]) => [edge === "+Inf" ? Infinity : Number(edge), count - (old[edge] ?? 0)]);
  edges.sort((a, b) => a[0] - b[0]);
  const all = edges.at(-1)?.[1] ?? 0;
  if (all <= 0) return null;
  let low = 0, below = 0;
  for (const [edge, count] of edges) {
    if (count >= q * all) return edge === Infinity ? low : low + ((edge - low) * (q * all - below)) / (count - below || 1);
    [low, below] = [edge, count];
  }
  return low;
}

// What two readings say, `seconds` apart.
export function told(before, after, seconds) {
  const grown = (name) => total(after, name) - total(before, name);
  const steps = grown("step_seconds_count");
  const step = grown("step_seconds_sum");
  const forwards = grown("forwards_seconds_sum");
  const fusion = grown("fusion_seconds_sum");
  const all = Math.max(step, forwards + fusion) || 1;
  return {
    rate: grown("inter_token_latency_seconds_count") / seconds,
    first: quantile(before, after, "time_to_first_token_seconds", 0.5),
    steps,
    step: steps ? step / steps : null,
    split: steps ? { members: forwards / all, fusion: fusion / all, rest: Math.max(0, all - forwards - fusion) / all } : null,
    running: total(after, "num_requests_running"),
    waiting: total(after, "num_requests_waiting"),
  };
}

const milliseconds = (seconds) => (seconds === null ? "–" : `${(seconds * 1000).toFixed(seconds < 0.1 ? 1 : 0)} ms`);

export class Live {
  constructor(details, line, body) {
    Object.assign(this, { details, line, body, rates: [], first: null, before: null });
    details.addEventListener("toggle", () => this.turn());
    document.addEventListener("visibilitychange", () => this.turn());
  }

  turn() {
    clearTimeout(this.timer);
    this.before = null;
    if (this.details.open && !document.hidden) this.read();
    else this.line.textContent = "";
  }

  async read() {
    clearTimeout(this.timer);
    try {
      const after = parsed(await getText("/metrics"));
      const now = performance.now();
      if (this.before) this.show(told(this.before.samples, after, (now - this.before.now) / 1000));
      else this.show(told([], after, Infinity));
      this.before = { samples: after, now };
      this.timer = setTimeout(() => this.read(), EVERY);
    } catch (error) {
      this.body.replaceChildren(make("p", { class: "hint", text: error.message }));
    }
  }

  show(found) {
    this.rates = [...this.rates, found.rate].slice(-KEPT);
    this.first = found.first ?? this.first;
    this.split = found.split ?? this.split;
    this.step = found.step ?? this.step;
    this.line.textContent = `${found.rate.toFixed(1)} tokens/s`;
    this.body.replaceChildren(chart(this.rates), numbers([
      ["Tokens/s", found.rate.toFixed(1), "Steps that gave a sequence tokens, per second: with drafts a step may give several"],
      ["First token", milliseconds(this.first), "Median time to the first token"],
      ["Step", milliseconds(this.step ?? null), "Mean time of one step"],
      ["Running", found.running, "Sequences that are running"],
      ["Queue", found.waiting, "Sequences that wait"],
    ]), ...(this.split ? splitBar(this.split) : []));
  }
}

function numbers(entries) {
  return make("dl", { class: "numbers" }, ...entries.map(([name, value, title]) => make("div", { title }, make("dt", { text: name }), make("dd", { text: value }))));
}

function chart(rates) {
  const most = Math.max(...rates, 1);
  const points = rates.map((rate, rank) => `${((rank + KEPT - rates.length) / (KEPT - 1)) * 240},${38 - (rate / most) * 34}`).join(" ");
  return svg("svg", { viewBox: "0 0 240 40", class: "chart", role: "img", "aria-label": `tokens per second, up to ${most.toFixed(1)}`, preserveAspectRatio: "none" }, svg("polyline", { points }));
}

function splitBar(split) {
  const kinds = [["members", "m0"], ["fusion", "m1"], ["rest", "m5"]];
  const strip = make("div", { class: "strip", "aria-hidden": "true" }, ...kinds.map(([name, kind]) => make("span", { class: kind, vars: { "--part": split[name] } })));
  const lines = kinds.map(([name, kind]) => make("li", {}, make("span", { class: `badge ${kind}` }, make("span", { "aria-hidden": "true", text: { members: "●", fusion: "■", rest: "★" }[name] }), ` ${name}`), make("span", { class: "num", text: percent(split[name]) })));
  return [make("h3", { text: "Where a step's time goes" }), strip, make("ul", { class: "plain" }, ...lines)];
}
