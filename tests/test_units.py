"""Numbers as people read them."""

from __future__ import annotations

import pytest

from lora_kit.units import bytes_text, count_text, number_text, seconds_text


@pytest.mark.parametrize(("num_bytes", "text"), [
    (None, "–"), (0, "0 B"), (999, "999 B"), (1000, "1 kB"), (1536, "1.54 kB"), (98_300_000, "98.3 MB"),
    (269_060_000, "269 MB"), (999_600, "1 MB"), (99_960, "100 kB"), (5e12, "5 TB"), (5e15, "5,000 TB"),
])
def test_bytes_have_a_decimal_unit(num_bytes, text):
    assert bytes_text(num_bytes) == text


@pytest.mark.parametrize(("seconds", "text"), [
    (None, "–"), (0.0123, "12.3 ms"), (0.9996, "1 s"), (1.5, "1.5 s"), (99.4, "99.4 s"), (99.96, "1 min 40 s"),
    (119.7, "2 min 00 s"), (3725, "62 min 05 s"), (7200, "2.0 h"),
])
def test_seconds_change_their_unit(seconds, text):
    assert seconds_text(seconds) == text


def test_counts_have_separators():
    assert count_text(134_515_008) == "134,515,008"
    assert count_text(None) == "–"


@pytest.mark.parametrize(("value", "text"), [
    (None, "–"), (0.0, "0"), (3.14159265, "3.142"), (2e-4, "0.0002"), (1.5e-9, "1.5e-09"), (9999.6, "10,000"),
    (123_456.7, "123,457"), (-123_456.7, "-123,457"),
])
def test_numbers_keep_four_digits_and_all_before_the_point(value, text):
    assert number_text(value) == text


def test_digits_can_be_asked_for():
    assert number_text(3.14159, 2) == "3.1"
