"""How to use each artifact of a run without lora-kit: a few lines of the library that reads it.

Torch-free; reads and writes nothing.
"""

from __future__ import annotations

from pathlib import Path

from lora_kit.report_document import Block, Code, Paragraph, Section
from lora_kit.report_findings import Findings
from lora_kit.types import Artifact

_CHAT = """
messages = [{{"role": "user", "content": "Hello"}}]
inputs = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_tensors="pt", return_dict=True)
answer = model.generate(**inputs, max_new_tokens=100)
print(tokenizer.decode(answer[0, inputs["input_ids"].shape[1]:], skip_special_tokens=True))"""

_HF = """from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
model = AutoModelForCausalLM.from_pretrained({path}, dtype="auto")""" + _CHAT

_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained({tokenizer})
base = AutoModelForCausalLM.from_pretrained({base}, dtype="auto")
model = PeftModel.from_pretrained(base, {path})""" + _CHAT

_GGUF = """from llama_cpp import Llama  # pip install llama-cpp-python

model = Llama({path}, n_ctx=2048)
answer = model.create_chat_completion([{{"role": "user", "content": "Hello"}}], max_tokens=100)
print(answer["choices"][0]["message"]["content"])

# or with llama.cpp's own program: llama-cli -m {shell}"""

_TEMPLATES = {"hf": _HF, "adapter": _ADAPTER, "gguf": _GGUF}


def section(found: Findings) -> Section:
    """One snippet for each artifact that the run made; paths are relative to the run's folder."""
    blocks: list[Block] = [
        Code(title=name, text=snippet(artifact, found), folded=True)
        for name, artifact in found.artifacts.items() if name != "base"
    ]
    if not blocks:
        blocks.append(Paragraph(text=f"There is no artifact yet: {found.why_missing('train')}.", tone="missing"))
    return Section(anchor="use", title="Use without lora-kit", blocks=blocks,
                   intro=f"Run from the run's folder ({found.run_name}).")


def snippet(artifact: Artifact, found: Findings) -> str:
    """Python that loads ``artifact`` and answers one message."""
    path = _relative(artifact.path, found)
    tokenizer = _relative(artifact.tokenizer or artifact.base or artifact.path, found)
    base = _relative(artifact.base, found) if artifact.base else ""
    return _TEMPLATES[artifact.kind].format(path=repr(path), tokenizer=repr(tokenizer), base=repr(base), shell=path)


def _relative(path: str, found: Findings) -> str:
    """The path from the run's folder on, where it lies inside it."""
    parts = Path(path).parts
    return str(Path(*parts[parts.index(found.run_name) + 1 :])) if found.run_name in parts[:-1] else path
