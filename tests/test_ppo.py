"""train_ppo.py: GAE and losses by others' numbers, layouts that change nothing, two adapters."""

import dataclasses
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CFG, close, mesh_of
from jax.sharding import PartitionSpec as P
from test_grpo import samples_of

import gemma
import lora
import stage
import train_ppo
from rollouts import pack
from train_ppo import gae, policy_loss, value_loss, whiten

CONFIG = train_ppo.resolve(train_ppo.Config(
    lora_rank=4, prompts=4, group=4, max_prompt=8, max_new=12, pack_length=32, slots=8, steps=9,
    kl_coef=0.1, value_warmup=1,
))
LOSS = {"policy": train_ppo.policy_part, "critic": train_ppo.critic_part}


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


# ------------------------------------------------------------------------------- others' numbers

REWARDS = [[-0.59, 0.63, 1.04, 1.03, 1.82], [-0.39, 0.54, -0.37, -1.42, -0.7],
           [0.14, -0.92, -0.19, 1.12, 0.57]]
VALUES = [[0.57, 0.35, -0.18, -1.87, 0.99], [-1.51, 0.22, -0.11, 0.14, 0.25],
          [-0.33, 0.9, -1.29, 0.79, -1.69]]
MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 1, 0, 1, 0]])


def test_gae_is_the_sum_of_its_definition():
    """A_t = sum over k of (gamma lam)^k delta_t+k, each row on its own, in float64."""
    rng = np.random.default_rng(0)
    rewards, values = rng.normal(size=(2, 6, 9))
    lengths = np.array([9, 1, 4, 9, 2, 7])
    mask = np.arange(9) < lengths[:, None]
    for gamma, lam in ((1.0, 1.0), (1.0, 0.95), (0.9, 0.7), (0.99, 0.0)):
        advantages, returns = gae(rewards, values, mask, gamma, lam)
        for r, v, a, g, n in zip(rewards, values, advantages, returns, lengths, strict=True):
            delta = r[:n] + gamma * np.append(v[1:n], 0.0) - v[:n]
            expected = [sum((gamma * lam) ** (k - t) * delta[k] for k in range(t, n))
                        for t in range(n)]
            np.testing.assert_allclose(a[:n], expected, rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(g[:n], a[:n] + v[:n], rtol=1e-12, atol=1e-12)
        assert not advantages[~mask].any() and not returns[~mask].any()
    worked = gae([[0, 0, 1.0]], [[0.2, 0.5, 0.6]], np.ones((1, 3)), 1.0, 1.0)
    np.testing.assert_allclose(worked, [[[0.8, 0.5, 0.4]], [[1, 1, 1]]])


def test_returns_are_tianshous():
    """test_episodic_returns of thu-ml/tianshou 4d2499b, test/base/test_returns.py."""
    rewards = [[101, 102, 103, 200], [104, 105, 106, 201], [107, 108, 109, 202]]
    values = [[-3, 2, 3, 4], [-1, 5, 6, 7], [-2, 8, 9, 10]]  # there: those of the next states
    advantages, returns = gae(rewards, values, np.ones((3, 4)), 0.99, 0.95)
    expected = np.array([[454.8344, 376.1143, 291.298, 200], [464.5610, 383.1085, 295.387, 201],
                         [474.2876, 390.1027, 299.476, 202]])
    np.testing.assert_allclose(returns, expected, atol=1e-4)
    np.testing.assert_allclose(advantages, expected - values, atol=1e-4)
    _, returns = gae([[7, 6, 0], [1, 2, 0], [3, 4, 5]], np.zeros((3, 3)),
                     [[1, 1, 0], [1, 1, 0], [1, 1, 1]], 0.1, 1.0)
    np.testing.assert_allclose(returns, [[7.6, 6, 0], [1.2, 2, 0], [3.45, 4.5, 5]])


def test_gae_and_whitening_are_tunix():
    """compute_gae_advantages of google/tunix c7d8950 (2026-08-21), gamma 0.9, lambda 0.8."""
    advantages, returns = gae(REWARDS, VALUES, MASK, 0.9, 0.8)
    whitened = [[-0.293652, 0.658601, 1.085327, 2.218488, -0.165036],
                [0.178123, -0.698325, -0.89511, 0, 0], [-0.283863, -1.304621, 0, -0.499932, 0]]
    np.testing.assert_allclose(whiten(advantages, MASK), whitened, atol=2e-6)
    np.testing.assert_allclose(returns, [
        [1.207977, 2.40969, 2.516792, 2.5186, 1.82], [-0.167664, 0.2538, -0.37, 0, 0],
        [0.322592, 0.0286, 0, 1.12, 0]], atol=2e-6)


LOGP = [[-1.19, -0.51, -0.37, -1.51], [-2.16, -0.31, -0.57, -0.9]]
OLD = [[-0.51, -2.11, -0.11, -1.46], [-2.03, -0.27, -0.07, -0.82]]
ADVANTAGE = [[0.67, -1.5, 1.17, -0.34], [-0.1, 0.73, -0.64, -1.83]]
NEW = [[-1.01, 0.54, -0.21, -0.36], [0.75, -1.05, 2.26, 0.02]]
BEFORE = [[-1.11, 1.15, -0.54, -0.51], [0.72, -1.34, 2.16, 0.19]]
TARGET = [[0.17, -0.05, 0.99, 1.89], [1.56, -2.09, 1.37, 0.78]]
KEPT = np.array([[1, 1, 1, 1], [1, 1, 1, 0]], np.float32)


@pytest.mark.parametrize("dual_clip, loss, second", [(0.0, 0.915691, 1.061364),
                                                     (3.0, 0.497184, 0.0)])
def test_policy_loss_is_tunix(dual_clip, loss, second):
    """ppo_policy_loss_fn of google/tunix c7d8950, epsilon 0.2; the first is TRL 1.9's PPO too."""
    x = [jnp.asarray(v, jnp.float32) for v in (LOGP, OLD, ADVANTAGE, KEPT)]
    g = jax.grad(lambda logp: policy_loss(logp, *x[1:], 0.2, 0.2, dual_clip)[0])(x[0])
    total, count, metrics = policy_loss(*x, 0.2, 0.2, dual_clip)
    clipped = metrics["clip_ratio/region_mean"]
    np.testing.assert_allclose([total / count, clipped / count], [loss, 0.142857], atol=1e-6)
    np.testing.assert_allclose(g / count, [[-0.04849, second, -0.128876, 0.046203],
                                           [0.012544, -0.100197, 0, 0]], atol=1e-6)
    if dual_clip:
        np.testing.assert_allclose(metrics["clip_ratio/dual_mean"] / count, 0.142857, atol=1e-6)


def test_both_ends_of_the_ratio_are_clipped():
    """Ratio 1.25, advantage 2 -> -2.4 and no gradient, or -2.5; ratio 0.5, advantage -2 -> 1.6."""
    one = lambda x: jnp.full((1, 1), x, jnp.float32)
    for ratio, advantage, high, expected, slope in (
        (1.25, 2.0, 0.2, -2.4, 0.0), (1.25, 2.0, 0.28, -2.5, -2.5), (0.5, -2.0, 0.28, 1.6, 0.0),
        (0.5, 2.0, 0.2, -1.0, -1.0),
    ):
        f = lambda x, a=advantage, h=high: policy_loss(x, one(0.0), one(a), one(1.0), 0.2, h)[0]
        loss, g = jax.value_and_grad(f)(one(np.log(ratio)))
        np.testing.assert_allclose([loss, g[0, 0]], [expected, slope], atol=1e-6)


def test_value_loss_is_tunix():
    """ppo_value_loss_fn of google/tunix c7d8950 clipped at 0.2; TRL 1.9's is the same."""
    new, old, target, mask = (jnp.asarray(v, jnp.float32) for v in (NEW, BEFORE, TARGET, KEPT))
    total, count, metrics = value_loss(new, old, target, mask, 0.2)
    g = jax.grad(lambda v: value_loss(v, old, target, mask, 0.2)[0])(new)
    np.testing.assert_allclose([total / count, metrics["value_clip_ratio"] / count],
                               [0.839543, 0.285714], atol=1e-6)
    np.testing.assert_allclose(g / count, [[-0.168571, 0, 0, -0.321429],
                                           [-0.115714, 0.148571, 0.127143, 0]], atol=1e-6)
    plain, _, metrics = value_loss(new, old, target, mask, 0.0)
    np.testing.assert_allclose(plain, 0.5 * np.sum(mask * (new - target) ** 2), rtol=1e-6)
    assert metrics["value_clip_ratio"] == 0


def test_masked_tokens_have_no_gradient_whatever_they_hold():
    rng = np.random.default_rng(1)
    mask = jnp.asarray(rng.integers(0, 2, (4, 6)), jnp.float32)
    x, old, target = (jnp.asarray(rng.normal(size=(4, 6)) + 1e5 * (1 - mask)) for _ in range(3))
    for loss in (policy_loss, value_loss):
        g = jax.grad(lambda x, loss=loss: loss(x, old, target, mask)[0])(x)
        assert (np.asarray(g)[mask == 0] == 0).all() and (np.asarray(g)[mask > 0] != 0).any()
        blank = [jnp.where(mask > 0, z, 0.0) for z in (x, old, target)]
        np.testing.assert_allclose(loss(x, old, target, mask)[0], loss(*blank, mask)[0], rtol=1e-5)


# -------------------------------------------------------------------------- layouts of an update


def rewarded(**more):
    """Sixteen completions of four prompts, of which two have no reward."""
    samples = samples_of(**more)
    for i, s in enumerate(samples):
        s.advantage = 0.0
        s.scored = s.scored._replace(total=None if i in (3, 9) else (i % 5) / 4)
    return samples


def there(samples):
    return [float(s.scored.total is not None) for s in samples]


def start(config, seed=0):
    """(trained, fixed) of two different adapters and a head that is not zero."""
    noise = lambda x, n: x + 0.1 * jax.random.normal(jax.random.key(seed + n), x.shape)
    trained, scale = lora.split(stage.new_adapter(CFG, config))
    trained = train_ppo.start_of(trained, CFG, config)["trained"]
    trained = {part: jax.tree.map(partial(noise, n=n), trained[part])
               for n, part in enumerate(LOSS)}
    return trained, {"base": gemma.init(CFG, jax.random.key(seed), jnp.dtype(config.dtype))} | scale


def filled(batch):
    """What an update knows of each token, the same in every layout."""
    by_token = np.random.default_rng(7).normal(size=(5, 97)).astype(np.float32)
    old, value, ref, advantage, target = (x[batch["tokens"]] * batch["mask"] for x in by_token)
    old = batch["sampler"] + 0.1 * old
    more = {"old": old, "ref": old + 0.1 * ref, "value": value, "advantage": advantage,
            "return": target}
    return batch | {k: v * batch["mask"] for k, v in more.items()}


def one_each(samples):
    """The same update unpacked: one completion a row, all rows in one micro-batch."""
    rows = [pack([s], [1.0], CONFIG, 1, True)[0] for s in samples if s.scored.total is not None]
    return {k: np.stack([r[k].reshape(-1, r[k].shape[-1])[0] for r in rows])[None] for k in rows[0]}


def gradient(part, batch, chosen, config, devices=1, sharded=False, check_vma=True):
    mesh = mesh_of(devices)
    trained, fixed = start(config)
    fixed = stage.put(fixed, mesh, stage.partition_specs(CFG, config, sharded)[1])
    f = jax.jit(train_ppo.on_mesh(partial(train_ppo.grads, loss=LOSS[part]), P(), CFG, config, mesh,
                                  sharded, check_vma))
    padded = np.zeros(len(batch["mask"]), np.int32)
    padded[: len(chosen)] = chosen
    return jax.device_get(f(trained[part], fixed, filled(batch), (padded, np.int32(len(chosen)))))


LOSSES = dict(kl_in="loss", dual_clip=3.0)


@pytest.mark.parametrize("part", LOSS)
def test_packed_is_unpacked_and_minibatches_add_up(part):
    config, samples = change(**LOSSES), rewarded()
    packed, n, spans = pack(samples, there(samples), config, 1, True)
    assert packed["segments"].max() > 3 and len(spans) == 14 and n < len(packed["mask"])
    whole = gradient(part, packed, range(n), config)
    close(whole, gradient(part, one_each(samples), [0], config), 2e-5)
    parts = [[1, 4], [i for i in reversed(range(n)) if i not in (1, 4)]]
    share = [packed["mask"][p].sum() / packed["mask"].sum() for p in parts]
    each = [gradient(part, packed, p, config) for p in parts]
    close(jax.tree.map(lambda x, y: share[0] * x + share[1] * y, *each), whole, 2e-5)


@pytest.mark.parametrize("sharded, check_vma", [(False, True), (False, False), (True, True)])
@pytest.mark.parametrize("part", LOSS)
def test_eight_devices_change_no_gradient(part, sharded, check_vma):
    config, samples = change(**LOSSES), rewarded()
    one, n_one, _ = pack(samples, there(samples), config, 1, True)
    all_, n_all, _ = pack(samples, there(samples), config, 8, True)
    assert n_one > n_all >= 1
    close(gradient(part, all_, range(n_all), config, 8, sharded, check_vma),
          gradient(part, one, range(n_one), config), 2e-5)


# ---------------------------------------------------------------------------- advantages in rows


def test_advantages_stay_inside_their_completions():
    """Of packed rows they are those of each completion alone, with the KL term as a reward."""
    config, samples = change(kl_coef=0.5, lam=0.9, gamma=0.95, whiten=False), rewarded()
    batch, _, spans = pack(samples, there(samples), config, 1, True)
    batch = filled(batch)
    flat = {k: batch[k].reshape(-1, config.pack_length) for k in ("old", "ref", "value")}
    targets, metrics = train_ppo.set_advantages(samples, spans, flat, config)
    found = []
    for i, r, span in spans:
        reward = 0.5 * (flat["ref"] - flat["old"])[r, span].astype(np.float64)
        reward[-1] += samples[i].scored.total
        a, g = gae(reward[None], flat["value"][r, span][None], np.ones((1, len(reward))), 0.95, 0.9)
        np.testing.assert_allclose(targets["advantage"][r, span], a[0], rtol=1e-6)
        np.testing.assert_allclose(targets["return"][r, span], g[0], rtol=1e-6)
        np.testing.assert_allclose(samples[i].advantage, a.mean())
        found.append((a[0], g[0]))
    a, g = (np.concatenate(x) for x in zip(*found, strict=True))
    np.testing.assert_allclose(metrics["explained_variance"], 1 - a.var() / g.var())
    assert not targets["advantage"][batch["mask"].reshape(targets["advantage"].shape) == 0].any()
    assert samples[3].advantage == samples[9].advantage == 0
    targets, _ = train_ppo.set_advantages(samples, spans, flat, change(kl_coef=0.0))
    seen = targets["advantage"][batch["mask"].reshape(targets["advantage"].shape) > 0]
    np.testing.assert_allclose([seen.mean(), seen.std(ddof=1)], [0, 1], atol=1e-6)


# ------------------------------------------------------------------------------------ one update


@pytest.fixture(scope="module")
def stepping():
    """update() on eight devices, base in bfloat16; (trained, base) before; the metrics of steps."""
    config, mesh = change(dtype="bfloat16", minibatches=2, kl_in="loss"), mesh_of(8)
    steps = train_ppo.make_steps(CFG, config, mesh, False)
    policy, scale = lora.split(stage.new_adapter(CFG, config))
    fixed = {"base": gemma.init(CFG, jax.random.key(0), jnp.bfloat16)} | scale
    fixed = stage.put(fixed, mesh, P())
    arrays = jax.device_get(train_ppo.start_of(policy, CFG, config))
    reference = stage.put(arrays["trained"]["policy"], mesh, P())

    def run(samples, step=0, before=arrays):
        state = train_ppo.State(stage.put(before, mesh, P()), step)
        state, metrics, _ = train_ppo.update(config, mesh, fixed, steps, reference, state, samples,
                                             0.5)
        return jax.device_get(state.arrays), metrics

    return run, arrays, fixed


def same(a, b):
    return [bool((np.asarray(x) == y).all()) for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b),
                                                            strict=True)]


def test_warm_up_moves_the_critic_alone_and_no_step_moves_the_base(stepping):
    run, before, fixed = stepping
    base = jax.device_get(fixed["base"])
    after, metrics = run(rewarded())
    for tree in ("trained", "opt"):
        assert all(same(after[tree]["policy"], before[tree]["policy"]))
    head = after["trained"]["critic"]
    assert (head["head"] != 0).all() and head["bias"] != 0 and "policy_loss" not in metrics
    for step in (1, 2, 3):
        after, metrics = run(rewarded(), step, after)
    trained = after["trained"]
    assert not any(same(trained["policy"], before["trained"]["policy"]))
    assert not any(same(trained["critic"], before["trained"]["critic"]))
    assert all(x.dtype == jnp.float32 for x in jax.tree.leaves(trained))
    assert all(same(fixed["base"], base))
    for name in ("loss", "policy_loss", "value_loss", "explained_variance", "kl", "kl_k1",
                 "entropy", "approx_kl", "clip_ratio/region_mean", "value_clip_ratio", "grad_norm",
                 "value_grad_norm", "learning_rate", "value_lr", "padding", "value_mean"):
        assert np.isfinite(metrics[name]), name
    assert metrics["entropy"] > 0 and metrics["kl"] > 0 and metrics["grad_norm"] > 0


def test_a_missing_reward_is_as_if_its_completion_had_not_been(stepping):
    run, *_ = stepping
    samples = rewarded()
    whole, metrics = run(samples, 5)
    less, fewer = run([s for s in samples if s.scored.total is not None], 5)
    assert all(same(whole, less))
    assert {k: v for k, v in metrics.items() if not k.endswith("_s")} == {
        k: v for k, v in fewer.items() if not k.endswith("_s")}
    none = [dataclasses.replace(s, scored=s.scored._replace(total=None)) for s in samples]
    after, metrics = run(none, 5)
    assert all(same(after, run.__defaults__[1])) and metrics == {"update_s": 0.0}
