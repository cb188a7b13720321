"""engines/url.py: what a request asks, each moment of an answer, and every way in which a server fails."""

from __future__ import annotations

import http.client

import pytest

from lora_kit import engines
from lora_kit.engines import url
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.types import Artifact
from tests.fake_server import serving, unused_port

ASKED = [{"role": "user", "content": "one two three four"}]
SLACK = 0.15
"""Seconds that a piece may take from one thread to the other on a busy machine."""


def test_every_piece_has_the_moment_at_which_it_was_sent():
    with serving(first=0.2, gap=0.05) as (address, server):
        reply = url.connect(address).ask(ASKED, 6)
    (sent,) = server.sent
    assert len(reply.times) == len(sent) == 6 and reply.text == "w0 w1 w2 w3 w4 w5 "
    assert all(0 <= came - went < SLACK for came, went in zip(reply.times, sent, strict=True))
    assert reply.times[0] - reply.started >= 0.2 and reply.times[-1] - reply.times[0] >= 5 * 0.05
    assert (reply.prompt_tokens, reply.output_tokens, reply.cached_tokens) == (7 + 6, 6, 0)


def test_what_a_request_asks():
    with serving() as (address, server):
        found = url.connect(address)
        found.ask(ASKED, 3, [{"type": "function", "function": {"name": "f"}}])
    (body,) = server.requests
    assert body == {"model": "tiny", "messages": ASKED, "max_tokens": 3, "temperature": 0, "stream": True,
                    "ignore_eos": True, "min_tokens": 3, "stream_options": {"include_usage": True},
                    "tools": [{"type": "function", "function": {"name": "f"}}]}
    assert found.software == "fake/1" and found.is_local


@pytest.mark.parametrize(("refuses", "asks", "counted"), [
    (("ignore_eos", "min_tokens"), ["stream_options"], 2), (("stream_options",), ["ignore_eos", "min_tokens"], None),
    (("min_tokens", "stream_options"), [], None)])
def test_what_a_server_refuses_is_left_out(refuses, asks, counted):
    with serving(refuses=refuses, answers_early=2) as (address, server):
        found = url.connect(address)
        reply = found.settle(ASKED, 4)
        assert found.asks == asks and found.asks == [name for name in server.requests[-1] if name in (
            "ignore_eos", "min_tokens", "stream_options")]
    assert reply.output_tokens == counted and len(reply.times) == (4 if "ignore_eos" in asks else 2)


def test_the_newer_name_of_the_length_is_taken_when_asked_for():
    with serving(status=400, message="use max_completion_tokens", every=1) as (address, server):
        with pytest.raises(RecipeError, match="refuses the request .400.: use max_completion_tokens"):
            url.connect(address).settle(ASKED, 4)
        assert "max_completion_tokens" in server.requests[1] and "max_tokens" not in server.requests[1]
        assert len(server.requests) == 4  # as it is, with the newer name, without the extras, without usage


def test_an_answer_in_other_words_than_content_counts():
    for delta, text in (({"reasoning_content": "hm"}, "hm"), ({"content": None, "reasoning": "so"}, "so"),
                        ({"tool_calls": [{"function": {"name": "f", "arguments": "{}"}}]}, "f{}"), ({}, "")):
        assert url._text_of({"delta": delta}) == text


def test_a_key_comes_from_the_environment_and_is_never_told(monkeypatch):
    monkeypatch.setenv("MINE", "secret-1")
    with serving(key="secret-1") as (address, server):
        assert url.connect(address, key_from="MINE").ask(ASKED, 2).output_tokens == 2
        with pytest.raises(MachineError) as error:
            url.connect(address)
        assert str(error.value) == (f"{address}: refuses access (401); put its key into the environment variable "
                                    "LORA_KIT_API_KEY, or name another with --key-from")
        server.key = "another"
        with pytest.raises(MachineError, match="the key in MINE is not one that it takes") as error:
            url.connect(address, key_from="MINE")
        assert "secret" not in str(error.value)
        server.key, server.status, server.message = "secret-1", 500, "no room for secret-1 here"
        with pytest.raises(MachineError, match=r"answered 500: no room for \*\*\* here"):
            url.connect(address, key_from="MINE").ask(ASKED, 2)
    with pytest.raises(RecipeError, match="--key-from NOT_SET: is not set"):
        url.connect(address, key_from="NOT_SET")
    monkeypatch.setenv("MINE", "a\nb")
    with pytest.raises(RecipeError, match="characters that no key has"):
        url.connect(address, key_from="MINE")


def test_a_key_that_goes_out_in_the_open():
    for address, key, exposes in (("http://far/v1", "k", True), ("https://far/v1", "k", False),
                                  ("http://far/v1", None, False), ("http://127.0.0.1/v1", "k", False)):
        assert url.Server(address, key, "V", lambda: 0.0).exposes_key is exposes


def test_models():
    with serving(models=["a", "b"]) as (address, server):
        assert url.connect(address, model="b").model == "b"
        with pytest.raises(RecipeError, match="has 2 models: a, b; name one with --model"):
            url.connect(address)
        with pytest.raises(ModelError, match="has no model 'c'; it has: a, b"):
            url.connect(address, model="c")
        server.models = ["a:latest"]
        assert url.connect(address, model="a").model == "a"
        server.models = None
        with pytest.raises(RecipeError, match="does not say which models it has"):
            url.connect(address)
        unlisted = url.connect(address, model="c")
        server.models = ["a"]
        with pytest.raises(ModelError, match="has no model 'c': The model 'c' does not exist"):
            unlisted.ask(ASKED, 2)


@pytest.mark.parametrize(("behaviour", "kind", "told"), [
    ({"cuts_after": 3}, MachineError, "ended the stream in the middle of an answer, after 3 pieces of it"),
    ({"cuts_after": 0}, MachineError, "in the middle of an answer, after 0 pieces"),
    ({"fails_after": 1}, MachineError, "failed while it answered: out of blocks"),
    ({"status": 503, "message": "loading"}, MachineError, "answered 503: loading; see the server's log"),
    ({"status": 429, "message": "slow down"}, MachineError, "answered 429: slow down; lower --concurrency"),
    ({"status": 404, "message": "no such path"}, RecipeError, "has no /chat/completions; name the base"),
    ({"status": 307}, RecipeError, "leads elsewhere .307."),
    ({"status": 400, "message": "context length is 8"}, RecipeError, "refuses the request .400.: context length is 8"),
    ({"raw": "hello"}, RecipeError, "does not stream: it answers with text/plain"),
    ({"answers_early": 0, "refuses": ("ignore_eos",)}, MachineError, "answered without a word"),
])
def test_a_server_that_fails_is_one_line(behaviour, kind, told):
    with serving(**behaviour) as (address, _):
        with pytest.raises(kind, match=told) as error:
            url.connect(address).settle(ASKED, 6)
        assert error.value.where == address and error.value.exit_code == kind.exit_code


def test_nobody_there():
    with pytest.raises(MachineError, match="refuses the connection; start the server"):
        url.connect(f"http://127.0.0.1:{unused_port()}/v1")
    with pytest.raises(MachineError, match="has a host that is not known"):
        url.connect("http://nobody.invalid/v1")


def test_a_server_that_falls_silent(monkeypatch):
    monkeypatch.setattr(url, "TIMEOUT_SECONDS", 0.2)
    with serving(first=0.0, gap=0.6) as (address, _):
        with pytest.raises(MachineError, match="gave no sign for 0 s in the middle of an answer, after 1 pieces"):
            url.connect(address).ask(ASKED, 3)


@pytest.mark.parametrize(("address", "told"), [
    ("http://", "http://: is no address"), ("http://host:port/v1", "is no address"),
    ("http://host:99999/v1", "is no address"), ("http://me:pw@host/v1", "http://host: has a name or password"),
    ("http://host/v1?key=pw", "has more than an address")])
def test_an_address_that_is_none(address, told):
    with pytest.raises(RecipeError, match=told) as error:
        url.connect(address)
    assert error.value.exit_code == 2 and "pw" not in str(error.value)


def test_an_address_without_a_path_is_that_of_version_1():
    with serving() as (address, _):
        assert url.connect(address.removesuffix("/v1")).url == address
        assert url.connect(address + "/").url == address


def test_broken_pieces():
    with serving() as (address, _):
        server = url.connect(address)
    for line, told in (("{", "streams what is not JSON"), ("[1]", "not JSON"), ('{"error": "full"}', "full")):
        with pytest.raises((MachineError, RecipeError), match=told):
            server._chunk(line)
    error = server._unreachable(http.client.BadStatusLine("SSH-2.0"))
    assert error.exit_code == 6 and "is it an HTTP server" in str(error)


def test_it_serves_no_artifact():
    one = Artifact(name="a", path="p", kind="hf")
    for use in (engines.open_engine, engines.computes):
        with pytest.raises(RecipeError, match="engine url: loads no artifact"):
            use(one, prefer="url")
    assert url.is_url("https://x") and not url.is_url("runs/x")
