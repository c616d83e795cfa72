"""Supervised fine-tuning: the model learns to write the completions of its rows, LoRA or in full.

    loss = - sum over completion tokens of log p(token | everything before it) / their number

The sum and the number run over the whole update: every micro-batch, every device. The stop token
is one of the completion's tokens, prompts (unless --prompt-loss) and padding are not.

    python train_sft.py                                    # the tiny model, CPU, three minutes
    python train_sft.py --model gemma3-1b --data gsm8k     # a v5e-8, GPU, ...
    python train_sft.py --model gemma3-1b --data a.jsonl,b.jsonl --mix 0.7,0.3 --time-limit 1h45m

What departs from the usual, and why:

1. Rows are packed best-fit into rows of --max-length; a token sees its own example only, and
   positions restart, so packing changes no gradient (a test).
2. The log-probs come from chunks of the hidden states with their gradient (gemma.token_logps):
   logits [rows, length, vocabulary] never exist.
3. The gradient of the *sum* is accumulated and divided once by the number of tokens. A mean of
   means would weigh a short completion's tokens more.
4. Batch n is a function of (seed, n): a resumed run sees the rows an uninterrupted one would.

What to expect: the loss falls fast in the first tens of steps, then slowly; the tiny model says
`<reasoning>…</reasoning>` from the start, because it ships trained.
"""

import dataclasses
import sys
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
import gemma
import hosts
import lora
import runs
import stage

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """Every field left at None is filled from DEFAULTS for the model; the result is printed."""

    # model
    model: str = "tiny"
    """Which Gemma: tiny, gemma3-270m/1b/4b/12b/27b, gemma2-2b/9b/27b; -pt for the base model."""
    weights: str | None = None
    """Folder of the weights (config.json, safetensors); default: looked for by name."""
    tokenizer: str | None = None
    """Folder or file of the tokenizer, where the weights folder has no tokenizer.model."""
    adapter: str | None = None
    """Start from the final/ of an earlier run, a PEFT adapter, or a fully fine-tuned model."""
    from_scratch: bool = False
    """Start from random weights of the model's shape (implies training all of them)."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the frozen base and the activations; what is trained has float32 masters regardless."""

    # data
    data: str | None = None
    """Comma-separated: problems (built in), gsm8k, JSONL files; :test for a test split."""
    mix: str | None = None
    """Weights of the sources of --data, as in 0.7,0.3; default: all rows of each."""
    eval_data: str | None = None
    """Held-out rows, as --data; default: the test split of a built-in set, else 2 % of --data."""
    system: str | None = None
    """System text put before every question; it travels with the run to the next stage."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, counting them, instead of stopping at the first."""
    prompt_loss: float = 0.0
    """Weight of the prompts' tokens in the loss; from scratch 0.1 teaches the language sooner."""
    max_length: int | None = None
    """Tokens in a packed row, and the longest example."""

    # LoRA
    lora_rank: int | None = None
    """Rank of the adapter; 0 trains every weight of the model."""
    lora_alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; default: twice the rank."""
    lora_targets: str = "q,k,v,o,gate,up,down"
    """Which matrices get an adapter."""
    lora_dropout: float = 0.0
    """Share of the adapter's inputs dropped in training."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    # optimisation
    steps: int | None = None
    """Updates; with --time-limit, whichever ends first."""
    time_limit: str | None = None
    """As 8h45m or 90m: the schedule follows the clock, and all is saved before it strikes."""
    batch_rows: int | None = None
    """Packed rows in one update, over all devices."""
    micro_rows: int | None = None
    """Packed rows that a device computes at a time; lower it when out of memory."""
    learning_rate: float | None = None
    """Peak of the schedule: linear warm-up, then cosine."""
    warmup: float = 0.05
    """Share of the run spent warming up."""
    final_lr: float = 0.1
    """Where the cosine ends, as a share of the peak."""
    weight_decay: float = 0.01
    """AdamW's, on every trained array."""
    adam_b2: float = 0.99
    """AdamW's second decay; 0.999 suits runs of many thousand steps."""
    clip_norm: float = 1.0
    """Gradients of a larger global norm are scaled down to it."""
    remat: Literal["none", "attention", "layer", "auto"] | None = None
    """What the backward pass computes again, to save memory: attention and all else that is no
    product with a weight (4N FLOPs a token, as none), or the whole layer (6N); auto: attention,
    and layer where the base is split."""
    shard: Literal["auto", "yes", "no"] = "auto"
    """Split the base over the devices; auto: if a copy takes over 40 % of a device."""

    # the run
    out: str = "runs/sft"
    """The run folder; the same command continues what is there."""
    seed: int = 0
    """Of the adapter, the data order and dropout."""
    eval_every: int | None = None
    """Steps between held-out losses; the best checkpoint is kept."""
    eval_rows: int = 256
    """Held-out examples; 0: all of them."""
    eval_accuracy: int = 0
    """Held-out prompts answered greedily at each evaluation; the best checkpoint is then the most
    accurate one, not the one of least loss."""
    show: int = 2
    """Completions of held-out prompts shown at each evaluation and kept in samples.jsonl."""
    max_new: int | None = None
    """Tokens of such a completion."""
    save_every: int | None = None
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Checkpoints kept, besides the best."""
    report_to: str = ""
    """wandb, tensorboard or both, comma-separated, if installed."""
    plan: bool = False
    """Say whether the run fits the TPU or GPU here, else a v5e-8, and how far its time goes; no
    weights are needed, and nothing is run."""

    # several hosts (hosts.py)
    coordinator: str | None = None
    """host:port of process 0, where the processes meet; auto: JAX finds it (SLURM, GKE, TPUs)."""
    n_processes: int | None = None
    """How many run this command, each on a host (or GPU) of its own."""
    process_id: int | None = None
    """Which of them this is, from 0."""


REAL = dict(
    dtype="bfloat16", data="gsm8k", system=data.SYSTEM, max_length=1024, lora_rank=16, steps=500,
    batch_rows=32, micro_rows=2, learning_rate=2e-4, remat="auto", eval_every=100,
    save_every=100, max_new=512,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", data="problems", system="", max_length=256, lora_rank=16, steps=200,
        batch_rows=16, micro_rows=16, learning_rate=2e-3, remat="none", eval_every=50,
        save_every=50, max_new=104,
    ),
    "gemma2": REAL,
    "gemma3": REAL,
}
SHOWN = {"loss": "loss", "tokens_per_s": "tok/s"}  # metrics on the line of a step


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
    over micro-batches, summed over devices once and divided once.
    """
    key = jax.random.fold_in(key, lax.axis_index("data"))
    replicated = jax.tree.map(lambda s: "data" not in s, specs)
    # A replicated leaf is made varying, else its gradient would come already summed over devices.
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
    # g{unreduced} -> all-reduce; a sharded leaf was summed by the transpose of its all-gather
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
        updates, opt = tx.update(g, opt, trained)  # outside shard_map: it must see global norms
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
    """A step that the devices may still be busy with."""

    step: int
    metrics: dict  # on the devices
    batch: dict
    lr: float
    p: float  # share of the run at its beginning


def log_step(run: runs.Run, pending: Pending, began: float) -> float:
    """Waits for a step and writes its line; -> the time, when the next one began."""
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
    """Runs the fine-tuning and returns the folder that --adapter of the next stage takes."""
    runs.check_jax()
    if config.plan:
        import bench  # which imports this file

        return bench.plan("sft", config)
    config = resolve(config)
    hosts.connect(config)
    if hosts.index == 0:
        runs.claim(Path(config.out))  # a wrong --out is better said before anything is loaded
    runs.compilation_cache()
    stage.show_config(config)
    mesh = gemma.all_devices()
    n_micro, _ = stage.batch_shape(config, mesh)

    # load
    model = stage.load_model(config, mesh)
    read = stage.row_reader(config, model.tok, data.read_example)
    sources, held_out = data.load_split(config, read)
    batches = data.Packed(sources, config.max_length, config.batch_rows, config.seed,
                          data.mix_weights(config.mix, sources))
    trained, fixed = model.trained, model.fixed
    opt = stage.init_optimizer(config, trained, mesh, model.specs)
    model = model._replace(trained=None)  # else a resumed run would hold these weights too

    # compile
    train_step, eval_step = make_steps(model.cfg, config, mesh, model.sharded)
    evaluation = stage.HeldOut(config, mesh, model, held_out, eval_step)

    # loop: batch -> update -> log -> evaluate -> save
    with runs.Run(config, SHOWN) as run:
        stage.keep_held_out(config, held_out)
        step, key, pending = 0, jax.random.key(config.seed), None
        if (saved := run.restore({"trained": trained, "opt": opt})) is not None:
            step = saved.step
            trained = stage.put_like(saved.arrays["trained"], trained)
            opt, saved = stage.put_like(saved.arrays["opt"], opt), None

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
            if pending is not None:  # log the step before while the devices are busy with this one
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
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
