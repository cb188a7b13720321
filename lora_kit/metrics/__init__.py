"""Metrics: how one prediction is scored against its target. One file per metric.

To add one, write ``lora_kit/metrics/NAME.py``; its name is the value in a task's
``metrics`` list, and nothing else has to know of it. The file has:

* ``HIGHER_IS_BETTER``: True or False;
* ``score(prediction, target, **inputs) -> (float, str)``: one item's score and, where it
  is not the best, the reason in words. Plain Python without torch. It never raises for
  what a model may have written: that is a low score with a reason. It raises DataError
  for a target that nothing can be scored against: that item then has no score;
* ``build()``: the same metric as an ``evaluate.Metric``, made inside the function because
  importing evaluate loads torch. Its features are texts: ``predictions``, ``references``
  and one more for each further input of ``score`` (structured ones as JSON).
  ``compute`` returns ``{NAME: mean, "item_scores": [...], "reasons": [...]}``.

Add ``tests/metrics/test_NAME.py``: values that the reference implementation gives, and
``check_build`` from ``tests/metrics/checks.py``, which holds ``build`` and ``score`` together.

Write ``import evaluate`` and ``class X(evaluate.Metric)``, never ``from evaluate import
Metric``: evaluate 0.4.6 takes the first metric class that it finds in a file. Construct with
``keep_in_memory=True``, so that nothing is written to a cache.

Torch-free. Reads folder listings; writes nothing.
"""

from __future__ import annotations

import difflib
import importlib
from pathlib import Path
from types import ModuleType

from lora_kit.errors import RecipeError


def names() -> list[str]:
    """Names of the metrics that there are."""
    return sorted(path.stem for path in Path(__file__).parent.glob("*.py") if not path.stem.startswith("_"))


def load(name: str) -> ModuleType:
    """The metric called ``name``; RecipeError with the nearest name when there is none."""
    known = names()
    if name not in known:
        near = difflib.get_close_matches(name, known, n=1)
        todo = f"did you mean '{near[0]}'?" if near else f"known: {', '.join(known)}"
        raise RecipeError(f"metric '{name}'", "no such metric", todo)
    return importlib.import_module(f"lora_kit.metrics.{name}")
