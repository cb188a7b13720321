"""The first losses on the real model: the same as ever, packed or padded, and the same as the one-page loop's."""

from __future__ import annotations

import pytest

from tests import golden_losses

pytestmark = pytest.mark.real_model
TOLERANCE = 1e-4
"""Relative. Another order of sums changes them by less than 1e-5."""


@pytest.mark.parametrize(("packing", "fast"), [(True, "auto"), (True, []), (False, "auto"), (False, [])])
def test_losses_are_the_golden_ones(smollm2_base, tmp_path, packing, fast):
    losses = golden_losses.measure(smollm2_base, tmp_path, packing=packing, fast=fast)
    assert losses == pytest.approx(golden_losses.read(), rel=TOLERANCE)


def test_the_minimal_loop_has_them_too(smollm2_base, capsys):
    from examples import minimal_loop

    settings = golden_losses.SETTINGS
    losses = minimal_loop.main(["--model", str(smollm2_base), "--data", str(golden_losses.ROWS), *(
        word for key, value in settings.items() for word in (f"--{key.replace('_', '-')}", str(value)))])
    assert losses == pytest.approx(golden_losses.read(), rel=TOLERANCE)


def test_the_file_names_its_command_and_settings():
    import json

    stored = json.loads(golden_losses.FILE.read_text())
    assert stored["command"] == golden_losses.COMMAND and len(stored["losses"]) == stored["steps"]
    assert {key: stored[key] for key in golden_losses.SETTINGS} == golden_losses.SETTINGS
