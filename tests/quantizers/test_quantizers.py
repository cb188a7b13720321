"""Quantizers are found by their file's name and say what they are."""

import pytest

from lora_kit import quantizers
from lora_kit.errors import RecipeError


def test_the_files_are_the_methods():
    assert quantizers.names() == ["auto_round", "bitsandbytes", "gguf", "torchao"]


@pytest.mark.parametrize("name", quantizers.names())
def test_every_quantizer_has_what_the_stage_asks_for(name):
    quantizer = quantizers.load(name)
    assert quantizer.KIND in ("hf", "gguf") and quantizer.TYPES
    for type in quantizer.TYPES:
        assert quantizer.missing(type) is None or quantizer.missing(type).startswith('pip install "lora-kit[')
    with pytest.raises(RecipeError, match="'nonsense' is not a type"):
        quantizer.check({}, "nonsense")


def test_unknown_method():
    with pytest.raises(RecipeError, match="'gptq' is not a method; there are: auto_round, bitsandbytes"):
        quantizers.load("gptq")


def test_every_target_is_made_of_forms_that_exist():
    from lora_kit.recipe import FORMS_OF_TARGET

    for target, forms in FORMS_OF_TARGET.items():
        for method, type in forms:
            assert type in quantizers.load(method).TYPES, (target, method, type)
