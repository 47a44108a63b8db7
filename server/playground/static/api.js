// Calls of the server's API, all on this page's own origin. The key lives in a variable of this module alone.

import { eventsOf } from "./stream.js";

const root = document.documentElement.dataset.root;
let key = "";

export function setKey(value) {
  key = value.trim();
}

export const hasKey = () => key !== "";

// What the API refused, in its own words.
export class ApiRefusal extends Error {
  constructor(status, detail, retryAfter) {
    super(detail.message);
    Object.assign(this, { status, param: detail.param ?? null, code: detail.code ?? null, retryAfter });
  }
}

function headers(more = {}) {
  return key ? { ...more, Authorization: `Bearer ${key}` } : more;
}

async function refusal(answer) {
  const fallback = { message: `the server answered ${answer.status} ${answer.statusText}` };
  const body = await answer.json().catch(() => null);
  return new ApiRefusal(answer.status, body?.error ?? fallback, answer.headers.get("Retry-After"));
}

async function call(path, options = {}) {
  let answer;
  try {
    answer = await fetch(`${root}${path}`, { credentials: "omit", cache: "no-store", ...options });
  } catch (error) {
    if (error.name === "AbortError") throw error;
    throw new ApiRefusal(0, { message: "the server cannot be reached" });
  }
  if (!answer.ok) throw await refusal(answer);
  return answer;
}

export async function getJson(path) {
  return (await call(path, { headers: headers() })).json();
}

export async function getText(path) {
  return (await call(path, { headers: headers({ Accept: "text/plain" }) })).text();
}

// The chunks of a streamed answer. Raises ApiRefusal, before the first chunk or for an error event.
export async function* streamed(path, body, signal) {
  const sent = { method: "POST", headers: headers({ "Content-Type": "application/json" }), body: JSON.stringify(body) };
  const answer = await call(path, { ...sent, signal });
  for await (const data of eventsOf(answer.body)) {
    if (data === "[DONE]") return;
    const chunk = JSON.parse(data);
    if (chunk.error) throw new ApiRefusal(answer.status, chunk.error);
    yield chunk;
  }
  throw new ApiRefusal(0, { message: "the stream ended before its end" });
}

export const base = () => `${location.origin}${root}`;
