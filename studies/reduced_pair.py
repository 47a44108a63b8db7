"""Two members of a configuration with their tokens reduced to bytes and to the tokens that they have in common.

Reductions take half a minute for the demo pair, and are made when somebody asks. Knows configurations and models;
does not know documents or fusions.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.variants import parse_variant
from ensemble_core.evaluation.workbench import Workbench
from ensemble_core.members.base import Member
from ensemble_core.members.loading.checkpoints import resolve_folder
from ensemble_core.text.vocabulary import Vocabulary
from studies.along_paths import BYTES, Listener, Reading, Space
from studies.reductions import Merges, Reduction, common_vocabulary, load_merges, to_bytes, to_common


@dataclass(frozen=True)
class ReducedPair:
    """members: in the order of all columns. cache: folder of what was heard."""

    bench: Workbench
    members: tuple[str, ...]
    cache: Path

    @classmethod
    def of(cls, bench: Workbench, ensemble: str, cache: Path) -> ReducedPair:
        """The members of an ensemble, its main first."""
        return cls(bench, bench.recipe(parse_variant(ensemble)).members, cache.expanduser())

    @property
    def vocabularies(self) -> list[Vocabulary]:
        """Of the members, in order."""
        return [self.bench.vocabularies[name] for name in self.members]

    @property
    def num_shared(self) -> int:
        """Strings that are tokens of all."""
        return len(set.intersection(*(set(vocabulary.ids_by_bytes) for vocabulary in self.vocabularies)))

    @cached_property
    def _merges(self) -> list[Merges]:
        folders = [resolve_folder(self.bench.config.members[name]) for name in self.members]
        pairs = zip(folders, self.vocabularies, strict=True)
        return [load_merges(folder / "tokenizer.json", vocabulary) for folder, vocabulary in pairs]

    @cached_property
    def strings(self) -> list[bytes]:
        """The common vocabulary."""
        return common_vocabulary(self.vocabularies, self._merges)

    @cached_property
    def common(self) -> dict[str, Reduction]:
        """Every member's tokens as common ones."""
        parts = zip(self.members, self.vocabularies, self._merges, strict=True)
        return {name: to_common(vocabulary, merges, self.strings) for name, vocabulary, merges in parts}

    @cached_property
    def bytes(self) -> dict[str, Reduction]:
        """Every member's tokens as bytes."""
        return {name: to_bytes(self.bench.vocabularies[name]) for name in self.members}

    def member(self, name: str) -> Member:
        """A loaded member."""
        return self.bench.llm().members[name]

    def hear(self, documents: Sequence[Document], label: str) -> list[Reading]:
        """What both members say of documents, see `along_paths.py`."""
        config = self.bench.config.members
        identity = [
            [config[name].model, config[name].dtype, self.bench.vocabularies[name].fingerprint]
            for name in self.members
        ]
        listener = Listener(self.members, self._spaces, self.bench.llm, self.cache / "heard", str(identity))
        return listener.hear(documents, label)

    def _spaces(self) -> dict[str, Space]:
        return self._all_spaces

    @cached_property
    def _all_spaces(self) -> dict[str, Space]:
        sizes = [len(string) for string in self.strings]
        return {BYTES: Space(self.bytes, [1] * 256), "common": Space(self.common, sizes)}
