"""Gemma 2 and 3 in pure JAX: configs, parameters, forward, prefill, log-probs.

    cfg, params = gemma.load("path/to/gemma-3-1b-it", dtype=jnp.bfloat16)
    logits_BTV = gemma.logits(params, cfg, tokens_BT)       # to read; training never builds [B,T,V]
    python check.py --weights path/to/gemma-3-1b-it         # check real weights: PASS or FAIL

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
4. Over whole rows JAX's splash kernels attend on TPUs (splash.py), and cuDNN's flash attention on
   GPUs from Hopper on; `attend` does all else.
5. Sharded weights are all-gathered layer by layer (`all_gather_params`); decoding moves the few
   activations between the devices instead (`sharded_matmul`).
6. The matrices of a frozen base may be int8 (`Int8`). They are never dequantised as a whole:
   `matmul` reads int8 and scales the result.
"""

import dataclasses
import functools
import math
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

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
    is_global: tuple[bool, ...]  # one per layer
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
LARGE = ("gemma2-9b", "gemma2-27b", "gemma3-12b", "gemma3-27b")  # with defaults of their own


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
        # The embedding is looked up by row, so it is [V, D] here and in the file.
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
    layers = LINEARS | NORMS
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


def cudnn_attend(cfg: Config, q_BTNH: jax.Array, parts: list) -> jax.Array:
    """`attend` for whole rows in bfloat16 by cuDNN's flash attention: no scores in memory."""
    ((k_BKTH, v_BKTH, mask_BTT),) = parts
    itself_1TT = np.eye(q_BTNH.shape[1], dtype=bool)[None]  # no query is left without a key
    return jax.nn.dot_product_attention(
        q_BTNH, k_BKTH.swapaxes(1, 2), v_BKTH.swapaxes(1, 2), mask=(mask_BTT | itself_1TT)[:, None],
        scale=cfg.query_pre_attn_scalar**-0.5, is_causal=True, implementation="cudnn")


def all_devices(devices=None) -> Mesh:
    """The one mesh of every script: an axis "data" over all devices, those of other hosts too."""
    n, axes = len(devices or jax.devices()), (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((n,), ("data",), devices=devices, axis_types=axes)


def on_tpu(mesh: Mesh | None = None) -> bool:
    """Whether the devices of a mesh (None: of the `shard_map` being traced) are TPUs."""
    # Not jax.default_backend(): a program may be compiled for a TPU that this machine lacks.
    mesh = jax.sharding.get_abstract_mesh() if mesh is None else mesh.abstract_mesh
    return mesh.abstract_device is not None and mesh.abstract_device.platform == "tpu"


def has_cudnn_attention() -> bool:
    """Whether this process has NVIDIA GPUs on which cuDNN's flash attention takes heads of 256."""
    device = jax.local_devices()[0]
    # AMD reports a name such as gfx942 as its capability, not a number.
    return device.device_kind.startswith("NVIDIA") and float(device.compute_capability) >= 9


def linear(w: dict, lora: dict | None, name: str, x: jax.Array,
           fsdp: str | None = None) -> jax.Array:
    """x W [B, T, *out], plus LoRA's scale * (x A) B where an adapter has this matrix.

    Written as products of two-dimensional arrays, because XLA's CPU backend transposes whole
    activations for the gradient of the same einsum on three axes (LOG.md). fsdp: see
    `sharded_matmul`.
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
    # cuDNN has no soft cap; with 512 tokens it gains nothing, with 2,048 it is 2.4 times as fast.
    flashes = (not on_tpu() and has_cudnn_attention() and T >= 1024 and T % 2 == 0
               and params["norm"].dtype == jnp.bfloat16 and not cfg.attn_logit_softcapping)
    spec = specs(cfg)["layers"]

    def step(x_BTD, xs):
        w, lora_l, freq_H, window = xs
        mask_BTT = same_BTT & (distance_BTT >= 0) & (distance_BTT < window)
        attention = cudnn_attend if flashes else attend
        if splashes:  # whatever `remat` is, no [T, T] array is kept for the backward pass
            import splash

            attention = functools.partial(splash.attend, segments_BT=segments_BT, window=window)
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
    T = tokens_BT.shape[1]
    segments_BT = (jnp.arange(T)[None] < n_B[:, None]).astype(jnp.int32)
    x_BTD, kv_LBKTH = forward(params, cfg, tokens_BT, None, segments_BT, lora=lora, fsdp=fsdp)
    S, last_B1 = min(cfg.sliding_window, T), n_B[:, None] - 1
    held_BS = jnp.maximum(last_B1 - (last_B1 - jnp.arange(S)[None]) % S, 0)
    ring = lambda z_BKTH: jnp.take_along_axis(z_BKTH, held_BS[:, None, :, None], axis=2)
    keep = lambda z_BKTH, is_global: z_BKTH if is_global or S == T else ring(z_BKTH)
    kv = [tuple(keep(z[i], g) for z in kv_LBKTH) for i, g in enumerate(cfg.is_global)]
    return x_BTD, kv


# --------------------------------------------------------------------------------- token log-probs

# A chunk of tokens meets the vocabulary in blocks of words, as flash attention meets its keys: a
# block's logits [c, b] stay in a TPU's VMEM or a CPU's cache, and running sums are rescaled when a
# larger logit appears. A chunk has at least 512 tokens: with fewer a v5e, which does 240 FLOPs a
# byte, would spend longer reading the head than multiplying.
CHUNK, CHUNK_ELEMENTS, BLOCK_ELEMENTS = 512, 2**25, 2**23


def token_logps(x_BTD: jax.Array, head_VD: jax.Array | Int8, targets_BT: jax.Array, *,
                temperature: jax.Array | float = 1.0, softcap: float | None = None,
                wanted_BT: jax.Array | None = None, chunk: int | None = None,
                block: int | None = None) -> tuple[jax.Array, jax.Array]:
    """Log-probability of each target and entropy of its distribution, both [B, T] float32.

    Logits are soft-capped, then divided by the temperature (not differentiated), and exist for
    `chunk` tokens and `block` words at a time. Position t is scored against targets_BT[t]: shift
    before calling. Tokens with wanted_BT = 0 score 0. They are sorted to the end, and chunks of
    only such tokens are skipped. Under a gradient the forward pass also computes d logp/dx
    [B, T, D] while it has the logits, so that the backward pass does not compute them again.
    """
    B, T, D = x_BTD.shape
    n = B * T
    chunk = chunk or min(n, max(CHUNK, CHUNK_ELEMENTS // head_VD.shape[0]))
    x_nD, targets_n, n_wanted = x_BTD.reshape(n, D), targets_BT.reshape(n), n
    if wanted_BT is not None:
        chunk, wanted_n = min(chunk, max(128, n // 8)), wanted_BT.reshape(n) > 0
        n_wanted, order_n = jnp.sum(wanted_n), jnp.argsort(~wanted_n)
        x_nD, targets_n = x_nD[order_n], targets_n[order_n]
    block = min(head_VD.shape[0], block or BLOCK_ELEMENTS // chunk)
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


def load(path: str | Path, dtype=jnp.float32, mesh: Mesh | None = None, shard: bool = False,
         int8: bool = False, delta=None) -> tuple[Config, dict]:
    """Loads a Hugging Face folder -> (Config, parameters).

    mesh: replicate over it, or with shard=True split every matrix along D over its axis "data".
    int8: matrices are `Int8`. delta("q_proj", layer): what is added in float32 to a matrix first,
    or None; see lora.delta.
    """
    import model_files  # here, as below: this page is not about the formats of files

    return model_files.load(path, dtype, mesh, shard, int8, delta)


def save(path: str | Path, cfg: Config, params: dict) -> None:
    """Writes config.json, generation_config.json and model.safetensors, in the parameters' dtype.

    data.Tokenizer.save writes the tokenizer's files.
    """
    import model_files

    model_files.save(path, cfg, params)


def read_config(path: str | Path) -> Config:
    """The Config of a Hugging Face folder; ValueError names what is wrong with its config.json."""
    import model_files

    return model_files.read_config(path)


if __name__ == "__main__":
    from check import main  # which imports this file

    main()
