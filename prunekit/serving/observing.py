"""Metrics of the server for Prometheus: requests, latency, queue, batch sizes, images per expert, MACs."""

from __future__ import annotations

from functools import partial

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, ProcessCollector, generate_latest

from prunekit.serving.backend import Backend, Drawn

SECONDS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 25, 50, 100, 300)
BATCHES = (1, 2, 3, 4, 5, 6, 7, 8, 12, 16, 24, 32, 64)


class Metrics:
    """The metrics of one server, in a separate registry."""

    def __init__(self, backend: Backend):
        self.registry = CollectorRegistry()
        ProcessCollector(registry=self.registry)
        counter = partial(Counter, namespace="prunekit", registry=self.registry)
        gauge = partial(Gauge, namespace="prunekit", registry=self.registry)
        histogram = partial(Histogram, namespace="prunekit", registry=self.registry)
        self.requests = counter("requests", "Requests answered, by path and status", ["path", "status"])
        self.latency = histogram("request_seconds", "From a generation request to its answer", buckets=SECONDS)
        self.drawing = histogram("image_seconds", "Seconds of the batch, for each image", buckets=SECONDS)
        self.batch = histogram("image_batch_size", "Images of the batch, for each image", buckets=BATCHES)
        self.images = counter("expert_images", "Images drawn, by expert", ["expert"])
        self.macs = counter("macs", "Exact MACs of the denoiser calls of images drawn")
        gauge("queue_images", "Images that wait for a device").set_function(lambda: backend.load().waiting)
        gauge("running_images", "Images that are being drawn").set_function(
            lambda: sum(batch.images for batch in backend.load().running)
        )
        gauge("ready", "1 where the server draws at once").set_function(backend.ready)
        for expert in range(backend.served.num_experts):
            self.images.labels(expert)  # shown from the beginning, with 0

    def drawn(self, drawn: Drawn) -> None:
        """Count a job that was drawn."""
        self.images.labels(drawn.expert).inc(len(drawn.pictures))
        for picture in drawn.pictures:
            self.macs.inc(picture.macs)
            self.batch.observe(picture.batch)
            self.drawing.observe(picture.seconds)

    def text(self) -> bytes:
        """Return all metrics in Prometheus' text format."""
        return generate_latest(self.registry)
