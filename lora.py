"""LoRA: y = x W + s (x A) B (arXiv 2106.09685). Init, merge, and PEFT's files in and out.

    adapter = lora.init(cfg, key, rank=16, alpha=32)
    logits_BTV = gemma.logits(params, cfg, tokens_BT, lora=adapter)
    params = lora.merge(params, adapter, cfg)
    python lora.py --model gemma3-1b --adapter runs/sft --out merged      # for other programs

An adapter is a nested dict of layer-stacked arrays, float32 even on a bfloat16 base:

    {"a": {"q_proj": a_LDR, ...}, "b": {"q_proj": b_LRNH, ...}, "scale": {"q_proj": s_L, ...}}

"a" and "b" are trained, "scale" (alpha/r, or alpha/sqrt(r) with rsLoRA) is not. Masters in float32
matter: bf16(0.02) + 3e-6 == bf16(0.02), so a bfloat16 A never moves at RL learning rates.
gemma.linear applies it; this file makes, merges, loads and saves it.
"""

import dataclasses
import json
import math
import re
import sys
from pathlib import Path
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

import gemma
import hub
from gemma import LINEARS, Config, Spec, axis_sizes, text_only_name


def parse_targets(targets: str) -> list[str]:
    """The matrices named by "q,v" or "q_proj,v_proj"; a name that matches none is an error."""
    names = {t.removesuffix("_proj") + "_proj" for t in re.split(r"[,\s]+", targets) if t}
    if unknown := [name.removesuffix("_proj") for name in names - LINEARS.keys()]:
        known = ",".join(name.removesuffix("_proj") for name in LINEARS)
        raise ValueError(f"--lora-targets: {unknown[0]!r} matches no matrix, expected some of "
                         f"{known}")
    if not names:
        raise ValueError("--lora-targets is empty: nothing would be trained")
    return [name for name in LINEARS if name in names]


def init(cfg: Config, key: jax.Array, rank: int, alpha: float, targets: str = ",".join(LINEARS),
         rslora: bool = False) -> dict:
    """A fresh adapter: A uniform(+-1/sqrt(fan in)) as PEFT's, B zero, so it changes nothing yet."""
    if rank < 1:
        raise ValueError(f"--lora-rank {rank}: an adapter needs a rank of 1 or more")
    adapter = {"a": {}, "b": {}, "scale": {}}
    for name in parse_targets(targets):
        a_shape, b_shape = _shapes(LINEARS[name], cfg, rank)
        bound = math.prod(a_shape[1:-1]) ** -0.5
        key, sub = jax.random.split(key)
        adapter["a"][name] = jax.random.uniform(sub, a_shape, minval=-bound, maxval=bound)
        adapter["b"][name] = jnp.zeros(b_shape)
        scale = alpha / (math.sqrt(rank) if rslora else rank)
        adapter["scale"][name] = jnp.full(cfg.num_hidden_layers, scale)
    return adapter


def _shapes(spec: Spec, cfg: Config, rank: int) -> tuple[tuple, tuple]:
    """Shapes of A, [L, *inp, R], and B, [L, R, *out]."""
    sizes = axis_sizes(cfg)
    L, inp, out = sizes["L"], [sizes[a] for a in spec.inp], [sizes[a] for a in spec.out]
    return (L, *inp, rank), (L, rank, *out)


def split(adapter: dict) -> tuple[dict, dict]:
    """(what is trained, what is not); join them again with `trained | fixed`."""
    return {k: adapter[k] for k in "ab"}, {"scale": adapter["scale"]}


def rank(adapter: dict) -> int:
    return next(iter(adapter["a"].values())).shape[-1]


def describe(adapter: dict) -> str:
    """What is adapted, counted: 'LoRA rank 16 on 182 matrices (q,k,v,...), 13,045,760 weights'."""
    names = list(adapter["a"])
    n_matrices = sum(a.shape[0] for a in adapter["a"].values())
    n = sum(x.size for x in jax.tree.leaves(split(adapter)[0]))
    short = ",".join(name.removesuffix("_proj") for name in names)
    return f"LoRA rank {rank(adapter)} on {n_matrices} matrices ({short}), {n:,} weights"


def with_dropout(adapter: dict, rate: float, key: jax.Array) -> dict:
    """The adapter with dropout on its inputs, for one training forward; each layer its own key."""
    if rate == 0.0:
        return adapter
    L = next(iter(adapter["scale"].values())).shape[0]
    return adapter | {"dropout": {"key": jax.random.split(key, L), "keep": jnp.full(L, 1.0 - rate)}}


def merge(params: dict, adapter: dict, cfg: Config) -> dict:
    """Parameters with s A B added, in float32, cast once to the base's dtype."""
    layers = dict(params["layers"])
    for name in adapter["a"]:
        inp, out = LINEARS[name].inp, LINEARS[name].out
        delta = jnp.einsum(f"L{inp}R,LR{out},L->L{inp}{out}", adapter["a"][name],
                           adapter["b"][name], adapter["scale"][name],
                           precision="highest")
        layers[name] = (layers[name].astype(jnp.float32) + delta).astype(layers[name].dtype)
    return params | {"layers": layers}


def stack(first: dict, second: dict, cfg: Config) -> dict:
    """One adapter that does what the two do together, of their ranks' sum; scales go into B."""
    names = [n for n in LINEARS if n in first["a"] or n in second["a"]]
    parts = {}
    for adapter in (first, second):
        r = rank(adapter)
        for name in names:
            a_shape, b_shape = _shapes(LINEARS[name], cfg, r)
            a = adapter["a"].get(name, np.zeros(a_shape, "f4"))
            b = adapter["b"].get(name, np.zeros(b_shape, "f4"))
            s_L = adapter["scale"].get(name, np.zeros(cfg.num_hidden_layers, "f4"))
            parts.setdefault(name, []).append((a, b * s_L.reshape(-1, *[1] * (b.ndim - 1))))
    return {
        "a": {n: jnp.concatenate([a for a, _ in p], axis=-1) for n, p in parts.items()},
        "b": {n: jnp.concatenate([b for _, b in p], axis=1) for n, p in parts.items()},
        "scale": {n: jnp.ones(cfg.num_hidden_layers) for n in names},
    }


# --------------------------------------------------------------------------- from stage to stage


def continue_from(path: Path | None, params: dict, cfg: Config, new_rank: int,
                  targets: list[str]) -> tuple[dict, dict | None, dict | None]:
    """(parameters, the adapter to go on training, the adapter that was merged instead).

    An adapter of another rank or on other matrices is merged into the base; `stack` brings it
    back when the new one is saved, so that what is saved always belongs on the original base.
    """
    if path is None:
        return params, None, None
    adapter = load(path, cfg)
    if rank(adapter) == new_rank and set(adapter["a"]) == set(targets):
        return params, adapter, None
    return merge(params, adapter, cfg), None, adapter


def write_prompt(folder: Path, system: str) -> None:
    """Leaves the system text beside an adapter or model, for the next stage and for eval."""
    (folder / "prompt.json").write_text(json.dumps({"system": system}, ensure_ascii=False))


def read_prompt(adapter: str | None, system: str | None) -> str | None:
    """The system text that `--adapter` was trained under; another one given is an error."""
    if adapter is None:
        return system
    folder = hub.find_adapter(adapter)
    if not (folder / "prompt.json").exists():
        return system
    trained = json.loads((folder / "prompt.json").read_text())["system"]
    if system is not None and system != trained:
        raise ValueError(f"--system {system!r}, but {folder} was trained under {trained!r}: "
                         "leave --system out, or begin without --adapter")
    return trained


# ------------------------------------------------------------------------------------ PEFT files


def save(path: str | Path, adapter: dict, cfg: Config, base: str = "", dropout: float = 0.0,
         multimodal: bool = False) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them, in float32.

    base: what to call the base model in the config. multimodal: name the tensors for
    Gemma3ForConditionalGeneration (4b and larger), not for the text-only class.
    """
    path, r = Path(path), rank(adapter)
    adapter = jax.device_get(adapter)
    tensors, alphas = {}, {}
    for name, spec in ((n, LINEARS[n]) for n in adapter["a"]):
        for i in range(cfg.num_hidden_layers):
            module = spec.name.format(i=i).removesuffix(".weight")
            if multimodal:
                module = module.replace("model.", "model.language_model.", 1)
            a_DR = adapter["a"][name][i].reshape(-1, r)
            b_RF = adapter["b"][name][i].reshape(r, -1)
            prefix = f"base_model.model.{module}"
            tensors[f"{prefix}.lora_A.weight"] = np.ascontiguousarray(a_DR.T)
            tensors[f"{prefix}.lora_B.weight"] = np.ascontiguousarray(b_RF.T)
            alphas[module] = round(float(adapter["scale"][name][i]) * r, 5)
    common = max(set(alphas.values()), key=list(alphas.values()).count)
    config = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": r,
        "lora_alpha": common,
        "alpha_pattern": {m: alpha for m, alpha in alphas.items() if alpha != common},
        # a list would name the matrices of the vision tower too
        "target_modules": rf".*language_model.*\.({'|'.join(adapter['a'])})"
        if multimodal
        else list(adapter["a"]),
        "lora_dropout": dropout,
        "use_rslora": False,  # folded into lora_alpha
        "inference_mode": True,
    }
    try:
        path.mkdir(parents=True, exist_ok=True)
        save_file(tensors, path / "adapter_model.safetensors", metadata={"format": "pt"})
        (path / "adapter_config.json").write_text(json.dumps(config, indent=2))
    except (OSError, SafetensorError) as e:
        raise ValueError(f"{path}: cannot write the adapter there ({e})") from None


_KEY = re.compile(r"model\.layers\.(\d+)\.[a-z_]+\.(\w+_proj)\.lora_([AB])(?:\.default)?\.weight")


def load(path: str | Path, cfg: Config) -> dict:
    """A PEFT adapter directory -> adapter; text-only and multimodal names, rank/alpha patterns.

    Matrices of unequal rank are zero-padded to the largest. A tensor that this model cannot take
    raises ValueError: PEFT itself only warns, and the adapter would do nothing.
    """
    config_file, file = (
        Path(path) / f for f in ("adapter_config.json", "adapter_model.safetensors")
    )
    try:
        config = json.loads(config_file.read_text())
        tensors = load_file(file)
    except (OSError, ValueError, SafetensorError) as e:
        raise ValueError(f"{path}: not a readable PEFT adapter ({e})") from None
    if config.get("peft_type") != "LORA" or config.get("use_dora") or config.get("fan_in_fan_out"):
        raise ValueError(f"{config_file}: expected plain LoRA (no DoRA, no fan_in_fan_out)")
    found = {}  # (matrix, layer) -> (A [r, in], B [out, r], alpha / r)
    for key, tensor in tensors.items():
        m = _KEY.fullmatch(text_only_name(key.removeprefix("base_model.model.")) or "")
        if not m or m[2] not in LINEARS or int(m[1]) >= cfg.num_hidden_layers:
            raise ValueError(f"{file}: tensor {key} has no place in this model")
        module = key.removeprefix("base_model.model.").split(".lora_")[0]  # as patterns name it
        found.setdefault((m[2], int(m[1])), {"module": module})[m[3]] = np.float32(tensor)
    if not found:
        raise ValueError(f"{file}: holds no LoRA matrices")
    R = max(len(pair.get("A", ())) for pair in found.values())
    names = [n for n in LINEARS if n in {name for name, _ in found}]
    shapes = {n: _shapes(LINEARS[n], cfg, R) for n in names}
    adapter = {"a": {n: np.zeros(a_shape, "f4") for n, (a_shape, _) in shapes.items()},
               "b": {n: np.zeros(b_shape, "f4") for n, (_, b_shape) in shapes.items()},
               "scale": {n: np.zeros(cfg.num_hidden_layers, "f4") for n in names}}
    for name, i in sorted(found, key=lambda at: names.index(at[0])):
        (a_shape, b_shape), pair = shapes[name], found[name, i]
        r = len(pair.get("A", ()))
        expected = (r, math.prod(a_shape[1:-1])), (math.prod(b_shape[2:]), r)
        its = tuple(pair[k].shape if k in pair else None for k in "AB")
        if its != expected:
            raise ValueError(f"{file}: {pair['module']} has lora_A, lora_B of shapes {its}, "
                             f"expected {expected} for this model")
        adapter["a"][name][i, ..., :r] = pair["A"].T.reshape(*a_shape[1:-1], r)
        adapter["b"][name][i, :r] = pair["B"].T.reshape(r, *b_shape[2:])
        # PEFT's rule: the first key that, as a regular expression, matches the end of the name.
        alphas = (value for key, value in (config.get("alpha_pattern") or {}).items()
                  if re.match(rf"(.*\.)?({key})$", pair["module"]))
        alpha = next(alphas, config.get("lora_alpha", 8))
        adapter["scale"][name][i] = alpha / (math.sqrt(r) if config.get("use_rslora") else r)
    return jax.tree.map(jnp.asarray, adapter)


# --------------------------------------------------------------------------- for other programs


def main(adapter: str, out: str, model: str = "tiny", weights: str | None = None,
         tokenizer: str | None = None,
         dtype: Literal["float32", "bfloat16"] = "bfloat16") -> None:
    """Merges an adapter into its base: a whole Hugging Face model, as vLLM and llama.cpp take it.

    Of the larger Gemma 3 it is the text part, without the vision tower.

    Args:
        adapter: A run folder, its final/, or a PEFT adapter.
        out: Folder to write.
        model: Which Gemma the adapter belongs on, as in training.
        weights: Folder of its weights; default: looked for by name.
        tokenizer: Folder or file of the tokenizer, where the weights folder holds none.
        dtype: Of the merged weights; the sum itself is made in float32.
    """
    import data  # text is data.py's; only a merge copies the tokenizer

    base, path = hub.find_start(model, weights, adapter)
    if path is None:
        raise ValueError(f"--adapter {adapter}: a whole model already, there is nothing to merge")
    if Path(out).resolve() == base.resolve():
        raise ValueError(f"--out {out} is the base itself: name another folder")
    tok = data.Tokenizer(tokenizer or base)
    cfg, params = gemma.load(base, jnp.dtype(dtype))
    params = merge(params, load(path, cfg), cfg)
    stops = tuple(sorted({*cfg.eos_token_id, *tok.stop_ids}))  # a base model has only <eos>
    gemma.save(out, dataclasses.replace(cfg, eos_token_id=stops), params)
    tok.save(out)
    file = Path(out) / "config.json"  # llama.cpp's converter reads one stop id there, and no list
    file.write_text(json.dumps(json.loads(file.read_text()) | {"eos_token_id": tok.eos}, indent=2))
    if system := read_prompt(adapter, None):
        write_prompt(Path(out), system)
    print(f"{out}: {path} merged into {base}, {dtype}")


if __name__ == "__main__":
    import tyro

    try:
        tyro.cli(main)
    except ValueError as e:
        sys.exit(f"error: {e}")
