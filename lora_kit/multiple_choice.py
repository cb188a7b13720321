"""Multiple choice and continuations, scored by how likely an artifact finds them.

The likelihood of each continuation comes from the engine (``Engine.likelihoods``); what is right follows from them as
in lm-evaluation-harness (``lm_eval/api/task.py``, 0.4.13): the first choice with the highest summed log-probability
(``acc``), divided by its characters (``acc_norm``) or bytes (``acc_bytes``).

Two choices may lie nearer to each other than the rounding of a batch. How much rounding there is, the engine measures
on some of the items, in another batch shape. An item whose *margin* (of the right choice over the best other one) is
smaller than that is scored again in another shape; its line says so, and a flip between two artifacts whose margin
moved by no more than their rounding is called numeric (``gates.py``).

Torch-free itself. Reads and writes nothing.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from lora_kit.lm_eval_task import LmEvalTask
from lora_kit.types import ItemScore, Likelihood, Question

Line = dict[str, Any]
"""A line of items.jsonl; those of choices also have ``margin``, ``noise`` (of a margin) and ``log_probs``."""


def encode(tokenizer: Any, context: str, continuations: Sequence[str]) -> Question:
    """Token ids as lm-evaluation-harness splits them (``lm_eval/api/model.py``, ``TemplateLM._encode_pair``).

    White space at the end of the context goes to the continuations; context and continuation are tokenized together,
    and the continuation is what stands behind the context's own tokens. Without a context it is the token that texts
    begin with.
    """
    first = tokenizer.eos_token_id if tokenizer.bos_token_id is None else tokenizer.bos_token_id
    if not context:
        ids = [tokenizer(text, add_special_tokens=False)["input_ids"] for text in continuations]
        if any(own and own[0] == first for own in ids):
            # It stands there already. (Of several continuations, all begin alike or the context is another.)
            ids = [own[1:] if own[0] == first else own for own in ids]
        return Question(context=(first,), continuations=tuple(map(tuple, ids)))
    kept = context.rstrip()
    continuations = [context[len(kept):] + text for text in continuations]
    texts = [kept, *(kept + text for text in continuations)]
    special = not texts[-1].startswith(tokenizer.decode(first))
    ids = tokenizer(texts, add_special_tokens=special)["input_ids"] if kept else [[], *(
        tokenizer(text, add_special_tokens=special)["input_ids"] for text in texts[1:])]
    own, *whole = ids
    if not own:
        # Nothing but white space: as without a context.
        return Question(context=(first,), continuations=tuple(map(tuple, whole)))
    return Question(context=tuple(own), continuations=tuple(tuple(each[len(own):]) for each in whole))


def score(engine: Any, task: str, spec: LmEvalTask, asked: Sequence[dict[str, Any]],
          max_tokens: int | None) -> list[Line]:
    """A line for each metric and item.

    Args:
        asked: items whose ``likelihood`` says what is asked.
        max_tokens: that the model's positions reach; an item with more has an error.
    """
    questions, errors = [], []
    for item in asked:
        about = item["likelihood"]
        question = encode(engine.tokenizer, about["context"], about["continuations"])
        questions.append(question)
        errors.append(why_not(question, max_tokens))
    fitting = [index for index, error in enumerate(errors) if error is None]
    greedy = spec.kind == "loglikelihood" and "acc" in spec.metrics
    likelihoods = engine.likelihoods([questions[index] for index in fitting], greedy=greedy)
    answers = dict(zip(fitting, likelihoods, strict=True))
    for index, found in answers.items():
        if not all(math.isfinite(each.log_prob) for each in found):
            errors[index] = f"its log-probabilities are {', '.join(str(each.log_prob) for each in found)}"
    lines = []
    for metric in spec.metrics:
        right = [index for index in fitting if errors[index] is None]
        again = _near_ties(engine, metric, asked, right, questions, answers) if spec.kind == "multiple_choice" else {}
        for index, item in enumerate(asked):
            fields = _line(metric, spec, item, answers[index], engine, again.get(index)) if errors[index] is None \
                else {"score": None, "error": errors[index], "weight": 1}
            extra = {key: value for key, value in fields.items() if key not in ItemScore.__dataclass_fields__}
            own = ItemScore(**{"item_id": item["item_id"], "cluster": item["cluster"], "target": item["target"],
                               "prompt": item["likelihood"]["context"],
                               **{key: value for key, value in fields.items() if key not in extra}})
            lines.append({"task": task, "metric": metric, **own.as_dict(), **extra})
    return lines


def why_not(question: Question, max_tokens: int | None) -> str | None:
    """Why ``question`` cannot be asked of a model whose positions reach ``max_tokens``; None where it can."""
    longest = len(question.context) + max(map(len, question.continuations)) - 1
    if not all(question.continuations):
        return "a continuation has no token of its own"
    if max_tokens and longest > max_tokens:
        return f"a prompt of {longest} tokens does not fit into {max_tokens}"
    return None


def values_of(metric: str, log_probs: Sequence[float], choices: Sequence[str]) -> list[float]:
    """What the choices are compared by."""
    if metric == "acc":
        return list(log_probs)
    sizes = [len(choice) if metric == "acc_norm" else len(choice.encode()) for choice in choices]
    return [value / size if size else -math.inf for value, size in zip(log_probs, sizes, strict=True)]


def margin_of(values: Sequence[float], gold: Sequence[int]) -> float | None:
    """The best right value minus the best other one; None where every choice is right."""
    others = [value for number, value in enumerate(values) if number not in gold]
    return max(values[number] for number in gold) - max(others) if others else None


def _near_ties(engine: Any, metric: str, asked: Sequence[dict], right: Sequence[int], questions: Sequence[Question],
               answers: dict[int, list[Likelihood]]) -> dict[int, list[Likelihood]]:
    """The likelihoods in another batch shape of the items whose margin is within the rounding."""
    near = [index for index in right if (margin := _margin(metric, asked[index], answers[index])) is not None
            and abs(margin) <= _noise(engine, metric, asked[index])]
    if not near or not engine.batches_likelihoods:
        return {}
    return dict(zip(near, engine.likelihoods([questions[index] for index in near], apart=True), strict=True))


def _margin(metric: str, item: dict, found: Sequence[Likelihood]) -> float | None:
    about = item["likelihood"]
    return margin_of(values_of(metric, [each.log_prob for each in found], about["choices"]), about["gold"])


def _noise(engine: Any, metric: str, item: dict) -> float:
    """How far rounding alone moves a margin: twice what it moves a log-probability, in the metric's unit."""
    sizes = values_of(metric, [1.0] * len(item["likelihood"]["choices"]), item["likelihood"]["choices"])
    return 2 * engine.likelihood_noise * max(abs(size) for size in sizes if math.isfinite(size))


def _line(metric: str, spec: LmEvalTask, item: dict, found: Sequence[Likelihood], engine: Any,
          again: Sequence[Likelihood] | None) -> dict[str, Any]:
    """Fields of one item's line."""
    about = item["likelihood"]
    log_probs = [each.log_prob for each in found]
    if spec.kind == "loglikelihood_rolling":
        num_bytes = len(about["choices"][0].encode())
        return {"score": -log_probs[0] / math.log(2) / num_bytes, "reason": f"{num_bytes} bytes",
                "prompt": about["choices"][0], "weight": num_bytes, "log_probs": log_probs}
    if spec.kind == "loglikelihood":
        reason = f"log-probability {log_probs[0]:.6g}"
        if metric == "acc":
            score, more = float(found[0].greedy), {}
            reason += "" if found[0].greedy else "; some token is not the most likely one"
        else:
            score, more = math.exp(min(-log_probs[0], 700.0)), {"outcome": log_probs[0]}
        return {"score": score, "reason": reason, "weight": 1, "log_probs": log_probs, **more}
    values = values_of(metric, log_probs, about["choices"])
    best = values.index(max(values))
    named = "log-probabilities " + ", ".join(f"{value:.6g}" for value in log_probs)
    line = {"score": float(best in about["gold"]), "prediction": about["choices"][best], "weight": 1, "reason": named,
            "log_probs": log_probs, "noise": _noise(engine, metric, item)}
    margin = margin_of(values, about["gold"])
    if margin is not None:
        line["margin"] = margin
    if again is not None:
        other = values_of(metric, [each.log_prob for each in again], about["choices"])
        agrees = (other.index(max(other)) in about["gold"]) == (best in about["gold"])
        line |= {"near_tie": True, "margin_again": margin_of(other, about["gold"]), "reason":
                 f"{named}; a near tie: in another batch shape it is {'the same' if agrees else 'decided otherwise'}"}
    return line
