"""How likely a model finds continuations of a context, reading as few tokens as can be.

The answers of a multiple-choice item begin alike: with the question, and often with the same first words. So an item is
read as a *tree*: each token once, seen only by those that come after it in some answer. Many trees make a row, with no
padding; what all contexts begin with (a description, fixed few-shot examples) is read once, and kept for the next call.
The head is asked only for the rows that something is to be predicted from.

A tree works where keys and values of all tokens read are kept and a token may be told its position and what it sees.
:func:`plain` is the other way, a row for each continuation, which any causal model takes. :class:`Reader` takes the
first where it can, and believes it only after some of the questions were read in the plain way too; from the
difference it also knows how much rounding there is. Logits become log-probabilities in fp32, whatever the model
computes in.

Shape suffixes: N questions of a batch, T tokens of the largest tree, M tokens of the row, P tokens that all begin with,
K rows of the head, V vocabulary, D width. Torch is imported when something is scored. Reads and writes nothing.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from lora_kit.types import Likelihood, Question

BATCH_TOKENS = 1024
"""Most tokens of a batch, with those that fill it up where texts are read plainly. One question alone may have more."""
MASKED_TOKENS = 512
"""The same where a mask says which tokens of the whole row see which."""
LOGITS = 64_000_000
"""Most logits of a batch, 256 MB in fp32: a large vocabulary makes batches smaller."""
_ROWS = 32
"""Rows of logits that become log-probabilities at a time, so that what is worked out stays near the processor."""
_PART_ROWS, _PART_TOKENS = 256, 4096
"""Rows and tokens of the vocabulary that the head is asked for at a time, for the same reason."""
CHECK_TOKENS = 128
"""Tokens that are read again in another way, once for each model; two texts may have up to eight times as many, and one
more than that."""
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
        self._group, self._cache_key, self._beginning = group, cache_key, Beginning()
        self._packs_texts, self._texts_agree = True, False

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
        while self.noise is None and not self._agree(questions, found):
            found = self._read(questions, greedy, apart)
        return found

    def _agree(self, questions: Sequence[Question], found: list[list[Likelihood]]) -> bool:
        """Read some texts again, plainly, which has to give the same up to the rounding that this shows.

        Of each question its last continuation: in a tree, it would see all others. (In the smaller batch, matrices
        are multiplied in another order.) Where they differ by more, a slower way is taken, and the answer is False.
        """
        sample = _sample(questions)
        texts = [Question(context=questions[number].context, continuations=questions[number].continuations[-1:])
                 for number in sample]
        again = plain(self.head, texts, greedy=False, batch_tokens=1 if self.why_plain else CHECK_TOKENS)
        pairs = [(found[number][-1].log_prob, other.log_prob) for number, [other] in zip(sample, again, strict=True)]
        if self.why_plain or all(self._is_rounding(one, other) for one, other in pairs):
            self.noise = max(abs(one - other) for one, other in pairs)
            return True
        if self.head.packs:
            self.head.packs = False
        else:
            self.why_plain = "answers that are read together influence each other in this model"
        return False

    def _read(self, questions: Sequence[Question], greedy: bool, apart: bool) -> list[list[Likelihood]]:
        batch_tokens = 1 if apart else BATCH_TOKENS
        if self.why_plain:
            return plain(self.head, questions, greedy=greedy, batch_tokens=batch_tokens)
        groups = self._group([list(question.context) for question in questions])
        return trees(self.head, questions, groups, greedy=greedy, batch_tokens=batch_tokens,
                     cache_key=self._cache_key, beginning=self._beginning)

    def sums(self, texts: Sequence[tuple[Sequence[int], Sequence[int]]],
             alone: Callable[[Sequence[int], Sequence[int]], float]) -> list[float]:
        """The summed log-probability of each text's tokens at its positions; many short texts make a row.

        Args:
            texts: tokens, and positions of some of them, not the first, in rising order.
            alone: reads one text by itself: the rest is held to it on some texts, and it reads all where need be.
        """
        import torch

        may = self._packs_texts and self.head.packs and not self.why_plain
        short = [number for number, (tokens, positions) in enumerate(texts)
                 if may and len(positions) and len(tokens) <= BATCH_TOKENS // 2]
        found: dict[int, float] = {}
        if len(short) > 1:
            chains = {number: _chain(*texts[number]) for number in short}
            with torch.inference_mode():
                scored = _score_rows(self.head, chains, [], 0, False, BATCH_TOKENS, self._cache_key)
            found = {number: one.log_prob for number, [one] in scored.items()}
        for number in sorted(found, key=lambda number: len(texts[number][0]))[:0 if self._texts_agree else 2]:
            if not self._is_rounding(found[number], alone(*texts[number])):
                self._packs_texts, found = False, {}
                break
        self._texts_agree = self._texts_agree or bool(found)
        return [found[number] if number in found else alone(*texts[number]) for number in range(len(texts))]

    def close(self) -> None:
        """Let go of the model and of what was kept of it."""
        self.head.model, self._beginning = None, Beginning()

    def _is_rounding(self, one: float, other: float) -> bool:
        """Whether two log-probabilities of one text differ by no more than their computation rounds."""
        coarse = self.head.model.dtype.itemsize < 4
        return abs(one - other) <= (0.3 if coarse else 1e-3) + (0.02 if coarse else 1e-5) * abs(one)


def _sample(questions: Sequence[Question]) -> list[int]:
    """Numbers of some questions, spread over all sizes: their last texts have about CHECK_TOKENS tokens together."""
    sizes = [len(question.context) + len(question.continuations[-1]) for question in questions]
    order = sorted(range(len(questions)), key=sizes.__getitem__)
    mean = sum(sizes) / len(order)
    count = min(len(order), max(int(CHECK_TOKENS / mean), 2 if 2 * mean <= 8 * CHECK_TOKENS else 1))
    return [order[(2 * place + 1) * len(order) // (2 * count)] for place in range(count)]


@dataclass
class Tree:
    """The tokens of one question, without its ``P`` first ones.

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
        if self.parents == list(range(-1, size - 1)):
            return np.tri(size, dtype=bool)
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


def _chain(tokens: Sequence[int], positions: Sequence[int]) -> Tree:
    """A text as a tree without branches, of which the tokens at ``positions`` are one continuation."""
    last = int(positions[-1])
    # The last token is predicted and not read.
    return Tree(tokens=[int(token) for token in tokens[:last]], parents=list(range(-1, last - 1)),
                depths=list(range(last)), rows=[int(place) - 1 for place in positions],
                scores=[(0, row, int(tokens[place])) for row, place in enumerate(positions)])


def trees(head: Head, questions: Sequence[Question], groups: Sequence[tuple[Sequence[int], int]], *, greedy: bool,
          batch_tokens: int = BATCH_TOKENS, cache_key: str = "past_key_values",
          beginning: Beginning | None = None) -> list[list[Likelihood]]:
    """The likelihoods of all continuations, each question read as a tree, the trees of a batch in one row.

    Args:
        head: that of a transformers causal LM in eval mode whose cache grows plainly.
        groups: numbers of the questions, each once, with how many tokens their contexts begin with in common, fewer
            than any of them has.
        greedy: also say whether each token of a continuation is the most likely one.
        cache_key: what ``model.forward`` calls its cache.
        beginning: what was read before of it need not be read again.
    """
    import torch

    model, found = head.model, {}
    beginning = beginning or Beginning()
    with torch.inference_mode():
        for group, num_shared in groups:
            made = {number: tree_of(questions[number], num_shared) for number in group}
            before = beginning.read(model, questions[group[0]].context[:num_shared], cache_key)
            found.update(_score_rows(head, made, before, num_shared, greedy, batch_tokens, cache_key))
    return [found[number] for number in range(len(questions))]


def _score_rows(head: Head, made: dict[int, Tree], before: list[tuple[Any, Any]], num_shared: int, greedy: bool,
                batch_tokens: int, cache_key: str) -> dict[int, list[Likelihood]]:
    """The likelihoods of each tree's continuations; ``before`` is what the first ``num_shared`` tokens left."""
    from lora_kit import tree_attention

    sizes = {number: (len(tree.tokens), len(tree.rows)) for number, tree in made.items()}
    most_rows = max(1, LOGITS // _vocabulary(head.model))

    def read(most_tokens: int) -> dict[int, list[Likelihood]]:
        return {number: one for batch in _rows(sizes, most_tokens, most_rows)
                for number, one in zip(batch, _score_trees(head, [made[number] for number in batch], before, num_shared,
                                                           greedy, cache_key), strict=True)}

    if head.packs:
        with tree_attention.served(head.model) as head.packs:
            try:
                if head.packs:
                    return read(batch_tokens)
            except tree_attention.Unserved:
                head.packs = False
    return read(min(batch_tokens, MASKED_TOKENS))


class Beginning:
    """Keys and values of the tokens that texts begin with, kept for the next texts that begin with them."""

    def __init__(self) -> None:
        self.tokens: tuple[int, ...] = ()
        self.held: list[tuple[Any, Any]] = []

    def read(self, model: Any, tokens: Sequence[int], cache_key: str) -> list[tuple[Any, Any]]:
        """Keys and values (1, heads, P, width) of each layer after ``tokens``; empty for no tokens."""
        import torch

        if not tokens:
            return []
        tokens = tuple(tokens)
        known = next((place for place, (one, other) in enumerate(zip(self.tokens, tokens, strict=False))
                      if one != other), min(len(self.tokens), len(tokens)))
        self.held = [(keys[:, :, :known], values[:, :, :known]) for keys, values in self.held]
        if known < len(tokens):
            cache = _cache_of(model, self.held if known else [])
            model(input_ids=torch.tensor([tokens[known:]], device=model.device), use_cache=True, logits_to_keep=1,
                  **{cache_key: cache})
            self.held = [(layer.keys, layer.values) for layer in cache.layers]
        self.tokens = tokens
        return self.held


def _cache_of(model: Any, held: Sequence[tuple[Any, Any]]):
    """A cache that holds ``held``, whose tensors stay as they are."""
    from transformers import DynamicCache

    cache = DynamicCache(config=model.config)
    for index, (keys, values) in enumerate(held):
        cache.update(keys, values, index)
    return cache


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


def _score_trees(head: Head, batch: list[Tree], before: list[tuple[Any, Any]], num_shared: int, greedy: bool,
                 cache_key: str) -> list[list[Likelihood]]:
    """The likelihoods of ``batch``, in one forward pass; the rest as in :func:`_score_rows`."""
    import torch

    from lora_kit import tree_attention

    sizes = [len(tree.tokens) for tree in batch]
    starts = np.cumsum([0, *sizes])
    rows, scores, nums = [], [], []
    for tree, start in zip(batch, starts.tolist(), strict=False):
        first, number = len(rows), sum(nums)
        rows += [(0, start + place) for place in tree.rows]
        scores += [(number + which, first + row, token) for which, row, token in tree.scores]
        nums.append(1 + max(which for which, _, _ in tree.scores))
    model = head.model
    device = model.device

    def tensor(array):
        return torch.from_numpy(np.ascontiguousarray(array)).to(device)

    tokens_M, depths_M = (np.concatenate([np.asarray(each, np.int64) for each in column])
                          for column in zip(*((tree.tokens, tree.depths) for tree in batch), strict=True))
    inputs = {"input_ids": tensor(tokens_M[None]), "position_ids": tensor(depths_M[None] + num_shared)}
    if not head.packs:
        sees_MM = np.zeros((starts[-1], starts[-1]), bool)
        for tree, start, end in zip(batch, starts, starts[1:], strict=False):
            sees_MM[start:end, start:end] = tree.sees_TT()
        sees_MM = np.concatenate([np.ones((starts[-1], num_shared), bool), sees_MM], axis=1)
        inputs |= {"attention_mask": _added(tensor(sees_MM)[None, None], model.dtype)}
        inputs |= {"use_cache": True, cache_key: _cache_of(model, before)} if before else {"use_cache": False}
        found = head.score(rows, scores, sum(nums), greedy, inputs)
    else:
        longest = max(sizes)
        # What fills up a tree sees itself, since a row of a softmax that sees nothing is no number.
        sees_NTT = np.broadcast_to(np.eye(longest, dtype=bool), (len(batch), longest, longest)).copy()
        places_NT = np.zeros((len(batch), longest), np.int64)
        for number, (tree, size) in enumerate(zip(batch, sizes, strict=True)):
            sees_NTT[number, :size, :size] = tree.sees_TT()
            places_NT[number, :size] = np.arange(starts[number], starts[number] + size)
        back_M = np.flatnonzero(np.arange(longest) < np.asarray(sizes)[:, None])
        forest = tree_attention.Forest(tensor(places_NT.reshape(-1)), tensor(back_M),
                                       _added(tensor(sees_NTT)[:, None], model.dtype), before)
        with tree_attention.attending(forest):
            found = head.score(rows, scores, sum(nums), greedy, {**inputs, "use_cache": False})
    flat = iter(found)
    return [[next(flat) for _ in range(num)] for num in nums]


def _added(sees, dtype):
    """What is added to the scores of attention, which is what every implementation takes; a bool is added by some."""
    import torch

    return torch.zeros(sees.shape, dtype=dtype, device=sees.device).masked_fill_(~sees, torch.finfo(dtype).min)


class Head:
    """The output layer, asked for no more than is needed.

    ``logits_to_keep`` takes the same tokens of all rows, and what a model does with its logits after the output layer
    (scaling, capping) must be done. So the layer's input is narrowed to the rows, and the model not taken apart. Where
    the logits are the layer's output and nothing else, which the first batch shows, they are worked out here, part by
    part of the vocabulary: logits of all of it are large, and memory is slower than arithmetic.

    Attributes:
        packs: whether the model's attention takes the trees of a row apart (``tree_attention.py``), as far as is
            known; else a mask of the whole row tells it.
    """

    def __init__(self, model: Any) -> None:
        self.model, self.packs, self._is_all = model, True, None

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


def _rows(sizes: dict[int, tuple[int, int]], most_tokens: int, most_rows: int) -> Iterator[list[int]]:
    """The keys of ``sizes`` ((tokens, rows of the head) of each) in batches of about as many tokens each.

    Those of a similar size stand together; ``most_tokens`` of a batch are exceeded by one key alone.
    """
    total = sum(num_tokens for num_tokens, _ in sizes.values())
    wanted = min(most_tokens, total / max(1, -(-total // most_tokens)) + max(num_tokens for num_tokens, _ in
                                                                           sizes.values()))
    batch: list[int] = []
    tokens_so_far = rows_so_far = 0
    for key in sorted(sizes, key=lambda key: (sizes[key], key)):
        num_tokens, rows = sizes[key]
        # In order of size, so the newest is the longest; attention fills all up to it.
        if batch and (tokens_so_far + num_tokens > wanted or rows_so_far + rows > most_rows
                      or (len(batch) + 1) * num_tokens > 2 * most_tokens):
            yield batch
            batch, tokens_so_far, rows_so_far = [], 0, 0
        batch.append(key)
        tokens_so_far, rows_so_far = tokens_so_far + num_tokens, rows_so_far + rows
    if batch:
        yield batch


def _vocabulary(model: Any) -> int:
    return int(model.get_output_embeddings().weight.shape[0])
