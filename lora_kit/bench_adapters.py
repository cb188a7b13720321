"""An adapter unmerged beside the merged model, and several adapters on one base, switched with each request.

One base is in memory. For each number asked for, so many copies of the adapter lie on it, and every request is answered
with the next of them; the merged model answers the same prompt in turn. So each number has its own pairs, and what
differs within a pair is the adapter alone.

Reads a base, an adapter and the merged model; writes nothing.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from lora_kit import speed_ratio
from lora_kit.bench_sweep import once, whole
from lora_kit.chat import prompt_ids
from lora_kit.types import Artifact


def measure(adapter: dict[str, Any], merged: dict[str, Any], *, asked: Sequence[dict[str, Any]],
            tools_mode: str, counts: Sequence[int], new_tokens: int, threads: int) -> dict[str, Any]:
    """Load both in this process and let them answer; call it in one of its own.

    Args:
        asked: prompts, each with its ``messages`` and ``tools``.

    Returns:
        engine, prompts, prompt_tokens (mean), new_tokens, base_bytes, adapter_bytes (of one, in memory), ``merged``
        (weights' bytes, tokens_per_second, first_token_seconds), and ``rows``: of each number adapters,
        resident_bytes (of all weights), process_bytes_added (what the process grew by for each that was added),
        switch_seconds, first_token_seconds, tokens_per_second, and ``measured``: seconds of a whole answer of the
        merged model over those of the adapter, paired.
    """
    from lora_kit.engines import open_engine

    with open_engine(Artifact(**merged), threads=threads, prefer="hf") as whole_model, \
            open_engine(Artifact(**adapter), threads=threads, prefer="hf") as switched:
        model = switched.model
        prompts = [prompt_ids(switched.tokenizer, each["messages"], each["tools"], tools_mode=tools_mode)
                   for each in asked]
        names = list(model.peft_config)
        own_bytes = _adapter_bytes(model, names[0])
        rows, all_bytes = [], sum(each.numel() * each.element_size() for each in model.parameters())
        merged_times: list[dict[str, float]] = []
        for number in sorted(set(counts)):
            grown = _process_bytes()
            added = number - len(names)
            for _ in range(added):
                name = f"copy{len(names)}"
                model.load_adapter(adapter["path"], adapter_name=name, is_trainable=False)
                names.append(name)
            model.eval()
            grown = _process_bytes() - grown
            plain, own, switches = _take_turns(whole_model, switched, names, prompts, new_tokens)
            merged_times += plain
            ratio = speed_ratio.of_pairs([whole(each) for each in plain], [whole(each) for each in own])
            rows.append({"adapters": number, "resident_bytes": all_bytes + (number - 1) * own_bytes,
                         "process_bytes_added": grown / added if added else None,
                         "switch_seconds": statistics.median(switches), **_speeds(own, new_tokens),
                         "measured": {**asdict(ratio), "verdict": ratio.verdict}})
        merged_bytes = sum(each.numel() * each.element_size() for each in whole_model.model.parameters())
        return {"engine": switched.name, "merged_engine": whole_model.name, "own_loop": whole_model.has_own_loop,
                "threads": threads, "prompts": len(prompts),
                "prompt_tokens": statistics.mean(map(len, prompts)), "new_tokens": new_tokens,
                "base_bytes": all_bytes - own_bytes, "adapter_bytes": own_bytes,
                "merged": {"bytes": merged_bytes, **_speeds(merged_times, new_tokens)}, "rows": rows}


def _take_turns(merged: Any, switched: Any, names: Sequence[str], prompts: Sequence[Sequence[int]], new_tokens: int
                ) -> tuple[list[dict[str, float]], list[dict[str, float]], list[float]]:
    """(the merged model's times, the adapters' times, seconds of each switch), a prompt each."""
    plain, own, switches = [], [], []
    for turn, prompt in enumerate([prompts[0], *prompts]):
        for side in ((0, 1), (1, 0))[turn % 2]:
            if side:
                started = time.perf_counter()
                switched.model.set_adapter(names[turn % len(names)])
                spent = time.perf_counter() - started
                own.append(once(switched, [prompt], new_tokens))
                switches.append(spent)
            else:
                plain.append(once(merged, [prompt], new_tokens))
    return plain[1:], own[1:], switches[1:]  # the first warms up


def _speeds(times: Sequence[dict[str, float]], new_tokens: int) -> dict[str, float]:
    return {"first_token_seconds": statistics.median(each["first_token_seconds"] for each in times),
            "tokens_per_second": statistics.median((new_tokens - 1) / each["decode_seconds"] for each in times)}


def _adapter_bytes(model: Any, name: str) -> int:
    """Bytes in memory of the tensors of the adapter ``name``."""
    return sum(each.numel() * each.element_size() for path, each in model.named_parameters()
               if f".{name}." in path or path.endswith(f".{name}"))


def _process_bytes() -> int:
    import psutil

    return psutil.Process().memory_info().rss
