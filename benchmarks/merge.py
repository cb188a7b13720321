"""Time and memory of a merge: lora-kit's row blocks beside peft's ``merge_and_unload``.

    python benchmarks/merge.py [--shape 1b|8b|tiny] [--times 2] [--threads 1] [--quick] [--check] [--json PATH]

Writes a Llama of random bf16 weights in that shape and a random LoRA of rank 16 on all its linear layers, then merges
it, each contestant in fresh processes that take turns, the quickest of ``--times`` counting:

* lora-kit: ``merge_to_folder``, fp32 arithmetic and one cast to bf16;
* peft, fp32: the same arithmetic as most would write it: load in fp32, ``merge_and_unload``, cast, ``save_pretrained``;
* peft, bf16: load, merge and save in bf16; peft 0.21 keeps the factors in fp32 and rounds the sum once.

Seconds are from the start of the process to the last byte handed to the system; CPU seconds, those of the process, are
what to compare on a machine that does other work. Memory is the largest *anonymous*
memory (``RssAnon`` of /proc/PID/status, read every 20 ms): what the process holds itself; pages of mapped files, which
the kernel takes back when it needs them, do not count and stand beside it (``VmHWM``). The share of elements that
differ from lora-kit's is over all tensors. A 4096 x 4096 matrix product beside each round says how quick the machine
was. Disk: twice the model (``1b``: 5 GB, ``8b``: 32 GB, for which peft does not run). ``--check`` exits with 1 over
0.8 GB at ``1b`` and 3 GB at ``8b``. Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

_ROOT = Path(__file__).resolve().parent.parent
SHAPES = {
    "tiny": dict(hidden_size=256, intermediate_size=1024, num_hidden_layers=4, num_attention_heads=8,
                 num_key_value_heads=2, vocab_size=8192, tie_word_embeddings=True),
    "1b": dict(hidden_size=2048, intermediate_size=8192, num_hidden_layers=16, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=True),
    "8b": dict(hidden_size=4096, intermediate_size=14336, num_hidden_layers=32, num_attention_heads=32,
               num_key_value_heads=8, vocab_size=128256, tie_word_embeddings=False),
}
"""Those of Llama 3.2 1B and Llama 3.1 8B, and a small one."""
LIMIT_BYTES = {"tiny": 8e8, "1b": 8e8, "8b": 3e9}
_RANK = 16
_SHARD_BYTES = 4e9

_OURS = """
import sys
from lora_kit.merge import merge_to_folder
base, adapter, out = sys.argv[1:]
merge_to_folder(base, adapter, base, out, "bf16")
"""
_PEFT = """
import sys, torch
from peft import PeftModel
from transformers import AutoModelForCausalLM
base, adapter, out = sys.argv[1:]
model = AutoModelForCausalLM.from_pretrained(base, dtype=torch.{dtype})
model = PeftModel.from_pretrained(model, adapter).merge_and_unload()
model.to(torch.bfloat16).save_pretrained(out)
"""
CONTESTANTS = {"lora-kit": _OURS, "peft, fp32": _PEFT.format(dtype="float32"),
               "peft, bf16": _PEFT.format(dtype="bfloat16")}


def write_base(folder: Path, shape: dict, seed: int = 0) -> int:
    """A Llama of that shape with normal random weights in bf16, streamed to ``folder``; returns its parameters."""
    import torch
    from transformers import LlamaConfig

    from lora_kit import merging, tensor_files

    folder.mkdir(parents=True)
    config = LlamaConfig(**shape, max_position_embeddings=8192, bos_token_id=1, eos_token_id=2)
    config.architectures, config.dtype = ["LlamaForCausalLM"], "bfloat16"
    config.save_pretrained(folder)
    shapes = {name: tuple(tensor.shape) for name, tensor in merging.empty_model(folder).state_dict().items()}
    if config.tie_word_embeddings:
        shapes.pop("lm_head.weight")
    entries = [tensor_files.Entry(name=name, shape=size, kind="BF16") for name, size in shapes.items()]
    shards: list[list] = [[]]
    for entry in entries:
        if shards[-1] and sum(_num_bytes(each) for each in shards[-1]) + _num_bytes(entry) > _SHARD_BYTES:
            shards.append([])
        shards[-1].append(entry)
    generator = torch.Generator().manual_seed(seed)

    def pieces(entry):
        for first, last in tensor_files.blocks(entry.shape):
            block = torch.empty(last - first, *entry.shape[1:], dtype=torch.float32)
            yield (block.fill_(1.0) if len(entry.shape) == 1 else block.normal_(std=0.02, generator=generator)
                   ).to(torch.bfloat16)

    file_of, total = {}, 0
    for number, shard in enumerate(shards, 1):
        name = "model.safetensors" if len(shards) == 1 else f"model-{number:05d}-of-{len(shards):05d}.safetensors"
        tensor_files.write_file(folder / name, shard, pieces)
        file_of |= {entry.name: name for entry in shard}
        total += sum(map(_num_bytes, shard))
    if len(shards) > 1:
        tensor_files.write_index(folder, file_of, total)
    return total // 2


def _num_bytes(entry) -> int:
    count = 2
    for size in entry.shape:
        count *= size
    return count


def write_adapter(base: Path, folder: Path, seed: int = 1) -> Path:
    """A LoRA of rank 16 on every linear layer but the head, both factors random, in peft's layout."""
    import torch
    from peft import LoraConfig
    from safetensors.torch import save_file

    from lora_kit import merging

    folder.mkdir(parents=True)
    torch.manual_seed(seed)
    weights, targets = {}, set()
    for path, module in merging.empty_model(base).named_modules():
        if type(module).__name__ == "Linear" and path != "lm_head":
            num_out, num_in = module.weight.shape
            weights[f"base_model.model.{path}.lora_A.weight"] = torch.randn(_RANK, num_in) / num_in**0.5
            weights[f"base_model.model.{path}.lora_B.weight"] = 0.01 * torch.randn(num_out, _RANK)
            targets.add(path.rpartition(".")[2])
    save_file(weights, folder / "adapter_model.safetensors", {"format": "pt"})
    config = LoraConfig(r=_RANK, lora_alpha=2 * _RANK, target_modules=sorted(targets), task_type="CAUSAL_LM",
                        base_model_name_or_path=str(base), inference_mode=True)
    config.save_pretrained(folder)
    return folder


def run_apart(code: str, *arguments: str | Path, threads: int = 1) -> dict[str, float]:
    """Seconds and memory of a fresh interpreter that runs ``code``."""
    environment = {**os.environ, "PYTHONPATH": str(_ROOT), "OMP_NUM_THREADS": str(threads),
                   "MKL_NUM_THREADS": str(threads), "HF_HUB_OFFLINE": "1", "TORCHDYNAMO_DISABLE": "1"}
    started, before = time.perf_counter(), _children_seconds()
    process = subprocess.Popen([sys.executable, "-W", "ignore", "-c", code, *map(str, arguments)], env=environment,
                               stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    most = {"RssAnon": 0, "VmHWM": 0}
    while process.poll() is None:
        try:
            status = Path(f"/proc/{process.pid}/status").read_text()
        except OSError:
            break
        for line in status.splitlines():
            name, _, value = line.partition(":")
            if name in most:
                most[name] = max(most[name], 1024 * int(value.split()[0]))
        time.sleep(0.02)
    seconds, told = time.perf_counter() - started, process.communicate()[1]
    if process.returncode:
        raise RuntimeError(f"ended with {process.returncode}: {told.strip().splitlines()[-1:]}")
    return {"seconds": seconds, "cpu_seconds": _children_seconds() - before,
            "anonymous_bytes": most["RssAnon"], "peak_resident_bytes": most["VmHWM"]}


def _children_seconds() -> float:
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def share_differing(one: Path, other: Path) -> float:
    """Share of the elements of two folders of the same tensors that differ."""
    from lora_kit import tensor_files

    ours, theirs = tensor_files.list_tensors(one), tensor_files.list_tensors(other)
    assert ours.keys() == theirs.keys(), sorted(ours.keys() ^ theirs.keys())[:3]
    differing = total = 0
    with tensor_files.Reader() as left, tensor_files.Reader() as right:
        for name, stored in ours.items():
            for first, last in tensor_files.blocks(stored.shape):
                a, b = left.rows(stored, first, last), right.rows(theirs[name], first, last)
                differing += int((a != b).sum())
                total += a.numel()
    return differing / total


def matrix_seconds(threads: int) -> float:
    """Seconds of a 4096 x 4096 product in bf16, the quickest of three: how quick the machine is now."""
    import torch

    torch.set_num_threads(threads)
    a, times = torch.randn(4096, 4096).bfloat16(), []
    for _ in range(3):
        started = time.perf_counter()
        a @ a
        times.append(time.perf_counter() - started)
    return min(times)


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shape", choices=sorted(SHAPES), default="1b")
    parser.add_argument("--times", type=int, default=2, help="rounds; the quickest counts")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--quick", action="store_true", help="the tiny shape, once: does it work at all")
    parser.add_argument("--check", action="store_true", help="exit with 1 over the limit of anonymous memory")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    parser.add_argument("--folder", type=Path, help="where the files go for the time being (default: a temporary one)")
    arguments = parser.parse_args()
    shape, times = ("tiny", 1) if arguments.quick else (arguments.shape, arguments.times)
    names = ["lora-kit"] if shape == "8b" else list(CONTESTANTS)
    with tempfile.TemporaryDirectory(dir=arguments.folder) as name:
        folder, rows = Path(name), {}
        num_params = write_base(folder / "base", SHAPES[shape])
        adapter = write_adapter(folder / "base", folder / "adapter")
        matrix = []
        for turn in range(times):
            matrix.append(matrix_seconds(arguments.threads))
            for each in names:
                out = folder / ("ours" if each == "lora-kit" else "theirs")
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir()
                found = run_apart(CONTESTANTS[each], folder / "base", adapter, out, threads=arguments.threads)
                if each != "lora-kit" and turn == 0:
                    found["differing"] = share_differing(folder / "ours", out)
                if out.name == "theirs":
                    shutil.rmtree(out)
                kept = rows.setdefault(each, found)
                for key in ("seconds", "cpu_seconds"):
                    kept[key] = min(kept[key], found[key])
                for key in ("anonymous_bytes", "peak_resident_bytes"):
                    kept[key] = max(kept[key], found[key])
    figures = {"shape": shape, "num_params": num_params, "threads": arguments.threads, "times": times,
               "matrix_seconds": matrix, "limit_bytes": LIMIT_BYTES[shape], "rows": rows}
    print(f"{num_params / 1e9:.3g} billion parameters, LoRA of rank {_RANK} on all linear layers, "
          f"{arguments.threads} thread(s); a 4096 x 4096 product took {min(matrix):.2f} to {max(matrix):.2f} s")
    print(f"{'':12} {'seconds':>8} {'CPU s':>8} {'anonymous':>12} {'resident':>12}  elements unlike lora-kit's")
    for each, row in rows.items():
        differing = f"{row['differing']:.2e}" if "differing" in row else ""
        print(f"{each:12} {row['seconds']:8.1f} {row['cpu_seconds']:8.1f} {row['anonymous_bytes'] / 1e6:9,.0f} MB "
              f"{row['peak_resident_bytes'] / 1e6:9,.0f} MB  {differing}")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.check and rows["lora-kit"]["anonymous_bytes"] > LIMIT_BYTES[shape]:
        sys.exit(f"over {LIMIT_BYTES[shape] / 1e6:,.0f} MB")


if __name__ == "__main__":
    sys.path.insert(0, str(_ROOT))
    main()
