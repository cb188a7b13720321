"""How likely a model finds continuations of a context, reading as few tokens as can be.

The answers of a multiple-choice item begin alike: with the question, and often with the same first words. So an item is
read as a *tree*: each token once, seen only by those that come after it in some answer. Items of a similar size make a
batch; what all contexts begin with (a description, fixed few-shot examples) is read once into a cache that every batch
goes on from. The head is asked only for the rows that something is to be predicted from.

A tree works where keys and values of all tokens read are kept and a token may be told its position and what it sees.
:func:`plain` is the other way, a row for each continuation, which any causal model takes. :class:`Reader` takes the
first where it can, and believes it only after some of the questions were read in the plain way too; from the
difference it also knows how much rounding there is. Logits become log-probabilities in fp32, whatever the model
computes in.

Shape suffixes: N questions of a batch, T tokens of the largest tree, P tokens that all begin with, K rows of the head,
V vocabulary, D width. Torch is imported when something is scored. Reads and writes nothing.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_kit.types import Likelihood, Question

BATCH_TOKENS = 512
"""Most tokens of a batch: its rows times the longest. One question alone may have more."""
LOGITS = 64_000_000
"""Most logits of a batch, 256 MB in fp32: a large vocabulary makes batches smaller."""
_ROWS = 32
"""Rows of logits that become log-probabilities at a time, so that what is worked out stays near the processor."""
_PART_ROWS, _PART_TOKENS = 256, 4096
"""Rows and tokens of the vocabulary that the head is asked for at a time, for the same reason."""
CHECK_TOKENS = 256
"""Tokens that are read again in another way, once for each model; one question alone may have more."""
CHECK_QUESTIONS = 4
"""Most questions that are read again one by one."""
_Score = tuple[int, int, int]
"""(continuation, row of the head, token): one log-probability that is summed."""


class Reader:
    """Reads questions with one model, in the quickest way that is right.

    Args:
        model: a transformers causal LM in eval mode.
        why_plain: why its cache may not be shared by several texts; empty where it may.
        group: makes groups of contexts that begin alike, as :func:`trees` takes them.
        cache_key: what ``model.forward`` calls its cache.

    Attributes:
        noise: nats by which another batch shape moved a log-probability at most; None before anything was read.
        why_plain: as above, or that trees were found to be wrong.
    """

    def __init__(self, model: Any, why_plain: str, group: Callable[[list[list[int]]], list[tuple[list[int], int]]],
                 cache_key: str) -> None:
        self.head, self.why_plain, self.noise = Head(model), why_plain, None
        self._group, self._cache_key = group, cache_key

    def read(self, questions: Sequence[Question], *, greedy: bool = False,
             apart: bool = False) -> list[list[Likelihood]]:
        """The likelihoods of all continuations of all questions.

        Args:
            greedy: also say whether each token of a continuation is the most likely one.
            apart: no two questions in one batch.
        """
        if not questions:
            return []
        found = self._read(questions, greedy, apart)
        if self.noise is None:
            self._check(questions, found)
            if self.noise is None:  # trees were wrong
                return self.read(questions, greedy=greedy, apart=apart)
        return found

    def _check(self, questions: Sequence[Question], found: list[list[Likelihood]]) -> None:
        """Read some questions again: plainly, which has to give the same, and one by one, which shows the rounding.

        (A few rows are multiplied in another order than many are; many, in the same as other many.)
        """
        sample = _sample(questions)
        if not self.why_plain:
            again = plain(self.head, [questions[number] for number in sample], greedy=False, batch_tokens=CHECK_TOKENS)
            pairs = _pairs(sample, found, again)
            if not all(self._is_rounding(one, other) for one, other in pairs):
                self.why_plain = "answers that are read together influence each other in this model"
                return
        some = sample[:CHECK_QUESTIONS]
        apart = self._read([questions[number] for number in some], False, True)
        self.noise = max(abs(one - other) for one, other in _pairs(some, found, apart))

    def _read(self, questions: Sequence[Question], greedy: bool, apart: bool) -> list[list[Likelihood]]:
        batch_tokens = 1 if apart else BATCH_TOKENS
        if self.why_plain:
            return plain(self.head, questions, greedy=greedy, batch_tokens=batch_tokens)
        groups = self._group([list(question.context) for question in questions])
        return trees(self.head, questions, groups, greedy=greedy, batch_tokens=batch_tokens,
                     cache_key=self._cache_key)

    def _is_rounding(self, one: float, other: float) -> bool:
        """Whether two log-probabilities of one text differ by no more than their computation rounds."""
        coarse = self.head.model.dtype.itemsize < 4
        return abs(one - other) <= (0.3 if coarse else 1e-3) + (0.02 if coarse else 1e-5) * abs(one)


def _pairs(numbers: Sequence[int], found: list[list[Likelihood]], again: list[list[Likelihood]]):
    return [(one.log_prob, other.log_prob) for number, others in zip(numbers, again, strict=True)
            for one, other in zip(found[number], others, strict=True)]


def _sample(questions: Sequence[Question]) -> list[int]:
    """Numbers of some questions of about CHECK_TOKENS texts' tokens together, spread over all sizes; one at least."""
    sizes = [sum(len(question.context) + len(each) for each in question.continuations) for question in questions]
    order = sorted(range(len(questions)), key=sizes.__getitem__)
    count = max(1, min(len(order), int(CHECK_TOKENS * len(order) / sum(sizes))))
    return [order[(2 * place + 1) * len(order) // (2 * count)] for place in range(count)]


@dataclass
class Tree:
    """The tokens of one question, without those that its ``P`` first ones are.

    ``tokens`` in an order in which each comes after the one before it in its text, ``parents`` (-1: the shared
    beginning), ``depths`` (position minus P), ``rows``: which of them something is predicted from, and ``scores``.
    """

    tokens: list[int] = field(default_factory=list)
    parents: list[int] = field(default_factory=list)
    depths: list[int] = field(default_factory=list)
    rows: list[int] = field(default_factory=list)
    scores: list[_Score] = field(default_factory=list)

    def sees_TT(self) -> np.ndarray:
        """(T, T) bool: whether the token of a row sees that of a column."""
        size = len(self.tokens)
        sees = np.zeros((size, size), bool)
        for place, parent in enumerate(self.parents):
            if parent >= 0:
                sees[place] = sees[parent]
            sees[place, place] = True
        return sees


def tree_of(question: Question, num_shared: int = 0) -> Tree:
    """``question`` as a tree; its first ``num_shared`` tokens, fewer than its context has, are left out."""
    tree, children = Tree(), {}

    def add(parent: int, token: int) -> int:
        place = children.get((parent, token))
        if place is None:
            place = children[parent, token] = len(tree.tokens)
            tree.tokens.append(token)
            tree.parents.append(parent)
            tree.depths.append(tree.depths[parent] + 1 if parent >= 0 else 0)
        return place

    end = -1
    for token in question.context[num_shared:]:
        end = add(end, token)
    row_of: dict[int, int] = {}
    for number, continuation in enumerate(question.continuations):
        place = end
        for index, token in enumerate(continuation):
            tree.scores.append((number, row_of.setdefault(place, len(row_of)), token))
            # The last token is predicted and not read.
            if index + 1 < len(continuation):
                place = add(place, token)
    tree.rows = list(row_of)
    return tree


def trees(head: Head, questions: Sequence[Question], groups: Sequence[tuple[Sequence[int], int]], *, greedy: bool,
          batch_tokens: int = BATCH_TOKENS, cache_key: str = "past_key_values") -> list[list[Likelihood]]:
    """The likelihoods of all continuations, each question read as a tree.

    Args:
        head: that of a transformers causal LM in eval mode whose cache grows plainly.
        groups: numbers of the questions, each once, with how many tokens their contexts begin with in common, fewer
            than any of them has.
        greedy: also say whether each token of a continuation is the most likely one.
        cache_key: what ``model.forward`` calls its cache.
    """
    import torch

    model, found = head.model, {}
    most_rows = max(1, LOGITS // _vocabulary(model))
    with torch.inference_mode():
        for group, num_shared in groups:
            made = {number: tree_of(questions[number], num_shared) for number in group}
            batches = list(_batches({number: (len(tree.tokens), len(tree.rows)) for number, tree in made.items()},
                                    batch_tokens, most_rows))
            cache = None
            if num_shared:
                room = max(len(batch) for batch in batches), max(len(tree.tokens) for tree in made.values())
                cache = _read(model, questions[group[0]].context[:num_shared], *room, cache_key)
            for batch in batches:
                found.update(zip(batch, _score_trees(head, [made[number] for number in batch], cache, num_shared,
                                                     greedy, cache_key), strict=True))
    return [found[number] for number in range(len(questions))]


def plain(head: Head, questions: Sequence[Question], *, greedy: bool,
          batch_tokens: int = BATCH_TOKENS) -> list[list[Likelihood]]:
    """The likelihoods of all continuations, each text read by itself from its first token; the same in any model.

    Texts of a similar length share a batch, filled up behind their ends, where a causal model does not look.
    """
    import torch

    model = head.model
    texts: dict[tuple[int, ...], list[tuple[int, int]]] = {}
    for number, question in enumerate(questions):
        for which, continuation in enumerate(question.continuations):
            texts.setdefault((*question.context, *continuation[:-1]), []).append((number, which))
    order, found = list(texts), {}
    sizes = {}
    for index, text in enumerate(order):
        longest = max(len(questions[number].continuations[which]) for number, which in texts[text])
        sizes[index] = len(text), longest
    with torch.inference_mode():
        for batch in _batches(sizes, batch_tokens, max(1, LOGITS // _vocabulary(model))):
            rows, scores, asked = [], [], []
            longest = max(len(order[index]) for index in batch)
            tokens_NT = torch.zeros(len(batch), longest, dtype=torch.int64)
            for row, index in enumerate(batch):
                text = order[index]
                tokens_NT[row, :len(text)] = torch.tensor(text)
                first = len(rows)
                rows += [(row, place) for place in range(len(text) - sizes[index][1], len(text))]
                for number, which in texts[text]:
                    continuation = questions[number].continuations[which]
                    start = first + sizes[index][1] - len(continuation)
                    scores += [(len(asked), start + place, token) for place, token in enumerate(continuation)]
                    asked.append((number, which))
            inputs = {"input_ids": tokens_NT.to(model.device), "use_cache": False}
            found.update(zip(asked, head.score(rows, scores, len(asked), greedy, inputs), strict=True))
    return [[found[number, which] for which in range(len(question.continuations))]
            for number, question in enumerate(questions)]


def _score_trees(head: Head, batch: list[Tree], cache: Any, num_shared: int, greedy: bool,
                 cache_key: str) -> list[list[Likelihood]]:
    import torch

    longest = max(len(tree.tokens) for tree in batch)
    tokens_NT = np.zeros((len(batch), longest), np.int64)
    positions_NT = np.full((len(batch), longest), num_shared, np.int64)
    # What fills up a row sees itself, since a row of a softmax that sees nothing is no number.
    sees_NTT = np.broadcast_to(np.eye(longest, dtype=bool), (len(batch), longest, longest)).copy()
    rows, scores, sizes = [], [], []
    for number, tree in enumerate(batch):
        size = len(tree.tokens)
        tokens_NT[number, :size] = tree.tokens
        positions_NT[number, :size] += np.asarray(tree.depths)
        sees_NTT[number, :size, :size] = tree.sees_TT()
        first, before = len(rows), sum(sizes)
        rows += [(number, place) for place in tree.rows]
        scores += [(before + which, first + row, token) for which, row, token in tree.scores]
        sizes.append(1 + max(which for which, _, _ in tree.scores))
    if num_shared:
        sees_NTT = np.concatenate([np.ones((len(batch), longest, num_shared), bool), sees_NTT], axis=2)
    model = head.model
    device = model.device
    # Added to the scores of attention, which is what every implementation takes; a bool mask is added by some.
    mask_N1TT = torch.zeros(sees_NTT.shape, dtype=model.dtype, device=device)
    mask_N1TT = mask_N1TT.masked_fill_(torch.from_numpy(~sees_NTT).to(device), torch.finfo(model.dtype).min)[:, None]
    options = {"use_cache": False}
    if cache is not None:
        for layer in cache.layers:
            layer.rewind(len(batch))
        options = {"use_cache": True, cache_key: cache}
    inputs = {"input_ids": torch.from_numpy(tokens_NT).to(device), "attention_mask": mask_N1TT,
              "position_ids": torch.from_numpy(positions_NT).to(device), **options}
    flat = iter(head.score(rows, scores, sum(sizes), greedy, inputs))
    return [[next(flat) for _ in range(size)] for size in sizes]


class Head:
    """The output layer, asked for no more than is needed.

    ``logits_to_keep`` takes the same tokens of all rows, and what a model does with its logits after the output layer
    (scaling, capping) must be done. So the layer's input is narrowed to the rows, and the model not taken apart. Where
    the logits are the layer's output and nothing else, which the first batch shows, they are worked out here, part by
    part of the vocabulary: logits of all of it are large, and memory is slower than arithmetic.
    """

    def __init__(self, model: Any) -> None:
        self.model, self._is_all = model, None

    def score(self, rows: list[tuple[int, int]], scores: list[_Score], num_continuations: int, greedy: bool,
              inputs: dict[str, Any]) -> list[Likelihood]:
        """The likelihood of each continuation.

        Args:
            rows: (row of the batch, token in it) of each row that something is predicted from.
            inputs: of ``model.forward``.
        """
        import torch

        places_K2 = torch.tensor(rows, device=inputs["input_ids"].device)
        columns = [torch.tensor(column, device=places_K2.device) for column in zip(*scores, strict=True)]
        with self._narrowed(places_K2) as seen:
            logits = self.model(**inputs).logits
        if self._is_all and seen:
            return _summed(*self._by_parts(seen[0], *columns[1:], greedy), columns, num_continuations, greedy)
        logits_KV = logits[0] if seen else logits[places_K2[:, 0], places_K2[:, 1]]
        found = _summed(*_whole(logits_KV, *columns[1:], greedy), columns, num_continuations, greedy)
        if self._is_all is None:
            self._is_all = bool(seen) and self._gives(logits_KV, seen[0])
        return found

    @contextmanager
    def _narrowed(self, places_K2) -> Iterator[list]:
        """Let the output layer see the hidden states of ``places_K2`` alone, or none where they are enough.

        The list that is yielded then has them, (K, D); it stays empty where the layer was given something else.
        """
        seen: list[Any] = []

        def narrow(_module, arguments):
            hidden = arguments[0] if arguments else None
            if hidden is None or hidden.dim() != 3:
                return None
            seen.append(hidden[places_K2[:, 0], places_K2[:, 1]])
            return (seen[0][None, :0] if self._is_all else seen[0][None], *arguments[1:])

        handle = self.model.get_output_embeddings().register_forward_pre_hook(narrow)
        try:
            yield seen
        finally:
            handle.remove()

    def _gives(self, logits_KV, hidden_KD) -> bool:
        """Whether ``logits_KV`` are the output layer's weight times ``hidden_KD``, and no more was done to them."""
        import torch

        layer = self.model.get_output_embeddings()
        if type(layer) is not torch.nn.Linear:
            return False
        own = torch.nn.functional.linear(hidden_KD[:4], layer.weight, layer.bias)
        near = 1e-3 if own.dtype.itemsize >= 4 else 2e-2
        return own.shape == logits_KV[:4].shape and torch.allclose(own, logits_KV[:4], rtol=near, atol=near)

    def _by_parts(self, hidden_KD, rows, tokens, greedy: bool):
        """What :func:`_whole` gives, from the hidden states."""
        import torch

        layer = self.model.get_output_embeddings()
        chosen, normalizers, best = torch.empty(len(rows), device=hidden_KD.device), [], []
        for first in range(0, len(hidden_KD), _PART_ROWS):
            part_KD = hidden_KD[first:first + _PART_ROWS]
            here = ((rows >= first) & (rows < first + len(part_KD))).nonzero()[:, 0]
            top_K = torch.full((len(part_KD),), -torch.inf, device=hidden_KD.device)
            total_K, best_K = torch.zeros_like(top_K), torch.zeros(len(part_KD), dtype=torch.int64,
                                                                   device=hidden_KD.device)
            for start in range(0, len(layer.weight), _PART_TOKENS):
                end = start + _PART_TOKENS
                bias = None if layer.bias is None else layer.bias[start:end]
                logits_KV = torch.nn.functional.linear(part_KD, layer.weight[start:end], bias).float()
                those = here[(tokens[here] >= start) & (tokens[here] < end)]
                chosen[those] = logits_KV[rows[those] - first, tokens[those] - start]
                if greedy:
                    largest_K, where_K = logits_KV.max(-1)
                    best_K = torch.where(largest_K > top_K, where_K + start, best_K)
                else:
                    largest_K = logits_KV.amax(-1)
                larger_K = torch.maximum(top_K, largest_K)
                total_K = total_K * (top_K - larger_K).exp() + logits_KV.sub_(larger_K[:, None]).exp_().sum(-1)
                top_K = larger_K
            normalizers.append(top_K + total_K.log())
            best.append(best_K)
        return chosen - torch.cat(normalizers)[rows], torch.cat(best)[rows] == tokens if greedy else None


def _whole(logits_KV, rows, tokens, greedy: bool):
    """Log-probability of each of ``tokens`` in its row, in fp32, and whether it is the most likely one."""
    import torch

    parts_KV = [part.float() for part in logits_KV.split(_ROWS)]
    normalizer_K = torch.cat([part.logsumexp(-1) for part in parts_KV])
    best_K = torch.cat([part.argmax(-1) for part in parts_KV]) if greedy else None
    return logits_KV[rows, tokens].float() - normalizer_K[rows], best_K[rows] == tokens if greedy else None


def _summed(chosen, hit, columns: list, num_continuations: int, greedy: bool) -> list[Likelihood]:
    """The log-probability of each continuation, summed in float64, and whether each of its tokens was hit."""
    import torch

    which = columns[0].cpu()
    sums = torch.zeros(num_continuations, dtype=torch.float64).index_add_(0, which, chosen.cpu().double())
    best: list[bool | None] = [None] * num_continuations
    if greedy:
        missed = torch.zeros(num_continuations, dtype=torch.int64).index_add_(0, which, (~hit).cpu().long())
        best = (missed == 0).tolist()
    return [Likelihood(log_prob=value, greedy=is_best) for value, is_best in zip(sums.tolist(), best, strict=True)]


def _batches(sizes: dict[int, tuple[int, int]], batch_tokens: int, most_rows: int) -> Iterator[list[int]]:
    """The keys of ``sizes`` ((tokens, rows of the head) of each), in batches of a similar number of tokens."""
    batch: list[int] = []
    num_rows = 0
    for key in sorted(sizes, key=lambda key: (sizes[key], key)):
        num_tokens, rows = sizes[key]
        # In order of size, so the newest is the longest.
        if batch and ((len(batch) + 1) * num_tokens > batch_tokens or num_rows + rows > most_rows):
            yield batch
            batch, num_rows = [], 0
        batch.append(key)
        num_rows += rows
    if batch:
        yield batch


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])


def _read(model: Any, tokens: Sequence[int], most_rows: int, most_tokens: int, cache_key: str):
    """A cache of ``tokens``, the same in each of ``most_rows`` rows, with room for ``most_tokens`` after them."""
    import torch
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    cache.layers = [_layer_that_rewinds()(most_rows, len(tokens) + most_tokens) for _ in cache.layers]
    model(input_ids=torch.tensor([list(tokens)], device=model.device), use_cache=True, logits_to_keep=1,
          **{cache_key: cache})
    for layer in cache.layers:
        layer.keep(len(tokens))
    return cache


@functools.cache
def _layer_that_rewinds():
    """The class of a cache layer that goes back to what was read first. (Of transformers' own: made when it is there.)

    A plain one would be copied for every batch, with all that it holds.
    """
    from transformers.cache_utils import DynamicLayer

    class LayerThatRewinds(DynamicLayer):
        """``held`` are keys and values (rows, heads, room, width); the first ``kept`` tokens are in every row."""

        def __init__(self, most_rows: int, room: int) -> None:
            super().__init__()
            self.most_rows, self.room, self.held, self.kept = most_rows, room, (), 0

        def update(self, key_states, value_states, *_args, **_options):
            if not self.is_initialized:
                self.lazy_initialization(key_states, value_states)
                self.held = [each.new_empty(self.most_rows, each.shape[1], self.room, each.shape[3])
                             for each in (key_states, value_states)]
            start, rows = self.get_seq_length(), key_states.shape[0]
            end = start + key_states.shape[2]
            for held, new in zip(self.held, (key_states, value_states), strict=True):
                held[:rows, :, start:end] = new
            self._fill(rows, end)
            return self.keys, self.values

        def keep(self, num_tokens: int) -> None:
            """Copy what the first row has read to all rows, to go on from there again and again."""
            for held in self.held:
                held[1:, :, :num_tokens] = held[:1, :, :num_tokens]
            self.kept = num_tokens

        def rewind(self, num_rows: int) -> None:
            self._fill(num_rows, self.kept)

        def _fill(self, rows: int, end: int) -> None:
            self.keys, self.values = (held[:rows, :, :end] for held in self.held)

    return LayerThatRewinds
