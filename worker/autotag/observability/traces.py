"""OpenTelemetry traces, if an exporter is configured with the standard variables (OTEL_EXPORTER_OTLP_ENDPOINT).

Each upload is one trace: that of the HTTP request that made it, if it had a ``traceparent`` header, or else a new trace
with the job's id. Each image is a span in it, with its steps as child spans. The last step, ``settle``, ends with the
commit that stores the tags and sends the broadcasts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from autotag.db import Image

ENDPOINT_VARIABLES = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_tracer: Any = None


class TracesError(Exception):
    """Traces are configured, but OpenTelemetry is not installed. The message says how to install it."""


def configure_traces() -> None:
    """Configures traces, if an exporter is configured. Call it once per process.

    Raises:
        TracesError: OpenTelemetry is not installed.
    """
    if (
        not any(os.environ.get(name) for name in ENDPOINT_VARIABLES)
        or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true"
    ):
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracesError(
            f"{next(n for n in ENDPOINT_VARIABLES if os.environ.get(n))} is set, but OpenTelemetry is not installed: "
            "pip install 'supabase-autotag[otel]'"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", "autotag")
    use_processor(BatchSpanProcessor(OTLPSpanExporter()), Resource.create({"service.name": name}))


def use_processor(processor: Any, resource: Any = None) -> None:
    """Sends spans to an OpenTelemetry span processor from now on; None turns traces off."""
    global _tracer
    if processor is None:
        _tracer = None
        return
    from opentelemetry.sdk.trace import TracerProvider

    provider = TracerProvider(resource=resource) if resource else TracerProvider()
    provider.add_span_processor(processor)
    _tracer = provider.get_tracer("autotag")


@contextmanager
def image_span(image: Image) -> Iterator[Any]:
    """The span of one image's single call; yields the span, or None if traces are off."""
    if _tracer is None:
        yield None
        return
    attributes = {"autotag.job_id": image.job or "", "autotag.asset_id": image.asset_id,
                  "autotag.task": image.task, "autotag.attempt": image.attempt}  # fmt: skip
    with _tracer.start_as_current_span("tag image", context=_parent_context(image), attributes=attributes) as span:
        yield span


@contextmanager
def step(name: str, after: Sequence[Any] = ()) -> Iterator[None]:
    """A child of the current span, or of the first span in ``after`` (spans of images), with links to all of them."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import Link, set_span_in_context

    links = [Link(span.get_span_context()) for span in after if span is not None]
    context = set_span_in_context(next(span for span in after if span is not None)) if links else None
    with _tracer.start_as_current_span(name, context=context, links=links):
        yield


def _parent_context(image: Image) -> Any:
    """The parent context of an image's span: the request's, or a new trace with the job's id."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if image.traceparent:
        return TraceContextTextMapPropagator().extract({"traceparent": image.traceparent})
    trace = UUID(image.job).int if image.job else 0
    parent = SpanContext(trace, trace & (2**64 - 1), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(parent))
