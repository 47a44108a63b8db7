// All other parameters of a request, from the schema of its endpoint: the usual ones, and the rest behind a fold.

import { control } from "./controls.js";
import { make } from "./dom.js";
import { change, state } from "./state.js";

const FIRST = ["max_tokens", "temperature", "top_p", "top_k", "min_p", "seed", "stop"];
// What the page sets itself, reads in no way, or shows in other places.
const NOT_HERE = new Set([
  "model", "prompt", "messages", "stream", "stream_options", "ensemble", "user", "n", "best_of", "echo", "logprobs", "top_logprobs", "prompt_logprobs",
  "return_token_ids", "return_tokens_as_token_ids", "max_completion_tokens", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
]);

export function drawSampling(box, documents) {
  const name = state.form === "chat" ? "ChatRequest" : "CompletionRequest";
  const fields = documents?.components?.schemas?.[name]?.properties ?? {};
  const rest = Object.keys(fields).filter((field) => !FIRST.includes(field) && !NOT_HERE.has(field));
  const of = (names) => names.filter((field) => fields[field]).map((field) => control(field, fields[field], state.params[field], (value) => {
    const { [field]: _, ...others } = state.params;
    change({ params: value === undefined ? others : { ...others, [field]: value } });
  }));
  box.replaceChildren(...of(FIRST), make("details", { class: "more" }, make("summary", { text: `All parameters (${rest.length} more)` }), ...of(rest)));
}

// Parameters that the other endpoint does not have would be refused: they go when the form changes.
export function fitting(params, documents, form) {
  const fields = documents?.components?.schemas?.[form === "chat" ? "ChatRequest" : "CompletionRequest"]?.properties;
  return fields ? Object.fromEntries(Object.entries(params).filter(([name]) => name in fields)) : params;
}
