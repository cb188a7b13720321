"""report_latency.py: what bench measured token by token, on paper and drawn."""

import dataclasses
from xml.etree import ElementTree

from lora_kit import latency, report_costs, report_latency
from tests.test_report_costs import found


def measured(*seconds):
    traces = [latency.Trace(started=0.0, token_times=tuple(0.5 + each * place for place in range(5)), prompt_tokens=8)
              for each in seconds]
    return {**latency.figures(traces), "gaps": [gap for each in traces for gap in each.gaps]}


def test_a_run_without_latencies_shows_none(tmp_path):
    assert report_latency.blocks(found(tmp_path)) == []


def test_percentiles_and_their_picture(tmp_path):
    findings = found(tmp_path)
    bench = {**findings.bench, "latency": {"base": measured(0.04, 0.04), "merged": measured(0.02, 0.03),
                                           "bitsandbytes-nf4": None, "gguf-q8_0": None}}
    findings = dataclasses.replace(findings, bench=bench)
    table, figure = report_latency.blocks(findings)
    rows = {row[0]: row[1:] for row in table.rows}
    assert rows["base"] == ["2", "500 ms", "500 ms", "500 ms", "40 ms", "40 ms", "40 ms", "660 ms"]
    assert rows["merged"][4:7] == ["25 ms", "30 ms", "30 ms"]
    assert "is not installed" in rows["gguf-q8_0"][0].text and rows["bitsandbytes-nf4"][0].tone == "missing"
    assert figure.words == "Time between two tokens in the middle: base 40 ms, merged 30 ms."
    texts = {each.text for each in ElementTree.fromstring(figure.wide_svg).iter("text")}
    assert {"milliseconds between two tokens", "base", "merged", "100"} <= texts
    assert report_costs.section(findings).blocks[-3:-1] == [table, figure]
