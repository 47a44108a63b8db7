"""lm-evaluation-harness against a running server: a member alone, the ensemble, and the member's own numbers.

    make eval-demo

Starts `unisono serve` on the demo pair in fp32, runs the two tasks beside this file through the harness' own
`local-completions` client (in a venv of its own), and compares the log-likelihoods that it was given for a member
with the same model run directly through transformers. Prints a table, then one JSON line; fails where they differ
by more than 1e-3.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import tempfile
from pathlib import Path
from typing import Any

import torch
import yaml
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.traffic import serving
from ensemble_core.config_file import load_config
from ensemble_core.members.loading.checkpoints import resolve_folder

HERE = Path(__file__).parent
ROOT = HERE.parents[1]
TASKS = "unisono_choice,unisono_generation"
TOLERANCE = 1e-3


def fp32_config(source: Path, folder: Path) -> Path:
    """A copy of a configuration with every member in fp32 and twice the cache."""
    raw = yaml.safe_load(source.read_text())
    for member in raw["members"].values():
        member |= {"dtype": "float32", "kv_memory": "3GiB"}
    raw["matrices"]["folder"] = str((source.parent / raw["matrices"]["folder"]).resolve())
    target = folder / "fp32.yaml"
    target.write_text(yaml.safe_dump(raw))
    return target


def run_harness(python: str, url: str, model: str, tokenizer: Path, output: Path) -> dict[str, Any]:
    """One run of both tasks; the harness' results, and the samples of the multiple choice under `samples`."""
    arguments = (
        f"model={model},base_url={url}/v1/completions,tokenizer_backend=huggingface,tokenizer={tokenizer},"
        "num_concurrent=4,max_retries=1,tokenized_requests=True"
    )
    options = ["--model", "local-completions", "--model_args", arguments, "--tasks", TASKS]
    paths = ["--include_path", str(HERE), "--output_path", str(output), "--log_samples"]
    subprocess.run([python, "-m", "lm_eval", *options, *paths], cwd=ROOT, check=True, stdout=subprocess.DEVNULL)
    (results,) = output.rglob("results_*.json")
    (samples,) = output.rglob("samples_unisono_choice_*.jsonl")
    scores = json.loads(results.read_text())["results"]
    return {"scores": scores, "samples": [json.loads(line) for line in samples.read_text().splitlines()]}


def largest_difference(samples: list[dict[str, Any]], folder: Path) -> float:
    """Between the harness' log-likelihoods and the model's own, in nats, over all choices."""
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    worst = 0.0
    for sample in samples:
        for arguments, response in zip(sample["arguments"].values(), sample["resps"], strict=True):
            own = own_loglikelihood(model, tokenizer, arguments["arg_0"], arguments["arg_1"])
            worst = max(worst, abs(own - float(response[0][0])))
    return worst


@torch.inference_mode()
def own_loglikelihood(model: Any, tokenizer: Any, context: str, continuation: str) -> float:
    """Of a continuation, tokenised as the harness does it: together with its context, without BOS."""
    whole = tokenizer.encode(context + continuation, add_special_tokens=False)
    start = len(tokenizer.encode(context, add_special_tokens=False))
    logprobs = model(torch.tensor([whole])).logits[0].log_softmax(dim=1)
    return float(sum(logprobs[i - 1, whole[i]] for i in range(start, len(whole))))


def main() -> None:
    """Run everything."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config", type=Path, default=ROOT / "configs" / "demo.yaml")
    parser.add_argument("--harness", required=True, help="Python of a venv with lm_eval[api].")
    args = parser.parse_args()
    config = load_config(args.config)
    rows: dict[str, dict[str, float]] = {}
    with tempfile.TemporaryDirectory() as scratch, serving(fp32_config(args.config, Path(scratch))) as url:
        for model in ("smollm2", "gemma3", "duet"):
            main_member = config.ensembles[model].main if model in config.ensembles else model
            folder = resolve_folder(config.members[main_member])
            result = run_harness(args.harness, url, model, folder, Path(scratch) / model)
            rows[model] = {
                "choice_acc": result["scores"]["unisono_choice"]["acc,none"],
                "generation_exact": result["scores"]["unisono_generation"]["exact_match,first-word"],
            }
            if model in config.members:
                rows[model]["largest_difference"] = largest_difference(result["samples"], folder)
            print(f"{model:10}", " ".join(f"{name} {value:.2g}" for name, value in rows[model].items()))
    print(json.dumps({"benchmark": "lm_eval", "rows": rows}))
    if any(row.get("largest_difference", 0.0) > TOLERANCE for row in rows.values()):
        raise SystemExit(f"log-likelihoods differ from the models' own by more than {TOLERANCE}")


if __name__ == "__main__":
    main()
