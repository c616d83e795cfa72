"""LoRA: y = x W + s (x A) B (arXiv 2106.09685). Init, merge, stack; PEFT folders in and out.

    adapter = lora.init(cfg, key, rank=16, alpha=32)
    logits_BTV = gemma.logits(params, cfg, tokens_BT, lora=adapter)
    params = lora.merge(params, adapter, cfg)

An adapter is a nested dict of layer-stacked arrays, float32 even on a bfloat16 base:

    {"a": {"q_proj": a_LDR, ...}, "b": {"q_proj": b_LRNH, ...}, "scale": {"q_proj": s_L, ...}}

"a" and "b" are trained, "scale" (alpha/r, or alpha/sqrt(r) with rsLoRA) is not; gemma.linear
applies them. float32 matters: bf16(0.02) + 3e-6 == bf16(0.02), so a bfloat16 A never moves at RL
learning rates.
"""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp

import disk
import gemma
import hub
from gemma import LINEARS, Config, Spec, axis_sizes


def parse_targets(targets: str) -> list[str]:
    """"q,v" or "q_proj,v_proj" -> ["q_proj", "v_proj"]; an unknown name is an error."""
    names = {t.removesuffix("_proj") + "_proj" for t in re.split(r"[,\s]+", targets) if t}
    if not names or names - LINEARS.keys():
        known = ",".join(name.removesuffix("_proj") for name in LINEARS)
        raise ValueError(f"--lora-targets {targets!r}: expected some of {known}")
    return [name for name in LINEARS if name in names]


def init(cfg: Config, key: jax.Array, rank: int, alpha: float, targets: str = ",".join(LINEARS),
         rslora: bool = False) -> dict:
    """A new adapter: A uniform(+-1/sqrt(fan in)) as PEFT's, B zero, so it changes nothing yet."""
    adapter = {"a": {}, "b": {}, "scale": {}}
    for name in parse_targets(targets):
        a_shape, b_shape = shapes(LINEARS[name], cfg, rank)
        bound = math.prod(a_shape[1:-1]) ** -0.5
        key, sub = jax.random.split(key)
        adapter["a"][name] = jax.random.uniform(sub, a_shape, minval=-bound, maxval=bound)
        adapter["b"][name] = jnp.zeros(b_shape)
        adapter["scale"][name] = jnp.full(cfg.num_hidden_layers, scaling(alpha, rank, rslora))
    return adapter


def shapes(spec: Spec, cfg: Config, rank: int) -> tuple[tuple, tuple]:
    """Shapes of A, [L, *inp, R], and B, [L, R, *out]."""
    sizes = axis_sizes(cfg)
    L, inp, out = sizes["L"], [sizes[a] for a in spec.inp], [sizes[a] for a in spec.out]
    return (L, *inp, rank), (L, rank, *out)


def split(adapter: dict) -> tuple[dict, dict]:
    """(the trained part, the fixed part) of an adapter, which is `trained | fixed`."""
    return {k: adapter[k] for k in "ab"}, {"scale": adapter["scale"]}


def scaling(alpha: float, rank: int, rslora: bool) -> float:
    """What the product of A and B is multiplied by: alpha / r, or alpha / sqrt(r) (rsLoRA)."""
    return alpha / (math.sqrt(rank) if rslora else rank)


def rank(adapter: dict) -> int:
    return next(iter(adapter["a"].values())).shape[-1]


def describe(adapter: dict) -> str:
    """The size of an adapter: 'LoRA rank 16 on 182 matrices (q,k,v,...), 13,045,760 weights'."""
    n_matrices = sum(a.shape[0] for a in adapter["a"].values())
    n = sum(x.size for x in jax.tree.leaves(split(adapter)[0]))
    short = ",".join(name.removesuffix("_proj") for name in adapter["a"])
    return f"LoRA rank {rank(adapter)} on {n_matrices} matrices ({short}), {n:,} weights"


def with_dropout(adapter: dict, rate: float, key: jax.Array) -> dict:
    """The adapter with dropout on its inputs for one forward pass; each layer gets its own key."""
    if rate == 0.0:
        return adapter
    L = next(iter(adapter["scale"].values())).shape[0]
    return adapter | {"dropout": {"key": jax.random.split(key, L), "keep": jnp.full(L, 1.0 - rate)}}


def delta(adapter: dict, name: str, i: int) -> jax.Array | None:
    """s A B [*inp, *out] of a matrix of layer i, float32; None if the adapter has none for it."""
    if name not in adapter["a"]:
        return None
    inp, out = LINEARS[name].inp, LINEARS[name].out
    a, b, scale = (adapter[k][name][i] for k in ("a", "b", "scale"))
    return jnp.einsum(f"{inp}R,R{out},->{inp}{out}", a, b, scale, precision="highest")


def merge(params: dict, adapter: dict, cfg: Config) -> dict:
    """Parameters with s A B added, in float32, cast once to the base's dtype."""
    if gemma.is_int8(params):
        raise ValueError("an adapter is merged into unquantised weights; these are int8")
    layers = dict(params["layers"])
    for name in adapter["a"]:
        change = jnp.stack([delta(adapter, name, i) for i in range(cfg.num_hidden_layers)])
        layers[name] = (layers[name].astype(jnp.float32) + change).astype(layers[name].dtype)
    return params | {"layers": layers}


def stack(first: dict, second: dict, cfg: Config) -> dict:
    """One adapter that does what two do: its rank is the sum of theirs, its B holds the scales."""
    out = {"a": {}, "b": {}, "scale": {}}
    for name in (n for n in LINEARS if n in first["a"] or n in second["a"]):
        parts = []
        for adapter in (first, second):
            a, b = (jnp.zeros(shape) for shape in shapes(LINEARS[name], cfg, rank(adapter)))
            if name in adapter["a"]:
                s_L = adapter["scale"][name].reshape(-1, *[1] * (b.ndim - 1))
                a, b = adapter["a"][name], adapter["b"][name] * s_L
            parts.append((a, b))
        out["a"][name] = jnp.concatenate([a for a, _ in parts], axis=-1)
        out["b"][name] = jnp.concatenate([b for _, b in parts], axis=1)
        out["scale"][name] = jnp.ones(cfg.num_hidden_layers)
    return out


def write_prompt(folder: Path, system: str) -> None:
    """Writes prompt.json, the system text of an adapter or model, for later stages and eval."""
    (folder / "prompt.json").write_text(json.dumps({"system": system}, ensure_ascii=False))


def read_prompt(adapter: str | None, system: str | None) -> str | None:
    """The system text that `--adapter` was trained under; ValueError if --system is another."""
    if adapter is None:
        return system
    folder = hub.find_adapter(adapter)
    file = folder / "prompt.json"
    if not file.exists():
        return system
    trained = disk.json_value(disk.read_json(file), "system", str, ..., file)
    if system is not None and system != trained:
        raise ValueError(f"--system {system!r}, but {folder} was trained under {trained!r}: "
                         "leave --system out, or begin without --adapter")
    return trained


def read_size(folder: Path) -> dict:
    """{"lora_rank", "lora_alpha"} of an adapter folder; {} where it holds none."""
    import adapter_files

    if not (file := folder / "adapter_config.json").exists():
        return {}
    rank, alpha, _, rslora = adapter_files.read_settings(file)
    return {"lora_rank": rank, "lora_alpha": alpha * math.sqrt(rank) if rslora else alpha}


def save(path: str | Path, adapter: dict, cfg: Config, base: str = "",
         dropout: float = 0.0) -> None:
    """Writes a PEFT adapter folder, in float32. base: the name or the folder of its base model."""
    import adapter_files  # here, as below: this page is not about the formats of files

    adapter_files.save(path, adapter, cfg, base, dropout)


def load(path: str | Path, cfg: Config) -> dict:
    """A PEFT adapter folder -> adapter; a tensor that this model cannot take is an error."""
    import adapter_files

    return adapter_files.load(path, cfg)


if __name__ == "__main__":
    from merge import command  # which imports this file

    command()
