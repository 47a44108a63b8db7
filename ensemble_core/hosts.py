"""The `host` of a member in the YAML file: where it lives, if not in the server's process. Floor 0: no torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal, get_args

from pydantic import Field, field_validator, model_validator

from ensemble_core.section import Section

ServerKind = Literal["vllm", "sglang", "llamacpp"]
Strategy = Literal["PACK", "SPREAD", "STRICT_PACK", "STRICT_SPREAD"]
Amount = Annotated[float, Field(ge=0.0, allow_inf_nan=False)]
_REFUSED = {
    "ollama": "its log-probabilities come as at most 20 strings, without ids",
    "openai": "it tells at most 20 candidates, as strings without ids",
    "tgi": "it tells at most 5 candidates",
}


class RayHost(Section):
    """An actor on a node of a Ray cluster."""

    address: str = Field(
        "auto",
        min_length=1,
        description="Of the cluster: auto (the one that this machine is part of), HOST:PORT; local: start one here.",
    )
    num_cpus: Amount = Field(1.0, description="Cores that the actor claims, and its threads.")
    num_gpus: Amount = Field(0.0, description="GPUs that the actor claims.")
    resources: dict[str, Amount] = Field(
        default_factory=dict, description="Resources of your own that a node must have: {node_b: 1}."
    )
    group: str | None = Field(
        None, min_length=1, description="Members with the same name here are placed as one placement group."
    )
    strategy: Strategy = Field("PACK", description="Of the placement group: one node if it can be, or several.")
    start_seconds: float = Field(
        600.0, gt=0.0, allow_inf_nan=False, description="How long to wait for a node and for the weights."
    )

    @model_validator(mode="after")
    def _strategy_acts(self) -> RayHost:
        if self.group is None and "strategy" in self.model_fields_set:
            raise ValueError("strategy only acts with `group`; name a group or drop strategy")
        return self


class ProcessHost(Section):
    """A process of its own on this machine, so that a crash in the model is not a crash of the server."""

    num_threads: int | None = Field(
        None, ge=1, description="Of its forwards. None: an equal share of the cores among members on this CPU."
    )
    start_seconds: float = Field(
        600.0, gt=0.0, allow_inf_nan=False, description="How long to wait for the weights."
    )


class ServerHost(Section):
    """Another inference server, which serves the model and tells log-probabilities by id."""

    kind: ServerKind = Field(description="vllm, sglang or llamacpp.")
    url: str = Field(pattern=r"^https?://[^\s/]+(/\S*)?$", description="Of the server: http://n3:8000.")
    served: str | None = Field(
        None, min_length=1, description="The model's name there. None: the only one that it serves."
    )
    api_key_env: str | None = Field(None, min_length=1, description="Environment variable with its key.")
    ca_file: Path | None = Field(None, description="PEM certificates to trust for https. None: the system's.")
    timeout: float = Field(5.0, gt=0.0, allow_inf_nan=False, description="Seconds that one answer may take.")

    @field_validator("kind", mode="before")
    @classmethod
    def _known(cls, kind: object) -> object:
        if isinstance(kind, str) and (reason := _REFUSED.get(kind.lower())) is not None:
            raise ValueError(
                f"{kind} cannot be a member: {reason}; a member must tell its candidates by "
                f"id, as {', '.join(get_args(ServerKind))} do"
            )
        return kind


class HostConfig(Section):
    """One of ray, process and server."""

    ray: RayHost | None = None
    process: ProcessHost | None = None
    server: ServerHost | None = None

    @model_validator(mode="after")
    def _one(self) -> HostConfig:
        given = [name for name in ("ray", "process", "server") if getattr(self, name) is not None]
        if len(given) != 1:
            found = ", ".join(given) or "none"
            raise ValueError(
                f"exactly one of ray, process and server is needed, found {found}; an empty one is {{}}"
            )
        return self
