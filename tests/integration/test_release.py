"""The wheel and the sdist, at work away from the checkout; the lock, the list of components, the audit."""

from __future__ import annotations

import importlib.util
import json
import re
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import threading
import zipfile
from http.server import BaseHTTPRequestHandler, HTTPServer
from importlib import metadata
from pathlib import Path
from types import ModuleType

import httpx
import pytest
from packaging.requirements import Requirement
from packaging.utils import canonicalize_name
from processes import free_port, wait_until_ready

from ensemble_core.config import Config

ROOT = Path(__file__).parents[2]
CUDA_ONLY = ("nvidia-", "cuda-", "triton")


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
    kinds = {Path(name).suffix for name in zipfile.ZipFile(wheel).namelist() if ".dist-info/" not in name}
    docs = {".css", ".js", ".png", ".txt", ".md", ""}  # Swagger UI, with its licences
    playground = {".html", ".css", ".js", ".svg", ".json"}
    assert kinds == {".py", ".typed", ".jinja"} | docs | playground


def test_the_wheel_holds_the_playground_and_not_what_tests_it(dist: Path) -> None:
    (wheel,) = dist.glob("*.whl")
    names = zipfile.ZipFile(wheel).namelist()
    page = {f"server/playground/static/{name}" for name in ("index.html", "app.js", "base.css", "logo.svg")}
    assert page | {"server/playground/stored.json"} <= set(names)
    assert [name for name in names if "axe" in name] == []


@pytest.fixture(scope="module")
def unpacked(dist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    (sdist,) = dist.glob("*.tar.gz")
    folder = tmp_path_factory.mktemp("unpacked")
    with tarfile.open(sdist) as archive:
        archive.extractall(folder, filter="data")
    (root,) = folder.iterdir()
    return root


def test_the_sdist_holds_what_builds_and_tests(unpacked: Path) -> None:
    """All of the repository, and nothing that is made from it or fetched."""
    top = {path.name for path in unpacked.iterdir()}
    code = {"server", "ensemble_core", "benchmarks", "studies", "tests", "docs", "configs", "docker", "matrices"}
    files = {".ci", ".dockerignore", ".gitignore", "Dockerfile", "Makefile", "README.md", "CHANGELOG.md"}
    assert top == code | files | {"pyproject.toml", "constraints.txt", "PKG-INFO"}
    made = (".safetensors", ".pyc", ".gguf", ".whl", ".gz", ".log")
    learnt = unpacked / "configs" / "gates"
    assert [path for path in unpacked.rglob("*") if path.name.endswith(made) and path.parent != learnt] == []
    assert (learnt / "duet.safetensors").stat().st_size < 65_536


@pytest.mark.slow
def test_the_tests_of_the_sdist_import_nothing_from_the_checkout(unpacked: Path, installed: Path) -> None:
    """Collected by an interpreter that does not know the checkout, so a missing module is an error."""
    python = installed / "venv" / "bin" / "python"
    command = [python, "-m", "pytest", "--collect-only", "-q", "-p", "no:cacheprovider"]
    done = subprocess.run(command, cwd=unpacked, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr
    assert re.search(r"\d+ tests collected", done.stdout)


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


@pytest.mark.slow
def test_the_wheel_serves_the_demo_pair(installed: Path, demo_config: Config) -> None:
    """Models from the cache, matrices and configuration in folders of one's own; stopped by SIGTERM."""
    shutil.copytree(demo_config.matrices.folder, installed / "made" / "matrices")
    (installed / "etc").mkdir()
    text = (ROOT / "configs" / "demo.yaml").read_text().replace("../matrices", "../made/matrices")
    (installed / "etc" / "mine.yaml").write_text(text)
    log, port = installed / "server.log", free_port()
    command = [installed / "venv/bin/unisono", "serve", "--config", "etc/mine.yaml", "--port", str(port)]
    with log.open("wb") as output:
        process = subprocess.Popen(command, cwd=installed, stdout=output, stderr=output)
    try:
        wait_until_ready(process, f"http://127.0.0.1:{port}", log)
        body = {"model": "duet", "prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}
        reply = httpx.post(f"http://127.0.0.1:{port}/v1/completions", json=body, timeout=60)
        assert reply.status_code == 200, reply.text
        assert "Paris" in reply.json()["choices"][0]["text"]
        process.terminate()
        assert process.wait(timeout=60) == 0, log.read_text()
    finally:
        process.kill()
        process.wait()


def locked() -> dict[str, str]:
    """Name -> version of constraints.txt; a name that stands twice is an error."""
    requirements = [
        Requirement(line) for line in (ROOT / "constraints.txt").read_text().splitlines() if line[:1] not in "#"
    ]
    pins = [(canonicalize_name(each.name), str(each.specifier).removeprefix("==")) for each in requirements]
    assert len(pins) == len(dict(pins)), "a package is pinned twice"
    return dict(pins)


def without_build(version: str) -> str:
    """torch's 2.13.0+cpu is pinned as 2.13.0."""
    return version.partition("+")[0]


def test_what_is_installed_is_what_is_locked() -> None:
    """All that unisono[dev] pulls in, found by walking the requirements, with the version of constraints.txt.

    Not pip, which the venv brings, nor what only CUDA builds of torch need.
    """
    pins, found = locked(), {}
    queue = [Requirement("unisono[dev]")]
    seen: set[tuple[str, str]] = set()
    while queue:
        requirement = queue.pop()
        name = canonicalize_name(requirement.name)
        if name != "unisono":
            found[name] = without_build(metadata.version(name))
        for extra in ("", *requirement.extras):
            if (name, extra) not in seen:
                seen.add((name, extra))
                queue += _required(name, extra)
    found = {name: version for name, version in found.items() if not (name == "pip" or name.startswith(CUDA_ONLY))}
    assert len(found) > 50
    assert {name: (version, pins.get(name)) for name, version in found.items() if pins.get(name) != version} == {}


def _required(name: str, extra: str) -> list[Requirement]:
    wanted = [Requirement(text) for text in metadata.requires(name) or []]
    return [each for each in wanted if each.marker is None or each.marker.evaluate({"extra": extra})]


@pytest.mark.slow
def test_the_list_of_components_has_the_locked_versions(tmp_path: Path) -> None:
    """As `make release` writes it, and without a path of this machine."""
    out = tmp_path / "unisono.cdx.json"
    tool = Path(sys.executable).parent / "cyclonedx-py"
    options = ["--pyproject", ROOT / "pyproject.toml", "--output-reproducible", "-o", out]
    subprocess.run([tool, "environment", *options, sys.executable], check=True, capture_output=True, timeout=120)
    listed = json.loads(out.read_text())
    versions = {canonicalize_name(each["name"]): without_build(each["version"]) for each in listed["components"]}
    pins = locked()
    assert listed["bomFormat"] == "CycloneDX"
    assert listed["metadata"]["component"]["name"] == "unisono"
    assert {"torch", "transformers", "fastapi", "safetensors"} <= versions.keys()
    assert [name for name, version in versions.items() if pins.get(name, version) != version] == []
    assert str(ROOT) not in out.read_text()


def audit() -> ModuleType:
    spec = importlib.util.spec_from_file_location("audit", ROOT / ".ci" / "audit.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.mark.parametrize(
    ("status", "body", "answers"),
    [
        (200, b'{"vulnerabilities": [{"id": "PYSEC-1"}]}', True),
        (200, b'{"vulnerabilities": []}', False),
        (200, b"<html>", False),
        (404, b"", False),
    ],
)
def test_the_audit_sees_whether_its_service_has_advisories(status: int, body: bytes, answers: bool) -> None:
    class Service(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_response(status)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    with HTTPServer(("127.0.0.1", 0), Service) as server:
        threading.Thread(target=server.handle_request, daemon=True).start()
        assert audit().answers(f"http://127.0.0.1:{server.server_port}") is answers
    assert not audit().answers(f"http://127.0.0.1:{free_port()}")


@pytest.mark.slow
def test_no_locked_package_has_a_known_vulnerability() -> None:
    """Only where PyPI's advisory service can be asked; elsewhere the reason of the skip says that nothing was."""
    done = subprocess.run([sys.executable, ROOT / ".ci" / "audit.py"], capture_output=True, text=True, timeout=600)
    if done.returncode == audit().UNREACHABLE:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stdout + done.stderr
