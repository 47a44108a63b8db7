"""The wheel and the sdist: what is in them, and that the wheel works away from the checkout."""

from __future__ import annotations

import re
import subprocess
import sys
import sysconfig
import tarfile
import zipfile
from pathlib import Path

import pytest
from packaging.requirements import Requirement

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def dist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("dist")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return folder


@pytest.fixture(scope="module")
def installed(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A virtual environment with the wheel; what it depends on is lent by this one."""
    folder = tmp_path_factory.mktemp("installed")
    subprocess.run([sys.executable, "-m", "venv", folder / "venv"], check=True)
    python = folder / "venv" / "bin" / "python"
    (wheel,) = dist.glob("*.whl")
    subprocess.run([python, "-m", "pip", "install", "-q", "--no-deps", "--no-index", wheel], check=True)
    (site,) = (folder / "venv" / "lib").glob("python*/site-packages")
    (site / "lent.pth").write_text(sysconfig.get_path("purelib"))
    return folder


def unisono(installed: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(installed / "venv" / "bin" / "unisono"), *arguments]
    return subprocess.run(command, cwd=installed, capture_output=True, text=True, timeout=120)


def test_the_wheel_holds_the_packages_alone(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = {name.split("/")[0] for name in zipfile.ZipFile(wheel).namelist()}
    version = re.fullmatch(r"unisono-(.+)-py3-none-any\.whl", wheel.name)
    assert version is not None
    assert names == {"server", "ensemble_core", f"unisono-{version[1]}.dist-info"}


def test_the_sdist_holds_what_builds_and_tests(dist: Path) -> None:
    (sdist,) = dist.glob("*.tar.gz")
    with tarfile.open(sdist) as archive:
        names = {name.split("/")[1] for name in archive.getnames() if "/" in name}
        assert not [name for name in archive.getnames() if name.endswith((".safetensors", ".pyc"))]
    assert {
        "pyproject.toml",
        "README.md",
        "constraints.txt",
        "configs",
        "server",
        "ensemble_core",
        "tests",
    } <= names
    assert not names & {".venv", "dist", ".git"}


def test_the_wheel_works_elsewhere(installed: Path) -> None:
    done = unisono(installed, "--version")
    assert re.fullmatch(r"unisono \d+\.\d+\.\d+", done.stdout.strip()), done.stderr
    code = "import server.cli, ensemble_core; print(server.__file__, ensemble_core.__file__)"
    python = installed / "venv" / "bin" / "python"
    found = subprocess.run([python, "-c", code], cwd=installed, capture_output=True, text=True, check=True).stdout
    assert all(str(installed) in path for path in found.split())


def test_without_a_configuration_it_says_what_to_do(installed: Path) -> None:
    done = unisono(installed, "serve")
    assert (done.returncode, len(done.stderr.splitlines())) == (1, 1)
    assert "pass --config FILE" in done.stderr


def test_a_configuration_of_ones_own_names_what_is_missing(installed: Path) -> None:
    config = installed / "mine.yaml"
    config.write_text("members: {a: {model: ./nothing, device: cpu}}\n")
    done = unisono(installed, "serve", "--config", str(config), "--port", "0")
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "nothing" in done.stderr.splitlines()[-1]


def test_every_package_that_is_installed_is_locked() -> None:
    """constraints.txt pins what the extras pull in, so that two installs are the same."""
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    locked = {Requirement(line).name.lower().replace("_", "-"): line for line in lines if line and line[0] != "#"}
    listed = subprocess.run(
        [sys.executable, "-m", "pip", "freeze", "--exclude-editable"], capture_output=True, text=True, check=True
    ).stdout.splitlines()
    pinned = [line for line in listed if "==" in line and not line.startswith(("nvidia-", "cuda-", "triton"))]
    unlocked = [line for line in pinned if line.split("==")[0].lower().replace("_", "-") not in locked]
    assert unlocked == [], "run make lock"
