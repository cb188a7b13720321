"""Several adapters as one: cat is exact, the others say how far they are from the sum."""

import json

import pytest

from lora_kit.adapter_check import check_adapter
from lora_kit.combining import METHODS, combine_adapters, in_words
from lora_kit.errors import ModelError, RecipeError
from lora_kit.merging import Values
from tests import fake_run, tiny


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """(base, two adapters of rank 4 with other values)."""
    path = tmp_path_factory.mktemp("combining")
    base, _ = tiny.save_model(path / "base", initializer_range=0.1)
    return base, [fake_run.save_adapter(base, path / f"adapter{seed}", seed=seed, size=0.1) for seed in (1, 2)]


def change_of(base, adapter):
    plan = check_adapter(base, adapter)
    with Values(plan) as values:
        return {target.name: values.after(target, 0, target.shape[0]) - values.before(target, 0, target.shape[0])
                for target in plan.targets.values() if target.changes}


def test_cat_is_the_weighted_sum_of_the_changes(made, tmp_path):
    base, adapters = made
    found = combine_adapters(base, adapters, [0.7, -0.4], tmp_path / "out", method="cat")
    told = json.loads((tmp_path / "out" / "lora_kit_combined.json").read_text())
    assert told["weights"] == [0.7, -0.4] and told["exact"] is True
    assert found["exact"] and found["projection"] == pytest.approx(1, abs=1e-6) and found["noise"] < 1e-3
    one, two, both = (change_of(base, folder) for folder in (*adapters, tmp_path / "out"))
    for name, change in both.items():
        assert (change - 0.7 * one[name] + 0.4 * two[name]).abs().max() < 1e-5, name


@pytest.mark.parametrize("method", [method for method in METHODS if method != "cat"])
def test_the_others_say_how_far_they_are(method, made, tmp_path):
    base, adapters = made
    found = combine_adapters(base, adapters, [0.5, 0.5], tmp_path / "out", method=method, rank=8)
    assert not found["exact"] and found["largest_difference"] > 0
    one, two, both = (change_of(base, folder) for folder in (*adapters, tmp_path / "out"))
    apart = max(float((both[name] - 0.5 * (one[name] + two[name])).abs().max()) for name in both)
    assert apart == pytest.approx(found["largest_difference"], rel=1e-3, abs=1e-6)
    if method == "svd":  # two adapters of rank 4 fit into rank 8
        assert found["projection"] == pytest.approx(1, abs=1e-4) and found["noise"] < 0.01
    else:
        assert found["noise"] > 0.05


def test_dare_drops_the_same_with_the_same_seed(made, tmp_path):
    base, adapters = made
    first, second, other = (combine_adapters(base, adapters, [1, 1], tmp_path / str(number), method="dare_linear",
                                             seed=seed)["projection"] for number, seed in enumerate((0, 0, 1)))
    assert first == second != other


def test_what_cannot_be_combined(made, tmp_path):
    base, adapters = made
    for wrong, what in (({"weights": [1]}, "2 adapters and 1 weights"), ({"method": "sum"}, "'sum' is not a method"),
                        ({"density": 2}, "a density of 2")):
        with pytest.raises(RecipeError, match=what):
            combine_adapters(base, adapters, **{"weights": [1, 1], "out_dir": tmp_path / "out", **wrong})
    dora = fake_run.save_adapter(base, tmp_path / "dora", use_dora=True)
    with pytest.raises(ModelError, match=r"\(use_dora\) is more than a product of two factors"):
        combine_adapters(base, [adapters[0], dora], [1, 1], tmp_path / "out")
    thin = fake_run.save_adapter(base, tmp_path / "thin", r=2)
    with pytest.raises(ModelError, match="peft cannot .*use method cat"):
        combine_adapters(base, [adapters[0], thin], [1, 1], tmp_path / "out", method="linear")
    assert not (tmp_path / "out").exists()


def test_what_came_of_it_in_words():
    told = {"method": "ties", "exact": False, "projection": 0.7123, "noise": 0.6234, "largest_difference": 0.0123}
    assert in_words(told, 3) == (
        "ties of 3 adapters, which is not exact: 71.2% of the weighted sum of their changes, with 0.62 of its size "
        "besides (largest difference of a weight 0.012)")
    exact = in_words({**told, "method": "cat", "exact": True}, 2)
    assert exact.startswith("cat of 2 adapters: exactly the weighted sum")
