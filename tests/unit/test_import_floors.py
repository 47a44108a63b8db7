"""Who may import whom: the floors of the house, read off the imports."""

from __future__ import annotations

import ast
from collections import Counter
from collections.abc import Mapping
from collections.abc import Set as AbstractSet
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]

# From the ground up. A module stands on the floor of its longest matching entry; it imports from its own
# floor and those below.
FLOORS = (
    (
        "ensemble_core.errors",
        "ensemble_core.config",
        "ensemble_core.config_file",
        "ensemble_core.config_paths",
        "ensemble_core.member_config",
        "ensemble_core.server_config",
        "ensemble_core.stats",
        "ensemble_core.registry",
        "ensemble_core.home",
        "ensemble_core.limits",
        "ensemble_core.section",
        "ensemble_core.hosts",
        "ensemble_core.adapter_config",
        "ensemble_core.council_config",
        "ensemble_core.roster",
        "ensemble_core.reasoning_config",
        "ensemble_core.identity",
    ),
    ("ensemble_core.text",),
    ("ensemble_core.transfer",),
    ("ensemble_core.members",),
    ("ensemble_core.transfer.build", "ensemble_core.transfer.report"),
    ("ensemble_core.fusion",),
    ("ensemble_core.decoding",),
    ("ensemble_core.streaming", "ensemble_core.crossing"),
    ("ensemble_core.recipes", "ensemble_core.permissions", "ensemble_core.speakers"),
    ("ensemble_core.refusals",),
    ("ensemble_core.admission", "ensemble_core.tokens"),
    ("ensemble_core.councils",),
    ("ensemble_core.engine",),
    ("ensemble_core.assembly", "ensemble_core.reloading"),
    ("ensemble_core.factory",),
    ("ensemble_core.doorway", "ensemble_core.reading"),
    ("ensemble_core.changes", "ensemble_core.member_reports"),
    ("ensemble_core.runtime",),
    ("ensemble_core.offline",),
    ("ensemble_core.llm",),
    ("ensemble_core.evaluation",),
    ("ensemble_core.fitting",),
)
EDGE_MAY_IMPORT = {
    "ensemble_core.runtime",
    "ensemble_core.config",
    "ensemble_core.config_file",
    "ensemble_core.server_config",
    "ensemble_core.errors",
    "ensemble_core.limits",
    "ensemble_core.stats",
    "ensemble_core.decoding.forms",
    "ensemble_core.decoding.parameters",
    "ensemble_core.decoding.sampling_params",
    "ensemble_core.decoding.requests",
    "ensemble_core.text.tools",
    "ensemble_core.text.variables",
}
CLI_MAY_IMPORT = EDGE_MAY_IMPORT | {
    "ensemble_core.transfer.build",
    "ensemble_core.members.loading.checkpoints",
    "ensemble_core.transfer.report",
    "ensemble_core.evaluation.run",
    "ensemble_core.fitting.run",
    "ensemble_core.llm",
}
TORCHLESS = (
    "ensemble_core/errors.py",
    "ensemble_core/config.py",
    "ensemble_core/config_file.py",
    "ensemble_core/member_config.py",
    "ensemble_core/server_config.py",
    "ensemble_core/hosts.py",
    "ensemble_core/adapter_config.py",
    "ensemble_core/council_config.py",
    "ensemble_core/stats.py",
    "ensemble_core/decoding/forms.py",
    "ensemble_core/text/tools.py",
    "ensemble_core/text/calls.py",
    "ensemble_core/text/reasoning.py",
    "ensemble_core/text/shown.py",
    "ensemble_core/text/variables.py",
    "ensemble_core/decoding/parameters.py",
    "ensemble_core/decoding/sampling_params.py",
    "ensemble_core/decoding/requests.py",
    "ensemble_core/decoding/logprobs.py",
    "ensemble_core/decoding/recipe.py",
    "ensemble_core/decoding/sequence.py",
    "ensemble_core/decoding/scheduler.py",
    "ensemble_core/decoding/pace.py",
    "ensemble_core/decoding/shares.py",
    "ensemble_core/decoding/capacity.py",
    "ensemble_core/decoding/fairness.py",
    "ensemble_core/decoding/perplexity.py",
)


def modules(package: str) -> list[Path]:
    found = sorted((ROOT / package).rglob("*.py"))
    assert found
    return found


def dotted(path: Path) -> str:
    return ".".join(path.relative_to(ROOT).with_suffix("").parts).removesuffix(".__init__")


def is_module(name: str) -> bool:
    base = ROOT.joinpath(*name.split("."))
    return base.with_suffix(".py").exists() or (base / "__init__.py").exists()


def imports(path: Path) -> set[str]:
    """The modules that a file imports, at its top, in functions or for type checkers."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import; write the whole name"
            assert node.module is not None
            inner = {f"{node.module}.{alias.name}" for alias in node.names}
            found |= {name for name in inner if is_module(name)} or {node.module}
    return found


def floor(module: str) -> int:
    matches = [
        (len(entry), level)
        for level, entries in enumerate(FLOORS)
        for entry in entries
        if module == entry or module.startswith(entry + ".")
    ]
    assert matches, f"{module} stands on no floor; add it to FLOORS"
    return max(matches)[1]


@pytest.mark.parametrize("path", modules("ensemble_core"), ids=dotted)
def test_imports_come_from_below(path: Path) -> None:
    ours = {name for name in imports(path) if name.partition(".")[0] in ("ensemble_core", "server")}
    if path.name == "__init__.py":
        assert not ours
        return
    for name in ours:
        assert not name.startswith("server"), f"{dotted(path)} imports {name}"
        assert floor(name) <= floor(dotted(path)), f"{dotted(path)} imports {name} from above"


def circles(graph: Mapping[str, AbstractSet[str]]) -> set[frozenset[str]]:
    """Sets of modules that reach each other by imports, and modules that import themselves."""
    reached = {module: _reached(module, graph) for module in graph}
    return {
        frozenset(other for other in reached[module] if module in reached.get(other, ()))
        for module in graph
        if module in reached[module]
    }


def _reached(module: str, graph: Mapping[str, AbstractSet[str]]) -> set[str]:
    found: set[str] = set()
    ahead = list(graph[module])
    while ahead:
        name = ahead.pop()
        if name not in found:
            found.add(name)
            ahead.extend(graph.get(name, ()))
    return found


def test_nothing_is_imported_in_a_circle() -> None:
    """Imports for type checkers and within functions count as well: they hide a circle and do not open it."""
    graph = {dotted(path): imports(path) for package in ("ensemble_core", "server") for path in modules(package)}
    assert circles(graph) == set()


def test_a_circle_is_seen() -> None:
    graph = {"a": {"b", "torch"}, "b": {"c"}, "c": {"b", "d"}, "d": set(), "e": {"e"}}
    assert circles(graph) == {frozenset("bc"), frozenset("e")}


@pytest.mark.parametrize("path", modules("server"), ids=dotted)
def test_the_edge_knows_the_engine_through_few_modules(path: Path) -> None:
    allowed = CLI_MAY_IMPORT if path.name == "cli.py" else EDGE_MAY_IMPORT
    assert {name for name in imports(path) if name.startswith("ensemble_core")} <= allowed


@pytest.mark.parametrize("path", [path for path in TORCHLESS if (ROOT / path).exists()])
def test_what_needs_no_torch_imports_none(path: str) -> None:
    assert not {name for name in imports(ROOT / path) if name.partition(".")[0] in ("torch", "transformers")}


def test_only_metrics_knows_prometheus() -> None:
    knowing = [
        dotted(path)
        for package in ("server", "ensemble_core")
        for path in modules(package)
        if any(name.startswith("prometheus_client") for name in imports(path))
    ]
    assert knowing == ["server.edge.metrics"]


def test_an_import_from_above_is_seen(tmp_path: Path) -> None:
    wrong = tmp_path / "wrong.py"
    wrong.write_text("def f():\n    from ensemble_core.fusion import base\n")
    assert imports(wrong) == {"ensemble_core.fusion.base"}
    assert floor("ensemble_core.fusion.base") > floor("ensemble_core.members.local")


def renamed(path: Path) -> set[tuple[str, str]]:
    """(name, what it is called here) of our classes and the abstract ones that a file imports under another name."""
    return {
        (alias.name, alias.asname)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ImportFrom)
        and (node.module or "").startswith(("ensemble_core", "server", "collections"))
        for alias in node.names
        if alias.asname and alias.name[0].isupper()
    } - {("Set", "AbstractSet")}  # as linters want it


@pytest.mark.parametrize("package", ["ensemble_core", "server", "benchmarks", "studies", "tests"])
def test_a_class_has_one_name(package: str) -> None:
    """Where the engine's `Sequence` and the abstract one meet, the latter is written `abc.Sequence`."""
    assert {dotted(path): renamed(path) for path in modules(package) if renamed(path)} == {}


def test_a_name_means_one_thing() -> None:
    """Two classes of one name cannot be told apart where they are used; an underscore before it does not help."""
    defined = Counter(
        node.name.lstrip("_")
        for package in ("ensemble_core", "server")
        for path in modules(package)
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8")))
        if isinstance(node, ast.ClassDef)
    )
    assert [name for name, number in defined.items() if number > 1] == []
