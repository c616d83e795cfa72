"""Does it fit, and how fast is it? The training scripts' own jitted functions, run or compiled.

    python bench.py --model gemma3-1b --rows 8 --length 1024    # measured on the devices at hand
    python bench.py --weights folder/with/a/config.json --dtype float32 --remat none --json
    python bench.py --phases grpo --mean-length 40              # completions of many lengths
    python bench.py --model gemma3-1b --target v5e:2x4          # compiled for an absent TPU
    python train_grpo.py --model gemma3-1b --plan               # the same, with a script's flags

Measuring: sft is one LoRA (or full) update; grpo one step of --prompts times --group completions,
its rollout, reference log-probs and update (one inner epoch) timed apart. Weights and tokens are
random; nothing is loaded but config.json. Random logits are nearly uniform, so a share 1/mean of
the vocabulary as stop tokens makes lengths geometric; without --mean-length every completion is
--new-tokens long.

Compiling needs no TPU, only its compiler, the package libtpu. Where that has no wheel (macOS,
Windows) the arguments of each program are added up from their shapes, and temporaries unknown.

1. Memory is what the compiler reports of a core; a program that is too large does not compile. What
   the script keeps there besides (optimizer, judge, ...) is the column "beside". Arguments and
   temporaries are more than a program needs ("at most"), its peak is a little less: gaps between
   arrays are not in it ("at least").
2. FLOPs, bytes to and from HBM and over the interconnect are counted in the traced program, see
   `count`: a matrix product or a reduction reads its operands and writes its result, all else is
   taken to be fused into these. (XLA's own count takes the body of every loop once.)
3. A phase takes as long as the slowest of the three does at the device's peak, the roofline.
   Nothing runs that fast: what a session buys is for a share of it, EFFICIENCY, an assumption.

Prints a table and, with --json, one JSON object last.
"""

import contextlib
import dataclasses
import importlib.metadata
import json
import math
import os
import re
import resource
import statistics
import sys
import time
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.extend.core import Jaxpr
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gemma
import rewards
import runs
import train_grpo
import train_sft
import train_simpo
from eval import Problem

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields left at None: measuring takes them from MEASURED, compiling from the scripts."""

    model: str = "gemma3-1b"
    """Which Gemma's shapes."""
    weights: str | None = None
    """Folder whose config.json gives the shapes instead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the base and the activations."""
    phases: str | None = None
    """What to measure, sft and grpo (peak memory is that of all of them), or to compile: sft,
    simpo, grpo, or one of their phases, as grpo_update."""
    lora_rank: int | None = None
    """Rank of the adapter; 0: every weight is trained."""
    remat: Literal["none", "attention", "layer", "auto"] | None = None
    """What the backward pass computes again."""
    micro_rows: int | None = None
    """Rows a device computes at a time; measuring: in SFT all of its rows, in GRPO 4."""
    repeats: int = 5
    """Timed steps; the median is printed."""
    json: bool = False
    """Print a JSON object as the last line."""

    # compiling
    target: str | None = None
    """Compile for a TPU that is not here, v5e:2x4 for Kaggle's, and run nothing."""
    time_limit: str | None = None
    """How long a session is; default: 9h."""
    judge: str | None = None
    """GRPO's judge on the mesh, a Gemma's name."""

    # sft and simpo
    rows: int | None = None
    """Rows of one update, over all devices; measuring: none of their tokens is padding."""
    length: int | None = None
    """Tokens in a row."""

    # grpo
    prompts: int | None = None
    """Prompts of one step, over all devices."""
    group: int | None = None
    """Completions of each."""
    prompt_length: int | None = None
    """Tokens of a prompt."""
    new_tokens: int | None = None
    """Tokens of the longest completion."""
    mean_length: int = 0
    """Measuring: mean length of completions before the cut at --new-tokens; 0: all that long."""
    slots: int | None = None
    """Completions that a device writes at a time."""
    pack_length: int | None = None
    """Tokens in a packed row of the update; measuring: the longest sequence."""
    kl_coef: float | None = None
    """0: no reference pass."""


MEASURED = dict(
    dtype="bfloat16", phases="sft,grpo", lora_rank=16, remat="auto", rows=8, length=1024,
    prompts=8, group=8, prompt_length=64, new_tokens=128, slots=64, kl_coef=0.04,
)


EFFICIENCY = 0.5  # share of the roofline taken to be reached in what a session buys


class Peak(NamedTuple):
    """Of one device, as its maker publishes them; per second where that makes sense."""

    flops: float  # bfloat16, dense
    bytes: float  # to and from its memory
    ici: float  # bytes that come in from the other devices of the mesh
    hbm: float  # bytes that a program may have; 0: as the device itself says


PEAKS = {  # by jax's device_kind
    # cloud.google.com/tpu/docs/v5e. 400 GB/s a chip over four ports, both ways; two of the ports
    # are used in a slice of 2x4. A program gets 15.75 GiB of the 16 (its compiler says so).
    "TPU v5 lite": Peak(197e12, 819e9, 100e9, 15.75 * 2**30),
    # nvidia.com/en-us/data-center/h100, SXM, without sparsity
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12, 450e9, 0),
}

# -------------------------------------------------------------------------------------- counting


class Work(NamedTuple):
    """What one device does. `loops` come besides: loops whose trips are not known beforehand."""

    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # to and from its memory
    ici: float = 0.0  # bytes that come in from other devices
    loops: tuple = ()  # (trips at most, Work of one trip)

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, n: float):
        loops = tuple((most, work * n) for most, work in self.loops)
        return Work(self.flops * n, self.bytes * n, self.ici * n, loops)

    def run(self, *trips: float) -> "Work":
        """All of it: loops make so many trips, loops in them the next number; left out, at most. A
        float is a share of that."""
        total, (here, *inner) = self._replace(loops=()), trips or (1.0,)
        for most, work in self.loops:
            n = math.ceil(here * most) if isinstance(here, float) else here
            total += work.run(*inner) * n
        return total


def size(x) -> int:
    """Bytes of what has a shape."""
    return math.prod(x.shape) * x.dtype.itemsize


def count(jaxpr: Jaxpr, n: int, inside: bool = False) -> Work:
    """The work of a traced program on each of n devices.

    Outside shard_map only the optimizer is, which `step_work` adds.
    """
    work = Work()
    for eqn in jaxpr.eqns:
        name, params = eqn.primitive.name, eqn.params
        parts = [x for p in params.values() for x in (p if isinstance(p, list | tuple) else [p])]
        parts = [x for x in (getattr(x, "jaxpr", x) for x in parts) if isinstance(x, Jaxpr)]
        parts = [count(x, n, inside or name == "shard_map") for x in parts]
        if name == "scan":
            work += parts[0] * params["length"]
        elif name == "while":
            most = max((x.shape[0] for x in (v.aval for v in eqn.outvars) if x.ndim > 1), default=1)
            body = count(params["body_jaxpr"].jaxpr, n, inside)
            work += Work(loops=((most, body),))
        elif name == "cond":
            work += max(parts, key=lambda part: part.run())
        elif name == "pallas_call":
            work += kernel(eqn, parts)
        elif parts:
            work += sum(parts, Work())
        elif inside:
            work += leaf(name, params, [v.aval for v in eqn.invars], eqn.outvars[0].aval, n)
    return work


def leaf(name: str, params: dict, ins: list, out, n: int) -> Work:
    """The work of one operation of a traced program."""
    if name == "dot_general":
        (contract, _), _ = params["dimension_numbers"]
        flops = 2 * math.prod(out.shape) * math.prod(ins[0].shape[i] for i in contract)
        return Work(flops, sum(map(size, ins[:2])) + size(out))
    if name.startswith(("reduce_max", "reduce_sum", "argm", "top_k", "sort", "cum")):
        return Work(0, size(ins[0]))
    if name == "gather":
        return Work(0, 2 * size(out))
    if name.startswith(("scatter", "dynamic_update_slice")):
        return Work(0, 2 * size(ins[2] if name.startswith("scatter") else ins[1]))
    if name.startswith("psum") and "scatter" not in name:  # around a ring: scatter, then gather
        return Work(0, 0, 2 * sum(map(size, ins)) * (n - 1) / n)
    if name.startswith(("all_gather", "all_to_all")):
        return Work(0, 2 * size(out), size(out) * (n - 1) / n)
    if name in ("reduce_scatter", "psum_scatter"):
        return Work(0, 2 * size(ins[0]), size(ins[0]) * (n - 1) / n)
    return Work()


def kernel(eqn, parts: list[Work]) -> Work:
    """The work of a Pallas kernel: what it says itself, else its whole grid, masked blocks too."""
    if (cost := eqn.params.get("cost_estimate")) is not None:
        return Work(cost.flops, cost.bytes_accessed)
    flops = sum(part.flops for part in parts) * math.prod(eqn.params["grid_mapping"].grid)
    return Work(flops, sum(size(v.aval) for v in (*eqn.invars, *eqn.outvars)))


# ------------------------------------------------------------------------------------- measuring


def random_weights(shapes):
    """Random floats of the given shapes and shardings."""
    one = lambda s: jax.random.normal(jax.random.key(0), s.shape, s.dtype) * 0.02
    make = jax.jit(lambda: jax.tree.map(one, shapes),
                   out_shardings=jax.tree.map(lambda s: s.sharding, shapes))
    return make()


def zeros(shapes):
    return jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype, device=s.sharding), shapes)


def sft(config: Config, cfg: gemma.Config, mesh: Mesh) -> dict:
    """Times one SFT update; model FLOPs are 4N a token of a device, 6N without LoRA."""
    train_step, shapes = train_sft.programs(train_sft.Config(
        model=config.model, weights=config.weights, dtype=config.dtype, batch_rows=config.rows,
        micro_rows=config.micro_rows or config.rows // mesh.size, max_length=config.length,
        lora_rank=config.lora_rank, remat=config.remat,
    ), mesh)["train_step"]
    (trained, fixed), opt = random_weights((shapes[0], shapes[2])), zeros(shapes[1])
    shape, key, seconds = shapes[3]["tokens"].shape, jax.random.key(0), []
    ones = np.ones(shape, np.int32)
    batch = train_sft.place({
        "tokens": np.random.default_rng(0).integers(3, cfg.vocab_size, shape, np.int32),
        "mask": ones, "segments": ones, "positions": np.cumsum(ones, -1, np.int32) - 1,
    }, mesh, P(None, "data"))
    for _ in range(config.repeats + 1):
        start = time.perf_counter()
        trained, opt, metrics = train_step(trained, opt, fixed, batch, np.float32(1e-5), key)
        jax.block_until_ready((trained, metrics))
        seconds.append(time.perf_counter() - start)
    step_s, n_tokens = statistics.median(seconds[1:]), config.rows * config.length
    model_flops = (4 if config.lora_rank else 6) * cfg.n_params * n_tokens / mesh.size
    return {
        "sft_tokens_per_s": n_tokens / step_s,
        "sft_step_s": step_s,
        "sft_compile_s": seconds[0] - step_s,
        "sft_model_flops_per_s": model_flops / step_s,
    }


def grpo(config: Config, cfg: gemma.Config, mesh: Mesh) -> dict:
    """Times the phases of one GRPO step, as train_grpo.main runs them; medians."""
    longest = config.prompt_length + config.new_tokens
    c = train_grpo.resolve(train_grpo.Config(
        model=config.model, weights=config.weights, dtype=config.dtype, prompts=config.prompts,
        group=config.group, max_prompt=config.prompt_length, max_new=config.new_tokens,
        slots=config.slots, pack_length=config.pack_length or longest,
        micro_rows=config.micro_rows or 4, lora_rank=config.lora_rank, remat=config.remat,
        kl_coef=config.kl_coef, is_cap=0.0,
    ))
    programs = train_grpo.programs(c, mesh)
    train_step, shapes = programs["train_step"]
    (trained, fixed), opt = random_weights((shapes[0], shapes[2])), zeros(shapes[1])
    reference = jax.tree.map(jnp.copy, trained)
    sampler, dtype = train_grpo.make_sampler(cfg, c, mesh), jnp.dtype(config.dtype)
    rng = np.random.default_rng(0)
    n_stop = cfg.vocab_size // config.mean_length if config.mean_length else 0
    score = rewards.Scored(0.0, {}, {})
    step_bytes = traced_work(*programs["decode"], mesh.size)[1].loops[0][1].bytes
    steps = []
    for step in range(config.repeats + 1):
        prompts = rng.integers(n_stop, cfg.vocab_size, (c.prompts, c.max_prompt)).tolist()
        marks, stats = [time.perf_counter()], {}
        params, adapter = train_sft.join(trained, fixed, dtype)
        rollouts = list(sampler.sample(params, prompts, c.group, lora=adapter, step=step,
                                       stop=range(n_stop), stats=stats))
        marks.append(time.perf_counter())
        problems = [Problem("", tuple(ids), "", None, "auto", (), "") for ids in prompts]
        samples = [train_grpo.Sample(problems[r.prompt], r.prompt, r, "", None, False, score, 1.0)
                   for r in rollouts]
        weights = train_grpo.token_weights(samples, c)
        host, n_micro, _ = train_grpo.pack(samples, weights, c, mesh.size)
        batch, n = train_sft.place(host, mesh, P(None, "data")), np.int32(n_micro)
        if c.kl_coef:
            batch["ref"] = programs["reference"][0](reference, fixed, batch, n)
            jax.block_until_ready(batch["ref"])
        marks.append(time.perf_counter())
        trained, opt, metrics, _ = train_step(
            trained, opt, fixed, batch, n, np.bool(True), np.float32(1e-5)
        )
        jax.block_until_ready((trained, metrics))
        marks.append(time.perf_counter())
        rollout_s, reference_s, update_s = np.diff(marks)
        n_tokens = sum(len(r.ids) for r in rollouts)
        n_steps = stats["slot_steps"] / c.slots / mesh.size
        steps.append({
            "rollout_tokens_per_s": n_tokens / rollout_s,
            "rollout_bytes_per_s": n_steps * step_bytes / rollout_s,
            "grpo_step_s": marks[-1] - marks[0],
            "grpo_rollout_s": rollout_s,
            "grpo_reference_s": reference_s,
            "grpo_update_s": update_s,
            "mean_length": n_tokens / len(rollouts),
            "padding": 1 - (host["segments"][:n_micro] > 0).mean(),
        })
    first, *timed = steps
    out = {name: float(np.median([step[name] for step in timed])) for name in first}
    return out | {"grpo_compile_s": first["grpo_step_s"] - out["grpo_step_s"]}


def measure(config: Config) -> dict:
    """Runs what --phases names on the devices at hand, prints and returns the figures."""
    filled = {k: v for k, v in MEASURED.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **filled)
    mesh, cfg, known = gemma.all_devices(), shapes_of(config), {"sft": sft, "grpo": grpo}
    device = mesh.devices.flat[0]
    out = {"device": f"{mesh.size} {device.device_kind}", "jax": jax.__version__}
    for phase in config.phases.split(","):
        if phase not in known:
            raise ValueError(f"--phases {phase}: expected some of {', '.join(known)}")
        out |= known[phase](config, cfg, mesh)
    out["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.platform != "cpu" and (stats := device.memory_stats()):
        out["peak_device_bytes"] = stats["peak_bytes_in_use"]
    if peak := PEAKS.get(device.device_kind):
        tops = {"sft_model_flops_per_s": peak.flops, "rollout_bytes_per_s": peak.bytes}
        out |= {f"{name}_of_peak": out[name] / top for name, top in tops.items() if name in out}
    for name, value in out.items():
        print(f"{name:<30}", value if isinstance(value, str) else f"{value:.4g}")
    return out


# ------------------------------------------------------------------------------------- compiling

SCRIPTS = {"sft": train_sft, "simpo": train_simpo, "grpo": train_grpo}
NAMES = {  # phase of a script: its program, and the flags to lower where that does not fit
    "sft": {"sft": ("train_step", "--micro-rows or --max-length, or take --remat layer"),
            "sft_eval": ("eval_step", "--micro-rows")},
    "simpo": {"simpo": ("train_step", "--micro-rows or --max-length, or take --remat layer"),
              "simpo_eval": ("eval_step", "--micro-rows")},
    "grpo": {"grpo_prefill": ("prefill", "--max-prompt"),
             "grpo_decode": ("decode", "--slots or --max-new"),
             "grpo_reference": ("reference", "--micro-rows"),
             "grpo_update": ("train_step", "--micro-rows or --pack-length, or take --remat layer"),
             "grpo_judge": ("judge", "--judge, to a smaller one")},
}
ENVIRONMENT = {  # so that libtpu looks for no TPU, minds no other process that has it, says little
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}


def find_libtpu() -> str | None:
    """The library's version, once JAX can find it; None, after saying how to get it, if it cannot.

    It is imported, or lies in $LIBTPU_DIR or ~/.cache/libtpu-VERSION: not in site-packages, or JAX
    would try it at every start.
    """
    wanted = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    version = re.search(r"==([\d.]*\d)", wanted[0])[1]  # "libtpu==0.0.42.*; extra == 'tpu'"
    folder = os.environ.get("LIBTPU_DIR", f"~/.cache/libtpu-{version}")
    for place in (Path(folder).expanduser(), *map(Path, sys.path)):
        if (library := place / "libtpu" / "libtpu.so").exists():
            os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
            found = [d.name for d in place.glob("libtpu-*.dist-info")]
            return found[0].split("-")[1].removesuffix(".dist") if found else version
    runs.say("the compiler for TPUs is not here, so memory is added up from shapes, without "
             "temporaries. Where it has a wheel (Linux): pip install --no-deps --target "
             f"{folder} libtpu=={version}.*")
    return None


def mesh_of(target: str | None) -> tuple[Mesh, str | None]:
    """(the mesh to compile for, libtpu's version): of a target, else of the accelerator here.

    Where neither is, Kaggle's TPU; without its compiler, a mesh of as many CPU devices.
    """
    if target is None and jax.default_backend() != "cpu":
        return gemma.all_devices(), None
    target = target or "v5e:2x4"
    if not (shape := re.fullmatch(r"v5e:(\d+)x(\d+)", target)):
        raise ValueError(f"--target {target}: expected v5e: and a shape, as in v5e:2x4")
    if version := find_libtpu():
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
        return gemma.all_devices(topology.devices), version
    n = int(shape[1]) * int(shape[2])
    if len(jax.devices("cpu")) < n:
        raise ValueError(f"--target {target}: set XLA_FLAGS=--xla_force_host_platform_device_count="
                         f"{n}, JAX has begun with fewer")
    return gemma.all_devices(jax.devices("cpu")[:n]), None


def prepare(target: str | None) -> None:
    """What must be set before JAX looks for devices; a TPU that is here and meant is left alone."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if target or not chips:
        os.environ |= {k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()}
    if target:
        jax.config.update("jax_platforms", "cpu")
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # it has looked already
            jax.config.update("jax_num_cpu_devices", 8)


def traced_work(function, args, n: int) -> tuple[Any, Work]:
    """A jitted function traced for its argument shapes, and its work on each of n devices."""
    traced = function.trace(*args)
    return traced, count(traced.jaxpr.jaxpr, n)


def memory(traced) -> dict:
    """Bytes of a program on one core as its compiler reports them."""
    try:
        compiled = traced.lower().compile()
    except jax.errors.JaxRuntimeError as e:
        needed = re.search(r"hbm.*?([\d.]+)([GM])\)? (?:of|exceeds)", str(e), re.I | re.S)
        if not needed and "CompileTimeHbmOom" not in str(e):
            raise
        unit = {"G": 2**30, "M": 2**20}
        return {"needs_bytes": float(needed[1]) * unit[needed[2]] if needed else None}
    m, cost = compiled.memory_analysis(), compiled.cost_analysis()
    return {
        "arguments_bytes": m.argument_size_in_bytes,
        "temporaries_bytes": m.temp_size_in_bytes,
        "output_bytes": m.output_size_in_bytes,
        "aliased_bytes": m.alias_size_in_bytes,
        "total_bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + m.output_size_in_bytes
        - m.alias_size_in_bytes,
        "peak_bytes": m.peak_memory_in_bytes,
        "compiler_flops": cost.get("flops") if isinstance(cost, dict) else None,  # loops once
    }


def tree_bytes(*trees) -> int:
    """Bytes of arrays on one device; arguments that are none (a config) count nothing."""
    total = 0
    for x in jax.tree.leaves(trees):
        if getattr(x, "sharding", None) is not None:
            x = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        total += size(x) if isinstance(x, jax.ShapeDtypeStruct | np.ndarray) else 0
    return total


def beside(program: str, programs: dict) -> int:
    """Bytes that a script keeps on a core while one of its programs runs, not as its arguments."""
    held = dict(zip(("trained", "opt", "fixed"), programs["train_step"][1], strict=False))
    uses = {
        "train_step": {"trained", "opt", "fixed"},
        "eval_step": {"trained", "fixed"},
        "reference": {"reference", "fixed"},
        "judge": {"judge"},
    }.get(program, set())
    if "reference" in programs:
        held["reference"] = programs["reference"][1][0]  # the starting adapter
    if "judge" in programs:
        held["judge"] = programs["judge"][1][0]
    if program in ("prefill", "decode", "judge"):  # they take turns
        _, _, params, _, _, shelf, _, state = programs["decode"][1]
        same = tree_bytes(params) == tree_bytes(held["fixed"].get("base"))
        held |= {"shelf": shelf, "state": state} | ({} if same else {"copy": params})
        if program != "judge":
            uses = {"shelf", "copy"} | ({"trained", "fixed"} if same else set())
            uses |= {"state"} if program == "decode" else set()
    return tree_bytes([v for k, v in held.items() if k not in uses])


def step_work(script: str, works: dict[str, Work], programs: dict, config, n: int) -> dict:
    """What each phase of one step does on a core: every prompt and completion at its longest."""
    trained, opt = programs["train_step"][1][:2]
    adam = Work(0, 3 * tree_bytes(trained) + 2 * tree_bytes(opt))  # with the gradient
    if script != "grpo":
        return {script: works["train_step"].run() + adam}
    n_samples, here = config.prompts * config.group, -(-config.prompts * config.group // n)
    rows = len(train_grpo.rows_of([config.max_prompt] * config.prompts, [
        [config.max_new] * config.group] * config.prompts, config.pack_length))
    n_micro = -(-rows // (config.micro_rows * n))
    computed = n_micro * config.micro_rows * n * config.pack_length
    wanted = n_samples * config.max_new / computed  # the share of tokens that need logits
    decode = works["decode"].loops[0][1]
    step, admit = decode._replace(loops=()), decode.loops[0][1]
    phases = {
        "grpo_prefill": works["prefill"].loops[-1][1] * -(-config.prompts // n),
        "grpo_decode": step * (-(-here // config.slots) * config.max_new) + admit.run() * here,
        "grpo_update": (works["train_step"].run(n_micro, wanted) + adam) * config.inner_epochs,
    }
    if "reference" in works:
        phases["grpo_reference"] = works["reference"].run(n_micro, wanted)
    if "judge" in works:
        rows = programs["judge"][1][4]["n_B"].shape[0]
        phases["grpo_judge"] = works["judge"].run() * -(-n_samples // rows)
    return phases


def roofline(work: Work, peak: Peak) -> tuple[float, str]:
    """(seconds, what they are spent on) at the device's peaks."""
    times = {"FLOPs": work.flops / peak.flops, "HBM": work.bytes / peak.bytes,
             "ICI": work.ici / peak.ici}
    return max((s, name) for name, s in times.items())


def shapes_of(config) -> gemma.Config:
    """The model of a Config: of --weights' config.json, else by name. No weights are needed."""
    if config.weights:
        return gemma.read_config(config.weights)
    if (name := train_sft.base_name(config)) not in gemma.CONFIGS:
        raise ValueError(f"--model {config.model}: expected one of {', '.join(gemma.CONFIGS)}")
    return gemma.CONFIGS[name]


def plan(script: str, config, target: str | None = None, only: tuple[str, ...] = ("",)) -> dict:
    """Compiles a script's programs, prints what they need and how far the time goes; returns it.

    config: the script's own. only: phases to compile, all that begin so; the others are counted.
    """
    prepare(target)
    module = SCRIPTS[script]
    config = module.resolve(config)
    cfg = shapes_of(config)
    mesh, version = mesh_of(target)
    compiles = mesh.devices.flat[0].platform != "cpu"
    kind = mesh.devices.flat[0].device_kind if compiles else "TPU v5 lite"
    peak, programs = PEAKS.get(kind), module.programs(config, mesh)
    target = (target or "v5e:2x4") if version or not compiles else None
    out = {"target": target, "device": f"{mesh.size} {kind}", "jax": jax.__version__,
           "libtpu": version, "hbm_bytes": {}, "phases": {}}
    trained = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights trained"
    where = "split over" if train_sft.is_sharded(cfg, config, mesh) else "on each of"
    print(f"train_{script}.py: {config.model}, {trained}, the base in {config.dtype} {where} "
          f"{out['device']}; JAX {out['jax']}, libtpu {version or 'none'}")
    works = {}
    for phase, (program, flags) in NAMES[script].items():
        if program not in programs:
            continue
        traced, works[program] = traced_work(*programs[program], mesh.size)
        if phase.startswith(only):
            row = {"flags": flags, "arguments_bytes": tree_bytes(programs[program][1])}
            if compiles:
                runs.say(f"compiling {phase}")
                row |= memory(traced)
            row["beside_bytes"] = beside(program, programs)
            total = row.get("total_bytes", row.get("needs_bytes", row["arguments_bytes"]))
            row["hbm_bytes"] = None if total is None else total + row["beside_bytes"]
            least = row.get("peak_bytes") or total
            row["least_bytes"] = None if least is None else least + row["beside_bytes"]
            out["phases"][phase], out["hbm_bytes"][phase] = row, row["hbm_bytes"]
    for phase, work in step_work(script, works, programs, config, mesh.size).items():
        row = out["phases"].setdefault(phase, {})
        row |= {"flops": work.flops, "bytes": work.bytes, "ici_bytes": work.ici}
        if peak:
            row["roofline_s"], row["bound"] = roofline(work, peak)
    show_phases(out["phases"], peak.hbm if peak else 0, compiles)
    if not peak:
        runs.say(f"the peaks of a {kind} are not known here, so nothing is said of time")
        return out
    out["step_s"] = sum(row.get("roofline_s", 0.0) for row in out["phases"].values()) / EFFICIENCY
    out["session_s"] = runs.parse_time(config.time_limit or "9h")
    out["session"] = session(script, config, out["step_s"], out["session_s"])
    return out


COLUMNS = {  # of the table, a line for each phase: what of it, in which unit
    "arguments": ("arguments_bytes", 2**30), "temporaries": ("temporaries_bytes", 2**30),
    "output": ("output_bytes", 2**30), "aliased": ("aliased_bytes", 2**30),
    "beside": ("beside_bytes", 2**30), "at least": ("least_bytes", 2**30),
    "at most": ("hbm_bytes", 2**30), "TFLOP": ("flops", 1e12), "HBM GB": ("bytes", 1e9),
    "ICI GB": ("ici_bytes", 1e9), "roofline ms": ("roofline_s", 1e-3),
}


def show_phases(phases: dict, limit: float, compiles: bool) -> None:
    """Prints what every program takes of a core and of time, and whether it is there."""
    print("\nOn each core: GiB " + ("as the compiler reports them" if compiles else "of the "
          "arguments alone, by their shapes (temporaries come on top)")
          + "; what one step computes and moves, counted from the shapes")
    columns = {k: v for k, v in COLUMNS.items() if compiles or k != "at most"}
    table = [["", *columns, "bound by"]]
    for name, row in phases.items():
        numbers = [None if row.get(k) is None else row[k] / unit for k, unit in columns.values()]
        table.append([name, *("" if x is None else f"{x:,.2f}" for x in numbers),
                      row.get("bound", "")])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for first, *others in table:
        cells = [x.rjust(width) for x, width in zip(others, widths[1:], strict=True)]
        print("  ".join([first.ljust(widths[0]), *cells]))
    there = {k: row for k, row in phases.items() if "hbm_bytes" in row}
    most = {k: row["hbm_bytes"] or math.inf for k, row in there.items()}  # None: far too much
    for name in (name for name in there if limit and most[name] > limit):
        row = there[name]
        least, has = row["least_bytes"] or math.inf, f"a core has {limit / 2**30:.2f}"
        if least > limit:
            print(f"{name} does not fit: needs {least / 2**30:.2f} GiB or more, {has}; "
                  f"lower {row['flags']}")
        else:
            print(f"{name} may not fit: needs {least / 2**30:.2f} to {most[name] / 2**30:.2f} GiB, "
                  f"{has}; if so, lower {row['flags']}")
    if compiles and most and max(most.values()) <= limit:
        print(f"It fits: at most {max(most.values()) / 2**30:.2f} of {limit / 2**30:.2f} GiB.")


def session(script: str, config, step_s: float, seconds: float) -> dict:
    """Prints and returns what a session buys: whole steps, and what they hold."""
    steps = int(seconds / step_s)
    if script == "grpo":
        n = config.prompts * config.group
        bought, n_tokens = {"steps": steps, "rollouts": steps * n}, n * config.max_new
        what = (f"{config.prompts} prompts of {config.max_prompt} tokens, {config.group} "
                f"completions of {config.max_new} each")
    else:
        bought, n_tokens = {"steps": steps}, config.batch_rows * config.max_length
        what = f"{config.batch_rows} rows of {config.max_length} tokens"
    bought["tokens"] = steps * n_tokens
    print(f"\nAt {EFFICIENCY:.0%} of the roofline (assumed) a step of {what} takes {step_s:.2f} s: "
          f"{n_tokens / step_s:,.0f} tokens/s.\n{seconds / 3600:g} h are "
          + ", ".join(f"{v:,} {k}" for k, v in bought.items())
          + ", less what compiling, evaluations and checkpoints take.")
    if config.steps:
        print(f"The {config.steps} steps asked for: {config.steps * step_s / 3600:.2f} h.")
    return bought | {"tokens_per_s": n_tokens / step_s}


def compile_for(config: Config) -> dict:
    """What --phases names of the training scripts, compiled for --target."""
    common = {"model": config.model, "weights": config.weights, "dtype": config.dtype,
              "lora_rank": config.lora_rank, "remat": config.remat,
              "micro_rows": config.micro_rows, "time_limit": config.time_limit}
    rows = {"batch_rows": config.rows, "max_length": config.length}
    fields = {"sft": rows, "simpo": rows, "grpo": {
        "prompts": config.prompts, "group": config.group, "max_prompt": config.prompt_length,
        "max_new": config.new_tokens, "slots": config.slots, "pack_length": config.pack_length,
        "kl_coef": config.kl_coef, "judge": config.judge}}
    owner = {phase: script for script, names in NAMES.items() for phase in (script, *names)}
    wanted = (config.phases or ",".join(SCRIPTS)).split(",")
    if unknown := [phase for phase in wanted if phase not in owner]:
        raise ValueError(f"--phases {','.join(unknown)}: expected some of {', '.join(owner)}")
    out = {"phases": {}, "hbm_bytes": {}, "sessions": {}}
    for script in dict.fromkeys(owner[phase] for phase in wanted):
        given = {k: v for k, v in (common | fields[script]).items() if v is not None}
        only = tuple(phase for phase in wanted if owner[phase] == script)
        found = plan(script, SCRIPTS[script].Config(**given), config.target, only)
        for name, value in found.items():
            out[name] = out[name] | value if name in ("phases", "hbm_bytes") else value
        if "session" in found:
            out["sessions"][script] = out.pop("session") | {"step_s": out.pop("step_s")}
        print()
    return out


def main(config: Config) -> dict:
    """Measures here, or compiles for a device that is not here; returns the figures."""
    out = measure(config) if config.target is None else compile_for(config)
    if config.json:
        print(json.dumps(out))
    return out


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
