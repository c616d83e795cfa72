"""What SFT and SimPO share: flags, packed batches, the line of a step, the held-out evaluation.

    read = packed.row_reader(config, tok, data.read_example)
    sources, held_out = data.load_split(config, read)
    evaluation = packed.HeldOut(config, mesh, model, held_out, eval_step)
    began = packed.log_step(run, pending, began)      # a step, while the devices run the next one
    score = evaluation.measure(trained, step, run)    # of a checkpoint
"""

import dataclasses
import time
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import data
import examples
import runs
import settings
import stage
import terminal


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


def row_reader(config, tok: data.Tokenizer, read):
    """data.read_example or read_pair with --system, and with --max-length as the limit."""

    def limited(row: dict):
        item = read(row, tok, config.system)
        if item.n_tokens > config.max_length:
            raise data.TooLong(item.n_tokens, config.max_length, "--max-length")
        return item

    return limited


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
        self.batches = examples.eval_batches(items, config.max_length, n_rows)
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

    def measure(self, trained: dict, step: int, run: runs.Run) -> float:
        """Logs and prints the metrics -> the checkpoint's score: accuracy, or minus the loss."""
        model, rows = self.model, []
        with run.budget.measure("eval"):
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
            terminal.say(f"  {row['prompt']}\n  -> {row['completion']}")
        return metrics.get("eval_accuracy", -metrics["eval_loss"])
