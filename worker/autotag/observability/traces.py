"""OpenTelemetry traces, when an exporter is configured in the usual way (OTEL_EXPORTER_OTLP_ENDPOINT and the like).

An upload is one trace: the one of the HTTP request that made it, where that had a ``traceparent`` header, or else a
trace of its own, whose id is the job's. Each image is a span in it, with its steps below it; the last one, ``settle``,
ends with the commit that stores the tags and sends the broadcasts.
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from uuid import UUID

from autotag.db import Image

ASKED_BY = ("OTEL_EXPORTER_OTLP_ENDPOINT", "OTEL_EXPORTER_OTLP_TRACES_ENDPOINT")

_tracer: Any = None


class TracesError(Exception):
    """Traces are asked for and cannot be made; the message says what to install."""


def configure_traces() -> None:
    """Call once per process. Does nothing when no exporter is configured.

    Raises:
        TracesError: the packages are missing.
    """
    if not any(os.environ.get(name) for name in ASKED_BY) or os.environ.get("OTEL_SDK_DISABLED", "").lower() == "true":
        return
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError:
        raise TracesError(
            f"{next(n for n in ASKED_BY if os.environ.get(n))} is set, but OpenTelemetry is not installed: "
            "pip install 'supabase-autotag[otel]'"
        ) from None
    name = os.environ.get("OTEL_SERVICE_NAME", "autotag")
    use_processor(BatchSpanProcessor(OTLPSpanExporter()), Resource.create({"service.name": name}))


def use_processor(processor: Any, resource: Any = None) -> None:
    """Has spans go to an OpenTelemetry span processor from now on (None: nowhere)."""
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
    """The span of one image's single call; yields it, or None when there are no traces."""
    if _tracer is None:
        yield None
        return
    attributes = {"autotag.job_id": image.job or "", "autotag.asset_id": image.asset_id,
                  "autotag.task": image.task, "autotag.attempt": image.attempt}  # fmt: skip
    with _tracer.start_as_current_span("tag image", context=_of_job(image), attributes=attributes) as span:
        yield span


@contextmanager
def step(name: str, after: Sequence[Any] = ()) -> Iterator[None]:
    """A span below the current one; ``after`` are spans of images that it goes on with, and links to."""
    if _tracer is None:
        yield
        return
    from opentelemetry.trace import Link, set_span_in_context

    links = [Link(span.get_span_context()) for span in after if span is not None]
    context = set_span_in_context(next(span for span in after if span is not None)) if links else None
    with _tracer.start_as_current_span(name, context=context, links=links):
        yield


def _of_job(image: Image) -> Any:
    """The context that an image's span belongs to."""
    from opentelemetry.trace import NonRecordingSpan, SpanContext, TraceFlags, set_span_in_context
    from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

    if image.traceparent:
        return TraceContextTextMapPropagator().extract({"traceparent": image.traceparent})
    trace = UUID(image.job).int if image.job else 0
    parent = SpanContext(trace, trace & (2**64 - 1), is_remote=True, trace_flags=TraceFlags(TraceFlags.SAMPLED))
    return set_span_in_context(NonRecordingSpan(parent))
