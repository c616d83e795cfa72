"""The model against transformers, against itself (decoding, packing, sharding), and by gradients.

Tolerances are those of float32; the models are tiny and random, with every structural feature on.
"""

import dataclasses
import functools
import json
import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import mesh_of
from jax import lax
from jax.sharding import PartitionSpec as P

import gemma
import lora
import model_files
import splash

pytestmark = pytest.mark.smoke
LOGITS_TOL = 2e-5
N_CONFIGS = 6  # random configurations of each family
FAMILIES = ("gemma2", "gemma3")
TINY = {  # 5 = 2*2 + 1 and 7 = 2*3 + 1 layers: whole periods and a rest
    "gemma2": gemma.Config(
        "gemma2", 96, 32, 48, 5, 4, 2, 12, 20, 5, (False, True) * 2 + (False,), 1e4, 1e4,
        attn_logit_softcapping=2.0, final_logit_softcapping=4.0,
    ),
    "gemma3": gemma.Config(
        "gemma3_text", 96, 32, 48, 7, 4, 1, 12, 20, 5, tuple(i % 3 == 2 for i in range(7)),
        1e4, 1e6, rope_factor=8.0,
    ),
}
hidden = jax.jit(gemma.hidden, static_argnames="cfg")
logits = jax.jit(gemma.logits, static_argnames="cfg")


@functools.partial(jax.jit, static_argnames="cfg")
def packed_logits(params, cfg, tokens_BT, positions_BT, segments_BT):
    x_BTD = gemma.hidden(params, cfg, tokens_BT, positions_BT, segments_BT)
    return gemma.read_logits(cfg, gemma.head(params, cfg), x_BTD)


def random_params(cfg, seed=0):
    """Weights under which every part of the model moves the logits, which stay within ±10."""
    rng = np.random.default_rng(seed)

    def one(spec):
        fan_in = math.prod(gemma.axis_sizes(cfg)[a] for a in spec.inp)
        scale = 1.5 * fan_in**-0.5 if spec.inp else 0.4
        return jnp.asarray(rng.normal(0, scale, spec.shape(cfg)), jnp.float32)

    return jax.tree.map(one, gemma.specs(cfg))


def random_tokens(cfg, *shape, seed=0):
    return np.random.default_rng(seed).integers(1, cfg.vocab_size, shape)


def assert_close(ours, theirs, tol, what=""):
    ours, theirs = np.asarray(ours), np.asarray(theirs)
    assert ours.shape == theirs.shape and np.isfinite(ours).all()
    worst = np.abs(ours - theirs).max(initial=0.0)
    assert worst <= tol, f"{what} differ by {worst:.2e} > {tol:.0e}"


def assert_same_trees(ours, theirs, tol):
    """Leaf by leaf, relative to the largest entry of each leaf."""
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(ours), jax.tree.leaves(theirs), strict=True
    ):
        assert_close(a, b, tol * float(jnp.abs(b).max(initial=0.0)), jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------- transformers


def random_hf_fields(family, i):
    """The i-th random configuration; head_dim is never hidden_size / heads."""
    rng = np.random.default_rng(1000 * FAMILIES.index(family) + i)
    pick = lambda *options: options[rng.integers(len(options))]
    heads, kv = [(4, 2), (4, 1), (3, 3), (8, 2), (2, 1), (6, 3)][i % 6]
    layers, gemma3 = int(rng.integers(2, 8)), family == "gemma3"
    some_global = [pick("sliding_attention", "full_attention") for _ in range(layers)]
    linear = {"rope_type": "linear", "factor": pick(2.0, 8.0)} if i % 3 else {}
    rope_global = {"rope_type": "default", "rope_theta": pick(1e3, 1e4, 1e6)}
    rope = {"full_attention": rope_global | linear,
            "sliding_attention": {"rope_type": "default", "rope_theta": pick(1e2, 1e4)}}
    return {
        "vocab_size": int(rng.integers(96, 160)), "num_hidden_layers": layers,
        "hidden_size": pick(24, 48) if heads in (3, 6) else pick(24, 32, 40, 64),
        "intermediate_size": int(rng.integers(20, 80)), "head_dim": pick(14, 18, 22, 26),
        "num_attention_heads": heads, "num_key_value_heads": kv,
        "query_pre_attn_scalar": int(rng.integers(4, 40)),
        "sliding_window": int(rng.integers(2, 9)), "max_position_embeddings": 64,
        "layer_types": None if i % 4 == 0 else some_global,
        "rope_parameters": rope if gemma3 else rope_global,
        "attn_logit_softcapping": pick(1.0, 3.0) if (i % 4 == 1) == gemma3 else None,
        "final_logit_softcapping": pick(2.0, 5.0) if (i % 3 == 1) == gemma3 else None,
        "rms_norm_eps": pick(1e-6, 1e-2), "tie_word_embeddings": i % 5 != 3,
    }


def randomise(model, seed):
    """Weights under which every part of the model moves the logits."""
    import torch

    torch.manual_seed(seed)
    model.requires_grad_(False)
    for w in model.parameters():
        w.normal_(0, 0.4 if w.ndim == 1 else 1.5 * w.shape[1] ** -0.5)
    model.tie_weights()
    return model.eval()


def random_hf_model(hf, family, i, multimodal=False):
    fields = random_hf_fields(family, i)
    if multimodal:  # the container's head has no soft cap in transformers
        fields |= {"attn_logit_softcapping": None, "final_logit_softcapping": None}
    config = (hf.Gemma3TextConfig if family == "gemma3" else hf.Gemma2Config)(**fields)
    kind = hf.Gemma3ForCausalLM if family == "gemma3" else hf.Gemma2ForCausalLM
    if multimodal:
        vision = hf.SiglipVisionConfig(
            hidden_size=8, intermediate_size=8, num_hidden_layers=1, num_attention_heads=1,
            image_size=8, patch_size=4,
        )
        config = hf.Gemma3Config(
            text_config=config, vision_config=vision, mm_tokens_per_image=4, image_token_index=95,
            boi_token_index=94, eoi_token_index=93,
            tie_word_embeddings=fields["tie_word_embeddings"],
        )
        kind = hf.Gemma3ForConditionalGeneration
    config._attn_implementation = "eager"  # the implementation that has soft caps
    return randomise(kind(config), i)


def their_logits(model, tokens, mask=None):
    import torch

    text = model.config.get_text_config()
    # transformers reads this field of a Gemma 3 and then forgets it; its attention does take it.
    cap = {"softcap": text.attn_logit_softcapping} if "gemma3" in text.model_type else {}
    mask = None if mask is None else torch.tensor(mask)
    out = model(torch.tensor(tokens), attention_mask=mask, use_cache=False, **cap)
    return out.logits.float().numpy()


def padded(n_rows, T, rng):
    """Rows padded on the left or on the right: segments_BT (1 = token) and positions_BT."""
    mask = np.ones((n_rows, T), np.int64)
    for row, n in zip(mask, rng.integers(1, T - 2, n_rows), strict=True):
        row[slice(0, n) if rng.integers(2) else slice(T - n, T)] = 0
    return mask, np.maximum(mask.cumsum(1) - 1, 0)


def packed(n_rows, T, rng):
    """Two or three sequences in a row and padding after: segments_BT and positions_BT."""
    segments, positions = np.zeros((n_rows, T), int), np.zeros((n_rows, T), int)
    for b in range(n_rows):
        cuts = np.sort(rng.choice(np.arange(1, T), rng.integers(2, 4), replace=False))
        for s, (start, stop) in enumerate(zip([0, *cuts[:-1]], cuts, strict=True)):
            segments[b, start:stop] = s + 1
            positions[b, start:stop] = np.arange(stop - start)
    return segments, positions


def check_parity(model, path, i, T=18):
    """Whole, padded and packed rows of a saved transformers model give its logits."""
    model.save_pretrained(path)
    cfg, params = gemma.load(path)
    rng = np.random.default_rng(i)
    B = 1 if i % 3 == 2 else 5
    tokens = random_tokens(cfg, B, T, seed=i) % 93  # below the multimodal special tokens
    theirs = their_logits(model, tokens)
    spread = theirs.std()
    assert 0.3 < spread < 5, f"logits of spread {spread:.2f} tell little"
    tol = LOGITS_TOL * max(1.0, spread)  # float32's rounding grows with the logits

    def ours(segments, positions):
        return np.asarray(packed_logits(params, cfg, tokens, positions, segments))

    whole = np.ones((B, T), int), np.broadcast_to(np.arange(T), (B, T))
    assert_close(ours(*whole), theirs, tol, "whole rows")
    mask, positions = padded(B, T, rng)
    theirs = their_logits(model, tokens, mask)
    assert_close(ours(mask, positions)[mask > 0], theirs[mask > 0], tol, "padded rows")
    segments, positions = packed(B, T, rng)
    together = ours(segments, positions)
    for b in range(B):
        for s in range(1, segments[b].max() + 1):
            here = segments[b] == s
            alone = their_logits(model, tokens[b : b + 1, here])[0]
            assert_close(together[b, here], alone, tol, "packed rows")


@pytest.mark.parametrize("i", range(N_CONFIGS))
@pytest.mark.parametrize("family", FAMILIES)
def test_random_models_give_the_logits_of_transformers(hf, tmp_path, family, i):
    check_parity(random_hf_model(hf, family, i), tmp_path, i)


@pytest.mark.parametrize("i", [1, 3])  # tied, and with a head of its own
def test_multimodal_containers_give_the_logits_of_transformers(hf, tmp_path, i):
    check_parity(random_hf_model(hf, "gemma3", i, multimodal=True), tmp_path, i)


@pytest.mark.parametrize("family", FAMILIES)
def test_bfloat16_is_as_close_to_float32_as_in_transformers(hf, tmp_path, family):
    """The roundings are in the same places: float32 norms, RoPE and softmax, a rounded sqrt(D)."""
    import torch

    model = random_hf_model(hf, family, 1)
    model.save_pretrained(tmp_path)
    tokens = random_tokens(TINY[family], 4, 24)
    exact = their_logits(model, tokens)
    theirs = np.abs(their_logits(model.to(torch.bfloat16), tokens) - exact)
    cfg, params = gemma.load(tmp_path, jnp.bfloat16)
    ours = np.abs(np.asarray(logits(params, cfg, tokens, np.ones_like(tokens))) - exact)
    assert ours.mean() < 1.2 * theirs.mean(), f"{ours.mean():.4f} against {theirs.mean():.4f}"


def test_the_embedding_scale_is_rounded_to_the_activations_dtype():
    for name, scale in {"gemma3-1b": 34.0, "gemma2-9b": 59.75, "gemma3-27b": 73.5}.items():
        cfg = gemma.CONFIGS[name]
        for dtype, factor in ((jnp.bfloat16, scale), (jnp.float32, math.sqrt(cfg.hidden_size))):
            table_VD = jnp.ones((1, cfg.hidden_size), dtype)
            x_BTD = gemma.embed({"embed_tokens": table_VD}, cfg, jnp.zeros((1, 1), int))
            assert x_BTD.dtype == dtype and (x_BTD == jnp.asarray(factor, dtype)).all()


# -------------------------------------------------------------------------- what a token can see


def reach(cfg, positions=None, segments=None, T=12):
    """[T, T] max |d hidden[t] / d embedding of token s|; the tokens are all different."""
    params = random_params(cfg)
    tokens = jnp.asarray(np.random.default_rng(0).permutation(cfg.vocab_size)[None, :T])

    def f(table_VD):
        p = params | {"embed_tokens": table_VD}
        x_BTD = gemma.hidden(p, cfg, tokens, positions, segments)
        return x_BTD[0] @ jax.random.normal(jax.random.key(1), (cfg.hidden_size,))

    d_TVD = jax.jit(jax.jacrev(f))(params["embed_tokens"])
    return np.abs(np.asarray(d_TVD))[:, tokens[0]].max(-1)


def check_reach(seen_TT, expected_TT):
    """Exactly zero where a token must not see, and not zero where it must."""
    assert (seen_TT[~expected_TT] == 0).all() and (seen_TT[expected_TT] > 0).all()


@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_see_the_past_of_their_own_sequence(family):
    past_TT = np.tri(12, dtype=bool)
    check_reach(reach(TINY[family]), past_TT)
    segments = np.array([[1, 1, 1, 1, 2, 2, 2, 3, 3, 3, 0, 0]])
    positions = np.array([[0, 1, 2, 3, 0, 1, 2, 0, 1, 2, 0, 1]])
    real = segments[0] > 0
    seen_TT = reach(TINY[family], positions, segments)
    check_reach(seen_TT[real], ((segments.T == segments) & past_TT)[real])


@pytest.mark.parametrize("family, n_layers", [("gemma2", 1), ("gemma3", 2)])
def test_local_layers_see_exactly_their_window(family, n_layers):
    cfg = dataclasses.replace(
        TINY[family], num_hidden_layers=n_layers, is_global=(False,) * n_layers, sliding_window=4
    )
    age_TT = np.subtract.outer(*[np.arange(12)] * 2)
    check_reach(reach(cfg), (age_TT >= 0) & (age_TT <= n_layers * 3))  # three before it, a layer


# ------------------------------------------------------------------------------- splash attention


def with_tiles(family):
    """The smallest heads that splash takes, a window that turns within a sequence, two layers."""
    return dataclasses.replace(TINY[family], head_dim=128, sliding_window=40, num_hidden_layers=2,
                               is_global=(False, True))


def packed_rows(B, T):
    segments, positions = packed(B, T, np.random.default_rng(0))
    assert segments.max() > 1 and (segments == 0).any()
    return jnp.asarray(positions), jnp.asarray(segments)


@pytest.mark.parametrize("family", FAMILIES)
def test_splash_is_attention_and_so_are_its_gradients(family, B=2, T=200):
    """In both kinds of layers, packed, padded to whole blocks (256), with soft caps and GQA."""
    cfg = with_tiles(family)
    positions_BT, segments_BT = packed_rows(B, T)
    K, N, H = cfg.num_key_value_heads, cfg.num_attention_heads, cfg.head_dim
    shapes = (B, T, N, H), (B, K, T, H), (B, K, T, H), (B, T, N, H)
    keys = jax.random.split(jax.random.key(0), 4)
    *qkv, weight = (jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True))
    weight *= (segments_BT > 0)[:, :, None, None]  # what padding attends to is nobody's business

    def plain(qkv, window):
        distance_BTT = positions_BT[:, :, None] - positions_BT[:, None, :]
        same_BTT = segments_BT[:, :, None] == segments_BT[:, None, :]
        mask_BTT = same_BTT & (distance_BTT >= 0) & (distance_BTT < window)
        return gemma.attend(cfg, qkv[0], [(*qkv[1:], mask_BTT)])

    def kernels(qkv, window):
        return splash.attend(cfg, qkv[0], [(*qkv[1:], None)], segments_BT=segments_BT,
                             window=window, interpret=True)

    @functools.partial(jax.jit, static_argnums=0)
    def both(attention, qkv, window):
        total = lambda qkv: jnp.sum(attention(qkv, window) * weight)
        return attention(qkv, window) * weight, jax.grad(total)(qkv)

    for is_global in (False, True):
        window = gemma.attention_window(cfg, is_global)
        expected, found = (both(f, qkv, window) for f in (plain, kernels))
        for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
            assert_close(y, x, 1e-5 * jnp.abs(x).max())
    local, everything = (plain(qkv, gemma.attention_window(cfg, g)) * weight for g in (False, True))
    assert jnp.abs(local - everything).max() > 0.1  # or the window is not tested


@pytest.fixture
def as_on_a_tpu(monkeypatch):
    monkeypatch.setattr(gemma, "on_tpu", lambda mesh=None: True)
    interpreted = functools.partial(splash.attend, interpret=True)
    monkeypatch.setattr(splash, "attend", interpreted)
    return monkeypatch


def test_a_model_with_splash_is_the_model(as_on_a_tpu):
    """Hidden states of packed rows, their gradient, and the keys and values of a prefill."""
    cfg, T = with_tiles("gemma2"), 130
    params, tokens = random_params(cfg), jnp.asarray(random_tokens(cfg, 2, T))
    packing = packed_rows(2, T)
    real_BT1 = (packing[1] > 0)[..., None]

    def run(params):  # a function of its own for each time, or jit would not trace it again
        def total(params):
            x_BTD = gemma.hidden(params, cfg, tokens, *packing, remat="layer")
            return jnp.sum(jnp.where(real_BT1, jnp.cos(x_BTD), 0)), x_BTD * real_BT1

        x_BTD, kv = gemma.prefill(params, cfg, tokens, jnp.array([T, 70]))
        valid = jnp.arange(T)[None] < jnp.array([[T], [70]])
        kept = [tuple(z * valid[:, None, :, None] for z in kv[1]), kv[0][0][0], kv[0][1][0]]
        return jax.grad(total, has_aux=True)(params), (x_BTD * valid[..., None], kept)

    found = jax.jit(run)(params)
    as_on_a_tpu.setattr(gemma, "on_tpu", lambda mesh=None: False)
    expected = jax.jit(lambda params: run(params))(params)
    for x, y in zip(jax.tree.leaves(expected), jax.tree.leaves(found), strict=True):
        assert_close(y, x, 1e-5 * jnp.abs(x).max() * (x.dtype == jnp.float32))


@pytest.mark.parametrize("remat", ["none", "attention", "layer"])
def test_with_splash_the_backward_pass_is_left_no_scores(remat, as_on_a_tpu):
    cfg, T = with_tiles("gemma3"), 136
    params, tokens = random_params(cfg), jnp.zeros((1, T), jnp.int32)

    def n_square():  # of the arrays kept for the backward pass
        kept = jax.eval_shape(lambda p: jax.vjp(
            lambda p: gemma.hidden(p, cfg, tokens, remat=remat), p)[1], params)
        return sum(x.shape.count(T) > 1 for x in jax.tree.leaves(kept) if x.dtype == jnp.float32)

    assert n_square() == 0
    as_on_a_tpu.setattr(gemma, "on_tpu", lambda mesh=None: False)
    assert (n_square() > 0) == (remat == "none")  # as it would be seen


def test_remat_attention_keeps_one_product_of_each_matrix():
    """Of a layer with LoRA: its input, what each of the seven matrices gave, R numbers of each."""
    cfg, (B, T, R) = TINY["gemma3"], (2, 25, 3)
    params, tokens = random_params(cfg), jnp.zeros((B, T), jnp.int32)
    adapter, L = lora.init(cfg, jax.random.key(0), R, R), cfg.num_hidden_layers

    def kept(remat):
        out = jax.eval_shape(lambda a: jax.vjp(lambda a: gemma.hidden(
            params, cfg, tokens, lora=adapter | a, remat=remat), a)[1],
            {k: adapter[k] for k in "ab"})
        of_tokens = lambda x: x.shape[:2] == (L, B * T) or x.shape[:3] == (L, B, T)
        return sum(x.size for x in jax.tree.leaves(out) if of_tokens(x))

    wide = sum(math.prod(gemma.axis_sizes(cfg)[a] for a in s.out) for s in gemma.LINEARS.values())
    n = L * B * T
    assert kept("attention") == n * (cfg.hidden_size + wide + 7 * R)
    assert kept("auto") == kept("attention") and kept("none") > 2 * kept("attention")
    assert kept("layer") == n * cfg.hidden_size


def test_splash_is_for_tpus_long_rows_and_heads_of_whole_tiles():
    """The lowering follows the devices of the mesh, of a kind that this machine does not have."""
    kind = jax.sharding.AbstractDevice(device_kind="TPU v5 lite", num_cores=1, platform="tpu")
    of_tpus = jax.sharding.AbstractMesh((1,), ("data",), (jax.sharding.AxisType.Auto,),
                                        abstract_device=kind)

    def splashes(mesh, T=128, head_dim=128):
        cfg = dataclasses.replace(with_tiles("gemma3"), head_dim=head_dim)
        body = lambda params, tokens: gemma.hidden(params, cfg, tokens)
        f = jax.shard_map(body, mesh=mesh, in_specs=P(), out_specs=P(), check_vma=False)
        return "pallas_call" in str(jax.make_jaxpr(f)(random_params(cfg), jnp.zeros((1, T), int)))

    assert splashes(of_tpus)
    assert not splashes(of_tpus, T=127) and not splashes(of_tpus, head_dim=32)
    assert not splashes(mesh_of(8))


@pytest.mark.parametrize("kind, capability, expected", [
    ("NVIDIA H200", "9.0", True), ("NVIDIA B200", "10.0", True),
    ("NVIDIA A100-SXM4-40GB", "8.0", False),
    ("Tesla T4", "7.5", False), ("AMD Instinct MI300X", "gfx942", False),
])
def test_cudnn_attends_from_hopper_on(monkeypatch, kind, capability, expected):
    device = types.SimpleNamespace(device_kind=kind, compute_capability=capability)
    monkeypatch.setattr(jax, "local_devices", lambda: [device])
    assert gemma.has_cudnn_attention() == expected


@pytest.mark.parametrize("T", [1022, 1024])
def test_where_cudnn_attends_the_hidden_states_are_the_same(monkeypatch, T, B=2):
    """XLA does cuDNN's work here. Rows are packed; the completions of one share a prompt."""
    cfg = with_tiles("gemma3")
    params = jax.tree.map(lambda w: w.astype(jnp.bfloat16), random_params(cfg))
    tokens_BT = jnp.asarray(random_tokens(cfg, B, T))
    positions_BT, segments_BT = packed_rows(B, T)
    parents_BT = jnp.where(segments_BT > 2, 1, segments_BT)
    args = params, cfg, tokens_BT, positions_BT, segments_BT, parents_BT
    hidden = lambda *args: jax.jit(lambda params, *rows: gemma.hidden(params, cfg, *rows))(
        args[0], *args[2:])
    expected, calls, attention = hidden(*args), [], jax.nn.dot_product_attention

    def by_xla(*args, implementation, **kwargs):
        calls.append(implementation)
        return attention(*args, implementation="xla", **kwargs)

    monkeypatch.setattr(jax.nn, "dot_product_attention", by_xla)
    monkeypatch.setattr(gemma, "has_cudnn_attention", lambda: True)
    found = hidden(*args)
    assert set(calls) == ({"cudnn"} if T == 1024 else set())
    real = segments_BT > 0
    error = jnp.abs(found - expected)[real].astype(jnp.float32)
    assert jnp.isfinite(found).all() and error.mean() < 1e-2 and (error.max() > 0) == (T == 1024)
    gemma.hidden(jax.tree.map(lambda w: w.astype(jnp.float32), params), *args[1:])
    assert len(calls) <= 1  # not in float32



# ------------------------------------------------------------------------------------ eight devices


def loss_sum(params, cfg, tokens_BT, positions_BT, segments_BT, **how):
    """A sum over log-probs and entropies, and the hidden states it was made of."""
    x_BTD = gemma.hidden(params, cfg, tokens_BT, positions_BT, segments_BT, **how)
    logp_BT, entropy_BT = gemma.token_logps(
        x_BTD, gemma.head(params, cfg, how.get("fsdp")), tokens_BT, chunk=5, temperature=0.7,
        softcap=cfg.final_logit_softcapping,
    )
    weight_BT = (segments_BT > 0) * jnp.cos(tokens_BT)
    return jnp.sum(weight_BT * (logp_BT + 0.3 * entropy_BT)), x_BTD


def batch_of_eight(cfg):
    tokens = random_tokens(cfg, 8, 10)
    segments, positions = packed(8, 10, np.random.default_rng(0))
    return tuple(jnp.asarray(z) for z in (tokens, positions, segments))


@functools.cache
def on_one_device(cfg):
    grad = jax.jit(jax.grad(loss_sum, has_aux=True), static_argnums=1)
    return grad(random_params(cfg), cfg, *batch_of_eight(cfg))


def check_eight_devices(cfg, shard, remat, check_vma):
    pspecs = gemma.pspecs(cfg, shard)
    how = {"remat": remat, "fsdp": "data" if shard else None}

    def body(params, *batch):  # sizes here are those of one device
        split = lambda pspec: "data" in pspec
        vary = lambda w, s: w if split(s) else lax.pcast(w, "data", to="varying")
        params = jax.tree.map(vary, params, pspecs)
        grads, x_BTD = jax.grad(loss_sum, has_aux=True)(params, cfg, *batch, **how)
        # replicated leaves{unreduced over data} -> all-reduce; split ones were summed by the gather
        total = lambda g, s: g if split(s) else lax.psum(g, "data")
        return jax.tree.map(total, grads, pspecs), x_BTD

    rows = (P("data"),) * 3
    step = jax.shard_map(body, mesh=mesh_of(8), in_specs=(pspecs, *rows), check_vma=check_vma,
                         out_specs=(pspecs, P("data")))
    grads, x_BTD = jax.jit(step)(random_params(cfg), *batch_of_eight(cfg))
    expected_grads, expected_BTD = on_one_device(cfg)
    assert_close(x_BTD, expected_BTD, 1e-5)
    assert_same_trees(grads, expected_grads, 1e-5)


@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("family, shard, remat", [
    ("gemma3", False, "attention"), ("gemma3", True, "attention"), ("gemma3", True, "layer"),
    ("gemma2", False, "none"), ("gemma2", True, "none"),
])
def test_eight_devices_equal_one(family, shard, remat, check_vma):
    """Gemma 2 has soft caps; here it has a head of its own too."""
    cfg = dataclasses.replace(TINY[family], tie_word_embeddings=family == "gemma3")
    check_eight_devices(cfg, shard, remat, check_vma)


# --------------------------------------------------------------------------------- token log-probs


def plain_logps(x_BTD, head_VD, targets_BT, temperature=1.0, softcap=None):
    logits_BTV = jnp.einsum("BTD,VD->BTV", x_BTD, head_VD)
    if softcap:
        logits_BTV = softcap * jnp.tanh(logits_BTV / softcap)
    logp_BTV = jax.nn.log_softmax(logits_BTV / temperature)
    logp_BT = jnp.take_along_axis(logp_BTV, targets_BT[..., None], axis=-1)[..., 0]
    return logp_BT, -jnp.sum(jnp.exp(logp_BTV) * logp_BTV, axis=-1)


def logps_problem(B=3, T=5, D=8, V=33):
    x, head, g, h = (jax.random.normal(jax.random.key(i), shape) for i, shape in
                     enumerate([(B, T, D), (V, D), (B, T), (B, T)]))
    return x, head, jnp.asarray(random_tokens(TINY["gemma2"], B, T) % V), g, h


USES = {  # what a loss reads; the cheap backward pass serves only "logp" of a frozen head
    "logp": lambda pair, g, h: (pair[0] * g).sum(),
    "entropy": lambda pair, g, h: (pair[1] * h).sum(),
    "both": lambda pair, g, h: (pair[0] * g + pair[1] * h).sum(),
}


@pytest.mark.parametrize("chunk, block, temperature, softcap", [  # of 15 tokens and V words
    (4, 8, 0.6, 2.0), (5, 1, 1.0, None), (100, 100, 0.6, None)])
def test_token_logps_and_their_gradients_equal_log_softmax(chunk, block, temperature, softcap):
    x, head, targets, g, h = logps_problem()
    how = {"temperature": jnp.float32(temperature), "softcap": softcap}

    def all_of(f):
        pair = f(x, head)
        return pair, {
            f"{use} {wrt}": jax.grad(lambda *a, u=u: u(f(*a), g, h), argnums=wrt)(x, head)
            for use, u in USES.items() for wrt in (0, 1, (0, 1))
        }

    ours = jax.jit(lambda: all_of(
        lambda x, head: gemma.token_logps(x, head, targets, chunk=chunk, block=block, **how)))()
    theirs = jax.jit(lambda: all_of(lambda x, head: plain_logps(x, head, targets, **how)))()
    assert ours[0][0].dtype == jnp.float32
    for a, b in zip(jax.tree.leaves(ours), jax.tree.leaves(theirs), strict=True):
        assert_close(a, b, 4e-6 * max(1, float(jnp.abs(b).max())))


@pytest.mark.parametrize("use, wrt", [("logp", "x"), ("both", None), ("both", "x and head")])
def test_memory_of_token_logps_does_not_grow_with_tokens_times_vocabulary(use, wrt):
    V, D, short, long = 32768, 64, 256, 2048

    def temp_bytes(T):
        def loss(x, head, targets, g):
            return USES[use](gemma.token_logps(x, head, targets, chunk=64, softcap=30.0), g, g)

        f = jax.grad(loss, argnums={"x": 0, "x and head": (0, 1)}[wrt]) if wrt else loss
        shapes = [((1, T, D), "f4"), ((V, D), "f4"), ((1, T), "i4"), ((1, T), "f4")]
        args = [jax.ShapeDtypeStruct(*s) for s in shapes]
        return jax.jit(f).lower(*args).compile().memory_analysis().temp_size_in_bytes

    few, many = temp_bytes(short), temp_bytes(long)
    assert many - few <= 4 * (long - short) * D * 4, f"{many - few}"  # some float32 arrays [T, D]
    assert many < long * V * 4 / 4, f"{many}"


@pytest.mark.parametrize("wanted_rate", [0.0, 0.3, 1.0])
def test_token_logps_of_wanted_tokens_only(wanted_rate):
    """Equal values and gradients; chunks without a wanted token are never computed (here: NaN)."""
    rng = np.random.default_rng(0)
    x_BTD = rng.normal(size=(3, 11, 8)).astype(np.float32)
    head_VD = jnp.asarray(rng.normal(size=(23, 8)), jnp.float32)
    targets_BT = jnp.asarray(rng.integers(0, 23, (3, 11)))
    wanted_BT = (rng.random((3, 11)) < wanted_rate).astype(np.float32)
    weight_BT = rng.normal(size=(3, 11)).astype(np.float32) * wanted_BT

    def total(x_BTD, **kw):
        logp, entropy = gemma.token_logps(x_BTD, head_VD, targets_BT, softcap=3.0, **kw)
        return jnp.sum(jnp.where(wanted_BT > 0, logp * weight_BT, 0.0)), (logp, entropy)

    f = jax.jit(jax.value_and_grad(total, has_aux=True), static_argnames="chunk")
    (_, expected), dx = f(x_BTD)
    hostile = jnp.where(wanted_BT[..., None] > 0, x_BTD, jnp.nan)
    for x, chunk in ((hostile, 1), (x_BTD, 4)):
        (_, got), dx_wanted = f(x, wanted_BT=wanted_BT, chunk=chunk)
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, np.where(wanted_BT > 0, b, 0.0), atol=1e-6)
        np.testing.assert_allclose(dx_wanted, dx, atol=1e-6)


# ------------------------------------------------------------------------------------------ configs

PARAMETERS = {  # text model, tied
    "gemma2-2b": 2_614_341_888, "gemma2-9b": 9_241_705_984, "gemma2-27b": 27_227_128_320,
    "gemma3-270m": 268_098_176, "gemma3-1b": 999_885_952, "gemma3-4b": 3_880_263_168,
    "gemma3-12b": 11_766_034_176, "gemma3-27b": 27_009_346_304,
}


def test_published_models_have_their_published_sizes():
    published = {name: cfg.n_params for name, cfg in gemma.CONFIGS.items() if name != "tiny"}
    assert published == PARAMETERS


def layer_types(n, every):
    return ["full_attention" if (i + 1) % every == 0 else "sliding_attention" for i in range(n)]


LINEAR_8 = {"factor": 8.0, "rope_type": "linear"}
FLAT_1B = {  # as published, 4.x spelling
    "attention_bias": False, "attn_logit_softcapping": None, "eos_token_id": [1, 106],
    "final_logit_softcapping": None, "head_dim": 256, "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 1152, "intermediate_size": 6912, "max_position_embeddings": 32768,
    "model_type": "gemma3_text", "num_attention_heads": 4, "num_hidden_layers": 26,
    "num_key_value_heads": 1, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_local_base_freq": 10000, "rope_scaling": None, "rope_theta": 1000000,
    "sliding_window": 512, "sliding_window_pattern": 6, "vocab_size": 262144,
}
ROPE_5 = {  # transformers 5
    "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0},
    "full_attention": {"rope_type": "default", "rope_theta": 1000000.0},
}
OLD_ROPE = ("rope_theta", "rope_local_base_freq", "rope_scaling", "sliding_window_pattern")


def without(d, *names):
    return {k: v for k, v in d.items() if k not in names}


def nested(**text_config):
    """A multimodal file, which omits most of its text part."""
    text = {"model_type": "gemma3_text", "sliding_window": 1024} | text_config
    return {"eos_token_id": [1, 106], "image_token_index": 262144, "model_type": "gemma3",
            "text_config": text, "vision_config": {"hidden_size": 1152, "num_hidden_layers": 27}}


TEXT_4B = {"hidden_size": 2560, "intermediate_size": 10240, "num_hidden_layers": 34}
TEXT_27B = {"hidden_size": 5376, "intermediate_size": 21504, "num_hidden_layers": 62,
            "num_attention_heads": 32, "num_key_value_heads": 16, "head_dim": 128,
            "query_pre_attn_scalar": 168}
GEMMA2_9B = {
    "attn_logit_softcapping": 50.0, "eos_token_id": 1, "final_logit_softcapping": 30.0,
    "head_dim": 256, "hidden_act": "gelu_pytorch_tanh", "hidden_activation": "gelu_pytorch_tanh",
    "hidden_size": 3584, "intermediate_size": 14336, "max_position_embeddings": 8192,
    "model_type": "gemma2", "num_attention_heads": 16, "num_hidden_layers": 42,
    "num_key_value_heads": 8, "query_pre_attn_scalar": 256, "rms_norm_eps": 1e-06,
    "rope_theta": 10000.0, "sliding_window": 4096, "vocab_size": 256000,
}
SPELLINGS = {  # spelling -> (the entry of CONFIGS it must give, config.json)
    "4.x flat": ("gemma3-1b", FLAT_1B),
    "4.x layer_types": ("gemma3-270m", without(FLAT_1B, "sliding_window_pattern") | {
        "hidden_size": 640, "intermediate_size": 2048, "num_hidden_layers": 18, "eos_token_id": 1,
        "_sliding_window_pattern": 6, "layer_types": layer_types(18, 6)}),
    "4b nested, old rope type": (
        "gemma3-4b", nested(**TEXT_4B, rope_scaling={"factor": 8.0, "type": "linear"})),
    "27b nested": ("gemma3-27b", nested(**TEXT_27B, rope_scaling=LINEAR_8)),
    "5 flat": ("gemma3-1b", without(FLAT_1B, *OLD_ROPE, "torch_dtype") | {
        "_sliding_window_pattern": 6, "layer_types": layer_types(26, 6), "dtype": "bfloat16",
        "rope_parameters": ROPE_5, "use_bidirectional_attention": False}),
    "5 nested": ("gemma3-27b", nested(**TEXT_27B, layer_types=layer_types(62, 6), rope_parameters={
        **ROPE_5, "full_attention": ROPE_5["full_attention"] | LINEAR_8})),
    "gemma2 4.x": ("gemma2-9b", GEMMA2_9B),
    "gemma2 5": ("gemma2-9b", without(GEMMA2_9B, "rope_theta", "hidden_act") | {
        "layer_types": layer_types(42, 2), "use_bidirectional_attention": None,
        "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"}}),
    "gemma2 defaults": ("gemma2-2b", {"model_type": "gemma2"}),
}


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_every_spelling_of_a_published_config_gives_its_entry(spelling):
    name, hf = SPELLINGS[spelling]
    same = {"eos_token_id": (1,)}  # published differently in base and chat models
    got = model_files.config_from_dict(hf)
    assert dataclasses.replace(got, **same) == dataclasses.replace(gemma.CONFIGS[name], **same)
    eos = hf.get("eos_token_id", 1)
    assert got.eos_token_id == (tuple(eos) if isinstance(eos, list) else (eos,))


@pytest.mark.parametrize("cfg", [*gemma.CONFIGS.values(), *TINY.values()], ids=lambda c: "")
def test_a_written_config_reads_back(cfg):
    for tied in (True, False):
        cfg = dataclasses.replace(cfg, tie_word_embeddings=tied)
        text = json.dumps(model_files.config_to_dict(cfg))
        assert model_files.config_from_dict(json.loads(text)) == cfg


@pytest.mark.parametrize("change", [
    {}, {"attn_logit_softcapping": None, "final_logit_softcapping": None},
    {"attn_logit_softcapping": 7.0, "final_logit_softcapping": 8.0},
])
@pytest.mark.parametrize("family", FAMILIES)
def test_a_written_config_means_the_same_to_transformers(hf, tmp_path, family, change):
    cfg = dataclasses.replace(TINY[family], **change)
    (tmp_path / "config.json").write_text(json.dumps(model_files.config_to_dict(cfg)))
    theirs = hf.AutoConfig.from_pretrained(tmp_path)
    assert type(theirs).__name__ == {"gemma2": "Gemma2Config", "gemma3": "Gemma3TextConfig"}[family]
    theirs.save_pretrained(tmp_path)  # in its own spelling
    assert gemma.read_config(tmp_path) == cfg


@pytest.mark.parametrize("family", FAMILIES)
def test_init_fills_the_table_of_specs(family):
    cfg = dataclasses.replace(TINY[family], tie_word_embeddings=False)
    params = jax.jit(gemma.init, static_argnums=(0, 2))(cfg, jax.random.key(0), jnp.bfloat16)
    assert params.keys() - gemma.specs(TINY[family]).keys() == {"lm_head"}
    starts = set()
    for spec, leaf in zip(jax.tree.leaves(gemma.specs(cfg)), jax.tree.leaves(params), strict=True):
        assert leaf.shape == spec.shape(cfg) and leaf.dtype == jnp.bfloat16
        fan_in = math.prod(gemma.axis_sizes(cfg)[a] for a in spec.inp)
        leaf = np.asarray(leaf, np.float32) * fan_in**0.5
        assert 0.8 < leaf.std() < 1.2 if spec.inp else (leaf == 0).all(), spec.name
        starts |= {tuple(leaf.ravel()[:4])} if spec.inp else set()
    assert len(starts) == 9, "each matrix has a key of its own"
