// Where the server replays stored answers: which ones there are, and what each of them asks.

import { byId, make } from "./dom.js";
import { state } from "./state.js";

const { stored } = document.documentElement.dataset;

const asked = (request) => request.prompt ?? request.messages.at(-1).content;

export function connectStored(choose) {
  const requests = JSON.parse(stored);
  byId("stored").hidden = byId("stored-row").hidden = requests.length === 0;
  if (!requests.length) return requests;
  byId("prompt").readOnly = true;
  byId("stored-pick").replaceChildren(...requests.map((request, rank) => make("option", { value: rank, text: `${request.model}: ${asked(request)}` })));
  byId("stored-pick").addEventListener("change", (event) => choose(requests[event.target.value]));
  return requests;
}

// The state that asks what was stored; what the page shows stays as it is.
export function stateOf({ model, prompt, messages, stream, ensemble, ...params }) {
  const form = messages ? { form: "chat", turns: messages } : { form: "text", prompt };
  return { model, ...form, params, off: [], weights: {}, weighting: "", fusion: { name: "", options: {} }, mode: { name: "", options: {} }, limits: {} };
}

export function pickStored(requests) {
  const said = state.form === "chat" ? state.turns.at(-1)?.content : state.prompt;
  byId("stored-pick").value = requests.findIndex((request) => request.model === state.model && asked(request) === said);
}
