// The text as tokens that can be walked: appended once a frame, never moved again. One list of listeners serves all.
// Knows records {text, trace}; does not know where they come from.

import { classOf } from "./colours.js";
import { make, newId } from "./dom.js";

const KEYS = { ArrowRight: 1, ArrowLeft: -1, Home: -Infinity, End: Infinity, PageDown: 20, PageUp: -20 };

const MOST_ECHOED = 400; // characters of a prompt

export class TokensView {
  // show(record, index, view): a token is looked at; kept says whether it stays chosen.
  constructor(label, { measure, members, show }) {
    Object.assign(this, { label, measure, members, show, records: [], spans: [], waiting: [] });
    this.chosen = -1;
    this.milliseconds = 0; // of script, and of each frame that added tokens, for whoever measures
    this.frames = [];
    this.box = make("div", { class: "tokens", role: "listbox", "aria-label": `${label}, token by token`, id: newId("tokens"), tabindex: "0" });
    this.box.addEventListener("pointerover", (event) => this.hover(event));
    this.box.addEventListener("pointerleave", () => this.away());
    this.box.addEventListener("click", (event) => this.choose(this.indexOf(event.target)));
    this.box.addEventListener("keydown", (event) => this.key(event));
    this.box.addEventListener("focusin", (event) => {
      const index = this.indexOf(event.target);
      if (index >= 0 && index !== this.chosen) this.choose(index);
    });
  }

  // What the text goes on from, before its first token.
  begin(prompt) {
    const shown = prompt.length > MOST_ECHOED ? `…${prompt.slice(-MOST_ECHOED)}` : prompt;
    const line = make("div", { class: "line", role: "presentation" }, make("span", { class: "echo", "aria-hidden": "true", text: shown }));
    this.box.append(line);
    this.line = prompt.endsWith("\n") ? null : line;
  }

  add(records) {
    this.waiting.push(...records);
    this.frame ??= requestAnimationFrame(() => this.flush());
  }

  flush() {
    const started = performance.now();
    if (this.frame) cancelAnimationFrame(this.frame);
    this.frame = null;
    const atEnd = this.box.scrollHeight - this.box.scrollTop - this.box.clientHeight < 40;
    for (const record of this.waiting) this.append(record);
    const news = this.waiting.length > 0;
    this.waiting = [];
    if (news && atEnd) this.box.scrollTop = this.box.scrollHeight;
    if (news && this.spans.length) this.box.setAttribute("tabindex", "-1");
    if (news) this.onFrame?.();
    this.frames.push(performance.now() - started);
    this.milliseconds += this.frames.at(-1);
  }

  append(record) {
    const index = this.records.length;
    this.records.push(record);
    const attributes = { class: classOf(this.measure, record.trace, this.members), role: "option", "aria-selected": "false", tabindex: index ? "-1" : "0" };
    const span = make("span", attributes);
    span.textContent = record.text;
    if (record.control) span.classList.add("special");
    if (record.text === "") span.classList.add("part");
    if (record.text.trim() === "") span.setAttribute("aria-label", record.text === "" ? "part of a character" : record.text.includes("\n") ? "line end" : "space");
    if (record.text.endsWith("\n")) span.classList.add("ends");
    this.spans.push(span);
    span.dataset.index = index;
    if (!this.line) this.box.append((this.line = make("div", { class: "line", role: "presentation" })));
    this.line.append(span);
    if (record.text.endsWith("\n")) this.line = null;
  }

  // The end of the last token's text.
  complete(rest) {
    const last = this.records.at(-1);
    if (!rest || !last) return;
    last.text += rest;
    this.spans.at(-1).textContent = last.text;
  }

  get text() {
    return this.records.filter((record) => !record.control).map((record) => record.text).join("");
  }

  recolour(measure) {
    this.measure = measure;
    this.spans.forEach((span, index) => {
      const kept = ["special", "ends", "part", "differs", "chosen"].filter((name) => span.classList.contains(name));
      span.className = [classOf(measure, this.records[index].trace, this.members), ...kept].join(" ");
    });
  }

  mark(indices) {
    this.spans.forEach((span, index) => {
      const differs = indices.has(index);
      span.classList.toggle("differs", differs);
      if (differs) span.setAttribute("aria-description", "differs");
      else span.removeAttribute("aria-description");
    });
  }

  indexOf(target) {
    const span = target.closest?.("[data-index]");
    return span ? Number(span.dataset.index) : -1;
  }

  hover(event) {
    const index = this.indexOf(event.target);
    if (index >= 0 && event.pointerType === "mouse") this.show(this, index, false);
  }

  away() {
    if (this.chosen >= 0) this.show(this, this.chosen, false);
  }

  choose(index) {
    if (index < 0 || index >= this.spans.length) return;
    const before = this.spans[this.chosen];
    if (before) {
      before.classList.remove("chosen");
      before.setAttribute("aria-selected", "false");
    }
    for (const each of [this.spans[Math.max(this.chosen, 0)], this.spans[0]]) each.tabIndex = -1;
    this.chosen = index;
    const span = this.spans[index];
    span.tabIndex = 0;
    span.classList.add("chosen");
    span.setAttribute("aria-selected", "true");
    this.show(this, index, true);
  }

  focus(index) {
    this.choose(index);
    this.spans[index]?.focus({ preventScroll: true });
    this.spans[index]?.scrollIntoView({ block: "nearest" });
  }

  key(event) {
    if (event.altKey || event.ctrlKey || event.metaKey) return;
    const step = KEYS[event.key];
    const last = this.spans.length - 1;
    if (event.key === "ArrowUp" || event.key === "ArrowDown") this.focus(this.beside(event.key === "ArrowDown" ? 1 : -1));
    else if (step) this.focus(Math.min(Math.max(Math.max(this.chosen, 0) + step, 0), last));
    else if (event.key === "Escape") this.clear();
    else return;
    event.preventDefault();
  }

  // The token of the next line of the screen that is nearest to this one.
  beside(direction) {
    const from = Math.max(this.chosen, 0);
    const here = this.spans[from].getBoundingClientRect();
    let best = from, distance = Infinity, row = null;
    for (let index = from + direction; index >= 0 && index < this.spans.length; index += direction) {
      const there = this.spans[index].getClientRects()[0];
      if (!there || Math.abs(there.top - here.top) < 4) continue;
      row ??= there.top;
      if (Math.abs(there.top - row) > 4) break;
      if (Math.abs(there.left - here.left) < distance) [best, distance] = [index, Math.abs(there.left - here.left)];
    }
    return best;
  }

  clear() {
    this.clearQuietly();
    this.show(this, -1, true);
  }

  clearQuietly() {
    this.spans[this.chosen]?.classList.remove("chosen");
    this.spans[this.chosen]?.setAttribute("aria-selected", "false");
    this.chosen = -1;
  }
}
