"""Whether an artifact is asked as it was trained: the same chat template, BOS and stop tokens.

A model that is asked through another template is another model, and nothing crashes: scores fall, or
answers never end. What an artifact carries (its tokenizer's folder; of a GGUF file also what stands
in the file, which is what llama.cpp itself would use) is compared with the tokenizer that training
used, and that with the hash that the run recorded.

Reads tokenizer folders and GGUF files; writes nothing.
"""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

from lora_kit import chat
from lora_kit.errors import LoraKitError
from lora_kit.model import tokenizer_sha256
from lora_kit.model_files import configured_stop_ids
from lora_kit.types import Artifact

CLAIM = "chat template, BOS and stop tokens are those of training"
_PROBE = [{"role": "user", "content": "What is 7 + 35?\n"}]
_TEXT = "The 1st naïve test: x = [1, 2]\n"


def check(artifact: Artifact, training: dict[str, Any]) -> dict[str, str]:
    """Compare what ``artifact`` carries with what training used.

    Args:
        training: ``tokenizer``, the folder of the training's tokenizer, ``content``, the SHA-256 that the run
            recorded of it (None where it recorded none), and ``model``, the folder of the base that was trained, whose
            generation_config.json may name further stop tokens (absent: the tokenizer's folder).

    Returns:
        ``artifact``, ``outcome`` (PASS or FAIL) and ``evidence``.
    """
    folder = Path(training["tokenizer"])
    own = Path(artifact.tokenizer or artifact.path)
    try:
        problems = []
        if training.get("content") and tokenizer_sha256(folder) != training["content"]:
            problems.append(f"the tokenizer that training used has changed since ({folder})")
        expected = traits(folder, Path(training.get("model") or folder))
        found = traits(own, Path(artifact.base if artifact.kind == "adapter" else artifact.path))
        problems += _differences(found, expected, str(own))
        if artifact.kind == "gguf":
            problems += _gguf_differences(Path(artifact.path), expected)
    except LoraKitError as error:
        problems = [str(error)]
    evidence = "; ".join(problems) or f"template {(expected['template'] or 'none')[:12]}, BOS {expected['bos']}, " \
        f"stops at {expected['stops']}"
    return {"artifact": artifact.name, "outcome": "FAIL" if problems else "PASS", "evidence": evidence}


def traits(folder: Path, model: Path) -> dict[str, Any]:
    """What decides how a model is asked: hash of the template, BOS, stop tokens, and the ids of two fixed texts.

    Args:
        folder: of the tokenizer.
        model: of the weights, whose generation_config.json may name stop tokens too, as engines read it.
    """
    tokenizer = chat.load_tokenizer(folder)
    stops = sorted({*chat.stop_token_ids(tokenizer), *configured_stop_ids(folder), *configured_stop_ids(model)})
    return {
        "template": chat.template_sha256(tokenizer), "is_text": isinstance(tokenizer.chat_template, str),
        "bos": tokenizer.bos_token_id,
        "stops": [f"{number} {tokenizer.convert_ids_to_tokens(number)}" for number in stops], "stop_ids": list(stops),
        "text": tokenizer(_TEXT)["input_ids"],
        "prompt": chat.prompt_ids(tokenizer, _PROBE) if tokenizer.chat_template else None,
    }


_WORDS = {"template": "the chat template", "bos": "the BOS token", "stops": "the stop tokens",
          "text": "the tokens of a text", "prompt": "the tokens of a prompt"}


def _differences(found: dict[str, Any], expected: dict[str, Any], where: str) -> list[str]:
    differing = [name for name in _WORDS if found[name] != expected[name]]
    # Another template makes other tokens of a prompt: one reason is enough.
    if "prompt" in differing and len(differing) > 1:
        differing.remove("prompt")
    return [f"{_WORDS[name]} of {where} differ{'s' if name in ('template', 'bos') else ''} from training's: "
            f"{_shown(found[name])}, not {_shown(expected[name])}" for name in differing]


def _gguf_differences(path: Path, expected: dict[str, Any]) -> list[str]:
    from gguf import GGUFReader

    try:
        fields = GGUFReader(str(path)).fields
    except (ValueError, IndexError, OSError) as error:
        return [f"{path.name} is not a whole GGUF file ({error})"]

    def value(name: str) -> Any:
        return fields[name].contents() if name in fields else None

    problems, template = [], value("tokenizer.chat_template")
    sha256 = hashlib.sha256(template.encode()).hexdigest() if template else None
    # GGUF has room for one template; of a model with several nothing is written there.
    if sha256 != expected["template"] and (expected["is_text"] or sha256):
        problems.append(f"the chat template in {path.name} differs from training's: {_shown(sha256)}, not "
                        f"{_shown(expected['template'])}")
    if value("tokenizer.ggml.bos_token_id") != expected["bos"]:
        problems.append(f"the BOS token in {path.name} differs from training's: "
                        f"{_shown(value('tokenizer.ggml.bos_token_id'))}, not {_shown(expected['bos'])}")
    end = value("tokenizer.ggml.eos_token_id")
    if end not in expected["stop_ids"]:
        problems.append(f"the end token in {path.name}, {_shown(end)}, is no stop token of training "
                        f"({_shown(expected['stops'])})")
    return problems


def _shown(value: Any) -> str:
    return "none" if value is None else f"{value[:12]}" if isinstance(value, str) else str(value)
