"""The `reasoning` of a member in the YAML file: the texts around what it thinks. Floor 0: no torch."""

from __future__ import annotations

from pydantic import Field, model_validator

from ensemble_core.section import Section


class ReasoningConfig(Section):
    """The markers around a member's reasoning."""

    start: str = Field(
        "<think>", min_length=1, max_length=64, description="An answer that begins with it reasons first."
    )
    end: str = Field("</think>", min_length=1, max_length=64, description="What follows it is content.")

    @model_validator(mode="after")
    def _distinct(self) -> ReasoningConfig:
        if self.start == self.end:
            raise ValueError(f"start and end must differ, both are {self.start!r}")
        if any(text != text.strip() for text in (self.start, self.end)):
            raise ValueError("markers have no white space around them, which would never be compared; drop it")
        return self
