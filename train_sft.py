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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import data
import gemma
import hosts
import hub
import lora
import rewards
import runs
from eval import Problem, eval_metrics, evaluate, fill
from sampler import Sampler

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
    """host:port of process 0, where the processes meet; found by JAX on SLURM, GKE, TPU slices."""
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
MAY_CHANGE = ("steps", "time_limit", "out", "keep", "report_to", "save_every", "eval_every")


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    if config.from_scratch and config.lora_rank is None:
        config = dataclasses.replace(config, lora_rank=0)
    config = fill(config, DEFAULTS)
    if config.lora_alpha is None:
        config = dataclasses.replace(config, lora_alpha=2.0 * config.lora_rank)
    if config.from_scratch and config.lora_rank:
        raise ValueError(f"--lora-rank {config.lora_rank}: random weights are trained whole, not "
                         "with --from-scratch and an adapter")
    return config


# ------------------------------------------------------------------------------------------ loss


def loss(trained, fixed, batch, key, cfg: gemma.Config, config: Config, fsdp: str | None):
    """Negative log-likelihood of the completion tokens of B packed rows -> (sum, count).

    trained: {"a", "b"} of an adapter, or all parameters. Per-device sizes.
    """
    params, adapter = join(trained, fixed, jnp.dtype(config.dtype))
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


def join(trained, fixed, dtype) -> tuple[dict, dict | None]:
    """(parameters, adapter or None) for a forward pass, in the compute dtype."""
    if "base" in fixed:
        return fixed["base"], trained | {"scale": fixed["scale"]}
    return jax.tree.map(lambda x: x.astype(dtype), trained), None


# ------------------------------------------------------------------------------------ train_step


def vary(x):
    """Makes a replicated value this device's own; its gradient is then this device's alone."""
    return lax.pcast(x, "data", to="varying")


def grads(trained, fixed, batch, key, *, specs, **kw):
    """Gradient of the mean loss over one update; runs on each device (per-device sizes).

    batch: arrays [micro-batches, B, T]. The gradient of the sum and the token count are added up
    over micro-batches, summed over devices once and divided once.
    """
    key = jax.random.fold_in(key, lax.axis_index("data"))
    replicated = jax.tree.map(lambda s: "data" not in s, specs)
    # A replicated leaf is made varying, else its gradient would come already summed over devices.
    trained = jax.tree.map(lambda r, x: vary(x) if r else x, replicated, trained)

    def micro(carry, xs):
        i, micro_batch = xs
        f = jax.value_and_grad(partial(loss, **kw), has_aux=True)
        (total, count), g = f(trained, fixed, micro_batch, jax.random.fold_in(key, i))
        return jax.tree.map(jnp.add, carry, (g, total, count)), None

    zeros = jax.tree.map(jnp.zeros_like, trained), vary(jnp.zeros(())), vary(jnp.zeros(()))
    n_micro = batch["tokens"].shape[0]
    (g, total, count), _ = lax.scan(micro, zeros, (jnp.arange(n_micro), batch))
    total, count = lax.psum((total, count), "data")
    count = jnp.maximum(count, 1.0)
    # g{unreduced} -> all-reduce; a sharded leaf was summed by the transpose of its all-gather
    g = jax.tree.map(lambda r, x: (lax.psum(x, "data") if r else x) / count, replicated, g)
    return g, {"loss": total / count, "n_tokens": count}


def optimizer(config: Config) -> optax.GradientTransformation:
    """AdamW without the learning rate, which train_step is given because it follows the clock."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b2=config.adam_b2),
        optax.add_decayed_weights(config.weight_decay),
    )


def schedule(p: float, config: Config) -> float:
    """Learning rate at share p of the run: linear warm-up, cosine to final_lr of the peak."""
    if p < config.warmup:
        return config.learning_rate * p / config.warmup
    cosine = 0.5 * (1 + np.cos(np.pi * (p - config.warmup) / max(1e-9, 1 - config.warmup)))
    return config.learning_rate * float(config.final_lr + (1 - config.final_lr) * cosine)


def specs_of(cfg: gemma.Config, config: Config, sharded: bool) -> tuple[dict, dict]:
    """PartitionSpecs of (what is trained, what is fixed).

    An adapter is replicated; a base, or weights that are trained, may be split.
    """
    if not config.lora_rank:
        return gemma.pspecs(cfg, sharded), {}
    each = {n: P() for n in lora.parse_targets(config.lora_targets)}
    return {"a": each, "b": each}, {"base": gemma.pspecs(cfg, sharded), "scale": each}


def grads_on_mesh(cfg, config, mesh, sharded: bool, check_vma: bool = True):
    """grads() under shard_map: (trained, fixed, batch, key) -> (gradient, metrics)."""
    specs, fixed = specs_of(cfg, config, sharded)
    fsdp = "data" if sharded else None
    return jax.shard_map(
        partial(grads, specs=specs, cfg=cfg, config=config, fsdp=fsdp), mesh=mesh,
        in_specs=(specs, fixed, P(None, "data"), P()), out_specs=(specs, P()), check_vma=check_vma,
    )


def make_steps(cfg: gemma.Config, config: Config, mesh: Mesh, sharded: bool):
    """Jitted train_step(trained, opt, fixed, batch, lr, key), eval_step(trained, fixed, batch)."""
    check_vma = not gemma.on_tpu(mesh)  # JAX's splash attention raises under True
    tx, mesh_grads = optimizer(config), grads_on_mesh(cfg, config, mesh, sharded, check_vma)

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

    specs, fixed = specs_of(cfg, config, sharded)
    eval_step = jax.jit(jax.shard_map(
        eval_sums, mesh=mesh, in_specs=(specs, fixed, P("data")), out_specs=P(),
        check_vma=check_vma,
    ))
    return train_step, eval_step


def programs(config: Config, mesh: Mesh) -> dict:
    """Each jitted function of a run with its argument shapes: name -> (function, arguments)."""
    config = resolve(config)
    cfg = model_of(config)
    sharded = is_sharded(cfg, config, mesh)
    specs = specs_of(cfg, config, sharded)
    state = state_shapes(config, mesh, partial(random_weights, cfg, config), specs)
    return step_programs(config, mesh, make_steps(cfg, config, mesh, sharded), state)


def random_weights(cfg: gemma.Config, config: Config) -> tuple[dict, dict]:
    """(trained, fixed) of a run that starts from nothing."""
    key = jax.random.key(0)
    if not config.lora_rank:
        return gemma.init(cfg, key), {}
    trained, scale = lora.split(new_adapter(cfg, config))
    return trained, {"base": gemma.init(cfg, key, jnp.dtype(config.dtype))} | scale


def state_shapes(config: Config, mesh: Mesh, weights, specs: tuple) -> tuple:
    """(trained, opt, fixed) as shapes on the mesh, of weights() -> (trained, fixed)."""
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
    trained, fixed = jax.tree.map(shape, jax.eval_shape(weights), specs)
    tx = optimizer(config)
    opt = jax.eval_shape(tx.init, trained)
    return trained, jax.tree.map(shape, opt, opt_specs(tx, trained, specs[0])), fixed


def step_programs(config: Config, mesh: Mesh, steps: tuple, state: tuple) -> dict:
    """programs() of a train_step and an eval_step that read packed rows."""
    (train_step, eval_step), (trained, opt, fixed) = steps, state
    n_micro, rows = batch_shape(config, mesh)
    shapes = lambda *lead: {
        k: jax.ShapeDtypeStruct((*lead, rows, config.max_length), jnp.int32,
                                sharding=NamedSharding(mesh, P(*(None for _ in lead), "data")))
        for k in ("tokens", "mask", "segments", "positions")
    }
    scalar = jax.ShapeDtypeStruct((), jnp.float32)
    key = jax.eval_shape(lambda: jax.random.key(0))
    return {
        "train_step": (train_step, (trained, opt, fixed, shapes(n_micro), scalar, key)),
        "eval_step": (eval_step, (trained, fixed, shapes())),
    }


# ------------------------------------------------------------------------------------------ main


def base_name(config: Config) -> str:
    return config.model.removesuffix("-it").removesuffix("-pt")


def model_of(config: Config) -> gemma.Config:
    """The model's shape, by name or by the config.json of --weights; needs no weights."""
    return gemma.read_config(config.weights) if config.weights else gemma.CONFIGS[base_name(config)]


def batch_shape(config: Config, mesh: Mesh) -> tuple[int, int]:
    """(micro-batches, rows of a micro-batch over all devices) of one update."""
    rows = min(config.micro_rows * mesh.size, config.batch_rows)
    if config.batch_rows % rows or rows % mesh.size:
        raise ValueError(
            f"--batch-rows {config.batch_rows} is not a multiple of --micro-rows "
            f"{config.micro_rows} times {mesh.size} devices"
        )
    return config.batch_rows // rows, rows


def is_sharded(cfg: gemma.Config, config: Config, mesh: Mesh) -> bool:
    """Whether the base is split over the mesh rather than copied to every device."""
    if config.shard != "auto" or mesh.size == 1:
        return config.shard == "yes" and mesh.size > 1
    # Training all weights keeps a float32 master, two moments and a gradient of each.
    per_weight = jnp.dtype(config.dtype).itemsize if config.lora_rank else 16
    return too_large(cfg, per_weight, mesh)


def samples_sharded(cfg: gemma.Config, config: Config, mesh: Mesh) -> bool:
    """Whether rollouts leave a sharded base where it is rather than gather it once a phase."""
    itemsize = jnp.dtype(config.dtype).itemsize
    return is_sharded(cfg, config, mesh) and too_large(cfg, itemsize, mesh)


def too_large(cfg: gemma.Config, bytes_per_weight: int, mesh: Mesh) -> bool:
    """Whether a copy of all weights takes over 40 % of a device's memory."""
    device = jax.local_devices()[0] if hosts.count > 1 else mesh.devices.flat[0]
    here = device.platform != "cpu" and device in jax.local_devices()  # else only compiled for
    limit = ((device.memory_stats() if here else None) or {}).get("bytes_limit", 16 * 2**30)
    return cfg.n_params * bytes_per_weight > 0.4 * limit


def new_adapter(cfg: gemma.Config, config: Config) -> dict:
    key = jax.random.key(config.seed)
    return lora.init(cfg, key, config.lora_rank, config.lora_alpha, config.lora_targets,
                     config.rslora)


def opt_specs(tx, trained, specs):
    """PartitionSpecs of the optimizer state: moments lie where their weights lie."""
    return optax.tree_map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, trained), specs,
        transform_non_params=lambda _: P(),
    )


def init_opt(config: Config, trained: dict, mesh: Mesh, specs: dict):
    """The optimizer's state of what is trained, as it lies on the mesh."""
    tx = optimizer(config)
    at = jax.tree.map(partial(NamedSharding, mesh), opt_specs(tx, trained, specs))
    return jax.jit(tx.init, out_shardings=at)(trained)


def place(tree, mesh: Mesh, specs):
    """Host or device arrays onto the mesh; specs is a tree of PartitionSpecs or one for all."""
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(lambda x, s: hosts.put(x, NamedSharding(mesh, s)), tree, specs)


def place_like(tree, like):
    """Host arrays onto the devices as arrays of the same tree already are."""
    return jax.tree.map(lambda x, now: hosts.put(x, now.sharding), tree, like)


class Model(NamedTuple):
    """What a stage begins with, on the mesh."""

    cfg: gemma.Config
    tok: data.Tokenizer
    weights: Path  # the folder they came from
    trained: dict  # {"a", "b"} of the adapter, or all weights in float32
    fixed: dict  # {"base", "scale"}, or nothing
    specs: dict  # PartitionSpecs of what is trained
    sharded: bool
    merged: dict | None  # an adapter that went into the base and must come out again in final/


def load_model(config: Config, mesh: Mesh) -> Model:
    """The weights and the adapter that a stage starts from, and says what they are."""
    start = hub.find_start(config.model, config.weights, config.adapter)
    tok = data.Tokenizer(config.tokenizer or start.weights)
    cfg, merged, adapter = gemma.read_config(start.weights), None, None
    sharded = is_sharded(cfg, config, mesh)
    if getattr(config, "from_scratch", False):
        base = gemma.init(cfg, jax.random.key(config.seed))
    else:
        dtype = jnp.dtype(config.dtype if config.lora_rank else "float32")
        cfg, base = gemma.load(start.weights, dtype, mesh, sharded)
        base, adapter, merged = lora.continue_from(
            start.adapter, base, cfg, config.lora_rank, lora.parse_targets(config.lora_targets)
        )
    if merged is not None:
        runs.say(f"--adapter {start.adapter} merged into the base: {lora.describe(merged)}")
    trained, fixed = base, {}
    if config.lora_rank:
        adapter = adapter or new_adapter(cfg, config)
        runs.say(lora.describe(adapter))
        trained, scale = lora.split(adapter)
        fixed = {"base": base} | place(scale, mesh, P())
    specs, _ = specs_of(cfg, config, sharded)
    rollouts = "in their place" if samples_sharded(cfg, config, mesh) else "from a copy on each"
    runs.say(
        f"{cfg.n_params:,} weights {'split over' if sharded else 'on each of'} {mesh.size} "
        f"{mesh.devices.flat[0].device_kind}" + f"; rollouts read them {rollouts}" * sharded
    )
    trained = place(trained, mesh, specs)
    return Model(cfg, tok, start.weights, trained, fixed, specs, sharded, merged)


def write_model(folder: Path | None, config: Config, model: Model, trained: dict) -> None:
    """What --adapter of the next stage takes: a PEFT adapter, or a whole model in bfloat16."""
    cfg, tok = model.cfg, model.tok
    if not config.lora_rank:
        weights = hosts.whole(
            jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained)
        )  # as published
    if folder is None:  # another host writes
        return
    if config.lora_rank:
        live = jax.device_get(trained | {"scale": model.fixed["scale"]})
        live = live if model.merged is None else lora.stack(model.merged, live, cfg)
        lora.save(folder, live, cfg, str(model.weights), getattr(config, "lora_dropout", 0.0),
                  gemma.is_multimodal(model.weights))
    else:
        stops = tuple(sorted({*cfg.eos_token_id, *tok.stop_ids}))  # a base model has only <eos>
        gemma.save(folder, dataclasses.replace(cfg, eos_token_id=stops), weights)
        tok.save(folder)
    lora.write_prompt(folder, config.system)


def load_data(config: Config, tok: data.Tokenizer,
              read=data.read_example) -> tuple[data.Packed, list]:
    """The training batches and the held-out examples; says what was read and left out."""

    def load(sources):
        sets = []
        for source in filter(None, (s.strip() for s in sources.split(","))):
            examples, bad = data.load_examples(source, tok, config.max_length, config.system,
                                               config.skip_bad_rows, read)
            left_out = f", {len(bad)} bad rows left out, first: {bad[0]}" if bad else ""
            runs.say(f"data: {len(examples):,} rows of {source}{left_out}")
            sets.append(examples)
        return sets

    sets = load(config.data)
    weights = [float(w) for w in config.mix.split(",")] if config.mix else None
    if weights and (len(weights) != len(sets) or min(weights) < 0 or not sum(weights)):
        raise ValueError(
            f"--mix {config.mix}: expected {len(sets)} weights for --data {config.data}"
        )
    built_in = {"problems": "problems:test", "gsm8k": "gsm8k:test"}.get(config.data)
    if config.eval_data or built_in:
        held_out = [e for examples in load(config.eval_data or built_in) for e in examples]
    else:
        sets, held_out = hold_out(sets, config)
    batches = data.Packed(sets, config.max_length, config.batch_rows, config.seed, weights)
    return batches, held_out[: config.eval_rows or None]


def hold_out(sets: list[list], config: Config) -> tuple[list[list], list]:
    """What to train on and all rows of 2 % of the prompts: no prompt is on both sides."""

    def prompt(row):
        ids, mask = data.sequences(row)[0]
        return ids[: np.argmax(mask)].tobytes()

    prompts = list(dict.fromkeys(prompt(row) for rows in sets for row in rows))
    order = np.random.default_rng(config.seed).permutation(len(prompts))
    out = {prompts[i] for i in order[: len(prompts) // 50 + 1]}
    held_out = [row for rows in sets for row in rows if prompt(row) in out]
    sets = [[row for row in rows if prompt(row) not in out] for rows in sets]
    if not all(sets):
        raise ValueError(f"--data {config.data}: {len(prompts)} prompts are too few to hold "
                         "some out; --eval-data names other held-out rows")
    return sets, held_out


def problem(ids, mask, tok: data.Tokenizer) -> Problem:
    """A held-out example as a question to answer: its prompt, and the answer in its completion."""
    first = int(np.argmax(mask))
    length = int(np.argmin(np.append(mask[first:], 0)))  # of the first turn that is trained on
    question = tok.decode(ids[:first], keep_special=True).rsplit("<start_of_turn>user\n", 1)[-1]
    question = question.split("<end_of_turn>")[0]
    _, gold, strict = rewards.parse(tok.decode(ids[first : first + length]))
    gold = gold if strict else None
    kind = "auto" if gold is None else rewards.kind_of(gold)
    prompt = tuple(ids[:first].tolist())
    return Problem(question, prompt, question, gold, kind, (), "held-out")


def fit(config: Config, mesh: Mesh, model: Model, steps: tuple, batches: data.Packed,
        held_out: list, show: tuple[str, ...] = ("loss", "tokens_per_s")) -> Path:
    """Trains until --steps or --time-limit, with evaluations and checkpoints, and writes final/.

    steps: (train_step, eval_step) of this script or of train_simpo.py. show: metrics of the line.
    """
    (train_step, eval_step), tok, fixed = steps, model.tok, model.fixed
    trained, (n_micro, _) = model.trained, batch_shape(config, mesh)
    opt = init_opt(config, trained, mesh, model.specs)
    key = jax.random.key(config.seed)
    eval_rows = config.micro_rows * mesh.size
    eval_set = data.eval_batches(held_out, config.max_length, eval_rows)

    questions = held_out[: max(config.eval_accuracy, config.show)]
    problems = [problem(*data.sequences(row)[0], tok) for row in questions]
    longest = max((len(p.prompt) for p in problems), default=1)
    sampler = Sampler(model.cfg, mesh, slots=min(64, max(1, len(problems))), max_prompt=longest,
                      max_new=config.max_new, dtype=jnp.dtype(config.dtype),
                      shard=samples_sharded(model.cfg, config, mesh))

    def measure(run, step) -> float:
        """Held-out loss, accuracy and a few completions, logged and shown -> the score."""
        sums = [eval_step(trained, fixed, place(b, mesh, P("data"))) for b in eval_set]
        sums = jax.tree.map(lambda *x: float(np.sum(x)), *jax.device_get(sums))
        count = sums.pop("count")
        metrics = {f"eval_{k}": x / count for k, x in sums.items()}
        rows = []
        if problems:
            params, adapter = join(trained, fixed, jnp.dtype(config.dtype))
            results, rows = evaluate(sampler, params, tok, problems, adapter=adapter, every_s=None)
            if config.eval_accuracy:
                metrics |= eval_metrics(results)
        run.log(step, metrics)
        runs.say(f"step {step}: " + ", ".join(f"{k} {v:.4g}" for k, v in metrics.items()))
        keep = [{k: row[k] for k in ("prompt", "completion", "gold", "correct", "format", "stop")}
                for row in rows[: config.show]]
        run.log_samples(step, keep)
        for row in keep:
            runs.say(f"  {row['prompt']}\n  -> {row['completion']}")
        return metrics.get("eval_accuracy", -metrics["eval_loss"])

    def write(folder: Path | None) -> None:
        write_model(folder, config, model, trained)

    # loop
    budget = runs.Budget(config.steps, runs.parse_time(config.time_limit), start=runs.STARTED,
                         needs=("step", "save", "eval"))
    report_to = [name for name in config.report_to.split(",") if name]
    with runs.Run(config.out, config, MAY_CHANGE, budget, config.keep, report_to, show) as run:
        saved = run.restore({"trained": trained, "opt": opt})
        step = 0
        if saved is not None:
            step = saved.step
            trained = place_like(saved.arrays["trained"], trained)
            opt = place_like(saved.arrays["opt"], opt)
        pending, measured, began = None, None, time.perf_counter()

        def log_pending():
            """Waits for the newest step and writes its line."""
            nonlocal pending, began
            if pending is None:
                return
            (n, metrics, extra, batch), pending = pending, None
            metrics = {k: float(v) for k, v in jax.device_get(metrics).items()} | extra
            run.check_finite(n, metrics, batch)
            now = time.perf_counter()
            n_real = int((batch["segments"] > 0).sum())
            metrics |= {"tokens_per_s": n_real / (now - began), "step_s": now - began}
            began = now
            run.log(n, metrics)

        def save(score=None):
            log_pending()
            run.save(step, {"trained": trained, "opt": opt}, {}, write, score)

        while (p := run.progress(step)) < 1 and not run.stopping:
            batch = batches.batch(step)
            # the share of the run at the end of this step, so that the first step moves
            lr = schedule(min(1.0, p + (1 / config.steps if config.steps else 0.0)), config)
            micro = {k: v.reshape(n_micro, -1, v.shape[-1]) for k, v in batch.items()}
            trained, opt, metrics = train_step(
                trained, opt, fixed, place(micro, mesh, P(None, "data")), np.float32(lr),
                jax.random.fold_in(key, step),
            )
            log_pending()  # of the step before: the device is busy with this one meanwhile
            step += 1
            pending = step, metrics, {"lr": lr, "p": p}, batch
            ends = config.steps is not None and step >= config.steps
            if config.eval_every and step % config.eval_every == 0 and not ends:
                log_pending()
                with budget.measure("eval"):
                    score = measure(run, step)
                save(score)
                measured = step
                began = time.perf_counter()
            elif config.save_every and step % config.save_every == 0 and not ends:
                save()
                began = time.perf_counter()
        log_pending()
        unsaved = step != measured and (saved is None or step > saved.step)
        if p < 1:
            if unsaved:  # again, it would lose its score
                save()
            run.stop()
        if unsaved:
            save(measure(run, step))
        return run.finish(write)


@runs.one_line
def main(config: Config) -> Path | dict:
    """Runs the fine-tuning and returns the folder that --adapter of the next stage takes."""
    runs.check_jax()
    if config.plan:
        import bench  # which imports this file

        return bench.plan("sft", config)
    config = resolve(config)
    hosts.connect(config)
    runs.compilation_cache()
    runs.say(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v is not None))
    mesh = gemma.all_devices()
    batch_shape(config, mesh)  # what is wrong with it is better said before all is loaded
    model = load_model(config, mesh)
    batches, held_out = load_data(config, model.tok)
    steps = make_steps(model.cfg, config, mesh, model.sharded)
    return fit(config, mesh, model, steps, batches, held_out)


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
