"""Training sequences of SFT and SimPO: rows -> token ids and a mask -> packed, shuffled batches.

    read = lambda row: examples.read_example(row, tok, system)
    batches = examples.Packed([list(map(read, rows))], 1024, n_rows=8, seed=0)
    batches.batch(0)                        # {"tokens": [8, 1024], "mask": ..., ...}
"""

import bisect
import functools
import math
from itertools import takewhile
from typing import NamedTuple

import numpy as np

import data


class Example(NamedTuple):
    """One training sequence: token ids, and a mask that is 1 on what is trained on."""

    ids: np.ndarray
    mask: np.ndarray
    fields: dict = {}  # the row that it was read from

    prompt = property(lambda self: self.ids[: np.argmax(self.mask)].tobytes())  # for hold-out
    n_tokens = property(lambda self: len(self.ids))


class Pair(NamedTuple):
    """Two completions of one prompt; the two sequences share a packed row, chosen first."""

    chosen: Example
    rejected: Example
    fields: dict = {}  # the row that it was read from, with the chosen completion as its own

    prompt = property(lambda self: self.chosen.prompt)
    n_tokens = property(lambda self: self.chosen.n_tokens + self.rejected.n_tokens)


def read_example(row: dict, tok: data.Tokenizer, system: str = "") -> Example:
    """A row as one training sequence; every turn of the assistant is trained on."""
    ids, mask = tok.example(_conversation(row, system))
    return Example(np.array(ids, np.int32), np.array(mask, np.int8), row)


def read_pair(row: dict, tok: data.Tokenizer, system: str = "") -> Pair:
    """A row of {"prompt", "chosen", "rejected"}, each a text or a list of messages.

    Lists that start with the user bring the prompt themselves. The mask is 1 on what the two don't
    share: prompt [p p p], chosen [c c], rejected [r] -> masks [0 0 0 1 1], [0 0 0 1].
    """
    rows = []
    for key in ("chosen", "rejected"):
        turns = data.turns(row.get(key) or None, "assistant", key)
        own = "completion" if turns[0]["role"] == "assistant" else "messages"
        rows.append(row | {own: turns})
    chats = [_conversation(fields, system) for fields in rows]
    shared = len([*takewhile(lambda turns: turns[0] == turns[1], zip(*chats, strict=False))])
    examples = [tok.example(chat) for chat in chats]
    if examples[0] == examples[1] or shared % 2 == 0 or shared == min(map(len, chats)):
        raise ValueError("chosen and rejected must be different answers to the same prompt")
    n_prompt = len(tok.chat(chats[0][:shared]))
    mask = lambda trained: np.array([0] * n_prompt + trained[n_prompt:], np.int8)
    return Pair(*(Example(np.array(ids, np.int32), mask(trained)) for ids, trained in examples),
                rows[0])


def _conversation(row: dict, system: str) -> list[dict]:
    chat, completion, *_ = data.parse_row(row)
    if completion is None:
        raise ValueError("expected a completion to train on (messages that end with the assistant, "
                         f"completion, or reasoning and answer), found keys {sorted(row)}")
    return [*data.with_system(chat, system), {"role": "assistant", "content": completion}]


def mix_weights(mix: str | None, sources: list[list]) -> list[float] | None:
    """--mix 0.7,0.3 as numbers, one for each source; None without --mix."""
    try:
        weights = [float(weight) for weight in mix.split(",")] if mix else None
    except ValueError:
        weights = []
    if weights is not None and not (len(weights) == len(sources) and 0 < sum(weights) < math.inf
                                    and min(weights) >= 0):
        raise ValueError(f"--mix {mix}: expected {len(sources)} weights, one for each of --data")
    return weights


def fill(items: list[Example | Pair], size: int) -> list[list[Example]]:
    """Packed rows of training sequences."""
    rows = data.pack([0] * len(items), [[item.n_tokens] for item in items], size)
    sequences = lambda item: item[:2] if isinstance(item, Pair) else (item,)
    return [[example for i, _ in row for example in sequences(items[i])] for row in rows]


def assemble(rows: list[list[Example]], n_rows: int, size: int) -> dict[str, np.ndarray]:
    """Packed rows as arrays [n_rows, size]: tokens, mask, segments (0 = padding), positions.

    [[p c], [p p c]] in 6 -> mask 010010, segments 112220, positions 010120.
    """
    keys = ("tokens", "mask", "segments", "positions")
    out = {k: np.zeros((n_rows, size), np.int32) for k in keys}
    for r, row in enumerate(rows):
        start = 0
        for s, (ids, mask, *_) in enumerate(row, 1):
            span = slice(start, start + len(ids))
            for key, value in zip(keys, (ids, mask, s, np.arange(len(ids))), strict=True):
                out[key][r, span] = value
            start += len(ids)
    return out


class Packed:
    """Endless shuffled batches; batch n is a function of (seed, n): resuming needs only the step.

    Each epoch takes from every source its share of the weights (default: all of it once), in an
    order of its own, packs best-fit and shuffles the packed rows. A source is read to its end
    before any row of it comes again.
    """

    def __init__(self, sources: list[list], size: int, n_rows: int, seed: int,
                 weights: list[float] | None = None):
        self.sources, self.size, self.n_rows, self.seed = sources, size, n_rows, seed
        total = sum(map(len, sources))
        share = weights or [len(s) for s in sources]
        self.take = [max(1, round(total * w / sum(share))) if w else 0 for w in share]
        self.epochs = []  # packed rows up to the end of each epoch
        self._epoch = functools.lru_cache(maxsize=1)(self._epoch)

    def _epoch(self, epoch: int) -> list[list[Example]]:
        chosen = []
        for i, (source, take) in enumerate(zip(self.sources, self.take, strict=True)):
            for k in range(epoch * take, (epoch + 1) * take):
                lap, at = divmod(k, len(source))
                if at == 0 or k == epoch * take:
                    order = np.random.default_rng((self.seed, i, lap)).permutation(len(source))
                chosen.append(source[order[at]])
        rows = fill(chosen, self.size)
        order = np.random.default_rng((self.seed, 10**6, epoch)).permutation(len(rows))
        return [rows[r] for r in order]

    def batch(self, n: int) -> dict[str, np.ndarray]:
        """Batch n = 0, 1, ...: arrays [n_rows, size]; a batch may span two epochs."""
        first, rows = n * self.n_rows, []
        while len(rows) < self.n_rows:
            at = first + len(rows)
            epoch = bisect.bisect_right(self.epochs, at)
            packed = self._epoch(epoch)
            start = self.epochs[epoch - 1] if epoch else 0
            if epoch == len(self.epochs):
                self.epochs.append(start + len(packed))
            rows += packed[at - start :][: self.n_rows - len(rows)]
        return assemble(rows, self.n_rows, self.size)


def eval_batches(examples: list, size: int, n_rows: int) -> list[dict[str, np.ndarray]]:
    """Every example once, packed; the last batch is filled up with empty rows."""
    rows = fill(examples, size)
    return [assemble(rows[i : i + n_rows], n_rows, size) for i in range(0, len(rows), n_rows)]
