"""Which engine serves what, and what is said when it cannot."""

from types import SimpleNamespace

import pytest

from lora_kit import engines
from lora_kit.errors import MachineError, RecipeError, RefusedError
from lora_kit.types import Artifact

GGUF = Artifact(name="q", path="model.gguf", kind="gguf", tokenizer="folder")


@pytest.fixture
def installed(monkeypatch):
    """Engines that only say that they were asked; ``installed`` maps a name to what is missing."""
    owed = {"hf": None, "llamacpp": None}

    def module(name):
        return SimpleNamespace(missing=lambda: owed[name], load=lambda artifact, **options: (name, options))

    monkeypatch.setattr(engines, "_module", module)
    return owed


def test_the_files_are_the_engines():
    assert engines.names() == ["hf", "llamacpp", "openvino", "url"]
    for name in engines.names():
        assert callable(engines._module(name).load) and callable(engines._module(name).missing)


@pytest.mark.parametrize(("kind", "engine"), [("hf", "hf"), ("adapter", "hf"), ("gguf", "llamacpp")])
def test_kind_chooses_the_engine(installed, kind, engine):
    name, options = engines.open_engine(Artifact(name="a", path="p", kind=kind), threads=3)
    assert name == engine
    assert options == {"dtype": "auto", "threads": 3, "device": None}


def test_prefer_takes_the_first_that_is_installed(installed):
    assert engines.open_engine(GGUF, prefer="hf")[0] == "hf"
    assert engines.open_engine(GGUF, prefer=["llamacpp", "hf"])[0] == "llamacpp"
    installed["llamacpp"] = 'pip install "lora-kit[llamacpp]"'
    assert engines.open_engine(GGUF, prefer=["llamacpp", "hf"])[0] == "hf"


def test_missing_package_names_the_install_line(installed):
    installed["llamacpp"] = 'pip install "lora-kit[llamacpp]"'
    with pytest.raises(MachineError) as error:
        engines.open_engine(GGUF)
    assert str(error.value) == 'engine llamacpp: is not installed; pip install "lora-kit[llamacpp]"'


def test_install_line_of_llamacpp(monkeypatch):
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    assert engines.missing("llamacpp") == 'pip install "lora-kit[llamacpp]"'
    assert engines.missing("hf") is None


def test_unknown_engine():
    with pytest.raises(RecipeError, match="'vllm': does not exist; there are: hf, llamacpp, openvino, url"):
        engines.open_engine(GGUF, prefer="vllm")


def test_configured_stop_ids(tmp_path):
    assert engines.configured_stop_ids(tmp_path) == set()
    assert engines.configured_stop_ids(tmp_path / "no" / "folder") == set()
    for text, expected in (('{"eos_token_id": 7}', {7}), ('{"eos_token_id": [7, 9]}', {7, 9}), ("{}", set())):
        (tmp_path / "generation_config.json").write_text(text)
        assert engines.configured_stop_ids(tmp_path) == expected
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(RefusedError, match="is not JSON"):
        engines.configured_stop_ids(tmp_path)


@pytest.mark.parametrize("prompt", ["hi", "say it again"])
def test_streamed_text_is_the_generated_answer(tiny_model, prompt):
    artifact = Artifact(name="base", path=str(tiny_model), kind="hf", tokenizer=str(tiny_model))
    with engines.open_engine(artifact) as engine:
        ids = engine.tokenizer(prompt)["input_ids"]
        (answer,) = engine.generate([ids], max_new_tokens=12)
        assert list(engine.tokens_after(ids, 12))[:len(answer.tokens)] == list(answer.tokens)
        streamed = "".join(engine.stream(ids, max_new_tokens=12))
        # A character whose bytes are incomplete at the end is not shown.
        assert answer.text.startswith(streamed) and len(answer.text.rstrip("\ufffd")) <= len(streamed)
