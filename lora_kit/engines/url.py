"""Ask a server with OpenAI's HTTP API, piece by piece: vLLM, llama.cpp's server, Ollama, SGLang, a provider.

It loads no artifact: `lora-kit bench URL` measures what is being served. A request is one streamed chat completion
over a connection of its own, opened before the clock starts; each piece of text has the moment at which its line came.
What the server counted (`usage`) is asked for and taken as given; what it does not take (`ignore_eos`, `usage`) is
left out after it has refused it once. A key comes from an environment variable and goes nowhere but into the request's
header. Reads and writes nothing but the connection.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
import ssl
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from lora_kit.errors import LoraKitError, MachineError, ModelError, RecipeError
from lora_kit.types import Artifact

KEY_FROM = "LORA_KIT_API_KEY"
"""Environment variable that a key is read from unless another is named. Not OPENAI_API_KEY: a key is sent to nobody
but whom it is for."""
TIMEOUT_SECONDS = 300.0
"""Longest wait for the next piece of an answer."""
_LOCAL = ("localhost", "127.0.0.1", "::1")
_TEXTS = ("content", "reasoning_content", "reasoning", "refusal")
"""Where in a chunk's delta text stands; reasoning is generated text as well."""


def missing() -> str | None:
    """None: Python's own HTTP client is all that it takes."""
    return None


def load(artifact: Artifact, *, dtype: str = "auto", threads: int | None = None, device: str | None = None) -> Any:
    """RecipeError: a server loads its own model, and gives texts in place of tokens."""
    raise RecipeError("engine url", "loads no artifact", "start a server with it, then lora-kit bench URL")


def computes(artifact: Artifact, *, dtype: str = "auto", device: str | None = None) -> dict[str, str]:
    """RecipeError, as :func:`load`."""
    return load(artifact, dtype=dtype, device=device)


@dataclass(frozen=True, kw_only=True)
class Reply:
    """One answer.

    Args:
        started: when the request was sent, in seconds of the clock.
        times: when each piece of text came.
        prompt_tokens, output_tokens: by the server's count; None where it gives none.
        cached_tokens: tokens of the prompt that the server had in its prefix cache; None where it does not say.
    """

    started: float
    times: tuple[float, ...]
    text: str
    prompt_tokens: int | None = None
    output_tokens: int | None = None
    cached_tokens: int | None = None


class Server:
    """A server behind a URL, with one of its models. Made by :func:`connect`.

    Attributes:
        url: without a slash at its end; never holds a key.
        model: as requests name it.
        software: what the server calls itself in its answers' header; empty where it does not.
        asks: fields of a request beyond the plain ones that the server has taken: ``ignore_eos``, ``min_tokens``,
            ``stream_options``.
    """

    def __init__(self, url: str, key: str | None, key_from: str, clock: Callable[[], float]) -> None:
        parts = checked(url)
        self.url = url.rstrip("/") if parts.path.strip("/") else f"{parts.scheme}://{parts.netloc}/v1"
        self._parts, self._key, self._key_from, self._clock = urlsplit(self.url), key, key_from, clock
        self.model, self.software = "", ""
        self.asks = ["ignore_eos", "min_tokens", "stream_options"]
        self._limit = "max_tokens"

    @property
    def is_local(self) -> bool:
        """Whether it runs on this machine."""
        return self._parts.hostname in _LOCAL

    @property
    def exposes_key(self) -> bool:
        """Whether a key goes to another machine unencrypted."""
        return bool(self._key) and self._parts.scheme == "http" and not self.is_local

    def models(self) -> list[str] | None:
        """Names of the models that it has; None where it does not list them."""
        with self._answered("GET", "/models", None) as response:
            if response.status == 404:
                return None
            self._check(response, "/models")
            try:
                return [str(each["id"]) for each in json.loads(response.read())["data"]]
            except (ValueError, KeyError, TypeError):
                raise self._no_api("answers /models with no list of models") from None
            except (OSError, http.client.HTTPException) as error:
                raise self._unreachable(error) from None

    def choose(self, model: str | None) -> None:
        """Take ``model``, or the only one that there is.

        Raises:
            ModelError: it has no such model.
            RecipeError: it has several, or lists none, and none was named.
        """
        there = self.models()
        if model is None:
            if not there or len(there) > 1:
                what = f"has {len(there)} models: {_listed(there)}" if there else "does not say which models it has"
                raise RecipeError(self.url, what, "name one with --model")
            model = there[0]
        elif there and model not in there and f"{model}:latest" not in there:  # Ollama's default tag
            raise ModelError(self.url, f"has no model '{model}'", f"it has: {_listed(there)}")
        self.model = model

    def settle(self, messages: Sequence[dict[str, Any]], max_tokens: int, tools: Sequence[dict[str, Any]] = ()
               ) -> Reply:
        """A first answer; what the server refuses of the request is left out from then on."""
        while True:
            try:
                return self.ask(messages, max_tokens, tools)
            except _Refused as refused:
                if "max_completion_tokens" in refused.what and self._limit == "max_tokens":
                    self._limit = "max_completion_tokens"
                elif "stream_options" in refused.what and "stream_options" in self.asks:
                    self.asks.remove("stream_options")
                elif {"ignore_eos", "min_tokens"} & set(self.asks):
                    self.asks = [name for name in self.asks if name == "stream_options"]
                elif self.asks:
                    self.asks = []
                else:
                    raise RecipeError(refused.where, refused.what, refused.todo) from None

    def ask(self, messages: Sequence[dict[str, Any]], max_tokens: int, tools: Sequence[dict[str, Any]] = ()) -> Reply:
        """The greedy answer to ``messages``, of ``max_tokens`` where the server goes past stop tokens.

        Raises:
            MachineError: no connection, no stream, or one that ended in the middle.
            ModelError: the server does not know the model.
            RecipeError: it refuses the request.
        """
        extra = {"ignore_eos": True, "min_tokens": max_tokens, "stream_options": {"include_usage": True}}
        body = {"model": self.model, "messages": list(messages), self._limit: max_tokens, "temperature": 0,
                "stream": True, **{name: extra[name] for name in self.asks}}
        if tools:
            body["tools"] = list(tools)
        with self._answered("POST", "/chat/completions", body) as response:
            self._check(response, "/chat/completions")
            if "text/event-stream" not in response.getheader("Content-Type", ""):
                raise self._no_api("does not stream: it answers with "
                                   + (response.getheader("Content-Type") or "no content type"))
            return self._read(response, response.started)

    # ---- one exchange ---------------------------------------------------------------------

    def _answered(self, method: str, path: str, body: dict[str, Any] | None) -> _Exchange:
        headers = {"Accept": "text/event-stream" if body else "application/json"}
        if self._key:
            headers["Authorization"] = f"Bearer {self._key}"
        payload = None
        if body is not None:
            payload, headers["Content-Type"] = json.dumps(body).encode(), "application/json"
        kind = http.client.HTTPSConnection if self._parts.scheme == "https" else http.client.HTTPConnection
        connection = kind(self._parts.hostname or "", self._parts.port, timeout=TIMEOUT_SECONDS)
        try:
            connection.connect()
            started = self._clock()
            connection.request(method, self._parts.path + path, body=payload, headers=headers)
            response = connection.getresponse()
        except (OSError, http.client.HTTPException, UnicodeError) as error:  # UnicodeError: a host that is no name
            connection.close()
            raise self._unreachable(error) from None
        self.software = response.getheader("Server", "").strip() or self.software
        return _Exchange(connection, response, started)

    def _read(self, response: _Exchange, started: float) -> Reply:
        times, texts, usage, finished = [], [], {}, False
        try:
            for line, moment in self._lines(response):
                if line == "[DONE]":
                    finished = True
                    break
                chunk = self._chunk(line)
                usage = chunk.get("usage") or usage
                for choice in chunk.get("choices") or ():
                    piece = _text_of(choice)
                    if piece:
                        times.append(moment)
                        texts.append(piece)
                    finished = finished or bool(choice.get("finish_reason"))
        except (OSError, http.client.HTTPException) as error:
            if not finished:
                raise self._cut(len(times), error) from None
        if not finished:
            raise self._cut(len(times), None)
        if not times:
            raise MachineError(self.url, "answered without a word", "see whether its model answers at all")
        details = usage.get("prompt_tokens_details") or {}
        return Reply(started=started, times=tuple(times), text="".join(texts),
                     prompt_tokens=usage.get("prompt_tokens"), output_tokens=usage.get("completion_tokens"),
                     cached_tokens=details.get("cached_tokens"))

    def _lines(self, response: _Exchange) -> Iterator[tuple[str, float]]:
        """(data, moment) of each event; of server-sent events only ``data`` matters here."""
        while line := response.readline():
            moment = self._clock()
            if line.startswith(b"data:"):
                yield line[5:].decode("utf-8", "replace").strip(), moment

    def _chunk(self, text: str) -> dict[str, Any]:
        try:
            chunk = json.loads(text)
        except ValueError:
            chunk = None
        if not isinstance(chunk, dict):
            raise self._no_api("streams what is not JSON")
        if chunk.get("error"):
            raise MachineError(self.url, f"failed while it answered: {self._safe(_message_of(chunk))}",
                               "see the server's log")
        return chunk

    # ---- what goes wrong -------------------------------------------------------------------

    def _check(self, response: _Exchange, path: str) -> None:
        status = response.status
        if status == 200:
            return
        if status in (401, 403):  # its message may repeat the key
            todo = f"the key in {self._key_from} is not one that it takes" if self._key else \
                f"put its key into the environment variable {self._key_from}, or name another with --key-from"
            raise MachineError(self.url, f"refuses access ({status})", todo)
        try:
            told = self._safe(_message_of(json.loads(response.read(65536))))
        except (OSError, ValueError, http.client.HTTPException):
            told = ""
        if status == 404:
            if "model" in told.lower():
                raise ModelError(self.url, f"has no model '{self.model}': {told}", "name another with --model")
            raise self._no_api(f"has no {path}")
        if status in (400, 422):
            raise _Refused(self.url, f"refuses the request ({status}): {told or 'it does not say why'}",
                           "change the shape or the model")
        if 300 <= status < 400:
            raise RecipeError(self.url, f"leads elsewhere ({status})", "name the address that it leads to")
        raise MachineError(self.url, f"answered {status}" + (f": {told}" if told else ""),
                           "lower --concurrency" if status == 429 else "see the server's log")

    def _unreachable(self, error: Exception) -> MachineError:
        if isinstance(error, ConnectionRefusedError):
            return MachineError(self.url, "refuses the connection", "start the server, or check host and port")
        if isinstance(error, socket.gaierror):
            return MachineError(self.url, "has a host that is not known", "check its name")
        if isinstance(error, TimeoutError):
            return MachineError(self.url, f"gave no sign for {TIMEOUT_SECONDS:.0f} s", "see the server's log")
        if isinstance(error, ssl.SSLError):
            return MachineError(self.url, f"does not speak TLS as it should ({error.reason or error})",
                                "check the address: http or https")
        return MachineError(self.url, f"does not answer ({self._safe(str(error)) or type(error).__name__})",
                            "is it an HTTP server? see its log")

    def _cut(self, pieces: int, error: Exception | None) -> MachineError:
        why = f"gave no sign for {TIMEOUT_SECONDS:.0f} s" if isinstance(error, TimeoutError) else "ended the stream"
        return MachineError(self.url, f"{why} in the middle of an answer, after {pieces} pieces of it",
                            "see the server's log")

    def _no_api(self, what: str) -> RecipeError:
        return RecipeError(self.url, what, "name the base of an OpenAI-compatible API, such as http://HOST:PORT/v1")

    def _safe(self, text: str) -> str:
        """``text`` on one line, without the key, and not long."""
        text = " ".join(text.split())
        return (text.replace(self._key, "***") if self._key else text)[:200]


class _Refused(RecipeError):
    """A request that the server does not take as it is."""


class _Exchange:
    """A response with its connection, closed together."""

    def __init__(self, connection: http.client.HTTPConnection, response: http.client.HTTPResponse, started: float
                 ) -> None:
        self._connection, self._response, self.started = connection, response, started
        self.status, self.getheader = response.status, response.getheader
        self.read, self.readline = response.read, response.readline

    def __enter__(self) -> _Exchange:
        return self

    def __exit__(self, *_: object) -> None:
        self._response.close()
        self._connection.close()


def connect(url: str, *, model: str | None = None, key_from: str = KEY_FROM,
            clock: Callable[[], float] = time.perf_counter) -> Server:
    """The server behind ``url``, with the model that it is to answer with.

    Args:
        key_from: the environment variable that holds its key; it may be missing where it is the default one.

    Raises:
        RecipeError: ``url`` is none, or holds a password; the named variable is not set; no model follows.
        ModelError: the server has no such model.
        MachineError: it does not answer, or refuses the key.
    """
    key = os.environ.get(key_from, "").strip() or None
    if key is None and key_from != KEY_FROM:
        raise RecipeError(f"--key-from {key_from}", "is not set in the environment", f"export {key_from}=...")
    if key and not (key.isascii() and key.isprintable()):
        raise RecipeError(f"the key in {key_from}", "has characters that no key has", "set it again")
    server = Server(url, key, key_from, clock)
    server.choose(model)
    return server


def is_url(target: str) -> bool:
    """Whether ``target`` is meant as an address of a server."""
    return target.startswith(("http://", "https://"))


def checked(url: str) -> Any:
    """``url`` in its parts.

    Raises:
        RecipeError: it is no http address, or has a part that it must not have.
    """
    try:
        parts = urlsplit(url)
        port_fits = parts.port is None or parts.port > 0
    except ValueError:
        port_fits = False
    if not port_fits or parts.scheme not in ("http", "https") or not parts.hostname:
        raise RecipeError(url.rpartition("@")[2], "is no address of a server", "write http://HOST:PORT/v1")
    if parts.username or parts.password or "@" in parts.netloc:
        raise RecipeError(f"{parts.scheme}://{parts.hostname}", "has a name or password in its address",
                          f"put the key into the environment variable {KEY_FROM}")
    if parts.query or parts.fragment:
        raise RecipeError(f"{parts.scheme}://{parts.netloc}{parts.path}", "has more than an address",
                          "leave out what follows ? or #; a key belongs into the environment")
    return parts


def is_fault_of_all(error: LoraKitError) -> bool:
    """Whether every further request would fail as well: wrong key, wrong model, wrong request."""
    return isinstance(error, (ModelError, RecipeError)) or "refuses access" in error.what


def _text_of(choice: dict[str, Any]) -> str:
    """What a chunk adds to the answer; of a tool call its arguments, or its name."""
    delta = choice.get("delta") or {}
    parts = [delta.get(name) or "" for name in _TEXTS]
    for call in delta.get("tool_calls") or ():
        function = call.get("function") or {}
        parts += [function.get("name") or "", function.get("arguments") or ""]
    return "".join(part for part in parts if isinstance(part, str))


def _message_of(answer: Any) -> str:
    """The message of an error, wherever servers put it."""
    error = answer.get("error", answer) if isinstance(answer, dict) else answer
    if isinstance(error, dict):
        error = error.get("message") or error.get("detail") or json.dumps(error)
    return error if isinstance(error, str) else json.dumps(error)


def _listed(names: Sequence[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "")
