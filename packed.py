"""SFT and SimPO: their flags, rows, packed batches, the line of a step, the held-out evaluation.

    read = packed.row_reader(config, tok, packed.read_example)
    sources, held_out = data.load_split(config, read)
    batches = packed.Batches(sources, 1024, n_rows=8, seed=0)
    batches.batch(0)                                  # {"tokens": [8, 1024], ...}
    evaluation = packed.HeldOut(config, mesh, model, held_out, eval_step)
    began = packed.log_step(run, pending, began)      # a step, while the devices run the next one
    score = evaluation.score(trained, step, run)    # of a checkpoint
"""

import bisect
import dataclasses
import functools
import math
import time
from itertools import takewhile
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import data
import runs
import settings
import stage
import terminal

# ---------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Settings(settings.Training):
    """The flags of both scripts; each adds its own."""

    # data
    mix: str | None = None
    """Sampling weights of the --data sources, as in 0.7,0.3; default: every row once per epoch."""
    max_length: int | None = None
    """Tokens per packed row, and of the longest example."""

    # LoRA
    lora_dropout: float = 0.0
    """Dropout rate of the adapter's inputs, in training only."""

    # optimisation
    batch_rows: int | None = None
    """Packed rows per update, over all devices."""

    # the run
    eval_accuracy: int | None = None
    """Held-out prompts answered greedily at each evaluation; the best checkpoint is then the most
    accurate, not the one with the lowest loss."""
    show: int = 2
    """Held-out completions printed at each evaluation and kept in samples.jsonl."""
    max_new: int | None = None
    """Longest completion, in tokens; a longer one is cut, with stop reason "length"."""


# -------------------------------------------------------------------------------------------- rows


class Example(NamedTuple):
    """One training sequence: token ids, and a mask that is 1 on what is trained on."""

    ids: np.ndarray
    mask: np.ndarray
    fields: dict = {}  # the row that it was read from

    prompt = property(lambda self: self.ids[: np.argmax(self.mask)].tobytes())  # for hold-out
    n_tokens = property(lambda self: len(self.ids))


def read_example(row: dict, tok: data.Tokenizer, system: str = "") -> Example:
    """A row as one training sequence; every turn of the assistant is trained on."""
    ids, mask = tok.example(data.conversation(row, system))
    return Example(np.array(ids, np.int32), np.array(mask, np.int8), row)


class Pair(NamedTuple):
    """Two completions of one prompt; the two sequences share a packed row, chosen first."""

    chosen: Example
    rejected: Example
    fields: dict = {}  # the row that it was read from, with the chosen completion as its own

    prompt = property(lambda self: self.chosen.prompt)
    n_tokens = property(lambda self: self.chosen.n_tokens + self.rejected.n_tokens)


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
    chats = [data.conversation(fields, system) for fields in rows]
    shared = len([*takewhile(lambda turns: turns[0] == turns[1], zip(*chats, strict=False))])
    examples = [tok.example(chat) for chat in chats]
    if examples[0] == examples[1] or shared % 2 == 0 or shared == min(map(len, chats)):
        raise ValueError("chosen and rejected must be different answers to the same prompt")
    n_prompt = len(tok.chat(chats[0][:shared]))
    mask = lambda trained: np.array([0] * n_prompt + trained[n_prompt:], np.int8)
    chosen, rejected = (
        Example(np.array(ids, np.int32), mask(trained)) for ids, trained in examples)
    return Pair(chosen, rejected, rows[0])


def row_reader(config, tok: data.Tokenizer, read):
    """read_example or read_pair with --system, and with --max-length as the limit."""

    def limited(row: dict):
        item = read(row, tok, config.system)
        if item.n_tokens > config.max_length:
            raise data.TooLong(item.n_tokens, config.max_length, "--max-length")
        return item

    return limited


# ----------------------------------------------------------------------------------------- batches


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


class Batches:
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


def batch_shape(config, mesh: Mesh) -> tuple[int, int]:
    """(micro-batches, rows of a micro-batch over all devices) of an update from packed rows."""
    rows = min(config.micro_rows * mesh.size, config.batch_rows)
    if config.batch_rows % rows or rows % mesh.size:
        raise ValueError(f"--batch-rows {config.batch_rows} is not a multiple of --micro-rows "
                         f"{config.micro_rows} times {mesh.size} devices")
    return config.batch_rows // rows, rows


def programs(config, mesh: Mesh, steps: tuple, state: tuple) -> dict:
    """The programs of a stage on packed rows: name -> (jitted function, argument shapes).

    steps: (train_step, eval_step); state: from state_shapes.
    """
    (train_step, eval_step), (trained, opt, fixed) = steps, state
    n_micro, rows = batch_shape(config, mesh)

    def batch(*lead):
        sharding = NamedSharding(mesh, P(*(None for _ in lead), "data"))
        array = jax.ShapeDtypeStruct((*lead, rows, config.max_length), jnp.int32, sharding=sharding)
        return dict.fromkeys(("tokens", "mask", "segments", "positions"), array)

    lr, key = jax.ShapeDtypeStruct((), jnp.float32), jax.eval_shape(lambda: jax.random.key(0))
    return {
        "train_step": (train_step, (trained, opt, fixed, batch(n_micro), lr, key)),
        "eval_step": (eval_step, (trained, fixed, batch())),
    }


# --------------------------------------------------------------------------- steps and evaluations


class Pending(NamedTuple):
    """A step that may still be running on the devices."""

    step: int
    metrics: dict  # on the devices
    batch: dict
    lr: float
    p: float  # progress at its start


def log_step(run: runs.Run, pending: Pending, began: float) -> float:
    """Waits for a step and logs it -> the time, which is when the next step began."""
    metrics = {k: float(v) for k, v in jax.device_get(pending.metrics).items()}
    run.check_finite(pending.step, metrics, pending.batch)
    now = time.perf_counter()
    n_tokens = int((pending.batch["segments"] > 0).sum())
    run.log(pending.step, metrics | {
        "learning_rate": pending.lr, "p": pending.p, "tokens_per_s": n_tokens / (now - began),
        "step_s": now - began})
    return now


class HeldOut:
    """The evaluation of SFT and SimPO: the loss of held-out rows, and greedy answers.

    It answers --eval-accuracy problems and prints --show of them. A sampler takes minutes to
    compile on a TPU, so --show alone builds none if --eval-every is 0.
    """

    def __init__(self, config, mesh: Mesh, model: stage.Model, items: list, eval_step):
        self.config, self.mesh, self.model, self.eval_step = config, mesh, model, eval_step
        n_rows = config.micro_rows * mesh.size
        self.batches = eval_batches(items, config.max_length, n_rows)
        n = max(config.eval_accuracy, config.show if config.eval_every else 0)
        self.sampler = None
        if n and items:
            import rollouts  # here: most of SFT needs no sampler

            problems = [rollouts.read_problem(item.fields, model.tok, config.system)
                        for item in items[:n]]
            self.problems, self.rollouts = problems, rollouts
            in_place = stage.rollouts_are_sharded(model.cfg, config, mesh)
            self.sampler = rollouts.Sampler(
                model.cfg, mesh, slots=min(8 if in_place else 64, len(problems)),
                max_prompt=max(len(problem.prompt) for problem in problems),
                max_new=config.max_new, dtype=jnp.dtype(config.dtype), shard=in_place)

    def score(self, trained: dict, step: int, run: runs.Run) -> float:
        """Logs and prints the metrics -> the checkpoint's score: accuracy, or minus the loss."""
        model, rows = self.model, []
        with run.budget.timed("eval"):
            sums = [self.eval_step(trained, model.fixed, stage.put(batch, self.mesh, P("data")))
                    for batch in self.batches]
            sums = jax.tree.map(lambda *x: float(np.sum(x)), *jax.device_get(sums))
            count = sums.pop("count")
            metrics = {f"eval_{k}": x / count for k, x in sums.items()}
            if self.sampler is not None:
                weights = stage.forward_weights(trained, model.fixed, jnp.dtype(self.config.dtype))
                rows = self.rollouts.answer(self.sampler, weights, model.tok, self.problems)
                if n := self.config.eval_accuracy:
                    metrics |= self.rollouts.accuracy(rows[:n])
        run.log(step, metrics)
        run.log_samples(step, rows[: self.config.show])
        for row in rows[: self.config.show]:
            terminal.say(terminal.indented(f"{row['prompt']}\n-> {row['completion']}"))
        return metrics.get("eval_accuracy", -metrics["eval_loss"])
