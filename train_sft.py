"""Supervised fine-tuning, by LoRA or in full: the model learns to write its rows' completions.

    loss = - sum over completion tokens of log p(token | all before it) / number

The sum and the number of tokens run over the whole update: all micro-batches, all devices. The
stop token counts as a completion token; prompts (unless --prompt-loss) and padding do not.

    python train_sft.py                    # the tiny model, CPU, three minutes
    python train_sft.py --model gemma3-1b --data gsm8k --time-limit 1h45m
    python train_sft.py --model gemma3-1b --data a.jsonl,b.jsonl --mix 0.7,0.3

Deviations from common practice, and why:

1. Examples are packed best-fit into rows of --max-length. A token attends to its own example only
   and positions restart, so packing changes no gradient (tested).
2. Log-probs and their gradient are computed from chunks of hidden states (gemma.token_logps):
   logits [rows, length, vocabulary] never exist.
3. The gradient of the *sum* is accumulated and divided once by the number of tokens. A mean of
   means would give the tokens of short completions more weight.
4. Batch n depends on (seed, n) alone, so a resumed run sees the rows of an uninterrupted one.

What to expect: the loss falls fast for some tens of steps, then slowly. The tiny model writes
`<reasoning>…</reasoning>` from the start, because it ships already trained.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import data
import examples
import gemma
import lora
import runs
import stage

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields left at None take the model's defaults from DEFAULTS; the result is printed."""

    # model
    model: str = "tiny"
    """Which Gemma: tiny, gemma3-270m/1b/4b/12b/27b, gemma2-2b/9b/27b; add -pt for a base model."""
    weights: str | None = None
    """Folder of the weights (config.json, safetensors); default: looked for by name."""
    tokenizer: str | None = None
    """Tokenizer folder or file, if the weights folder holds no tokenizer."""
    adapter: str | None = None
    """An earlier run (its final/), a PEFT adapter or a fully fine-tuned model; default: none."""
    from_scratch: bool = False
    """Start from random weights and train all of them."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the frozen base and the activations; trained arrays have float32 masters."""
    base: Literal["dtype", "int8"] = "dtype"
    """Frozen base: in --dtype; or int8, half the bytes to keep and to read (needs LoRA)."""

    # data
    data: str | None = None
    """Comma-separated: problems, solutions, gsm8k (built in), files (JSON, JSON lines, CSV,
    Parquet) or hf:owner/name of the Hub; gsm8k:test, mine.csv[:50%]."""
    mix: str | None = None
    """Sampling weights of the --data sources, as in 0.7,0.3; default: every row once per epoch."""
    eval_data: str | None = None
    """Held-out rows, as in --data; default: a built-in set's test split, else 2 % of prompts."""
    system: str | None = None
    """System text before every question; default: the one the adapter was trained under."""
    columns: str = ""
    """Your columns under our names, as in question=instruction,answer=response."""
    skip_bad_rows: bool = False
    """Skip and count rows that cannot be used, instead of stopping at the first."""
    prompt_loss: float = 0.0
    """Loss weight of prompt tokens; with --from-scratch, 0.1 teaches the language sooner."""
    max_length: int | None = None
    """Tokens per packed row, and of the longest example."""

    # LoRA
    lora_rank: int | None = None
    """Rank of the adapter, by default that of --adapter; 0 trains every weight of the model."""
    lora_alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; default: --adapter's, or twice the rank."""
    lora_targets: str = "q,k,v,o,gate,up,down"
    """Which matrices get an adapter."""
    lora_dropout: float = 0.0
    """Dropout rate of the adapter's inputs, in training only."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    # optimisation
    steps: int | None = None
    """Steps to run; with --time-limit, whichever ends first."""
    time_limit: str | None = None
    """Time limit, as in 8h45m; the schedule follows the clock, and the run saves before the end."""
    batch_rows: int | None = None
    """Packed rows per update, over all devices."""
    micro_rows: int | None = None
    """Packed rows computed at once on each device; lower it when out of memory."""
    learning_rate: float | None = None
    """Peak learning rate: linear warm-up, then cosine decay."""
    warmup: float = 0.05
    """Share of the run spent warming up."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's weight decay, on every trained array."""
    adam_b2: float = 0.99
    """AdamW's beta2; 0.999 suits runs of many thousand steps."""
    clip_norm: float = 1.0
    """Clip gradients to this global norm."""
    remat: Literal["none", "attention", "layer", "auto"] | None = None
    """What the backward pass recomputes: attention (everything but matmuls with weights; 4N FLOPs
    per token, like none) or the whole layer (6N). auto: attention, or layer if the base is
    sharded."""
    shard: Literal["auto", "yes", "no"] = "auto"
    """Shard the base over the devices; auto: if a copy takes over 40 % of a device's memory."""

    # the run
    out: str = "runs/sft"
    """Run folder; the same command continues the run in it."""
    seed: int = 0
    """Seed of the adapter, the data order and dropout."""
    eval_every: int | None = None
    """Steps between evaluations, of which the best checkpoint is kept; 0: only at the end."""
    eval_rows: int = 256
    """Maximum number of held-out rows; 0: all of them."""
    eval_accuracy: int | None = None
    """Held-out prompts answered greedily at each evaluation; the best checkpoint is then the most
    accurate, not the one with the lowest loss."""
    show: int = 2
    """Held-out completions printed at each evaluation and kept in samples.jsonl."""
    max_new: int | None = None
    """Longest completion, in tokens; a longer one is cut, with stop reason "length"."""
    save_every: int | None = None
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Latest checkpoints to keep, besides the best."""
    report_to: str = ""
    """Also log to wandb, tensorboard or both, comma-separated, if installed."""
    plan: bool = False
    """Print whether the run fits the TPU or GPU here, else a v5e-8, and how far its time goes;
    needs no weights and runs nothing."""

    # several hosts (hosts.py)
    coordinator: str | None = None
    """host:port of process 0, which the others join; auto: JAX finds it (SLURM, GKE, TPUs)."""
    n_processes: int | None = None
    """Number of processes, each on its own host or GPU."""
    process_id: int | None = None
    """Number of this process, from 0."""


REAL = dict(
    dtype="bfloat16", data="gsm8k", system=data.SYSTEM, max_length=1024, lora_rank=16, steps=500,
    batch_rows=32, micro_rows=2, learning_rate=2e-4, remat="auto", eval_every=100,
    save_every=100, max_new=512, eval_accuracy=64,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", data="problems", system="", max_length=256, lora_rank=16, steps=200,
        batch_rows=16, micro_rows=16, learning_rate=2e-3, remat="none", eval_every=50,
        eval_accuracy=100, save_every=50, max_new=104,
    ),
    "gemma2": REAL,
    "gemma3": REAL,
}
SHOWN = {  # metrics printed each step
    "loss": "loss {:.3f}", "tokens_per_s": "{:7,.0f} tokens/s", "step_s": "{:5.1f} s",
}


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    if config.from_scratch and config.lora_rank is None:
        config = dataclasses.replace(config, lora_rank=0)
    config = stage.resolve(config, DEFAULTS)
    if config.lora_alpha is None:
        config = dataclasses.replace(config, lora_alpha=2.0 * config.lora_rank)
    if config.from_scratch and config.adapter:
        raise ValueError(f"--adapter {config.adapter}: --from-scratch starts from random weights")
    if config.from_scratch and config.lora_rank:
        raise ValueError(f"--lora-rank {config.lora_rank}: --from-scratch trains all weights, so "
                         "it takes no adapter")
    return config


# ------------------------------------------------------------------------------------------ loss


def loss(trained, fixed, batch, key, cfg: gemma.Config, config: Config, fsdp: str | None):
    """Negative log-likelihood of the completion tokens of B packed rows -> (sum, count).

    trained: {"a", "b"} of an adapter, or all parameters. Per-device sizes.
    """
    params, adapter = stage.forward_weights(trained, fixed, jnp.dtype(config.dtype))
    if adapter is not None:
        adapter = lora.with_dropout(adapter, config.lora_dropout, key)
    x_BTD = gemma.hidden(params, cfg, batch["tokens"], batch["positions"], batch["segments"],
                         lora=adapter, remat=config.remat, fsdp=fsdp)
    head_VD = gemma.head(params, cfg, fsdp)
    # prompt [p p p] completion [c c] -> position 2 predicts the first c, position 3 the second
    logp_BT, _ = gemma.token_logps(
        x_BTD[:, :-1], head_VD, batch["tokens"][:, 1:], softcap=cfg.final_logit_softcapping
    )
    in_prompt_BT = (batch["positions"][:, 1:] > 0) * config.prompt_loss  # not padding, not a BOS
    weight_BT = jnp.where(batch["mask"][:, 1:] > 0, 1.0, in_prompt_BT)
    return -jnp.sum(logp_BT * weight_BT), jnp.sum(weight_BT)


# ------------------------------------------------------------------------------------ train_step


def grads(trained, fixed, batch, key, *, specs, **kw):
    """Gradient of the mean loss over one update; runs on each device (per-device sizes).

    batch: arrays [micro-batches, B, T]. The gradient of the sum and the token count are added up
    over micro-batches, then summed over devices and divided, once.
    """
    key = jax.random.fold_in(key, lax.axis_index("data"))
    replicated = jax.tree.map(lambda s: "data" not in s, specs)
    # Make replicated leaves varying; otherwise their gradients arrive summed over devices.
    trained = jax.tree.map(lambda r, x: stage.vary(x) if r else x, replicated, trained)

    def micro(carry, xs):
        i, micro_batch = xs
        f = jax.value_and_grad(partial(loss, **kw), has_aux=True)
        (total, count), g = f(trained, fixed, micro_batch, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, (g, total, count)), None

    zero = stage.vary(jnp.zeros(()))
    zeros = jax.tree.map(jnp.zeros_like, trained), zero, zero
    n_micro = batch["tokens"].shape[0]
    (g, total, count), _ = lax.scan(micro, zeros, (jnp.arange(n_micro), batch))
    total, count = lax.psum((total, count), "data")
    count = jnp.maximum(count, 1.0)
    # g{unreduced} -> all-reduce; the transpose of all-gather has summed sharded leaves already
    g = jax.tree.map(lambda r, x: (lax.psum(x, "data") if r else x) / count, replicated, g)
    return g, {"loss": total / count, "n_tokens": count}


def grads_on_mesh(cfg, config, mesh, sharded: bool, check_vma: bool = True):
    """grads() under shard_map: (trained, fixed, batch, key) -> (gradient, metrics)."""
    specs, fixed = stage.partition_specs(cfg, config, sharded)
    fsdp = "data" if sharded else None
    return jax.shard_map(
        partial(grads, specs=specs, cfg=cfg, config=config, fsdp=fsdp), mesh=mesh,
        in_specs=(specs, fixed, P(None, "data"), P()), out_specs=(specs, P()), check_vma=check_vma,
    )


def make_steps(cfg: gemma.Config, config: Config, mesh: Mesh, sharded: bool):
    """Jitted train_step(trained, opt, fixed, batch, lr, key), eval_step(trained, fixed, batch)."""
    check_vma = not gemma.on_tpu(mesh)  # JAX's splash attention raises under True
    mesh_grads = grads_on_mesh(cfg, config, mesh, sharded, check_vma)
    tx = stage.optimizer(config)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trained, opt, fixed, batch, lr, key):
        g, metrics = mesh_grads(trained, fixed, batch, key)
        metrics["grad_norm"] = optax.global_norm(g)
        updates, opt = tx.update(g, opt, trained)  # outside shard_map: clipping needs global norms
        trained = jax.tree.map(lambda x, u: x - lr * u, trained, updates)
        return trained, opt, metrics

    def eval_sums(trained, fixed, batch):
        quiet = dataclasses.replace(config, lora_dropout=0.0)
        fsdp = "data" if sharded else None
        total, count = loss(trained, fixed, batch, jax.random.key(0), cfg, quiet, fsdp)
        return lax.psum({"loss": total, "count": count}, "data")

    specs, fixed = stage.partition_specs(cfg, config, sharded)
    eval_step = jax.jit(jax.shard_map(
        eval_sums, mesh=mesh, in_specs=(specs, fixed, P("data")), out_specs=P(),
        check_vma=check_vma,
    ))
    return train_step, eval_step


def programs(config: Config, mesh: Mesh) -> dict:
    """Each jitted function of a run with its argument shapes: name -> (function, arguments)."""
    config = resolve(config)
    cfg = stage.model_config(config)
    sharded = stage.base_is_sharded(cfg, config, mesh)
    specs = stage.partition_specs(cfg, config, sharded)
    state = stage.state_shapes(config, mesh, partial(stage.random_weights, cfg, config), specs)
    return stage.packed_programs(config, mesh, make_steps(cfg, config, mesh, sharded), state)


# ------------------------------------------------------------------------------------------ main


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


@runs.one_line
def main(config: Config) -> Path | dict:
    """Trains, and returns the folder that the next stage takes as --adapter."""
    runs.check_versions()
    if config.plan:
        import bench  # here: bench imports this file

        return bench.plan("sft", config)
    config = resolve(config)
    mesh = stage.begin(config)
    n_micro, _ = stage.batch_shape(config, mesh)

    # load
    model = stage.load_model(config, mesh)
    read = stage.row_reader(config, model.tok, examples.read_example)
    sources, held_out = data.load_split(config, read)
    batches = examples.Packed(sources, config.max_length, config.batch_rows, config.seed,
                          examples.mix_weights(config.mix, sources))
    trained, fixed = model.trained, model.fixed
    opt = stage.init_optimizer(config, trained, mesh, model.specs)
    model = model._replace(trained=None)  # else a resumed run would hold these weights too

    # compile
    train_step, eval_step = make_steps(model.cfg, config, mesh, model.sharded)
    evaluation = stage.HeldOut(config, mesh, model, held_out, eval_step)

    # loop: batch -> update -> log -> evaluate -> save
    with runs.Run(config, SHOWN, facts=stage.facts(config, model, sources, held_out)) as run:
        stage.keep_held_out(config, held_out)
        step, key, pending = 0, jax.random.key(config.seed), None
        if (saved := run.restore({"trained": trained, "opt": opt})) is not None:
            step = saved.step
            trained = stage.put_like(saved.arrays["trained"], trained)
            opt, saved = stage.put_like(saved.arrays["opt"], opt), None
        elif config.eval_every:
            evaluation.measure(trained, step, run)

        def write(folder: Path | None) -> None:
            stage.write_model(folder, config, model, trained)

        def save(score: float | None = None) -> None:
            run.save(step, {"trained": trained, "opt": opt}, {}, write, score)

        began = time.perf_counter()
        while (p := run.progress(step)) < 1 and not run.stopping:
            batch, lr = batches.batch(step), stage.schedule(p, config)
            micro = {k: v.reshape(n_micro, -1, v.shape[-1]) for k, v in batch.items()}
            trained, opt, metrics = train_step(
                trained, opt, fixed, stage.put(micro, mesh, P(None, "data")), np.float32(lr),
                jax.random.fold_in(key, step))
            if pending is not None:  # log the previous step while the devices run this one
                began = log_step(run, pending, began)
            step += 1
            pending = Pending(step, metrics, batch, lr, p)
            evaluates = run.due(config.eval_every, step)
            if evaluates or run.due(config.save_every, step):
                log_step(run, pending, began)
                pending = None
                save(evaluation.measure(trained, step, run) if evaluates else None)
                began = time.perf_counter()
        if pending is not None:
            log_step(run, pending, began)
        return run.end(step, save, lambda: evaluation.measure(trained, step, run), write)


if __name__ == "__main__":
    runs.command(lambda: main(stage.cli(Config, description=__doc__)))
