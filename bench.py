"""Speed and memory of the training scripts' own jitted functions, on the devices at hand.

    python bench.py --model gemma3-1b --rows 8 --length 1024
    python bench.py --weights folder/with/a/config.json --rows 16 --length 256 --json

Weights and tokens are random; nothing is loaded but config.json. Prints one line a function and,
with --json, one JSON object last.
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
from jax.sharding import AxisType

import train_sft


@dataclasses.dataclass(frozen=True)
class Config:
    model: str = "gemma3-1b"
    """Which Gemma's shapes."""
    weights: str | None = None
    """Folder whose config.json gives the shapes instead."""
    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    """Of the base and the activations."""
    rows: int = 8
    """Rows of one update, over all devices."""
    micro_rows: int | None = None
    """Rows a device computes at a time; default: all of its rows at once."""
    length: int = 1024
    """Tokens in a row, none of them padding, all of them in the loss."""
    lora_rank: int = 16
    """Rank of the adapter; 0: every weight is trained."""
    remat: Literal["none", "attention", "layer"] = "layer"
    """What the backward pass computes again."""
    repeats: int = 5
    """Timed steps; the median is printed."""
    json: bool = False
    """Print a JSON object as the last line."""


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


def main(config: Config) -> dict:
    """Times one SFT update and returns the figures."""
    mesh = jax.make_mesh((jax.device_count(),), ("data",), axis_types=(AxisType.Auto,))
    sft = train_sft.Config(
        model=config.model, weights=config.weights, dtype=config.dtype, batch_rows=config.rows,
        micro_rows=config.micro_rows or config.rows // mesh.size, max_length=config.length,
        lora_rank=config.lora_rank, remat=config.remat,
    )  # fmt: skip
    train_step, shapes = train_sft.programs(sft, mesh)["train_step"]
    vocab = shapes[0]["embed_tokens"] if "embed_tokens" in shapes[0] else shapes[2]["base"]
    vocab = (vocab["embed_tokens"] if isinstance(vocab, dict) else vocab).shape[0]
    trained, opt, fixed, batch, lr, key = materialise(shapes, vocab)
    began = time.perf_counter()
    seconds = []
    for i in range(config.repeats + 1):
        start = time.perf_counter()
        trained, opt, metrics = train_step(trained, opt, fixed, batch, np.float32(1e-5), key)
        jax.block_until_ready((trained, metrics))
        if i == 0:
            first_s = time.perf_counter() - began
        else:
            seconds.append(time.perf_counter() - start)
    step_s = statistics.median(seconds)
    out = {
        "sft_tokens_per_s": config.rows * config.length / step_s,
        "sft_step_s": step_s,
        "sft_step_s_all": seconds,
        "first_step_s": first_s,
        "peak_rss_bytes": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024,
        "loss": float(metrics["loss"]),
        "device": f"{mesh.size} {mesh.devices.flat[0].device_kind}",
        "jax": jax.__version__,
    }
    print(
        f"SFT {out['sft_tokens_per_s']:.0f} tokens/s, {step_s:.2f} s a step of {config.rows}x"
        f"{config.length}, first step {first_s:.1f} s with compiling, "
        f"peak {out['peak_rss_bytes'] / 2**30:.2f} GiB on the host"
    )
    if config.json:
        print(json.dumps(out))
    return out


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
