"""Token F1: overlap of words, as SQuAD scores answers.

Both texts are lower-cased, ASCII punctuation and the words a, an and the are taken out,
and words are compared as multisets: F1 of the shared ones. Source: the evaluation of
Rajpurkar et al., "SQuAD: 100,000+ Questions for Machine Comprehension of Text", 2016,
section 6.1; where either text has no words left, they match only if neither has any,
as in the script of SQuAD 2.0. Reads and writes nothing.
"""

from __future__ import annotations

import re
import string
from collections import Counter

from lora_kit import metrics

HIGHER_IS_BETTER = True

_ARTICLES = re.compile(r"\b(?:a|an|the)\b")
_NO_PUNCTUATION = str.maketrans("", "", string.punctuation)


def words_of(text: str) -> list[str]:
    """The words of ``text`` that count: lower case, without punctuation and articles."""
    return _ARTICLES.sub(" ", text.lower().translate(_NO_PUNCTUATION)).split()


def score(prediction: str, target: str) -> tuple[float, str]:
    """F1 of the words of one prediction and its target, 0 to 1."""
    predicted, wanted = words_of(prediction), words_of(target)
    if not predicted or not wanted:
        return (1.0, "") if predicted == wanted else (0.0, "one of the two has no words")
    shared = (Counter(predicted) & Counter(wanted)).total()
    reason = f"{shared} shared words of {len(predicted)} predicted and {len(wanted)} wanted"
    if shared == 0:
        return 0.0, reason
    precision, recall = shared / len(predicted), shared / len(wanted)
    return 2 * precision * recall / (precision + recall), reason


def build():
    """The metric as an ``evaluate.Metric``."""
    return metrics.as_evaluate("token_f1")
