"""Runs the Dockerfile's build steps in a clean folder, where no engine can build an image.

`python docker/rehearse.py FOLDER` copies what `.dockerignore` lets through, makes the virtual environment, installs
as the RUN lines do, with FOLDER in the place of the image's root, and runs the program that the last stage starts. It
shows that the steps and their files are right; it does not show the base image, the user or the volumes.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def instructions(dockerfile: str) -> list[tuple[str, str]]:
    """(instruction, its argument), with continued lines joined."""
    joined = re.sub(r"\\\n", " ", "\n".join(line for line in dockerfile.splitlines() if not line.startswith("#")))
    return [
        (word, rest.strip()) for word, _, rest in (line.partition(" ") for line in joined.splitlines() if line)
    ]


def context() -> set[str]:
    """Names at the top level that the build may copy."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return {line[1:] for line in lines if line.startswith("!")}


def rehearse(folder: Path, python: str) -> Path:
    """Build in `folder`; returns the path of the program that the image would start. Raises for a failing step."""
    source, environment = folder / "src", folder / "opt"
    source.mkdir(parents=True)
    subprocess.run([python, "-m", "venv", environment], check=True)
    build = instructions((ROOT / "Dockerfile").read_text())
    end = next(i for i, (word, _) in enumerate(build) if word == "FROM" and i > 0)
    arguments: dict[str, str] = {}
    for word, rest in build[:end]:
        if word == "ARG":
            name, _, default = rest.partition("=")
            arguments[name] = default.strip('"')
        if word == "COPY":
            _copy(rest.split(), source)
        if word == "RUN" and "venv" not in rest:
            command = re.sub(r"\$\{TORCH_INDEX:\+.*?\"\}", "", rest)
            script = ["sh", "-ec", f'PATH="{environment}/bin:$PATH"; {command}']
            subprocess.run(script, cwd=source, env=os.environ | arguments, check=True)
    return environment / "bin" / "unisono"


def _copy(words: list[str], source: Path) -> None:
    *names, target = words
    for name in names:
        if name.split("/")[0] not in context():
            raise FileNotFoundError(f"COPY {name}: .dockerignore keeps it out")
        where = source if target == "./" else source / target
        if (ROOT / name).is_dir():
            shutil.copytree(ROOT / name, where, ignore=shutil.ignore_patterns("__pycache__"))
        else:
            shutil.copy(ROOT / name, where)


if __name__ == "__main__":
    program = rehearse(Path(sys.argv[1]).resolve(), sys.executable)
    subprocess.run([program, "--version"], check=True, cwd="/")
