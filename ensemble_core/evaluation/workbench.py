"""What evaluation works with: a configuration's recipes, stored scores and, where needed, the models.

Models are loaded only when something has to be collected or generated; on stored scores an evaluation takes seconds.
Does not know tasks or metrics.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from types import TracebackType

from ensemble_core import factory
from ensemble_core.config import Config
from ensemble_core.decoding.recipe import Recipe
from ensemble_core.evaluation.collect import Collector
from ensemble_core.evaluation.offline import DocumentSums, document_sums
from ensemble_core.evaluation.scores import Scores
from ensemble_core.evaluation.spelling import Document
from ensemble_core.evaluation.variants import Variant
from ensemble_core.home import home
from ensemble_core.llm import LLM


class Workbench(AbstractContextManager["Workbench"]):
    """The recipes, scores and models of one configuration. cache: folder of stored scores."""

    def __init__(self, config: Config, cache: Path | None = None) -> None:
        self.config = config
        self.cache = (cache or home() / "scores").expanduser()
        self.num_candidates = config.scheduler.num_candidates
        self._book, self.vocabularies = factory.load_recipes(config)
        self._llm: LLM | None = None

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Stop the models' threads, if any."""
        if self._llm is not None:
            self._llm.close()

    def llm(self) -> LLM:
        """The models, loaded on the first call."""
        if self._llm is None:
            self._llm = LLM(self.config)
        return self._llm

    def recipe(self, variant: Variant) -> Recipe:
        """The recipe of a variant. Raises ModelNotFoundError or InvalidRequestError, as for a request."""
        return self._book.resolve(variant.model, variant.overrides)

    def scores(self, documents: Sequence[Document], members: Iterable[str], label: str) -> Scores:
        """The members' scores of the documents. Models to be compared must use the same set of members."""
        return Collector(
            self.config, tuple(sorted(set(members))), self.cache, self.num_candidates, self.llm
        ).collect(documents, label)

    def sums(self, scores: Scores, recipe: Recipe) -> DocumentSums:
        """See `document_sums`."""
        return document_sums(scores, recipe, self.vocabularies, self.num_candidates)
