"""A page of the newest metrics for Prometheus, from process 0: off unless a port is set.

Source of the format: https://prometheus.io/docs/instrumenting/exposition_formats/
"""

import http.server
import math
import socketserver
import threading

from jaxtrain.metrics.names import measured_names, prometheus_name

TYPE = "text/plain; version=0.0.4; charset=utf-8"


class PrometheusExporter:
    """Serves GET /metrics in a thread of its own, until close().

    Args:
        address, port: to listen on.

    Raises:
        ValueError: it cannot listen there.
    """

    def __init__(self, address: str, port: int):
        self._page = b""
        self._values, self._texts = {}, measured_names()
        page = self._current
        try:
            self._server = _Server((address, port), lambda *args: _Handler(page, *args))
        except OSError as error:
            raise ValueError(
                f"export.address and export.port must be free on this host; got {address}:{port}: "
                f"{error.strerror}. Set --export.port."
            ) from error
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, daemon=True).start()

    def _current(self) -> bytes:
        return self._page

    def write(self, step: int, metrics: dict) -> None:
        """Takes the newest value of each metric; the step is `jaxtrain_step`."""
        self._values |= metrics | {"step": step}
        lines = []
        for name, value in self._values.items():
            exported = prometheus_name(name)
            if text := self._texts.get(name):
                lines.append(f"# HELP {exported} {text}")
            lines += [f"# TYPE {exported} gauge", f"{exported} {_number(value)}"]
        self._page = ("\n".join(lines) + "\n").encode()

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()


def _number(value: float) -> str:
    value = float(value)
    if math.isnan(value):
        return "NaN"
    return repr(value) if math.isfinite(value) else f"{'+' if value > 0 else '-'}Inf"


class _Server(socketserver.ThreadingMixIn, http.server.HTTPServer):
    daemon_threads = True


class _Handler(http.server.BaseHTTPRequestHandler):
    timeout = 10  # s that a reader may take

    def __init__(self, page, *args):
        self._page = page
        super().__init__(*args)

    def do_GET(self):
        if self.path.partition("?")[0] != "/metrics":
            self.send_error(404, "only /metrics is here")
            return
        body = self._page()
        self.send_response(200)
        self.send_header("Content-Type", TYPE)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *args):
        """Says nothing: a scraper comes every few seconds."""
