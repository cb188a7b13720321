"""report_load.py: sweeps and servers in the report, as tables and drawn."""

import dataclasses
import json
from xml.etree import ElementTree

import pytest

from lora_kit import bench_url, latency, report_costs, report_findings, report_load
from lora_kit.bench_url import Load, Round
from lora_kit.engines.url import Reply
from lora_kit.errors import RefusedError
from lora_kit.latency import Limits
from tests import run_on_paper
from tests.test_bench_sweep import FakeEngine, sweep
from tests.test_report_costs import found


def record(*concurrency, limits=None, depth=0, failed=0):
    """A server whose every answer of two tokens takes a second, whoever else asks."""
    loads = []
    for number in concurrency:
        replies = [Reply(started=0.0, times=(0.5, 1.0), text="x", prompt_tokens=9, output_tokens=2)] * number
        done = bench_url.figures(Round(replies=replies), Load(new_tokens=2, limits=limits))
        loads.append({"concurrency": number, "depth": depth, "prompt_tokens_asked": None, **done, "failed": failed})
    return {"url": "http://h/v1", "model": "m", "prompts": "9 of a run", "new_tokens": 2, "loads": loads,
            "limits": limits.text() if limits else None}


def texts(figure):
    return {each.text for each in ElementTree.fromstring(figure.wide_svg).iter("text")}


def test_a_run_without_load_shows_none(tmp_path):
    assert report_load.blocks(found(tmp_path)) == []


def test_sweeps_are_tables_and_lines(tmp_path):
    findings = found(tmp_path)
    limits = ["ttft:500ms"]
    swept = sweep(FakeEngine(), limits=latency.parse_limits(limits))
    bench = {**findings.bench, "sweeps": {"base": swept, "merged": swept}, "goodput": limits}
    findings = dataclasses.replace(findings, bench=bench)
    batch, depth, drawn, deep = report_load.blocks(findings)
    assert batch.title.endswith("good: ttft 500 ms") and len(batch.rows) == len(depth.rows) == 4
    assert drawn.words == ("Tokens a second, decoding, by prompts at once: base: 100 at 1, 400 at 4; merged: 100 at 1, "
                           "400 at 4.")
    assert {"prompts at once", "tokens a second, decoding", "base", "merged"} <= texts(drawn)
    assert "tokens of context before the prompt" in texts(deep)
    assert report_costs.section(findings).blocks[-5:-1] == [batch, depth, drawn, deep]


def test_throughput_against_concurrency(tmp_path):
    findings = dataclasses.replace(found(tmp_path), servers=[record(1, 4, limits=Limits(first_token=0.6), failed=1)])
    table, figure = report_load.blocks(findings)
    assert [row[2] for row in table.rows] == ["1", "4"] and table.rows[1][-3:] == ["4", "8", "4"]
    assert "within ttft 600 ms." in table.note and "2 requests failed and are in no figure." in table.note
    assert figure.words == "Tokens a second, all requests, by requests at once: m: 2 at 1, 8 at 4."
    assert "requests at once" in texts(figure)
    alone = dataclasses.replace(findings, servers=[record(3)])
    assert len(report_load.blocks(alone)) == 1  # one load is no line


def test_servers_are_read_from_the_run(tmp_path):
    run = run_on_paper.write(tmp_path)
    (run.path / "servers").mkdir()
    (run.path / "servers" / "a.json").write_text(json.dumps(record(1, 2)))
    findings = report_findings.read(run_on_paper.recipe(), run)
    assert [each["model"] for each in findings.servers] == ["m"]
    assert report_load.blocks(findings)[0].title == "Servers under load"
    (run.path / "servers" / "b.json").write_text("{")
    with pytest.raises(RefusedError, match="b.json: is not JSON; remove it"):
        report_findings.read(run_on_paper.recipe(), run)
