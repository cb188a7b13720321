"""Small files travel byte for byte."""

from lora_kit.model_files import copy_tokenizer, save_weights
from tests import tiny


def test_tokenizer_files_are_copied_as_they_are(tmp_path):
    source, target = tmp_path / "source", tmp_path / "target"
    target.mkdir()
    tiny.save_tokenizer(source)
    (source / "gguf_tokenizer.json").write_text('{"tokenizer.ggml.pre":   "smollm"}')
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tools.jinja").write_text("{{ x }}")
    (source / "model.safetensors").write_bytes(b"weights")
    copied = copy_tokenizer(source, target)
    assert {"tokenizer.json", "chat_template.jinja", "gguf_tokenizer.json", "additional_chat_templates"} <= set(copied)
    assert not (target / "model.safetensors").exists()
    for path in source.rglob("*"):
        if path.is_file() and path.name != "model.safetensors":
            assert (target / path.relative_to(source)).read_bytes() == path.read_bytes()


def test_a_generation_config_that_transformers_would_not_save_is_kept(tmp_path):
    from transformers import AutoModelForCausalLM

    folder, _ = tiny.save_model(tmp_path / "base")
    text = '{"do_sample": false, "temperature": 0.6, "eos_token_id": [2, 7]}'
    (folder / "generation_config.json").write_text(text)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype="float32")
    (tmp_path / "out").mkdir()
    save_weights(model, folder, tmp_path / "out")
    assert (tmp_path / "out" / "generation_config.json").read_text() == text
    assert (tmp_path / "out" / "model.safetensors").exists()
    (folder / "generation_config.json").unlink()
    save_weights(model, folder, tmp_path / "out")
    assert not (tmp_path / "out" / "generation_config.json").exists()
