"""The live page: a server on this machine alone, for whoever knows its token."""

from __future__ import annotations

import hmac
import json
import secrets
import signal
import sys
import threading
import webbrowser
from collections.abc import Mapping
from http import HTTPStatus
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

from attngraph.draw.evaluating import Evaluator, Superseded
from attngraph.draw.pages import filled, policy

HOST, MOST_BYTES = "127.0.0.1", 64 << 10  # of a question


class Server(ThreadingHTTPServer):
    """Serves the page of some data, and answers what it asks about other expressions.

    It listens on 127.0.0.1 alone. The page itself holds nothing; what it shows is given to those who send the token,
    which is in the fragment of `url`, by a request of the page's own origin to the server's own name.
    """

    daemon_threads = True
    request_queue_size = 16

    def __init__(self, data: Mapping[str, Any], port: int = 0, evaluator: Evaluator | None = None):
        self.evaluator = Evaluator() if evaluator is None else evaluator
        self.token = secrets.token_urlsafe(32)
        self.first = json.dumps({**data, "live": True}, ensure_ascii=False)
        super().__init__((HOST, port), Handler)
        self.page = filled({"live": True, "title": "attngraph"}, connects=True).encode()

    @property
    def name(self) -> str:
        """What a request must call it."""
        return f"{HOST}:{self.server_address[1]}"

    @property
    def url(self) -> str:
        """Where a browser finds the page, with the token."""
        return f"http://{self.name}/#{self.token}"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Nothing is written of a browser that has gone; anything else is, as usual."""
        if not isinstance(sys.exception(), OSError):
            super().handle_error(request, client_address)

    def server_close(self) -> None:
        self.evaluator.close()
        super().server_close()


class Refused(Exception):
    """A request that is not answered: its status and why."""

    def __init__(self, status: HTTPStatus, why: str):
        super().__init__(why)
        self.status = status


class Handler(BaseHTTPRequestHandler):
    """GET / is the page, POST /graphs a question as JSON; nothing else is answered."""

    server: Server  # pyright: ignore[reportIncompatibleVariableOverride]
    server_version, sys_version = "attngraph", ""
    timeout = 20  # seconds for a request to come

    def do_GET(self) -> None:
        """The page."""
        self._answer(self._page)

    def do_POST(self) -> None:
        """The data of other graphs."""
        self._answer(self._graphs)

    def _page(self) -> tuple[bytes, str]:
        if self.path != "/":
            raise Refused(HTTPStatus.NOT_FOUND, "there is / alone")
        return self.server.page, "text/html"

    def _graphs(self) -> tuple[bytes, str]:
        size = self.headers.get("Content-Length", "")
        if self.path != "/graphs":
            raise Refused(HTTPStatus.NOT_FOUND, "there is /graphs alone")
        if self.headers.get("Origin") != f"http://{self.server.name}":
            raise Refused(HTTPStatus.FORBIDDEN, "the request must come from the page")
        if not hmac.compare_digest(self.headers.get("X-Token", "").encode(), self.server.token.encode()):
            raise Refused(HTTPStatus.FORBIDDEN, "the token is not this server's: open the address that it printed")
        if self.headers.get_content_type() != "application/json":
            raise Refused(HTTPStatus.UNSUPPORTED_MEDIA_TYPE, "the request must be application/json")
        if not size.isascii() or not size.isdigit():
            raise Refused(HTTPStatus.LENGTH_REQUIRED, "the request must say its length")
        if len(size) > 18 or int(size) > MOST_BYTES:
            self.close_connection = True
            raise Refused(
                HTTPStatus.REQUEST_ENTITY_TOO_LARGE, f"a request has at most {MOST_BYTES:,} bytes (got {size[:18]})"
            )
        try:
            question = json.loads(self.rfile.read(int(size)))
        except (ValueError, RecursionError):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request must be JSON") from None
        if not isinstance(question, dict):
            raise Refused(HTTPStatus.BAD_REQUEST, "the request must be an object of JSON")
        if not question:
            return self.server.first.encode(errors="replace"), "application/json"
        try:
            return self.server.evaluator.ask(question).encode(), "application/json"
        except Superseded as error:
            raise Refused(HTTPStatus.CONFLICT, str(error)) from None
        except ValueError as error:
            raise Refused(HTTPStatus.UNPROCESSABLE_ENTITY, str(error)) from None

    def _answer(self, answer: Any) -> None:
        status = HTTPStatus.OK
        try:
            if self.headers.get_all("Host") != [self.server.name]:
                raise Refused(HTTPStatus.MISDIRECTED_REQUEST, f"this server is http://{self.server.name}")
            body, kind = answer()
        except Refused as refused:
            status, kind = refused.status, "application/json"
            body = json.dumps({"error": str(refused)}).encode()
        self.send_response(status)
        for name, value in {
            "Content-Type": f"{kind}; charset=utf-8",
            "Content-Length": str(len(body)),
            "Content-Security-Policy": f"{policy(connects=True)}; frame-ancestors 'none'",
            "Cache-Control": "no-store",
            "X-Content-Type-Options": "nosniff",
            "Referrer-Policy": "no-referrer",
            "Cross-Origin-Resource-Policy": "same-origin",
        }.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, format: str, *args: Any) -> None:
        """Nothing is written for each request."""


def serve(data: Mapping[str, Any], port: int = 0, opens: bool = False) -> None:
    """Serve the page until Ctrl-C, or SIGTERM; its address is printed, and opened in a browser if asked for."""
    for ends in (signal.SIGINT, signal.SIGTERM):  # also where a shell has had them ignored
        signal.signal(ends, signal.default_int_handler)
    with Server(data, port) as server:
        threading.Thread(target=server.evaluator.start, daemon=True).start()  # it takes some seconds
        print(f"page: {server.url}    (Ctrl-C ends it)", flush=True)
        if opens:
            webbrowser.open(server.url)
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            print()
