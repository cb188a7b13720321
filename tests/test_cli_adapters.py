"""Options for several adapters: what they become, and what is no use of them."""

from pathlib import Path

import pytest

from lora_kit.cli_adapters import several_of
from lora_kit.errors import RecipeError


@pytest.fixture
def adapters(tmp_path):
    folders = [tmp_path / name for name in ("one", "other")]
    for folder in folders:
        folder.mkdir()
        (folder / "adapter_config.json").write_text("{}")
    return folders


def test_several_adapters_have_a_method_and_weights(adapters):
    assert several_of(adapters, None, None, None, None, None) == {"weights": None, "method": "cat"}
    assert several_of(adapters, "0.7, -0.3", "dare_ties", 0.2, None, 3) == {
        "weights": [0.7, -0.3], "method": "dare_ties", "density": 0.2, "seed": 3}
    assert several_of(adapters, None, "svd", None, 8, None) == {"weights": None, "method": "svd", "rank": 8}


def test_one_target_or_none_has_no_such_options(adapters):
    assert several_of([], None, None, None, None, None) == several_of(adapters[:1], None, None, None, None, None) == {}
    with pytest.raises(RecipeError, match="--how is for several adapters"):
        several_of(adapters[:1], None, "cat", None, None, None)


@pytest.mark.parametrize(("options", "what"), [
    (("1", "cat", None, None, None), "'1' is not 2 numbers; give one for each adapter, such as 0.5,0.5"),
    (("1,x", None, None, None, None), "'1,x' is not 2 numbers"),
    (("1,inf", None, None, None, None), "'1,inf' is not 2 numbers"),
    ((None, "cat", 0.5, None, None), "--density has no effect on cat; it is for ties, dare_linear, dare_ties"),
    ((None, "ties", None, 8, None), "--rank has no effect on ties; it is for svd"),
    ((None, None, None, None, 1), "--seed has no effect on cat"),
])
def test_options_that_do_not_fit(adapters, options, what):
    with pytest.raises(RecipeError) as raised:
        several_of(adapters, *options)
    assert what in str(raised.value)


def test_a_target_that_is_no_adapter(adapters):
    with pytest.raises(RecipeError, match="gone: is no adapter: it has no adapter_config.json"):
        several_of([*adapters, Path("gone")], None, None, None, None, None)
