"""Does it fit, and how fast is it? The training scripts' own jitted functions, run or compiled.

    python bench.py --model gemma3-1b --rows 8 --length 1024    # measured on the devices at hand
    python bench.py --weights folder/with/a/config.json --dtype float32 --remat none --json
    python bench.py --phases grpo --mean-length 40              # completions of many lengths
    python bench.py --model gemma3-1b --target v5e:2x4          # compiled for an absent TPU
    python train_grpo.py --model gemma3-1b --plan               # the same, with a script's flags

Measuring: sft is one update, with LoRA or of all weights; grpo is one step of --prompts times
--group completions, with rollout, reference log-probs and update (one inner epoch) timed apart.
Weights and tokens are random, so only config.json is needed. Random logits are nearly uniform: if a
share 1/mean of the vocabulary are stop tokens, lengths are geometric with that mean. Without
--mean-length every completion has --new-tokens tokens.

Compiling needs no TPU, only its compiler, the package libtpu. Where libtpu has no wheel (macOS,
Windows), each program's arguments are added up from their shapes and temporaries are unknown.

1. Memory is what the compiler reports for one core; a program that is too large does not compile.
   The column "beside" is what the script keeps on the core besides the program's own arguments
   (optimizer, judge, ...). Arguments plus temporaries are more than a program needs ("at most");
   its peak is a little less than it needs, because gaps between arrays are not counted ("at
   least").
2. FLOPs and bytes are computed by the formulas of `Cost`. They agree with a count of every
   operation of the traced programs: FLOPs to 0.1 %, bytes to 4 % (LOG.md, 2026-11-26).
3. The roofline: a phase takes as long as the slowest of its FLOPs, its HBM traffic and its
   interconnect traffic at the device's peak. No program reaches that, so the estimate of what a
   session can do assumes the share EFFICIENCY of it.

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
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import data
import gemma
import judge
import rewards
import rollouts
import runs
import stage
import train_grpo
import train_sft
import train_simpo

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """Fields left at None are filled from MEASURED to measure, from the script's own to compile."""

    model: str = "gemma3-1b"
    """The Gemma whose shapes are used."""
    weights: str | None = None
    """Folder with a config.json that gives the shapes instead."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Type of the base weights and the activations."""
    phases: str | None = None
    """To measure: sft and grpo (peak memory is that of all phases named). To compile: sft, simpo,
    grpo, or one phase of a script, as in grpo_update."""
    lora_rank: int | None = None
    """Rank of the adapter; 0 trains every weight."""
    remat: Literal["none", "attention", "layer", "auto"] | None = None
    """What the backward pass computes again."""
    micro_rows: int | None = None
    """Rows that a device computes at a time; measuring, the default is all in SFT and 4 in GRPO."""
    repeats: int = 5
    """Timed steps; the median is printed."""
    json: bool = False
    """Print a JSON object as the last line."""

    # compiling
    target: str | None = None
    """Compile for this TPU (v5e:2x4 is Kaggle's), which need not be here, and run nothing."""
    time_limit: str | None = None
    """Length of a session, as 8h45m; default: 9h."""
    judge: str | None = None
    """A Gemma that judges GRPO's completions on the same mesh."""

    # sft and simpo
    rows: int | None = None
    """Rows of one update, over all devices; measured rows have no padding."""
    length: int | None = None
    """Tokens in a row."""

    # grpo
    prompts: int | None = None
    """Prompts of one step, over all devices."""
    group: int | None = None
    """Completions of each prompt."""
    prompt_length: int | None = None
    """Tokens of a prompt."""
    new_tokens: int | None = None
    """Tokens of the longest completion."""
    mean_length: int = 0
    """Measuring: mean length of completions before the cut at --new-tokens; 0: no early stop."""
    slots: int | None = None
    """Completions that a device decodes at a time."""
    pack_length: int | None = None
    """Tokens in a packed row of the update; measuring, the default is the longest sequence."""
    kl_coef: float | None = None
    """Weight of the KL divergence; 0 runs no reference pass."""


MEASURED = dict(
    dtype="bfloat16", phases="sft,grpo", lora_rank=16, remat="auto", rows=8, length=1024,
    prompts=8, group=8, prompt_length=64, new_tokens=128, slots=64, kl_coef=0.04,
)


EFFICIENCY = 0.5  # assumed share of the roofline that a session reaches


class Peak(NamedTuple):
    """One device's peaks as its maker publishes them; rates are per second."""

    flops: float  # bfloat16, dense
    bytes: float  # to and from its memory
    ici: float  # bytes that arrive from other devices of the mesh
    hbm: float  # bytes that a program may use; 0: not known beforehand


PEAKS = {  # by jax's device_kind
    # cloud.google.com/tpu/docs/v5e. 400 GB/s a chip over four ports, both ways; a slice of 2x4 uses
    # two of the ports. A program gets 15.75 GiB of the 16 (its compiler says so).
    "TPU v5 lite": Peak(197e12, 819e9, 100e9, 15.75 * 2**30),
    # nvidia.com/en-us/data-center/h100, SXM, without sparsity
    "NVIDIA H100 80GB HBM3": Peak(989e12, 3.35e12, 450e9, 0),
}

# ------------------------------------------------------------------------------------------ work


class Work(NamedTuple):
    """What one device does."""

    flops: float = 0.0  # of matrix products
    bytes: float = 0.0  # read from its memory and written to it
    ici: float = 0.0  # bytes that arrive from other devices

    def __add__(self, other):
        return Work(*(a + b for a, b in zip(self, other, strict=True)))

    def __mul__(self, n: float):
        return Work(*(a * n for a in self))


class Cost(NamedTuple):
    """Formulas for one model's work on one device.

    A matrix product reads both operands and writes its result, a reduction reads its operand; every
    other operation is taken to be fused into these.
    """

    cfg: gemma.Config
    itemsize: int  # bytes of a weight and of an activation
    n_devices: int
    sharded: bool = False  # the base is split over the devices
    rank: int = 0
    n_adapter: int = 0  # numbers in the adapter
    splash: bool = False  # whole rows are attended by the splash kernels, see gemma.splash

    @property
    def n_head(self) -> int:
        return self.cfg.vocab_size * self.cfg.hidden_size

    @property
    def n_layers(self) -> int:
        """Weights of the matrices of all layers."""
        shapes = [spec.hf_shape(self.cfg) for spec in gemma.LINEARS.values()]
        return self.cfg.num_hidden_layers * sum(map(math.prod, shapes))

    def layers(self, n_tokens: int, keys: float, train: bool = False, remat: str = "auto",
               splash: bool = False) -> Work:
        """All layers for n_tokens that attend to `keys` keys each, masked ones included.

        Passes over a base matrix: 1 forward, 1 for the gradient of its input, 1 for its own if it
        is trained, 1 more if layers are computed again. So LoRA takes 4N FLOPs a token; full
        training, or LoRA with remat "layer", takes 6N. Attention has 2 products forward and 4
        backward; the splash kernels have 7, because they compute the scores again.
        """
        L, N, H, D = (self.cfg.num_hidden_layers, self.cfg.num_attention_heads, self.cfg.head_dim,
                      self.cfg.hidden_size)
        again = train and (remat == "layer" or (remat == "auto" and self.sharded))
        passes = 1 + again + train * (1 if self.rank else 2)
        adapter_passes = 1 + again + 2 * train
        forward = 1 + (train and (remat != "none" or self.sharded))  # passes of attention
        attention = 2 * forward + train * (7 if splash else 4)
        weights = self.n_layers * passes + self.n_adapter * adapter_passes
        flops = 2 * n_tokens * (weights + L * N * H * keys * attention)
        # Inputs and outputs of the products: in + out of each matrix and of its A and B.
        width = L * sum(sum(spec.hf_shape(self.cfg)) for spec in gemma.LINEARS.values())
        width = width * passes + self.n_adapter / max(1, self.rank) * adapter_passes
        # In float32: four norms; queries, keys, values and outputs, five times as much as queries;
        # scores are written, read for maximum and sum, and half (bf16) for the values.
        floats = L * (4 * D + 5 * N * H + 3.5 * N * keys * (not splash)) * (forward + train)
        return Work(flops, self.itemsize * (weights + n_tokens * width) + 4 * n_tokens * floats)

    def logps(self, n_tokens: int, wanted: float, chunk: int, train: bool = False) -> Work:
        """Log-probs of the share `wanted` of the tokens, by chunks that each read the head.

        A float32 logit is written and read three times, its bf16 gradient once. A frozen head gives
        that gradient in the forward pass; a trained head computes all logits again, and adds up
        its own gradient in float32.
        """
        V, n_head = self.cfg.vocab_size, self.n_head
        read = self.itemsize * n_head / chunk
        work = Work(2 * n_head, 16 * V + read) * wanted
        if train and self.rank:
            work += Work(2 * n_head, 2 * V + read) * wanted
        elif train:
            work += Work(6 * n_head, 24 * V + 2 * read + 4 * n_head / chunk)
        return work * n_tokens

    def moved(self, n_bytes: float) -> Work:
        """An all-gather that gives each device n_bytes, or a reduce-scatter of as many."""
        return Work(0, 2 * n_bytes, n_bytes * (self.n_devices - 1) / self.n_devices)

    def gathers(self, layers: int, head: int) -> Work:
        """So many gathers, or scatters of the gradient, of all layers and of the head."""
        n = self.n_layers * layers + self.n_head * head
        return self.moved(self.itemsize * n) * self.sharded

    def decode_step(self, slots: int, length: int) -> Work:
        """One token in each slot; caches of `length`, or of the window, are read whole.

        A logit is written or read six times. If the base is sharded, each device reads its part,
        and the inputs or float32 outputs of all slots move instead, see gemma.sharded_matmul.
        """
        cfg, n, V = self.cfg, self.n_devices, self.cfg.vocab_size
        held = [length if g else min(length, cfg.sliding_window) for g in cfg.is_global]
        caches = 2 * slots * sum(held) * cfg.num_key_value_heads * cfg.head_dim
        work = self.layers(slots, statistics.mean(held)) + Work(
            2 * slots * self.n_head, self.itemsize * (caches + self.n_head) + 24 * slots * V)
        if self.sharded:
            out_in = [(*spec.hf_shape(cfg), spec.inp == "D") for spec in gemma.LINEARS.values()]
            each = sum(4 * out if split else self.itemsize * inp for out, inp, split in out_in)
            n_bytes = n * slots * (cfg.num_hidden_layers * each + 4 * V)
            elsewhere = self.itemsize * (self.n_layers + self.n_head) * (n - 1) / n
            work += self.moved(n_bytes) + Work(0, n_bytes - elsewhere)
        return work


def policy_cost(config, cfg: gemma.Config, mesh: Mesh, trained, is_sharded) -> Cost:
    """The Cost of a script's own model; is_sharded: that of stage for the phase at hand."""
    n_adapter = sum(x.size for x in jax.tree.leaves(trained)) if config.lora_rank else 0
    # The splash kernels are a TPU's; without its compiler CPU devices stand for its cores.
    splash = mesh.devices.flat[0].platform != "gpu" and cfg.head_dim % 128 == 0
    return Cost(cfg, jnp.dtype(config.dtype).itemsize, mesh.size, is_sharded(cfg, config, mesh),
                config.lora_rank, n_adapter, splash)


def micro_batch(cost: Cost, config, length: int, train: bool, wanted: float | None = None) -> Work:
    """--micro-rows rows. wanted: share of completion tokens in rows that share a prompt (GRPO)."""
    n_tokens, scatters = config.micro_rows * length, train and not config.lora_rank
    chunk = min(n_tokens, max(gemma.CHUNK, gemma.CHUNK_ELEMENTS // cost.cfg.vocab_size))
    splash = cost.splash and wanted is None
    if wanted is not None:
        chunk = min(chunk, max(128, n_tokens // 8))
    return (cost.layers(n_tokens, length, train, config.remat, splash)
            + cost.logps(n_tokens, 1.0 if wanted is None else wanted, chunk, train)
            + cost.gathers(1 + train + scatters, 1 + scatters))


def step_work(script: str, config, cfg: gemma.Config, mesh: Mesh, programs: dict) -> dict:
    """The work of each phase of one step on a core: every prompt and completion at its longest."""
    n, (trained, opt) = mesh.size, programs["train_step"][1][:2]
    cost = policy_cost(config, cfg, mesh, trained, stage.base_is_sharded)
    adam = Work(0, 3 * tree_bytes(trained) + 2 * tree_bytes(opt))  # with the gradient
    if config.lora_rank or not cost.sharded:
        adam += Work(0, 0, 2 * cost.moved(tree_bytes(trained)).ici)  # the gradient's all-reduce
    if script != "grpo":
        work = micro_batch(cost, config, config.max_length, True)
        return {script: work * (config.batch_rows // (config.micro_rows * n)) + adam}

    n_samples, U = config.prompts * config.group, config.max_prompt
    rows = len(data.pack([U] * config.prompts, [
        [config.max_new] * config.group] * config.prompts, config.pack_length))
    n_micro = -(-rows // (config.micro_rows * n))
    wanted = n_samples * config.max_new / (n_micro * config.micro_rows * n * config.pack_length)
    update, reference = (micro_batch(cost, config, config.pack_length, train, wanted) * n_micro
                         for train in (True, False))
    rollout = policy_cost(config, cfg, mesh, trained, stage.rollouts_are_sharded)
    prefill = rollout.layers(U, U, splash=cost.splash) + rollout.gathers(1, 0)
    n_steps = -(-n_samples // (n * config.slots)) * config.max_new
    phases = {"grpo_prefill": prefill * -(-config.prompts // n),
              "grpo_decode": rollout.decode_step(config.slots, U + config.max_new) * n_steps,
              "grpo_update": (update + adam) * config.inner_epochs}
    if "reference" in programs:
        phases["grpo_reference"] = reference
    if "judge" in programs:  # beginnings [X, U] that rows [B, C] continue
        judged_by, batch = judge.shape_of(config), programs["judge"][1][4]
        dtype, sharded = judge.layout(judged_by, mesh)
        (X, U), (B, C) = batch["tokens_XU"].shape, batch["tokens_BC"].shape
        cost = Cost(judged_by, dtype.itemsize, n, sharded)
        work = cost.layers(X // n * U, U) + cost.layers(B // n * C, U + C) + cost.gathers(1, 0)
        phases["grpo_judge"] = work * -(-n_samples // B)
    return phases


def roofline(work: Work, peak: Peak) -> tuple[float, str]:
    """(seconds, what they are spent on) at the device's peaks."""
    times = {"FLOPs": work.flops / peak.flops, "HBM": work.bytes / peak.bytes,
             "ICI": work.ici / peak.ici}
    return max((s, name) for name, s in times.items())


# ------------------------------------------------------------------------------------- measuring


def start_of(shapes: tuple) -> tuple:
    """(trained, optimizer state, fixed) of a train_step: random weights, moments of zero."""
    trained, opt, fixed = shapes[:3]
    draw = lambda s: jax.random.normal(jax.random.key(0), s.shape, s.dtype) * 0.02
    zero = lambda s: jnp.zeros(s.shape, s.dtype)
    make = lambda: (*jax.tree.map(draw, (trained, fixed)), jax.tree.map(zero, opt))
    where = jax.tree.map(lambda s: s.sharding, (trained, fixed, opt))
    trained, fixed, opt = jax.jit(make, out_shardings=where)()
    return trained, opt, fixed


SCRIPTS = {"sft": train_sft, "simpo": train_simpo, "grpo": train_grpo}
FIELDS = {"rows": "batch_rows", "length": "max_length", "prompt_length": "max_prompt",
          "new_tokens": "max_new"}  # a field here -> its name in the scripts


def script_config(script: str, config: Config, **more):
    """The script's Config with the fields that are set here, and some more."""
    given = {FIELDS.get(k, k): v for k, v in vars(config).items() if v is not None} | more
    known = {field.name for field in dataclasses.fields(SCRIPTS[script].Config)}
    return SCRIPTS[script].Config(**{k: v for k, v in given.items() if k in known})


def time_sft(config: Config, cfg: gemma.Config, mesh: Mesh) -> dict:
    """Times one SFT update; model FLOPs are 4N a token of a device, 6N without LoRA."""
    c = script_config("sft", config, micro_rows=config.micro_rows or config.rows // mesh.size)
    train_step, shapes = train_sft.programs(c, mesh)["train_step"]
    trained, opt, fixed = start_of(shapes)
    shape, key, seconds = shapes[3]["tokens"].shape, jax.random.key(0), []
    ones = np.ones(shape, np.int32)
    batch = stage.put({
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


def time_grpo(config: Config, cfg: gemma.Config, mesh: Mesh) -> dict:
    """Times the phases of one GRPO step, as train_grpo.main runs them; medians."""
    longest = config.prompt_length + config.new_tokens
    c = train_grpo.resolve(script_config(
        "grpo", config, pack_length=config.pack_length or longest,
        micro_rows=config.micro_rows or 4, is_cap=0.0,
    ))
    programs = train_grpo.programs(c, mesh)
    train_step, shapes = programs["train_step"]
    trained, opt, fixed = start_of(shapes)
    reference = jax.tree.map(jnp.copy, trained)
    sampler, dtype = train_grpo.make_sampler(cfg, c, mesh), jnp.dtype(config.dtype)
    rng = np.random.default_rng(0)
    n_stop = cfg.vocab_size // config.mean_length if config.mean_length else 0
    cost = policy_cost(c, cfg, mesh, trained, stage.rollouts_are_sharded)
    step_bytes = cost.decode_step(c.slots, longest).bytes
    steps = []
    for step in range(config.repeats + 1):
        prompts = rng.integers(n_stop, cfg.vocab_size, (c.prompts, c.max_prompt)).tolist()
        marks, stats = [time.perf_counter()], {}
        params, adapter = stage.forward_weights(trained, fixed, dtype)
        done = list(sampler.sample(params, prompts, c.group, lora=adapter, step=step,
                                   stop=range(n_stop), stats=stats))
        marks.append(time.perf_counter())
        host, n_micro = packed_rollouts(done, prompts, c, mesh)
        batch, n = stage.put(host, mesh, P(None, "data")), np.int32(n_micro)
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
        n_tokens = sum(len(r.ids) for r in done)
        n_steps = stats["slot_steps"] / c.slots / mesh.size
        steps.append({
            "rollout_tokens_per_s": n_tokens / rollout_s,
            "rollout_bytes_per_s": n_steps * step_bytes / rollout_s,
            "grpo_step_s": marks[-1] - marks[0],
            "grpo_rollout_s": rollout_s,
            "grpo_reference_s": reference_s,
            "grpo_update_s": update_s,
            "mean_length": n_tokens / len(done),
            "padding": 1 - (host["segments"][:n_micro] > 0).mean(),
        })
    first, *timed = steps
    out = {name: float(np.median([step[name] for step in timed])) for name in first}
    return out | {"grpo_compile_s": first["grpo_step_s"] - out["grpo_step_s"]}


def packed_rollouts(done: list, prompts: list, c: train_grpo.Config, mesh: Mesh) -> tuple:
    """(arrays of an update on the host, micro-batches used), every advantage being 1."""
    problems = [rollouts.Problem("", tuple(ids), "", None, "auto", (), "") for ids in prompts]
    score = rewards.Scored(0.0, {}, {})
    samples = [rollouts.Sample(problems[r.prompt], r.prompt, r, "", None, False, score, 1.0)
               for r in done]
    weights = train_grpo.token_weights(samples, c)
    return rollouts.pack(samples, weights, c, mesh.size)[:2]


def time_here(config: Config) -> dict:
    """Runs what --phases names on the devices at hand, prints and returns the figures."""
    filled = {k: v for k, v in MEASURED.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **filled)
    mesh, cfg = gemma.all_devices(), stage.model_config(config)
    known = {"sft": time_sft, "grpo": time_grpo}
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

PHASES = {  # phase of a script: its program, and the flags to lower if that does not fit
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
ENVIRONMENT = {  # libtpu looks for no TPU, ignores other processes that use one, and logs little
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}


def find_libtpu() -> str | None:
    """libtpu's version, once JAX can find it; None, after saying how to get it, if it is absent.

    It is importable, or in $LIBTPU_DIR or ~/.cache/libtpu-VERSION: not in site-packages, where JAX
    would try to start it every time.
    """
    wanted = [r for r in importlib.metadata.requires("jax") or [] if r.startswith("libtpu")]
    version = re.search(r"==([\d.]*\d)", wanted[0])[1]  # "libtpu==0.0.42.*; extra == 'tpu'"
    own = os.environ.get("LIBTPU_DIR", f"~/.cache/libtpu-{version}")
    for folder in (Path(own).expanduser(), *map(Path, sys.path)):
        if (library := folder / "libtpu" / "libtpu.so").exists():
            os.environ.setdefault("TPU_LIBRARY_PATH", str(library))
            found = [d.name for d in folder.glob("libtpu-*.dist-info")]
            return found[0].split("-")[1].removesuffix(".dist") if found else version
    runs.say("the compiler for TPUs is not here, so memory is added up from shapes, without "
             "temporaries. Where it has a wheel (Linux): pip install --no-deps --target "
             f"{own} libtpu=={version}.*")
    return None


def target_mesh(target: str | None) -> tuple[Mesh, str | None]:
    """(mesh to compile for, libtpu's version): of the target, else of the accelerator here.

    With neither it is Kaggle's TPU; without libtpu, a mesh of as many CPU devices.
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
        raise ValueError(f"--target {target}: JAX has started with fewer devices; set "
                         f"XLA_FLAGS=--xla_force_host_platform_device_count={n}")
    return gemma.all_devices(jax.devices("cpu")[:n]), None


def set_environment(target: str | None) -> None:
    """What must be set before JAX looks for devices; a TPU that is here is left alone."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if target or not chips:
        os.environ |= {k: os.environ.get(k, v) for k, v in ENVIRONMENT.items()}
    if target:
        jax.config.update("jax_platforms", "cpu")
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has looked already
            jax.config.update("jax_num_cpu_devices", 8)


def compiled_memory(function, args) -> dict:
    """Bytes of a program on one core as its compiler reports them."""
    try:
        compiled = function.lower(*args).compile()
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
        # XLA counts the body of every loop once
        "compiler_flops": cost.get("flops") if isinstance(cost, dict) else None,
    }


def tree_bytes(*trees) -> int:
    """Bytes of arrays on one device; other arguments, such as a config, count as 0."""
    total = 0
    for x in jax.tree.leaves(trees):
        if getattr(x, "sharding", None) is not None:
            x = jax.ShapeDtypeStruct(x.sharding.shard_shape(x.shape), x.dtype)
        if isinstance(x, jax.ShapeDtypeStruct | np.ndarray):
            total += math.prod(x.shape) * x.dtype.itemsize
    return total


KEPT = {  # arguments of a program that outlive its call
    "train_step": (0, 1, 2), "eval_step": (0, 1), "reference": (0, 1), "judge": (0,),
    "prefill": (1, 2, 4), "decode": (2, 3, 5, 7),
}


def bytes_beside(program: str, programs: dict) -> int:
    """Bytes that a script keeps on a core while a program runs and that are not its arguments."""
    kept = [*programs["train_step"][1][:3]]  # trained, optimizer state, fixed
    kept += [programs[k][1][0] for k in ("reference", "judge") if k in programs]
    if program in ("prefill", "decode", "judge"):  # these alternate during rollouts
        _, _, params, _, _, shelf, _, state = programs["decode"][1]
        kept += [shelf, state]
        if tree_bytes(params) != tree_bytes(kept[2].get("base")):
            kept.append(params)  # a copy for the rollouts: gathered, or cast from float32
    arguments = programs[program][1]
    return tree_bytes(kept) - tree_bytes([arguments[i] for i in KEPT[program]])


def plan(script: str, config, target: str | None = None, only: tuple[str, ...] = ("",)) -> dict:
    """Compiles a script's programs, prints the memory and time they need, and returns both.

    config: the script's own. only: compile phases whose names begin so; time counts all phases.
    """
    set_environment(target)
    module = SCRIPTS[script]
    config = module.resolve(config)
    cfg = stage.model_config(config)
    mesh, version = target_mesh(target)
    compiles = mesh.devices.flat[0].platform != "cpu"
    kind = mesh.devices.flat[0].device_kind if compiles else "TPU v5 lite"
    peak, programs = PEAKS.get(kind), module.programs(config, mesh)
    target = (target or "v5e:2x4") if version or not compiles else None
    out = {"target": target, "device": f"{mesh.size} {kind}", "jax": jax.__version__,
           "libtpu": version, "hbm_bytes": {}, "phases": {}}
    trained = f"LoRA of rank {config.lora_rank}" if config.lora_rank else "all weights trained"
    where = "split over" if stage.base_is_sharded(cfg, config, mesh) else "on each of"
    print(f"train_{script}.py: {config.model}, {trained}, the base in {config.dtype} {where} "
          f"{out['device']}; JAX {out['jax']}, libtpu {version or 'none'}")
    for phase, (program, flags) in PHASES[script].items():
        if program in programs and phase.startswith(only):
            row = {"flags": flags, "arguments_bytes": tree_bytes(programs[program][1])}
            if compiles:
                runs.say(f"compiling {phase}")
                row |= compiled_memory(*programs[program])
            row["beside_bytes"] = bytes_beside(program, programs)
            total = row.get("total_bytes", row.get("needs_bytes", row["arguments_bytes"]))
            row["hbm_bytes"] = None if total is None else total + row["beside_bytes"]
            least = row.get("peak_bytes") or total
            row["least_bytes"] = None if least is None else least + row["beside_bytes"]
            out["phases"][phase], out["hbm_bytes"][phase] = row, row["hbm_bytes"]
    for phase, work in step_work(script, config, cfg, mesh, programs).items():
        row = out["phases"].setdefault(phase, {})
        row |= {"flops": work.flops, "bytes": work.bytes, "ici_bytes": work.ici}
        if peak:
            row["roofline_s"], row["bound"] = roofline(work, peak)
    print_phases(out["phases"], compiles)
    print_fit(out["phases"], peak.hbm if peak else 0, compiles)
    if not peak:
        runs.say(f"the peaks of a {kind} are not in PEAKS, so there is no estimate of time")
        return out
    out["step_s"] = sum(row.get("roofline_s", 0.0) for row in out["phases"].values()) / EFFICIENCY
    out["session_s"] = runs.parse_time(config.time_limit or "9h")
    out["session"] = print_session(script, config, out["step_s"], out["session_s"])
    return out


COLUMNS = {  # of the table: the field of a phase, and its unit
    "arguments": ("arguments_bytes", 2**30), "temporaries": ("temporaries_bytes", 2**30),
    "output": ("output_bytes", 2**30), "aliased": ("aliased_bytes", 2**30),
    "beside": ("beside_bytes", 2**30), "at least": ("least_bytes", 2**30),
    "at most": ("hbm_bytes", 2**30), "TFLOP": ("flops", 1e12), "HBM GB": ("bytes", 1e9),
    "ICI GB": ("ici_bytes", 1e9), "roofline ms": ("roofline_s", 1e-3),
}


def print_phases(phases: dict, compiles: bool) -> None:
    """Prints the memory and time of each phase on one core as a table."""
    print("\nOn each core: GiB " + ("as the compiler reports them" if compiles else "of the "
          "arguments alone, by their shapes (temporaries come on top)")
          + "; what one step computes and moves, by formulas")
    columns = {name: (k, unit) for name, (k, unit) in COLUMNS.items()
               if any(row.get(k) is not None for row in phases.values())}
    if not compiles:
        columns.pop("at most", None)
    print(" " * 15 + "".join(f"{name:>13}" for name in columns) + "  bound by")
    for name, row in phases.items():
        numbers = [None if row.get(k) is None else row[k] / unit for k, unit in columns.values()]
        cells = ["" if x is None else f"{x:,.2f}" for x in numbers]
        print(f"{name:<15}" + "".join(f"{x:>13}" for x in cells) + "  " + row.get("bound", ""))


def print_fit(phases: dict, limit: float, compiles: bool) -> None:
    """Says which phases do not, or may not, fit a core of `limit` bytes, and the flags to lower."""
    rows = {name: row for name, row in phases.items() if "hbm_bytes" in row}
    most = {name: row["hbm_bytes"] or math.inf for name, row in rows.items()}  # None: far too much
    for name in (name for name in rows if limit and most[name] > limit):
        flags, has = rows[name]["flags"], f"a core has {limit / 2**30:.2f}"
        least = rows[name]["least_bytes"] or math.inf
        if least > limit:
            print(f"{name} does not fit: needs {least / 2**30:.2f} GiB or more, {has}; "
                  f"lower {flags}")
        else:
            print(f"{name} may not fit: needs {least / 2**30:.2f} to {most[name] / 2**30:.2f} GiB, "
                  f"{has}; if so, lower {flags}")
    if compiles and most and max(most.values()) <= limit:
        print(f"It fits: at most {max(most.values()) / 2**30:.2f} of {limit / 2**30:.2f} GiB.")


def print_session(script: str, config, step_s: float, seconds: float) -> dict:
    """Prints and returns how much a session can do, in whole steps."""
    steps = int(seconds / step_s)
    if script == "grpo":
        n = config.prompts * config.group
        done, n_tokens = {"steps": steps, "rollouts": steps * n}, n * config.max_new
        step = (f"{config.prompts} prompts of {config.max_prompt} tokens, {config.group} "
                f"completions of {config.max_new} each")
    else:
        done, n_tokens = {"steps": steps}, config.batch_rows * config.max_length
        step = f"{config.batch_rows} rows of {config.max_length} tokens"
    done["tokens"] = steps * n_tokens
    print(f"\nAt {EFFICIENCY:.0%} of the roofline (assumed) a step of {step} takes {step_s:.2f} s: "
          f"{n_tokens / step_s:,.0f} tokens/s.\n{seconds / 3600:g} h are "
          + ", ".join(f"{v:,} {k}" for k, v in done.items())
          + ", less the time to compile, evaluate and save checkpoints.")
    if config.steps:
        print(f"--steps {config.steps} takes {config.steps * step_s / 3600:.2f} h.")
    return done | {"tokens_per_s": n_tokens / step_s}


def plan_scripts(config: Config) -> dict:
    """`plan` for each training script that --phases names."""
    owner = {phase: script for script, phases in PHASES.items() for phase in (script, *phases)}
    wanted = (config.phases or ",".join(SCRIPTS)).split(",")
    if unknown := [phase for phase in wanted if phase not in owner]:
        raise ValueError(f"--phases {','.join(unknown)}: expected some of {', '.join(owner)}")
    out = {"phases": {}, "hbm_bytes": {}, "sessions": {}}
    for script in dict.fromkeys(owner[phase] for phase in wanted):
        only = tuple(phase for phase in wanted if owner[phase] == script)
        found = plan(script, script_config(script, config), config.target, only)
        for name, value in found.items():
            out[name] = out[name] | value if name in ("phases", "hbm_bytes") else value
        if "session" in found:
            out["sessions"][script] = out.pop("session") | {"step_s": out.pop("step_s")}
        print()
    return out


def main(config: Config) -> dict:
    """Measures here, or compiles for a device that is not here; returns the figures."""
    out = time_here(config) if config.target is None else plan_scripts(config)
    if config.json:
        print(json.dumps(out))
    return out


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
