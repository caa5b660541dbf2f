"""Serves the page on this machine alone, made anew for each request."""

import time
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Lock

from largescale.errors import ConfigError, LargescaleError
from largescale.page.markup import text

HOST = "127.0.0.1"


class Server(ThreadingHTTPServer):
    """Answers GET / with the page; `port` 0 takes any that is free."""

    daemon_threads = True

    def __init__(self, make: Callable[[], str], port: int, fresh_s: float):
        """`make`: the page. One that is younger than `fresh_s` is given again."""
        self._make = make
        self._fresh_s = fresh_s
        self._lock = Lock()
        self._made_s = -1e9
        self._answer = (503, "")
        try:
            super().__init__((HOST, port), _Handler)
        except (OSError, OverflowError) as error:
            raise ConfigError(
                f"port={port} cannot be served on: {error}; give another --port, or 0 for any"
            ) from error

    @property
    def address(self) -> str:
        return f"http://{HOST}:{self.server_port}/"

    def answer(self) -> tuple[int, str]:
        """(HTTP status, page)."""
        # Two that look at the same time wait for the same page.
        with self._lock:
            if time.monotonic() - self._made_s > self._fresh_s:
                self._answer = self._new_answer()
                self._made_s = time.monotonic()
            return self._answer

    def _new_answer(self) -> tuple[int, str]:
        # A run that is being removed, or whose disk does not answer: it may be back.
        try:
            return 200, self._make()
        except (LargescaleError, OSError) as error:
            again = '<meta http-equiv="refresh" content="10">'
            return 503, f'<!doctype html><meta charset="utf-8">{again}<p>{text(error)}</p>\n'


class _Handler(BaseHTTPRequestHandler):
    server: Server

    def do_GET(self) -> None:
        # Another name for this machine is that of a page elsewhere which wants to read this one.
        host = self.headers.get("Host", "").partition(":")[0]
        if host not in (HOST, "localhost"):
            self._send(403, "only for this machine\n")
        elif self.path.split("?")[0] != "/":
            self._send(404, "there is one page, /\n")
        else:
            self._send(*self.server.answer())

    def _send(self, status: int, content: str) -> None:
        body = content.encode()
        try:
            self.send_response(status)
            self.send_header("Content-Type", "text/html; charset=utf-8")
            self.send_header("Content-Length", str(len(body)))
            self.send_header("Cache-Control", "no-store")
            self.end_headers()
            self.wfile.write(body)
        # Who asked has gone.
        except ConnectionError:
            self.close_connection = True

    def log_message(self, *arguments: object) -> None:
        """Nothing: who looks is the person who started it."""
