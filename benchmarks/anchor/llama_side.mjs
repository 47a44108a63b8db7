// llama.cpp's side, through node-llama-cpp's prebuilt library; prints one JSON line.
//
//     node benchmarks/anchor/llama_side.mjs FOLDER_WITH_NODE_MODULES MODEL.gguf WORK.json
//
// The same work as `work.py`: decode steps of B sequences, the first token of a long prompt, prompts of 512 tokens.
// A step is the time from one round of tokens to the next. What samples costs little: greedy.

import {readFileSync} from "node:fs";
import {createRequire} from "node:module";
import {pathToFileURL} from "node:url";

const [folder, modelPath, workPath] = process.argv.slice(2);
const resolve = createRequire(`${folder}/package.json`).resolve;
const {getLlama, LlamaLogLevel} = await import(pathToFileURL(resolve("node-llama-cpp")));
const {plan, texts} = JSON.parse(readFileSync(workPath, "utf8"));
const THREADS = 2;

const llama = await getLlama({gpu: false, build: "never", logLevel: LlamaLogLevel.error, maxThreads: THREADS});
const model = await llama.loadModel({modelPath});

function median(numbers) {
    const sorted = [...numbers].sort((a, b) => a - b);
    return sorted[Math.floor((sorted.length - 1) / 2)];
}

async function withSequences(num, length, work) {
    const options = {sequences: num, contextSize: length, batchSize: 512, threads: THREADS, flashAttention: "auto"};
    const context = await model.createContext(options);
    try {
        return await work(Array.from({length: num}, () => context.getSequence()));
    } finally {
        await context.dispose();
    }
}

// Seconds at which each sequence got each of its tokens.
async function answer(sequence, prompt, numTokens) {
    const moments = [];
    for await (const _ of sequence.evaluate(prompt, {temperature: 0, yieldEogToken: true})) {
        moments.push(performance.now() / 1e3);
        if (moments.length === numTokens)
            break;
    }
    return moments;
}

async function stepSeconds(batch) {
    const start = plan.context - plan.steps / 2, num = plan.steps + 4;
    return await withSequences(batch, plan.context + num, async (sequences) => {
        const all = await Promise.all(sequences.map((s, i) => answer(s, texts[i][start], num)));
        const begun = Math.max(...all.map((moments) => moments[0])); // every prompt has been read
        const ended = Math.min(...all.map((moments) => moments[moments.length - 1]));
        const inside = all.map((moments) => moments.filter((at) => at > begun && at <= ended));
        const gaps = inside.flatMap((moments) => moments.slice(1).map((at, i) => at - moments[i]));
        return median(gaps);
    });
}

async function wholeSeconds(num, length) {
    return await withSequences(num, length + 8, async (sequences) => {
        const started = performance.now() / 1e3;
        const all = await Promise.all(sequences.map((s, i) => answer(s, texts[i][length], 1)));
        return Math.max(...all.map((moments) => moments[0])) - started;
    });
}

const seconds = {};
const note = (what, value) => (seconds[what] ??= []).push(value);
await wholeSeconds(1, plan.first.length); // first use
for (let turn = 0; turn < plan.repeats; turn++) {
    for (const batch of plan.batches)
        note(`step ${batch}`, await stepSeconds(batch));
    note("first", await wholeSeconds(1, plan.first.length));
    note("prefill", await wholeSeconds(plan.prefill.num, plan.prefill.length));
}
console.log(JSON.stringify({seconds}));
process.exit(0);
