"""A server with OpenAI's HTTP API whose every pause is known, in a thread of the test's own process.

It notes with the same clock as the client when it sent what, so that a test can hold each measured moment between the
sending and a little after it.
"""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


@dataclass
class Behaviour:
    """How the server answers. A test changes what it is about.

    Args:
        first, gap: seconds before the first piece, and between two.
        per_piece: tokens of each piece.
        usage: whether it counts tokens when asked to.
        refuses: fields of a request that it answers with 400.
        key: what it wants in the header.
        answers_early: tokens of an answer that stops by itself where ``ignore_eos`` is not asked.
        cuts_after: pieces after which it closes the connection.
        fails_after: pieces after which it streams an error.
        status: what it answers in place of a stream, with ``message``.
    """

    first: float = 0.0
    gap: float = 0.0
    per_piece: int = 1
    usage: bool = True
    cached: int | None = 0
    refuses: tuple[str, ...] = ()
    key: str | None = None
    models: list[str] | None = field(default_factory=lambda: ["tiny"])
    answers_early: int | None = None
    cuts_after: int | None = None
    fails_after: int | None = None
    status: int = 200
    message: str = ""
    every: int = 1
    """Of so many requests one has ``status``."""
    raw: str | None = None
    """A body to send in place of a stream, as text/plain."""
    requests: list[dict[str, Any]] = field(default_factory=list)
    sent: list[list[float]] = field(default_factory=list)
    most_at_once: int = 0
    at_once: int = 0
    lock: threading.Lock = field(default_factory=threading.Lock)

    @staticmethod
    def prompt_tokens(body: dict[str, Any]) -> int:
        """Seven tokens of a template, and three for two words: what the client has to find out."""
        return 7 + sum(3 * len(message["content"].split()) // 2 for message in body["messages"])


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server_version, sys_version = "fake/1", ""
    behaviour: Behaviour

    def log_message(self, *_: Any) -> None:
        pass

    def do_GET(self) -> None:
        if self._refused():
            return
        models = self.behaviour.models
        if models is None or not self.path.endswith("/models"):
            self._json(404, {"error": {"message": "Not Found"}})
        else:
            self._json(200, {"data": [{"id": name} for name in models]})

    def do_POST(self) -> None:
        it = self.behaviour
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        if self._refused():
            return
        with it.lock:
            it.requests.append(body)
            number = len(it.requests)
            it.at_once += 1
            it.most_at_once = max(it.most_at_once, it.at_once)
        self.under_way = True
        try:
            self._answer(it, body, number)
        finally:
            self._over()

    def _over(self) -> None:
        """Count the request as no longer under way: before the client can know, which may ask again at once."""
        with self.behaviour.lock:
            self.behaviour.at_once -= self.under_way
        self.under_way = False

    def _answer(self, it: Behaviour, body: dict[str, Any], number: int) -> None:
        for name in it.refuses:
            if name in body:
                self._json(400, {"error": {"message": f"unknown field {name}"}})
                return
        if it.status != 200 and number % it.every == 0:
            self._json(it.status, {"error": {"message": it.message}})
            return
        if it.models is not None and body["model"] not in it.models:
            self._json(404, {"error": {"message": f"The model '{body['model']}' does not exist"}})
            return
        if it.raw is not None:
            self._plain(it.raw)
            return
        asked = body.get("max_tokens") or body["max_completion_tokens"]
        num_tokens = asked if body.get("ignore_eos") or it.answers_early is None else min(asked, it.answers_early)
        self.send_response(200)
        self.send_header("Content-Type", "text/event-stream")
        self.send_header("Connection", "close")
        self.end_headers()
        self.close_connection = True
        moments: list[float] = []
        # Comments, and a first chunk with a role and no text: neither is a token.
        self._line(": hello")
        self._event({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
        for piece in range(-(-num_tokens // it.per_piece)):
            if it.cuts_after == piece:
                return
            if it.fails_after == piece:
                self._event({"error": {"message": "out of blocks"}})
                return
            time.sleep(it.gap if piece else it.first)
            moments.append(time.perf_counter())
            self._event({"choices": [{"delta": {"content": f"w{piece} "}}]})
        with it.lock:
            it.sent.append(moments)
        self._over()
        self._event({"choices": [{"delta": {}, "finish_reason": "length"}]})
        if it.usage and (body.get("stream_options") or {}).get("include_usage"):
            details = {} if it.cached is None else {"prompt_tokens_details": {"cached_tokens": it.cached}}
            self._event({"choices": [], "usage": {"prompt_tokens": it.prompt_tokens(body),
                                                  "completion_tokens": num_tokens, **details}})
        self._line("data: [DONE]")

    def _refused(self) -> bool:
        given = self.headers.get("Authorization")
        if self.behaviour.key is None or given == f"Bearer {self.behaviour.key}":
            return False
        self._json(401, {"error": {"message": f"wrong key {given}"}})
        return True

    def _event(self, value: dict[str, Any]) -> None:
        self._line(f"data: {json.dumps(value)}")

    def _line(self, text: str) -> None:
        self.wfile.write(text.encode() + b"\n\n")
        self.wfile.flush()

    def _json(self, status: int, value: Any) -> None:
        self._send(status, json.dumps(value).encode(), "application/json")

    def _plain(self, text: str) -> None:
        self._send(200, text.encode(), "text/plain")

    def _send(self, status: int, data: bytes, kind: str) -> None:
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)


@contextmanager
def serving(**behaviour: Any) -> Iterator[tuple[str, Behaviour]]:
    """(its address up to /v1, how it behaves)."""
    it = Behaviour(**behaviour)
    server = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (_Handler,), {"behaviour": it}))
    thread = threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_port}/v1", it
    finally:
        server.shutdown()
        thread.join()
        server.server_close()


def unused_port() -> int:
    """A port at which nothing listens."""
    with ThreadingHTTPServer(("127.0.0.1", 0), BaseHTTPRequestHandler) as server:
        return server.server_port
