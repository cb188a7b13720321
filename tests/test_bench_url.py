"""bench_url.py: figures of answers with known times, a real server with known pauses, and the command line."""

from __future__ import annotations

import itertools
import json
import re
import threading

import numpy as np
import pytest

from lora_kit import bench_url, events
from lora_kit.bench_prompts import Length, Prompt, length_by, of_words
from lora_kit.bench_url import Load
from lora_kit.engines import url
from lora_kit.engines.url import Reply
from lora_kit.errors import MachineError, ModelError, RecipeError
from lora_kit.latency import Limits
from tests import tiny_run
from tests.fake_server import serving, unused_port
from tests.test_latency import Clock

SLACK = 0.15


def reply(started, times, *, prompt=10, output=None, cached=0):
    return Reply(started=started, times=tuple(times), text="x", prompt_tokens=prompt, output_tokens=output,
                 cached_tokens=cached)


def test_every_figure_of_known_answers():
    generator = np.random.default_rng(1)
    firsts, gaps = generator.uniform(0.1, 1, 20), generator.uniform(0.01, 0.1, (20, 4))
    starts = np.arange(20) * 0.3
    replies = [reply(start, start + first + np.concatenate([[0], np.cumsum(each)]), prompt=10 + place, output=5)
               for place, (start, first, each) in enumerate(zip(starts, firsts, gaps, strict=True))]
    load = Load(new_tokens=5, limits=Limits(first_token=0.5, per_token=0.06, end_to_end=0.8))
    found = bench_url.figures(bench_url.Round(replies=replies, failures=[MachineError("u", "fell over")]), load)
    whole = firsts + gaps.sum(1)
    for name, values in (("first_token", firsts), ("gap", gaps), ("per_token", gaps.mean(1)), ("end_to_end", whole)):
        for percent in (50, 90, 99):
            assert found[f"{name}_p{percent}"] == pytest.approx(np.percentile(values, percent)), name
    spent = (starts + whole).max()
    assert found["requests_per_second"] == pytest.approx(20 / spent)
    assert found["output_tokens_per_second"] == pytest.approx(100 / spent)
    assert found["input_tokens_per_second"] == pytest.approx(sum(range(10, 30)) / spent)
    good = ((firsts <= 0.5) & (gaps.mean(1) <= 0.06) & (whole <= 0.8)).sum()
    assert 0 < good < 20 and found["goodput"] == pytest.approx(good / spent)
    assert found["half_width"] == pytest.approx(2.093024 * whole.std(ddof=1) / 20**0.5 / whole.mean())
    assert found["prompt_tokens"] == [10, 19.5, 29] and found["cached_share"] == 0.0
    assert found["failed"] == 1 and "fell over" in found["why_failed"] and found["requests"] == 20
    assert found["counted"] and found["other_length"] == 0 and found["tokens_per_piece"] == pytest.approx(1.0)
    assert found["answers"][3] == pytest.approx([firsts[3], gaps[3].mean(), whole[3], 5])


def test_pieces_of_several_tokens():
    """Two tokens a piece: time per token is by the server's count, gaps are those of pieces."""
    found = bench_url.figures(bench_url.Round(replies=[reply(0, [1, 2, 3], output=6)]), Load(new_tokens=6))
    assert found["per_token_mean"] == pytest.approx(2 / 5) and found["gap_p50"] == pytest.approx(1)
    assert found["tokens_per_piece"] == pytest.approx(2) and found["output_tokens_per_second"] == pytest.approx(2)


def test_what_is_not_given_is_not_made_up():
    without = [Reply(started=0, times=(1.0, 2.0), text="x")]
    found = bench_url.figures(bench_url.Round(replies=without), Load(new_tokens=2))
    assert not found["counted"] and found["other_length"] is None and found["prompt_tokens"] is None
    assert found["cached_share"] is None and found["input_tokens_per_second"] is None and found["half_width"] is None
    short = bench_url.figures(bench_url.Round(replies=[reply(0, [1, 2], output=2, cached=4)]), Load(new_tokens=5))
    assert short["other_length"] == 1 and short["cached_share"] == pytest.approx(0.4)


class FakeServer:
    """Answers in no time, each ``spent`` of a clock that goes on as it answers."""

    def __init__(self, clock, spent, fails=lambda number: None):
        self.clock, self.spent, self.fails, self.number, self.lock = clock, spent, fails, 0, threading.Lock()

    def ask(self, prompt):
        with self.lock:
            self.number += 1
            error = self.fails(self.number)
            if error:
                raise error
            started = self.clock.now
            self.clock.now += next(self.spent)
            return reply(started, [self.clock.now], output=1)


def run(server, **options):
    options = {"concurrency": 1, "least": 4, "seconds": None, **options}
    return bench_url.run(server.ask, of_words(3, "s"), clock=server.clock, **options)


def test_a_load_ends_when_its_interval_is_narrow_or_its_seconds_are_spent():
    assert len(run(FakeServer(Clock(), itertools.repeat(1.0))).replies) == 4
    assert len(run(FakeServer(Clock(), itertools.repeat(1.0)), seconds=60).replies) == 4
    wild = FakeServer(Clock(), itertools.cycle([1.0, 3.0]))
    found = run(wild, seconds=60)
    assert len(found.replies) == 30 and found.seconds == pytest.approx(60)
    # Half of the interval of n values 1.0 and 1.1 in turn is 2 % from 25 of them on: 2.064 * 0.0510 / 5 / 1.048.
    mild = run(FakeServer(Clock(), itertools.cycle([1.0, 1.1])), seconds=1000)
    values = [each.times[-1] - each.started for each in mild.replies]
    assert bench_url.repeats.half_width(values) <= 0.02 < bench_url.repeats.half_width(values[:-1])


def test_requests_that_fail_are_kept_apart_and_a_dead_server_is_left_alone():
    some = run(FakeServer(Clock(), itertools.repeat(1.0), lambda n: MachineError("u", "x") if n == 2 else None))
    assert len(some.replies) == 3 and len(some.failures) == 1
    dead = FakeServer(Clock(), itertools.repeat(1.0), lambda n: MachineError("u", f"down {n}"))
    with pytest.raises(MachineError, match="down 1"):
        run(dead, least=50, seconds=60)
    assert dead.number == 3
    dies = FakeServer(Clock(), itertools.repeat(1.0), lambda n: MachineError("u", "down") if n > 6 else None)
    found = run(dies, least=500, seconds=None)
    assert len(found.replies) == 6 and len(found.failures) == 7
    wrong = FakeServer(Clock(), itertools.repeat(1.0), lambda n: ModelError("u", "no such model") if n > 2 else None)
    with pytest.raises(ModelError):
        run(wrong, least=50)
    assert wrong.number == 3


def test_a_bug_in_a_thread_is_raised():
    with pytest.raises(ZeroDivisionError):
        run(FakeServer(Clock(), (1 / 0 for _ in range(1))))


def test_words_come_to_the_tokens_that_are_asked_for():
    count = lambda prompt: 12 + 3 * len(prompt.messages[0]["content"].split())  # noqa: E731
    length = length_by(count, 128, "s")
    # 12 of a template, and 8 words more: the number, and the request at the end.
    assert length.each == pytest.approx(3) and length.fixed == pytest.approx(12 + 24)
    assert abs(count(next(of_words(length.words(300), "t"))) - 300) <= 1.5
    assert length.words(5) == 1 and Length().words(7) == 7
    assert length_by(lambda prompt: None, 128, "s") is None and length_by(lambda prompt: 5, 128, "s") is None


def test_no_two_prompts_of_words_begin_alike():
    prompts = list(itertools.islice(of_words(4, "s"), 500))
    starts = {prompt.messages[0]["content"].split()[0] for prompt in prompts}
    assert len(starts) == 500 and prompts[:3] == list(itertools.islice(of_words(4, "s"), 3))


def test_a_server_with_known_pauses():
    with serving(first=0.1, gap=0.03, cached=3) as (address, server):
        load = Load(concurrency=(1, 4), prompt_tokens=60, new_tokens=5, requests=8,
                    limits=Limits(first_token=0.1 + SLACK))
        record = bench_url.measure(url.connect(address), load)
        # Two requests to learn how long words are, two to four rounds of warm-up, then those that count.
        warm = sum(len(each["warm_ups"]) * each["concurrency"] for each in record["loads"])
        assert len(server.requests) == 2 + warm + 16 and server.most_at_once == 4
        prompts = [body["messages"][0]["content"] for body in server.requests]
        assert len({prompt.split()[0] for prompt in prompts}) == len(prompts)
    one, four = record["loads"]
    for each in (one, four):
        assert each["requests"] == 8 and each["other_length"] == 0 and each["failed"] == 0
        assert 0.1 <= each["first_token_p50"] < 0.1 + SLACK and 0.03 <= each["gap_p50"] < 0.03 + SLACK
        assert 0.22 <= each["end_to_end_p50"] < 0.22 + 2 * SLACK
        assert abs(each["prompt_tokens"][1] - 60) <= 2 and each["cached_share"] == pytest.approx(
            3 / each["prompt_tokens"][1], rel=0.1)
        assert each["goodput"] <= each["requests_per_second"] <= each["concurrency"] / 0.22
    assert four["requests_per_second"] > 2 * one["requests_per_second"]
    text = "\n".join(bench_url.notes(record))
    assert "8 of" not in text and "answers: 16 of 16 have the 5 tokens asked for, by the server's count" in text
    assert re.search(r"prefix cache: [45]\.\d% of the prompts' tokens at most", text)
    assert "no prompt was asked twice" in text
    assert bench_url.columns(record)[-1] == "good/s" and "depth" not in bench_url.columns(record)
    assert [row[0] for row in bench_url.rows(record)] == ["1", "4"]
    assert all(len(row) == len(bench_url.columns(record)) for row in bench_url.rows(record))


def test_energy_is_that_of_a_server_on_this_machine(monkeypatch):
    class Meter:
        def joules(self):
            return {"cpu": 3.2, "gpu": None}

    monkeypatch.setattr(bench_url.energy, "Meter", Meter)
    with serving() as (address, _):
        server = url.connect(address)
        record = bench_url.measure(server, Load(new_tokens=4))
        assert record["loads"][0]["joules_per_token"] == pytest.approx(0.1)  # of 8 answers of 4 tokens
        assert "energy of a generated token" in "\n".join(bench_url.notes(record))
        monkeypatch.setattr(url, "_LOCAL", ())
        monkeypatch.setattr(server, "_key", "k")
        heard = []
        with events.listening(heard.append):
            assert bench_url.measure(server, Load(new_tokens=4))["loads"][0]["joules_per_token"] is None
        assert [event.text for event in heard if isinstance(event, events.Caution)] == [
            f"the key goes to {address} unencrypted: use https"]


def test_depth_makes_prompts_longer():
    with serving() as (address, _):
        record = bench_url.measure(url.connect(address), Load(depths=(0, 200), prompt_tokens=40, new_tokens=2))
    assert [each["prompt_tokens_asked"] for each in record["loads"]] == [40, 240]
    for each in record["loads"]:
        assert abs(each["prompt_tokens"][1] - each["prompt_tokens_asked"]) <= 2
    assert [row[:2] for row in bench_url.rows(record)] == [["1", "0"], ["1", "200"]]
    assert bench_url.columns(record)[1] == "depth" and "40 or 240 + 2 tokens" in bench_url.title(record)


def test_a_server_that_counts_nothing_and_stops_when_it_likes():
    with serving(usage=False, refuses=("ignore_eos",), answers_early=3) as (address, _):
        record = bench_url.measure(url.connect(address), Load(new_tokens=8))
    text = "\n".join(bench_url.notes(record))
    assert "does not say how many tokens they have" in text and "a piece of its stream is taken for one" in text
    assert "does not say what it took from there" in text
    with serving(refuses=("ignore_eos",), answers_early=3, per_piece=2) as (address, _):
        record = bench_url.measure(url.connect(address), Load(new_tokens=8))
    text = "\n".join(bench_url.notes(record))
    assert "answers: 0 of 8 have the 8 tokens asked for, by the server's count; it does not take ignore_eos" in text
    assert "a piece of the stream has 1.50 to 1.50 tokens" in text


def test_prompts_of_a_run_are_asked_as_they_are():
    real = [Prompt(messages=[{"role": "user", "content": f"question {number}"}]) for number in range(5)]
    with serving() as (address, server):
        record = bench_url.measure(url.connect(address), Load(new_tokens=2, requests=5), real=real)
        asked = [body["messages"] for body in server.requests[-5:]]
        assert asked == [prompt.messages for prompt in real] and not record["prompts_repeat"]
        again = bench_url.measure(url.connect(address), Load(new_tokens=2, concurrency=(1, 2)), real=real)
        assert again["prompts_repeat"] and "prompts were asked more than once" in "\n".join(bench_url.notes(again))
        with pytest.raises(RecipeError, match="--depth: has no effect on the prompts of a run"):
            bench_url.measure(url.connect(address), Load(depths=(0, 8)), real=real)


def test_counts():
    assert bench_url.counts("1, 2,8", "--concurrency") == (1, 2, 8)
    assert bench_url.counts("0", "--depth", least=0) == (0,)
    for text in ("", "0", "1,1", "a", "-1", "1.5", "1,,2"):
        with pytest.raises(RecipeError, match="is no list of different numbers from 1 on"):
            bench_url.counts(text, "--concurrency")


def test_the_command_line(tmp_path):
    with serving(gap=0.002, key="secret-7") as (address, _):
        done = tiny_run.lora_kit("bench", address, "--concurrency", "1,2", "--prompt-tokens", "40", "--goodput",
                                 "ttft:500ms", "--goodput", "e2el:20s", cwd=tmp_path, LORA_KIT_API_KEY="secret-7")
        assert done.returncode == 0, done.stderr
        assert "good/s: requests a second within ttft 500 ms, e2el 20 s" in done.stdout
        assert f"tiny at {address}, 40 + 32 tokens" in done.stdout and "secret" not in done.stdout + done.stderr
        refused = tiny_run.lora_kit("bench", address, cwd=tmp_path)
    assert refused.returncode == 6 and refused.stderr.splitlines() == [
        f"{address}: refuses access (401); put its key into the environment variable LORA_KIT_API_KEY, or name another "
        "with --key-from"]
    gone = tiny_run.lora_kit("bench", f"http://127.0.0.1:{unused_port()}/v1", cwd=tmp_path)
    assert gone.returncode == 6 and "refuses the connection" in gone.stderr and len(gone.stderr.splitlines()) == 1


@pytest.mark.parametrize(("arguments", "told"), [
    (["http://127.0.0.1:1", "--goodput", "ttft:0"], "goodput ttft:0: is no limit; write ttft, tpot, e2el with a time"),
    (["http://127.0.0.1:1", "--concurrency", "1,x"], "--concurrency 1,x: is no list"),
    (["http://127.0.0.1:1", "--threads", "1"], "--threads is not for a URL; leave out --threads"),
    (["http://127.0.0.1:1", "--prompts-of", "nothing"], "nothing: is not a run folder"),
    (["http://127.0.0.1:1", "--batch-size", "2"], "--batch-size is not for a URL"),
    (["some/model", "--concurrency", "2"], "bench some/model: --concurrency is for a URL (http://HOST:PORT/v1)"),
    (["some/model", "--goodput", "itl:5"], "goodput itl:5: is no limit"),
    (["some/model", "--depth", "x"], "--depth x: is no list of different numbers from 0 on"),
])
def test_what_does_not_fit_together(tmp_path, arguments, told):
    done = tiny_run.lora_kit("bench", *arguments, cwd=tmp_path)
    assert done.returncode == 2 and told in done.stderr and len(done.stderr.splitlines()) == 1, done.stderr


class SmallRun:
    """A run folder with what an evaluation asked."""

    def __init__(self, path):
        from lora_kit import rundir

        self.path = path
        self.stage_dir = lambda stage: path / stage
        self.locked = lambda: rundir.Run(path, None, {}).locked()


def test_what_a_run_asks(tmp_path):
    from lora_kit import bench_prompts
    from lora_kit.errors import DataError

    run = SmallRun(tmp_path)
    with pytest.raises(DataError, match="asks nothing that could be answered"):
        bench_prompts.of_run(run)
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "held_out.jsonl").write_text(
        json.dumps({**tiny_run.conversation(1), "tools": [], "origin": "r:1"}) + "\n")
    assert bench_prompts.of_run(run)[0].messages == tiny_run.conversation(1)["messages"][:1]
    (tmp_path / "eval" / "items").mkdir(parents=True)
    asked = [{"messages": [{"role": "user", "content": text}], "tools": [], "inputs": {}} for text in ("a", "b", "a")]
    asked += [{"messages": [], "tools": [], "inputs": {}},
              {"messages": asked[0]["messages"], "tools": [], "inputs": {}, "likelihood": {"context": "x"}}]
    (tmp_path / "eval" / "items" / "t.json").write_text(json.dumps({"items": asked}))
    assert [prompt.messages[0]["content"] for prompt in bench_prompts.of_run(run)] == ["a", "b"]


def test_the_record_of_a_run(tmp_path):
    record = {"url": "http://127.0.0.1:80/v1", "model": "org/m", "prompts": "2 of a run"}
    path = bench_url.write(record, SmallRun(tmp_path))
    assert path == tmp_path / "servers" / "127.0.0.1-80-v1-org-m-prompts.json"
    assert json.loads(path.read_text()) == record
