// What a request changes in its ensemble: members on and off, their weights, the fusion, the mode, a council's limits.

import { badge, rankOf } from "./colours.js";
import { control } from "./controls.js";
import { make, newId, percent } from "./dom.js";
import { change, state } from "./state.js";

export function drawEnsemble(box, card, strategies, documents) {
  if (!card || card.kind === "member") {
    box.replaceChildren(make("p", { class: "hint", text: "One model alone: nothing is fused." }));
    return;
  }
  if (card.kind === "council") {
    box.replaceChildren(...councilControls(card, documents));
    return;
  }
  box.replaceChildren(members(card, box, strategies, documents), weighting(), strategy("fusion", strategies.fusions, card.recipe.fusion.name), strategy("mode", strategies.modes, card.recipe.mode));
}

function members(card, box, strategies, documents) {
  const names = Object.keys(card.recipe.members);
  const redraw = () => drawEnsemble(box, card, strategies, documents);
  const shares = make("div", { class: "strip", "aria-hidden": "true" });
  const outputs = new Map();
  const show = () => {
    const used = names.filter((name) => !state.off.includes(name));
    const weight = (name) => (used.includes(name) ? state.weights[name] ?? card.recipe.members[name] : 0);
    const total = used.reduce((sum, name) => sum + weight(name), 0) || 1;
    for (const [name, output] of outputs) output.textContent = percent(weight(name) / total);
    shares.replaceChildren(...names.map((name) => make("span", { class: `m${rankOf(name, names)}`, vars: { "--part": weight(name) / total } })));
  };
  const rows = names.map((name) => {
    const id = newId("weight");
    const isMain = name === card.recipe.main;
    const output = make("output", { for: id });
    outputs.set(name, output);
    const used = !state.off.includes(name);
    const toggle = make("input", { type: "checkbox", checked: used, disabled: isMain, "aria-label": `use ${name}`, on: { change: (event) => { change({ off: event.target.checked ? state.off.filter((each) => each !== name) : [...state.off, name] }); redraw(); } } });
    const slider = make("input", { type: "range", id, min: 0, max: 1, step: 0.01, disabled: !used, "data-param": "ensemble.weights", on: { input: (event) => { change({ weights: { ...allWeights(card), [name]: event.target.valueAsNumber } }); show(); } } });
    slider.value = state.weights[name] ?? card.recipe.members[name];
    const label = make("label", { for: id }, badge(name, names), make("span", { class: "sr", text: " weight" }), isMain ? make("small", { text: "main" }) : null);
    return make("div", { class: "member" }, toggle, label, slider, output);
  });
  const reset = make("button", { type: "button", class: "quiet", text: "Reset weights", on: { click: () => { change({ weights: {} }); redraw(); } } });
  const group = make("fieldset", { class: "members" }, make("legend", { text: "Members and weights" }), shares, ...rows, reset);
  show();
  return group;
}

const allWeights = (card) => ({ ...card.recipe.members, ...state.weights });

function weighting() {
  const schema = { enum: ["fixed", "perplexity"], description: "perplexity: members that find the prompt likelier weigh more." };
  return control("weighting", schema, state.weighting || undefined, (value) => change({ weighting: value ?? "" }));
}

// The names of a kind of strategy, and the options of the chosen one.
function strategy(kind, schemas, configured) {
  const group = make("fieldset", {}, make("legend", { text: kind === "fusion" ? "Fusion" : "Mode" }));
  const draw = () => {
    const chosen = state[kind].name || configured;
    const pick = control(kind, { enum: Object.keys(schemas), default: configured }, state[kind].name || undefined, (name) => {
      change({ [kind]: { name: name ?? "", options: {} } });
      draw();
    });
    pick.querySelector("select").dataset.param = `ensemble.${kind}`;
    const options = Object.entries(schemas[chosen]?.properties ?? {}).map(([name, schema]) => control(name, schema, state[kind].options[name], (value) => {
      const { [name]: _, ...rest } = state[kind].options;
      change({ [kind]: { name: state[kind].name, options: value === undefined ? rest : { ...rest, [name]: value } } });
    }));
    group.replaceChildren(group.firstChild, pick, ...options);
  };
  draw();
  return group;
}

function councilControls(card, documents) {
  const limits = documents?.components?.schemas?.LimitsChoice?.properties ?? {};
  const note = make("p", { class: "hint", text: `A council of the kind ${card.recipe.kind}: it asks whole answers of its models. A request may lower its limits.` });
  return [note, ...Object.entries(limits).map(([name, schema]) => control(name, schema, state.limits[name], (value) => {
    const { [name]: _, ...rest } = state.limits;
    change({ limits: value === undefined ? rest : { ...rest, [name]: value } });
  }))];
}
