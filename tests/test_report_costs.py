"""report_costs.py: every derived figure by hand."""

import dataclasses
import re
from xml.etree import ElementTree

import pytest

from lora_kit import memory, report_costs, report_findings
from lora_kit.recipe import CostSection
from tests import run_on_paper as paper

POINT = {"artifact": "merged", "batch_size": 4, "prompt_tokens": 100, "new_tokens": 11,
         "time_to_first_token_seconds": 0.5, "prefill_tokens_per_second": 1000.0, "decode_tokens_per_second": 20.0}


def found(tmp_path, **more):
    return report_findings.read(paper.recipe(**more), paper.write(tmp_path))


def cells(table):
    return {row[0]: row[1:] for row in table.rows}


def test_a_request_is_its_share_of_the_batch():
    request = report_costs.request_cost(POINT)
    assert request.seconds == pytest.approx((0.5 + 10 * 4 / 20) / 4)
    assert report_costs.request_cost({**POINT, "decode_tokens_per_second": None}) is None
    assert report_costs.break_even_requests(125.0, request.seconds) == pytest.approx(200)


def test_prices():
    cost = CostSection(price_per_hour=3.6)
    assert report_costs.price_of(1000, cost) == pytest.approx(1.0)
    assert report_costs.price_per_million(20, cost) == pytest.approx(50.0)


def test_memory_parts_add_up_to_the_measured_peak(tmp_path):
    findings = found(tmp_path)
    parts, why = report_costs._memory_parts(findings)
    assert why == "" and sum(value for _, value in parts) == 4_100_000_000
    by_name = dict(parts)
    shape = memory.shape_of(paper.CONFIG)
    assert by_name["weights"] == 2 * memory.num_params(shape)
    assert by_name["optimizer states"] == 8 * 4_884_480 == 2 * by_name["gradients"]
    point = findings.points()["merged"]
    shown = dict(report_costs._inference_parts(findings, point))
    assert shown["KV cache"] == 160 * 23_040 and sum(shown.values()) == point["peak_memory_bytes"]


def test_a_split_that_does_not_fit_is_not_shown(tmp_path):
    findings = found(tmp_path)
    figures = {**findings.figures("train"), "peak_memory_bytes": 100_000_000}
    seals = {**findings.seals, "train": {**findings.seals["train"], "figures": figures}}
    small = dataclasses.replace(findings, seals=seals)
    parts, why = report_costs._memory_parts(small)
    assert parts is None and "exceed the measured peak" in why
    point = {**findings.points()["merged"], "peak_memory_bytes": 1000}
    assert report_costs._inference_parts(findings, point) is None


def test_a_gpu_peak_goes_before_the_process(tmp_path):
    assert report_costs._peak({"device_peak_memory_bytes": 7, "peak_memory_bytes": 9}) == 7
    assert report_costs._peak({"device_peak_memory_bytes": None, "peak_memory_bytes": 9}) == 9
    machine = {"cpu": "C", "gpus": [{"name": "G"}]}
    assert report_costs._device_name("cuda:0", machine) == "cuda:0 (G)"
    assert report_costs._device_name("cpu", machine) == "C"


def test_the_tables_carry_measured_and_derived_figures(tmp_path):
    section = report_costs.section(found(tmp_path, cost={"price_per_hour": 3.6, "requests_per_day": 1000}))
    contrast, figure, split, requests, curve = section.blocks
    rows = cells(contrast)
    assert rows["peak memory"] == ["4.1 GB", "905 MB"]
    assert rows["cost"][0] == "0.13 USD once (derived)"
    assert rows["break-even"][1] == "as much after 103 requests, on the first day (derived)"
    assert cells(split)["merged"][-1] == "905 MB" and cells(split)["gguf-q8_0"][0].tone == "missing"
    seconds = 0.05 + 31 / 25.5
    assert cells(requests)["merged"][:3] == ["1.27 s", f"{130 / seconds:,.0f}", f"{seconds:.3g} USD"]
    assert "training 4.1 GB" in figure.words
    assert curve.words == ("Training takes 2 min 10 s once; requests to merged have taken as long after 103, on the "
                           "first day.")


def test_the_cost_curve_crosses_at_the_break_even(tmp_path):
    findings = found(tmp_path, cost={"price_per_hour": 3.6})
    figure = report_costs._cost_figure(findings)
    root = ElementTree.fromstring(figure.wide_svg)

    def path(style):
        drawn = next(each for each in root.iter("path") if f"l{style}" in each.get("class").split())
        return [tuple(map(float, pair.split())) for pair in re.split("[ML]", drawn.get("d"))[1:]]

    training, merged = path(0), path(1)
    dot = next(root.iter("circle"))
    assert training[0][1] == training[1][1] == pytest.approx(float(dot.get("cy")), abs=0.2)
    (x0, y0), (x1, y1) = merged
    along = (float(dot.get("cx")) - x0) / (x1 - x0)
    assert along == pytest.approx(0.5, abs=0.01) and y0 + along * (y1 - y0) == pytest.approx(training[0][1], abs=0.5)
    assert {"training, once", "merged", "break-even", "requests", "USD"} <= {each.text for each in root.iter("text")}
    assert report_costs._cost_figure(dataclasses.replace(findings, seals={})) is None
