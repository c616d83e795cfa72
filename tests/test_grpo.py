"""train_grpo.py: golden losses, layouts that change no gradient, whole runs."""

import contextlib
import dataclasses
import functools
import io
import json
import time
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CFG, ROOT, check_sharded_step, close, lines, live_adapter, mesh_of, weights_of

import data
import gemma
import lora
import rewards
import rollouts
import stage
import train_grpo
from rollouts import Order, Problem, Sample, pack
from sampler import Rollout
from stage import new_adapter, optimizer, partition_specs, put
from train_grpo import advantages, policy_loss, token_weights

CONFIG = train_grpo.resolve(train_grpo.Config(
    lora_rank=4, prompts=4, group=4, max_prompt=8, max_new=12, pack_length=32, micro_rows=1,
    slots=8, steps=4,
))


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


def sample(prompt, ids, total=0.0, stop="stop", logps=None, group=0, advantage=0.0, parts=None):
    problem = Problem("id", tuple(prompt), "question", "1", "number", (), "math")
    logps = np.zeros(len(ids), np.float32) if logps is None else np.asarray(logps, np.float32)
    rollout = Rollout(0, 0, np.asarray(ids, np.int32), logps, stop)
    scored = rewards.Scored(total, parts or {}, {})
    return Sample(problem, group, rollout, "", None, False, scored, advantage)


# ---------------------------------------------------------------------------- golden values


def golden_case(golden, name):
    grpo = json.loads((golden / "losses.json").read_text())["grpo"]
    case = next(c for c in grpo["cases"] if c["name"] == name)
    inputs = {k: np.array(v) for k, v in (grpo["inputs"] | case["override_inputs"]).items()}
    return inputs | {"mask": inputs.pop("completion_mask", inputs["mask"])}, case


NORM_OF = {"grpo": "sequence", "bnpo": "token", "dapo": "token", "cispo": "token",
           "dr_grpo": "constant"}
GOLDEN = ["grpo_beta0", "bnpo_beta0.04_plainKL", "dr_grpo_beta0", "dapo_beta0.04_plainKL",
          "grpo_onpolicy_beta0", "dapo_onpolicy_beta0", "dapo_clip_higher", "gspo_beta0",
          "gspo_eps0.05_beta0", "cispo_epshigh1.4", "grpo_accum2", "dr_grpo_accum2",
          "grpo_row1_masked", "bnpo_row1_masked"]


@pytest.mark.parametrize("name", GOLDEN)
def test_loss_and_gradient_are_those_of_trl(golden, name):
    x, case = golden_case(golden, name)
    c, mask = case["config"], x["mask"].astype(np.float32)
    high = c["epsilon"] if c["epsilon_high"] is None else c["epsilon_high"]
    cispo = c["loss_type"] == "cispo"
    config = change(
        clip_low=c["epsilon"], clip_high=high, cispo_cap=high if cispo else 0.0,
        ratio_level=c["importance_sampling_level"], loss_norm=NORM_OF[c["loss_type"]],
        kl_coef=c["beta"], max_new=c["max_completion_length"], is_cap=0.0, mask_truncated=True,
    )
    # a row whose mask is empty is one cut at its length, and masked for it
    rows = [sample([3], [4] * max(1, int(n)), stop="stop" if n else "length") for n in mask.sum(1)]
    weight = np.array(token_weights(rows, config))[:, None] * mask
    on_policy = "old_logps" in case["override_inputs"]  # TRL is given none
    old = np.full(mask.shape, 7.0) if on_policy else x["old_logps"]
    b = {"weight": weight, "advantage": np.broadcast_to(x["advantages"][:, None], mask.shape),
         "mask": mask, "segments": np.ones(mask.shape, int), "old": old, "ref": x["ref_logps"],
         "sampler": old, "on_policy": on_policy}
    b = {k: jnp.asarray(v, jnp.float32) for k, v in b.items()}
    f = jax.value_and_grad(lambda logp: policy_loss(logp, b, config), has_aux=True)
    (loss, metrics), grad = f(jnp.asarray(x["logps"], jnp.float32))
    share = 1 / c.get("gradient_accumulation_steps", 1)
    np.testing.assert_allclose(loss * share, case["out"]["loss"], atol=1e-6)
    np.testing.assert_allclose(grad * share, case["out"]["grad_logps"], atol=1e-6)
    expected = case["out"]["metrics"]
    if "kl" in expected:
        np.testing.assert_allclose(metrics["kl"] / mask.sum(), expected["kl"], atol=1e-6)
    if "clip_ratio/region_mean" in expected and config.ratio_level == "token":
        for end in ("low_mean", "high_mean", "region_mean"):
            got = metrics["clip_ratio/" + end] / mask.sum()
            np.testing.assert_allclose(got, expected["clip_ratio/" + end], atol=1e-6)


FIELD = json.loads((ROOT / "tests/losses.json").read_text())  # its head says where it is from


def field_batch(x, mask, config, **more):
    """The arrays of an update whose rows are those of the fixture."""
    rows = [sample([3], [4] * int(n)) for n in mask.sum(1)]
    b = {"weight": np.array(token_weights(rows, config))[:, None] * mask, "mask": mask,
         "advantage": np.broadcast_to(x["advantages"][:, None], mask.shape),
         "segments": np.ones(mask.shape, int), "old": x["old_logps"], "ref": x["ref_logps"],
         "sampler": x["old_logps"], "n_tokens": mask.sum(), "on_policy": False} | more
    return {k: jnp.asarray(v, jnp.float32) for k, v in b.items()}


@pytest.mark.parametrize("case", FIELD["cases"], ids=lambda case: case["name"])
def test_what_the_field_has_added_is_as_in_trl(case):
    x = {k: np.array(v) for k, v in FIELD["inputs"].items()}
    mask, config = x["mask"].astype(np.float32), change(**{"kl_coef": 0.0} | case["config"])
    sampler = np.array(case.get("sampler", x["old_logps"]))
    b = field_batch(x, mask, config, sampler=sampler)

    def f(logp, entropy):
        return policy_loss(logp, b | {"entropy": entropy}, config)

    inputs = jnp.asarray(x["logps"], jnp.float32), jnp.asarray(x["entropies"], jnp.float32)
    (loss, metrics), grads = jax.value_and_grad(f, (0, 1), has_aux=True)(*inputs)
    np.testing.assert_allclose(loss, case["loss"], atol=1e-6)
    np.testing.assert_allclose(grads[0], case["grad_logps"], atol=1e-6)
    np.testing.assert_allclose(grads[1], case.get("grad_entropies", 0 * mask), atol=1e-6)
    for name, expected in case["metrics"].items():
        np.testing.assert_allclose(metrics[name] / mask.sum(), expected, atol=1e-6)


@pytest.mark.parametrize("case", FIELD["vllm_is"], ids=lambda c: f"{c['level']}_{c['mode']}")
def test_importance_correction_is_that_of_trl(case):
    """On-policy, a log-prob's gradient is minus its weight: p of the trainer / p of the sampler."""
    x = {k: np.array(v) for k, v in FIELD["inputs"].items()}
    mask = x["mask"].astype(np.float32)
    config = change(is_level=case["level"], is_mode=case["mode"], is_cap=case["cap"], kl_coef=0.0)
    b = field_batch(x, mask, config, weight=mask, advantage=np.ones_like(mask), on_policy=True)
    grad = jax.grad(lambda logp: policy_loss(logp, b, config)[0])(jnp.float32(x["logps"]))
    np.testing.assert_allclose(grad, -np.array(case["ratio"]) * mask, atol=1e-6)


def test_gspo_token_has_the_value_of_gspo_and_each_tokens_own_gradient():
    x = {k: np.array(v) for k, v in FIELD["inputs"].items()}
    mask = x["mask"].astype(np.float32)
    even = np.broadcast_to(x["advantages"][:, None], mask.shape)

    def value_and_grad(level, advantage):
        config = change(ratio_level=level, clip_low=9.0, clip_high=9.0, kl_coef=0.0)
        b = field_batch(x, mask, config, advantage=advantage)
        f = jax.value_and_grad(lambda logp: policy_loss(logp, b, config)[0])
        return f(jnp.asarray(x["logps"], jnp.float32))

    whole, own = (value_and_grad(level, even) for level in ("sequence", "sequence-token"))
    np.testing.assert_allclose(own[0], whole[0], atol=1e-6)
    np.testing.assert_allclose(own[1], whole[1], atol=1e-6)
    uneven = even * np.arange(1, 1 + mask.shape[1])
    spread = [np.ptp(np.asarray(value_and_grad(level, uneven)[1])[0][mask[0] > 0])
              for level in ("sequence", "sequence-token")]
    assert spread[0] < 1e-6 < spread[1]


def test_advantages_are_those_of_trl(golden):
    cases = json.loads((golden / "losses.json").read_text())["advantages"]["cases"]
    for case in cases:
        r = np.array(case["rewards_per_func"])
        r = r.reshape(-1, case["num_generations"], r.shape[-1])
        weights = np.array(case["config"].get("reward_weights", [1.0]))
        config = change(scale=case["config"]["scale_rewards"], per_reward="GDPO" in case["note"])
        got = advantages(r @ weights, config, r, weights).reshape(-1)
        np.testing.assert_allclose(got, case["advantages"], atol=1e-6)


def test_advantages_other_projects_expect():
    r = np.array([[0.5745004, 0.099686, 0.7419659], [0.8941783, 0.5965666, 0.4532518]])
    close = lambda got, expected: np.testing.assert_allclose(got.reshape(-1), expected, atol=1e-3)
    grpo = [0.307498, -1.117636, 0.810138, 1.094526, -0.228671, -0.865855]
    close(advantages(r, change(scale="group")), grpo)
    dr_grpo = [0.10245, -0.372365, 0.269915, 0.246179, -0.051432, -0.194747]
    close(advantages(r, change(scale="none")), dr_grpo)
    ranks = np.arange(1.0, 7).reshape(2, 3)
    rloo = advantages(ranks, change(scale="none", baseline="loo"))
    close(rloo, [-1.5, 0, 1.5, -1.5, 0, 1.5])
    batch = advantages(ranks, change(scale="batch"))
    close(batch, np.array([-1, 0, 1] * 2) / (ranks.std(ddof=1) + 1e-4))


def test_equal_rewards_have_no_advantage_and_missing_ones_are_in_no_mean():
    for config in [change(scale=s, baseline=b) for s in ("group", "batch", "none")
                   for b in ("mean", "loo")] + [change(per_reward=True)]:
        for value in (0.0, 0.1, -7.3, 1e6):
            r = np.full((2, 7), value)
            r[1, 0] += 1.0  # so that the batch has a spread
            a = advantages(r, config, r[..., None], np.ones(1))
            if not config.per_reward:  # GDPO subtracts the mean of the batch, here of 0 too
                assert (a[0] == 0).all(), (config.scale, value, a)
            assert a[1, 0] > 0 and np.isfinite(a).all()
    r = np.array([[1.0, np.nan, 3.0], [2.0, np.nan, np.nan]])
    np.testing.assert_allclose(advantages(r, change(scale="none")), [[-1, 0, 1], [0, 0, 0]])
    np.testing.assert_allclose(advantages(r, change(scale="none", baseline="loo")),
                               [[-2, 0, 2], [0, 0, 0]])
    assert (advantages(np.full((2, 3), np.nan), change(scale="batch")) == 0).all()


def test_kl_estimators_and_aggregations_other_projects_expect():
    one = lambda x: jnp.full((1, 1), x)
    b = {"weight": one(1.0), "advantage": one(0.0), "mask": one(1.0), "segments": one(1),
         "old": one(0.9673288), "sampler": one(0.0), "ref": one(0.5824639),
         "on_policy": False}
    loss, m = policy_loss(one(0.9673288), b, change(kl_coef=1.0))
    np.testing.assert_allclose([m["kl_k1"], m["kl_k2"], m["kl"]], [0.3848649, 0.0740605, 0.0654075],
                               atol=1e-6)
    np.testing.assert_allclose(loss, m["kl"], atol=1e-7)
    # [[.1,.2,.3],[.4,.5,.6]], mask [[1,1,0],[1,1,1]]; constant 3 = max_new, over 2 rows
    x = [np.array([0.1, 0.2]), np.array([0.4, 0.5, 0.6])]
    rows = [sample([3], [4] * len(v)) for v in x]
    for norm, expected in (("token", 0.36), ("sequence", 0.325), ("constant", 1.8 / 6)):
        w = token_weights(rows, change(loss_norm=norm, max_new=3))
        np.testing.assert_allclose(sum(wi * v.sum() for wi, v in zip(w, x, strict=True)), expected)
    # packed rows: advantage 1.5 x 3 tokens and 3.0 x 1 token -> -2.25, not -1.875
    w = token_weights([sample([3], [4] * 3), sample([3], [4])], change(loss_norm="sequence"))
    np.testing.assert_allclose(-(w[0] * 3 * 1.5 + w[1] * 3.0), -2.25)


def test_masked_and_missing_completions(golden):
    """Truncated ones keep their place in the baseline and among the rows; missing ones neither."""
    g = json.loads((golden / "losses.json").read_text())["mask_truncated"]
    lengths = [sum(m) or len(ids) for m, ids in zip(g["completion_mask"], g["completion_ids"],
                                                    strict=True)]
    stops = ["stop" if g["eos"] in ids or g["pad"] in ids else "length" for ids in
             g["completion_ids"]]
    rows = [sample([3], [4] * n, total=r, stop=stop)
            for n, r, stop in zip(lengths, [1.0, 0, 0, 1.0], stops, strict=True)]
    config = change(mask_truncated=True, loss_norm="token")
    mix = rewards.read_mix("format:1")
    train_grpo.set_advantages([rows], mix, config)
    np.testing.assert_allclose([s.advantage for s in rows], g["advantages"], atol=1e-6)
    assert token_weights(rows, config) == [0, 1 / g["num_items"], 0, 1 / g["num_items"]]
    assert token_weights(rows, change(mask_truncated=True, loss_norm="sequence"))[1] == 1 / 3 / 4
    rows[1].scored = rewards.Scored(None, {"format": None}, {"format": "ValueError: no"})
    train_grpo.set_advantages([rows], mix, config)
    assert rows[1].advantage == 0 and rows[0].advantage > 0 > rows[2].advantage
    assert token_weights(rows, config) == [0, 0, 0, 1 / 2]
    assert token_weights(rows, change(loss_norm="sequence"))[3] == 1 / 2 / 3


# ------------------------------------------------------------------------- layouts of an update


def samples_of(n=16, seed=0, zeros=0):
    """Completions of prompts that four of them share."""
    rng = np.random.default_rng(seed)
    out = []
    for i in range(n):
        if i % 4 == 0:
            prompt = rng.integers(3, 97, rng.integers(1, 9)).tolist()
        ids = rng.integers(3, 97, rng.integers(1, 13))
        out.append(sample(prompt, ids, logps=-rng.random(len(ids)) * 4,
                          advantage=0.0 if i < zeros else rng.normal()))
    return out


def one_each(samples, config):
    """The same update unpacked: one sequence a row, all rows in one micro-batch."""
    weights = token_weights(samples, config)
    rows = [pack([s], [w], config, 1)[0] for s, w in zip(samples, weights, strict=True)]
    return {k: np.stack([r[k].reshape(-1, r[k].shape[-1])[0] for r in rows])[None]
            for k in rows[0]}


def gradient(batch, n_micro, config, devices=1, sharded=False, check_vma=True, on_policy=False,
             base=None):
    mesh = mesh_of(devices)
    trained, fixed = weights_of(config)
    fixed |= {"base": base} if base else {}
    trained, fixed = put((trained, fixed), mesh, partition_specs(CFG, config, sharded))
    f = jax.jit(train_grpo.grads_on_mesh(CFG, config, mesh, sharded, check_vma))
    return jax.device_get(f(trained, fixed, batch, np.int32(n_micro), np.bool(on_policy)))


def off_policy(samples):
    """Old and reference log-probs that are near the sampler's, as a later epoch has them."""

    def fill(batch):
        rng = np.random.default_rng(7)
        by_token = {t: rng.normal() * 0.1 for t in range(97)}  # the same in every layout
        noise = np.vectorize(by_token.get)(batch["tokens"]).astype(np.float32)
        old = (batch["sampler"] + noise) * batch["mask"]
        return batch | {"old": old, "ref": (old - noise / 2) * batch["mask"]}

    return fill


@pytest.mark.parametrize("ratio_level, loss_norm", [
    ("token", "token"), ("sequence", "sequence"), ("sequence-token", "constant"),
    ("geometric", "sequence")])
def test_packed_is_unpacked(ratio_level, loss_norm):
    config = change(ratio_level=ratio_level, loss_norm=loss_norm, kl_coef=0.1, kl_unbiased=True,
                    is_cap=2.0, clip_low=2.0, clip_high=4.0, entropy_coef=0.1,
                    is_level="token" if loss_norm == "token" else "sequence",
                    off_policy_mask=1.0 if loss_norm == "sequence" else 0.0)
    samples = samples_of()
    fill = off_policy(samples)
    packed, n, spans = pack(samples, token_weights(samples, config), config, 1)
    assert packed["segments"].max() > 1 and len(spans) == 16 and n < packed["tokens"].shape[0]
    got = gradient(fill(packed), n, config)
    close(got, gradient(fill(one_each(samples, config)), 1, config))
    assert got[1]["kl"] > 0 and np.abs(got[1]["loss"]) > 0


@functools.lru_cache(maxsize=1)
def on_one_device(config):
    """(gradient, metrics) of the sixteen samples."""
    samples = samples_of()
    batch, n, _ = pack(samples, token_weights(samples, config), config, 1)
    return gradient(off_policy(samples)(batch), n, config)


@pytest.mark.smoke
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rank,sharded", [(4, False), (4, True), (0, False), (0, True)])
def test_eight_devices_change_no_gradient(rank, sharded, check_vma):
    config = change(lora_rank=rank, kl_coef=0.1, entropy_coef=0.1)
    samples = samples_of()
    batch, n, _ = pack(samples, token_weights(samples, config), config, 8)
    found = gradient(off_policy(samples)(batch), n, config, 8, sharded, check_vma)
    close(found, on_one_device(config), 2e-5)


@pytest.mark.parametrize("rank", [4, 0])
def test_a_step_of_a_sharded_base_is_that_of_a_replicated_one(rank):
    config, samples = change(lora_rank=rank, kl_coef=0.1), samples_of()
    batch, n, _ = pack(samples, token_weights(samples, config), config, 8)
    check_sharded_step(CFG, config, train_grpo.make_steps, partition_specs, *weights_of(config),
                       off_policy(samples)(batch), np.int32(n), np.bool(False),
                       np.float32(1e-3))


def test_a_varying_number_of_micro_batches_compiles_nothing_new():
    mesh = mesh_of(8)
    trained, fixed = weights_of(CONFIG)
    f = jax.jit(train_grpo.grads_on_mesh(CFG, CONFIG, mesh, False))
    counts = set()
    for n in (0, 1, 5, 16):
        samples = samples_of(n)
        batch, n_micro, _ = pack(samples, token_weights(samples, CONFIG), CONFIG, 8)
        g, metrics, _ = f(trained, fixed, batch, np.int32(n_micro), np.bool(True))
        counts.add(n_micro)
        assert all(np.isfinite(x).all() for x in jax.tree.leaves((g, metrics)))
    assert len(counts) > 1 and f._cache_size() == 1


def test_what_has_no_gradient_is_not_computed():
    samples = samples_of(zeros=9)
    config = change(kl_coef=0.0)
    everything = [dataclasses.replace(s, advantage=s.advantage or 1e-30) for s in samples]
    out = []
    for rows in (samples, everything):
        batch, n, spans = pack(rows, token_weights(rows, config), config, 1)
        out.append((gradient(batch, n, config, on_policy=True), len(spans), n))
    (less, n_less, micro_less), (more, n_more, micro_more) = out
    assert (n_less, n_more) == (7, 16) and micro_less < micro_more
    for x, y in zip(jax.tree.leaves(less[0]), jax.tree.leaves(more[0]), strict=True):
        np.testing.assert_allclose(x, y, atol=1e-5 * np.abs(y).max(), rtol=0)
    with_kl = change(kl_coef=0.1)
    assert len(pack(samples, token_weights(samples, with_kl), with_kl, 1)[2]) == 16


@pytest.mark.parametrize("n_devices", [1, 8])
def test_packing_wastes_little_and_never_overflows(n_devices):
    """Under 10 % padding for lengths as GSM8K's; every shape of lengths fits the fixed arrays."""
    rng = np.random.default_rng(0)
    config = change(prompts=32, group=8, max_prompt=256, max_new=768, pack_length=2048)
    lengths = {
        "long tail": np.minimum(768, rng.lognormal(5.2, 0.5, 256).astype(int) + 1),
        "all full": np.full(256, 768), "all short": np.full(256, 1),
        "just over a third": np.full(256, 683 - 256), "no prompt is shared": np.full(256, 768),
    }
    for name, sizes in lengths.items():
        each = 1 if name == "no prompt is shared" else 8
        n_prompt = rng.integers(60, 257, 32) if name == "long tail" else np.full(256 // each, 256)
        rows = [sample([3 + i // each] * n_prompt[i // each], [4] * n, advantage=1.0)
                for i, n in enumerate(sizes)]
        batch, n_micro, spans = pack(rows, token_weights(rows, config), config, n_devices)
        used = batch["segments"][:n_micro]
        assert len(spans) == 256 and not batch["segments"][n_micro:].any()
        assert batch["mask"].sum() == sizes.sum()
        apart = sizes.sum() + each * n_prompt.sum()
        if name == "long tail":
            assert (used == 0).mean() < 0.1 and (used > 0).sum() < 0.7 * apart
        else:
            assert (used > 0).sum() <= apart


def test_packed_arrays_hold_the_sampled_tokens():
    a = sample([5, 6], [7, 8], logps=[-1, -2], advantage=2.0)
    b = sample([5, 6], [10], logps=[-3], advantage=-1.0)
    c = sample([9], [11], logps=[-4], advantage=3.0)
    batch, n, spans = pack([a, c, b], [0.25, 0.125, 0.5], change(pack_length=20), 1)
    row = {k: v[0, 0, :8].tolist() for k, v in batch.items()}
    assert n == 1 and spans == [(0, 0, slice(2, 4)), (2, 0, slice(4, 5)), (1, 0, slice(6, 7))]
    assert row["tokens"] == [5, 6, 7, 8, 10, 9, 11, 0]
    assert row["segments"] == [1, 1, 2, 2, 3, 4, 5, 0]
    assert row["parents"] == [1, 1, 1, 1, 1, 4, 4, 0]
    assert row["positions"] == [0, 1, 2, 3, 2, 0, 1, 0]
    assert row["source"] == [0, 0, 1, 2, 1, 0, 5, 0]
    assert row["mask"] == [0, 0, 1, 1, 1, 0, 1, 0]
    assert row["advantage"] == [0, 0, 2, 2, -1, 0, 3, 0]
    assert row["sampler"] == [0, 0, -1, -2, -3, 0, -4, 0]
    assert row["weight"] == [0, 0, 0.25, 0.25, 0.5, 0, 0.125, 0]


@pytest.mark.parametrize("inner_epochs, sharded", [(1, False), (2, True)])
def test_one_step_moves_b_and_leaves_base_and_reference_bit_identical(sharded, inner_epochs):
    mesh, config = mesh_of(8), change(dtype="bfloat16", kl_coef=0.1)
    base = gemma.init(CFG, jax.random.key(0), jnp.bfloat16)
    trained, scale = lora.split(new_adapter(CFG, config))
    before = jax.device_get((base, trained))
    state = trained, {"base": base} | scale
    trained, fixed = put(state, mesh, partition_specs(CFG, config, sharded))
    reference = jax.tree.map(jnp.copy, trained)
    train_step, ref_step = train_grpo.make_steps(CFG, config, mesh, sharded)
    opt = optimizer(config).init(trained)
    samples = samples_of()
    batch, n, _ = pack(samples, token_weights(samples, config), config, 8)
    batch["ref"] = first_ref = ref_step(reference, fixed, batch, np.int32(n))
    for epoch in range(2 * inner_epochs):  # A has no gradient until B has moved
        trained, opt, metrics, logp = train_step(
            trained, opt, fixed, batch, np.int32(n), np.bool(epoch % inner_epochs == 0),
            np.float32(1e-3),
        )
        if epoch == 0:  # B is zero: the policy is the reference, and its own forward says so
            np.testing.assert_array_equal(logp, batch["ref"])
            assert float(metrics["kl"]) == 0 and float(metrics["clip_ratio/region_mean"]) == 0
        if epoch % inner_epochs == 0:
            batch["old"] = logp
    assert float(metrics["grad_norm"]) > 0 and float(metrics["kl"]) > 0
    for x, y in zip(jax.tree.leaves(before[0]), jax.tree.leaves(fixed["base"]), strict=True):
        np.testing.assert_array_equal(x, y)
    for x, y in zip(jax.tree.leaves(before[1]), jax.tree.leaves(reference), strict=True):
        np.testing.assert_array_equal(x, y)
    np.testing.assert_array_equal(ref_step(reference, fixed, batch, np.int32(n)), first_ref)
    for part in "ab":
        for name, x in trained[part].items():
            assert x.dtype == jnp.float32 and (np.asarray(x) != before[1][part][name]).any(), name


def test_temperature_and_softcap_are_in_the_trainers_log_probs():
    """Equal to whole logits, capped and then divided by the temperature."""
    cfg = dataclasses.replace(CFG, final_logit_softcapping=5.0)
    config = change(temperature=0.7)
    trained, fixed = weights_of(config)
    samples = samples_of(4)
    batch, n, spans = pack(samples, token_weights(samples, config), config, 1)
    b = {k: v[0] for k, v in batch.items()}
    logp, entropy = train_grpo.token_logps(trained, fixed, b, cfg, config, None)
    for i, r, span in [s for s in spans if s[1] == 0]:
        ids = np.array([*samples[i].problem.prompt, *samples[i].rollout.ids])[None]
        z = gemma.logits(fixed["base"], cfg, ids, lora=trained | {"scale": fixed["scale"]})
        z = jax.nn.log_softmax(z[0, :-1] / 0.7)[-len(samples[i].rollout.ids) :]
        expected = np.take_along_axis(np.asarray(z), samples[i].rollout.ids[:, None], 1)[:, 0]
        np.testing.assert_allclose(logp[r, span], expected, atol=2e-5)
        np.testing.assert_allclose(entropy[r, span], -(np.exp(z) * z).sum(-1), atol=2e-5)


@pytest.mark.parametrize("inner_epochs, kl_coef", [(1, 0.0), (2, 0.1)])
def test_no_forward_pass_is_made_twice(small, tmp_path, monkeypatch, capsys, told, inner_epochs,
                                       kl_coef):
    """mu updates a step, the first of them on-policy, and a reference pass only for the KL term."""
    calls, passes = [], []
    real = gemma.hidden
    monkeypatch.setattr(gemma, "hidden", lambda *a, **k: passes.append(1) or real(*a, **k))
    config = change(kl_coef=kl_coef)
    trained, fixed = weights_of(config)
    batch, _, _ = pack(samples_of(), [0.1] * 16, config, 1)
    micro = {k: jnp.asarray(v[0]) for k, v in batch.items()} | {"on_policy": True}
    jax.eval_shape(jax.grad(lambda t: train_grpo.loss(t, fixed, micro, CFG, config, None)[0]),
                   trained)
    assert len(passes) == 1  # with its gradient

    def make_steps(*_):
        def train_step(trained, opt, fixed, batch, n, on_policy, lr):
            calls.append("first" if on_policy else "later")
            assert on_policy or batch["old"] is left[-1]
            left.append(batch["sampler"] + len(calls))
            return trained, opt, {"loss": np.float32(0), "grad_norm": np.float32(1)}, left[-1]

        left = []
        return train_step, lambda *_: calls.append("reference") or jnp.zeros(())

    monkeypatch.setattr(train_grpo, "make_steps", make_steps)
    rows = "".join(f'{{"question": "1 + {i}?", "answer": "{i + 1}"}}\n' for i in range(9))
    (tmp_path / "rows.jsonl").write_text(rows)
    (tmp_path / "own.py").write_text(
        "def score(completion, row):\n    return sum(map(ord, completion)) % 97\n")
    train_grpo.main(train_grpo.Config(
        weights=str(small), out=str(tmp_path / "run"), data=str(tmp_path / "rows.jsonl"), steps=2,
        group=2, prompts=2, max_prompt=24, max_new=8, pack_length=40, slots=1,
        rewards="score", reward_file=str(tmp_path / "own.py:score"),
        inner_epochs=inner_epochs, kl_coef=kl_coef, eval_every=0, eval_rows=1, max_drift=99.0,
        report_to="tensorboard",
    ))
    step = ["reference"] * (kl_coef > 0) + ["first"] + ["later"] * (inner_epochs - 1)
    assert calls == step * 2 and told == [1, 2, 2, "closed"]
    assert "--group 2 with --scale group: every advantage is 0.71" in capsys.readouterr().err


# ------------------------------------------------------------------------------------- prompts


def problems_of(difficulties):
    return [dataclasses.replace(sample([3], [4]).problem, id=str(i), fields={"difficulty": d})
            for i, d in enumerate(difficulties)]


@pytest.mark.parametrize("fields, named", [
    ({"sapo": True}, "--sapo"), ({"clip_low": 0.1, "dual_clip": 3.0}, "--clip-low and --dual-clip"),
    ({}, ""), ({"clip_low": 0.1, "inner_epochs": 2}, "")])
def test_limits_of_a_ratio_that_is_always_1_are_named(capsys, fields, named):
    train_grpo.resolve(train_grpo.Config(**fields))
    said = capsys.readouterr().err
    assert said.startswith(f"--inner-epochs 1 leaves {named} without effect") if named else not said


def test_a_billion_weights_on_a_cpu_are_said_loudly(capsys):
    stage.warn_of_cpu(gemma.CONFIGS["gemma3-270m"], gemma.all_devices())
    assert not capsys.readouterr().err
    stage.warn_of_cpu(gemma.CONFIGS["gemma3-1b"], gemma.all_devices())
    said = capsys.readouterr().err
    assert said.startswith("WARNING: 1.0 billion weights on a CPU") and "TPU v5e-8" in said


def test_prompts_are_a_function_of_what_was_drawn():
    prompts = Order(problems_of([1] * 10), "", seed=3)
    flat = prompts.take(0, 25, 0.0)
    assert flat == sum((prompts.take(i, 5, 0.0) for i in range(0, 25, 5)), [])
    assert sorted(flat[:10]) == list(range(10)) == sorted(flat[10:20]) != flat[:10]
    assert flat[:10] != flat[10:20] and flat != Order(problems_of([1] * 10), "", 4).take(0, 25, 0)


def test_curriculum():
    problems = problems_of([3, 1, 2] * 20)
    phases = Order(problems, "0:1,0.5:1-2,0.8:3", 0)
    of = lambda p: {problems[i].fields["difficulty"] for i in phases.take(0, 30, p)}
    assert (of(0.0), of(0.49), of(0.5), of(0.9)) == ({1}, {1}, {1, 2}, {3})
    ordered = Order(problems, "ordered", 0)
    walk = [problems[i].fields["difficulty"] for p in np.linspace(0, 1, 10)
            for i in ordered.take(0, 6, p)]
    assert walk == sorted(walk) and set(walk) == {1, 2, 3}
    late = ordered.take(0, 6, 0.95) + ordered.take(6, 6, 0.95, in_step=6)  # --resample's as well
    assert {problems[i].fields["difficulty"] for i in late} == {3} and len({*late}) == 12
    for wrong, why in (("0.2:1", "start at 0"), ("0:9", "no problem"), ("x", "expected ordered"),
                       ("0:1,0.9:2,0.5:3", "start at 0")):
        with pytest.raises(ValueError, match=why):
            Order(problems, wrong, 0)
    with pytest.raises(ValueError, match="expected a number as difficulty"):
        Order([sample([3], [4]).problem], "ordered", 0)


def stepping(config, problems, monkeypatch):
    """A Setup whose rollouts score 1 for one completion of a problem of odd number, else 0."""
    calls, mix = [], rewards.read_mix("format:1")

    def sample_groups(sampler, weights, tok, chosen, scorer, config, *, step, first, p, logps):
        calls.append(([int(problem.id) for problem in chosen], first))
        spread = lambda problem, g: float(int(problem.id) % 2 == 1 and g == 0)
        groups = [[sample([3], [4], total=spread(problem, g), group=first + i) for g in range(4)]
                  for i, problem in enumerate(chosen)]
        return groups, {"rollout_s": 1.0, "reward_s": 0.5}

    monkeypatch.setattr(rollouts, "sample_groups", sample_groups)
    model = stage.Model(CFG, None, None, {}, {}, {}, False, None, {})
    order = Order(problems, config.curriculum, 0)
    scorer = types.SimpleNamespace(mix=mix)
    setup = train_grpo.Setup(config, None, model, problems, order, None, scorer, (), None)
    return setup, calls


def test_resampling_replaces_groups_without_spread(monkeypatch):
    setup, calls = stepping(change(prompts=4, resample=3), problems_of([1] * 40), monkeypatch)
    used, seen, times = train_grpo.rollout(setup, train_grpo.State({}, None), 0.0)
    assert len(used) == 4 and all(any(s.advantage for s in g) for g in used)
    assert len(seen) == sum(len(ids) for ids, _ in calls) > 4
    assert times == {"rollout_s": len(calls), "reward_s": len(calls) / 2}
    firsts = np.cumsum([0] + [len(ids) for ids, _ in calls])[:-1].tolist()
    assert [first for _, first in calls] == firsts
    setup, _ = stepping(change(prompts=4), problems_of([1] * 40), monkeypatch)
    used, seen, _ = train_grpo.rollout(setup, train_grpo.State({}, None), 0.0)
    assert len(used) == len(seen) == 4
    summary = rollouts.summarize(seen, setup.scorer.mix)
    assert 0 < summary["frac_reward_zero_std"] < 1 and summary["reward"] > 0


def test_resampling_in_order_takes_new_problems(monkeypatch):
    config = change(prompts=4, resample=3, curriculum="ordered")
    setup, calls = stepping(config, problems_of([0] * 40), monkeypatch)
    train_grpo.rollout(setup, train_grpo.State({}, None), 0.5)
    taken = [i for ids, _ in calls for i in ids]
    assert len(calls) > 1 and len(taken) == len(set(taken))


# ------------------------------------------------------------- the policy's probability (RLPR)


def test_prob_is_the_policys_own_probability_of_the_answer(small):
    """Equal to whole logits of prompt, trace and reference; the same bits on every mesh."""
    tok = data.Tokenizer(small)
    cfg, params = gemma.load(small)
    config = train_grpo.resolve(train_grpo.Config(
        model="tiny", lora_rank=4, prompts=3, group=2, max_prompt=32, max_new=30, pack_length=64,
        slots=2, temperature=0.7, rewards="prob:1,format:0.5"))
    trained, scale = lora.split(live_adapter(cfg))
    fixed = {"base": params} | scale
    rows = [{"question": "1 + 1?", "answer": "2"}, {"question": "Where?", "answer": "in Rome"},
            {"question": "Say hi."}]
    problems = [rollouts.read_problem(row, tok) for row in rows]
    texts = [["<reasoning>so</reasoning>\n<answer>3</answer>", "no tag"],
             ["<reasoning>a</reasoning>\n<ANSWER>\n x <answer>", "<answer>"], ["<answer>hi", ""]]
    starts = [["<reasoning>so</reasoning>\n<answer>", None],
              ["<reasoning>a</reasoning>\n<ANSWER>\n ", "<answer>"]]
    expected = [[], []]
    for problem, befores, out in zip(problems, starts, expected, strict=False):
        for before in befores:
            ids, gold = tok.encode(before or ""), tok.encode(problem.gold)
            whole = np.array([[*problem.prompt, *ids, *gold]])
            z = gemma.logits(params, cfg, whole, lora=trained | {"scale": fixed["scale"]})
            p = jax.nn.softmax(z[0, -len(gold) - 1 : -1] / 0.7)
            out.append(float(p[np.arange(len(gold)), gold].mean()) if before else 0.0)
    found = []
    for n_devices, sharded in ((1, False), (8, False), (8, True)):
        mesh = mesh_of(n_devices)
        weights = put((trained, fixed), mesh, partition_specs(cfg, config, sharded))
        step = train_grpo.make_steps(cfg, config, mesh, sharded)[1]
        found.append(rollouts.answer_probs(problems, texts, tok, config, mesh,
                                           functools.partial(step, *weights)))
    assert found[0] == found[1]
    np.testing.assert_allclose(found[2][:2], found[0][:2], rtol=1e-5)
    np.testing.assert_allclose(found[0][:2], expected, rtol=1e-4)
    assert min(found[0][0][0], *found[0][1]) > 0 and found[0][2] == [None, None]
    long = [["<reasoning>" + "so " * 30 + "</reasoning><answer>"] * 2, *texts[1:]]
    assert rollouts.answer_probs(problems, long, tok, config, mesh,
                                 functools.partial(step, *weights))[0] == [0.0, 0.0]


def test_prob_is_a_reward_among_others(small, tmp_path):
    """In a run, with rows that it does not apply to; another script refuses it at once."""
    (tmp_path / "rows.jsonl").write_text(
        '{"question": "1 + 1?", "answer": "2"}\n{"question": "Say hi."}\n')
    (tmp_path / "own.py").write_text(
        "def tagged(completion, row):\n    return float(len(completion) % 5)\n")
    train_grpo.main(train_grpo.Config(
        weights=str(small), out=str(tmp_path / "run"), data=str(tmp_path / "rows.jsonl"), steps=1,
        eval_data=str(tmp_path / "rows.jsonl"), group=2, prompts=2, max_prompt=24, max_new=8,
        pack_length=40, slots=2, rewards="prob:2,tagged:0.1", eval_every=0, max_drift=99.0,
        reward_file=str(tmp_path / "own.py:tagged")))
    samples = lines(tmp_path / "run/samples.jsonl")
    with_answer = [s for s in samples if s["prompt"] == "1 + 1?"]
    assert len(with_answer) == 2 and len(samples) == 4
    for s in samples:
        parts = s["rewards"]
        assert ("prob" in parts) == (s in with_answer) and not s["errors"]
        assert s["reward"] == pytest.approx(2 * parts.get("prob", 0) + 0.1 * parts["tagged"])
    with pytest.raises(ValueError, match="--rewards prob: .*train_grpo"):
        rollouts.check_rewards(change(rewards="prob:1"))


# --------------------------------------------------------------------------------- whole runs

OWN = '''
def score(completion, row):
    """Fails in every way a reward can, for about one completion in four."""
    n = sum(map(ord, completion)) + len(row["question"])
    if n % 16 == 0:
        raise ValueError("no luck")
    if n % 16 == 1:
        return float("nan")
    if n % 16 == 2:
        return None
    return (n % 7) / 7
'''


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run on the tiny model from an adapter on: its folder, and what it printed."""
    folder = tmp_path_factory.mktemp("grpo")
    (folder / "own.py").write_text(OWN)
    cfg = gemma.read_config(ROOT / "tiny")
    start = live_adapter(cfg)
    lora.save(folder / "start", start | {"b": {k: 0.01 * b for k, b in start["b"].items()}}, cfg)
    with contextlib.redirect_stderr(io.StringIO()) as said:
        train_grpo.main(train_grpo.Config(
            out=str(folder / "run"), adapter=str(folder / "start"), steps=4, prompts=3, group=4,
            max_new=40, rows=40, slots=1, lora_rank=4, kl_coef=0.05, is_cap=2.0, resample=1,
            rewards="answer:1,format:0.2,score:0.1", reward_file=str(folder / "own.py:score"),
            curriculum="0:1-2,0.5:1-5", save_every=0, eval_every=2, eval_rows=8))
    return folder / "run", said.getvalue()


def test_what_a_run_leaves(whole):
    out, said = whole
    metrics = lines(out / "metrics.jsonl")
    steps = [m for m in metrics if "reward" in m]
    assert [m["step"] for m in steps] == [1, 2, 3, 4]
    for m in steps:
        for name in ("reward_std", "rewards/answer/mean", "rewards/format/std", "kl", "kl_k1",
                     "kl_k2", "entropy", "frac_reward_zero_std", "completions/mean_length",
                     "completions/clipped_ratio", "clip_ratio/region_mean", "grad_norm",
                     "learning_rate", "num_tokens", "padding", "rollout_s", "reward_s",
                     "reference_s", "update_s", "tokens_per_s"):
            assert isinstance(m[name], float | int), name
        assert 0 < m["sampling/sampling_logp_difference/mean"] < 1e-4
        assert m["sampling/sampling_logp_difference/p99"] < 1e-3
    assert any(m["rewards/score/missing"] > 0 for m in steps)
    assert any("eval_accuracy_low" in m for m in metrics)
    assert "Reward: score" in (out / "report.html").read_text()
    rows = lines(out / "samples.jsonl")
    failed = [r for r in rows if r["errors"]]
    assert failed and all(r["reward"] is None and r["rewards"]["score"] is None for r in failed)
    assert all(r["advantage"] == 0 for r in failed) and any(r["advantage"] for r in rows)
    assert {"no luck" in str(r["errors"]) for r in failed} == {True, False}
    assert said.count("reward ") > 4 and "</reasoning>" in said
    assert steps[0]["kl"] == 0 < steps[1]["kl"]  # the reference is the adapter at the start
    final = json.loads((out / "final/adapter_config.json").read_text())
    assert final["r"] == 4


def test_a_reward_that_never_returns_is_missing(tmp_path):
    """Also where every thread is stuck: the scores behind them in the queue are missing too."""
    (tmp_path / "own.py").write_text(
        "import time\n\ndef score(completion, row):\n"
        "    return 1.0 if completion == 'quick' else time.sleep(600)\n")
    config = change(rewards="score:1", reward_file=str(tmp_path / "own.py:score"),
                    reward_threads=2, reward_timeout=0.5, out=str(tmp_path / "run"))
    began = time.monotonic()
    with rollouts.Scorer(config, []) as scorer:
        for texts in (["quick", "slow", "slow", "quick"], ["quick"]):
            futures = [scorer.submit(text, {}, (0, i, 4)) for i, text in enumerate(texts)]
            scores = scorer.collect(futures)
            assert [s.total for s in scores[:1]] == [1.0]
    assert [s.total for s in scores] == [1.0] and time.monotonic() - began < 20
    slow = rollouts.Scorer(config, [])
    one, = slow.collect([slow.submit("slow", {}, (0, 0, 1))])
    assert one.total is None and "--reward-timeout" in one.errors["total"]
    assert "1 of 1 completions have no reward" in slow.trouble([one])


def test_drift_between_sampler_and_trainer_stops_the_run():
    name = "sampling/sampling_logp_difference/mean"
    rows = [sample([5, 6], [7, 8], logps=[-1, -2], advantage=2.0)]
    batch, _, spans = pack(rows, [1.0], CONFIG, 1)
    logp_RT = batch["sampler"][0] + batch["mask"][0] * 0.25
    assert rollouts.drift(rows, spans, logp_RT)[name] == 0.25
    run = types.SimpleNamespace(log=lambda *_: None, log_samples=lambda *_: None)
    mix = rewards.read_mix("format:1")
    scorer = types.SimpleNamespace(config=change(show=0), mix=mix, stats=dict)
    rollouts.log_step(run, scorer, 3, [rows], {name: 0.4})
    with pytest.raises(SystemExit, match="step 3.*--max-drift"):
        rollouts.log_step(run, scorer, 3, [rows], {name: 0.6})


def test_a_resumed_run_knows_its_rows_files_rewards_and_judge_again(tmp_path):
    """Each is a fact of config.json that names the file; each content gives another checksum."""
    reward, judge = tmp_path / "my.py", tmp_path / "judge"
    judge.mkdir()
    config = train_grpo.Config(data="rows.jsonl", reward_file=str(reward), judge=str(judge))
    model = stage.Model(CFG, None, None, {}, {}, {}, False, None, {"checksum of w": "1"})
    problem = lambda text: Problem("id", (), "", "1", "number", (), "", fields={"rubric": text})

    def facts(rows="a", held="b", code="def short(c, row): return 1", weights=b"w") -> dict:
        reward.write_text(code)
        (judge / "model.safetensors").write_bytes(weights)
        return stage.facts(config, model, [[problem(rows)]], [problem(held)])

    first = facts()
    for change, name in (
        ({"rows": "c"}, "checksum of the rows of --data rows.jsonl"),
        ({"held": "c"}, "checksum of the held-out rows of rows.jsonl"),
        ({"code": "def short(c, row): return 2"}, "checksum of my.py"),
        ({"weights": b"x"}, "checksum of the judge's model.safetensors"),
    ):
        now = facts(**change)
        assert {k for k in first if now[k] != first[k]} == {name}
    assert first["checksum of w"] == "1" and facts() == first and len(first) == 5
