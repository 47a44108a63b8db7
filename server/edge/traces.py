"""OpenTelemetry traces: one server span for each request, made when its answer has ended. No prompts, no text.

Names are those of OpenTelemetry's conventions for HTTP and generative AI. The standard OTEL_* variables configure
the exporter, the sampler, the batches and the resource; spans go out over OTLP/HTTP from a thread of the SDK's own,
so a slow collector holds up no request. The parent comes from the request's headers. Does not know the engine.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING

from ensemble_core.errors import ConfigError
from server.edge.access import PROBES
from server.edge.exchange import Exchange, Generation
from server.edge.logs import REQUEST_ID

if TYPE_CHECKING:
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import SpanExporter

logger = logging.getLogger(__name__)

Value = str | int | float | bool | list[str]

_OPERATIONS = {
    "/v1/completions": "text_completion",
    "/v1/chat/completions": "chat",
    "/v1/responses": "chat",
    "/v1/messages": "chat",
}
_SERVICE = "unisono"
_PROVIDER = "unisono"
# Variables of the SDK's own set-up, which is not used here: their values must agree with what is done.
_FIXED = {
    "OTEL_TRACES_EXPORTER": "otlp",
    "OTEL_EXPORTER_OTLP_PROTOCOL": "http/protobuf",
    "OTEL_EXPORTER_OTLP_TRACES_PROTOCOL": "http/protobuf",
}


def open_traces(exporter: SpanExporter | None = None) -> Traces:
    """Traces that go to `exporter`, by default to the collector that the OTEL_* variables name.

    Raises ConfigError if the packages are missing or a variable asks for what this cannot do.
    """
    _check_variables(os.environ)
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import SERVICE_NAME, Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigError(
            f"server.traces: OpenTelemetry is not installed ({error.name}); run pip install 'unisono[otel]', or set "
            "it to false"
        ) from error
    resource = Resource.create()
    if str(resource.attributes[SERVICE_NAME]).startswith("unknown_service"):
        resource = resource.merge(Resource({SERVICE_NAME: _SERVICE}))
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    provider.add_span_processor(BatchSpanProcessor(exporter or OTLPSpanExporter()))
    return Traces(provider)


def _check_variables(environment: Mapping[str, str]) -> None:
    for name, only in _FIXED.items():
        if environment.get(name, only) not in (only, ""):
            raise ConfigError(
                f"server.traces: {name} is {environment[name]!r}, and spans are sent over OTLP/HTTP only; set it to "
                f"{only} or unset it"
            )


class Traces:
    """Records exchanges as spans."""

    def __init__(self, provider: TracerProvider) -> None:
        self._provider = provider
        self._tracer = provider.get_tracer("unisono")

    def record(self, exchange: Exchange) -> None:
        """Send the span of an exchange that has ended; none for probes. Never raises."""
        if exchange.route in PROBES:
            return
        try:
            self._record(exchange)
        except Exception:
            logger.exception("a span is lost")

    def _record(self, exchange: Exchange) -> None:
        from opentelemetry.propagate import extract
        from opentelemetry.trace import SpanKind, Status, StatusCode

        span = self._tracer.start_span(
            _name(exchange),
            context=extract(exchange.headers),
            kind=SpanKind.SERVER,
            attributes=dict(_attributes(exchange)),
            start_time=exchange.started_ns,
        )
        if _error(exchange) is not None and not exchange.disconnected:
            span.set_status(Status(StatusCode.ERROR))
        seconds = exchange.seconds(exchange.ended) or 0.0
        span.end(exchange.started_ns + round(seconds * 1e9))

    def close(self, seconds: float = 5.0) -> None:
        """Send what is left, for at most this long: a collector that is gone must not hold up the server's end."""
        ending = threading.Thread(target=self._provider.shutdown, name="last spans", daemon=True)
        ending.start()
        ending.join(seconds)
        if ending.is_alive():
            logger.warning("the last spans are lost: the collector did not take them within %g s", seconds)


def _name(exchange: Exchange) -> str:
    """The operation and the model, or the method and the route."""
    operation = _OPERATIONS.get(exchange.route or "")
    if operation is None:
        return f"{exchange.method} {exchange.route}" if exchange.route else exchange.method
    return f"{operation} {exchange.generation.model}" if exchange.generation else operation


def _error(exchange: Exchange) -> str | None:
    """What went wrong on the server's side, or the status that a client caused."""
    if exchange.error is not None:
        return exchange.error
    return str(exchange.status) if exchange.status is not None and exchange.status >= 500 else None


def _attributes(exchange: Exchange) -> Iterator[tuple[str, Value]]:
    yield "http.request.method", exchange.method
    yield "unisono.request_id", REQUEST_ID.get()
    if exchange.route is not None:
        yield "http.route", exchange.route
    if exchange.status is not None:
        yield "http.response.status_code", exchange.status
    if exchange.disconnected:
        yield "error.type", "client_disconnected"
    elif error := _error(exchange):
        yield "error.type", error
    if operation := _OPERATIONS.get(exchange.route or ""):
        yield "gen_ai.operation.name", operation
        yield "gen_ai.provider.name", _PROVIDER
    if exchange.generation is not None:
        yield from _asked(exchange.generation)
        yield from _answered(exchange, exchange.generation)


def _asked(generation: Generation) -> Iterator[tuple[str, Value]]:
    params = generation.params
    yield "gen_ai.request.model", generation.model
    yield "gen_ai.request.max_tokens", params.max_tokens
    yield "gen_ai.request.temperature", params.temperature
    yield "gen_ai.request.top_p", params.top_p
    yield "gen_ai.request.frequency_penalty", params.frequency_penalty
    yield "gen_ai.request.presence_penalty", params.presence_penalty
    yield "gen_ai.request.choice.count", generation.num_choices
    yield "gen_ai.request.stream", generation.stream
    if params.top_k:
        yield "gen_ai.request.top_k", params.top_k
    if params.seed is not None:
        yield "gen_ai.request.seed", params.seed


def _answered(exchange: Exchange, generation: Generation) -> Iterator[tuple[str, Value]]:
    counts = generation.counts
    yield "gen_ai.response.id", generation.id
    yield "gen_ai.response.model", generation.model
    yield "gen_ai.usage.input_tokens", sum(counts.prompts.values())
    yield "gen_ai.usage.cache_read.input_tokens", sum(counts.cached.values())
    yield "gen_ai.usage.output_tokens", sum(counts.completions.values())
    if counts.reasons:
        yield "gen_ai.response.finish_reasons", [counts.reasons[index] for index in sorted(counts.reasons)]
    if (first := exchange.seconds(counts.first)) is not None:
        yield "gen_ai.server.time_to_first_token", first
    if generation.stream and (chunk := exchange.seconds(exchange.first_byte)) is not None:
        yield "gen_ai.response.time_to_first_chunk", chunk
