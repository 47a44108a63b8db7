"""llama.cpp beside the comparison: the demo's own GGUF files, through the prebuilt library of an npm package.

Another precision (4 bits a weight where ours has 16), so its figures stand beside the others and are held against no
bound. Needs node and npm; without them there is no such row.
"""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from pathlib import Path
from typing import Any

from benchmarks.ledger import ROOT
from ensemble_core.members.loading.demo_models import PREFIX, demo_model, make_gguf

logger = logging.getLogger(__name__)

PACKAGE = "node-llama-cpp@3.22.1"
SCRIPT = ROOT / "benchmarks" / "anchor" / "llama_side.mjs"


def install(folder: Path) -> bool:
    """Whether the package is in `folder` now."""
    if shutil.which("npm") is None:
        logger.warning("llama.cpp is left out: there is no npm")
        return False
    command = ["npm", "install", "--no-audit", "--no-fund", "--ignore-scripts", "--prefix", str(folder), PACKAGE]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        logger.warning("llama.cpp is left out: npm said %s", done.stderr[-500:])
    return done.returncode == 0


def llama_seconds(package: Path, model: str, work: Path, scratch: Path) -> dict[str, list[float]]:
    """What -> seconds of each repeat, of a demo model. Raises SystemExit where the child fails."""
    name = model.removeprefix(PREFIX)
    gguf = scratch / f"{name}.gguf"
    if not gguf.exists():
        make_gguf(demo_model(model), gguf)
    done = subprocess.run(["node", SCRIPT, package, gguf, work], capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"llama.cpp failed with {done.returncode}:\n{done.stderr[-3000:]}")
    answer: dict[str, Any] = json.loads(done.stdout.strip().splitlines()[-1])
    seconds: dict[str, list[float]] = answer["seconds"]
    return seconds
