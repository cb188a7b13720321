"""benchmarks/train_speed.py without training: names of settings, rows, processes that die, figures, targets."""

from __future__ import annotations

import argparse
import json

import pytest

from benchmarks import train_speed, train_speed_contestants
from tests import conftest


def answer(*seconds: float, padding: tuple[int, ...] = (), **more) -> dict:
    """Steps of 100 tokens, half of them trained; ``padding`` tokens beside them."""
    paddings = [*padding, *[0] * len(seconds)]
    return {"steps": [{"seconds": each, "tokens": 100, "trained": 50, "processed": 100 + padded, "loss": 2.0}
                      for each, padded in zip(seconds, paddings, strict=False)],
            "peak_memory_bytes": 10**9, "start_seconds": 5.0, "matrix_gflops": 100.0, **more}


def contestant(role: str = "lora-kit", **options) -> dict:
    return {"name": role, "role": role, "settings": "as it is", "request": {"options": options}}


def row(role: str, speed: float, peak: float = 1e9, **more) -> dict:
    return {"name": role, "role": role, "useful_tokens_per_second": speed, "peak_memory_bytes": peak,
            "loss_distance": 1e-5, "num_losses": 20, **more}


# ---- settings and rows -----------------------------------------------------------------


def test_the_grid_holds_every_setting_once_and_the_defaults():
    names = train_speed.grid()
    assert len(names) == len(set(names)) == 24 and train_speed.TRL_DEFAULTS in names
    assert train_speed.options_of(train_speed.TRL_DEFAULTS) == {}
    assert train_speed.options_of("bf16-weights+packing+compile") == {
        "precision": "bf16-weights", "checkpointing": False, "compile": True, "layout": "packing", "own_order": True}
    # To compile the defaults is to set one thing, and to name the others as they are.
    assert train_speed.options_of(f"{train_speed.TRL_DEFAULTS}+compile") == {
        "precision": "bf16", "checkpointing": True, "compile": True, "layout": "padded", "own_order": False}


@pytest.mark.parametrize("name", ["fp32", "fp32+packed", "int8+padded", "fp32+padded+packing", "padded+fp32"])
def test_other_settings_are_refused(name, capsys):
    with pytest.raises(argparse.ArgumentTypeError, match="is no setting"):
        train_speed.options_of(name)
    with pytest.raises(SystemExit):
        train_speed.main(["--trl-best", name])
    assert "is no setting" in capsys.readouterr().err


@pytest.mark.parametrize("given", [["--steps", "2"], ["--screen-steps", "1"], ["--rounds", "0"], ["--threads", "0"]])
def test_counts_under_their_least_are_refused(given, capsys):
    with pytest.raises(SystemExit):
        train_speed.main(given)
    assert "at least" in capsys.readouterr().err


def test_rows_are_those_of_the_data_folder_and_functions_elsewhere(tmp_path, monkeypatch):
    folder = tmp_path / "data" / "self_instruct"
    folder.mkdir(parents=True)
    kept = {"instruction": "i" * 200, "instances": [{"input": "in", "output": "o" * 100}]}
    (folder / "rows.jsonl").write_text("".join(json.dumps(each) + "\n" for each in (
        kept, {**kept, "instruction": "short"}, {**kept, "instances": [{"input": "", "output": " "}]})))
    monkeypatch.setattr(conftest, "SHARED_DATA", tmp_path / "data")
    assert "self_instruct" in train_speed.write_rows(tmp_path / "rows.jsonl", train_speed.CHARACTERS)
    (only,) = map(json.loads, (tmp_path / "rows.jsonl").read_text().splitlines())
    assert [turn["content"] for turn in only["messages"]] == ["i" * 200 + "\n\nin", "o" * 100]

    monkeypatch.setattr(conftest, "SHARED_DATA", tmp_path / "nothing")
    assert "standard library" in train_speed.write_rows(tmp_path / "rows.jsonl", train_speed.CHARACTERS)
    rows = [json.loads(line)["messages"] for line in (tmp_path / "rows.jsonl").read_text().splitlines()]
    assert len(rows) == 400  # more than the steps whose losses are compared take
    assert all(sum(len(turn["content"]) for turn in turns) in train_speed.CHARACTERS for turns in rows)


# ---- processes -------------------------------------------------------------------------


def test_a_process_that_dies_leaves_its_last_line(tmp_path):
    found = train_speed.run_process({"trainer": "nobody", "threads": 1, "cache": str(tmp_path)}, tmp_path)
    assert found == {"died": "KeyError: 'nobody'"}


def test_a_process_that_is_killed_says_so():
    assert train_speed._last_words(-9, "one\ntwo\n\n") == (
        "killed, most likely for lack of memory; its last line: two")
    assert train_speed._last_words(3, "") == "ended with 3"


def test_a_process_that_takes_too_long_is_ended(tmp_path, monkeypatch):
    sleeper = tmp_path / "sleeper.py"
    sleeper.write_text("import time\ntime.sleep(60)\n")
    monkeypatch.setattr(train_speed, "_CHILD", sleeper)
    monkeypatch.setattr(train_speed, "LIMIT_SECONDS", 0.5)
    found = train_speed.run_process({"trainer": "lora-kit", "threads": 1, "cache": str(tmp_path)}, tmp_path)
    assert found == {"died": "took over 0.5 s"}


# ---- the whole, without training -------------------------------------------------------


def processes(monkeypatch, speed_of) -> list[dict]:
    """Every request that is made from here on, answered with steps of 100 tokens at ``speed_of(request)`` a second."""
    made = []

    def answer_at_once(request: dict, folder) -> dict:
        made.append(request)
        if request["trainer"] == "prepare":
            return {"base": "b", "data_dir": "d", "num_rows": 16, "num_tokens": 3200, "num_trained": 1600,
                    "longest": 400, "losses": [2.0] * request["steps"]}
        if request["options"].get("layout") == "packing":
            return {"died": "ValueError: no packing here"}
        return answer(*[100 / speed_of(request)] * request["steps"])

    monkeypatch.setattr(train_speed, "run_process", answer_at_once)
    return made


def test_the_grid_chooses_and_contestants_take_turns(tmp_path, monkeypatch, capsys):
    def speed_of(request: dict) -> float:
        options = request["options"]
        if request["trainer"] == "lora-kit":
            return 1000
        fast = 10 * (options.get("precision") == "bf16") + 20 * (options.get("layout") == "length-grouped")
        return 100 + fast + 5 * bool(options.get("compile")) - bool(options.get("checkpointing"))

    made = processes(monkeypatch, speed_of)
    code = train_speed.main(["--threads", "2", "1", "--rounds", "2", "--check", "--json", str(tmp_path / "f.json")])
    figures, printed = json.loads((tmp_path / "f.json").read_text()), capsys.readouterr().out
    assert code == 1 and "missed at most 0.5 of the peak memory of TRL's best, 1 thread: 1.00 of it" in printed
    assert "met    at least 6 times TRL's defaults in useful tokens/s, 2 threads: 10.00 times" in printed

    assert printed.count("bf16+packing ") == 2 and printed.count("does not run: ValueError: no packing here") == 12
    for measured in figures["threads"].values():
        names = [entry["settings"] for entry in measured["tried"]]
        assert names == [
            *train_speed.grid(), "bf16+length-grouped+compile", "bf16+checkpointing+length-grouped+compile",
            "fp32+length-grouped+compile", f"{train_speed.TRL_DEFAULTS}+compile", *train_speed.PRECISIONS]
        assert {row["role"]: row["settings"] for row in measured["contestants"]} == {
            "lora-kit": "as it is", "defaults": train_speed.TRL_DEFAULTS, "best": "bf16+length-grouped+compile",
            "hf": "bf16"} | ({"plain": "as it is"} if figures["train_fast"] else {})

    # Losses are compared once, where steps are the same: in the first round at the first number of threads.
    turns = [(request["threads"], request["trainer"], request["steps"]) for request in made if request["steps"] > 6]
    ours = [turn for turn in turns if turn[1] == "lora-kit"]
    of_trl = [turn for turn in turns if turn[1] == "trl"]
    assert [steps for threads, _, steps in ours if threads == 1] == [8] * (len(ours) // 2)
    assert [steps for threads, _, steps in ours if threads == 2] == [20] * (len(ours) // 4) + [8] * (len(ours) // 4)
    assert of_trl == [(threads, "trl", 8) for threads in (2, 2, 2, 2, 1, 1, 1, 1)]  # theirs are set no target
    assert {request.get("block") for request in made if request["trainer"] == "trl"} == {1600}


def test_settings_that_are_known_are_not_tried(monkeypatch, capsys):
    made = processes(monkeypatch, lambda request: 700 if request["trainer"] == "lora-kit" else 100)
    given = ["--threads", "1", "--rounds", "1", "--trl-best", "fp32+padded", "--hf-best", "fp32", "--data", "rows.json"]
    assert train_speed.main(given) == 0 and train_speed.main([*given, "--check"]) == 1
    assert {(request["trainer"], request["steps"]) for request in made} == {
        ("prepare", 20), ("lora-kit", 20), ("trl", 8), ("hf", 8)}
    assert made[0]["recipe"]["data"]["train"].endswith("/rows.json") and "rows: rows.json;" in capsys.readouterr().out


def test_nothing_is_compared_without_losses_to_compare_with(monkeypatch):
    monkeypatch.setattr(train_speed, "run_process", lambda *_: {"died": "MemoryError: none"})
    with pytest.raises(SystemExit, match="could not be made: MemoryError: none"):
        train_speed.main([])


# ---- figures ---------------------------------------------------------------------------


def test_figures_of_a_contestant():
    # Of the two steps after warm-up the faster of both rounds counts, and the median over whole rounds stands beside.
    rounds = [answer(9.0, 1.0, 1.0, 3.0, 1.0), answer(4.0, 1.0, 2.0, 1.0, warm_up_seconds=1.5)]
    found = train_speed.summary(contestant(), rounds, 4, [2.0, 2.0, 2.002, 2.0])
    assert found["useful_tokens_per_second"] == 100 and found["trained_tokens_per_second"] == 50
    assert found["useful_tokens_per_second_median"] == pytest.approx((50 + 200 / 3) / 2)
    assert found["warm_up_seconds"] == pytest.approx(9 + 1 - 2 * 2)
    assert found["num_losses"] == 4 and found["loss_distance"] == pytest.approx(0.002 / 2.002)
    assert train_speed.summary(contestant(own_order=True), rounds, 4, [2.0])["loss_distance"] is None


def test_padding_is_no_warm_up():
    rounds = [answer(3.0, 1.5, 1.0, 1.0, padding=(200, 0))]
    assert train_speed.summary(contestant(), rounds, 4, [2.0])["warm_up_seconds"] == pytest.approx(0.5)


def test_a_contestant_that_died_has_its_reason_for_figures():
    found = train_speed.summary(contestant("best"), [answer(1.0, 1.0, 1.0), {"died": "ValueError: no"}], 3, [2.0])
    assert found == {"name": "best", "role": "best", "settings": "as it is", "died": "ValueError: no"}
    lines = train_speed.table([found, train_speed.summary(contestant(), [answer(1.0, 1.0, 1.0)], 3, [2.0])]).split("\n")
    assert "does not run: ValueError: no" in lines[2] and lines[3].startswith("| lora-kit ")
    assert len({line.count("|") for line in lines}) == 1


def test_targets_met_and_missed():
    rows = [row("lora-kit", 600, 0.9e9), row("defaults", 100, 3e9), row("best", 200, 2e9)]
    found = train_speed.claims({"1": {"contestants": rows}}, 20)
    assert [(entry["met"], entry["evidence"]) for entry in found] == [
        (True, "6.00 times"), (False, "3.00 times"), (True, "0.45 of it"), (True, "1.0e-05")]
    assert "4 times TRL's best" in found[1]["claim"]
    rows[0] |= {"loss_distance": 3e-3, "peak_memory_bytes": 1.1e9}
    assert [entry["met"] for entry in train_speed.claims({"1": {"contestants": rows}}, 20)] == [True, False, False,
                                                                                               False]


def test_every_number_of_threads_has_its_targets():
    rows = [row("lora-kit", 600, 0.9e9), row("defaults", 100, 3e9), row("best", 100, 2e9)]
    fewer = [{**each, "num_losses": 8} for each in rows]
    found = train_speed.claims({"1": {"contestants": rows}, "2": {"contestants": fewer}}, 20)
    assert len(found) == 7 and all(entry["met"] for entry in found)


def test_what_was_not_measured_is_not_met():
    rows = [row("lora-kit", 600, num_losses=8), {"name": "TRL", "role": "best", "died": "no"}]
    found = train_speed.claims({"1": {"contestants": rows}}, 20)
    assert [(entry["met"], entry["evidence"]) for entry in found] == 4 * [(False, "not measured")]


def test_a_longer_warm_up_is_won_back():
    figures = {"start_seconds": 5.0, "warm_up_seconds": 0.0, "seconds_per_step": 3.0}
    fast = {**figures, "start_seconds": 10.0, "warm_up_seconds": 15.0, "seconds_per_step": 1.0}
    assert train_speed.won_back({"lora-kit": fast, "plain": figures}).endswith(
        "starts 20.0 s later and saves 2.00 s a step: won back after 10 steps")
    assert train_speed.won_back({"lora-kit": fast}) is None
    assert "saves nothing" in train_speed.won_back({"lora-kit": figures, "plain": fast})


def test_batches_of_a_trainers_own_order_are_spread_over_the_epoch():
    rows = list(range(275))  # as if sorted by length
    spread = train_speed_contestants.Spread(rows, 8)
    found = list(spread)
    assert sorted(found) == rows and len(spread) == 275 and found[272:] == rows[272:]
    batches = [found[start:start + 8] for start in range(0, 272, 8)]
    assert all(batch == list(range(batch[0], batch[0] + 8)) for batch in batches)
    firsts = [batch[0] for batch in batches]
    for start in range(30):
        assert 60 < sum(firsts[start:start + 4]) / 4 < 210, firsts[start:start + 4]
