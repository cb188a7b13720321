"""Memory and time of preparing data that is larger than memory.

    python benchmarks/data_memory.py [--gigabytes 2] [--quick] [--check] [--json PATH]

Writes a JSONL of ``--gigabytes`` with rows of random words into a temporary folder (``--rows text``:
one text of about 4 kB a row; ``--rows chat``: a question and an answer of 2 kB each), and prepares it in
a fresh process with a byte tokenizer, so that every byte is a token: token files are five times as
large as the rows. Room on the disk: eight times ``--gigabytes``.

Printed is the largest *anonymous* memory of that process, sampled every 50 ms from ``RssAnon`` of
/proc/PID/status: what the process itself holds. Pages of files that are mapped into it do not
count, since the kernel takes them back when memory is short; ``VmHWM``, which counts them, is printed
beside it. ``--check`` exits with 1 when anonymous memory passed 1 GB (10**9 bytes). Linux only.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

LIMIT_BYTES = 10**9
_ROOT = Path(__file__).resolve().parent.parent
_CHATML = ("{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}"
           "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")

_PREPARE = """
import sys
from pathlib import Path
from lora_kit import data, prepared
from lora_kit.recipe_file import read_recipe
folder = Path(sys.argv[1])
recipe = read_recipe(folder / "memory.yaml").recipe
base = {"artifact": {"tokenizer": str(folder / "tokenizer")}, "content": "byte tokenizer"}
found = prepared.find(recipe, folder, base)
data.prepare(recipe, found, base)
print(found.ledger()["splits"]["train"]["rows_used"], found.ledger()["splits"]["train"]["tokens_in"])
"""


def write_tokenizer(folder: Path) -> None:
    """A byte-level tokenizer without merges under ``folder``."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    tokens = ["<|endoftext|>", "<|im_start|>", "<|im_end|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    backend = Tokenizer(models.BPE(vocab={token: number for number, token in enumerate(tokens)}, merges=[]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<|im_end|>", pad_token="<|im_end|>")
    tokenizer.chat_template = _CHATML
    tokenizer.save_pretrained(folder)


def write_rows(path: Path, num_bytes: int, kind: str) -> int:
    """Rows of random words until ``path`` has ``num_bytes``; returns how many."""
    rng = random.Random(0)
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyz", k=rng.randint(2, 9))) for _ in range(20_000)]
    written = num_rows = 0
    with open(path, "w", encoding="utf-8") as file:
        while written < num_bytes:
            first, second = (" ".join(rng.choices(words, k=310)) for _ in range(2))
            row = {"text": f"{first} {second}"} if kind == "text" else {"messages": [
                {"role": "user", "content": first}, {"role": "assistant", "content": second}]}
            written += file.write(json.dumps(row) + "\n")
            num_rows += 1
    return num_rows


def prepare(folder: Path) -> dict[str, float]:
    """Prepare the rows in ``folder`` in a fresh process and watch its memory."""
    environment = {**os.environ, "LORA_KIT_CACHE": str(folder / "cache"), "PYTHONPATH": str(_ROOT),
                   "TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, "-c", _PREPARE, str(folder)], env=environment, stdout=subprocess.PIPE,
                               text=True)
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
        time.sleep(0.05)
    output = process.communicate()[0]
    if process.returncode:
        sys.exit(f"preparing ended with {process.returncode}")
    num_rows, num_tokens = map(int, output.split())
    return {"seconds": time.perf_counter() - started, "anonymous_bytes": most["RssAnon"],
            "peak_resident_bytes": most["VmHWM"], "rows_used": num_rows, "tokens_in": num_tokens}


def main() -> None:
    """Run as the module's docstring says."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--gigabytes", type=float, default=2.0, help="size of the JSONL, in 10**9 bytes")
    parser.add_argument("--rows", choices=("text", "chat"), default="text", help="plain texts or conversations")
    parser.add_argument("--quick", action="store_true", help="20 MB: does it work at all")
    parser.add_argument("--check", action="store_true", help="exit with 1 over 1 GB of anonymous memory")
    parser.add_argument("--json", type=Path, metavar="PATH", help="write the figures there")
    arguments = parser.parse_args()
    num_bytes = 20_000_000 if arguments.quick else round(arguments.gigabytes * 10**9)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_tokenizer(folder / "tokenizer")
        num_rows = write_rows(folder / "rows.jsonl", num_bytes, arguments.rows)
        (folder / "memory.yaml").write_text(
            "model: {base: none}\ndata: {train: rows.jsonl, max_tokens: 16384, held_out_rows: 64}\n")
        figures = {"gigabytes": num_bytes / 10**9, "kind": arguments.rows, "num_rows": num_rows, **prepare(folder)}
    print(f"{'rows.jsonl':24} {figures['gigabytes']:.3g} GB, {num_rows:,} {arguments.rows} rows")
    print(f"{'tokens':24} {figures['tokens_in']:,}")
    print(f"{'seconds':24} {figures['seconds']:.1f}")
    print(f"{'anonymous memory':24} {figures['anonymous_bytes'] / 1e6:,.0f} MB (RssAnon, sampled)")
    print(f"{'resident at most':24} {figures['peak_resident_bytes'] / 1e6:,.0f} MB (VmHWM, with mapped files)")
    if arguments.json:
        arguments.json.write_text(json.dumps(figures, indent=1) + "\n", encoding="utf-8")
    if arguments.check and figures["anonymous_bytes"] > LIMIT_BYTES:
        sys.exit(f"over {LIMIT_BYTES / 1e6:,.0f} MB")


if __name__ == "__main__":
    main()
