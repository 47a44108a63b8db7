// One answer while it is written and after: its head, its tokens, and a council's tree.

import { streamed } from "./api.js";
import { councilTree } from "./council.js";
import { make } from "./dom.js";
import { Records } from "./records.js";
import { TokensView } from "./tokens.js";

export class Pane {
  constructor(model, note, options) {
    this.model = model;
    this.view = new TokensView(`Text of ${model}`, options);
    this.line = make("span", { class: "pane-line" });
    this.council = make("div", { class: "council" });
    const name = make("h3", {}, model, note ? make("small", { text: note }) : null);
    this.element = make("section", { class: "pane", "aria-label": model }, make("header", {}, name, this.line), this.view.box, this.council);
    Object.assign(this, { body: null, usage: null, report: null, finish: null, servedBy: null });
  }

  // Write the answer; returns when it has ended. Raises ApiRefusal, and AbortError where it was stopped.
  async run(path, body, signal) {
    this.body = body;
    const records = new Records();
    const started = performance.now();
    let first = null, work = 0;
    this.view.box.setAttribute("aria-busy", "true");
    this.line.textContent = "waiting";
    if (body.prompt) this.view.begin(body.prompt);
    try {
      for await (const chunk of streamed(path, body, signal)) {
        const before = performance.now();
        const found = records.of(chunk);
        if (found.length) first ??= before;
        this.take(chunk);
        if (found.length) this.view.add(found);
        work += performance.now() - before;
      }
    } finally {
      this.view.flush();
      this.view.complete(records.end());
      this.view.box.removeAttribute("aria-busy");
      this.view.milliseconds += work;
      this.element.dataset.scriptMs = this.view.milliseconds.toFixed(1);
      this.element.dataset.flushMs = (this.view.frames.toSorted((a, b) => a - b)[this.view.frames.length >> 1] ?? 0).toFixed(1);
      this.element.dataset.tokens = this.view.records.length;
      this.ended(started, first);
    }
  }

  take(chunk) {
    if (chunk.usage) this.usage = chunk.usage;
    if (chunk.served_by) this.servedBy = chunk.served_by;
    const choice = chunk.choices[0];
    if (choice?.finish_reason) this.finish = choice.finish_reason;
    if (choice?.council) this.report = choice.council;
  }

  ended(started, first) {
    const now = performance.now();
    const calls = this.usage?.calls?.length ?? 0;
    const tokens = calls ? this.view.records.length : this.usage?.completion_tokens ?? this.view.records.length;
    const rate = calls === 0 && first !== null && now > first && tokens > 1 ? ` · ${((tokens - 1) / ((now - first) / 1000)).toFixed(1)}/s` : "";
    const wait = first === null ? "" : ` · first after ${Math.round(first - started)} ms`;
    this.line.textContent = `${tokens} tokens${calls ? ` · ${calls} calls` : rate}${wait}${this.finish ? ` · ${this.finish}` : ""}`;
    if (this.report || this.usage?.calls) this.council.replaceChildren(councilTree(this.report, this.usage, this.servedBy));
  }

  get trace() {
    return this.view.records.map((record) => record.trace).filter(Boolean);
  }

  // All that is known of the answer, for a file.
  get exported() {
    return { model: this.model, request: this.body, text: this.view.text, finish_reason: this.finish, usage: this.usage, served_by: this.servedBy, council: this.report, trace: this.trace };
  }
}
