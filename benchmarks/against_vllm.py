"""Our ensemble against the sum of vLLM's runs of its members alone, vLLM at its best setting, on the same machine.

    make bench-vllm        (makes .venv-vllm, then runs this)
    python -m benchmarks.against_vllm [--config configs/demo.yaml] [--data ../shared/data] [--rounds 2] [--quick]

Engine against engine: in turns, a process each, our ensemble, each of its members in our engine, and each member in
vLLM's CPU build under every setting: eager and compiled, the engine in the process that steps it and in one of its
own. Then server against server over HTTP, the same client for both. Prompts are real prose, the same text on both
sides, each member counting its own tokens; no side has a prefix cache. The setting of vLLM's that counts is, for each
figure and member, the best. llama.cpp's steps on the demo's own 4-bit files stand beside these. Medians over all
rounds. Writes benchmarks/results/against_vllm.png.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import median
from typing import Any

import yaml
from tqdm import tqdm

from benchmarks import prose
from benchmarks.anchor.llama import install, llama_seconds
from benchmarks.anchor.picture import draw
from benchmarks.anchor.servers import ENVIRONMENT, server_seconds
from benchmarks.anchor.work import Plan, lengths
from benchmarks.ledger import ROOT, Check, Findings, Value, arguments, results_folder
from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.members.loading.checkpoints import load_tokenizer, resolve_folder
from ensemble_core.members.loading.demo_models import PREFIX

PYTHON = ROOT / ".venv-vllm" / "bin" / "python"
DATA = ROOT.parent / "shared" / "data"
ENSEMBLE = "duet"
SETTINGS = {
    f"{form}, {place}": (["--eager"] if form == "eager" else [], multi)
    for form in ("eager", "compiled")
    for place, multi in (("in process", "0"), ("own process", "1"))
}

Seconds = dict[str, list[float]]  # what -> of each repeat
Told = dict[tuple[str, str], Seconds]  # (model, who runs it) -> all rounds
OURS, LLAMA = "ours", "llama.cpp, 4 bits"


def texts(config: Config, model: str, member: str, plan: Plan, data: Path) -> list[dict[int, list[int]]]:
    """Of each prompt, length -> `member`'s ids of the text that has so many tokens in the model's main member."""
    ensemble = config.ensembles.get(model)
    main = ensemble.main if ensemble else model
    counts, own = (load_tokenizer(name, config.members[name]) for name in (main, member))
    cut = prose.stories(counts, data, plan.num_prompts, plan.longest)
    if main == member:
        return [{n: ids[:n] for n in lengths(plan)} for ids in cut]
    return [{n: own.encode(_text(counts, ids[:n])) for n in lengths(plan)} for ids in cut]


def _text(tokenizer: Any, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(ids, skip_special_tokens=True))


def child(command: Sequence[str | Path], multi: str = "0") -> dict[str, Any]:
    """The JSON of a child's last line. Raises SystemExit with the end of what it said where it fails."""
    own = {"VLLM_LOGGING_LEVEL": "ERROR", "VLLM_ENABLE_V1_MULTIPROCESSING": multi}
    environment = os.environ | ENVIRONMENT | own
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{command[0]} failed with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    return answer


class Contest:
    """Who takes part, and the work of each as a file."""

    def __init__(self, args: argparse.Namespace, plan: Plan, folder: Path) -> None:
        self.plan, self._folder, self.path = plan, folder, folder / "ours.yaml"
        self.config = _with_rows(load_config(args.config), plan.num_prompts)
        self.path.write_text(yaml.safe_dump(self.config.model_dump(mode="json", exclude_defaults=True)))
        self.ensemble, self._data = args.ensemble, args.data
        self.members = list(self.config.ensembles[args.ensemble].members)

    def engines(self) -> dict[tuple[str, str], tuple[list[str | Path], str]]:
        """(model, who) -> its command, and whether vLLM's engine has a process of its own."""
        found: dict[tuple[str, str], tuple[list[str | Path], str]] = {}
        for model in (self.ensemble, *self.members):
            work = self.work(self.main_of(model))
            own: list[str | Path] = [sys.executable, "-m", "benchmarks.anchor.our_side", self.path, model, work]
            found[model, OURS] = (own, "0")
        for member in self.members:
            folder, work = resolve_folder(self.config.members[member]), self.work(member)
            for setting, (options, multi) in SETTINGS.items():
                command: list[str | Path] = [PYTHON, "-m", "benchmarks.anchor.vllm_side", folder, work, *options]
                found[member, setting] = (command, multi)
        return found

    def main_of(self, model: str) -> str:
        """The member that reads a model's prompts."""
        return self.config.ensembles[model].main if model in self.config.ensembles else model

    def texts(self, member: str) -> list[dict[int, list[int]]]:
        """Every prompt in a member's tokens; see `texts`."""
        return texts(self.config, self.ensemble, member, self.plan, self._data)

    def work(self, member: str) -> Path:
        """The file of what a member is to do."""
        path = self._folder / f"{member}.json"
        if not path.exists():
            path.write_text(json.dumps({"plan": self.plan.as_json(), "texts": self.texts(member)}))
        return path


def _with_rows(config: Config, num: int) -> Config:
    """A place for every prompt of a run, as vLLM has it, and no prefix cache."""
    scheduler = config.scheduler.model_copy(update={"max_running": num, "prefix_reuse": False})
    grown = num / config.scheduler.max_running
    members = {
        name: member.model_copy(update={"kv_memory": int(member.kv_memory * grown)})
        if isinstance(member.kv_memory, int)
        else member
        for name, member in config.members.items()
    }
    return config.model_copy(update={"scheduler": scheduler, "members": members})


def best(told: Told, model: str, what: str) -> tuple[float, str]:
    """Median seconds of vLLM's best setting, and which it was."""
    settings = [
        who for name, who in told if name == model and who not in (OURS, LLAMA) and what in told[name, who]
    ]
    return min((median(told[model, who][what]), who) for who in settings)


def ratio_row(told: Told, contest: Contest, what: str, title: str) -> dict[str, Value]:
    """Our ensemble against the sum of vLLM's best; milliseconds."""
    theirs = {member: best(told, member, what) for member in contest.members}
    total, ours = sum(seconds for seconds, _ in theirs.values()), median(told[contest.ensemble, OURS][what])
    row: dict[str, Value] = {"what": title}
    for member, (seconds, who) in theirs.items():
        row |= {f"vLLM {member} ms": 1e3 * seconds, f"setting for {member}": who}
    row |= {f"our {member} ms": 1e3 * median(told[member, OURS][what]) for member in contest.members}
    return row | {"vLLM sum ms": 1e3 * total, f"our {contest.ensemble} ms": 1e3 * ours, "ours / sum": ours / total}


def prefill_rows(told: Told, contest: Contest) -> list[dict[str, Value]]:
    """Tokens a second of each member's prompts alone, ours and vLLM's."""
    rows: list[dict[str, Value]] = []
    for member in contest.members:
        tokens = sum(
            len(text[contest.plan.prefill.length]) for text in contest.texts(member)[: contest.plan.prefill.num]
        )
        theirs, who = best(told, member, "prefill")
        ours = median(told[member, OURS]["prefill"])
        row: dict[str, Value] = {"member": member, "prompt tokens": tokens, "vLLM tokens/s": tokens / theirs}
        rows.append(row | {"setting": who, "our tokens/s": tokens / ours, "ours / vLLM": theirs / ours})
    return rows


def all_settings(told: Told, served: Told) -> list[dict[str, Value]]:
    """Every contestant's medians, in milliseconds; nothing where it was not measured."""
    columns = list(dict.fromkeys(what for seconds in told.values() for what in seconds))
    return [
        {"model": model, "who": who}
        | {what: 1e3 * median(seconds[what]) if what in seconds else None for what in columns}
        for (model, who), seconds in (told | _apart(served)).items()
    ]


def _apart(served: Told) -> Told:
    """Servers under names of their own."""
    return {
        (model, who if who.endswith("server") else f"{who}, server"): each for (model, who), each in served.items()
    }


def _checks(rows: Mapping[str, Sequence[Mapping[str, Value]]]) -> list[Check]:
    checks = [
        Check(f"{row['what']}: ours / sum of vLLM's", float(str(row["ours / sum"])), "<=", 1.0)
        for title in ("engines", "servers")
        for row in rows[title]
    ]
    return checks + [
        Check(f"prefill of {row['member']}: tokens/s over vLLM's", float(str(row["ours / vLLM"])), ">=", 1.0)
        for row in rows["prefill"]
    ]


def measure(args: argparse.Namespace, plan: Plan) -> Findings:
    """All rounds of all contestants."""
    versions: dict[str, Any] = {}
    told: Told = {}
    with tempfile.TemporaryDirectory() as folder:
        contest = Contest(args, plan, Path(folder))
        engines = contest.engines()
        with tqdm(total=args.rounds * len(engines), unit="process", disable=None) as bar:
            for _ in range(args.rounds):
                for key, (command, multi) in engines.items():
                    bar.set_description(", ".join(key))
                    answer = child(command, multi)
                    bar.write(f"{', '.join(key)}: {json.dumps(answer['seconds'])}")
                    for what, seconds in answer.pop("seconds").items():
                        told.setdefault(key, {}).setdefault(what, []).extend(seconds)
                    versions |= answer
                    bar.update()
        _add_llama(told, contest, args.rounds)
        served = server_seconds(contest, args.rounds) if args.servers else {}
    titles = {f"step {batch}": f"step, B = {batch}" for batch in plan.batches}
    titles |= {"first": f"first token of {plan.first.length}", **{run.name: run.name for run in plan.whole}}
    tables: dict[str, list[dict[str, Value]]] = {
        "engines": [ratio_row(told, contest, what, title) for what, title in titles.items()],
        "prefill": prefill_rows(told, contest),
        "servers": [ratio_row(served, contest, run.name, f"{run.name}, HTTP") for run in plan.whole if served],
        "settings": all_settings(told, served),
    }
    draw([*tables["engines"], *tables["servers"]], args.ensemble, _picture(args.quick))
    settings = {"rounds": args.rounds, "repeats": plan.repeats, "context": plan.context, "quick": args.quick}
    return Findings("against_vllm", tables, _checks(tables), settings | versions)


def _add_llama(told: Told, contest: Contest, rounds: int) -> None:
    """llama.cpp's figures of the members that are demo models, where its package can be had."""
    demos = {name: contest.config.members[name].model for name in contest.members}
    with tempfile.TemporaryDirectory() as scratch:
        package = Path(scratch)
        if not all(model.startswith(PREFIX) for model in demos.values()) or not install(package):
            return
        for member, model in rounds * list(demos.items()):
            for what, seconds in llama_seconds(package, model, contest.work(member), package).items():
                told.setdefault((member, LLAMA), {}).setdefault(what, []).extend(seconds)


def _picture(quick: bool) -> Path:
    return results_folder("benchmarks", quick) / "against_vllm.png"


def main() -> None:
    """Measure and print."""
    parser = arguments(__doc__)
    parser.add_argument(
        "--data", type=Path, default=DATA, help="folder of the development sets, whose prose is read"
    )
    parser.add_argument("--ensemble", default=ENSEMBLE)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--repeats", type=int, default=1, help="of all runs in one process")
    parser.add_argument("--servers", action=argparse.BooleanOptionalAction, default=True, help="over HTTP as well")
    args = parser.parse_args()
    if not PYTHON.exists():
        raise SystemExit("vLLM is not installed beside this project; run `make bench-vllm`")
    args.rounds = 1 if args.quick else args.rounds
    plan = Plan(repeats=args.repeats)
    measure(args, plan.quick() if args.quick else plan).print()


if __name__ == "__main__":
    main()
