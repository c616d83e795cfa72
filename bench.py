"""Does it fit, and how fast is it? The training scripts' own jitted functions, run or compiled.

    python bench.py --model gemma3-1b --rows 8 --length 1024  # measured here
    python bench.py --weights DIR --dtype float32 --remat none --json
    python bench.py --phases grpo --mean-length 40            # of many lengths
    python bench.py --model gemma3-1b --target v5e:2x4        # for an absent TPU
    python train_grpo.py --model gemma3-1b --plan             # the same, by flags

Measuring: sft is one update; grpo is one step, with rollout, reference log-probs and update (one
inner epoch) timed apart. Weights and tokens are random, so only config.json is needed. Random
logits are nearly uniform: with a share 1/mean of the vocabulary as stop tokens, lengths are
geometric with that mean.

Compiling needs the package libtpu but no TPU. Without libtpu (it has no wheel for macOS and
Windows) arguments are added up from their shapes, and temporaries are unknown.

1. "beside" is what the script keeps on a core besides a program's own arguments. "in all" is a
   little more than a program needs, because some temporaries take the place of others.
2. FLOPs and bytes are the formulas of `Cost`. They agree with a count of every operation of the
   traced programs: FLOPs to 0.1 %, bytes to 4 % (LOG.md, 2026-11-26).
3. The roofline: a phase takes as long as the slowest of its FLOPs, its HBM traffic and its
   interconnect traffic at the device's peak. A session is assumed to reach EFFICIENCY of it.
"""

import contextlib
import dataclasses
import importlib.metadata
import itertools
import json
import math
import os
import re
import statistics
import sys
import time
from collections.abc import Iterator
from functools import partial
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
import terminal
import train_distill
import train_grpo
import train_ppo
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
    base: Literal["dtype", "int8"] | None = None
    """The frozen base: in --dtype, or int8."""
    phases: str | None = None
    """To measure: sft, grpo. To compile: sft, simpo, grpo, ppo, distill, or one of their
    phases, as in grpo_decode."""
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
    target: str | None = None
    """Compile for this TPU (v5e:2x4 is Kaggle's), which need not be here, and run nothing."""
    judge: str | None = None
    """A Gemma that judges GRPO's completions on the same mesh."""
    judge_base: Literal["dtype", "int8"] | None = None
    """The judge's weights: bfloat16, or int8."""
    rows: int | None = None
    """Rows of one update, over all devices; measured rows have no padding."""
    length: int | None = None
    """Tokens in a row."""
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
    kl_coef: float | None = None
    """Weight of the KL divergence; 0 runs no reference pass."""


MEASURED = dict(
    dtype="bfloat16", phases="sft,grpo", lora_rank=16, remat="auto", rows=8, length=1024,
    prompts=8, group=8, prompt_length=64, new_tokens=128, slots=64, kl_coef=0.04,
)
KAGGLE = "v5e:2x4"

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


PEAKS = {  # by jax's device_kind: what its maker says it does in a second, in dense bfloat16
    # cloud.google.com/tpu/docs/v5e. 400 GB/s a chip over four ports, both ways; a slice of 2x4 uses
    # two of the ports.
    "TPU v5 lite": Work(197e12, 819e9, 100e9),
    "NVIDIA H100 80GB HBM3": Work(989e12, 3.35e12, 450e9),  # nvidia.com/en-us/data-center/h100, SXM
    "NVIDIA H200": Work(989e12, 4.8e12, 450e9),  # nvidia.com/en-us/data-center/h200, SXM
}
HBM_BYTES = {"TPU v5 lite": 15.75 * 2**30}  # of 16 GiB a program gets these (its compiler says so)
EFFICIENCY = 0.5  # assumed share of the peaks that a session reaches


class Cost(NamedTuple):
    """Formulas for one model's work on one device.

    A matrix product reads both operands and writes its result, a reduction reads its operand; every
    other operation is taken to be fused into these.
    """

    cfg: gemma.Config
    weight: int  # bytes of a weight of the base
    itemsize: int  # of an adapter's weight and of an activation
    n_devices: int
    sharded: bool = False  # the base is split over the devices
    rank: int = 0
    n_adapter: int = 0  # numbers in the adapter

    def matrices(self, of=math.prod) -> int:
        """Weights of all layers' matrices; of=sum: their inputs and outputs for one token."""
        shapes = [spec.hf_shape(self.cfg) for spec in gemma.LINEARS.values()]
        return self.cfg.num_hidden_layers * sum(map(of, shapes))

    def layers(self, n_tokens: int, keys: float, train: bool = False, remat: str = "auto",
               splash: bool = False) -> Work:
        """All layers for n_tokens that attend to `keys` keys each, masked ones included.

        Passes over a base matrix: 1 forward, 1 for the gradient of its input, 1 for its own if it
        is trained, 1 more if layers are computed again: 4N FLOPs a token for LoRA, 6N for all.
        """
        L, N, H, D = (self.cfg.num_hidden_layers, self.cfg.num_attention_heads, self.cfg.head_dim,
                      self.cfg.hidden_size)
        again = train and (remat == "layer" or (remat == "auto" and self.sharded))
        base, adapter = 1 + again + train * (1 if self.rank else 2), 1 + again + 2 * train
        weights = base * self.matrices() + adapter * self.n_adapter
        n_bytes = base * self.weight * self.matrices() + adapter * self.itemsize * self.n_adapter
        width = base * self.matrices(sum) + adapter * self.n_adapter / max(1, self.rank)
        # Attention: two products forward, four backward; splash computes the scores again.
        forward = 1 + (train and (remat != "none" or self.sharded))
        products = 2 * forward + train * (7 if splash else 4)
        # In float32: four norms; queries, keys, values and outputs, five times as much as queries;
        # scores are written, read for maximum and sum, and half (bf16) for the values.
        floats = L * (4 * D + 5 * N * H + 3.5 * N * keys * (not splash)) * (forward + train)
        return Work(2 * n_tokens * (weights + L * N * H * keys * products),
                    n_bytes + self.itemsize * n_tokens * width + 4 * n_tokens * floats)

    def logps(self, n_tokens: int, wanted: float, chunk: int, train: bool) -> Work:
        """Log-probs of the share `wanted` of the tokens, by chunks that each read the head.

        The logits of a block of words stay on the chip. A frozen head gives the gradient of the
        hidden states in the forward pass; a trained head computes all logits again, and adds up its
        own gradient in float32.
        """
        n_head = self.cfg.vocab_size * self.cfg.hidden_size
        read = self.weight * n_head / chunk
        work = Work(2 * n_head, read) * wanted
        if train and self.rank:
            work += Work(2 * n_head, read) * wanted
        elif train:
            work += Work(6 * n_head, 2 * read + 8 * n_head / chunk)
        return work * n_tokens

    def moved(self, n_bytes: float) -> Work:
        """An all-gather that gives each device n_bytes, or a reduce-scatter of as many."""
        return Work(0, 2 * n_bytes, n_bytes * (self.n_devices - 1) / self.n_devices)

    def gathers(self, layers: int, head: int) -> Work:
        """`layers` gathers of all layers and `head` of the head, or scatters of their gradients."""
        n = self.matrices() * layers + self.cfg.vocab_size * self.cfg.hidden_size * head
        return self.moved(self.weight * n) * self.sharded

    def micro_batch(self, config, length: int, train: bool, wanted: float, splash: bool,
                    head: bool = True) -> Work:
        """One micro-batch, with log-probs of a share of its tokens, or of none (head=False)."""
        n_tokens, scatters = config.micro_rows * length, train and not self.rank
        chunk = min(n_tokens, max(gemma.CHUNK, gemma.CHUNK_ELEMENTS // self.cfg.vocab_size))
        if wanted < 1:
            chunk = min(chunk, max(128, n_tokens // 8))
        logps = self.logps(n_tokens, wanted, chunk, train) * head
        return (self.layers(n_tokens, length, train, config.remat, splash) + logps
                + self.gathers(1 + train + scatters, (1 + scatters) * head))

    def decode_step(self, slots: int, length: int) -> Work:
        """One token in each slot; caches of `length`, or of the window, are read whole.

        A logit is written or read six times. If the base is sharded, each device reads its part,
        and the inputs or float32 outputs of all slots move instead, see gemma.sharded_matmul.
        """
        cfg, n, V = self.cfg, self.n_devices, self.cfg.vocab_size
        held = [length if g else min(length, cfg.sliding_window) for g in cfg.is_global]
        caches = 2 * slots * sum(held) * cfg.num_key_value_heads * cfg.head_dim
        n_head = V * cfg.hidden_size
        head = Work(2 * slots * n_head,
                    self.itemsize * caches + self.weight * n_head + 24 * slots * V)
        work = self.layers(slots, statistics.mean(held)) + head
        if self.sharded:
            out_in = [(*spec.hf_shape(cfg), spec.inp == "D") for spec in gemma.LINEARS.values()]
            each = sum(4 * out if split else self.itemsize * inp for out, inp, split in out_in)
            n_bytes = n * slots * (cfg.num_hidden_layers * each + 4 * V)
            elsewhere = self.weight * (self.matrices() + n_head) * (n - 1) / n
            work += self.moved(n_bytes) + Work(0, n_bytes - elsewhere)
        return work


def policy_cost(config, cfg: gemma.Config, mesh: Mesh, trained, is_sharded) -> Cost:
    """The Cost of a script's own model; is_sharded: that of stage for the phase at hand."""
    n_adapter = sum(x.size for x in jax.tree.leaves(trained)) if config.lora_rank else 0
    return Cost(cfg, stage.weight_bytes(config), jnp.dtype(config.dtype).itemsize, mesh.size,
                is_sharded(cfg, config, mesh), config.lora_rank, n_adapter)


def step_work(script: str, config, cfg: gemma.Config, mesh: Mesh, programs: dict) -> dict:
    """Phase -> its work in one step on a core: every prompt and completion at its longest."""
    n, (trained, opt) = mesh.size, programs["train_step"][1][:2]
    if script == "ppo":  # a step moves one of two adapters of equal size
        trained, opt = trained["policy"], opt["policy"]
    cost = policy_cost(config, cfg, mesh, trained, stage.base_is_sharded)
    # The splash kernels are a TPU's; without its compiler CPU devices stand for its cores.
    splash = mesh.devices.flat[0].platform != "gpu" and cfg.head_dim % 128 == 0
    adam = Work(0, 3 * tree_bytes(trained) + 2 * tree_bytes(opt))  # with the gradient
    if config.lora_rank or not cost.sharded:
        adam += Work(0, 0, 2 * cost.moved(tree_bytes(trained)).ici)  # the gradient's all-reduce
    if script not in ON_ROLLOUTS:
        work = cost.micro_batch(config, config.max_length, True, 1.0, splash)
        return {script: work * (config.batch_rows // (config.micro_rows * n)) + adam}

    n_samples, U = config.prompts * config.group, config.max_prompt
    completions = [[config.max_new] * config.group] * config.prompts
    n_rows = len(data.pack([U] * config.prompts, completions, config.pack_length))
    n_micro = -(-n_rows // (config.micro_rows * n))
    wanted = n_samples * config.max_new / (n_micro * config.micro_rows * n * config.pack_length)
    passes = partial(cost.micro_batch, config, config.pack_length, wanted=wanted, splash=False)
    rollout = policy_cost(config, cfg, mesh, trained, stage.rollouts_are_sharded)
    prefill = rollout.layers(U, U, splash=splash) + rollout.gathers(1, 0)
    n_steps = -(-n_samples // (n * config.slots)) * config.max_new
    update = passes(train=True) * n_micro
    if script == "distill":  # one more pass, of the teacher
        teacher, dtype, sharded = train_distill.teacher_of(config, mesh)
        weight = 1 if config.teacher_base == "int8" else dtype.itemsize
        taught = Cost(teacher, weight, dtype.itemsize, n, sharded)
        update += taught.micro_batch(config, config.pack_length, False, wanted, False) * n_micro
    phases = {
        "prefill": prefill * -(-config.prompts // n),
        "decode": rollout.decode_step(config.slots, U + config.max_new) * n_steps,
        "update": (update + adam) * getattr(config, "inner_epochs", 1),
    }
    if "reference" in programs:
        phases["reference"] = passes(train=False) * n_micro
    if script == "ppo":
        values, critic = (passes(train=train, head=False) * n_micro for train in (False, True))
        forwards = passes(train=False) * n_micro * (2 if config.kl_coef else 1)
        phases["estimate"] = values + forwards
        phases["critic"] = (critic + adam * config.minibatches) * config.inner_epochs
        phases["update"] += adam * (config.minibatches - 1) * config.inner_epochs
    if "judge" in programs:  # beginnings [X, U] that rows [B, C] continue
        judged_by, batch = judge.shape_of(config), programs["judge"][1][4]
        int8 = config.judge_base == "int8"
        dtype, sharded = stage.frozen_layout(judged_by, mesh, int8)
        (X, U), (B, C) = batch["tokens_XU"].shape, batch["tokens_BC"].shape
        cost = Cost(judged_by, 1 if int8 else dtype.itemsize, dtype.itemsize, n, sharded)
        work = cost.layers(X // n * U, U) + cost.layers(B // n * C, U + C) + cost.gathers(1, 0)
        phases["judge"] = work * -(-n_samples // B)
    return {f"{script}_{phase}": work for phase, work in phases.items()}


# ------------------------------------------------------------------------------------- measuring

SCRIPTS = {"sft": train_sft, "simpo": train_simpo, "grpo": train_grpo, "ppo": train_ppo,
           "distill": train_distill}
ON_ROLLOUTS = ("grpo", "ppo", "distill")  # those that learn from their own completions
FIELDS = {"rows": "batch_rows", "length": "max_length", "prompt_length": "max_prompt",
          "new_tokens": "max_new"}  # a field here -> its name in the scripts


def script_config(script: str, config: Config, **more):
    """The script's resolved Config with the fields that are set here, and some more."""
    module = SCRIPTS[script]
    if config.weights:  # --model names its defaults: those of the size nearest to the folder's
        size = gemma.read_config(config.weights).n_params
        apart = lambda name: abs(math.log(gemma.CONFIGS[name].n_params / size))
        config = dataclasses.replace(config, model=min(gemma.CONFIGS, key=apart))
    given = {FIELDS.get(k, k): v for k, v in vars(config).items() if v is not None} | more
    known = {field.name for field in dataclasses.fields(module.Config)}
    return module.resolve(module.Config(**{k: v for k, v in given.items() if k in known}))


def start_of(shapes: tuple) -> tuple:
    """(trained, optimizer state, fixed) of a train_step: random weights, moments of zero."""
    trained, opt, fixed = shapes[:3]
    # int8 weights, one step of which is small beside a float's, are drawn as wide as they get.
    draw = lambda s: (jax.random.randint(jax.random.key(0), s.shape, -127, 128, s.dtype)
                      if s.dtype == jnp.int8
                      else jax.random.normal(jax.random.key(0), s.shape, s.dtype) * 0.02)
    zero = lambda s: jnp.zeros(s.shape, s.dtype)
    make = lambda: (*jax.tree.map(draw, (trained, fixed)), jax.tree.map(zero, opt))
    where = jax.tree.map(lambda s: s.sharding, (trained, fixed, opt))
    trained, fixed, opt = jax.jit(make, out_shardings=where)()
    return trained, opt, fixed


def sft_steps(config: Config, cfg: gemma.Config, mesh: Mesh) -> Iterator[dict]:
    """The figures of one SFT update after another."""
    micro_rows = config.micro_rows or config.rows // mesh.size
    c = script_config("sft", config, micro_rows=micro_rows)
    train_step, shapes = train_sft.programs(c, mesh)["train_step"]
    trained, opt, fixed = start_of(shapes)
    shape, key = shapes[3]["tokens"].shape, jax.random.key(0)
    ones = np.ones(shape, np.int32)
    batch = stage.put({
        "tokens": np.random.default_rng(0).integers(3, cfg.vocab_size, shape, np.int32),
        "mask": ones, "segments": ones, "positions": np.cumsum(ones, -1, np.int32) - 1,
    }, mesh, P(None, "data"))
    n_tokens = config.rows * config.length
    model_flops = (4 if config.lora_rank else 6) * cfg.n_params * n_tokens / mesh.size  # a device's
    while True:
        start = time.perf_counter()
        trained, opt, metrics = train_step(trained, opt, fixed, batch, np.float32(1e-5), key)
        jax.block_until_ready((trained, metrics))
        step_s = time.perf_counter() - start
        yield {"sft_tokens_per_s": n_tokens / step_s, "sft_step_s": step_s,
               "sft_model_flops_per_s": model_flops / step_s}


def grpo_steps(config: Config, cfg: gemma.Config, mesh: Mesh) -> Iterator[dict]:
    """The figures of one GRPO step after another, its phases as train_grpo.main runs them."""
    longest = config.prompt_length + config.new_tokens
    c = script_config("grpo", config, pack_length=longest,
                      micro_rows=config.micro_rows or 4, is_cap=0.0)
    programs = train_grpo.programs(c, mesh)
    train_step, shapes = programs["train_step"]
    trained, opt, fixed = start_of(shapes)
    reference = jax.tree.map(jnp.copy, trained)
    sampler, dtype = rollouts.make_sampler(cfg, c, mesh), jnp.dtype(config.dtype)
    rng = np.random.default_rng(0)
    n_stop = cfg.vocab_size // config.mean_length if config.mean_length else 0
    cost = policy_cost(c, cfg, mesh, trained, stage.rollouts_are_sharded)
    step_bytes = cost.decode_step(c.slots, longest).bytes
    problem, score = rollouts.Problem("", (), "", None, "auto", (), ""), rewards.Scored(0.0, {}, {})
    for step in itertools.count():
        prompts = rng.integers(n_stop, cfg.vocab_size, (c.prompts, c.max_prompt)).tolist()
        marks, stats = [time.perf_counter()], {}
        params, adapter = stage.forward_weights(trained, fixed, dtype)
        done = list(sampler.sample(params, prompts, c.group, lora=adapter, step=step,
                                   stop=range(n_stop), stats=stats))
        marks.append(time.perf_counter())
        samples = [rollouts.Sample(dataclasses.replace(problem, prompt=tuple(prompts[r.prompt])),
                                   r.prompt, r, "", None, False, score, 1.0) for r in done]
        host, n_micro, _ = rollouts.pack(samples, [1.0] * len(samples), c, mesh.size)
        batch, n = stage.put(host, mesh, P(None, "data")), np.int32(n_micro)
        if c.kl_coef:
            batch["ref"] = programs["reference"][0](reference, fixed, batch, n)
            jax.block_until_ready(batch["ref"])
        marks.append(time.perf_counter())
        trained, opt, metrics, _ = train_step(
            trained, opt, fixed, batch, n, np.bool(True), np.float32(1e-5))
        jax.block_until_ready((trained, metrics))
        marks.append(time.perf_counter())
        rollout_s, reference_s, update_s = np.diff(marks)
        n_tokens = sum(len(r.ids) for r in done)
        n_steps = stats["slot_steps"] / c.slots / mesh.size
        yield {
            "rollout_tokens_per_s": n_tokens / rollout_s,
            "rollout_bytes_per_s": n_steps * step_bytes / rollout_s,
            "grpo_step_s": marks[-1] - marks[0],
            "grpo_rollout_s": rollout_s,
            "grpo_reference_s": reference_s,
            "grpo_update_s": update_s,
            "mean_length": n_tokens / len(done),
            "padding": 1 - (host["segments"][:n_micro] > 0).mean(),
        }


def measure(config: Config) -> dict:
    """Runs what --phases names on the devices at hand; prints and returns medians."""
    filled = {k: v for k, v in MEASURED.items() if getattr(config, k) is None}
    config = dataclasses.replace(config, **filled)
    mesh, cfg = gemma.all_devices(), stage.shape_of(config.model, config.weights)
    known = {"sft": sft_steps, "grpo": grpo_steps}
    device = mesh.devices.flat[0]
    out = {"device": f"{mesh.size} {device.device_kind}", "jax": jax.__version__}
    for phase in config.phases.split(","):
        if phase not in known:
            raise ValueError(f"--phases {phase}: expected some of {', '.join(known)}")
        steps = known[phase](config, cfg, mesh)
        first, *timed = itertools.islice(steps, config.repeats + 1)  # the first one compiles
        out |= {name: float(np.median([row[name] for row in timed])) for name in first}
        out[f"{phase}_compile_s"] = first[f"{phase}_step_s"] - out[f"{phase}_step_s"]
    import resource  # here: Windows has none

    unit = 1 if sys.platform == "darwin" else 1024
    out["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit
    if device.platform != "cpu" and (stats := device.memory_stats()):
        out["peak_device_bytes"] = stats["peak_bytes_in_use"]
    if peak := PEAKS.get(device.device_kind):
        tops = {"sft_model_flops_per_s": peak.flops, "rollout_bytes_per_s": peak.bytes}
        out |= {f"{name}_of_peak": out[name] / tops[name] for name in tops.keys() & out.keys()}
    for name, value in out.items():
        print(f"{name:<30}", value if isinstance(value, str) else f"{value:.4g}")
    return out


# ------------------------------------------------------------------------------------- compiling

PROGRAMS = {  # program: (its part of a phase's name, arguments that outlive a call, flags to lower)
    "prefill": ("prefill", (1, 2, 4), "--max-prompt"),
    "decode": ("decode", (2, 3, 5, 7), "--slots or --max-new"),
    "reference": ("reference", (0, 1), "--micro-rows"),
    "estimate": ("estimate", (0, 1), "--micro-rows"),
    "train_step": ("update", (0, 1, 2), "--micro-rows or --{}-length, or take --remat layer"),
    "critic_step": ("critic", (0, 1, 2), "--micro-rows or --{}-length, or take --remat layer"),
    "eval_step": ("eval", (0, 1), "--micro-rows"),
    "judge": ("judge", (0,), "--judge, to a smaller one"),
}
ENVIRONMENT = {  # libtpu looks for no TPU, ignores other processes that use one, and logs little
    "TPU_SKIP_MDS_QUERY": "1", "ALLOW_MULTIPLE_LIBTPU_LOAD": "1", "TPU_WORKER_ID": "0",
    "TPU_ACCELERATOR_TYPE": "v5litepod-8", "TPU_WORKER_HOSTNAMES": "localhost",
    "TPU_STDERR_LOG_LEVEL": "3", "TPU_MIN_LOG_LEVEL": "3", "TF_CPP_MIN_LOG_LEVEL": "3",
}


def phase_of(script: str, program: str) -> str:
    """The name of a script's program among the phases: sft, sft_eval, grpo_decode, grpo_update."""
    part, *_ = PROGRAMS[program]
    return script if part == "update" and script not in ON_ROLLOUTS else f"{script}_{part}"


def find_libtpu() -> str | None:
    """libtpu's version, once JAX can find it; None, after saying how to get it, if it is absent.

    It is importable, or in $LIBTPU_DIR or ~/.cache/libtpu-VERSION: not in site-packages, where JAX
    would try to start it every time.
    """
    wanted = next(r for r in importlib.metadata.requires("jax") if r.startswith("libtpu"))
    version = re.search(r"==([\d.]*\d)", wanted)[1]  # "libtpu==0.0.42.*; extra == 'tpu'"
    own = os.environ.get("LIBTPU_DIR", f"~/.cache/libtpu-{version}")
    for folder in (Path(own).expanduser(), *map(Path, sys.path)):
        for found in folder.glob("libtpu-*.dist-info"):
            os.environ.setdefault("TPU_LIBRARY_PATH", str(folder / "libtpu" / "libtpu.so"))
            return found.name.split("-")[1].removesuffix(".dist")
    terminal.say("the compiler for TPUs is not here, so memory is added up from shapes, without "
                 "temporaries. Where it has a wheel (Linux): pip install --no-deps --target "
                 f"{own} libtpu=={version}.*")
    return None


def set_environment(target: str | None) -> None:
    """What must be set before JAX looks for devices; a TPU that is here is left alone."""
    chips = [*Path("/dev").glob("accel*"), *Path("/dev/vfio").glob("[0-9]*")]
    if target or not chips:
        os.environ |= ENVIRONMENT | os.environ
    if target:
        jax.config.update("jax_platforms", "cpu")
    if "device_count" not in os.environ.get("XLA_FLAGS", ""):
        with contextlib.suppress(RuntimeError):  # JAX has looked already
            jax.config.update("jax_num_cpu_devices", 8)


def target_mesh(target: str | None) -> tuple[Mesh, str | None]:
    """(mesh to compile for, libtpu's version): of the target, else of the accelerator here.

    With neither it is Kaggle's TPU; without libtpu, a mesh of as many CPU devices.
    """
    if target is None and jax.default_backend() != "cpu":
        return gemma.all_devices(), None
    target = target or KAGGLE
    if not (shape := re.fullmatch(r"v5e:(\d+)x(\d+)", target)):
        raise ValueError(f"--target {target}: expected v5e: and a shape, as in {KAGGLE}")
    if version := find_libtpu():
        from jax.experimental import topologies

        topology = topologies.get_topology_desc(platform="tpu", topology_name=target)
        return gemma.all_devices(topology.devices), version
    n, here = int(shape[1]) * int(shape[2]), jax.devices("cpu")
    if len(here) < n:
        raise ValueError(f"--target {target}: JAX has {len(here)} CPU devices; set "
                         f"XLA_FLAGS=--xla_force_host_platform_device_count={n}")
    return gemma.all_devices(here[:n]), None


def compiled_memory(function, args) -> dict:
    """Bytes of a program on one core as its compiler reports them."""
    try:
        compiled = function.lower(*args).compile()
    except jax.errors.JaxRuntimeError as e:
        needed = re.search(r"hbm.*?([\d.]+)([GM])\)? (?:of|exceeds)", str(e), re.I | re.S)
        if not needed:
            raise
        n_bytes = float(needed[1]) * {"G": 2**30, "M": 2**20}[needed[2]]
        return {"total_bytes": n_bytes}
    m = compiled.memory_analysis()
    new = m.output_size_in_bytes - m.alias_size_in_bytes  # outputs in place of no argument
    return {
        "arguments_bytes": m.argument_size_in_bytes,
        "temporaries_bytes": m.temp_size_in_bytes,
        "total_bytes": m.argument_size_in_bytes + m.temp_size_in_bytes + new,
    }


def tree_bytes(*trees) -> int:
    """Bytes of arrays on one device; other arguments, such as a config, count as 0."""
    here = lambda x: x.sharding.shard_shape(x.shape) if getattr(x, "sharding", None) else x.shape
    kinds = jax.ShapeDtypeStruct | jax.Array | np.ndarray
    arrays = [x for x in jax.tree.leaves(trees) if isinstance(x, kinds)]
    return sum(math.prod(here(x)) * x.dtype.itemsize for x in arrays)


def bytes_beside(program: str, programs: dict) -> int:
    """Bytes that a script keeps on a core while a program runs and that are not its arguments."""
    kept = [*programs["train_step"][1][:3]]  # trained, optimizer state, fixed
    kept += [programs[k][1][0] for k in ("reference", "judge") if k in programs]
    if "estimate" in programs:
        kept.append(programs["estimate"][1][0]["reference"])
    if program in ("prefill", "decode", "judge"):  # these alternate during rollouts
        _, _, params, _, _, prompt_cache, _, state = programs["decode"][1]
        kept += [prompt_cache, state]
        if tree_bytes(params) != tree_bytes(kept[2].get("base")):
            kept.append(params)  # a copy for the rollouts: gathered, or cast from float32
    arguments = programs[program][1]
    return tree_bytes(kept) - tree_bytes([arguments[i] for i in PROGRAMS[program][1]])


def plan(script: str, config, target: str | None = None, only: tuple[str, ...] = ("",)) -> dict:
    """Compiles a script's programs, prints the memory and time they need, and returns both.

    config: the script's own. only: compile phases whose names begin so; time counts all phases.
    """
    set_environment(target)
    config = SCRIPTS[script].resolve(config)
    cfg, (mesh, version) = stage.shape_of(config.model, config.weights), target_mesh(target)
    programs = SCRIPTS[script].programs(config, mesh)
    compiles = mesh.devices.flat[0].platform != "cpu"
    kind = mesh.devices.flat[0].device_kind if compiles else "TPU v5 lite"
    out = {"device": f"{mesh.size} {kind}", "jax": jax.__version__, "libtpu": version,
           "hbm_bytes": {}, "phases": {}}
    where = "split over" if stage.base_is_sharded(cfg, config, mesh) else "on each of"
    print(f"train_{script}.py: {config.model}, LoRA of rank {config.lora_rank} (0: all weights), "
          f"the base in {'int8' if config.base == 'int8' else config.dtype} {where} "
          f"{out['device']}; JAX {jax.__version__}, "
          f"libtpu {version}")
    rows = out["phases"]
    for program in PROGRAMS:
        if program in programs and (phase := phase_of(script, program)).startswith(only):
            row = rows[phase] = {"arguments_bytes": tree_bytes(programs[program][1])}
            if compiles:
                terminal.say(f"compiling {phase}")
                row |= compiled_memory(*programs[program])
            row["beside_bytes"] = bytes_beside(program, programs)
            row["hbm_bytes"] = row.get("total_bytes", row["arguments_bytes"]) + row["beside_bytes"]
            out["hbm_bytes"][phase] = row["hbm_bytes"]
    peak = PEAKS.get(kind)
    for phase, work in step_work(script, config, cfg, mesh, programs).items():
        row = rows.setdefault(phase, {})
        row |= work._asdict()
        if peak:
            times = [(done / top, name) for done, top, name in zip(
                work, peak, ("FLOPs", "HBM", "ICI"), strict=True)]
            row["roofline_s"], row["bound"] = max(times)
    print_phases(script, rows, HBM_BYTES.get(kind, 0), compiles)
    if not peak:
        terminal.say(f"the peaks of a {kind} are not in PEAKS, so there is no estimate of time")
        return out
    out["step_s"] = sum(row.get("roofline_s", 0.0) for row in rows.values()) / EFFICIENCY
    out["session_s"] = runs.parse_time(config.time_limit or "9h")
    out["session"] = print_session(script, config, out["step_s"], out["session_s"])
    return out


COLUMNS = {  # of the table: the field of a phase, and its unit
    "arguments": ("arguments_bytes", 2**30), "temporaries": ("temporaries_bytes", 2**30),
    "beside": ("beside_bytes", 2**30), "in all": ("hbm_bytes", 2**30), "TFLOP": ("flops", 1e12),
    "HBM GB": ("bytes", 1e9), "ICI GB": ("ici", 1e9), "roofline ms": ("roofline_s", 1e-3),
}


def print_phases(script: str, phases: dict, limit: float, compiles: bool) -> None:
    """Prints the memory and time of each phase on a core, and whether it fits `limit` bytes."""
    print("\nOn each core: GiB " + ("as the compiler reports them" if compiles else
          "of the arguments alone, by their shapes (temporaries come on top)")
          + "; what one step computes and moves, by formulas")
    print(" " * 15 + "".join(f"{name:>13}" for name in COLUMNS) + "  bound by")
    for phase, row in phases.items():
        cells = (f"{row[k] / unit:,.2f}" if k in row else "" for k, unit in COLUMNS.values())
        print(f"{phase:<15}" + "".join(f"{x:>13}" for x in cells), "", row.get("bound", ""))
    needs = {phase: row["hbm_bytes"] for phase, row in phases.items() if "hbm_bytes" in row}
    core = f"of a core's {limit / 2**30:.2f}"
    advice = {phase_of(script, program): flags for program, (_, _, flags) in PROGRAMS.items()}
    for phase, n_bytes in needs.items():
        if 0 < limit < n_bytes:
            lower = advice[phase].format("pack" if script in ON_ROLLOUTS else "max")
            print(f"{phase} needs up to {n_bytes / 2**30:.2f} GiB {core}; lower {lower}")
    if compiles and max(needs.values()) <= limit:
        print(f"It fits: at most {max(needs.values()) / 2**30:.2f} GiB {core}.")


def print_session(script: str, config, step_s: float, seconds: float) -> dict:
    """Prints and returns how much a session can do, in whole steps."""
    if script in ON_ROLLOUTS:
        n, what, length = config.prompts * config.group, "rollouts", config.max_new
    else:
        n, what, length = config.batch_rows, "rows", config.max_length
    steps, speed = int(seconds / step_s), n * length / step_s
    done = {"steps": steps, what: steps * n, "tokens": steps * n * length}
    print(f"\nAt {EFFICIENCY:.0%} of the roofline (assumed) a step of {n} {what} of {length} "
          f"tokens takes {step_s:.2f} s:\n{speed:,.0f} tokens/s. {seconds / 3600:g} h are "
          + ", ".join(f"{v:,} {k}" for k, v in done.items())
          + ", less the time to compile, evaluate and save checkpoints.")
    if config.steps:
        print(f"--steps {config.steps} takes {config.steps * step_s / 3600:.2f} h.")
    return done | {"tokens_per_s": speed}


def plan_scripts(config: Config) -> dict:
    """`plan` for each training script that --phases names."""
    wanted = (config.phases or ",".join(SCRIPTS)).split(",")
    known = {*SCRIPTS} | {phase_of(script, program) for script in SCRIPTS for program in PROGRAMS}
    if unknown := set(wanted) - known:
        raise ValueError(f"--phases {', '.join(unknown)}: expected some of "
                         f"{', '.join(sorted(known))}")
    out = {"hbm_bytes": {}, "phases": {}}
    for script in SCRIPTS:
        if only := tuple(phase for phase in wanted if phase.startswith(script)):
            judged = {"rewards": "judge:1"} if config.judge else {}
            given = script_config(script, config, **judged)
            found = plan(script, given, config.target, only)
            out["hbm_bytes"] |= found.pop("hbm_bytes")
            out["phases"] |= found.pop("phases")
            out[script] = found
            print()
    return out


def main(config: Config) -> dict:
    """Measures here, or compiles for a device that is not here; returns the figures."""
    out = measure(config) if config.target is None else plan_scripts(config)
    if config.json:
        print(json.dumps(out))
    return out


if __name__ == "__main__":
    import tyro

    import commandline

    terminal.command(lambda: main(tyro.cli(Config, description=commandline.introduction(__doc__))))
