// A request as curl and as Python. The key stands in neither: both read it from the environment.

// What the OpenAI client takes by name; everything else goes into extra_body.
const KNOWN = new Set([
  "model", "prompt", "messages", "max_tokens", "temperature", "top_p", "n", "stop", "seed", "stream", "stream_options", "presence_penalty",
  "frequency_penalty", "logit_bias", "logprobs", "top_logprobs", "response_format", "tools", "tool_choice", "parallel_tool_calls", "reasoning_effort", "max_completion_tokens",
]);

export function asCurl(base, path, body, keyed) {
  const key = keyed ? ` \\\n  -H "Authorization: Bearer $UNISONO_API_KEY"` : "";
  const data = JSON.stringify(body, null, 2).replaceAll("'", "'\\''");
  return `curl -N ${base}${path} -H 'Content-Type: application/json'${key} \\\n  -d '${data}'\n`;
}

export function asPython(base, path, body, keyed) {
  const chat = path.includes("chat");
  const { ...known } = body;
  const extra = {};
  for (const name of Object.keys(body)) {
    if (KNOWN.has(name)) continue;
    extra[name] = body[name];
    delete known[name];
  }
  const fields = Object.entries(known).map(([name, value]) => `    ${name}=${literal(value, 1)},`);
  if (Object.keys(extra).length) fields.push(`    extra_body=${literal(extra, 1)},`);
  const key = keyed ? 'os.environ["UNISONO_API_KEY"]' : '"none"';
  return [
    ...(keyed ? ["import os", ""] : []),
    "from openai import OpenAI",
    "",
    `client = OpenAI(base_url=${literal(`${base}/v1`, 0)}, api_key=${key})`,
    `stream = client.${chat ? "chat.completions" : "completions"}.create(`,
    ...fields,
    ")",
    "for chunk in stream:",
    "    if chunk.choices:",
    `        print(chunk.choices[0].${chat ? "delta.content or \"\"" : "text"}, end="", flush=True)`,
    "",
  ].join("\n");
}

// A value of JSON as Python writes it.
export function literal(value, depth) {
  if (value === null || value === undefined) return "None";
  if (value === true) return "True";
  if (value === false) return "False";
  if (typeof value === "number") return String(value);
  // JSON escapes what Python escapes alike; beyond that Python reads text as it stands, but for lone surrogates.
  if (typeof value === "string") return JSON.stringify(value).replace(/[\u007f-\u009f\u2028\u2029]/g, (char) => `\\u${char.charCodeAt(0).toString(16).padStart(4, "0")}`);
  const pad = "    ".repeat(depth + 1), end = "    ".repeat(depth);
  const parts = Array.isArray(value) ? value.map((each) => literal(each, depth + 1)) : Object.entries(value).map(([name, each]) => `${JSON.stringify(name)}: ${literal(each, depth + 1)}`);
  const [open, close] = Array.isArray(value) ? ["[", "]"] : ["{", "}"];
  const short = `${open}${parts.join(", ")}${close}`;
  return short.length < 80 && !short.includes("\n") ? short : `${open}\n${parts.map((part) => `${pad}${part},`).join("\n")}\n${end}${close}`;
}
