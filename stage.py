"""The start and end of every training stage: defaults, weights on the mesh, optimizer, final/.

    config = stage.resolve(config, DEFAULTS)
    model = stage.load_model(config, mesh)
    opt = stage.init_optimizer(config, model.trained, mesh, model.specs)
    ...                                                   # the script's own loop
    stage.write_model(folder, config, model, trained)     # the next stage's --adapter

A stage trains `trained` and reads `fixed`, two pytrees:

    with an adapter     trained = {"a", "b"}, float32          fixed = {"base", "scale"}
    --lora-rank 0       trained = all weights, float32         fixed = {}

1. A starting adapter of another rank, or on other matrices, is merged into the base as that is
   loaded, before --base int8 rounds it; `write_model` stacks it onto the new one, so that final/
   always belongs on the original base.
2. The base is replicated if it fits and otherwise sharded over the mesh. An adapter is always
   replicated.
3. The learning rate follows progress p, the share of the run that is done, so with --time-limit it
   follows the clock.
"""

import dataclasses
import inspect
import math
import os
import re
import shutil
import sys
import textwrap
from functools import partial, reduce
from operator import or_
from pathlib import Path
from typing import Annotated, NamedTuple, get_args, get_type_hints

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
import runs

# ------------------------------------------------------------------------------ the command line

ALIASES = {"learning_rate": "--lr", "prompts": "--batch-size", "batch_rows": "--batch-size",
           "group": "--num-generations", "max_new": "--max-new-tokens", "out": "--output-dir"}
LAST = ("optimisation", "run", "several_hosts", "judge")  # groups of flags
DESCRIBED = re.compile(r'(?sm)^    # (?P<group>[^\n(]+)|^    (?P<field>\w+): [^\n]+\n'
                       r'    """(?P<help>.*?)"""')


def described(cls: type) -> dict[str, tuple[str, str]]:
    """Field -> (the comment that heads its group, the sentence under it), from the source."""
    found = {}
    for c in reversed(cls.__mro__[:-1]):
        group = ""
        for m in DESCRIBED.finditer(inspect.getsource(c)):
            if m["field"]:
                found[m["field"]] = group, " ".join(m["help"].split())
            else:
                group = re.sub(r"\W+", "_", m["group"].removeprefix("the ").strip())
    return found


def introduction(docstring: str) -> str:
    """What --help says of a script: its docstring up to the notes for readers of the code."""
    paragraphs = docstring.partition("\n1. ")[0].strip().split("\n\n")
    paragraphs[-1] = re.sub(r"[^.]*:\Z", "", paragraphs[-1])  # "What to know:"
    width = min(100, shutil.get_terminal_size().columns) - 1
    fill = partial(textwrap.fill, width=width, initial_indent=" ", subsequent_indent=" ")
    # tyro would join lines that begin with a letter
    paragraphs = [p if p.startswith(" ") else fill(p) for p in paragraphs if p]
    return "\n\n".join(paragraphs)


def cli(config_class, description: str, args: list[str] | None = None, default=None, **more):
    """tyro.cli() for a script's Config, or a union of them, with help in groups.

    tyro shows one group for each nested class, so it reads classes made of the groups here. The
    defaults shown are those of the --model in args. more: as for tyro.cli.
    """
    import tyro  # here: a notebook needs none

    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    args, classes = sys.argv[1:] if args is None else args, get_args(config_class)
    words = " ".join(args).replace("=", " ").split()
    model = hub.short_name(words[words.index("--model") + 1] if "--model" in words[:-1] else "tiny")
    classes = classes or (config_class,)
    defaults = getattr(sys.modules[classes[0].__module__], "DEFAULTS", {})
    table = runs.model_defaults(model, defaults) or {}
    grouped = {_in_groups(cls, default, table): cls for cls in classes}
    about = f"{introduction(description)}\n\n The defaults shown are those of --model {model}."
    found = tyro.cli(reduce(or_, grouped), description=about, args=args, config=(
        tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff), **more)
    found, *rest = found if more.get("return_unknown_args") else (found,)
    flat = {k: v for part in vars(found).values() for k, v in vars(part).items()}
    config = grouped[type(found)](**flat)
    return (config, *rest) if rest else config


def _in_groups(cls: type, default, table: dict) -> type:
    """A class with one nested class for each group of flags, each flag with its help."""
    import tyro

    types, about, groups = get_type_hints(cls, include_extras=True), described(cls), {}
    for field in dataclasses.fields(cls):
        group, text = about[field.name]
        value = getattr(default, field.name, field.default)
        shown = table.get(field.name) if value is None else value
        hint = "" if shown in (None, "") or shown is False else (
            f"(default: {textwrap.shorten(str(shown), 40)})")
        alias = (ALIASES[field.name],) if field.name in ALIASES else None
        flag = tyro.conf.arg(help=text, help_behavior_hint=hint, aliases=alias)
        groups.setdefault(group, []).append((field.name, Annotated[types[field.name], flag], value))
    parts = []
    for name in sorted(groups, key=lambda name: LAST.index(name) if name in LAST else -1):
        part = dataclasses.make_dataclass(name, groups[name], frozen=True)
        parts.append((f"{name}_", Annotated[part, tyro.conf.arg(name=name)], part()))
    return dataclasses.make_dataclass(cls.__name__, parts, frozen=True)


# -------------------------------------------------------------------------------------- defaults


def resolve(config, defaults: dict[str, dict]):
    """Fills the fields of a script's Config left at None from its model's defaults.

    The system text is the one that the adapter was trained under, and so are rank and alpha, so
    that a chain of stages trains one adapter; where --model is left out, the model is the adapter's
    too. With --time-limit and without --steps the clock alone
    decides, so steps stays None.
    """
    system = lora.read_prompt(config.adapter or config.weights, config.system)
    config = dataclasses.replace(config, model=hub.short_name(config.model), system=system)
    if config.adapter and config.model == "tiny" and not config.weights:  # --model is left out
        model, weights = hub.trained_on(config.adapter)
        config = dataclasses.replace(config, model=model, weights=weights)
    if hasattr(config, "out"):
        config = dataclasses.replace(config, out=str(hub.output(config.out)))
    if (table := runs.model_defaults(config.model, defaults)) is None:
        raise ValueError(f"--model {config.model}: expected one of {', '.join(gemma.CONFIGS)}")
    if config.adapter and getattr(config, "lora_rank", 0) is None:
        table = table | lora.read_size(hub.find_adapter(config.adapter))
    unset = {k: v for k, v in table.items() if getattr(config, k) is None}
    if runs.parse_time(getattr(config, "time_limit", None)) is not None:
        unset.pop("steps", None)
    config = dataclasses.replace(config, **unset)
    check_ranges(config)
    check_name(config)
    return config


RANGES = (  # the least and the largest value that make sense, and the fields
    (1, math.inf, "batch_rows micro_rows max_length max_prompt max_new slots prompts inner_epochs "
     "reward_threads minibatches"),
    (0, math.inf, "lora_rank steps learning_rate weight_decay kl_coef entropy_coef clip_high "
     "dual_clip cispo_cap is_cap is_floor off_policy_mask top_k repetition resample rows eval_rows "
     "eval_every eval_accuracy save_every keep show show_every log_samples reward_timeout "
     "max_drift reward_coef value_clip value_lr value_warmup temperature"),
    (0, 1, "warmup final_lr adam_b2 prompt_loss clip_low min_p max_missing overlong_buffer "
     "on_policy gamma lam"),
    (1e-9, 1, "top_p"), (0, 0.999, "lora_dropout"),
    (1e-9, math.inf, "clip_norm sapo_pos sapo_neg"),
)


def check_ranges(config) -> None:
    """Raises ValueError for a number that makes no sense, before anything is loaded."""
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(config, name, None)
            if value is not None and not low <= value <= high:
                flag = "--" + name.replace("_", "-")
                raise ValueError(f"{flag} {value}: expected {low:g} to {high:g}")
    if hasattr(config, "lora_targets"):
        lora.parse_targets(config.lora_targets)
        if config.base == "int8" and not config.lora_rank:
            raise ValueError("--base int8 with --lora-rank 0: int8 weights cannot be trained; "
                             "leave one of the two out")


def check_name(config) -> None:
    """Raises ValueError if --model names another size than that of the given folder.

    The name picks the defaults: a Gemma of a billion weights must not get those of the tiny model.
    """
    folder = Path(config.weights) if config.weights else None
    if folder is None and config.adapter:
        folder = hub.find_adapter(config.adapter)
    if folder is None or not (folder / "config.json").exists():
        return
    cfg, named = gemma.read_config(folder), gemma.CONFIGS[hub.base_name(config.model)]
    if cfg.n_params > max(10**8, 1.5 * named.n_params):
        raise ValueError(f"--model {config.model} has {named.n_params:,} weights, but {folder} "
                         f"holds {cfg.n_params:,}: name its size with --model")


FACTS = ("model", "data", "steps", "learning_rate", "lora_rank", "samples", "max_new", "margin")


def show_config(config) -> None:
    """Prints the settings that were given, and five that matter of the others."""
    values = dataclasses.asdict(config)
    given = runs.given(values, type(config))
    others = [k for k in FACTS if k not in given and values.get(k) is not None][:5]
    for title, names in (("given", given), ("default", others)):
        words = []
        for name in names:
            flag, value = "--" + name.replace("_", "-"), values[name]
            text = textwrap.shorten(str(value), 60, placeholder="…")
            words.append(flag if value is True else f"{flag}\u00a0{text}".replace(" ", "\u00a0"))
        lines = textwrap.wrap(" ".join(words), 70, break_on_hyphens=False) or ["nothing"]
        for n, line in enumerate(lines):
            runs.say(f"{title if n == 0 else '':9}{line}".replace("\u00a0", " "))
    runs.say(f"{'all':9}{config.out}/config.json")


def begin(config) -> Mesh:
    """What every training script does before it loads anything -> the mesh over all devices."""
    hosts.connect(config)
    if hosts.index == 0:
        runs.claim(Path(config.out))
    runs.compilation_cache()
    show_config(config)
    return gemma.all_devices()


def model_config(config) -> gemma.Config:
    """The model's shape, from the config.json of --weights or by name; reads no weights."""
    return shape_of(config.model, config.weights)


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
    if isinstance(specs, P):
        specs = jax.tree.map(lambda _: specs, tree)
    return jax.tree.map(lambda x, s: hosts.put(x, NamedSharding(mesh, s)), tree, specs)


def put_like(tree, like):
    """Puts host arrays on the devices, sharded like the arrays of the same tree `like`."""
    return jax.tree.map(lambda x, now: hosts.put(x, now.sharding), tree, like)


def base_is_sharded(cfg: gemma.Config, config, mesh: Mesh) -> bool:
    """Whether the base is sharded over the mesh rather than copied to every device."""
    if config.shard != "auto" or mesh.size == 1:
        return config.shard == "yes" and mesh.size > 1
    # Training all weights keeps a float32 master, two moments and a gradient of each.
    return copy_is_too_large(cfg, weight_bytes(config) if config.lora_rank else 16, mesh)


def rollouts_are_sharded(cfg: gemma.Config, config, mesh: Mesh) -> bool:
    """Whether decoding reads a sharded base in place instead of gathering a copy per phase."""
    too_large = copy_is_too_large(cfg, weight_bytes(config), mesh)
    return base_is_sharded(cfg, config, mesh) and too_large


def weight_bytes(config) -> int:
    """Bytes of a frozen weight."""
    return 1 if config.base == "int8" else jnp.dtype(config.dtype).itemsize


def copy_is_too_large(cfg: gemma.Config, bytes_per_weight: int, mesh: Mesh) -> bool:
    """Whether a copy of all weights takes over 40 % of a device's memory."""
    device = jax.local_devices()[0] if hosts.count > 1 else mesh.devices.flat[0]
    is_here = device.platform != "cpu" and device in jax.local_devices()  # else compile-only
    limit = ((device.memory_stats() if is_here else None) or {}).get("bytes_limit", 16 * 2**30)
    return cfg.n_params * bytes_per_weight > 0.4 * limit


def make_sampler(cfg: gemma.Config, config, mesh: Mesh):
    """The Sampler of a stage that learns from its own completions."""
    from sampler import Sampler  # here: SFT needs none

    return Sampler(cfg, mesh, slots=config.slots, max_prompt=config.max_prompt,
                   max_new=config.max_new, cached_prompts=min(16, max(4, config.slots // 4)),
                   dtype=jnp.dtype(config.dtype), shard=rollouts_are_sharded(cfg, config, mesh))


REPLICATED_BYTES = 2.5e9  # weights of a larger frozen model are sharded over the mesh


def frozen_layout(cfg: gemma.Config, mesh: Mesh, int8: bool) -> tuple[jnp.dtype, bool]:
    """(dtype, whether it is sharded) of a judge or a teacher beside the model in training.

    float32 if it is small.
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

    A whole model is kept in the compute dtype, to which a forward pass casts it anyway.
    """
    dtype = jnp.float32 if config.lora_rank else jnp.dtype(config.dtype)
    return jax.tree.map(lambda x: jnp.array(x, dtype, copy=True), trained)


# ----------------------------------------------------------------------------------- the beginning


class Model(NamedTuple):
    """What a stage starts from, on the mesh."""

    cfg: gemma.Config
    tok: data.Tokenizer
    weights: Path  # the folder they came from
    trained: dict
    fixed: dict
    specs: dict  # PartitionSpecs of `trained`
    sharded: bool  # whether the base is sharded over the mesh
    merged: dict | None  # an adapter that was merged into the base
    checksums: dict[str, str]  # of the files that it was read from


def load_model(config, mesh: Mesh) -> Model:
    """Loads the weights and the adapter that a stage starts from, and prints what they are."""
    start = hub.find_start(config.model, config.weights, config.adapter)
    tok = data.Tokenizer(config.tokenizer or start.weights)
    cfg, merged, adapter = gemma.read_config(start.weights), None, None
    if tok.vocab_size > cfg.vocab_size:
        raise ValueError(f"{tok.file} has {tok.vocab_size} tokens, but the embedding of "
                         f"{start.weights} only {cfg.vocab_size} rows")
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
        runs.say(lora.describe(adapter))
        trained, scale = lora.split(adapter)
        fixed = {"base": base} | put(scale, mesh, P())
    specs, _ = partition_specs(cfg, config, sharded)
    kind = f"{mesh.size} {mesh.devices.flat[0].device_kind}"
    where = f"{'sharded over' if sharded else 'on each of'} {kind}"
    if sharded:
        in_place = rollouts_are_sharded(cfg, config, mesh)
        where += "; rollouts read them " + ("in place" if in_place else "from a copy on each")
    runs.say(f"{cfg.n_params:,} weights {where}")
    trained = put(trained, mesh, specs)
    sums = checksums(start, tok, with_weights=not getattr(config, "from_scratch", False))
    return Model(cfg, tok, start.weights, trained, fixed, specs, sharded, merged, sums)


def checksums(start: hub.Start, tok: data.Tokenizer, with_weights: bool = True) -> dict[str, str]:
    """The facts of runs.check_unchanged() about the files of a model, an adapter, a tokenizer."""
    files = [start.weights / "config.json", tok.file]
    for folder in [start.weights, start.adapter] if with_weights else []:
        files += [] if folder is None else sorted(folder.glob("*.safetensors"))
    files += [start.adapter / "adapter_config.json"] if start.adapter else []
    return {f"checksum of {file.name}": runs.file_checksum(file) for file in files}


def facts(config, model: Model, sources: list[list], held_out: list) -> dict[str, str]:
    """What a resumed run must find as it was, beside its flags: the files it reads, the rows."""
    rows = [item.fields for items in sources for item in items]
    sums, own = dict(model.checksums), getattr(config, "reward_file", None)
    if own:
        import rewards  # here: SFT has none

        sums |= {f"checksum of {f.name}": runs.file_checksum(f) for f in rewards.files(None, own)}
    if judge := getattr(config, "judge_weights", None) or getattr(config, "judge", None):
        sums |= {f"checksum of the judge's {file.name}": runs.file_checksum(file)
                 for file in sorted(Path(judge).glob("*.safetensors"))}  # none for an address
    return sums | {
        f"checksum of the rows of --data {config.data}": runs.checksum(rows),
        f"checksum of the held-out rows of {config.eval_data or config.data}":
            runs.checksum(item.fields for item in held_out)}


def continue_from(path: Path, cfg: gemma.Config, config) -> tuple[dict | None, dict | None]:
    """(adapter to continue training or None, adapter to merge into the base or None).

    An adapter whose rank or matrices differ from the config's is merged.
    """
    adapter, targets = lora.load(path, cfg), lora.parse_targets(config.lora_targets)
    if config.lora_rank == lora.rank(adapter) and set(adapter["a"]) == set(targets):
        own = adapter["scale"][targets[0]][0]
        new = lora.scaling(config.lora_alpha, config.lora_rank, config.rslora)
        if not math.isclose(own, new, rel_tol=1e-5):
            runs.say(f"--adapter {path} keeps its own scale of {own:.4g}; the {new:.4g} of "
                     f"--lora-alpha {config.lora_alpha:g} would be a new adapter's")
        return adapter, None
    runs.say(f"--adapter {path} merged into the base: {lora.describe(adapter)}")
    return None, adapter


def new_adapter(cfg: gemma.Config, config) -> dict:
    key = jax.random.key(config.seed)
    return lora.init(cfg, key, config.lora_rank, config.lora_alpha, config.lora_targets,
                     config.rslora)


def load_to_sample(start: hub.Start, config) -> tuple[dict, tuple]:
    """Loads a model only to sample from it -> (arguments of Sampler, (params, adapter))."""
    mesh, dtype = gemma.all_devices(), jnp.dtype(config.dtype)
    cfg = gemma.read_config(start.weights)
    shard = mesh.size > 1 and copy_is_too_large(cfg, weight_bytes(config), mesh)
    cfg, params = gemma.load(start.weights, dtype, mesh, shard, config.base == "int8")
    adapter = None if start.adapter is None else lora.load(start.adapter, cfg)
    if adapter is not None:
        runs.say(lora.describe(adapter))
    return {"cfg": cfg, "mesh": mesh, "dtype": dtype, "shard": shard}, (params, adapter)


# ---------------------------------------------------------------------------------- optimisation


def optimizer(config) -> optax.GradientTransformation:
    """AdamW without the learning rate, which follows the clock and is passed to train_step."""
    return optax.chain(
        optax.clip_by_global_norm(config.clip_norm),
        optax.scale_by_adam(b2=config.adam_b2),
        optax.add_decayed_weights(config.weight_decay),
    )


def schedule(p: float, config) -> float:
    """Learning rate of the step that begins at progress p: linear warm-up, then cosine.

    With --steps it is the rate at the end of that step, so that the first step is not at 0.
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


def batch_shape(config, mesh: Mesh) -> tuple[int, int]:
    """(micro-batches, rows of a micro-batch over all devices) of an update from packed rows."""
    rows = min(config.micro_rows * mesh.size, config.batch_rows)
    if config.batch_rows % rows or rows % mesh.size:
        raise ValueError(f"--batch-rows {config.batch_rows} is not a multiple of --micro-rows "
                         f"{config.micro_rows} times {mesh.size} devices")
    return config.batch_rows // rows, rows


def packed_programs(config, mesh: Mesh, steps: tuple, state: tuple) -> dict:
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


# ------------------------------------------------------------------------------------ evaluations


def row_reader(config, tok: data.Tokenizer, read):
    """examples.read_example or read_pair with a script's --system and --max-length as its limit."""

    def limited(row: dict):
        item = read(row, tok, config.system)
        if item.n_tokens > config.max_length:
            raise data.TooLong(item.n_tokens, config.max_length, "--max-length")
        return item

    return limited


def keep_held_out(config, items: list) -> None:
    """Writes the held-out rows into the run folder, so that eval.py can read the same rows."""
    if hosts.index == 0:
        file = Path(config.out) / "held_out.jsonl"
        with runs.writing(file):
            runs.replace_file(file, runs.to_jsonl(item.fields for item in items))


class HeldOut:
    """The evaluation of SFT and SimPO: the loss of held-out rows, and greedy answers.

    It answers --eval-accuracy problems and prints --show of them. A sampler takes minutes to
    compile on a TPU, so --show alone builds none if --eval-every is 0.
    """

    def __init__(self, config, mesh: Mesh, model: Model, items: list, eval_step):
        self.config, self.mesh, self.model, self.eval_step = config, mesh, model, eval_step
        import examples  # here: only SFT and SimPO pack such batches

        n_rows = config.micro_rows * mesh.size
        self.batches = examples.eval_batches(items, config.max_length, n_rows)
        n = max(config.eval_accuracy, config.show if config.eval_every else 0)
        self.sampler = None
        if n and items:
            import rollouts  # here: most of SFT needs no sampler

            problems = [rollouts.read_problem(item.fields, model.tok, config.system)
                        for item in items[:n]]
            self.problems, self.rollouts = problems, rollouts
            in_place = rollouts_are_sharded(model.cfg, config, mesh)
            self.sampler = rollouts.Sampler(
                model.cfg, mesh, slots=min(8 if in_place else 64, len(problems)),
                max_prompt=max(len(problem.prompt) for problem in problems),
                max_new=config.max_new, dtype=jnp.dtype(config.dtype), shard=in_place)

    def measure(self, trained: dict, step: int, run: runs.Run) -> float:
        """Logs and prints the metrics -> the checkpoint's score: accuracy, or minus the loss."""
        model, rows = self.model, []
        with run.budget.measure("eval"):
            sums = [self.eval_step(trained, model.fixed, put(batch, self.mesh, P("data")))
                    for batch in self.batches]
            sums = jax.tree.map(lambda *x: float(np.sum(x)), *jax.device_get(sums))
            count = sums.pop("count")
            metrics = {f"eval_{k}": x / count for k, x in sums.items()}
            if self.sampler is not None:
                weights = forward_weights(trained, model.fixed, jnp.dtype(self.config.dtype))
                rows = self.rollouts.answer(self.sampler, weights, model.tok, self.problems)
                if n := self.config.eval_accuracy:
                    metrics |= self.rollouts.accuracy(rows[:n])
        run.log(step, metrics)
        run.log_samples(step, rows[: self.config.show])
        for row in rows[: self.config.show]:
            runs.say(f"  {row['prompt']}\n  -> {row['completion']}")
        return metrics.get("eval_accuracy", -metrics["eval_loss"])


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
        import model_files

        lora.save(folder, adapter, cfg, str(model.weights), getattr(config, "lora_dropout", 0.0),
                  model_files.is_multimodal(model.weights))
    else:
        stops = tuple(sorted({*cfg.eos_token_id, *tok.stop_ids}))  # a base model has only <eos>
        gemma.save(folder, dataclasses.replace(cfg, eos_token_id=stops), weights)
        tok.save(folder, config.system)
    lora.write_prompt(folder, config.system)
