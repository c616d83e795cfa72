"""--base int8: how far it rounds, and that all that reads a base reads int8 to the same effect."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
import test_grpo
import test_judge
import test_sampler
from conftest import CFG, check_sharded_step, close, live_adapter, mesh_of, weights_of
from jax.sharding import NamedSharding
from jax.sharding import PartitionSpec as P
from test_gemma import assert_same_trees, random_params
from test_grpo import off_policy, samples_of

import gemma
import judge
import lora
import rollouts
import stage
import train_grpo
from gemma import Int8

CONFIG = dataclasses.replace(test_grpo.CONFIG, base="int8", kl_coef=0.1)
WIDE = gemma.Config(  # D splits over eight devices
    "gemma3_text", 96, 64, 40, 2, 4, 2, 12, 12, 5, (False, True), 1e4, 1e6,
    tie_word_embeddings=False,
)
UNIT = {"float32": 2.0**-24, "bfloat16": 2.0**-8}  # the largest relative error of one rounding


def inputs_of(spec) -> list[int]:
    return [i for i, a in enumerate(spec.axes) if a in spec.inp]


def dequantised(cfg, params):
    """q scale in float32, which is exact where scales are powers of two."""
    back = lambda spec, w: w.q * jnp.expand_dims(w.scale, inputs_of(spec)) if spec.inp else w
    return jax.tree.map(back, gemma.specs(cfg), params)


def powers_of_two(cfg, seed=0):
    """A random int8 base with scales 2^n, which dequantises without rounding."""
    power = lambda w: jnp.asarray(np.ldexp(np.float32(1), np.frexp(w.scale)[1]))
    return jax.tree.map(lambda spec, w: Int8(w.q, power(w)) if spec.inp else w, gemma.specs(cfg),
                        gemma.quantised(cfg, random_params(cfg, seed)))


def equal(found, expected):
    for (path, x), y in zip(jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected),
                            strict=True):
        np.testing.assert_array_equal(x, y, err_msg=jax.tree_util.keystr(path))


# ------------------------------------------------------------------------------------- rounding


def rounded(name, dtype):
    """Uneven weights -> their int8, and in float64 [in, out] what that is, half a step, and they.

    Checks that no weight is further than half a step from what it was.
    """
    rng, spec = np.random.default_rng(0), gemma.LINEARS.get(name) or gemma.specs(WIDE)[name]
    uneven = rng.normal(size=spec.shape(WIDE)) * rng.lognormal(size=spec.shape(WIDE))
    w = jnp.asarray(uneven, dtype)
    made, axes = gemma.quantise(spec, w), inputs_of(spec)
    scale64 = np.expand_dims(np.float64(made.scale), axes)
    kept64, half64 = np.float64(made.q) * scale64, np.broadcast_to(scale64 * 0.50001, w.shape)
    assert made.q.dtype == jnp.int8 and abs(np.asarray(made.q)).max() == 127
    assert (abs(kept64 - np.float64(w)) <= half64).all()
    if spec.stacked:
        first = jax.tree.map(lambda z: z[0], made)
        n_in = int(np.prod([gemma.axis_sizes(WIDE)[a] for a in spec.inp]))
        return first, [z[0].reshape(n_in, -1) for z in (kept64, half64, np.float64(w))]
    return made, [z.T for z in (kept64, half64, np.float64(w))]


@pytest.mark.smoke
@pytest.mark.parametrize("dtype", UNIT)
@pytest.mark.parametrize("name", [*gemma.LINEARS, "lm_head"])
def test_a_product_is_within_its_rounding(name, dtype):
    """In float64: what adding up the terms in float32 can cost, and one rounding to `dtype`."""
    made, (kept64, half64, w64) = rounded(name, dtype)
    x = jnp.asarray(np.random.default_rng(1).normal(size=(7, len(w64))), dtype)
    if name == "lm_head":  # logits are never rounded to bfloat16
        found, u = gemma.read_logits(WIDE, made, x), UNIT["float32"]
    else:
        found, u = gemma.linear({name: made}, None, name, x[None]), UNIT[dtype]
    found, x64 = np.float64(found).reshape(7, -1), np.float64(x)
    adding = (len(w64) + 2) * UNIT["float32"] * (abs(x64) @ abs(kept64))
    bound = adding + u * (abs(x64 @ kept64) + adding)
    assert (abs(found - x64 @ kept64) <= bound).all()
    assert (abs(found - x64 @ w64) <= bound + abs(x64) @ half64).all()
    assert (abs(found - x64 @ w64) > bound).any()  # the second bound is not for nothing


@pytest.mark.parametrize("dtype", UNIT)
def test_an_embedding_is_within_its_rounding(dtype):
    made, (kept64, *_) = rounded("embed_tokens", dtype)
    params, ids = {"embed_tokens": made, "norm": jnp.zeros(1, dtype)}, np.array([[3, 90, 3]])
    found, expected = np.float64(gemma.embed(params, WIDE, ids)), kept64.T[ids] * 8  # sqrt(64)
    assert (abs(found - expected) <= abs(expected) * 2 * UNIT[dtype]).all()


def test_no_weight_is_zero_over_zero_and_a_nan_is_not_lost():
    spec = gemma.LINEARS["o_proj"]
    w = jnp.ones(spec.shape(CFG)).at[1, ..., 0].set(0.0).at[0, 1, 2, 3].set(jnp.nan)
    made = gemma.quantise(spec, w)
    assert (made.q[1, ..., 0] == 0).all() and (made.scale[1, 0] == 1)
    assert jnp.isnan(made.scale).sum() == 1 and jnp.isnan(made.scale[0, 3])


# -------------------------------------------------------------------------------------- training


def gradient(config, base, devices=1, sharded=False):
    samples = samples_of()
    batch, n, _ = rollouts.pack(samples, train_grpo.token_weights(samples, config), config, devices)
    return test_grpo.gradient(off_policy(samples)(batch), n, config, devices, sharded, base=base)


def test_gradients_of_an_adapter_are_exactly_those_on_the_dequantised_base():
    """To the bit, operation by operation: with scales of 2^n both do the same arithmetic."""
    cfg = dataclasses.replace(CFG, num_hidden_layers=2, is_global=(False, True))
    base, adapter = powers_of_two(cfg), live_adapter(cfg)
    trained, fixed = lora.split(adapter)
    tokens = np.random.default_rng(0).integers(3, 97, (1, 9))

    def loss(trained, base):
        x = gemma.hidden(base, cfg, tokens, lora=trained | fixed)[:, :-1]
        return gemma.token_logps(x, gemma.head(base, cfg), tokens[:, 1:])[0].sum()

    with jax.disable_jit():  # else XLA adds up the terms of a product in another order
        found, expected = (jax.value_and_grad(loss)(trained, base)
                           for base in (base, dequantised(cfg, base)))
    equal(found, expected)
    assert min(np.abs(x).max() for x in jax.tree.leaves(found[1])) > 0


@pytest.mark.parametrize("remat, devices, sharded", [
    ("none", 1, False), ("layer", 1, False), ("auto", 8, True)])
def test_an_update_is_that_on_the_dequantised_base(remat, devices, sharded):
    config = dataclasses.replace(CONFIG, remat=remat)
    base = gemma.quantised(CFG, weights_of(config)[1]["base"])
    plain = dataclasses.replace(config, base="dtype")
    close(gradient(config, base, devices, sharded),
                    gradient(plain, dequantised(CFG, base), devices, sharded))


def test_a_step_of_a_sharded_int8_base_is_that_of_a_replicated_one():
    samples = samples_of()
    batch, n, _ = rollouts.pack(samples, train_grpo.token_weights(samples, CONFIG), CONFIG, 8)
    trained, fixed = weights_of(CONFIG)
    fixed |= {"base": gemma.quantised(CFG, fixed["base"])}
    check_sharded_step(CFG, CONFIG, train_grpo.make_steps, stage.partition_specs, trained, fixed,
                       off_policy(samples)(batch), np.int32(n), np.bool(False), np.float32(1e-3))


def floats_of(jaxpr):
    """Shapes of all floating-point arrays that a traced program makes."""
    for eqn in jaxpr.eqns:
        yield from (v.aval.shape for v in eqn.outvars if jnp.issubdtype(v.aval.dtype, jnp.floating))
        for inner in jax.tree.leaves(list(eqn.params.values())):
            if hasattr(inner := getattr(inner, "jaxpr", inner), "eqns"):
                yield from floats_of(inner)


@pytest.mark.parametrize("remat", ["none", "attention", "layer"])
def test_no_layers_are_kept_as_floats_for_the_backward_pass(remat):
    config = dataclasses.replace(CONFIG, remat=remat, pack_length=28)  # no axis of a weight
    trained, fixed = weights_of(config)
    samples = samples_of()
    batch, n, _ = rollouts.pack(samples, train_grpo.token_weights(samples, config), config, 1)

    f = jax.jit(train_grpo.grads_on_mesh(CFG, config, mesh_of(1), False))
    fixed |= {"base": gemma.quantised(CFG, fixed["base"])}
    batch = off_policy(samples)(batch)
    found = set(floats_of(f.trace(trained, fixed, batch, np.int32(n), np.bool(False)).jaxpr.jaxpr))
    assert not found & {spec.shape(CFG) for spec in gemma.LINEARS.values()}
    assert (3, 28, 48) in found or remat == "layer"  # what is kept: the outputs of gate_proj


@pytest.mark.parametrize("softcap", [None, 3.0])
@pytest.mark.parametrize("with_entropy", [False, True])
def test_chunked_log_probs_of_an_int8_head(softcap, with_entropy):
    """Values and gradients of whole logits in float64, over three chunks, some tokens unwanted."""
    rng = np.random.default_rng(0)
    head = gemma.quantise(gemma.specs(CFG)["embed_tokens"], jnp.asarray(rng.normal(size=(97, 32))))
    x, targets = jnp.asarray(rng.normal(size=(3, 8, 32)), jnp.float32), rng.integers(0, 97, (3, 8))
    wanted, mix = rng.integers(0, 2, (3, 8)), rng.normal(size=(2, 3, 8))
    mix[1] *= with_entropy

    def chunked(x):
        both = gemma.token_logps(x, head, targets, temperature=0.7, softcap=softcap, chunk=10,
                                 wanted_BT=wanted)
        return sum(jnp.sum(z * m) for z, m in zip(both, mix, strict=True)) if with_entropy else (
            jnp.sum(both[0] * mix[0]))

    def whole(x):
        logits = x @ (np.float64(head.q) * np.float64(head.scale)[:, None]).T
        logits = (softcap * jnp.tanh(logits / softcap) if softcap else logits) / 0.7
        logp = jax.nn.log_softmax(logits)
        own = jnp.take_along_axis(logp, targets[..., None], -1)[..., 0]
        return jnp.sum((own * mix[0] - jnp.sum(jnp.exp(logp) * logp, -1) * mix[1]) * wanted)

    found, dx = jax.value_and_grad(chunked)(x)
    with jax.enable_x64(True):
        expected, dx64 = jax.value_and_grad(whole)(jnp.asarray(np.float64(x)))
    np.testing.assert_allclose(found, expected, rtol=1e-5)
    np.testing.assert_allclose(dx, dx64, atol=1e-5 * np.abs(dx64).max())


# ------------------------------------------------------------------------- sampling and judging


def test_decoding_is_the_forward_pass_replicated_and_sharded(family="gemma2"):
    cfg, prompts = test_sampler.CFG[family], test_sampler.random_prompts(5, 40, 23)
    params, adapter = test_sampler.params_of(family), live_adapter(cfg)
    int8 = gemma.quantised(cfg, params)
    settings = {"lora": adapter, "temperature": 1.3, "stop": range(3, 8)}
    found = test_sampler.by_number(
        test_sampler.sampler(family).sample(int8, prompts, 3, **settings))
    gaps = []
    for (p, _), r in found.items():
        ids = np.array([[*prompts[p], *r.ids]])
        for base, gap in ((int8, 0), (params, 1)):
            logits = gemma.logits(base, cfg, ids, lora=adapter)[0, len(prompts[p]) - 1 : -1] / 1.3
            logps = jax.nn.log_softmax(logits)[jnp.arange(len(r.ids)), r.ids]
            gaps.append((gap, np.abs(logps - r.logps).max()))
    assert max(g for kind, g in gaps if kind == 0) < 2e-5
    assert max(g for kind, g in gaps if kind == 1) > 1e-2  # or the test could not tell
    shards = stage.put(int8, mesh_of(8), gemma.pspecs(cfg, True, int8=True))
    for shard in (False, True):  # gathered at the start of the call, or read in place
        split = test_sampler.sampler(family, n_devices=8, slots=2, shard=shard)
        again = test_sampler.by_number(split.sample(shards, prompts, 3, **settings))
        for key, r in found.items():
            assert again[key].ids.tolist() == r.ids.tolist()
            np.testing.assert_allclose(again[key].logps, r.logps, atol=1e-5)


def test_an_int8_judge_scores_the_same_sharded_and_on_one_device(family="gemma2"):
    cfg = test_judge.CFG[family]
    int8 = gemma.quantised(cfg, test_judge.params_of(family))

    def scores(params, n, shard):
        mesh, specs = mesh_of(n), gemma.pspecs(cfg, shard, int8=True)
        params = stage.put(params, mesh, specs) if gemma.is_int8(params) else params
        return test_judge.scores(judge.OnMesh(cfg, params, test_judge.TOK[family], mesh,
                                              "explicit", shard=shard, rows=2))

    one = scores(int8, 1, False)
    np.testing.assert_allclose(scores(int8, 8, True), one, atol=2e-6)
    np.testing.assert_allclose(scores(dequantised(cfg, int8), 1, False), one, atol=2e-6)
    assert 0 < np.abs(np.subtract(one, scores(test_judge.params_of(family), 1, False))).max() < 0.02


# ------------------------------------------------------------------------------- files and runs


@pytest.mark.parametrize("devices, shard", [(1, False), (8, False), (8, True)])
def test_loading_quantises_what_is_in_the_file(tmp_path, devices, shard):
    params = jax.tree.map(lambda x: x.astype(jnp.bfloat16), random_params(WIDE))
    gemma.save(tmp_path, WIDE, params)
    mesh = mesh_of(devices)
    _, found = gemma.load(tmp_path, jnp.bfloat16, mesh, shard, int8=True)
    equal(found, gemma.quantised(WIDE, params))
    wanted = gemma.pspecs(WIDE, shard, int8=True)
    for x, spec in zip(jax.tree.leaves(found), jax.tree.leaves(wanted), strict=True):
        assert x.sharding.is_equivalent_to(NamedSharding(mesh, spec), x.ndim)
    assert found["layers"]["down_proj"].scale.sharding.spec == (P(None, "data") if shard else P())
    whole = sum(x.nbytes for x in jax.tree.leaves(params))
    assert sum(x.nbytes for x in jax.tree.leaves(found)) < 0.6 * whole  # scales of such narrow ones


@pytest.mark.parametrize("rank, names", [(4, "q,k,v,o,gate,up,down"), (8, "q,down")])
def test_an_adapter_of_another_rank_is_merged_before_rounding(small, tmp_path, rank, names):
    cfg, params = gemma.load(small)
    adapter = live_adapter(cfg)
    lora.save(tmp_path / "final", adapter, cfg)
    config = train_grpo.resolve(train_grpo.Config(
        weights=str(small), adapter=str(tmp_path / "final"), base="int8", lora_rank=rank,
        lora_alpha=8.0, lora_targets=names, out=str(tmp_path / "run")))
    model = stage.load_model(config, mesh_of(1))
    if rank == 4:  # the same: continued on the base as it is
        equal(model.fixed["base"], gemma.quantised(cfg, params))
        assert_same_trees(model.trained, lora.split(adapter)[0], 1e-6)
        return
    merged = lora.merge(params, adapter, cfg)
    after, through = model.fixed["base"], gemma.quantised(cfg, merged)
    apart = jax.tree.map(lambda x, y: np.abs(np.float32(x) - np.float32(y)).max(), after, through)
    assert max(jax.tree.leaves(apart)) <= 1  # q by one step, where a sum rounds the other way
    assert_same_trees(dequantised(cfg, after), dequantised(cfg, through), 1 / 127)
    stage.write_model(tmp_path / "next", config, model, model.trained)
    live = gemma.logits(params, cfg, np.arange(12)[None], lora=lora.load(tmp_path / "next", cfg))
    np.testing.assert_allclose(live, gemma.logits(merged, cfg, np.arange(12)[None]), atol=1e-5)
    with pytest.raises(ValueError, match="merged into unquantised weights"):
        lora.merge(after, adapter, cfg)
