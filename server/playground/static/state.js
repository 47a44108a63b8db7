// What the page asks for: one plain object, its listeners, its form in a link, and the request that it means.
// Never holds the API key.

const EMPTY = {
  form: "text",
  model: "",
  prompt: "The capital of France is",
  turns: [{ role: "user", content: "What is the capital of France?" }],
  sides: false,
  colour: "agreement",
  off: [], // members that are left out
  weights: {}, // member -> weight, where it differs from the recipe's
  weighting: "",
  fusion: { name: "", options: {} },
  mode: { name: "", options: {} },
  limits: {},
  params: { max_tokens: 48, temperature: 0 },
};

const listeners = new Set();
export let state = structuredClone(EMPTY);

export function onChange(listener) {
  listeners.add(listener);
}

export function change(part) {
  state = { ...state, ...part };
  for (const listener of listeners) listener(state);
}

// Another model has other members and another recipe.
export function chooseModel(model) {
  const { off, weights, weighting, fusion, mode, limits } = structuredClone(EMPTY);
  change({ model, off, weights, weighting, fusion, mode, limits });
}

export function toLink(from = state) {
  const bytes = new TextEncoder().encode(JSON.stringify(from));
  const letters = Array.from(bytes, (byte) => String.fromCharCode(byte)).join("");
  return btoa(letters).replaceAll("+", "-").replaceAll("/", "_").replaceAll("=", "");
}

// The state of a link; null for what is none. Only known fields of the right kind are taken.
export function fromLink(hash) {
  try {
    const letters = atob(hash.replace(/^#/, "").replaceAll("-", "+").replaceAll("_", "/"));
    return checked(JSON.parse(new TextDecoder().decode(Uint8Array.from(letters, (each) => each.charCodeAt(0)))));
  } catch {
    return null;
  }
}

export function checked(found) {
  if (found === null || typeof found !== "object" || Array.isArray(found)) return null;
  const kept = structuredClone(EMPTY);
  for (const [name, value] of Object.entries(EMPTY)) {
    const given = found[name];
    if (typeof given === typeof value && given !== null && Array.isArray(given) === Array.isArray(value)) kept[name] = given;
  }
  kept.turns = kept.turns.filter((turn) => typeof turn?.content === "string" && typeof turn?.role === "string");
  kept.off = kept.off.filter((name) => typeof name === "string");
  for (const part of ["fusion", "mode"]) kept[part] = { name: String(kept[part].name ?? ""), options: kept[part].options ?? {} };
  return kept;
}

export function membersOf(card) {
  const recipe = card?.recipe;
  if (!recipe) return [];
  if (card.kind === "ensemble") return Object.keys(recipe.members);
  const named = Array.isArray(recipe.models) ? recipe.models : Object.keys(recipe.models ?? {});
  const nodes = Object.values(recipe.nodes ?? {}).map((node) => node.model ?? node);
  return [...new Set([...named, ...nodes])];
}

// [path, body] of the request for a model; the members alone get none of what belongs to the ensemble.
export function requestOf(from, card, model = from.model) {
  const own = model === from.model;
  const body = { model };
  if (from.form === "chat") body.messages = from.turns;
  else body.prompt = from.prompt;
  for (const [name, value] of Object.entries(from.params)) {
    if (value !== null && value !== "") body[name] = value;
  }
  body.stream = true;
  body.stream_options = { include_usage: true };
  body.ensemble = own && card ? ensembleOf(from, card) : { trace: true };
  return [from.form === "chat" ? "/v1/chat/completions" : "/v1/completions", body];
}

function ensembleOf(from, card) {
  const found = { trace: true };
  if (card.kind === "council") {
    if (Object.keys(from.limits).length) found.limits = from.limits;
    return found;
  }
  if (card.kind !== "ensemble") return found;
  const all = Object.keys(card.recipe.members);
  const used = all.filter((name) => !from.off.includes(name));
  if (used.length < all.length) found.members = used;
  if (Object.keys(from.weights).length) {
    const weights = used.map((name) => [name, from.weights[name] ?? card.recipe.members[name]]);
    found.weights = Object.fromEntries(weights);
  }
  if (from.weighting) found.weighting = from.weighting;
  for (const part of ["fusion", "mode"]) {
    const { name, options } = from[part];
    const has = Object.keys(options).length > 0;
    const called = name || (part === "fusion" ? card.recipe.fusion.name : card.recipe.mode);
    if (name || has) found[part] = has ? { name: called, options } : called;
  }
  return found;
}
