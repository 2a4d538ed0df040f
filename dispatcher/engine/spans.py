"""Export to OpenTelemetry: a span for each delivery attempt. Needs the `otel` extra; nothing of this is loaded without.

A span is a child of whatever made the event, if its application left a traceparent, and the parent of whatever the
subscriber makes of it. It begins before the request is written and ends with its outcome, or with the second try that
a rotation of secrets allows. Sampling and resource are OpenTelemetry's own settings (OTEL_TRACES_SAMPLER,
OTEL_RESOURCE_ATTRIBUTES, …); URLs are not exported, since they may hold secrets.
"""

from __future__ import annotations

import asyncio
from typing import Any, Final

from dispatcher import __version__
from dispatcher.core.attempt import Attempt
from dispatcher.core.ids import DeliveryIds
from dispatcher.core.traces import is_traceparent
from dispatcher.engine.delivery import Delivery
from dispatcher.errors import ConfigurationError
from dispatcher.model import Result

EXPORT_TIMEOUT_S: Final = 5.0
CLOSE_S: Final = 5.0  # what a shutdown waits for the last spans


class Spans:
    """The spans under way. One owner: the event loop; the export has a thread of its own."""

    def __init__(self, provider: Any, ids: DeliveryIds) -> None:
        from opentelemetry import trace
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        self._provider = provider
        self._ids = ids
        self._tracer = provider.get_tracer("dispatcher", __version__)
        self._client = trace.SpanKind.CLIENT
        self._failed = trace.Status(trace.StatusCode.ERROR)
        self._propagator = TraceContextTextMapPropagator()
        self._open: dict[Delivery, Any] = {}

    def begin(self, delivery: Delivery) -> str:
        """Open a delivery's span; return the traceparent for its request."""
        from opentelemetry.trace import set_span_in_context

        endpoint, event = delivery.subscriber.endpoint, delivery.event
        payload = event.payload
        assert payload is not None, "nothing is sent unread"
        parent = event.traceparent
        context = self._propagator.extract({"traceparent": parent}) if parent and is_traceparent(parent) else None
        span = self._tracer.start_span(
            "POST",
            context=context,
            kind=self._client,
            attributes={
                "http.request.method": "POST",
                "http.request.resend_count": delivery.attempts,
                "messaging.message.id": payload.event_id,
                "dispatcher.account": endpoint.account,
                "dispatcher.webhook": endpoint.public_id,
                "dispatcher.delivery": self._ids.id_of(endpoint.id, event.seq, delivery.generation),
                "dispatcher.event_type": payload.type,
            },
        )
        self._open[delivery] = span
        carrier: dict[str, str] = {}
        self._propagator.inject(carrier, set_span_in_context(span))
        return carrier.get("traceparent", "")

    def end(self, delivery: Delivery, attempt: Attempt) -> None:
        """Close a delivery's span with what its request came to."""
        span = self._open.pop(delivery, None)
        if span is None:
            return
        if attempt.status:
            span.set_attribute("http.response.status_code", attempt.status)
        if attempt.result is not Result.OK:
            span.set_attribute("error.type", f"{attempt.status}" if attempt.status else attempt.result.value)
            span.set_status(self._failed)
        span.end()

    async def close(self) -> None:
        """Export what is left, for CLOSE_S at most."""
        for span in self._open.values():
            span.end()
        self._open.clear()
        await asyncio.wait({asyncio.create_task(asyncio.to_thread(self._provider.shutdown))}, timeout=CLOSE_S)


def open_spans(endpoint: str, service: str, ids: DeliveryIds) -> Spans:
    """Export to the OTLP/HTTP collector at `endpoint`. Raises ConfigurationError if the extra is not installed."""
    try:
        from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
        from opentelemetry.sdk.resources import Resource
        from opentelemetry.sdk.trace import TracerProvider
        from opentelemetry.sdk.trace.export import BatchSpanProcessor
    except ImportError as error:
        raise ConfigurationError(
            [f"[otel] endpoint: needs the otel extra: pip install 'trackpost-dispatcher[otel]' ({error})"]
        ) from None
    resource = Resource.create({"service.name": service, "service.version": __version__})
    provider = TracerProvider(resource=resource, shutdown_on_exit=False)
    exporter = OTLPSpanExporter(endpoint=f"{endpoint.rstrip('/')}/v1/traces", timeout=EXPORT_TIMEOUT_S)
    provider.add_span_processor(BatchSpanProcessor(exporter))
    return Spans(provider, ids)
