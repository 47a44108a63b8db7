"""The YAML section of a member: its checkpoint, where it is placed, and its cache. No torch.

Does not know other members.
"""

from __future__ import annotations

from typing import Literal

from pydantic import (
    Field,
    field_validator,
    model_validator,
)

from ensemble_core.hosts import HostConfig
from ensemble_core.reasoning_config import ReasoningConfig
from ensemble_core.section import Section, parse_size

AUTO: Literal["auto"] = "auto"
_LEAST_CACHE = 2**20
_OF_WEIGHTS = {"dtype", "device", "device_map", "max_memory", "kv_memory", "kv_cache", "forward"}


class MemberConfig(Section):
    """One resident model."""

    model: str = Field(min_length=1, description="Hub id, folder, or demo:NAME (see `unisono pull`).")
    revision: str | None = Field(None, description="Branch, tag or commit on the hub; ignored by folders.")
    base: str | None = Field(
        None,
        description="Member whose weights this one shares, with `adapter`; what is not said here is as there.",
    )
    adapter: str | None = Field(
        None, min_length=1, description="LoRA adapter in PEFT's format: hub id or folder; see docs/adapters.md."
    )
    adapter_revision: str | None = Field(None, description="Of an adapter on the hub; ignored by folders.")
    dtype: Literal["auto", "bfloat16", "float16", "float32"] = Field(
        "auto", description="Of weights and cache. auto: the dtype that the checkpoint was saved in."
    )
    device: str = Field("auto", description="cpu, cuda, cuda:1, ... auto: the first GPU, else the CPU.")
    device_map: str | dict[str, int | str] | None = Field(
        None, description="accelerate's device map (auto, balanced, or module -> device). Excludes `device`."
    )
    max_memory: dict[int | str, str | int] | None = Field(
        None, description="Device -> size for device_map: {0: 20GiB, cpu: 32GiB}."
    )
    kv_memory: int | Literal["auto"] = Field(
        AUTO, description="This member's KV cache, for example 2GiB. auto: a share of what the weights leave."
    )
    kv_cache: Literal["auto", "rows", "paged"] = Field(
        "auto", description="rows: one row per sequence. paged: small pages. auto: paged on CUDA, rows on the CPU."
    )
    max_len: int = Field(
        2048, ge=16, description="Longest sequence (prompt + completion) in this member's tokens."
    )
    forward: Literal["auto", "transformers"] = Field(
        "auto", description="auto: flat layers for known families. transformers: always the library's own forward."
    )
    chat_template: str | None = Field(
        None, description="Jinja text or the path of a .jinja file, used instead of the tokenizer's own template."
    )
    reasoning: Literal["auto", "none"] | ReasoningConfig = Field(
        "auto",
        description="What marks reasoning in this member's answers: {start, end}, or none. auto: as its chat "
        "template shows, or its vocabulary.",
    )
    trust_remote_code: bool = Field(False, description="Run Python code that comes with the checkpoint.")
    host: HostConfig | None = Field(
        None, description="Where the member lives: ray, process or server. None: in the server's process."
    )

    @field_validator("kv_memory", mode="before")
    @classmethod
    def _size(cls, value: str | int) -> str | int:
        if value == AUTO:
            return value
        if (size := parse_size(value)) < _LEAST_CACHE:
            raise ValueError(f"Input should be greater than or equal to {_LEAST_CACHE} bytes, or auto")
        return size

    @property
    def cache_bytes(self) -> int:
        """Size of the cache in bytes, once it has been planned."""
        assert isinstance(self.kv_memory, int), "the cache is not planned"
        return self.kv_memory

    @model_validator(mode="after")
    def _placement(self) -> MemberConfig:
        if self.device_map is not None and self.device != "auto":
            raise ValueError("device and device_map exclude each other; keep one of them")
        if self.max_memory is not None and self.device_map is None:
            raise ValueError("max_memory only acts with device_map; add `device_map: auto` or drop it")
        return self

    @model_validator(mode="after")
    def _adapts(self) -> MemberConfig:
        if (self.adapter is None) != (self.base is None):
            raise ValueError(
                "adapter and base go together: files, and the member that they adapt; set both or neither"
            )
        if self.adapter_revision is not None and self.adapter is None:
            raise ValueError("adapter_revision only acts with `adapter`; set it or drop adapter_revision")
        if self.adapter is not None and self.host is not None:
            raise ValueError("host: an adapter shares its base's memory, in the server's process; drop host")
        return self

    @model_validator(mode="after")
    def _host_acts(self) -> MemberConfig:
        if self.host is not None and self.host.server is not None:
            given = sorted(self.model_fields_set & _OF_WEIGHTS)
            if given:
                raise ValueError(
                    f"{', '.join(given)} only act where Unisono loads the model; with host.server, tell that server"
                )
        return self
