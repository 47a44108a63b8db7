"""Two kinds of text that lie wherever Python does: its library's programs, and the English of its manual.

Code is the standard library's modules without docstrings and comments (parsed and written out again), so that it
holds hardly any English. Prose is paragraphs of docstrings and of the manual's topics that read as sentences, so that
it holds hardly any code. What is held out is held out by module and topic, and no paragraph of it stands in what may
be learnt. Knows texts alone; which there are depends on Python's version.
"""

from __future__ import annotations

import ast
import itertools
import random
import re
import sysconfig
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from pydoc_data import topics

_LEFT_OUT = {"site-packages", "dist-packages", "test", "tests", "idlelib", "lib2to3", "encodings", "pydoc_data"}
_LARGEST = 200_000  # bytes of a source; larger ones are tables
_SENTENCE = re.compile(r"^[A-Z][\w\s,;:()'\"\-]+[.]", re.ASCII)
_PROSE_CHARACTERS = re.compile(r"[A-Za-z ,.;'\-]", re.ASCII)
_HELD_OUT = 4  # a document of so many
_PIECES = 4  # of a mixed document

_Documented = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


@dataclass(frozen=True, slots=True)
class Corpus:
    """Documents of one kind: what may be learnt from, and what is never seen."""

    training: tuple[str, ...]
    held_out: tuple[str, ...]


def read_domains(seed: int, num_modules: int | None = None) -> dict[str, Corpus]:
    """`code` and `prose` of some modules (None: all) and of all topics; which are held out depends on the seed."""
    trees = list(itertools.islice(_modules(seed), num_modules))
    pages = [text for _, text in sorted(topics.topics.items())]
    random.Random(seed).shuffle(pages)
    docstrings = [_paragraphs(_docstrings(tree)) for tree in trees]
    manual = [_paragraphs([page]) for page in pages]
    code = _divided([[_program(tree)] for tree in trees])
    spoken, written = _divided(docstrings), _divided(manual)
    prose = Corpus(spoken.training + written.training, spoken.held_out + written.held_out)
    return {"code": code, "prose": prose}


def mixed_documents(corpora: Sequence[Corpus], num: int, num_bytes: int, seed: int) -> list[str]:
    """`num` documents of held-out pieces, the kinds in turn, each piece once; of `num_bytes` bytes or somewhat more.

    Raises ValueError where what is held out does not suffice.
    """
    draw = random.Random(seed)
    pieces = [_pieces(corpus.held_out, num_bytes // _PIECES, draw) for corpus in corpora]
    documents: list[str] = []
    for _ in range(num):
        parts = [next(source, "") for source in itertools.islice(itertools.cycle(pieces), _PIECES)]
        if "" in parts:
            raise ValueError(f"the held-out texts give {len(documents)} mixed documents, {num} are asked for")
        documents.append("\n\n".join(parts))
    return documents


def documents(corpus: Corpus, num_bytes: int, seed: int) -> list[str]:
    """What is held out, in pieces of `num_bytes` bytes or somewhat more, in a random order."""
    return list(_pieces(corpus.held_out, num_bytes, random.Random(seed)))


def shuffled(num: int, seed: int) -> list[int]:
    """The numbers below `num` in a random order."""
    order = list(range(num))
    random.Random(seed).shuffle(order)
    return order


def _modules(seed: int) -> Iterator[ast.Module]:
    """The standard library, parsed, in an order of the seed's."""
    root = Path(sysconfig.get_paths()["stdlib"])
    paths = sorted(path for path in root.rglob("*.py") if not _LEFT_OUT & set(path.relative_to(root).parts))
    random.Random(seed).shuffle(paths)
    for path in paths:
        if path.stat().st_size <= _LARGEST:
            try:
                yield ast.parse(path.read_text(encoding="utf-8"))
            except (SyntaxError, UnicodeDecodeError):
                continue  # a template, or kept in another encoding


def _docstrings(tree: ast.Module) -> list[str]:
    nodes = [node for node in ast.walk(tree) if isinstance(node, _Documented)]
    return [text for node in nodes if (text := ast.get_docstring(node))]


def _program(tree: ast.Module) -> str:
    """A module without its docstrings, which are taken out of the tree; parsing has dropped the comments."""
    for node in ast.walk(tree):
        if isinstance(node, _Documented) and ast.get_docstring(node) is not None:
            node.body = node.body[1:] or [ast.Pass()]
    return ast.unparse(tree)


def _paragraphs(texts: Sequence[str]) -> list[str]:
    """Those that read as sentences, each on one line."""
    flat = [" ".join(part.split()) for text in texts for part in text.split("\n\n")]
    return [part for part in flat if _is_prose(part)]


def _is_prose(paragraph: str) -> bool:
    letters = len(_PROSE_CHARACTERS.findall(paragraph))
    return len(paragraph) >= 60 and bool(_SENTENCE.match(paragraph)) and letters >= 0.95 * len(paragraph)


def _divided(documents: Sequence[Sequence[str]]) -> Corpus:
    """Documents, given as paragraphs; of those that are held out no paragraph stands in the others."""
    count = len(documents) // _HELD_OUT
    known = {part for document in documents[count:] for part in document}
    held_out = [[part for part in document if part not in known] for document in documents[:count]]
    return Corpus(_joined(documents[count:]), _joined(held_out))


def _joined(documents: Sequence[Sequence[str]]) -> tuple[str, ...]:
    return tuple("\n\n".join(dict.fromkeys(parts)) for parts in documents if parts)


def _pieces(documents: Sequence[str], num_bytes: int, draw: random.Random) -> Iterator[str]:
    """Runs of whole lines, each of one document and of `num_bytes` to twice as many, in a random order."""
    pieces: list[str] = []
    for document in documents:
        lines: list[str] = []
        for line in document.split("\n"):
            lines.append(line)
            if len("\n".join(lines).strip("\n").encode()) >= num_bytes:
                text = "\n".join(lines).strip("\n").encode()[: 2 * num_bytes]
                pieces.append(text.decode("utf-8", "ignore"))
                lines = []
    draw.shuffle(pieces)
    return iter(pieces)
