// Chunks of a stream -> records of tokens {text, trace, control}. Where the model is traced, a token's text is what
// its bytes add: a character that is spread over tokens stands in its last one. Without traces each chunk is a record.

export class Records {
  constructor() {
    this.decoder = new TextDecoder("utf-8", { fatal: false });
  }

  // chunk: of completions or chat.
  of(chunk) {
    const choice = chunk.choices[0];
    if (!choice) return [];
    const traces = choice.trace ?? [];
    if (traces.length) return traces.map((trace) => this.one(trace));
    const text = choice.text ?? choice.delta?.content ?? "";
    return text && !this.traced ? [{ text, trace: null, control: false }] : [];
  }

  // What is left of a character that the text ends within.
  end() {
    return this.decoder.decode();
  }

  one(trace) {
    this.traced = true;
    if (trace.bytes === null) return { text: trace.token, trace, control: true };
    return { text: this.decoder.decode(new Uint8Array(trace.bytes), { stream: true }), trace, control: false };
  }
}
