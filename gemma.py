"""Gemma 2 and 3 in pure JAX: configs, parameters, forward, prefill, log-probs, safetensors.

    cfg, params = gemma.load("path/to/gemma-3-1b-it", dtype=jnp.bfloat16)
    logits_BTV = gemma.logits(params, cfg, tokens_BT)       # to read; training never builds [B,T,V]
    python gemma.py --weights path/to/gemma-3-1b-it         # check real weights: PASS or FAIL

Every array name ends in its axes, one capital letter each, the same in the whole repository:

    B rows on this device   L layers            N query heads        V vocabulary
    T tokens of a row       D model width       K kv heads           R LoRA rank
    S cache slots           F feed-forward      M = N/K              U prompt tokens
    Q prompts               H head dim          G rollouts a prompt  C completion tokens

What to know when comparing with google-deepmind/gemma and transformers' modeling_gemma2/3.py:

1. Layers differ in two numbers only, a sliding window and RoPE frequencies, so both are *data* of
   one `lax.scan` over the stacked layers. Decoding (sampler.py) calls the same `layer` one by one.
2. In decoding a new token attends to the KV cache and to itself in one softmax, and is written to
   the cache after the last layer. Training and prefill are the same with no cache.
3. sqrt(D) is rounded to the activations' dtype (bf16: 33.94 -> 34.0), as in the published code.
   RMSNorm, RoPE, scores, softmax and log-probs are float32 whatever the weights are.
4. On TPUs whole rows are attended by JAX's splash kernels (`splash`), all else by `attend`.
5. Sharded weights are all-gathered layer by layer (`all_gather_params`); decoding moves the few
   activations between the devices instead (`sharded_matmul`).
6. The matrices of a frozen base may be int8 (`Int8`). They are never dequantised as a whole:
   `matmul` reads int8 and scales the result.
"""

import dataclasses
import functools
import json
import math
import os
import re
import stat
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config:
    """One Gemma; fields are named as in Hugging Face's config.json."""

    model_type: str  # "gemma2" or "gemma3_text"
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    query_pre_attn_scalar: float
    sliding_window: int  # keys a local layer sees, its own included
    is_global: tuple[bool, ...]  # one a layer
    rope_local_base_freq: float
    rope_theta: float  # of the global layers
    rope_factor: float = 1.0  # divides the frequencies of the global layers
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None
    rms_norm_eps: float = 1e-6
    max_position_embeddings: int = 32768
    tie_word_embeddings: bool = True
    eos_token_id: tuple[int, ...] = (1,)

    @property
    def n_params(self) -> int:
        return sum(math.prod(s.shape(self)) for s in jax.tree.leaves(specs(self)))


def _published(family, vocab, d, f, layers, heads, kv, hd, scalar, window, position, factor=1.0):
    gemma3 = family == 3
    return Config(
        "gemma3_text" if gemma3 else "gemma2", vocab, d, f, layers, heads, kv, hd, scalar, window,
        tuple((i + 1) % (6 if gemma3 else 2) == 0 for i in range(layers)),
        rope_local_base_freq=1e4, rope_theta=1e6 if gemma3 else 1e4, rope_factor=factor,
        attn_logit_softcapping=None if gemma3 else 50.0,
        final_logit_softcapping=None if gemma3 else 30.0,
        max_position_embeddings=position,
        eos_token_id=(1, 106) if gemma3 else (1, 107),
    )


CONFIGS = {  # the vocabulary of 4b, 12b and 27b includes 64 rows that no token maps to
    "gemma2-2b": _published(2, 256000, 2304, 9216, 26, 8, 4, 256, 256, 4096, 8192),
    "gemma2-9b": _published(2, 256000, 3584, 14336, 42, 16, 8, 256, 256, 4096, 8192),
    "gemma2-27b": _published(2, 256000, 4608, 36864, 46, 32, 16, 128, 144, 4096, 8192),
    "gemma3-270m": _published(3, 262144, 640, 2048, 18, 4, 1, 256, 256, 512, 32768),
    "gemma3-1b": _published(3, 262144, 1152, 6912, 26, 4, 1, 256, 256, 512, 32768),
    "gemma3-4b": _published(3, 262208, 2560, 10240, 34, 8, 4, 256, 256, 1024, 131072, 8.0),
    "gemma3-12b": _published(3, 262208, 3840, 15360, 48, 16, 8, 256, 256, 1024, 131072, 8.0),
    "gemma3-27b": _published(3, 262208, 5376, 21504, 62, 32, 16, 128, 168, 1024, 131072, 8.0),
    # The model that ships in tiny/: local and global layers, GQA and QK-norm in 0.9 M weights.
    "tiny": Config(
        "gemma3_text", 768, 128, 384, 4, 4, 2, 32, 32, 32, (False, True, False, True), 1e4, 1e6,
        max_position_embeddings=512, eos_token_id=(1, 11),
    ),
}
DEFAULTS = {  # by model_type, transformers' own for what a config.json does not say
    "gemma2": CONFIGS["gemma2-2b"],
    "gemma3": _published(3, 262208, 2304, 9216, 26, 8, 4, 256, 256, 4096, 131072),
}
DEFAULTS["gemma3_text"] = DEFAULTS["gemma3"]
LAYER_TYPES = ("sliding_attention", "full_attention")  # by is_global


def check_file(path: str | Path, limit: float = math.inf) -> None:
    """OSError unless this is a file of at most `limit` bytes: a pipe or a device may never end."""
    if "\0" in str(path):
        raise OSError("its name holds a zero byte")
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise OSError("it is no regular file")
    if status.st_size > limit:
        raise OSError(f"it has {status.st_size:,} bytes, more than {limit:,}")


def read_text(path: str | Path, limit: float = 2**27) -> str:
    """A file as UTF-8; ValueError names it. The largest is tokenizer.json, Gemma's of 33 MB."""
    try:
        check_file(path, limit)
        return Path(path).read_bytes().decode("utf-8-sig")
    except (OSError, ValueError) as e:
        why = getattr(e, "strerror", None) or e
        raise ValueError(f"{path}: cannot be read ({why})") from None


def parse_json(text: str | bytes) -> Any:
    """A JSON value; ValueError for anything else, and where it is nested more than 64 deep."""
    try:
        value = json.loads(text)
    except (ValueError, RecursionError) as e:
        raise ValueError(f"cannot be read as JSON ({e})") from None
    inner = [value]
    for _ in range(65):  # deeper values would end in a RecursionError wherever they are written
        inner = [x for outer in inner if isinstance(outer, dict | list)
                 for x in (outer.values() if isinstance(outer, dict) else outer)]
    if inner:
        raise ValueError("cannot be read as JSON (nested more than 64 deep)")
    return value


def read_json(path: str | Path) -> dict:
    """The JSON object in a file; ValueError where there is none. json_value() checks its values."""
    text = read_text(path)
    try:
        content = parse_json(text)
    except ValueError as e:
        raise ValueError(f"{path}: {e}") from None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: expected a JSON object, found a {type(content).__name__}")
    return content


def json_value(values: dict, key: str, kind: type, default, source: str | Path, low=1e-12,
               high=2**24):
    """values[key], or the default where it is absent or null; `...` as default: it must be there.

    ValueError unless it is a `kind`: a number from `low` to `high` (whole numbers are floats too,
    true and false are no numbers), a text that can be written as UTF-8.
    """
    value = values.get(key)
    if value is None and default is not ...:
        return default
    is_number = kind in (int, float)
    limits = f" from {math.ceil(low) if kind is int else low:g} to {high}" if is_number else ""
    right = isinstance(value, (int, float) if kind is float else kind)
    right = right and (kind is bool or not isinstance(value, bool))
    right = right and not (kind is str and re.search("[\0\ud800-\udfff]", value))
    if not right or is_number and not low <= value <= high:
        raise ValueError(f"{source}: {key} is {value!r:.60}, expected {kind.__name__}{limits}")
    return value


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


# ------------------------------------------------------------------------------------ parameters


@dataclasses.dataclass(frozen=True)
class Spec:
    """One parameter. A linear layer maps axes `inp` to `out` and is stored as [inp, out] here.

    A file holds torch's [out, inp] with the axes merged: q_proj is DNH here, [N*H, D] there.
    """

    name: str  # in a Hugging Face file; "{i}" stands for the layer
    out: str
    inp: str = ""

    @property
    def stacked(self) -> bool:
        return "{i}" in self.name

    @property
    def axes(self) -> str:
        # The embedding is the one matrix read by row: [V, D] on both sides.
        inner = self.out + self.inp if self.out == "V" else self.inp + self.out
        return "L" * self.stacked + inner

    def shape(self, cfg: Config) -> tuple[int, ...]:
        return tuple(axis_sizes(cfg)[a] for a in self.axes)

    def hf_shape(self, cfg: Config) -> tuple[int, ...]:
        groups = [g for g in (self.out, self.inp) if g]
        return tuple(math.prod(axis_sizes(cfg)[a] for a in g) for g in groups)

    @property
    def pspec(self) -> P:
        """When the base is sharded: every matrix is split along D, vectors are replicated."""
        return P(*("data" if a == "D" and self.inp else None for a in self.axes))

    @property
    def scale_axes(self) -> str:
        return "L" * self.stacked + self.out

    @property
    def scale_pspec(self) -> P:
        """The same for the scales of an int8 matrix, one for each output."""
        return P(*("data" if a == "D" else None for a in self.scale_axes))


def axis_sizes(cfg: Config) -> dict[str, int]:
    """The length of each axis letter of a parameter."""
    return {
        "V": cfg.vocab_size, "D": cfg.hidden_size, "F": cfg.intermediate_size,
        "L": cfg.num_hidden_layers, "N": cfg.num_attention_heads, "K": cfg.num_key_value_heads,
        "H": cfg.head_dim,
    }


LINEARS = {  # the seven matrices LoRA can adapt
    "q_proj": Spec("model.layers.{i}.self_attn.q_proj.weight", "NH", "D"),
    "k_proj": Spec("model.layers.{i}.self_attn.k_proj.weight", "KH", "D"),
    "v_proj": Spec("model.layers.{i}.self_attn.v_proj.weight", "KH", "D"),
    "o_proj": Spec("model.layers.{i}.self_attn.o_proj.weight", "D", "NH"),
    "gate_proj": Spec("model.layers.{i}.mlp.gate_proj.weight", "F", "D"),
    "up_proj": Spec("model.layers.{i}.mlp.up_proj.weight", "F", "D"),
    "down_proj": Spec("model.layers.{i}.mlp.down_proj.weight", "D", "F"),
}
NORMS = {
    f"{n}_layernorm": Spec(f"model.layers.{{i}}.{n}_layernorm.weight", "D")
    for n in ("input", "post_attention", "pre_feedforward", "post_feedforward")
}


def specs(cfg: Config) -> dict:
    """The one table of parameters: a dict of `Spec`, nested like the parameters themselves."""
    layers = dict(LINEARS) | NORMS
    if cfg.model_type == "gemma3_text":
        for n in ("q_norm", "k_norm"):
            layers[n] = Spec(f"model.layers.{{i}}.self_attn.{n}.weight", "H")
    tree = {"embed_tokens": Spec("model.embed_tokens.weight", "V", "D"),
            "norm": Spec("model.norm.weight", "D"), "layers": layers}
    if not cfg.tie_word_embeddings:
        tree["lm_head"] = Spec("lm_head.weight", "V", "D")
    return tree


def pspecs(cfg: Config, shard: bool, int8: bool = False) -> dict:
    """PartitionSpecs of the parameters: split along D over the mesh axis "data", or replicated."""

    def one(s):
        pspec, scale = (s.pspec, s.scale_pspec) if shard else (P(), P())
        return Int8(pspec, scale) if int8 and s.inp else pspec

    return jax.tree.map(one, specs(cfg))


def init(cfg: Config, key: jax.Array, dtype=jnp.float32, int8: bool = False) -> dict:
    """Random parameters: matrices normal(1/sqrt(fan in)), norms zero (they multiply by 1 + w)."""
    leaves, tree = jax.tree.flatten(specs(cfg))
    params = [jnp.zeros(spec.shape(cfg), dtype) for spec in leaves]
    for i, (spec, sub) in enumerate(zip(leaves, jax.random.split(key, len(leaves)), strict=True)):
        if spec.inp:
            fan_in = math.prod(axis_sizes(cfg)[a] for a in spec.inp)
            normal = jax.random.normal(sub, spec.shape(cfg)) * fan_in**-0.5
            params[i] = normal.astype(dtype)
    params = tree.unflatten(params)
    return quantised(cfg, params) if int8 else params


# ------------------------------------------------------------------------------------------ int8


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Int8:
    """A frozen matrix: int8 `q` times a float32 `scale` for each output (embedding: each word)."""

    q: jax.Array
    scale: jax.Array

    @property
    def shape(self) -> tuple[int, ...]:
        return self.q.shape

    @property
    def T(self):
        return Int8(self.q.T, self.scale)


def quantise(spec: Spec, w: jax.Array) -> Int8:
    """Symmetric int8 of one layer's matrix, or of all layers': |w - q scale| <= scale / 2.

    scale = the largest |w| of an output / 127, NaN if one of them is not finite.
    """
    axes, w32 = spec.axes.removeprefix("L"), w.astype(jnp.float32)
    inputs = tuple(i - len(axes) for i, a in enumerate(axes) if a in spec.inp)
    top = jnp.max(jnp.abs(w32), axis=inputs, keepdims=True)
    scale = jnp.where(top == 0, 1.0, top / 127)
    # XLA's maximum on a CPU can lose a NaN, and an int8 has none.
    scale = jnp.where(jnp.isfinite(w32).all(inputs, keepdims=True), scale, jnp.nan)
    return Int8(jnp.round(w32 / scale).astype(jnp.int8), jnp.squeeze(scale, inputs))


def quantised(cfg: Config, params: dict) -> dict:
    """The parameters with every matrix as int8; norms stay as they are."""
    return jax.tree.map(lambda s, w: quantise(s, w) if s.inp else w, specs(cfg), params)


def is_int8(params: dict) -> bool:
    return isinstance(params["embed_tokens"], Int8)


def matmul(x_nI: jax.Array, w_IO: jax.Array | Int8, dtype=None) -> jax.Array:
    """x W [n, O] in `dtype`, by default that of x; int8 is scaled after the product."""
    dtype = dtype or x_nI.dtype
    if isinstance(w_IO, Int8):
        return _int8_matmul(x_nI, w_IO.q, w_IO.scale, x_nI.dtype).astype(dtype)
    return jnp.dot(x_nI, w_IO, preferred_element_type=dtype)


def matmul_back(g_nO: jax.Array, w_IO: jax.Array | Int8, dtype, out=None) -> jax.Array:
    """The gradient of x in x W: g W^T [n, I] in type `out`, from operands of `dtype`."""
    if isinstance(w_IO, Int8):
        g_nO, w_IO = g_nO * w_IO.scale[None], w_IO.q.astype(dtype)
    return jnp.einsum("nO,IO->nI", g_nO.astype(dtype), w_IO, preferred_element_type=out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(3,))
def _int8_matmul(x_nI, q_IO, scale_O, dtype):
    # XLA converts int8 inside the product: bf16 holds -127 to 127 exactly.
    y_nO = jnp.dot(x_nI, q_IO.astype(dtype), preferred_element_type=jnp.float32)
    return y_nO * scale_O.reshape((1,) * (y_nO.ndim - 1) + (-1,))


def _int8_matmul_fwd(x_nI, q_IO, scale_O, dtype):
    # By autodiff a scan over layers would keep every converted matrix for the backward pass.
    return _int8_matmul(x_nI, q_IO, scale_O, dtype), Int8(q_IO, scale_O)


def _int8_matmul_bwd(dtype, w_IO, g_nO):
    return matmul_back(g_nO, w_IO, dtype), None, None


_int8_matmul.defvjp(_int8_matmul_fwd, _int8_matmul_bwd)


# --------------------------------------------------------------------------------------- forward


def rms_norm(x: jax.Array, w: jax.Array, eps: float) -> jax.Array:
    """x / rms(x) * (1 + w) over the last axis, in float32, cast once at the end."""
    x32 = x.astype(jnp.float32)
    x32 = x32 * lax.rsqrt(jnp.mean(x32**2, axis=-1, keepdims=True) + eps)
    w32 = 1.0 + w.astype(jnp.float32)
    return (x32 * lax.broadcast_in_dim(w32, x.shape, (x.ndim - 1,))).astype(x.dtype)


def rope(x_BTNH: jax.Array, positions_BT: jax.Array, freq_H: jax.Array) -> jax.Array:
    """Rotary embedding, half-split: (x1, x2) -> (x1 cos - x2 sin, x2 cos + x1 sin); freq [H/2]."""
    angle_BTNH = positions_BT[:, :, None, None].astype(jnp.float32) * freq_H[None, None, None]
    sin, cos = jnp.sin(angle_BTNH), jnp.cos(angle_BTNH)
    x1, x2 = jnp.split(x_BTNH.astype(jnp.float32), 2, axis=-1)
    return jnp.concatenate([x1 * cos - x2 * sin, x2 * cos + x1 * sin], axis=-1).astype(x_BTNH.dtype)


def attend(cfg: Config, q_BTNH: jax.Array, parts: list) -> jax.Array:
    """One softmax over the keys of several parts (the cache, the new tokens) -> [B, T, N, H].

    parts: (k_BKSH, v_BKSH, mask_BTS) each. A query without keys (padding) gets a mean, never NaN.
    """
    B, T, N, H = q_BTNH.shape
    K = cfg.num_key_value_heads
    q_BTKMH = q_BTNH.reshape(B, T, K, N // K, H)
    scores = []
    for k_BKSH, _, mask_BTS in parts:
        s_BKMTS = jnp.einsum("BTKMH,BKSH->BKMTS", q_BTKMH, k_BKSH,
                             preferred_element_type=jnp.float32)
        s_BKMTS *= cfg.query_pre_attn_scalar**-0.5
        if cap := cfg.attn_logit_softcapping:
            s_BKMTS = cap * jnp.tanh(s_BKMTS / cap)
        scores.append(jnp.where(mask_BTS[:, None, None], s_BKMTS, -1e30))
    top_BKMT1 = functools.reduce(jnp.maximum, [jnp.max(s, -1, keepdims=True) for s in scores])
    top_BKMT1, total, out = lax.stop_gradient(top_BKMT1), 0, 0
    for (_, v_BKSH, _), s_BKMTS in zip(parts, scores, strict=True):
        e_BKMTS = jnp.exp(s_BKMTS - top_BKMT1)
        total += jnp.sum(e_BKMTS, -1, keepdims=True)
        # Not ->BTKMH: XLA on a CPU would copy the whole cache into another layout at every step.
        out += jnp.einsum("BKMTS,BKSH->BKMTH", e_BKMTS.astype(v_BKSH.dtype), v_BKSH,
                          preferred_element_type=jnp.float32)
    out = (out / total).astype(q_BTNH.dtype)  # dividing here costs H divisions a query, not S
    return out.transpose(0, 3, 1, 2, 4).reshape(B, T, N, H)


def all_devices(devices=None) -> Mesh:
    """The one mesh of every script: an axis "data" over all devices, those of other hosts too."""
    n, axes = len(devices or jax.devices()), (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((n,), ("data",), devices=devices, axis_types=axes)


def on_tpu(mesh: Mesh | None = None) -> bool:
    """Whether the devices of a mesh (None: of the `shard_map` being traced) are TPUs."""
    # Not jax.default_backend(): a program may be compiled for a TPU that this machine lacks.
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    return mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"


def splash(cfg, q_BTNH, parts, *, segments_BT, window, interpret=False) -> jax.Array:
    """`attend` for whole rows by JAX's splash kernels, which keep no [T, T] scores in memory.

    The kernels' masks are static, so `lax.cond` picks the local or the causal one for a layer. They
    compare indices in the row, which inside a segment is the same as comparing positions. Scaled
    queries are rounded to their dtype, which is exact where the scale is 1/16 (all up to 12B).
    """
    from jax.experimental.pallas.ops.tpu import splash_attention as kernels  # slow to import

    ((k_BKTH, v_BKTH, _),) = parts
    _, T, N, _ = q_BTNH.shape
    block = 512 if T > 256 else 256 if T > 128 else 128
    pad = -T % block
    q_BNTH = q_BTNH.swapaxes(1, 2).astype(jnp.float32) * cfg.query_pre_attn_scalar**-0.5
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(z.astype(k_BKTH.dtype), ((0, 0), (0, 0), (0, pad), (0, 0)))
        for z in (q_BNTH, k_BKTH, v_BKTH)
    )
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, pad)))

    def run(mask):
        kernel = kernels.make_splash_mha_single_device(
            kernels.MultiHeadMask([mask] * N), block_sizes=kernels.BlockSizes(*[block] * 8),
            attn_logits_soft_cap=cfg.attn_logit_softcapping, interpret=interpret)
        segments = kernels.SegmentIds(segments_BT, segments_BT)
        o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
        return o_BNTH[:, :, :T].swapaxes(1, 2)

    square = T + pad, T + pad
    causal = functools.partial(run, kernels.CausalMask(square))
    if cfg.sliding_window >= T:
        return causal()
    local = functools.partial(run, kernels.LocalMask(square, (cfg.sliding_window - 1, 0), 0))
    return lax.cond(window < T, local, causal)


def linear(w: dict, lora: dict | None, name: str, x: jax.Array,
           fsdp: str | None = None) -> jax.Array:
    """x W [B, T, *out], plus LoRA's scale * (x A) B where an adapter has this matrix.

    As products of two-dimensional arrays: for the gradient of the same einsum on three axes XLA's
    CPU backend transposes whole activations (LOG.md). fsdp: see `sharded_matmul`.
    """
    B, T, inner = *x.shape[:2], len(LINEARS[name].inp)

    def flat(z):  # [*inp, *out] -> [in, out]
        if isinstance(z, Int8):
            return Int8(flat(z.q), z.scale.reshape(-1))
        return z.reshape(math.prod(z.shape[:inner]), -1)

    out = w[name].shape[inner:] if fsdp is None or LINEARS[name].inp == "D" else (-1,)
    x = x.reshape(B * T, -1)
    if fsdp is None:
        y = matmul(x, flat(w[name]))
    else:
        y = sharded_matmul(x, flat(w[name]), fsdp).astype(x.dtype)
    if lora is not None and name in lora["a"]:
        if "dropout" in lora:  # see lora.with_dropout
            key = jax.random.fold_in(lora["dropout"]["key"], list(LINEARS).index(name))
            keep = lora["dropout"]["keep"]
            x = jnp.where(jax.random.bernoulli(key, keep, x.shape), x / keep.astype(x.dtype), 0)
        a, b = (lora[k][name].astype(x.dtype) for k in "ab")
        x_nR = checkpoint_name(x @ flat(a), "product")
        y += (x_nR * lora["scale"][name].astype(x.dtype)) @ b.reshape(b.shape[0], -1)
    return checkpoint_name(y, "product").reshape(B, T, *out)


def sharded_matmul(x_BI: jax.Array, w_IO: jax.Array | Int8, fsdp: str) -> jax.Array:
    """x W [B, O] for a W split along D over the mesh axis fsdp: sends activations, not weights.

    For the few rows of a decode step: gathering would move all weights for every token.
    """
    if w_IO.shape[0] != x_BI.shape[1]:  # I is D: x{our rows, D} -> all-to-all -> x{all, D/devices}
        x_BI = lax.all_to_all(x_BI, fsdp, split_axis=1, concat_axis=0, tiled=True)
        y_BO = matmul(x_BI, w_IO, jnp.float32)
        # y{all rows, unreduced} -> reduce-scatter -> y{our rows}
        return lax.psum_scatter(y_BO, fsdp, scatter_dimension=0, tiled=True)
    # O is D: x{our rows} -> all-gather -> x{all}; y{all, D/devices} -> all-to-all -> y{our rows, D}
    y_BO = matmul(lax.all_gather(x_BI, fsdp, tiled=True), w_IO)
    return lax.all_to_all(y_BO, fsdp, split_axis=0, concat_axis=1, tiled=True)


def layer(cfg, w, lora, x_BTD, positions_BT, freq_H, mask_BTT, past=(), attention=attend,
          fsdp=None):
    """One transformer block -> x_BTD and the keys and values (k_BKTH, v_BKTH) of its tokens.

    past: () or one (k_BKSH, v_BKSH, mask_BTS), the KV cache of this layer. fsdp: see
    `sharded_matmul`.
    """
    norm = functools.partial(rms_norm, eps=cfg.rms_norm_eps)
    project = functools.partial(linear, w, lora, fsdp=fsdp)
    h_BTD = norm(x_BTD, w["input_layernorm"])
    q_BTNH = project("q_proj", h_BTD)
    k_BTKH, v_BTKH = project("k_proj", h_BTD), project("v_proj", h_BTD)
    if "q_norm" in w:
        q_BTNH, k_BTKH = norm(q_BTNH, w["q_norm"]), norm(k_BTKH, w["k_norm"])
    q_BTNH, k_BTKH = (rope(z, positions_BT, freq_H) for z in (q_BTNH, k_BTKH))
    k_BKTH, v_BKTH = k_BTKH.swapaxes(1, 2), v_BTKH.swapaxes(1, 2)
    o_BTNH = attention(cfg, q_BTNH, [*past, (k_BKTH, v_BKTH, mask_BTT)])
    x_BTD += norm(project("o_proj", o_BTNH), w["post_attention_layernorm"])
    h_BTD = norm(x_BTD, w["pre_feedforward_layernorm"])
    gate_BTF = jax.nn.gelu(project("gate_proj", h_BTD), approximate=True)
    h_BTD = project("down_proj", gate_BTF * project("up_proj", h_BTD))
    return x_BTD + norm(h_BTD, w["post_feedforward_layernorm"]), (k_BKTH, v_BKTH)


def all_gather_params(tree: dict, spec: dict, axis: str | None) -> dict:
    """All-gathers sharded matrices along D inside shard_map; the transpose scatters gradients."""

    def gather(w, axes):  # w{D/devices} -> all-gather -> w{D}
        return lax.all_gather(w, axis, axis=axes.index("D"), tiled=True) if "D" in axes else w

    def one(s, w):
        if axis is None or not s.inp:
            return w
        axes = s.axes.removeprefix("L")
        if isinstance(w, Int8):
            return Int8(gather(w.q, axes), gather(w.scale, s.out))
        return gather(w, axes)

    return jax.tree.map(one, spec, tree)


def rope_frequencies(cfg: Config, is_global: bool) -> np.ndarray:
    """RoPE's inverse frequencies [H/2] of a local or a global layer, float32."""
    theta = cfg.rope_theta if is_global else cfg.rope_local_base_freq
    freq = theta ** -(np.arange(0, cfg.head_dim, 2) / cfg.head_dim)
    return np.float32(freq / (cfg.rope_factor if is_global else 1.0))


def attention_window(cfg: Config, is_global: bool) -> int:
    """How many keys a layer sees, its own included; for a global layer, more than any row has."""
    return 2**30 if is_global else cfg.sliding_window


def embed(params: dict, cfg: Config, tokens_BT: jax.Array, fsdp: str | None = None) -> jax.Array:
    """The scaled embeddings [B, T, D]. A sharded table (12B: 2 GB) is never gathered."""
    table, rows_BT = params["embed_tokens"], tokens_BT
    if fsdp is not None:
        rows_BT = lax.all_gather(tokens_BT, fsdp, tiled=True)  # of all devices
    x_BTD = (table.q if isinstance(table, Int8) else table)[rows_BT]
    if fsdp is not None:  # x{all rows, D/devices} -> all-to-all -> x{our rows, D}
        x_BTD = lax.all_to_all(x_BTD, fsdp, split_axis=0, concat_axis=2, tiled=True)
    if isinstance(table, Int8):
        x_BTD = (x_BTD * table.scale[tokens_BT][..., None]).astype(params["norm"].dtype)
    return x_BTD * jnp.asarray(cfg.hidden_size**0.5, x_BTD.dtype)


def forward(params: dict, cfg: Config, tokens_BT: jax.Array, positions_BT: jax.Array | None = None,
            segments_BT: jax.Array | None = None, parents_BT: jax.Array | None = None, *,
            lora: dict | None = None, remat: str = "none", fsdp: str | None = None) -> tuple:
    """Whole rows -> final normed hidden states [B, T, D], keys and values [L, B, K, T, H].

    segments_BT: which sequence of a packed row a token belongs to, 0 = padding; tokens attend
    inside their own segment only. positions_BT restart in each segment (default 0..T-1).
    parents_BT: a second segment that a token attends to, the prompt that completions share:
    prompt [p p] and completions [c] [d d] -> segments 1 1 2 3 3, parents 1 1 1 1 1, positions
    0 1 2 2 3. remat: what the backward pass recomputes: "none", "attention" (all but the products
    with weights), "layer" (all) or "auto": attention, or layer where the base is sharded.
    fsdp: the mesh axis that the base is sharded over, inside shard_map; None when replicated.
    """
    B, T = tokens_BT.shape
    if positions_BT is None:
        positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    if segments_BT is None:
        segments_BT = jnp.ones_like(tokens_BT)
    same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
    if parents_BT is not None:
        same_BTT |= parents_BT[:, :, None] == segments_BT[:, None, :]
    same_BTT &= (segments_BT > 0)[:, None, :]
    distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
    # Splash takes tiles of 128 and cannot mask rows that share a prompt.
    splashes = on_tpu() and T >= 128 and cfg.head_dim % 128 == 0 and parents_BT is None
    spec = specs(cfg)["layers"]

    def step(x_BTD, xs):
        w, lora_l, freq_H, window = xs
        mask_BTT = same_BTT & (distance_BTT >= 0) & (distance_BTT < window)
        attention = attend
        if splashes:  # whatever `remat` is, no [T, T] array is kept for the backward pass
            attention = functools.partial(splash, segments_BT=segments_BT, window=window)
        w = all_gather_params(w, spec, fsdp)
        return layer(cfg, w, lora_l, x_BTD, positions_BT, freq_H, mask_BTT, attention=attention)

    freq_LH = jnp.asarray(np.stack([rope_frequencies(cfg, g) for g in cfg.is_global]))
    window_L = jnp.asarray([attention_window(cfg, g) for g in cfg.is_global])
    if remat == "layer" or (remat == "auto" and fsdp is not None):
        step = jax.checkpoint(step, prevent_cse=False)
    elif remat != "none" or fsdp is not None:  # keeps the outputs of `linear`, not gathered weights
        policy = jax.checkpoint_policies.save_only_these_names("product")
        step = jax.checkpoint(step, prevent_cse=False, policy=policy)
    x_BTD = embed(params, cfg, tokens_BT, fsdp)
    x_BTD, kv_LBKTH = lax.scan(step, x_BTD, (params["layers"], lora, freq_LH, window_L))
    return rms_norm(x_BTD, params["norm"], cfg.rms_norm_eps), kv_LBKTH


def hidden(params: dict, cfg: Config, tokens_BT: jax.Array, *args, **kwargs) -> jax.Array:
    """The final normed hidden states [B, T, D] of `forward`, which takes the same arguments."""
    return forward(params, cfg, tokens_BT, *args, **kwargs)[0]


def head(params: dict, cfg: Config, fsdp: str | None = None,
         n: int | None = None) -> jax.Array | Int8:
    """The output embedding [V, D]: the tied input embedding, unscaled, or a separate one.

    n: only its first n rows, without those that pad the vocabulary.
    """
    name = "embed_tokens" if cfg.tie_word_embeddings else "lm_head"
    rows = jax.tree.map(lambda w: w[:n], params[name])
    return all_gather_params(rows, specs(cfg)[name], fsdp)


def read_logits(cfg: Config, head_VD: jax.Array | Int8, x_D: jax.Array,
                fsdp: str | None = None) -> jax.Array:
    """Float32 logits [..., V] of hidden states [..., D], soft-capped (Gemma 2).

    fsdp: the head is sharded and not gathered (`sharded_matmul`); hidden states are then [B, D].
    """
    if fsdp is None:
        logits_V = matmul(x_D, head_VD.T, jnp.float32)
    else:
        logits_V = sharded_matmul(x_D, head_VD.T, fsdp)
    if cap := cfg.final_logit_softcapping:
        logits_V = cap * jnp.tanh(logits_V / cap)
    return logits_V


def logits(params: dict, cfg: Config, tokens_BT: jax.Array, mask_BT: jax.Array | None = None,
           lora: dict | None = None) -> jax.Array:
    """All logits [B, T, V] in float32, for reading and parity only; one device.

    mask_BT: 1 = token, 0 = padding on either side; positions count tokens only.
    """
    if mask_BT is None:
        mask_BT = jnp.ones_like(tokens_BT)
    mask_BT = jnp.asarray(mask_BT, jnp.int32)
    positions_BT = jnp.maximum(jnp.cumsum(mask_BT, axis=1) - 1, 0)
    x_BTD = hidden(params, cfg, jnp.asarray(tokens_BT), positions_BT, mask_BT, lora=lora)
    return read_logits(cfg, head(params, cfg), x_BTD)


def prefill(params: dict, cfg: Config, tokens_BT: jax.Array, n_B: jax.Array, *,
            lora: dict | None = None, fsdp: str | None = None) -> tuple[jax.Array, list]:
    """Final hidden states [B, T, D] of rows of n_B tokens, and each layer's (k_BKSH, v_BKSH).

    Global layers have S = T slots. Local layers have a ring buffer of S = min(sliding_window, T)
    slots: slot s holds the last position p < n for which p % S == s.
    """
    B, T = tokens_BT.shape
    positions_BT = jnp.broadcast_to(jnp.arange(T)[None], (B, T))
    segments_BT = (positions_BT < n_B[:, None]).astype(jnp.int32)
    x_BTD, kv_LBKTH = forward(params, cfg, tokens_BT, positions_BT, segments_BT, lora=lora,
                              fsdp=fsdp)
    S, last_B1 = min(cfg.sliding_window, T), n_B[:, None] - 1
    held_BS = jnp.maximum(last_B1 - (last_B1 - jnp.arange(S)[None]) % S, 0)
    ring = lambda z_BKTH: jnp.take_along_axis(z_BKTH, held_BS[:, None, :, None], axis=2)
    keep = lambda z_BKTH, is_global: z_BKTH if is_global or S == T else ring(z_BKTH)
    kv = [tuple(keep(z[i], g) for z in kv_LBKTH) for i, g in enumerate(cfg.is_global)]
    return x_BTD, kv


# --------------------------------------------------------------------------------- token log-probs

# A chunk of tokens meets the vocabulary in blocks of words, as flash attention meets its keys: a
# block's logits [c, b] stay in the TPU's VMEM or the CPU's cache, and running sums are rescaled when
# a larger logit appears. A chunk has 512 tokens: with fewer a v5e, which does 240 FLOPs a byte,
# would spend longer reading the head than multiplying.
CHUNK, BLOCK = 512, 16384


def token_logps(x_BTD: jax.Array, head_VD: jax.Array | Int8, targets_BT: jax.Array, *,
                temperature: jax.Array | float = 1.0, softcap: float | None = None,
                wanted_BT: jax.Array | None = None, chunk: int = CHUNK,
                block: int = BLOCK) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of its distribution, both [B, T] float32.

    Logits are soft-capped, then divided by the temperature (not differentiated), and exist for
    `chunk` tokens and `block` words at a time. Position t is scored against targets_BT[t]: shift
    before calling. Tokens with wanted_BT = 0 score 0. They are sorted to the end, and chunks of
    only such tokens are skipped. Under a gradient the forward pass also computes d logp/dx
    [B, T, D] while it has the logits, so that the backward pass does not compute them again.
    """
    B, T, D = x_BTD.shape
    n = B * T
    chunk, block = min(n, chunk), min(head_VD.shape[0], block)
    x_nD, targets_n, n_wanted = x_BTD.reshape(n, D), targets_BT.reshape(n), n
    if wanted_BT is not None:
        chunk, wanted_n = min(chunk, max(128, n // 8)), wanted_BT.reshape(n) > 0
        n_wanted, order_n = jnp.sum(wanted_n), jnp.argsort(~wanted_n)
        x_nD, targets_n = x_nD[order_n], targets_n[order_n]
    pad = -n % chunk  # the padding scores token 0 from a zero state: finite, and cut off below
    x_CcD = jnp.pad(x_nD, ((0, pad), (0, 0))).reshape(-1, chunk, D)
    targets_Cc = jnp.pad(targets_n, (0, pad)).reshape(-1, chunk)
    out = _chunked_logps(x_CcD, head_VD, targets_Cc, jnp.int32(n_wanted), jnp.float32(temperature),
                         softcap, block)
    out = [z.reshape(-1)[:n] for z in out]
    if wanted_BT is not None:
        out = [jnp.zeros_like(z).at[order_n].set(z) * wanted_n for z in out]
    return tuple(z.reshape(B, T) for z in out)


def _words(head_VD, j, block):
    """Block j of the head's rows, their ids [1, b], and whether no earlier block holds them.

    Where b does not divide V, the last block begins earlier, so as to end at the last word.
    """
    start = jnp.minimum(j * block, head_VD.shape[0] - block)
    w_bD = jax.tree.map(lambda z: lax.dynamic_slice_in_dim(z, start, block), head_VD)
    ids_1b = start + jnp.arange(block)[None]
    return w_bD, ids_1b, ids_1b >= j * block


def _scaled(raw, temperature, softcap):
    """Products of hidden states and head -> (logits, d logit/d product)."""
    slope = 1.0 / temperature
    if softcap:
        capped = jnp.tanh(raw / softcap)
        raw, slope = capped * softcap, (1.0 - capped**2) / temperature
    return raw / temperature, slope


def _target(x_cD, head_VD, target_c, temperature, softcap):
    """The targets' rows of the head [c, D] in float32, their logits and d logit/d product [c]."""
    row_cD = jax.tree.map(lambda z: z[target_c], head_VD)
    row_cD = row_cD.q * row_cD.scale[:, None] if isinstance(row_cD, Int8) else row_cD
    row_cD = row_cD.astype(jnp.float32)
    raw_c = jnp.sum(x_cD.astype(jnp.float32) * row_cD, axis=-1)
    return row_cD, *_scaled(raw_c, temperature, softcap)


def _chunk(x_cD, head_VD, target_c, temperature, softcap, block, with_dx):
    """Log-probs, entropies (and d logp/dx) of one chunk of tokens.

    With e = exp(logit - top), o = the sum of e over all words but the target, and Z = o + e of the
    target: logp = target's logit - top - log Z, and d logp/dx = (o W[target] - sum of e W) / Z. The
    target is left out of the sums, so nothing cancels where its probability is nearly 1.
    """
    row_cD, target_logit_c, target_slope = _target(x_cD, head_VD, target_c, temperature, softcap)

    def add(j, sums):
        top_c, others_c, mean_c, dx_cD = sums
        w_bD, ids_1b, new_1b = _words(head_VD, j, block)
        logit_cb, slope = _scaled(matmul(x_cD, w_bD.T, jnp.float32), temperature, softcap)
        new_top_c = jnp.maximum(top_c, jnp.max(logit_cb, axis=-1))
        counts_cb = new_1b & (ids_1b != target_c[:, None])
        e_cb = jnp.where(counts_cb, jnp.exp(logit_cb - new_top_c[:, None]), 0.0)
        rise_c, shrink_c = new_top_c - top_c, jnp.exp(top_c - new_top_c)
        below_cb = e_cb * (logit_cb - new_top_c[:, None])
        mean_c = (mean_c - rise_c * others_c) * shrink_c + jnp.sum(below_cb, axis=-1)
        others_c = others_c * shrink_c + jnp.sum(e_cb, axis=-1)
        if with_dx:
            dx_cD = dx_cD * shrink_c[:, None]
            dx_cD += matmul_back(e_cb * slope, w_bD.T, x_cD.dtype, jnp.float32)
        return new_top_c, others_c, mean_c, dx_cD

    zeros_c = jnp.zeros_like(target_logit_c)
    dx_cD = jnp.zeros_like(row_cD) if with_dx else None
    n_blocks = -(-head_VD.shape[0] // block)
    top_c, others_c, mean_c, dx_cD = lax.fori_loop(
        0, n_blocks, add, (target_logit_c, zeros_c, zeros_c, dx_cD))
    below_c = target_logit_c - top_c
    total_c = others_c + jnp.exp(below_c)
    mean_c = (mean_c + jnp.exp(below_c) * below_c) / total_c  # E[logit - top]
    out = below_c - jnp.log(total_c), jnp.log(total_c) - mean_c
    if with_dx:
        own_c1 = (others_c * target_slope)[:, None]
        out += (((own_c1 * row_cD - dx_cD) / total_c[:, None]).astype(x_cD.dtype),)
    return out


def _score(x_CcD, head_VD, targets_Cc, n_wanted, temperature, softcap, block, with_dx):
    """Log-probs, entropies (and d logp/dx) of the chunks that hold the first n_wanted tokens."""

    def one(i, out):
        new = _chunk(x_CcD[i], head_VD, targets_Cc[i], temperature, softcap, block, with_dx)
        return tuple(z.at[i].set(z_new) for z, z_new in zip(out, new, strict=True))

    zeros_Cc = jnp.zeros_like(targets_Cc, jnp.float32)
    out = (zeros_Cc, zeros_Cc, jnp.zeros_like(x_CcD))[: 2 + with_dx]
    return lax.fori_loop(0, -(-n_wanted // targets_Cc.shape[1]), one, out)


@functools.partial(jax.custom_vjp, nondiff_argnums=(5, 6))
def _chunked_logps(x_CcD, head_VD, targets_Cc, n_wanted, temperature, softcap, block):
    return _score(x_CcD, head_VD, targets_Cc, n_wanted, temperature, softcap, block, False)


def _chunked_logps_fwd(x, head, targets, n_wanted, temperature, softcap, block):
    trains_head = any(z.perturbed for z in jax.tree.leaves(head))  # two arrays if int8
    with_dx = x.perturbed and not trains_head  # d logp/dhead needs the logits again anyway
    args = jax.tree.map(lambda z: z.value, (x, head, targets, n_wanted, temperature))
    logp, entropy, *dx = _score(*args, softcap, block, with_dx)
    head_trained = () if trains_head else None
    return (logp, entropy), (dx[0] if dx else None, head_trained, args, logp, entropy)


def _chunked_logps_bwd(softcap, block, residuals, cts):
    dx_CcD, head_trained, args, logp_Cc, entropy_Cc = residuals
    x_CcD, head_VD, targets_Cc, n_wanted, temperature = args
    zero = jax.custom_derivatives.SymbolicZero
    if dx_CcD is not None and isinstance(cts[1], zero):  # frozen head, loss without the entropy
        dx_CcD = cts[0][..., None].astype(dx_CcD.dtype) * dx_CcD
        return dx_CcD, None, None, None, None
    g_Cc, h_Cc = (jnp.zeros(c.shape) if isinstance(c, zero) else c for c in cts)

    def one(i, grads):
        x_cD, target_c = x_CcD[i], targets_Cc[i]
        _, target_logit_c, _ = _target(x_cD, head_VD, target_c, temperature, softcap)
        log_total_c = target_logit_c - logp_Cc[i]

        def add(j, grads):
            dhead_VD, dx_cD = grads
            w_bD, ids_1b, new_1b = _words(head_VD, j, block)
            logit_cb, slope = _scaled(matmul(x_cD, w_bD.T, jnp.float32), temperature, softcap)
            logp_cb = logit_cb - log_total_c[:, None]
            p_cb = jnp.exp(logp_cb)
            d_cb = g_Cc[i][:, None] * ((ids_1b == target_c[:, None]) - p_cb)
            d_cb -= h_Cc[i][:, None] * p_cb * (logp_cb + entropy_Cc[i][:, None])
            d_cb = jnp.where(new_1b, d_cb * slope, 0.0)
            if dhead_VD is not None:
                dw_bD = jnp.einsum("cb,cD->bD", d_cb.astype(x_cD.dtype), x_cD,
                                   preferred_element_type=jnp.float32)
                start = ids_1b[0, 0]
                dw_bD += lax.dynamic_slice_in_dim(dhead_VD, start, block)
                dhead_VD = lax.dynamic_update_slice_in_dim(dhead_VD, dw_bD, start, 0)
            return dhead_VD, dx_cD + matmul_back(d_cb, w_bD.T, x_cD.dtype, jnp.float32)

        dhead_VD, dx_CcD = grads
        dx_cD = jnp.zeros_like(x_cD, jnp.float32)
        dhead_VD, dx_cD = lax.fori_loop(0, -(-head_VD.shape[0] // block), add, (dhead_VD, dx_cD))
        return dhead_VD, dx_CcD.at[i].set(dx_cD.astype(dx_CcD.dtype))

    dhead_VD = None if head_trained is None else jnp.zeros_like(head_VD, jnp.float32)
    dhead_VD, dx_CcD = lax.fori_loop(0, -(-n_wanted // targets_Cc.shape[1]), one,
                                     (dhead_VD, jnp.zeros_like(x_CcD)))
    dhead_VD = None if dhead_VD is None else dhead_VD.astype(head_VD.dtype)
    return dx_CcD, dhead_VD, None, None, None


_chunked_logps.defvjp(_chunked_logps_fwd, _chunked_logps_bwd, symbolic_zeros=True)


# ------------------------------------------------------------------------------------------ files


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
        if any(len(str(file)) > 255 for file in weight_map.values()):
            raise ValueError(f"{index}: weight_map names a file by more than 255 characters")
        # .name: whatever an index names, only files of this folder are opened.
        return sorted({path / Path(str(file)).name for file in weight_map.values()})
    files = list(path.glob("*.safetensors"))
    if len(files) != 1:
        raise ValueError(f"{path}: {_found(path)}")
    return files


def open_tensors(file: Path):
    """An open safetensors file, its header read; ValueError where it is none, or only a part."""
    try:
        check_file(file)
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
    """Loads a Hugging Face folder -> (Config, parameters).

    Each tensor goes straight from its file to the device(s): the host never holds a second copy of
    the model. mesh: replicate over it, or with shard=True split every matrix along D over its axis
    "data". int8: matrices are `Int8`, quantised one by one. delta("q_proj", layer): what is added
    in float32 to a matrix first, or None; see lora.delta. A separate lm_head.weight is used only if
    it differs from the embedding.
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
    """Writes config.json, generation_config.json and model.safetensors, in the parameters' dtype.

    data.Tokenizer.save writes the tokenizer's files.
    """
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


if __name__ == "__main__":
    from check import main  # the self-check also needs text and sampling, which import this file

    main()
