"""LoRA: y = x W + s (x A) B (arXiv 2106.09685). Init, merge, and PEFT's files in and out.

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
import numpy as np

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
        scale = scaling(alpha, rank, rslora)
        adapter["scale"][name] = jnp.full(cfg.num_hidden_layers, scale)
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
    if not (folder / "prompt.json").exists():
        return system
    file = folder / "prompt.json"
    trained = disk.json_value(disk.read_json(file), "system", str, ..., file)
    if system is not None and system != trained:
        raise ValueError(f"--system {system!r}, but {folder} was trained under {trained!r}: "
                         "leave --system out, or begin without --adapter")
    return trained


def read_size(folder: Path) -> dict:
    """{"lora_rank", "lora_alpha"} of an adapter folder; {} where it holds none."""
    if not (file := folder / "adapter_config.json").exists():
        return {}
    rank, alpha, _, rslora = read_settings(file)
    return {"lora_rank": rank, "lora_alpha": alpha * math.sqrt(rank) if rslora else alpha}


# ------------------------------------------------------------------------------------ PEFT files


def save(path: str | Path, adapter: dict, cfg: Config, base: str = "", dropout: float = 0.0,
         multimodal: bool = False) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them, in float32.

    multimodal: model_files.is_multimodal(base folder). PEFT opens such a base as a class whose
    matrices have other names: under the text-only names the adapter would do nothing, after a
    warning.
    """
    import model_files  # here, as below: only files need it

    path, r, adapter = Path(path), rank(adapter), jax.device_get(adapter)
    tensors, alphas = {}, {}
    for name in adapter["a"]:
        for i in range(cfg.num_hidden_layers):
            module = LINEARS[name].name.format(i=i).removesuffix(".weight")
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
        "peft_type": "LORA", "task_type": "CAUSAL_LM", "inference_mode": True,
        "base_model_name_or_path": base,
        "r": r, "lora_alpha": common, "lora_dropout": dropout,
        "alpha_pattern": {m: alpha for m, alpha in alphas.items() if alpha != common},
        # In a multimodal model a list would name the matrices of the vision tower too.
        "target_modules": (rf".*language_model.*\.({'|'.join(adapter['a'])})" if multimodal
                           else list(adapter["a"])),
        "use_rslora": False,  # lora_alpha already holds the factor
    }
    path.mkdir(parents=True, exist_ok=True)
    model_files.save_tensors(path / "adapter_model.safetensors", tensors)
    (path / "adapter_config.json").write_text(json.dumps(config, indent=2))


SETTINGS = {  # plain LoRA's keys in adapter_config.json -> values they may have; None: any
    **dict.fromkeys((
        "alpha_pattern", "auto_mapping", "base_model_name_or_path", "ensure_weight_tying",
        "eva_config", "exclude_modules", "inference_mode", "layers_pattern", "layers_to_transform",
        "lora_alpha", "lora_dropout", "megatron_core", "peft_version", "qalora_group_size", "r",
        "rank_pattern", "revision", "runtime_config", "target_modules", "task_type", "use_rslora",
    )),
    "peft_type": ("LORA",), "bias": ("none",),
    # The other ways to initialise (pissa, olora, ...) also subtract s A B from the base's weights.
    "init_lora_weights": (True, "gaussian", "orthogonal", "eva"),
}
KEY = re.compile(r"model\.layers\.(\d+)\.[a-z_]+\.(\w+_proj)\.lora_([AB])(?:\.default)?\.weight")


def read_settings(file: Path) -> tuple[int, float, dict[str, float], bool]:
    """(r, lora_alpha, alpha_pattern, use_rslora) of an adapter_config.json that is plain LoRA.

    ValueError names any other setting, such as modules_to_save or use_dora: without it only a part
    of what was trained would be loaded.
    """
    config = disk.read_json(file)
    rank = disk.json_value(config, "r", int, 8, file)
    alpha = disk.json_value(config, "lora_alpha", float, 8, file)
    rslora = disk.json_value(config, "use_rslora", bool, False, file)
    alphas = disk.json_value(config, "alpha_pattern", dict, {}, file)
    alphas = {key: disk.json_value(alphas, key, float, alpha, file) for key in alphas}
    wrong = [f"{key!r:.60} is {value!r:.60}" for key, value in config.items()
             if value and (allowed := SETTINGS.get(key, ())) is not None and value not in allowed]
    # PEFT takes regular expressions, some of which would run for ever: only names are read here.
    wrong += [f"alpha_pattern {key!r:.60}" for key in alphas if not re.fullmatch(r"[\w.]+", key)]
    if wrong:
        raise ValueError(f"{file}: {wrong[0]}; only plain LoRA can be read")
    return rank, alpha, alphas, rslora


def load(path: str | Path, cfg: Config) -> dict:
    """A PEFT adapter folder -> adapter; matrices of unequal rank are zero-padded to the largest.

    A tensor that this model cannot take is an error: PEFT itself only warns, and the adapter would
    do nothing.
    """
    import model_files

    file = Path(path) / "adapter_model.safetensors"
    _, alpha, alphas, rslora = read_settings(Path(path) / "adapter_config.json")
    with model_files.open_tensors(file) as f:  # a .bin is never opened, it could run code
        tensors = {key: f.get_tensor(key) for key in f.keys()}
    found = {name: {} for name in LINEARS}  # {layer: {"module": name, "A": [r, in], "B": [out, r]}}
    for key, tensor in tensors.items():
        m = KEY.fullmatch(model_files.text_only_name(key.removeprefix("base_model.model.")) or "")
        if not m or m[2] not in LINEARS or int(m[1]) >= cfg.num_hidden_layers or tensor.ndim != 2:
            raise ValueError(f"{file}: tensor {key!r:.200} has no place in this model")
        module = key.removeprefix("base_model.model.").split(".lora_")[0]  # as patterns name it
        found[m[2]].setdefault(int(m[1]), {"module": module})[m[3]] = np.float32(tensor)
    R = max((len(t) for key, t in tensors.items() if ".lora_A" in key), default=0)
    adapter = {"a": {}, "b": {}, "scale": {}}
    for name in (name for name in LINEARS if found[name]):
        a, b = (np.zeros(shape, np.float32) for shape in shapes(LINEARS[name], cfg, R))
        s_L = np.zeros(cfg.num_hidden_layers, np.float32)
        for i, pair in found[name].items():
            r = len(pair.get("A", ()))
            expected = (r, math.prod(a.shape[1:-1])), (math.prod(b.shape[2:]), r)
            its = tuple(pair[k].shape if k in pair else None for k in "AB")
            if its != expected or not r:
                raise ValueError(f"{file}: {pair['module']} has lora_A, lora_B of shapes {its}, "
                                 f"expected {expected} for this model")
            a[i, ..., :r] = pair["A"].T.reshape(*a.shape[1:-1], r)
            b[i, :r] = pair["B"].T.reshape(r, *b.shape[2:])
            # PEFT's rule: the first key that is the name or the end of it.
            own = (v for k, v in alphas.items() if f".{pair['module']}".endswith(f".{k}"))
            s_L[i] = scaling(next(own, alpha), r, rslora)
        adapter["a"][name], adapter["b"][name], adapter["scale"][name] = a, b, s_L
    if not adapter["a"]:
        raise ValueError(f"{file}: holds no LoRA matrices")
    return jax.tree.map(jnp.asarray, adapter)


if __name__ == "__main__":
    from merge import command  # which imports this file

    command()
