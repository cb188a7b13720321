"""Metrics: how one prediction is scored against its target. One file per metric.

To add one, write ``lora_kit/metrics/NAME.py``; its name is the value in a task's
``metrics`` list, and nothing else has to know of it. The file has:

* ``HIGHER_IS_BETTER``: True or False;
* ``score(prediction, target, **inputs) -> (float, str)``: one item's score and, where it
  is not the best, the reason in words. Plain Python without torch. It never raises for
  what a model may have written: that is a low score with a reason. It raises DataError
  for a target that nothing can be scored against: that item then has no score;
* ``build()``: the same metric as an ``evaluate.Metric``, which :func:`as_evaluate` makes.

A metric whose value is no mean of its items (BLEU, a correlation) also has

* ``outcome(prediction, target)``: what of one item goes into the value, as JSON;
* ``corpus(outcomes) -> float``: the value of any selection of items, from their outcomes alone.
  Intervals come from it by the bootstrap, so it is called some thousand times.

``target`` is a text. Of an item with several references a metric sees each in turn and the best counts;
one that reads them together sets ``SEVERAL = True`` and may get a list. One whose target is a value and no
text sets ``STRUCTURED = True`` and gets it as JSON.

Add ``tests/metrics/test_NAME.py``: values that the reference implementation gives, and
``check_build`` from ``tests/metrics/checks.py``, which holds ``build`` and ``score`` together.

A user's own ``evaluate`` module serves too: LORA_KIT_METRICS names a folder with ``NAME.py`` or
``NAME/NAME.py`` (see ``_local.py``). The folder comes from the environment and never from a YAML file, so that
no task can name code to run.

Torch-free. Reads folder listings; writes nothing.
"""

from __future__ import annotations

import difflib
import importlib
import inspect
from pathlib import Path
from types import ModuleType
from typing import Any

from lora_kit.errors import DataError, RecipeError
from lora_kit.metrics import _local

Metric = ModuleType | _local.LocalMetric


def names() -> list[str]:
    """Names of the metrics that come with lora-kit."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> Metric:
    """The metric called ``name``, lora-kit's or the user's; RecipeError with the nearest name when there is none."""
    known = names()
    if name not in known:
        own = _local.names()
        if name in own:
            return _local.load(name)
        known += own
        near = difflib.get_close_matches(name, known, n=1)
        todo = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise RecipeError(f"metric '{name}'", "no such metric", todo)
    return importlib.import_module(f"lora_kit.metrics.{name}")


def own_sha256(name: str) -> str | None:
    """SHA-256 of the user's module called ``name``; None for a metric of lora-kit's, which goes by its version."""
    metric = load(name)
    return metric.sha256() if isinstance(metric, _local.LocalMetric) else None


def inputs_of(metric: Metric) -> list[str]:
    """Names of what ``metric`` needs of an item beside its target."""
    return [key for key, parameter in inspect.signature(metric.score).parameters.items()
            if parameter.kind is parameter.KEYWORD_ONLY and parameter.default is parameter.empty]


def score_item(metric: Metric, prediction: str, target: str | list[str], **inputs: Any) -> tuple[float, str]:
    """Score of one prediction; of several references the best counts.

    Raises:
        DataError: nothing can be scored against the target.
    """
    if not isinstance(target, list) or getattr(metric, "SEVERAL", False):
        return metric.score(prediction, target, **inputs)
    if not target:
        raise DataError("the item", "has no reference", "mend the row")
    best = max if metric.HIGHER_IS_BETTER else min
    return best((metric.score(prediction, each, **inputs) for each in target), key=lambda scored: scored[0])


def as_evaluate(name: str):
    """The metric ``name`` as an ``evaluate.Metric``. Importing evaluate loads torch: call it, do not import it.

    Its features are texts: ``predictions``, ``references`` (or lists of them) and one more for each further input of
    ``score``, structured ones as JSON. ``compute`` returns ``{NAME: value, "item_scores": [...], "reasons": [...]}``
    and of a corpus metric ``outcomes``. (``import evaluate`` and ``evaluate.Metric``, never ``from evaluate import
    Metric``: evaluate 0.4.6 takes the first metric class that it finds in a file. In memory, so that no cache is
    written.)
    """
    import datasets
    import evaluate

    metric = load(name)
    inputs = inputs_of(metric)

    def features(references: Any):
        return datasets.Features({key: datasets.Value("string") for key in ("predictions", *inputs)}
                                 | {"references": references})

    class ItemMetric(evaluate.Metric):
        def _info(self):
            return evaluate.MetricInfo(
                description=metric.__doc__, citation="", inputs_description=metric.score.__doc__,
                features=[features(datasets.Value("string")), features(datasets.List(datasets.Value("string")))])

        def _compute(self, predictions, references, **given):
            columns = [given.pop(key) for key in inputs]
            scored = [score_item(metric, prediction, reference, **dict(zip(inputs, values, strict=True)), **given)
                      for prediction, reference, *values in zip(predictions, references, *columns, strict=True)]
            values = [value for value, _ in scored]
            found = {"item_scores": values, "reasons": [reason for _, reason in scored]}
            if not hasattr(metric, "corpus"):
                return {name: sum(values) / len(values), **found}
            outcomes = [metric.outcome(prediction, reference)
                        for prediction, reference in zip(predictions, references, strict=True)]
            return {name: metric.corpus(outcomes), **found, "outcomes": outcomes}

    return ItemMetric(keep_in_memory=True)
