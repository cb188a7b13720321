"""What comes with lora-kit is found in a checkout and in a wheel."""

from __future__ import annotations

from lora_kit import shipped


def test_recipes_and_suites_of_the_checkout_are_found():
    assert "chat" in shipped.recipe_names()
    assert shipped.recipe_path("chat").is_file()
    assert (shipped.folder("eval") / "suites").is_dir()
    assert not shipped.recipe_path("nonesuch").exists()


def test_a_wheel_carries_them_inside_the_package(tmp_path, monkeypatch):
    inside = tmp_path / "lora_kit" / "shipped_data" / "recipes"
    inside.mkdir(parents=True)
    (inside / "mine.yaml").write_text("")
    monkeypatch.setattr(shipped, "_PACKAGE", tmp_path / "lora_kit")
    assert shipped.recipe_names() == ["mine"]
    assert shipped.recipe_path("mine") == inside / "mine.yaml"
