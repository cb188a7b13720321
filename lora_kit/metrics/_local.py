"""A user's own ``evaluate`` module as a metric: a file or folder in the folder that LORA_KIT_METRICS names.

``NAME.py`` or ``NAME/NAME.py`` is loaded by ``evaluate.load``; NAME is the value in a task. It is code, so the folder
comes from the environment and never from a YAML file. ``evaluate`` does not say whether more is better, so
the module's file does, in a line ``HIGHER_IS_BETTER = True`` (or False), which is read without running it.

An item's score is what the module says of that item alone. Where the value of all items is not the mean of these, the
module is a corpus metric: its value is computed over all items, and its interval by the bootstrap over
them. Reads the folder; ``evaluate`` copies the module into its own cache.
"""

from __future__ import annotations

import ast
import hashlib
import math
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lora_kit.errors import DataError, RecipeError

VARIABLE = "LORA_KIT_METRICS"
_SAME = 1e-6


def names() -> list[str]:
    """Names of the modules in the user's folder; none where the environment names no folder."""
    folder = _folder()
    if folder is None:
        return []
    found = [path.stem for path in folder.glob("*.py")] + [path.stem for path in folder.glob("*/*.py")
                                                           if path.stem == path.parent.name]
    return sorted({name for name in found if name.isidentifier() and not name.startswith("_")})


def load(name: str) -> LocalMetric:
    """The module ``name``, not run yet.

    Raises:
        RecipeError: its file does not say whether more is better.
    """
    folder = _folder()
    assert folder is not None and name in names()
    path = folder / f"{name}.py"
    return LocalMetric(name, path if path.is_file() else folder / name / f"{name}.py")


def _folder() -> Path | None:
    given = os.environ.get(VARIABLE)
    if not given:
        return None
    folder = Path(given).expanduser().resolve()
    if not folder.is_dir():
        raise RecipeError(VARIABLE, f"no such folder ({folder})",
                          "name the folder of your evaluate modules, or unset it")
    return folder


class LocalMetric:
    """What a file of ``lora_kit/metrics/`` offers, on top of an ``evaluate`` module.

    Args:
        path: the module's file.
    """

    SEVERAL = True

    def __init__(self, name: str, path: Path) -> None:
        self.name, self.path = name, path
        self.HIGHER_IS_BETTER = self._higher_is_better()
        self._module: Any = None

    def _higher_is_better(self) -> bool:
        try:
            tree = ast.parse(self.path.read_text(encoding="utf-8"))
        except (SyntaxError, ValueError) as error:
            raise RecipeError(str(self.path), f"is not Python ({error})", "mend it") from None
        for node in tree.body:
            if isinstance(node, ast.Assign) and isinstance(node.value, ast.Constant) and \
                    isinstance(node.value.value, bool) and \
                    any(isinstance(target, ast.Name) and target.id == "HIGHER_IS_BETTER" for target in node.targets):
                return node.value.value
        raise RecipeError(str(self.path), "does not say whether more of it is better",
                          "add a line HIGHER_IS_BETTER = True (or False)")

    def sha256(self) -> str:
        """SHA-256 of the module's file."""
        return hashlib.sha256(self.path.read_bytes()).hexdigest()

    def score(self, prediction: str, target: str | list[str]) -> tuple[float, str]:
        """What the module says of one item."""
        return self._value([prediction], [target]), ""

    def outcome(self, prediction: str, target: str | list[str]) -> list[Any]:
        """What goes into the value: all of it."""
        return [prediction, target]

    def corpus(self, outcomes: Sequence[Sequence[Any]]) -> float:
        """What the module says of these items together."""
        predictions, targets = zip(*outcomes, strict=True)
        return self._value(list(predictions), list(targets))

    def build(self):
        """Itself: it has ``compute`` as an ``evaluate.Metric`` has."""
        return self

    def compute(self, *, predictions: list[str], references: list[Any]) -> dict[str, Any]:
        """The module's value with item scores; ``outcomes`` where the value is no mean of these."""
        scores = [self._value([prediction], [reference])
                  for prediction, reference in zip(predictions, references, strict=True)]
        value = self._value(list(predictions), list(references))
        found = {self.name: value, "item_scores": scores, "reasons": [""] * len(scores)}
        if not math.isclose(value, sum(scores) / len(scores), rel_tol=_SAME, abs_tol=_SAME):
            found["outcomes"] = [list(pair) for pair in zip(predictions, references, strict=True)]
        return found

    def _value(self, predictions: list[str], references: list[Any]) -> float:
        module = self._loaded()
        try:
            found = module.compute(predictions=predictions, references=self._fitting(module, references))
        except Exception as error:  # noqa: BLE001 - a user's code may raise anything, and one item is at fault
            what = f"raised {type(error).__name__}: {' '.join(str(error).split())[:200]}"
            raise DataError(f"metric {self.name}", what, f"see {self.path.name}") from None
        numbers = {key: value for key, value in found.items() if isinstance(value, (int, float))
                   or getattr(value, "ndim", None) == 0}
        key = self.name if self.name in numbers else next(iter(numbers)) if len(numbers) == 1 else None
        if key is None:
            raise RecipeError(str(self.path), f"returns {', '.join(found) or 'nothing'}, and none of it is "
                              "the one number of the metric", f"return it as '{self.name}'")
        return float(numbers[key])

    def _fitting(self, module: Any, references: list[Any]) -> list[Any]:
        """References as the module's features want them: a text each, or a list each."""
        import datasets

        features = module.features if isinstance(module.features, list) else [module.features]
        takes_lists = any(not isinstance(each["references"], datasets.Value) for each in features)
        takes_texts = any(isinstance(each["references"], datasets.Value) for each in features)
        if all(not isinstance(each, list) for each in references) and takes_texts:
            return references
        if takes_lists:
            return [each if isinstance(each, list) else [each] for each in references]
        if all(not isinstance(each, list) or len(each) == 1 for each in references):
            return [each[0] if isinstance(each, list) else each for each in references]
        raise DataError(f"metric {self.name}", "takes one reference an item, and there are several", "mend the row")

    def _loaded(self):
        if self._module is None:
            import evaluate

            try:
                self._module = evaluate.load(str(self.path), keep_in_memory=True)
            except Exception as error:  # noqa: BLE001 - a user's code may raise anything
                raise RecipeError(str(self.path), f"evaluate cannot load it ({' '.join(str(error).split())[:300]})",
                                  "mend it") from None
        return self._module
