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

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import data
import gemma
import lora
import packed
import runs
import settings
import stage
import terminal

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config(packed.Settings):
    """Fields left at None take the model's defaults from DEFAULTS; the result is printed."""

    # model
    from_scratch: bool = False
    """Start from random weights and train all of them."""

    # data
    prompt_loss: float = 0.0
    """Loss weight of prompt tokens; with --from-scratch, 0.1 teaches the language sooner."""

    # defaults of its own
    out: str = "runs/sft"
    weight_decay: float = 0.01


REAL = dict(
    dtype="bfloat16", data="gsm8k", system=data.SYSTEM, max_length=1024, lora_rank=16, steps=500,
    batch_rows=32, micro_rows=2, learning_rate=2e-4, remat="auto", eval_every=100, eval_rows=256,
    save_every=100, max_new=512, eval_accuracy=64,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", data="problems", system="", max_length=256, lora_rank=16, steps=200,
        batch_rows=16, micro_rows=16, learning_rate=2e-3, remat="none", eval_every=50,
        eval_rows=256, eval_accuracy=100, save_every=50, max_new=104,
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
    config = settings.resolve(config, DEFAULTS, alpha_per_rank=2.0)
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
    # Replicated: g{unreduced} -> all-reduce. Sharded: the transpose of all-gather has already
    # summed it over the devices.
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
    cfg = stage.shape_of(config.model, config.weights)
    sharded = stage.base_is_sharded(cfg, config, mesh)
    specs = stage.partition_specs(cfg, config, sharded)
    state = stage.state_shapes(config, mesh, partial(stage.random_weights, cfg, config), specs)
    return packed.programs(config, mesh, make_steps(cfg, config, mesh, sharded), state)


# ------------------------------------------------------------------------------------------ main


def load_rows(config: Config, tok: data.Tokenizer) -> tuple[list[list], list]:
    """(rows of each source to learn from, held-out rows) of a resolved Config."""
    return data.load_split(config, packed.row_reader(config, tok, packed.read_example))


@terminal.one_line
def main(config: Config) -> Path | dict:
    """Trains, and returns the folder that the next stage takes as --adapter."""
    terminal.check_versions()
    if config.plan:
        import bench  # here: bench imports this file

        return bench.plan("sft", config)
    config = resolve(config)
    mesh = stage.begin(config)
    n_micro, _ = packed.batch_shape(config, mesh)

    # load
    model = stage.load_model(config, mesh)
    sources, held_out = load_rows(config, model.tok)
    batches = packed.Batches(sources, config.max_length, config.batch_rows, config.seed,
                             packed.mix_weights(config.mix, sources))
    trained, fixed = model.trained, model.fixed
    opt = stage.init_optimizer(config, trained, mesh, model.specs)
    model = model._replace(trained=None)  # so a resumed run does not hold the starting weights too

    # compile
    train_step, eval_step = make_steps(model.cfg, config, mesh, model.sharded)
    evaluation = packed.HeldOut(config, mesh, model, held_out, eval_step)

    # loop: batch -> update -> log -> evaluate -> save
    with runs.Run(config, SHOWN, facts=stage.facts(config, model, sources, held_out)) as run:
        stage.keep_held_out(config, held_out)
        step, key, pending = 0, jax.random.key(config.seed), None
        if (saved := run.restore({"trained": trained, "opt": opt})) is not None:
            step = saved.step
            trained = stage.put_like(saved.arrays["trained"], trained)
            opt, saved = stage.put_like(saved.arrays["opt"], opt), None
        elif config.eval_every:
            evaluation.score(trained, step, run)

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
                began = packed.log_step(run, pending, began)
            step += 1
            pending = packed.Pending(step, metrics, batch, lr, p)
            evaluates = run.due(config.eval_every, step)
            if evaluates or run.due(config.save_every, step):
                packed.log_step(run, pending, began)
                pending = None
                save(evaluation.score(trained, step, run) if evaluates else None)
                began = time.perf_counter()
        if pending is not None:
            packed.log_step(run, pending, began)
        return run.end(step, save, lambda: evaluation.score(trained, step, run), write)


if __name__ == "__main__":
    import commandline

    terminal.command(lambda: main(commandline.cli(Config, description=__doc__)))
