"""Serves the newest metrics of process 0 to Prometheus; off unless a port is set."""

from collections.abc import Iterator
from typing import TYPE_CHECKING

from jaxtrain.metrics.names import describe_metric, measured_names, prometheus_name

if TYPE_CHECKING:
    from prometheus_client.core import GaugeMetricFamily


class PrometheusExporter:
    """Serves the newest value of each metric as a gauge, in a separate thread, until close().

    Args:
        address, port: to listen on.

    Attributes:
        port: the port in use; the system chooses one if the argument is 0.

    Raises:
        ValueError: the address or the port is not available.
    """

    def __init__(self, address: str, port: int):
        # Imported here: few runs set a port, and all others start without this import.
        from prometheus_client import CollectorRegistry, start_http_server

        self._values: dict[str, float] = {}
        self._ratios: dict[str, list[float]] = {}
        self._texts = measured_names()
        registry = CollectorRegistry()  # the default one would add figures of the Python process
        registry.register(self)
        try:
            self._server, self._thread = start_http_server(port, address, registry)
        except OSError as error:
            raise ValueError(
                f"export.address and export.port must be free on this host; got {address}:{port}: "
                f"{error.strerror}. Set --export.port."
            ) from error
        self.port = self._server.server_port

    def write(self, step: int, time_s: float, metrics: dict[str, int | float]) -> None:
        """Stores the newest value of each metric; the step becomes `jaxtrain_step`."""
        del time_s
        # One assignment, so that a scrape in the other thread sees the values of one moment.
        self._values = self._values | metrics | {"step": step}

    def write_ranks(self, ratios: dict[str, list[float]]) -> None:
        """Stores RankWatch.ratios: `jaxtrain_rank_KIND_ratio{rank="N"}`."""
        self._ratios = ratios

    def collect(self) -> "Iterator[GaugeMetricFamily]":
        """Yields all metrics; the registry calls this for each scrape."""
        from prometheus_client.core import GaugeMetricFamily

        for name, value in self._values.items():
            text = self._texts.get(name) or describe_metric(name)
            yield GaugeMetricFamily(prometheus_name(name), text, value)
        for kind, ratios in self._ratios.items():
            name = f"rank/{kind}_ratio"
            family = GaugeMetricFamily(prometheus_name(name), self._texts[name], labels=["rank"])
            for rank, ratio in enumerate(ratios):
                family.add_metric([str(rank)], ratio)
            yield family

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()
