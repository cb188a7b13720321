"""What every metric's test asks of it."""

from __future__ import annotations

import pytest


def check_build(metric, name: str, predictions: list[str], references: list, **inputs: list) -> None:
    """``build()`` is an evaluate.Metric that gives the scores of ``score`` and their mean, or the corpus's value."""
    import json

    import evaluate

    built = metric.build()
    assert isinstance(built, evaluate.Metric)
    texts = {key: [value if isinstance(value, str) else json.dumps(value) for value in values]
             for key, values in {"references": references, **inputs}.items()}
    found = built.compute(predictions=predictions, **texts)
    expected = [metric.score(prediction, reference, **{key: values[index] for key, values in inputs.items()})
                for index, (prediction, reference) in enumerate(zip(predictions, references, strict=True))]
    assert found["item_scores"] == [value for value, _ in expected]
    assert found["reasons"] == [reason for _, reason in expected]
    if hasattr(metric, "corpus"):
        assert found["outcomes"] == [metric.outcome(*pair) for pair in zip(predictions, references, strict=True)]
        assert found[name] == pytest.approx(metric.corpus(found["outcomes"]))
        json.dumps(found["outcomes"])
    else:
        assert found[name] == pytest.approx(sum(value for value, _ in expected) / len(expected))
