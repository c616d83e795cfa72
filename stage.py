"""The start and end of every training stage: weights on the mesh, optimizer, final/.

    mesh = stage.begin(config)
    model = stage.load_model(config, mesh)
    opt = stage.init_optimizer(config, model.trained, mesh, model.specs)
    ...                                                   # the script's own loop
    stage.write_model(folder, config, model, trained)     # the next stage's --adapter

A stage trains `trained` and reads `fixed`, two pytrees:

    with an adapter     trained = {"a", "b"}, float32          fixed = {"base", "scale"}
    --lora-rank 0       trained = all weights, float32         fixed = {}

1. A starting adapter of another rank, or on other matrices, is merged into the base while the base
   loads, before --base int8 rounds the weights. `write_model` stacks that adapter and the new one
   into a single adapter, so final/ always fits the original base.
2. The base is replicated if it fits and otherwise sharded over the mesh (--shard). An adapter is
   always replicated.
3. The learning rate follows progress p, the share of the run that is done, so with --time-limit it
   follows the clock.
"""

import dataclasses
import math
from functools import partial
from pathlib import Path
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import data
import disk
import gemma
import hosts
import hub
import lora
import runs
import settings
import terminal

# ----------------------------------------------------------------------------------- the beginning


def begin(config) -> Mesh:
    """Connects hosts, claims the run folder, prints the config -> a mesh over all devices."""
    hosts.connect(config)
    if hosts.index == 0:
        runs.claim(Path(config.out))
    terminal.compilation_cache()
    settings.show_config(config)
    return gemma.all_devices()


def shape_of(model: str, folder: str | None = None, flag: str = "--model") -> gemma.Config:
    """The shape of a model by name, or from a folder's config.json, without its weights."""
    known = gemma.CONFIGS.get(hub.base_name(model))
    if folder or known is None and Path(model).is_dir():
        return gemma.read_config(folder or model)
    if known is None:
        raise ValueError(f"{flag} {model}: expected one of {', '.join(gemma.CONFIGS)}, or a folder")
    return known


# ----------------------------------------------------------------------------------- on the mesh


def vary(x):
    """Marks a replicated value as varying, so that its gradient is not summed over devices."""
    return lax.pcast(x, "data", to="varying")


def put(tree, mesh: Mesh, specs):
    """Puts host or device arrays on the mesh; specs: a tree of PartitionSpecs or one for all."""
    specs = jax.tree.broadcast(specs, tree)
    return jax.tree.map(lambda x, s: hosts.put(x, NamedSharding(mesh, s)), tree, specs)


def put_like(tree, like):
    """Puts host arrays on the devices, sharded like the arrays of the same tree `like`."""
    return jax.tree.map(lambda x, now: hosts.put(x, now.sharding), tree, like)


def base_is_sharded(cfg: gemma.Config, config, mesh: Mesh) -> bool:
    """Whether the base is sharded over the mesh rather than copied to every device."""
    if config.shard != "auto" or mesh.size == 1:
        return config.shard == "yes" and mesh.size > 1
    # Training all weights takes 16 bytes for each: its float32 master, gradient and two moments.
    return copy_is_too_large(cfg, weight_bytes(config) if config.lora_rank else 16, mesh)


def rollouts_are_sharded(cfg: gemma.Config, config, mesh: Mesh) -> bool:
    """Whether decoding reads a sharded base in place instead of gathering it in each sample()."""
    too_large = copy_is_too_large(cfg, weight_bytes(config), mesh)
    return base_is_sharded(cfg, config, mesh) and too_large


def weight_bytes(config) -> int:
    """Bytes of a frozen weight."""
    return 1 if config.base == "int8" else jnp.dtype(config.dtype).itemsize


def copy_is_too_large(cfg: gemma.Config, bytes_per_weight: int, mesh: Mesh) -> bool:
    """Whether a copy of all weights takes over 40 % of a device's memory."""
    device = jax.local_devices()[0] if hosts.count > 1 else mesh.devices.flat[0]
    # CPUs, and devices that we only compile for, count as 16 GiB.
    is_here = device.platform != "cpu" and device in jax.local_devices()
    limit = ((device.memory_stats() if is_here else None) or {}).get("bytes_limit", 16 * 2**30)
    return cfg.n_params * bytes_per_weight > 0.4 * limit


REPLICATED_BYTES = 2.5e9  # weights of a larger frozen model are sharded over the mesh


def frozen_layout(cfg: gemma.Config, mesh: Mesh, int8: bool) -> tuple[jnp.dtype, bool]:
    """(dtype, whether it is sharded) of a judge or a teacher beside the model in training.

    float32 below 1e8 weights, else bfloat16.
    """
    dtype = jnp.dtype(jnp.float32 if cfg.n_params < 10**8 else jnp.bfloat16)
    n_bytes = cfg.n_params * (1 if int8 else dtype.itemsize)
    return dtype, mesh.size > 1 and n_bytes > REPLICATED_BYTES


def partition_specs(cfg: gemma.Config, config, sharded: bool) -> tuple[dict, dict]:
    """PartitionSpecs of (trained, fixed)."""
    if not config.lora_rank:
        return gemma.pspecs(cfg, sharded), {}
    each = {n: P() for n in lora.parse_targets(config.lora_targets)}
    base = gemma.pspecs(cfg, sharded, config.base == "int8")
    return {"a": each, "b": each}, {"base": base, "scale": each}


def forward_weights(trained, fixed, dtype) -> tuple[dict, dict | None]:
    """(parameters, adapter or None) for a forward pass, in the compute dtype."""
    if "base" in fixed:
        return fixed["base"], trained | {"scale": fixed["scale"]}
    return jax.tree.map(lambda x: x.astype(dtype), trained), None


def reference_copy(trained, config):
    """A copy of `trained` to be the reference, because `trained` itself will be donated.

    A whole model is kept in the compute dtype, because a forward pass casts it to that anyway.
    """
    dtype = jnp.float32 if config.lora_rank else jnp.dtype(config.dtype)
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), trained)


# ------------------------------------------------------------------------------ what it starts from


class Model(NamedTuple):
    """What a stage starts from, on the mesh."""

    cfg: gemma.Config
    tok: data.Tokenizer
    weights: Path  # folder of the base
    trained: dict
    fixed: dict
    specs: dict  # PartitionSpecs of `trained`
    sharded: bool  # whether the base is sharded over the mesh
    merged: dict | None  # an adapter that was merged into the base
    checksums: dict[str, str]  # of the files that the model was read from


def load_model(config, mesh: Mesh) -> Model:
    """Loads the weights and the adapter that a stage starts from, and prints what they are."""
    start = hub.find_start(config.model, config.weights, config.adapter)
    tok = data.Tokenizer(config.tokenizer or start.weights)
    cfg, merged, adapter = gemma.read_config(start.weights), None, None
    if tok.vocab_size > cfg.vocab_size:
        raise ValueError(f"{tok.file} has {tok.vocab_size} tokens, but the embedding of "
                         f"{start.weights} only {cfg.vocab_size} rows")
    warn_of_cpu(cfg, mesh)
    sharded = base_is_sharded(cfg, config, mesh)
    if getattr(config, "from_scratch", False):
        base = gemma.init(cfg, jax.random.key(config.seed))
    else:
        dtype = jnp.dtype(config.dtype if config.lora_rank else "float32")
        if start.adapter is not None:
            adapter, merged = continue_from(start.adapter, cfg, config)
        delta = partial(lora.delta, merged) if merged else None
        cfg, base = gemma.load(start.weights, dtype, mesh, sharded, config.base == "int8", delta)
    trained, fixed = base, {}
    if config.lora_rank:
        adapter = adapter or new_adapter(cfg, config)
        terminal.say(lora.describe(adapter))
        trained, scale = lora.split(adapter)
        fixed = {"base": base} | put(scale, mesh, P())
    specs, _ = partition_specs(cfg, config, sharded)
    kind = f"{mesh.size} {mesh.devices.flat[0].device_kind}"
    where = f"{'sharded over' if sharded else 'on each of'} {kind}"
    if sharded:
        in_place = rollouts_are_sharded(cfg, config, mesh)
        where += "; rollouts read them " + ("in place" if in_place else "from a copy on each")
    compiling = "; the first steps take minutes, to compile" if cfg.n_params > 10**8 else ""
    terminal.say(f"{cfg.n_params:,} weights {where}{compiling}")
    trained = put(trained, mesh, specs)
    sums = checksums(start, tok, with_weights=not getattr(config, "from_scratch", False))
    return Model(cfg, tok, start.weights, trained, fixed, specs, sharded, merged, sums)


def warn_of_cpu(cfg: gemma.Config, mesh: Mesh) -> None:
    """Says that a large model will run on a CPU, which nobody means to do on Kaggle."""
    if cfg.n_params > 5e8 and mesh.devices.flat[0].platform == "cpu":
        terminal.say_wrapped(
            f"WARNING: {cfg.n_params / 1e9:.1f} billion weights on a CPU take minutes for what a "
            "TPU or GPU does in a second. On Kaggle set Accelerator TPU v5e-8 and Environment "
            '"Always use latest"; for a GPU install "jax[cuda13]".', len("WARNING: "))


def checksums(start: hub.Start, tok: data.Tokenizer, with_weights: bool = True) -> dict[str, str]:
    """Checksums of a model's, an adapter's and a tokenizer's files, for runs.check_unchanged()."""
    files = [start.weights / "config.json", tok.file]
    for folder in [start.weights, start.adapter] if with_weights else []:
        files += [] if folder is None else sorted(folder.glob("*.safetensors"))
    files += [start.adapter / "adapter_config.json"] if start.adapter else []
    return {f"checksum of {file.name}": disk.file_checksum(file) for file in files}


def facts(config, model: Model, sources: list[list], held_out: list) -> dict[str, str]:
    """What must be unchanged when a run is resumed, besides its flags: its files and its rows."""
    rows = [item.fields for items in sources for item in items]
    sums, own = dict(model.checksums), getattr(config, "reward_file", None)
    if own:
        import rewards  # here: SFT has none

        sums |= {f"checksum of {f.name}": disk.file_checksum(f) for f in rewards.files(None, own)}
    if judge := getattr(config, "judge_weights", None) or getattr(config, "judge", None):
        sums |= {f"checksum of the judge's {file.name}": disk.file_checksum(file)
                 for file in sorted(Path(judge).glob("*.safetensors"))}  # an address has none
    return sums | {
        f"checksum of the rows of --data {config.data}": disk.checksum(rows),
        f"checksum of the held-out rows of {config.eval_data or config.data}":
            disk.checksum(item.fields for item in held_out)}


def keep_held_out(config, items: list) -> None:
    """Writes the held-out rows into the run folder, so that eval.py can read the same rows."""
    if hosts.index == 0:
        file = Path(config.out) / "held_out.jsonl"
        with disk.writing(file):
            disk.replace_file(file, disk.to_jsonl(item.fields for item in items))


def continue_from(path: Path, cfg: gemma.Config, config) -> tuple[dict | None, dict | None]:
    """Loads an adapter -> (adapter to train further, None) or (None, adapter to merge).

    It is merged into the base if its rank or its matrices differ from the config's.
    """
    adapter, targets = lora.load(path, cfg), lora.parse_targets(config.lora_targets)
    if config.lora_rank == lora.rank(adapter) and set(adapter["a"]) == set(targets):
        own = adapter["scale"][targets[0]][0]
        new = lora.scaling(config.lora_alpha, config.lora_rank, config.rslora)
        if not math.isclose(own, new, rel_tol=1e-5):
            terminal.say(f"--adapter {path} keeps its own scale of {own:.4g}; the {new:.4g} of "
                         f"--lora-alpha {config.lora_alpha:g} would be a new adapter's")
        return adapter, None
    terminal.say(f"--adapter {path} merged into the base: {lora.describe(adapter)}")
    return None, adapter


def new_adapter(cfg: gemma.Config, config) -> dict:
    key = jax.random.key(config.seed)
    return lora.init(cfg, key, config.lora_rank, config.lora_alpha, config.lora_targets,
                     config.rslora)


def load_to_sample(start: hub.Start, config) -> tuple[dict, tuple]:
    """Loads a model only to sample from it -> (arguments of Sampler, (params, adapter))."""
    mesh, dtype = gemma.all_devices(), jnp.dtype(config.dtype)
    cfg = gemma.read_config(start.weights)
    warn_of_cpu(cfg, mesh)
    shard = mesh.size > 1 and copy_is_too_large(cfg, weight_bytes(config), mesh)
    cfg, params = gemma.load(start.weights, dtype, mesh, shard, config.base == "int8")
    adapter = None if start.adapter is None else lora.load(start.adapter, cfg)
    if adapter is not None:
        terminal.say(lora.describe(adapter))
    return {"cfg": cfg, "mesh": mesh, "dtype": dtype, "shard": shard}, (params, adapter)


# ---------------------------------------------------------------------------------- optimisation


def optimizer(config) -> optax.GradientTransformation:
    """AdamW without the learning rate, which train_step takes as an argument; see schedule()."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b2=config.adam_b2),
        optax.add_decayed_weights(config.weight_decay),
    )


def schedule(p: float, config) -> float:
    """Learning rate of the step that begins at progress p: linear warm-up, then cosine.

    With --steps it is the rate at the step's end, because the first step would otherwise be at 0.
    """
    p = min(1.0, p + (1 / config.steps if config.steps else 0.0))
    if p < config.warmup:
        return config.learning_rate * p / config.warmup
    cosine = 0.5 * (1 + np.cos(np.pi * (p - config.warmup) / max(1e-9, 1 - config.warmup)))
    return config.learning_rate * float(config.final_lr + (1 - config.final_lr) * cosine)


def optimizer_specs(tx, trained, specs):
    """PartitionSpecs of the optimizer state: moments are sharded like their weights."""
    return optax.tree_map_params(
        tx, lambda _, s: s, jax.eval_shape(tx.init, trained), specs,
        transform_non_params=lambda _: P())


def init_optimizer(config, trained: dict, mesh: Mesh, specs: dict):
    """The optimizer state of `trained`, on the mesh."""
    tx = optimizer(config)
    shardings = jax.tree.map(partial(NamedSharding, mesh), optimizer_specs(tx, trained, specs))
    return jax.jit(tx.init, out_shardings=shardings)(trained)


# ------------------------------------------------------------- shapes, to compile without weights


def random_weights(cfg: gemma.Config, config) -> tuple[dict, dict]:
    """(trained, fixed) of a stage that starts from random weights."""
    key = jax.random.key(0)
    if not config.lora_rank:
        return gemma.init(cfg, key), {}
    trained, scale = lora.split(new_adapter(cfg, config))
    base = gemma.init(cfg, key, jnp.dtype(config.dtype), config.base == "int8")
    return trained, {"base": base} | scale


def state_shapes(config, mesh: Mesh, weights, specs: tuple) -> tuple:
    """(trained, opt, fixed) as ShapeDtypeStructs on the mesh; weights() -> (trained, fixed)."""
    shape = lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=NamedSharding(mesh, s))
    trained, fixed = jax.tree.map(shape, jax.eval_shape(weights), specs)
    tx = optimizer(config)
    opt = jax.eval_shape(tx.init, trained)
    return trained, jax.tree.map(shape, opt, optimizer_specs(tx, trained, specs[0])), fixed


# ---------------------------------------------------------------------------------------- the end


def write_model(folder: Path | None, config, model: Model, trained: dict) -> None:
    """Writes the next stage's --adapter: a PEFT adapter, or a whole model in bfloat16.

    folder: None on a host that does not write; it still takes part in gathering the weights.
    """
    cfg, tok = model.cfg, model.tok
    if not config.lora_rank:  # in bfloat16, as Gemma is published
        weights = hosts.whole(jax.tree.map(lambda x: x.astype(jnp.bfloat16), trained))
    if folder is None:
        return
    if config.lora_rank:
        adapter = jax.device_get(trained | {"scale": model.fixed["scale"]})
        adapter = adapter if model.merged is None else lora.stack(model.merged, adapter, cfg)
        lora.save(folder, adapter, cfg, str(model.weights), getattr(config, "lora_dropout", 0.0))
    else:
        # A base model's own config stops at <eos> only.
        stops = tuple(sorted({*cfg.eos_token_id, *tok.stop_ids}))
        gemma.save(folder, dataclasses.replace(cfg, eos_token_id=stops), weights)
        tok.save(folder, config.system)
    lora.write_prompt(folder, config.system)
