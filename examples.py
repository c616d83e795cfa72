"""Examples and pairs of data.py as packed, shuffled batches, for SFT and SimPO.

    batches = examples.Packed([rows], 1024, n_rows=8, seed=0)    # rows read by data.read_example
    batches.batch(0)                                             # {"tokens": [8, 1024], ...}
"""

import bisect
import functools
import math

import numpy as np

import data


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


def fill(items: list[data.Example | data.Pair], size: int) -> list[list[data.Example]]:
    """Packed rows of training sequences."""
    rows = data.pack([0] * len(items), [[item.n_tokens] for item in items], size)
    sequences = lambda item: item[:2] if isinstance(item, data.Pair) else (item,)
    return [[example for i, _ in row for example in sequences(items[i])] for row in rows]


def assemble(rows: list[list[data.Example]], n_rows: int, size: int) -> dict[str, np.ndarray]:
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

    def _epoch(self, epoch: int) -> list[list[data.Example]]:
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
