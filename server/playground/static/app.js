// The page: knows all parts and how they fit together.

import { ApiRefusal, base, getJson, hasKey, setKey } from "./api.js";
import { asCurl, asPython } from "./code.js";
import { legend, MEASURES } from "./colours.js";
import { differing, touched } from "./diff.js";
import { byId, copy, make, save } from "./dom.js";
import { drawEnsemble } from "./ensemble.js";
import { drawHistory, forget, remember } from "./history.js";
import { Live } from "./live.js";
import { Pane } from "./pane.js";
import { picture } from "./picture.js";
import { drawSampling, fitting } from "./sampling.js";
import { change, chooseModel, fromLink, membersOf, onChange, requestOf, state, toLink } from "./state.js";
import { connectStored, pickStored, stateOf } from "./stored.js";
import { nothing, said, tell } from "./story.js";
import { addTurn, drawTurns } from "./turns.js";

const known = { cards: [], strategies: { fusions: {}, modes: {} }, documents: null };
let panes = [];
let running = null; // aborts what is being written
let linking = null; // puts the state into the address, once typing pauses
let followed = false; // the story follows the text until a token is chosen

const cardOf = (model) => known.cards.find((card) => card.id === model);
// The members that may be in traces of a model, in the order that gives them their colours.
function namesOf(card) {
  if (card?.kind === "ensemble") return membersOf(card);
  return card?.kind === "council" ? known.cards.filter((each) => each.kind === "member").map((each) => each.id) : [state.model];
}

function problem(error) {
  const box = byId("problem");
  for (const each of document.querySelectorAll("[aria-invalid]")) each.removeAttribute("aria-invalid");
  if (!error) return box.replaceChildren();
  const wait = error.retryAfter ? ` Try again in ${error.retryAfter} s.` : "";
  box.replaceChildren(make("p", { class: "error" }, make("b", { text: error.status ? `${error.status} ` : "" }), error.message, wait));
  const param = error.param ?? "";
  const field = [...document.querySelectorAll("[data-param]")].find((each) => param === each.dataset.param || param.startsWith(`${each.dataset.param}.`) || param.endsWith(`.${each.dataset.param}`));
  field?.setAttribute("aria-invalid", "true");
  if (error.status === 401) openKey();
}

function show(view, index, kept) {
  if (kept) followed = false;
  const box = byId("story-body");
  const record = view.records[index];
  if (!record) return nothing(box);
  tell(box, record, index, view.records.length, view.members);
  byId("story-said").textContent = kept ? said(record, index, view.records.length) : "";
  if (kept) for (const pane of panes) if (pane.view !== view && pane.view.chosen >= 0) pane.view.clearQuietly();
}

function newPane(model, note, members) {
  const pane = new Pane(model, note, { measure: state.colour, members, show });
  pane.view.onFrame = () => { if (followed && pane === panes[0]) show(pane.view, pane.view.records.length - 1, false); };
  return pane;
}

async function write() {
  stop();
  problem(null);
  const card = cardOf(state.model);
  const members = namesOf(card);
  const others = state.sides ? membersOf(card).filter((name) => name !== state.model) : [];
  panes = [newPane(state.model, others.length ? "ensemble" : "", members), ...others.map((name) => newPane(name, "alone", members))];
  byId("panes").replaceChildren(...panes.map((pane) => pane.element));
  byId("panes").classList.toggle("many", panes.length > 1);
  legend(byId("legend"), state.colour, members, others.length > 0);
  nothing(byId("story-body"));
  const own = (running = new AbortController());
  followed = !matchMedia("(prefers-reduced-motion: reduce)").matches;
  busy(true);
  const results = await Promise.allSettled(panes.map((pane) => pane.run(...requestOf(state, card, pane.model), own.signal)));
  if (running !== own) return;
  running = null;
  busy(false);
  finished(results);
}

function finished(results) {
  const [first, ...others] = panes;
  const failed = results.find((each) => each.status === "rejected" && each.reason.name !== "AbortError");
  if (failed) problem(failed.reason instanceof ApiRefusal ? failed.reason : new ApiRefusal(0, { message: String(failed.reason.message) }));
  for (const pane of others) pane.view.mark(touched(pane.view.records, differing(pane.view.text, first.view.text)));
  if (first.view.records.length) {
    remember(state, first.view.text);
    history_();
  }
  followed = false;
  if (first.view.chosen < 0 && first.view.records.length) show(first.view, first.view.records.length - 1, false);
  byId("status").textContent = failed ? "The answer failed." : `The text is written: ${first.view.records.length} tokens.`;
}

function stop() {
  running?.abort();
  running = null;
  busy(false);
}

function busy(yes) {
  byId("stop").disabled = !yes;
  byId("run").setAttribute("aria-busy", String(yes));
  for (const id of ["export-json", "export-svg"]) byId(id).disabled = yes || !panes.some((pane) => pane.view.records.length);
  if (yes) byId("status").textContent = "Writing.";
}

function history_() {
  drawHistory(byId("history"), (kept) => {
    change(kept);
    draw();
    byId("ask").scrollIntoView({ block: "nearest" });
  });
}

function shownRequest() {
  return requestOf(state, cardOf(state.model));
}

function refresh() {
  byId("request").textContent = `POST ${shownRequest()[0]}\n${JSON.stringify(shownRequest()[1], null, 2)}`;
  clearTimeout(linking);
  linking = setTimeout(() => history.replaceState(null, "", `#${toLink()}`), 100); // browsers count such calls
}

// All controls from the state.
function draw() {
  const card = cardOf(state.model);
  byId("model").value = state.model;
  byId("model-note").textContent = noteOf(card);
  byId("prompt").value = state.prompt;
  byId("sides").checked = state.sides;
  byId("sides").disabled = membersOf(card).length === 0;
  byId("colour").value = state.colour;
  for (const radio of document.querySelectorAll("[name=form]")) radio.checked = radio.value === state.form;
  byId("form-text").hidden = state.form === "chat";
  byId("form-chat").hidden = state.form !== "chat";
  drawTurns(byId("turns"));
  drawEnsemble(byId("ensemble"), card, known.strategies, known.documents);
  drawSampling(byId("sampling"), known.documents);
  legend(byId("legend"), state.colour, namesOf(card));
  if (stored.length) pickStored(stored);
  refresh();
}

function chooseStored(request) {
  change(stateOf(request));
  draw();
}

function noteOf(card) {
  if (!card) return "";
  if (card.status === "lacks_members") return `not served now: ${Object.entries(card.lacks).map(([name, why]) => `${name} is ${why}`).join(", ")}`;
  if (card.kind === "ensemble") return `fuses ${membersOf(card).join(" + ")} by ${card.recipe.fusion.name}, mode ${card.recipe.mode}`;
  return card.kind === "council" ? `council: ${card.recipe.kind} of ${membersOf(card).join(", ")}` : "one model alone";
}

async function load() {
  try {
    const [models, strategies, documents] = await Promise.all([getJson("/v1/models"), getJson("/v1/strategies"), getJson("/openapi.json")]);
    Object.assign(known, { cards: models.data, strategies, documents });
  } catch (error) {
    return problem(error);
  }
  problem(null);
  const kinds = { ensemble: "Ensembles", council: "Councils", member: "Members" };
  byId("model").replaceChildren(...Object.entries(kinds).map(([kind, label]) => [label, known.cards.filter((card) => card.kind === kind)]).filter(([, cards]) => cards.length)
    .map(([label, cards]) => make("optgroup", { label }, ...cards.map((card) => make("option", { value: card.id, text: card.id })))));
  if (!cardOf(state.model)) chooseModel(known.cards[0]?.id ?? "");
  draw();
}

function openKey() {
  byId("key").value = "";
  if (!byId("key-dialog").open) byId("key-dialog").showModal();
}

function connect() {
  byId("ask").addEventListener("submit", (event) => { event.preventDefault(); write(); });
  document.addEventListener("keydown", (event) => { if (event.key === "Enter" && (event.ctrlKey || event.metaKey) && !byId("key-dialog").open) { event.preventDefault(); write(); } });
  byId("stop").addEventListener("click", stop);
  byId("model").addEventListener("change", (event) => {
    chooseModel(event.target.value);
    const kept = stored.find((request) => request.model === event.target.value);
    if (kept) change(stateOf(kept));
    draw();
  });
  byId("prompt").addEventListener("input", (event) => change({ prompt: event.target.value }));
  byId("sides").addEventListener("change", (event) => change({ sides: event.target.checked }));
  for (const radio of document.querySelectorAll("[name=form]")) {
    radio.addEventListener("change", () => { change({ form: radio.value, params: fitting(state.params, known.documents, radio.value) }); draw(); });
  }
  byId("add-turn").addEventListener("click", () => addTurn(byId("turns"), state.turns.at(-1)?.role === "user" ? panes[0]?.view.text ?? "" : ""));
  byId("colour").replaceChildren(...Object.entries(MEASURES).map(([name, { title }]) => make("option", { value: name, text: title })));
  byId("colour").addEventListener("change", (event) => {
    change({ colour: event.target.value });
    for (const pane of panes) pane.view.recolour(state.colour);
    legend(byId("legend"), state.colour, panes[0]?.view.members ?? namesOf(cardOf(state.model)), panes.length > 1);
  });
  byId("copy-curl").addEventListener("click", (event) => copy(asCurl(base(), ...shownRequest(), hasKey()), event.target));
  byId("copy-python").addEventListener("click", (event) => copy(asPython(base(), ...shownRequest(), hasKey()), event.target));
  byId("copy-link").addEventListener("click", (event) => copy(`${base()}/#${toLink()}`, event.target));
  byId("history-clear").addEventListener("click", () => { forget(); history_(); });
  byId("export-json").addEventListener("click", () => save("unisono-trace.json", "application/json", JSON.stringify(panes.map((pane) => pane.exported), null, 1)));
  byId("export-svg").addEventListener("click", () => {
    const { model, view } = panes[0];
    save("unisono-trace.svg", "image/svg+xml", picture({ title: `${model}: ${MEASURES[state.colour].title}`, records: view.records, members: view.members, measure: state.colour }));
  });
  connectMenu(byId("export"));
  connectKey();
  connectTheme();
  addEventListener("hashchange", () => { const kept = fromLink(location.hash); if (kept && toLink(kept) !== toLink()) { change(kept); draw(); } });
}

function connectMenu(menu) {
  const leave = (to) => { if (to && !menu.contains(to)) menu.open = false; };
  document.addEventListener("pointerdown", (event) => leave(event.target));
  menu.addEventListener("focusout", (event) => leave(event.relatedTarget));
  menu.addEventListener("keydown", (event) => {
    if (event.key !== "Escape") return;
    menu.open = false;
    menu.querySelector("summary").focus();
  });
}

function connectKey() {
  byId("key-open").addEventListener("click", openKey);
  byId("key-close").addEventListener("click", () => byId("key-dialog").close());
  byId("key-form").addEventListener("submit", () => {
    setKey(byId("key").value);
    byId("key").value = "";
    byId("key-open").classList.toggle("is-set", hasKey());
    byId("key-open").textContent = hasKey() ? "API key ✓" : "API key";
    load().then(() => live.turn());
  });
}

function connectTheme() {
  const pick = byId("theme");
  const put = (theme) => { document.documentElement.dataset.theme = theme; };
  try { pick.value = localStorage.getItem("unisono.playground.theme") ?? "auto"; } catch { pick.value = "auto"; }
  put(pick.value);
  pick.addEventListener("change", () => {
    put(pick.value);
    try { localStorage.setItem("unisono.playground.theme", pick.value); } catch { /* no storage: the choice lasts as long as the page */ }
  });
}

const stored = connectStored(chooseStored);
const live = new Live(byId("live"), byId("live-line"), byId("live-body"));
const linked = fromLink(location.hash);
if (linked) change(linked);
else if (stored.length) change(stateOf(stored[0]));
onChange(refresh);
connect();
nothing(byId("story-body"));
history_();
load();
