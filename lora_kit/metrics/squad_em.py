"""SQuAD's exact match: 1 when the words of the answer are those of a reference, in their order.

Both are lower-cased, and ASCII punctuation, the words a, an and the, and surplus blanks are taken out; of several
references the best counts. With ``token_f1`` these are SQuAD's two numbers. Source: the evaluation of Rajpurkar et al.,
"SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016, section 6.1. Reads and writes nothing.
"""

from __future__ import annotations

import re
import string

from lora_kit import metrics

HIGHER_IS_BETTER = True

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def score(prediction: str, target: str) -> tuple[float, str]:
    """1.0 or 0.0 for one item."""
    given, wanted = _normal(prediction), _normal(target)
    return (1.0, "") if given == wanted else (0.0, f"{given[:80]!r} is not {wanted[:80]!r}")


def _normal(text: str) -> str:
    return " ".join(_ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split())


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("squad_em")
