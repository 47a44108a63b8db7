"""The command line: `unisono serve | playground | batch | build | pull | generate | evaluate | tune | fit | inspect`.

Heavy imports are inside the commands, so that `unisono --help` is instant and so that the switches for progress
bars are set before the libraries read them. A UnisonoError becomes one line on stderr and exit code 1.
"""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Callable
from contextlib import closing
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

import typer

from ensemble_core.config import Config
from ensemble_core.config_file import load_config
from ensemble_core.decoding.sampling_params import PARAMETERS, SamplingParams
from ensemble_core.errors import ConfigError
from ensemble_core.server_config import ServerConfig
from server.terminal import DEFAULT_CONFIG, ConfigPath, load, load_quietly, one_line_errors, say

if TYPE_CHECKING:
    from ensemble_core.llm import LLM
    from ensemble_core.transfer.build import BuildReport

app = typer.Typer(
    help="Several language models answer as one.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
)

logger = logging.getLogger(__name__)

_KEY_VARIABLES = ("UNISONO_API_KEY", "UNISONO_API_KEYS")  # clients use the first one, too


def main() -> None:
    """Entry point of `unisono`."""
    app()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"unisono {version('unisono')}")
        raise typer.Exit


@app.callback()
def _before(
    _version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Show the version.")
    ] = False,
) -> None:
    if not sys.stderr.isatty():
        os.environ.setdefault("TQDM_DISABLE", "1")
        os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")


@app.command()
def serve(
    config: ConfigPath = DEFAULT_CONFIG,
    host: Annotated[str | None, typer.Option(help="Replaces server.host.")] = None,
    port: Annotated[
        int | None, typer.Option(min=0, max=65535, help="Replaces server.port; 0 picks a free port.")
    ] = None,
    root_path: Annotated[str | None, typer.Option(help="Replaces server.root_path.")] = None,
    api_key: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="An API key, in addition to those of UNISONO_API_KEY and UNISONO_API_KEYS; may be repeated. "
            "Each may hold several keys, separated by commas.",
        ),
    ] = None,
    api_key_file: Annotated[Path | None, typer.Option(help="Replaces server.api_key_file.")] = None,
    cors_origin: Annotated[
        list[str] | None, typer.Option(help="Replaces server.cors_origins; may be repeated.")
    ] = None,
    tls_cert_file: Annotated[Path | None, typer.Option(help="Replaces server.tls_cert_file.")] = None,
    tls_key_file: Annotated[Path | None, typer.Option(help="Replaces server.tls_key_file.")] = None,
    tls_key_password_env: Annotated[str | None, typer.Option(help="Replaces server.tls_key_password_env.")] = None,
) -> None:
    """Load the models and serve them over HTTP until a signal arrives."""

    def chosen(settings: Config) -> Config:
        server = _chosen(
            settings.server,
            host=host,
            port=port,
            root_path=root_path,
            api_keys=_all_keys(settings.server, api_key),
            api_key_file=api_key_file,
            cors_origins=cors_origin or None,
            tls_cert_file=tls_cert_file,
            tls_key_file=tls_key_file,
            tls_key_password_env=tls_key_password_env,
        )
        return settings.model_copy(update={"server": server})

    with one_line_errors():
        _serve(chosen(load(config)), lambda: chosen(load_config(config)))


def _chosen(server: ServerConfig, **options: object) -> ServerConfig:
    """The server's section, with its fields replaced by the options that were given."""
    return server.replaced(**{name: value for name, value in options.items() if value is not None})


def _all_keys(server: ServerConfig, given: list[str] | None) -> list[object] | None:
    """The keys of the YAML, the command line and the environment. All count; each may hold several.

    Raises ConfigError for a source without a key, so that an empty secret does not open the server.
    """
    sources = [("--api-key", keys) for keys in given or []]
    sources += [(name, os.environ[name]) for name in _KEY_VARIABLES if name in os.environ]
    more: list[str] = []
    for name, keys in sources:
        found = [key.strip() for key in keys.split(",") if key.strip()]
        if not found:
            raise ConfigError(f"{name}: is set and holds no key; give one, or remove it to serve without keys")
        more += found
    return [*server.api_keys, *more] if more else None


def _serve(settings: Config, read: Callable[[], Config]) -> None:
    """read: the same configuration from its file as it is then."""
    from ensemble_core.runtime import Runtime
    from server.edge.app import create_app
    from server.edge.metrics import PrometheusMetrics
    from server.edge.serving import serve as serve_app

    metrics = PrometheusMetrics()
    runtime = Runtime(settings, metrics.record)
    announce = say if settings.server.log_format == "text" else logger.info
    serve_app(create_app(runtime, settings.server, metrics), runtime, settings.server, announce, read)


@app.command()
def playground(
    demo: Annotated[bool, typer.Option("--demo", help="Replay the answers that come with the package.")] = False,
    host: Annotated[str, typer.Option(help="Address to listen on.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(min=0, max=65535, help="0 picks a free port.")] = 8000,
) -> None:
    """Show the playground without models: stored answers, token by token. `unisono serve` has it at /."""
    with one_line_errors():
        if not demo:
            raise ConfigError(
                "`unisono serve` shows the playground of its models at /; for stored answers add --demo"
            )

        from server.edge import logs
        from server.playground.demo import serve_demo

        logs.configure("warning")
        serve_demo(ServerConfig().replaced(host=host, port=port, access_log=False), say)


@app.command()
def batch(
    requests: Annotated[
        Path, typer.Option("--input", help="JSONL, a request a line: custom_id, method, url, body.")
    ],
    output: Annotated[Path, typer.Option(help="JSONL, an answer a line, in the order in which they come.")],
    config: ConfigPath = DEFAULT_CONFIG,
    errors: Annotated[Path | None, typer.Option(help="Takes the lines that failed.  [default: --output]")] = None,
    resume: Annotated[
        bool, typer.Option("--resume", help="Keep the answers that --output has, and do all other lines.")
    ] = False,
) -> None:
    """Answer a file of requests in OpenAI's batch format, without a server."""
    with one_line_errors():
        settings = load_quietly(config)

        from server.batches.command import BatchFiles, run_batch

        code = run_batch(settings, config, BatchFiles(requests, output, errors, resume), say)
    raise typer.Exit(code)


@app.command()
def build(
    config: ConfigPath = DEFAULT_CONFIG,
    force: Annotated[
        bool, typer.Option("--force", help="Also write matrices that retain too little mass.")
    ] = False,
    missing: Annotated[
        bool, typer.Option("--missing", help="Build only matrices that are missing or do not fit.")
    ] = False,
) -> None:
    """Build the transfer matrices."""
    with one_line_errors():
        settings = load(config)

        from ensemble_core.transfer.build import build_matrices

        for report in build_matrices(settings, force=force, only_missing=missing):
            typer.echo(_report_line(report))


def _report_line(report: BuildReport) -> str:
    where = f"{report.member}: {report.path} ({report.num_bytes / 1e6:.1f} MB, "
    kept = f"retained mass: median {report.quality.median:.1%}, anchors {report.quality.median_anchors:.1%})"
    return where + kept + (" fits, kept" if report.skipped else f" built in {report.seconds:.0f} s")


@app.command()
def pull(config: ConfigPath = DEFAULT_CONFIG) -> None:
    """Download every member's files."""
    with one_line_errors():
        settings = load(config)

        from ensemble_core.members.loading import checkpoints

        for name, folder in checkpoints.pull(settings):
            typer.echo(f"{name}: {folder}")


@app.command()
def generate(
    prompts: Annotated[list[str], typer.Argument(metavar="PROMPT...", help="One or more texts.")],
    config: ConfigPath = DEFAULT_CONFIG,
    model: Annotated[str | None, typer.Option(help="An ensemble or a member; by default the first.")] = None,
    max_tokens: Annotated[int, typer.Option(min=1, help="Maximum number of tokens of each completion.")] = 64,
    temperature: Annotated[float, typer.Option(help=PARAMETERS["temperature"].describe())] = 1.0,
    seed: Annotated[int | None, typer.Option(help="Makes sampling reproducible.")] = None,
    stop: Annotated[list[str] | None, typer.Option(help="Ends a completion; may be repeated.")] = None,
    stream: Annotated[bool, typer.Option("--stream", help="Print text as it is generated.")] = False,
) -> None:
    """Continue prompts without a server."""
    with one_line_errors():
        from server.edge import logs

        params = SamplingParams(max_tokens=max_tokens, temperature=temperature, stop=tuple(stop or ()), seed=seed)
        logs.configure("warning")

        from ensemble_core.llm import LLM

        with closing(LLM(config)) as llm:
            (_print_stream if stream else _print_whole)(llm, prompts, params, model)


def _print_stream(llm: LLM, prompts: list[str], params: SamplingParams, model: str | None) -> None:
    """One prompt after the other, text as it is generated; an empty line between them."""
    for rank, prompt in enumerate(prompts):
        typer.echo("\n" * (rank > 0), nl=False)
        for piece in llm.stream(prompt, params, model=model):
            typer.echo(piece, nl=False)
            sys.stdout.flush()
        typer.echo()


def _print_whole(llm: LLM, prompts: list[str], params: SamplingParams, model: str | None) -> None:
    """All prompts in one batch; an empty line between their texts."""
    completions = llm.generate(prompts, params, model=model)
    typer.echo("\n\n".join(completion.text for completion in completions))


TaskSpecs = Annotated[
    list[str],
    typer.Option(
        "--task", help="NAME=FILE.jsonl or NAME:KIND=FILE.jsonl (text, choice, number, answer); may be repeated."
    ),
]
SplitChoice = Annotated[
    Literal["even", "odd", "all"], typer.Option(help="Records with even or odd numbers (from 0), or all.")
]
LimitOption = Annotated[int | None, typer.Option(min=1, help="Maximum number of items of each task.")]
ShotsOption = Annotated[int, typer.Option(min=0, help="Number of answered examples before each question.")]
SkipBad = Annotated[bool, typer.Option("--skip-bad", help="Skip invalid records, with a warning.")]
CacheFolder = Annotated[
    Path | None, typer.Option("--cache", help="Folder of stored scores; by default scores in $UNISONO_HOME.")
]


@app.command()
def evaluate(
    task: TaskSpecs,
    config: ConfigPath = DEFAULT_CONFIG,
    model: Annotated[
        list[str] | None,
        typer.Option(
            show_default=False,
            help="An ensemble or a member, or a variant: 'duet?weights.a=0.7&options.steps=6'. By default all.",
        ),
    ] = None,
    measure: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="bits (per byte) or score (right answers); by default both."),
    ] = None,
    split: SplitChoice = "all",
    limit: LimitOption = None,
    shots: ShotsOption = 0,
    out: Annotated[Path | None, typer.Option(help="Folder for items, tables, JSON and a plot.")] = None,
    resume: Annotated[bool, typer.Option("--resume", help="Continue the run in --out.")] = False,
    plot: Annotated[bool, typer.Option(help="Draw results.png.")] = True,
    skip_bad: SkipBad = False,
    cache: CacheFolder = None,
) -> None:
    """Compare ensembles and members on tasks, with 95 % intervals."""
    with one_line_errors():
        settings = load_quietly(config)

        from ensemble_core.evaluation import run

        chosen = run.Chosen(task, split, limit, shots, cache, skip_bad)
        goal = run.Destination(out, resume, plot)
        typer.echo(run.evaluate_models(settings, chosen, model or [], run.parse_measures(measure or []), goal))


@app.command()
def tune(
    ensemble: Annotated[str, typer.Option(help="The ensemble whose weights to tune.")],
    task: TaskSpecs,
    config: ConfigPath = DEFAULT_CONFIG,
    method: Annotated[
        Literal["nll", "score", "swarm", "gate"],
        typer.Option(
            help="nll: minimise the negative log-likelihood. score: weights in proportion to accuracy. "
            "swarm: weights and fusion options (--vary) by particle swarm, for the same likelihood. "
            "gate: learn weights of each place, see docs/methods.md."
        ),
    ] = "nll",
    positions: Annotated[
        int, typer.Option(min=100, help="Number of shared positions that nll uses, spread over the documents.")
    ] = 5000,
    vary: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="With swarm: a fusion option and its range, as alpha=0.2..3.0."),
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="With swarm: points to try.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the swarm, or of the gate.")] = 0,
    split: SplitChoice = "even",
    limit: LimitOption = None,
    shots: ShotsOption = 0,
    write: Annotated[
        bool, typer.Option("--write", help="Write the weights into the configuration file, or the gate to --out.")
    ] = False,
    out: Annotated[
        Path | None,
        typer.Option(help="With gate: a file. By default the ensemble's artefact, else gates/ beside the file."),
    ] = None,
    force: Annotated[
        bool, typer.Option("--force", help="With gate: write it even if its gain may be chance.")
    ] = False,
    skip_bad: SkipBad = False,
    cache: CacheFolder = None,
) -> None:
    """Find an ensemble's weights on one half of the tasks, and report on the other half."""
    with one_line_errors():
        settings = load_quietly(config)

        from ensemble_core.evaluation import run

        chosen = run.Chosen(task, split, limit, shots, cache, skip_bad)
        if method != "swarm" and vary:
            raise ConfigError(f"--vary only acts with --method swarm, not {method}")
        if method != "gate" and (out is not None or force):
            raise ConfigError(f"--out and --force only act with --method gate, not {method}")
        goal = config if write else None
        if method == "gate":
            from ensemble_core.fitting.run import gate_path, tune_gate

            path = (out or gate_path(settings, ensemble, config)) if write else None
            typer.echo(tune_gate(settings, chosen, ensemble, seed, path, force))
        elif method == "swarm":
            from ensemble_core.fitting.run import SwarmSearch, tune_options

            search = SwarmSearch(tuple(vary or ()), positions, budget, seed)
            typer.echo(tune_options(settings, chosen, ensemble, search, goal))
        else:
            typer.echo(run.tune_ensemble(settings, chosen, ensemble, method, positions, goal))


@app.command()
def fit(
    council: Annotated[str, typer.Option(help="A council of kind route (by linear or clusters), vote or graph.")],
    task: TaskSpecs,
    config: ConfigPath = DEFAULT_CONFIG,
    split: SplitChoice = "even",
    limit: LimitOption = None,
    shots: ShotsOption = 0,
    strong: Annotated[
        str | None, typer.Option(help="Calibrate: the model that --share of the questions go to.")
    ] = None,
    share: Annotated[
        float | None, typer.Option(min=0.0, max=1.0, help="Share of the questions for --strong.")
    ] = None,
    budget: Annotated[int, typer.Option(min=1, help="Of a large graph or vote: ways to try.")] = 100,
    seed: Annotated[int, typer.Option(help="Of the search for a graph or counts.")] = 0,
    parts: Annotated[
        int, typer.Option(min=0, help="Of a graph: random assignments of the models, to report each one's part.")
    ] = 0,
    out: Annotated[
        Path | None, typer.Option(help="Folder of a router; by default the council's artefact.")
    ] = None,
    force: Annotated[bool, typer.Option("--force", help="Write it even if its gain may be chance.")] = False,
    skip_bad: SkipBad = False,
    cache: CacheFolder = None,
) -> None:
    """Learn a council's router, counts or edges on one half of the tasks, and report on the other half."""
    with one_line_errors():
        if (strong is None) != (share is None):
            raise ConfigError("--strong and --share go together; give both or neither")
        settings = load_quietly(config)

        from ensemble_core.evaluation import run
        from ensemble_core.fitting.run import Calibration, Search, fit_council

        chosen = run.Chosen(task, split, limit, shots, cache, skip_bad)
        calibration = None if strong is None or share is None else Calibration(strong, share)
        search = Search(budget, seed, parts)
        typer.echo(fit_council(settings, chosen, council, calibration, search, out, force))


@app.command()
def inspect(
    paths: Annotated[list[Path], typer.Argument(metavar="PATH...", help="Matrix files, or folders of them.")],
    config: ConfigPath = DEFAULT_CONFIG,
    token: Annotated[
        list[str] | None,
        typer.Option(show_default=False, help="Show this token's nearest anchors; may be repeated."),
    ] = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
) -> None:
    """Report on transfer matrices: recipe, size, retained and self mass, nearest anchors."""
    with one_line_errors():
        settings = load_quietly(config)

        from ensemble_core.transfer.report import inspect_matrices, shown, shown_as_json

        reports = inspect_matrices(settings, paths, token or [])
        typer.echo((shown_as_json if as_json else shown)(reports))
