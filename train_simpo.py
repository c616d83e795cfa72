"""Preference optimisation: the model learns to prefer the better of two completions of a prompt.

    SimPO   - log σ(β (l̄_w - l̄_l) - γ)                       arXiv 2405.14734
    DPO     - log σ(β ((l_w - r_w) - (l_l - r_l)))            arXiv 2305.18290
    IPO     (d̄_w - d̄_l - 1 / 2β)²,  d̄ = (l - r) / tokens     arXiv 2310.12036
    ORPO    - l̄_w - λ log σ(o_w - o_l)                        arXiv 2403.07691
            o = log p / (1 - p), p = exp l̄

The indices w and l mean chosen and rejected. l is a completion's log-prob summed over its tokens,
l̄ its mean per token, and r the sum under the reference: the model that this run starts from (base
and --adapter). With label smoothing ε, SimPO and DPO are (1 - ε) L(z) + ε L(-z).

    python train_simpo.py --data pairs.jsonl             # the tiny model, CPU
    python train_simpo.py --model gemma3-1b --adapter runs/sft --data a.jsonl
    python train_simpo.py --data pairs.jsonl --loss dpo --out runs/dpo

A line of pairs.jsonl: {"prompt": "2 + 2?", "chosen": "4", "rejected": "5"}, or message lists.

Deviations from the papers, and why:

1. --gamma-ratio sets γ/β, a target margin of l̄ that does not depend on β. In code that has γ inside
   the bracket, σ(β (l̄_w - l̄_l - γ)), that γ is our γ/β.
2. Both sequences of a pair are packed into one row as one item, so neither micro-batches nor
   devices separate them, and the loss needs no communication.
3. The gradient of the *sum* over pairs is accumulated and divided once by the number of pairs.
4. DPO and IPO run the reference within the step; SimPO and ORPO need no second forward pass.
5. IPO's log-ratios are per token, as in TRL: sums would demand less of long completions.
6. ORPO's likelihood is the mean over the chosen completion's tokens, without the prompt's.

What to expect: pair_accuracy rises above 0.5 and margin above 0. logp_chosen may fall, but slowly:
if it dives, or completions get longer, the learning rate is too high.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Literal

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

    # data
    data: str | None = None
    """Comma-separated files (JSON, JSON lines, CSV, Parquet) of {"prompt", "chosen", "rejected"}
    rows, texts or message lists; or hf:owner/name of the Hub."""
    max_length: int | None = None
    """Tokens per packed row, and of the longest pair: both completions, each with the prompt."""

    # preference
    loss: Literal["simpo", "dpo", "ipo", "orpo"] = "simpo"
    """Loss to minimise (see above); each loss reads only its own flags below."""
    beta: float | None = None
    """Scale of the compared log-probs; default: 2 for simpo, 0.1 for dpo and ipo."""
    gamma_ratio: float | None = None
    """SimPO's γ/β: target margin between a pair, in log-prob per token; default: 0.5."""
    label_smoothing: float | None = None
    """Assumed share of pairs with swapped labels, for simpo and dpo; default: 0."""
    orpo_lambda: float | None = None
    """Weight of ORPO's odds-ratio loss beside the chosen completion's likelihood; default: 0.1."""

    # defaults of its own
    out: str = "runs/simpo"
    warmup: float = 0.1


REAL = dict(
    dtype="bfloat16", system=data.SYSTEM, max_length=2048, lora_rank=16, steps=200, batch_rows=64,
    micro_rows=1, learning_rate=1e-6, remat="auto", eval_every=50, save_every=50, max_new=512,
    eval_rows=256, eval_accuracy=64,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", system="", max_length=512, lora_rank=16, steps=60, batch_rows=8,
        micro_rows=4, learning_rate=1e-4, remat="none", eval_every=20, save_every=20, max_new=128,
        eval_rows=256, eval_accuracy=100,
    ),
    "gemma2": REAL,
    "gemma3": REAL,
}
SHOWN = {  # metrics printed each step
    "loss": "loss {:.3f}", "pair_accuracy": "pairs right {:4.0%}", "margin": "margin {:5.2f}",
    "step_s": "{:5.1f} s",
}
KNOBS = {  # the fields that each loss reads, with their defaults
    "simpo": dict(beta=2.0, gamma_ratio=0.5, label_smoothing=0.0),
    "dpo": dict(beta=0.1, label_smoothing=0.0),
    "ipo": dict(beta=0.1),
    "orpo": dict(orpo_lambda=0.1),
}


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's and the loss's defaults; checks the rest."""
    knobs = KNOBS[config.loss]
    for name in sorted({k for some in KNOBS.values() for k in some} - set(knobs)):
        if getattr(config, name) is not None:
            raise ValueError(f"{terminal.flag(name)} {getattr(config, name)}: --loss {config.loss} "
                             f"has only {', '.join(map(terminal.flag, knobs))}")
    config = settings.resolve(config, {name: table | knobs for name, table in DEFAULTS.items()},
                              alpha_per_rank=2.0)
    if config.beta is not None and config.beta <= 0:
        raise ValueError(f"--beta {config.beta}: expected more than 0")
    if not 0 <= (config.label_smoothing or 0.0) < 0.5:
        raise ValueError(f"--label-smoothing {config.label_smoothing}: expected 0 to below 0.5")
    return config


# ------------------------------------------------------------------------------------------ loss


METRICS = ("pair_accuracy", "margin", "logp_chosen", "logp_rejected", "n_chosen", "n_rejected")


def preference(logp_BQG, n_BQG, ref_BQG, config: Config):
    """Log-prob sums, token counts and reference sums of pairs -> (sum, count, metrics).

    G = 2: chosen, rejected. A pair without tokens does not count. Only DPO and IPO have ref_BQG.
    Metrics are sums over pairs: margin is the difference of the rewards that the loss compares,
    logp_ is per token.
    """
    real_BQ = n_BQG[..., 0] > 0
    logp_BQG = jnp.where(real_BQ[..., None], logp_BQG, -1.0)  # finite where there is no pair
    n_BQG = jnp.maximum(n_BQG, 1.0)
    mean_BQG = logp_BQG / n_BQG
    gap = lambda x_BQG: x_BQG[..., 0] - x_BQG[..., 1]

    def smoothed(z_BQ):
        eps = config.label_smoothing
        return -(1 - eps) * jax.nn.log_sigmoid(z_BQ) - eps * jax.nn.log_sigmoid(-z_BQ)

    if config.loss == "simpo":
        reward_BQG = config.beta * mean_BQG
        loss_BQ = smoothed(gap(reward_BQG) - config.beta * config.gamma_ratio)
    elif config.loss == "dpo":
        reward_BQG = config.beta * (logp_BQG - ref_BQG)
        loss_BQ = smoothed(gap(reward_BQG))
    elif config.loss == "ipo":
        ratio_BQG = (logp_BQG - ref_BQG) / n_BQG
        reward_BQG = config.beta * ratio_BQG
        loss_BQ = (gap(ratio_BQG) - 1 / (2 * config.beta)) ** 2
    else:
        reward_BQG = config.orpo_lambda * mean_BQG
        p_BQG = jnp.minimum(mean_BQG, -1e-6)  # p = 1 has no odds
        odds_BQ = gap(p_BQG - jnp.log(-jnp.expm1(p_BQG)))
        loss_BQ = -mean_BQG[..., 0] - config.orpo_lambda * jax.nn.log_sigmoid(odds_BQ)

    margin_BQ = gap(reward_BQG)
    of_each = (margin_BQ > 0, margin_BQ, mean_BQG[..., 0], mean_BQG[..., 1], n_BQG[..., 0],
               n_BQG[..., 1])
    total = lambda x_BQ: jnp.sum(jnp.where(real_BQ, x_BQ, 0.0))
    metrics = dict(zip(METRICS, map(total, of_each), strict=True))
    return total(loss_BQ), jnp.sum(real_BQ, dtype=jnp.float32), metrics


def pair_sums(x_BT, segments_BT) -> jax.Array:
    """Sums over the sequences of packed rows [B, Q, 2]: pair q is segments 2q + 1 and 2q + 2.

    segments [1 1 2 2 2 3 4 0], x all ones -> [[[2, 3], [1, 1]]]
    """
    n_pairs = (segments_BT.shape[1] + 1) // 4  # a pair has at least 4 tokens
    one_hot_BTS = jax.nn.one_hot(segments_BT - 1, 2 * n_pairs)  # padding (-1): all zeros
    sums_BS = jnp.einsum("BT,BTS->BS", x_BT, one_hot_BTS, precision="highest")
    return sums_BS.reshape(-1, n_pairs, 2)


def loss(trained, fixed, batch, key, cfg: gemma.Config, config: Config, fsdp: str | None):
    """The loss of the pairs in B packed rows -> (sum, (count, metrics)).

    trained: {"a", "b"} of an adapter, or all parameters; fixed["reference"], for DPO and
    IPO only, has the same structure. Per-device sizes.
    """
    dtype = jnp.dtype(config.dtype)
    mask_BT, segments_BT = batch["mask"][:, 1:], batch["segments"][:, 1:]

    def read(params, adapter):
        x_BTD = gemma.hidden(params, cfg, batch["tokens"], batch["positions"], batch["segments"],
                             lora=adapter, remat=config.remat, fsdp=fsdp)
        # prompt [p p p] completion [c c] -> position 2 predicts the first c, position 3 the second
        logp_BT, _ = gemma.token_logps(
            x_BTD[:, :-1], gemma.head(params, cfg, fsdp), batch["tokens"][:, 1:],
            softcap=cfg.final_logit_softcapping,
        )
        return pair_sums(jnp.where(mask_BT > 0, logp_BT, 0.0), segments_BT)

    params, adapter = stage.forward_weights(trained, fixed, dtype)
    if adapter is not None:
        adapter = lora.with_dropout(adapter, config.lora_dropout, key)
    ref_BQG = None
    if "reference" in fixed:
        ref_BQG = read(*stage.forward_weights(fixed["reference"], fixed, dtype))
    n_BQG = pair_sums(mask_BT.astype(jnp.float32), segments_BT)
    total, count, metrics = preference(read(params, adapter), n_BQG, ref_BQG, config)
    return total, (count, metrics)


# ------------------------------------------------------------------------------------ train_step


def grads(trained, fixed, batch, key, *, specs, **kw):
    """Gradient of the mean loss over one update; runs on each device (per-device sizes).

    batch: arrays [micro-batches, B, T]. The gradient of the sum and the number of pairs are added
    up over micro-batches, then summed over devices and divided, once.
    """
    key = jax.random.fold_in(key, lax.axis_index("data"))
    replicated = jax.tree.map(lambda s: "data" not in s, specs)
    # Make replicated leaves varying; otherwise their gradients arrive summed over devices.
    trained = jax.tree.map(lambda r, x: stage.vary(x) if r else x, replicated, trained)

    def micro(carry, xs):
        i, micro_batch = xs
        f = jax.value_and_grad(partial(loss, **kw), has_aux=True)
        (total, (count, metrics)), g = f(trained, fixed, micro_batch, jax.random.fold_in(key, i))
        sums = {"loss": total, "n_pairs": count} | metrics
        return jax.tree.map(jnp.add, carry, (g, sums)), None

    sums = {k: stage.vary(jnp.zeros(())) for k in ("loss", "n_pairs", *METRICS)}
    zeros = jax.tree.map(jnp.zeros_like, trained), sums
    n_micro = batch["tokens"].shape[0]
    (g, sums), _ = lax.scan(micro, zeros, (jnp.arange(n_micro), batch))
    sums = lax.psum(sums, "data")
    count = jnp.maximum(sums.pop("n_pairs"), 1.0)
    # Replicated: g{unreduced} -> all-reduce. Sharded: the transpose of all-gather has already
    # summed it over the devices.
    g = jax.tree.map(lambda r, x: (lax.psum(x, "data") if r else x) / count, replicated, g)
    return g, {k: x / count for k, x in sums.items()} | {"n_pairs": count}


def partition_specs(cfg: gemma.Config, config: Config, sharded: bool) -> tuple[dict, dict]:
    """PartitionSpecs of (trained, fixed); a reference is sharded like `trained`."""
    specs, fixed = stage.partition_specs(cfg, config, sharded)
    return specs, fixed | ({"reference": specs} if config.loss in ("dpo", "ipo") else {})


def with_reference(trained, fixed, config: Config):
    """`fixed`, for DPO and IPO with a copy of the starting weights as their reference."""
    if config.loss not in ("dpo", "ipo"):
        return fixed
    return fixed | {"reference": stage.reference_copy(trained, config)}


def grads_on_mesh(cfg, config, mesh, sharded: bool, check_vma: bool = True):
    """grads() under shard_map: (trained, fixed, batch, key) -> (gradient, metrics)."""
    specs, fixed = partition_specs(cfg, config, sharded)
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
        sums = loss(trained, fixed, batch, jax.random.key(0), cfg, quiet, fsdp)
        total, (count, metrics) = sums
        return lax.psum({"loss": total, "count": count} | metrics, "data")

    specs, fixed = partition_specs(cfg, config, sharded)
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

    def weights():
        trained, fixed = stage.random_weights(cfg, config)
        return trained, with_reference(trained, fixed, config)

    state = stage.state_shapes(config, mesh, weights, partition_specs(cfg, config, sharded))
    return packed.programs(config, mesh, make_steps(cfg, config, mesh, sharded), state)


# ------------------------------------------------------------------------------------------ main


def load_rows(config: Config, tok: data.Tokenizer) -> tuple[list[list], list]:
    """(rows of each source to learn from, held-out rows) of a resolved Config."""
    return data.load_split(config, packed.row_reader(config, tok, packed.read_pair))


@terminal.one_line
def main(config: Config) -> Path | dict:
    """Trains, and returns the folder that the next stage takes as --adapter."""
    terminal.check_versions()
    if config.plan:
        import bench  # here: bench imports this file

        return bench.plan("simpo", config)
    config = resolve(config)
    if not config.data:
        raise ValueError('--data is missing: name a JSONL file of {"prompt": "2 + 2?", "chosen": '
                         '"4", "rejected": "5"} lines')
    mesh = stage.begin(config)
    n_micro, _ = packed.batch_shape(config, mesh)

    # load
    model = stage.load_model(config, mesh)
    sources, held_out = load_rows(config, model.tok)
    batches = packed.Batches(sources, config.max_length, config.batch_rows, config.seed,
                             packed.mix_weights(config.mix, sources))
    model = model._replace(fixed=with_reference(model.trained, model.fixed, config))
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
