"""A web server on this machine that stores what is posted to it."""

import http.server
import json
import threading

SECRET = "T0KEN-dont-show"  # in the address


class Server:
    """A web server on this machine that stores what is posted to it.

    Attributes:
        answers: statuses of the next requests, then 200.
        posts: (path, headers, body) of each request.
    """

    def __init__(self):
        self.answers, self.posts, self.headers = [], [], {}

        class Handler(http.server.BaseHTTPRequestHandler):
            def do_POST(handler):
                body = handler.rfile.read(int(handler.headers["Content-Length"])).decode()
                self.posts.append((handler.path, dict(handler.headers), body))
                handler.send_response(self.answers.pop(0) if self.answers else 200)
                for name, value in self.headers.items():
                    handler.send_header(name, value)
                handler.end_headers()

            def log_message(handler, *args):
                pass

        self._server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, args=(0.01,)).start()
        self.url = f"http://127.0.0.1:{self._server.server_port}/{SECRET}"

    def bodies(self):
        return [json.loads(body) for _, _, body in self.posts]

    def close(self):
        self._server.shutdown()
        self._server.server_close()
