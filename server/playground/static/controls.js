// Controls made from the server's own schemas: one for each option of a fusion or mode, one for each parameter.

import { make, newId } from "./dom.js";

// The parts of a JSON schema that say what a value may be, without null.
function kindsOf(schema) {
  return (schema.anyOf ?? [schema]).filter((part) => part.type !== "null").map((part) => ({ ...part }));
}

export function describe(schema) {
  const kinds = kindsOf(schema);
  const choices = kinds.flatMap((part) => part.enum ?? (part.const !== undefined ? [part.const] : []));
  const numeric = kinds.find((part) => part.type === "integer" || part.type === "number");
  const first = (name) => schema[name] ?? numeric?.[name];
  if (choices.length && !numeric) return { kind: "choice", choices };
  if (numeric && choices.length === 0) {
    return { kind: numeric.type, minimum: first("minimum") ?? first("exclusiveMinimum"), maximum: first("maximum") ?? first("exclusiveMaximum") };
  }
  if (kinds.some((part) => part.type === "boolean")) return { kind: "boolean" };
  if (kinds.every((part) => part.type === "string")) return { kind: "string" };
  return { kind: "json" };
}

// A labelled control. value: undefined where nothing is sent; set(value) is called with what to send, or undefined.
export function control(name, schema, value, set) {
  const id = newId("field");
  const input = inputOf(id, describe(schema), schema, value, set);
  input.dataset.param = name;
  const note = schema.description;
  if (note) input.setAttribute("aria-describedby", `${id}-note`);
  return make("div", { class: "control" }, make("label", { for: id, text: name }), input, note ? make("p", { class: "hint", id: `${id}-note`, text: note }) : null);
}

function inputOf(id, found, schema, value, set) {
  if (found.kind === "choice" || found.kind === "boolean") {
    const choices = found.kind === "boolean" ? [true, false] : found.choices;
    return select(id, choices, value, schema.default, set);
  }
  if (found.kind === "integer" || found.kind === "number") return number(id, found, value, schema.default, set);
  if (found.kind === "string") return line(id, value, schema.default, set);
  return json(id, value, schema, set);
}

const shown = (value) => (typeof value === "string" ? value : JSON.stringify(value));

function select(id, choices, value, standard, set) {
  const preset = standard === undefined || standard === null ? "default" : `default: ${shown(standard)}`;
  const options = choices.map((each) => make("option", { value: JSON.stringify(each), text: shown(each), selected: each === value }));
  const change = (event) => set(event.target.value === "" ? undefined : JSON.parse(event.target.value));
  return make("select", { id, on: { change } }, make("option", { value: "", text: preset }), ...options);
}

function number(id, { kind, minimum, maximum }, value, standard, set) {
  const bounded = (edge) => (edge !== undefined && Math.abs(edge) < 1e9 ? edge : undefined);
  const change = (event) => set(event.target.value === "" || Number.isNaN(event.target.valueAsNumber) ? undefined : event.target.valueAsNumber);
  const step = kind === "integer" ? 1 : "any";
  const input = make("input", { type: "number", id, min: bounded(minimum), max: bounded(maximum), step, placeholder: standard ?? "default", on: { input: change } });
  input.value = value ?? "";
  return input;
}

function line(id, value, standard, set) {
  const input = make("input", { type: "text", id, placeholder: standard ?? "default", spellcheck: "false", on: { input: (event) => set(event.target.value || undefined) } });
  input.value = value ?? "";
  return input;
}

// Anything else, as JSON; a text that is none is taken as it stands where the schema allows texts.
function json(id, value, schema, set) {
  const texts = kindsOf(schema).some((part) => part.type === "string");
  const change = (event) => {
    const typed = event.target.value.trim();
    try {
      set(typed === "" ? undefined : JSON.parse(typed));
      event.target.removeAttribute("aria-invalid");
    } catch {
      if (texts) set(typed);
      else event.target.setAttribute("aria-invalid", "true");
    }
  };
  const example = schema.examples?.[0];
  const area = make("textarea", { id, rows: 1, spellcheck: "false", placeholder: example === undefined ? "JSON" : JSON.stringify(example), on: { input: change } });
  area.value = value === undefined ? "" : shown(value);
  return area;
}
