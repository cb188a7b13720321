"""torchao int8: what is written loads again in a fresh process and is close to what went in.

In processes that see the packages of tests/apart.py; this one does not, as little as the commands of other tests.
"""

import os
import subprocess
import sys

import pytest

from lora_kit import quantizers
from lora_kit.errors import RecipeError
from tests import apart, tiny_run
from tests.quantizers import made_forms

quantizer = quantizers.load("torchao")
THERE = quantizer.missing() is None or (apart.FOLDER / "torchao").is_dir()
needs_it = pytest.mark.skipif(not THERE, reason="torchao is not installed")
pytestmark = pytest.mark.filterwarnings("ignore")  # the package warns while it is imported


@pytest.fixture(scope="module", autouse=True)
def processes_see_it():
    with pytest.MonkeyPatch.context() as patch:
        for name, value in apart.environment().items():
            patch.setenv(name, value)
        yield


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    return made_forms.make(tmp_path_factory.mktemp("torchao"), "torchao", "int8")


@needs_it
def test_it_is_close_to_what_went_in_and_smaller(made, tmp_path):
    made_forms.check_close_and_smaller(made, tmp_path / "recording", most_kl=0.05, engine="torchao", bits=(8, 12))


@needs_it
def test_its_weights_hold_the_adapters_change(made):
    made_forms.check_change(made, within=0.02, noise=(0.005, 0.2))


def test_what_cannot_become_it(monkeypatch):
    made_forms.check_refusals(quantizer, "int8", monkeypatch, 'pip install "lora-kit[torchao]"')


def test_four_bits_are_refused_by_name():
    with pytest.raises(RecipeError, match="'int4' is refused: torchao saves its 4-bit weights"):
        quantizer.check({}, "int4")


@needs_it
def test_where_it_is_installed_commands_stay_quiet():
    import_all = "from lora_kit.model import quiet_libraries as q; q(); import peft, transformers.quantizers, sys; " \
                 "print('torchao' in sys.modules)"
    environment = tiny_run.environment(PYTHONPATH=f"{tiny_run.ROOT}{os.pathsep}{apart.environment()['PYTHONPATH']}")
    done = subprocess.run([sys.executable, "-c", import_all], capture_output=True, text=True, env=environment)
    assert (done.stdout, done.stderr) == ("True\n", "")
