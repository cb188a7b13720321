"""charts.py: geometry of what is drawn, read back from the SVG."""

import re
from xml.etree import ElementTree

import pytest

from lora_kit import charts


def draw(lines, **more):
    text = charts.line_chart(lines, x_title="step", y_title="loss", words="a < b", **more)
    return text, ElementTree.fromstring(text)  # raises when it is not well-formed


def points_of(root, style):
    path = next(each for each in root.iter("path") if f"l{style}" in each.get("class").split())
    return [tuple(map(float, pair.split())) for pair in re.split("[ML]", path.get("d"))[1:]]


def test_a_line_goes_from_low_left_to_high_right():
    text, root = draw([charts.Line(name="x", points=[(0, 1.0), (10, 2.0), (20, 3.0)], style=0)])
    (x0, y0), (x1, y1), (x2, y2) = points_of(root, 0)
    assert x0 < x1 < x2 and y0 > y1 > y2  # SVG's y grows downwards
    assert x1 == pytest.approx((x0 + x2) / 2, abs=0.1) and y1 == pytest.approx((y0 + y2) / 2, abs=0.1)
    assert root.get("aria-label") == "a < b" and "a < b" not in text
    assert {each.text for each in root.iter("text")} >= {"step", "loss", "x", "0", "20", "1.0", "3.0"}


def test_a_scale_from_zero_keeps_proportions():
    _, root = draw([charts.Line(name="x", points=[(0, 4000.0), (1, 8000.0)], style=0)], from_zero=True)
    axis = next(float(each.get("y1")) for each in root.iter("line") if each.get("class") == "axis")
    (_, low), (_, high) = points_of(root, 0)
    assert (axis - high) / (axis - low) == pytest.approx(2, abs=0.02)
    assert "8,000" in {each.text for each in root.iter("text")}


def test_long_numbers_leave_room_for_the_title():
    _, root = draw([charts.Line(name="x", points=[(0, 1.0), (1, 1_200_000.0)], style=0)], from_zero=True)
    title = next(each for each in root.iter("text") if each.text == "loss")
    number = next(each for each in root.iter("text") if each.text == "1,000,000")
    assert float(number.get("x")) - 7 * len(number.text) > float(title.get("x")) + 6


def test_dots_carry_their_values():
    _, root = draw([charts.Line(name="held out", points=[(0, 4.25), (50, 3.5)], style=1, dots=True)])
    titles = [circle.find("title").text for circle in root.iter("circle")]
    assert titles == ["held out at 0: 4.25", "held out at 50: 3.5"]


def test_one_point_equal_values_and_gaps_can_be_drawn():
    for points in ([(3, 2.0)], [(0, 2.0), (1, 2.0)], [(0, 1.0), (1, float("nan")), (2, float("inf")), (3, 2.0)]):
        text, _ = draw([charts.Line(name="x", points=points, style=0)])
        assert "nan" not in text and "inf" not in text


def test_the_legend_has_room_on_a_narrow_page():
    lines = [charts.Line(name=f"a rather long name {i}", points=[(0, 0.0), (1, 1.0)], style=i) for i in range(3)]
    _, root = draw(lines, width=380)
    keys = [each for each in root.iter("text") if each.get("class") == "key"]
    highest = min(y for _, y in points_of(root, 0))
    assert len({each.get("y") for each in keys}) == 3 and max(float(each.get("y")) for each in keys) < highest


def test_stacked_bars_are_to_scale():
    bars = [charts.Bar(name="training", parts=[("weights", 30.0, 0), ("rest", 70.0, 5)], label="100 B"),
            charts.Bar(name="merged <b>", parts=[("weights", 30.0, 0), ("KV cache", 0.0, 4)], label="30 B")]
    for width in (760, 380):
        text = charts.stacked_bars(bars, words="w", value_text=lambda v: f"{v:g} B", width=width)
        root = ElementTree.fromstring(text)
        drawn = [each for each in root.iter("rect") if each.find("title") is not None]
        sizes = {each.find("title").text: float(each.get("width")) for each in drawn}
        assert sizes["rest: 70 B"] / sizes["weights: 30 B"] == pytest.approx(7 / 3, rel=0.01)
        assert len(drawn) == 3  # nothing is drawn for an empty part
        first, second = drawn[:2]
        assert float(first.get("x")) + float(first.get("width")) == pytest.approx(float(second.get("x")), abs=0.11)
        assert {"training", "merged <b>", "100 B", "30 B"} <= {each.text for each in root.iter("text")}


@pytest.mark.parametrize(("low", "high"), [(3.61, 4.4), (0, 7), (-1, 1), (1e-9, 3e-9), (5, 5), (0, 0), (1e6, 9e6)])
def test_ticks_are_round_and_enclose(low, high):
    found = charts.ticks(low, high, 5)
    assert found[0] <= low and found[-1] >= high and 2 <= len(found) <= 12
    step = found[1] - found[0]
    mantissa = float(f"{step:e}".split("e")[0])
    assert min(abs(mantissa - nice) for nice in (1, 2, 5, 10)) < 1e-6


def test_means():
    points = [(1, 1.0), (2, 3.0), (3, 5.0), (4, 7.0)]
    assert charts.running_mean(points, 2) == [(1, 1.0), (2, 2.0), (3, 4.0), (4, 6.0)]
    assert charts.thinned(points, most=2) == [(1.5, 2.0), (3.5, 6.0)]
    assert charts.thinned(points, most=4) == points


@pytest.mark.parametrize("width", [360, 760])
def test_a_histogram_s_columns_are_as_high_as_their_counts(width):
    counts = [("train", [4, 0, 2], 0), ("held < out", [1, 0, 2], 1)]
    text = charts.histogram([0, 64, 128, 192], counts, x_title="tokens", words="a < b", width=width)
    root = ElementTree.fromstring(text)
    bars = [each for each in root.iter("rect") if each.find("title") is not None]
    assert [bar.find("title").text for bar in bars] == [
        "train, 0 to 63: 4", "held < out, 0 to 63: 1", "train, 128 to 191: 2", "held < out, 128 to 191: 2"]
    unit = float(bars[1].get("height"))
    assert [round(float(bar.get("height")) / unit) for bar in bars] == [4, 1, 2, 2]
    assert float(bars[1].get("y")) == pytest.approx(float(bars[0].get("y")) - unit, abs=0.2)  # one upon the other
    assert {"0", "192", "tokens", "train"} <= {each.text for each in root.iter("text")}


def test_a_histogram_of_nothing_can_be_drawn():
    ElementTree.fromstring(charts.histogram([0, 1], [("train", [0], 0)], x_title="t", words="w"))
