"""PEFT adapter folders: adapter_config.json and safetensors, read and written.

    adapter = lora.load("runs/sft/final", cfg)    # calls adapter_files.load
    lora.save("copy", adapter, cfg)
"""

import json
import math
import re
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import disk
import lora
import model_files
from gemma import LINEARS, Config


def save(path: str | Path, adapter: dict, cfg: Config, base: str, dropout: float) -> None:
    """Writes adapter_config.json and adapter_model.safetensors as PEFT reads them, in float32.

    PEFT opens a base with a vision tower as a class whose matrices have other names: under the
    text-only names the adapter would do nothing, after a warning.
    """
    is_folder = base and (Path(base) / "config.json").exists()
    multimodal = is_folder and model_files.is_multimodal(base)
    path, r, adapter = Path(path), lora.rank(adapter), jax.device_get(adapter)
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
        a, b = (np.zeros(shape, np.float32) for shape in lora.shapes(LINEARS[name], cfg, R))
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
            s_L[i] = lora.scaling(next(own, alpha), r, rslora)
        adapter["a"][name], adapter["b"][name], adapter["scale"][name] = a, b, s_L
    if not adapter["a"]:
        raise ValueError(f"{file}: holds no LoRA matrices")
    return jax.tree.map(jnp.asarray, adapter)
