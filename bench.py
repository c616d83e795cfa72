"""Speed and memory of the training scripts' own jitted functions, on the devices at hand.

    python bench.py --model gemma3-1b --rows 8 --length 1024
    python bench.py --weights folder/with/a/config.json --dtype float32 --remat none --json
    python bench.py --phases grpo --mean-length 40       # completions of many lengths

sft: one LoRA (or full) update. grpo: one step of --prompts times --group completions, its rollout,
reference log-probs and update (one inner epoch) timed apart. Weights and tokens are random; nothing
is loaded but config.json. Random logits are nearly uniform, so a share 1/mean of the vocabulary as
stop tokens makes lengths geometric; without --mean-length every completion is --new-tokens long.
Prints one line a phase and, with --json, one JSON object last.
"""

import dataclasses
import json
import resource
import statistics
import sys
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import gemma
import rewards
import train_grpo
import train_sft
from eval import Problem


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "gemma3-1b"
    """Which Gemma's shapes."""
    weights: str | None = None
    """Folder whose config.json gives the shapes instead."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the base and the activations."""
    phases: str = "sft,grpo"
    """What to measure; peak memory is that of all of them."""
    lora_rank: int = 16
    """Rank of the adapter; 0: every weight is trained."""
    remat: Literal["none", "attention", "layer"] = "layer"
    """What the backward pass computes again."""
    micro_rows: int | None = None
    """Rows a device computes at a time; default: in SFT all of its rows, in GRPO 4."""
    repeats: int = 5
    """Timed steps; the median is printed."""
    json: bool = False
    """Print a JSON object as the last line."""

    # sft
    rows: int = 8
    """Rows of one update, over all devices."""
    length: int = 1024
    """Tokens in a row, none of them padding, all of them in the loss."""

    # grpo
    prompts: int = 8
    """Prompts of one step, over all devices."""
    group: int = 8
    """Completions of each."""
    prompt_length: int = 64
    """Tokens of a prompt."""
    new_tokens: int = 128
    """Tokens of the longest completion."""
    mean_length: int = 0
    """Mean length of the completions before the cut at --new-tokens; 0: all are that long."""
    slots: int = 64
    """Completions that a device writes at a time."""
    pack_length: int | None = None
    """Tokens in a packed row of the update; default: the longest sequence."""
    kl_coef: float = 0.04
    """0: no reference pass."""


def materialise(shapes, vocab: int):
    """Random arrays of the given shapes and shardings: float weights, tokens, segments of ones."""

    def one(path, s):
        name = jax.tree_util.keystr(path)
        if jnp.issubdtype(s.dtype, jax.dtypes.prng_key):
            return jax.random.key(0)
        if s.dtype == jnp.int32 and s.ndim >= 2:
            if "positions" in name:
                x = np.broadcast_to(np.arange(s.shape[-1], dtype=np.int32), s.shape)
            elif "tokens" in name:
                x = np.random.default_rng(0).integers(3, vocab, s.shape, np.int32)
            else:
                x = np.ones(s.shape, np.int32)
            return jax.device_put(x, s.sharding)
        if not s.ndim or s.ndim == 1 or "mu" in name or "nu" in name:
            return jnp.zeros(s.shape, s.dtype, device=s.sharding)
        make = lambda: (jax.random.normal(jax.random.key(0), s.shape) * 0.02).astype(s.dtype)
        return jax.jit(make, out_shardings=s.sharding)()

    return jax.tree_util.tree_map_with_path(one, shapes)


def sft(config: Config, cfg: gemma.Config, mesh: Mesh) -> dict:
    """Times one SFT update."""
    train_step, shapes = train_sft.programs(train_sft.Config(
        model=config.model, weights=config.weights, dtype=config.dtype, batch_rows=config.rows,
        micro_rows=config.micro_rows or config.rows // mesh.size, max_length=config.length,
        lora_rank=config.lora_rank, remat=config.remat,
    ), mesh)["train_step"]  # fmt: skip
    trained, opt, fixed, batch, _, key = materialise(shapes, cfg.vocab_size)
    seconds = []
    for _ in range(config.repeats + 1):
        start = time.perf_counter()
        trained, opt, metrics = train_step(trained, opt, fixed, batch, np.float32(1e-5), key)
        jax.block_until_ready((trained, metrics))
        seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds[1:])
    return {
        "sft_tokens_per_s": config.rows * config.length / step_s,
        "sft_step_s": step_s,
        "sft_step_s_all": seconds[1:],
        "sft_first_step_s": seconds[0],
        "loss": float(metrics["loss"]),
    }


def grpo(config: Config, cfg: gemma.Config, mesh: Mesh) -> dict:
    """Times the phases of one GRPO step, as train_grpo.main runs them."""
    longest = config.prompt_length + config.new_tokens
    c = train_grpo.resolve(train_grpo.Config(
        model=config.model, weights=config.weights, dtype=config.dtype, prompts=config.prompts,
        group=config.group, max_prompt=config.prompt_length, max_new=config.new_tokens,
        slots=config.slots, pack_length=config.pack_length or longest,
        micro_rows=config.micro_rows or 4, lora_rank=config.lora_rank, remat=config.remat,
        kl_coef=config.kl_coef, is_cap=0.0,
    ))  # fmt: skip
    programs = train_grpo.programs(c, mesh)
    train_step, shapes = programs["train_step"]
    trained, opt, fixed, *_ = materialise(shapes, cfg.vocab_size)
    reference = jax.tree.map(jnp.copy, trained)
    sampler, dtype = train_grpo.make_sampler(cfg, c, mesh), jnp.dtype(config.dtype)
    rng, n_stop = np.random.default_rng(0), 0
    if config.mean_length:
        n_stop = cfg.vocab_size // config.mean_length
    times = {"rollout_s": [], "reference_s": [], "update_s": [], "step_s": []}
    rates, lengths, padding = [], [], []
    for step in range(config.repeats + 1):
        prompts = rng.integers(n_stop, cfg.vocab_size, (c.prompts, c.max_prompt)).tolist()
        marks = [time.perf_counter()]
        params, adapter = train_sft.join(trained, fixed, dtype)
        rollouts = list(sampler.sample(params, prompts, c.group, lora=adapter, step=step,
                                       stop=range(n_stop)))  # fmt: skip
        marks.append(time.perf_counter())
        samples = []
        for r in sorted(rollouts, key=lambda r: (r.prompt, r.index)):
            score = rewards.Scored(float(np.mean(r.ids % 2 == 0)), {}, {})
            problem = Problem("", tuple(prompts[r.prompt]), "", None, "auto", (), "")
            samples.append(train_grpo.Sample(problem, r.prompt, r, "", None, False, score))
        groups = [samples[i : i + c.group] for i in range(0, len(samples), c.group)]
        train_grpo.set_advantages(groups, rewards.Mix({}), c)
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
        for name, took in zip(times, [*np.diff(marks), marks[-1] - marks[0]], strict=True):
            times[name].append(float(took))
        if step:
            rates.append(sum(len(r.ids) for r in rollouts) / times["rollout_s"][-1])
            lengths.append(float(np.mean([len(r.ids) for r in rollouts])))
            padding.append(1 - float((host["segments"][:n_micro] > 0).mean()))
    median = {name: statistics.median(took[1:]) for name, took in times.items()}
    return {
        "rollout_tokens_per_s": statistics.median(rates),
        "grpo_step_s": median["step_s"],
        **{f"grpo_{name}": median[name] for name in ("rollout_s", "reference_s", "update_s")},
        "grpo_step_s_all": times["step_s"][1:],
        "grpo_first_step_s": times["step_s"][0],
        "mean_length": statistics.mean(lengths),
        "padding": statistics.mean(padding),
    }


def main(config: Config) -> dict:
    """Measures what --phases names and returns the figures."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    if config.weights:
        cfg = gemma.read_config(config.weights)
    else:
        cfg = gemma.CONFIGS[train_sft.base_name(config)]
    out = {"device": f"{mesh.size} {mesh.devices.flat[0].device_kind}", "jax": jax.__version__}
    for phase in config.phases.split(","):
        if phase not in (known := {"sft": sft, "grpo": grpo}):
            raise ValueError(f"--phases {phase}: expected some of {', '.join(known)}")
        out |= known[phase](config, cfg, mesh)
    out["peak_rss_bytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if "sft_step_s" in out:
        print(f"SFT {out['sft_tokens_per_s']:.0f} tokens/s, {out['sft_step_s']:.2f} s a step of "
              f"{config.rows}x{config.length}, first step {out['sft_first_step_s']:.1f} s with "
              "compiling")  # fmt: skip
    if "grpo_step_s" in out:
        print(f"GRPO {out['grpo_step_s']:.2f} s a step of {config.prompts}x{config.group} "
              f"completions of {out['mean_length']:.0f} tokens: rollout {out['grpo_rollout_s']:.2f}"
              f" ({out['rollout_tokens_per_s']:.0f} tokens/s), reference "
              f"{out['grpo_reference_s']:.2f}, update {out['grpo_update_s']:.2f}, padding "
              f"{out['padding']:.1%}, first step {out['grpo_first_step_s']:.1f} s")  # fmt: skip
    print(f"peak memory {out['peak_rss_bytes'] / 2**30:.2f} GiB on the host")
    if config.json:
        print(json.dumps(out))
    return out


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
