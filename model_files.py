"""Hugging Face model folders: config.json and safetensors, read and written.

    cfg, params = gemma.load("path/to/gemma-3-1b-it", jnp.bfloat16)    # calls model_files.load
    gemma.save("copy", cfg, params)

The files must hold exactly the tensors that the config asks for: any that is missing, unknown or of
another shape is a ValueError that names it.
"""

import dataclasses
import functools
import json
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

import gemma
from disk import json_value, read_json
from gemma import Config, Int8, Spec, axis_sizes, quantise, specs

# ----------------------------------------------------------------------------------- config.json

DEFAULTS = {  # by model_type: what transformers takes for a key that config.json lacks
    "gemma2": gemma.CONFIGS["gemma2-2b"],
    "gemma3": dataclasses.replace(
        gemma.CONFIGS["gemma3-4b"], hidden_size=2304, intermediate_size=9216, num_hidden_layers=26,
        sliding_window=4096, is_global=(), rope_factor=1.0),
}
DEFAULTS["gemma3_text"] = DEFAULTS["gemma3"]
LAYER_TYPES = ("sliding_attention", "full_attention")  # by is_global


def config_from_dict(hf: dict, source: str = "config.json") -> Config:
    """Reads a Hugging Face config of any Gemma 2/3, in 4.x and 5.x spelling, nested or flat.

    Published multimodal files omit most of `text_config`; absent keys take transformers' defaults.
    """
    read = functools.partial(json_value, source=source)
    default = DEFAULTS.get(str(hf.get("model_type")))
    if default is None:
        raise ValueError(f"{source}: model_type is {hf.get('model_type')!r:.60}, expected one of "
                         f"{', '.join(DEFAULTS)}")
    raw, gemma3 = read(hf, "text_config", dict, hf), default.model_type == "gemma3_text"
    # In transformers 5 RoPE is one dict, or one for each layer type; 4.x has separate fields.
    rope = read(raw, "rope_parameters", dict, {})
    far = read(rope, "full_attention", dict, rope) or read(raw, "rope_scaling", dict, {})
    near = read(rope, "sliding_attention", dict, {} if gemma3 else far)
    for key, value, *accepted in (
        ("hidden_activation", raw.get("hidden_activation"), "gelu_pytorch_tanh", "gelu"),
        ("use_bidirectional_attention", raw.get("use_bidirectional_attention"), False),
        ("rope_type", far.get("rope_type", far.get("type")), "default", "linear"),
        ("RoPE factor of local layers", near.get("factor"), 1.0),
    ):
        if value not in (None, *accepted):
            raise ValueError(f"{source}: {key} is {value!r:.60}, expected one of {accepted}")
    n = read(raw, "num_hidden_layers", int, default.num_hidden_layers, high=1000)
    every = read(raw, "_sliding_window_pattern", int, 6 if gemma3 else 2)
    every = read(raw, "sliding_window_pattern", int, every)
    types = read(raw, "layer_types", list, [LAYER_TYPES[(i + 1) % every == 0] for i in range(n)])
    if len(types) != n or any(t not in LAYER_TYPES for t in types):
        raise ValueError(f"{source}: layer_types is {types!r:.60}, expected {n} of {LAYER_TYPES}")
    fields = {field.name: field.type for field in dataclasses.fields(Config)}
    values = {key: read(raw, key, kind, getattr(default, key))
              for key, kind in fields.items() if kind in (int, float, bool)}
    for key in ("attn_logit_softcapping", "final_logit_softcapping"):  # a null turns one off
        values[key] = read(raw, key, float, None if key in raw else getattr(default, key))
    if values["num_attention_heads"] % values["num_key_value_heads"] or values["head_dim"] % 2:
        raise ValueError(f"{source}: num_attention_heads is no multiple of num_key_value_heads, or "
                         f"head_dim {values['head_dim']} is odd")
    tied = read(hf, "tie_word_embeddings", bool, values["tie_word_embeddings"])
    theta = read(far, "rope_theta", float, values["rope_theta"])
    local_theta = values["rope_local_base_freq"] if gemma3 else theta
    return Config(default.model_type, **values | {
        "is_global": tuple(t == LAYER_TYPES[True] for t in types),
        "eos_token_id": _stop_ids(hf, source) or _stop_ids(raw, source) or (1,),
        "tie_word_embeddings": tied, "rope_theta": theta,
        "rope_factor": read(far, "factor", float, 1.0),
        "rope_local_base_freq": read(near, "rope_theta", float, local_theta),
    })


def _stop_ids(values: dict, source: str | Path) -> tuple[int, ...]:
    """eos_token_id as a tuple: files hold one id or a list of them, or none."""
    stops = values.get("eos_token_id")
    stops = stops if isinstance(stops, list) else [stops]
    ids = [json_value({"eos_token_id": i}, "eos_token_id", int, None, source, low=0) for i in stops]
    return tuple(i for i in ids if i is not None)


def read_config(path: str | Path) -> Config:
    """The config.json of a model folder, with the stop ids of its generation_config.json added."""
    file, generation = Path(path) / "config.json", Path(path) / "generation_config.json"
    if not file.exists():
        raise ValueError(f"{file}: no such file; {_found(Path(path))}")
    cfg = config_from_dict(read_json(file), str(file))
    if not generation.exists():
        return cfg
    more = _stop_ids(read_json(generation), generation)  # gemma-2-it: [1, 107] here, 1 there
    return dataclasses.replace(cfg, eos_token_id=tuple(dict.fromkeys(cfg.eos_token_id + more)))


def is_multimodal(path: str | Path) -> bool:
    """Whether a model folder is a Gemma 3 with a vision tower, as 4b, 12b and 27b are published."""
    return read_json(Path(path) / "config.json").get("model_type") == "gemma3"


def config_to_dict(cfg: Config, dtype: str = "float32") -> dict:
    """The Hugging Face config.json of `cfg`, in the spelling that transformers 4.x and 5.x read."""
    gemma3 = cfg.model_type == "gemma3_text"
    hf = dataclasses.asdict(cfg) | {
        "architectures": ["Gemma3ForCausalLM" if gemma3 else "Gemma2ForCausalLM"],
        "layer_types": [LAYER_TYPES[g] for g in cfg.is_global],
        "hidden_activation": "gelu_pytorch_tanh",
        "eos_token_id": list(cfg.eos_token_id),
        "bos_token_id": 2,
        "pad_token_id": 0,
        "torch_dtype": dtype,
    }
    for ours in ("is_global", "rope_factor") + (() if gemma3 else ("rope_local_base_freq",)):
        del hf[ours]
    for p in range(1, cfg.num_hidden_layers + 1):
        if all(g == ((i + 1) % p == 0) for i, g in enumerate(cfg.is_global)):
            hf["sliding_window_pattern"] = p  # all that transformers 4.50 to 4.52 read
    if cfg.rope_factor != 1.0:
        hf["rope_scaling"] = {"factor": cfg.rope_factor, "rope_type": "linear"}
    return hf


# ----------------------------------------------------------------------------------- safetensors


def text_only_name(name: str) -> str | None:
    """A tensor's name in the text-only model; None for the vision tower and its projector.

    language_model.model.norm.weight and model.language_model.norm.weight -> model.norm.weight
    """
    if name.removeprefix("model.").startswith(("vision_tower.", "multi_modal_projector.")):
        return None
    for prefix in ("language_model.model.", "model.language_model."):
        if name.startswith(prefix):
            return "model." + name.removeprefix(prefix)
    return name.removeprefix("language_model.")


def _found(path: Path) -> str:
    found = ", ".join(sorted(f.name for f in path.glob("*"))[:8]) or "nothing"
    return ("expected a Transformers folder: config.json and one .safetensors file or "
            f"model.safetensors.index.json, found {found}")


def _safetensors_files(path: Path) -> list[Path]:
    """model.safetensors, else the files its index names, else the only .safetensors file."""
    single, index = path / "model.safetensors", path / "model.safetensors.index.json"
    if single.exists():
        return [single]
    if index.exists():
        weight_map = json_value(read_json(index), "weight_map", dict, {}, index)
        named = set(map(str, weight_map.values()))
        here = {file.name: file for file in path.glob("*.safetensors")}  # nothing outside is opened
        if missing := sorted(named - here.keys()):
            raise ValueError(f"{index} names {missing[0]!r:.60}, which is not in its folder")
        return [here[name] for name in sorted(named)]
    files = list(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path}: {_found(path)}")
    return files


def open_tensors(file: Path):
    """An open safetensors file, its header read; ValueError where it is none, or only a part."""
    try:
        return safe_open(file, framework="numpy")
    except (SafetensorError, OSError) as e:
        raise ValueError(f"{file}: not a safetensors file, or a part of one ({e}); "
                         "a .bin is never opened, it could run code") from None


def _find_tensors(cfg: Config, path: Path) -> dict[str, tuple[Path, str]]:
    """Each tensor's text-only name -> its file and its name there; all are checked, none is read.

    The files must hold exactly the tensors of `cfg`, and may hold a separate head.
    """
    expected, where, unexpected = {}, {}, []
    for spec in jax.tree.leaves(specs(dataclasses.replace(cfg, tie_word_embeddings=False))):
        for i in range(cfg.num_hidden_layers if spec.stacked else 1):
            expected[spec.name.format(i=i)] = list(spec.hf_shape(cfg))
    for file in _safetensors_files(path):
        with open_tensors(file) as f:
            for name in f.keys():
                text_name = text_only_name(name)
                if text_name not in expected:
                    unexpected += [name] * (text_name is not None)
                    continue
                dtype, shape = f.get_slice(name).get_dtype(), f.get_slice(name).get_shape()
                if shape != expected[text_name] or dtype not in ("BF16", "F16", "F32"):
                    raise ValueError(f"{file}: tensor {name} is {dtype} {shape}, expected BF16, "
                                     f"F16 or F32 {expected[text_name]}; quantised weights cannot "
                                     "be read")
                where[text_name] = file, name
    optional = {"lm_head.weight"} if cfg.tie_word_embeddings else set()
    missing = sorted(expected.keys() - where.keys() - optional)
    if missing or unexpected:
        raise ValueError(f"{path}: found {len(where)} tensors of the model in config.json; missing "
                         f"{len(missing)}: {missing[:3]}, unexpected {len(unexpected)}: "
                         f"{sorted(unexpected)[:3]}")
    return where


def _read(file: Path, name: str) -> np.ndarray:
    # Reopened for each tensor: closing unmaps the file, so its pages never add up in memory.
    with open_tensors(file) as f:
        return f.get_tensor(name)


def _to_devices(file: Path, name: str, sharding: NamedSharding | None, dtype=None) -> jax.Array:
    """One tensor on the devices. With several hosts, each reads only its own shards."""
    cast = lambda x: x.astype(dtype or x.dtype, copy=False)
    if sharding is None or sharding.is_fully_addressable:
        return jax.device_put(cast(_read(file, name)), sharding)
    with open_tensors(file) as f:
        tensor = f.get_slice(name)
        shape = tuple(tensor.get_shape())
        return jax.make_array_from_callback(shape, sharding, lambda shard: cast(tensor[shard]))


@functools.partial(jax.jit, static_argnames=("spec", "shape"), donate_argnums=0)
def _set_layer(leaf, tensor, i, delta, spec, shape):
    """leaf[i] = one tensor of a file, transposed from torch's [out, inp] to [inp, out], + delta."""
    out, inp = shape
    tensor = tensor.reshape(out + inp)
    tensor = tensor.transpose(*range(len(out), len(out + inp)), *range(len(out)))
    if delta is not None:
        tensor = tensor.astype(jnp.float32) + delta
    new = quantise(spec, tensor) if isinstance(leaf, Int8) else tensor.astype(leaf.dtype)
    return jax.tree.map(lambda z, z_new: lax.dynamic_update_index_in_dim(z, z_new, i, 0), leaf, new)


def load(path: str | Path, dtype=jnp.float32, mesh: Mesh | None = None, shard: bool = False,
         int8: bool = False, delta=None):
    """Loads a Hugging Face folder -> (Config, parameters); gemma.load explains the arguments.

    Each tensor goes straight from its file to the device(s), so the host never holds a second copy
    of the model. A separate lm_head.weight is used only if it differs from the embedding.
    """
    cfg = read_config(path)
    where = _find_tensors(cfg, Path(path))
    if "lm_head.weight" in where:
        embedding, own = (_read(*where[n]) for n in ("model.embed_tokens.weight", "lm_head.weight"))
        cfg = dataclasses.replace(cfg, tie_word_embeddings=bool((embedding == own).all()))
        del embedding, own

    def one(spec: Spec) -> jax.Array:
        here = there = scales = None
        quantises = int8 and spec.inp
        if mesh is not None:
            here, scales = (NamedSharding(mesh, s if shard else P())
                            for s in (spec.pspec, spec.scale_pspec))
            split = ("data" if g == "D" and shard else None for g in (spec.out, spec.inp))
            there = NamedSharding(mesh, P(*split) if spec.inp else P())
        if not spec.stacked:  # the embedding, the largest of all, has the same axes in the file
            tensor = _to_devices(*where[spec.name], here, None if quantises else dtype)
            return jax.jit(quantise, static_argnums=0)(spec, tensor) if quantises else tensor
        sizes = lambda axes: tuple(axis_sizes(cfg)[a] for a in axes)
        shape = sizes(spec.out), sizes(spec.inp)
        leaf = jnp.zeros(spec.shape(cfg), jnp.int8 if quantises else dtype, device=here)
        if quantises:
            leaf = Int8(leaf, jnp.zeros(sizes(spec.scale_axes), device=scales))
        for i in range(cfg.num_hidden_layers):
            tensor = _to_devices(*where[spec.name.format(i=i)], there)
            added = delta and delta(spec.name.split(".")[-2], i)
            leaf = _set_layer(leaf, tensor, i, added, spec, shape)
            jax.block_until_ready(leaf)  # one in flight at a time
        return leaf

    return cfg, jax.tree.map(one, specs(cfg))


def save_tensors(path: Path, tensors: dict[str, np.ndarray]) -> None:
    """Writes a safetensors file for PyTorch, readable by whom the umask allows.

    safetensors itself leaves mode 0600: a file that no other user and no web server can read.
    """
    path.unlink(missing_ok=True)
    path.touch()
    mode = path.stat().st_mode
    save_file(tensors, path, metadata={"format": "pt"})
    path.chmod(mode)


def save(path: str | Path, cfg: Config, params: dict) -> None:
    """Writes config.json, generation_config.json and model.safetensors; see gemma.save."""
    path, tensors = Path(path), {}
    for spec, leaf in zip(jax.tree.leaves(specs(cfg)), jax.tree.leaves(params), strict=True):
        for i in range(cfg.num_hidden_layers if spec.stacked else 1):
            tensor = np.asarray(leaf[i] if spec.stacked else leaf)
            if spec.inp and spec.out != "V":  # [inp, out] -> torch's [out, inp]
                n = len(spec.inp)
                tensor = tensor.transpose(*range(n, tensor.ndim), *range(n))
            tensor = np.ascontiguousarray(tensor).reshape(spec.hf_shape(cfg))
            tensors[spec.name.format(i=i)] = tensor
    config = config_to_dict(cfg, params["norm"].dtype.name)
    generation = {k: config[k] for k in ("bos_token_id", "pad_token_id", "eos_token_id")}
    path.mkdir(parents=True, exist_ok=True)
    for old in (*path.glob("model-*-of-*.safetensors"), path / "model.safetensors.index.json"):
        old.unlink(missing_ok=True)  # some programs would read these instead
    save_tensors(path / "model.safetensors", tensors)
    (path / "config.json").write_text(json.dumps(config, indent=2))
    (path / "generation_config.json").write_text(json.dumps(generation, indent=2))
