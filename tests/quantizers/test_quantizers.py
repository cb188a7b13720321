"""Quantizers are found by their file's name and say what they are."""

import pytest

from lora_kit import quantizers
from lora_kit.errors import RecipeError


def test_the_files_are_the_methods():
    assert quantizers.names() == ["bitsandbytes", "gguf"]


@pytest.mark.parametrize("name", quantizers.names())
def test_every_quantizer_has_what_the_stage_asks_for(name):
    quantizer = quantizers.load(name)
    assert quantizer.KIND in ("hf", "gguf") and quantizer.TYPES
    assert quantizer.missing() is None
    with pytest.raises(RecipeError, match="'nonsense' is not a type"):
        quantizer.check({}, "nonsense")


def test_unknown_method():
    with pytest.raises(RecipeError, match="'gptq' is not a method; there are: bitsandbytes, gguf"):
        quantizers.load("gptq")
