"""train_simpo.py: TRL's losses, gradients that no layout changes, and the right reference."""

import dataclasses
import functools
import json
from functools import partial

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CFG, check_sharded_step, close, lines, live_adapter, mesh_of

import data
import gemma
import lora
import packed
import problems
import stage
import train_grpo
import train_simpo

CONFIG = train_simpo.resolve(
    train_simpo.Config(lora_rank=4, max_length=48, batch_rows=8, micro_rows=8, steps=4)
)
LOSSES = tuple(train_simpo.KNOBS)
REFERENCED = ("dpo", "ipo")


def config_of(loss, **knobs):
    """CONFIG with another loss, its knobs filled and overridden."""
    unset = dict.fromkeys(("beta", "gamma_ratio", "label_smoothing", "orpo_lambda"))
    config = dataclasses.replace(CONFIG, loss=loss, **unset)
    return dataclasses.replace(train_simpo.resolve(config), **knobs)


# ------------------------------------------------------------------- losses of given log-probs


def losses(golden) -> dict:
    return json.loads((golden / "losses.json").read_text())


def f32(x):
    return np.asarray(x, np.float32)


def rows_of_pairs(inputs):
    """TRL's [B, T] log-probs and masks as packed rows: each pair in one row, padding kept."""
    logp, mask = (
        np.concatenate([f32(inputs[f"chosen_{k}"]), f32(inputs[f"rejected_{k}"])], axis=1)
        for k in ("token_logps", "mask")
    )
    return logp, mask, np.where(np.arange(logp.shape[1]) < logp.shape[1] // 2, 1, 2) * (mask > 0)


@pytest.mark.smoke
@pytest.mark.parametrize("name", ["dpo", "ipo"])
@pytest.mark.parametrize("garbage", [0.0, -7.0])
def test_dpo_and_ipo_are_trls(golden, name, garbage):
    section = losses(golden)["dpo"]
    case = next(c for c in section["cases"] if c["name"] == {"dpo": "sigmoid"}.get(name, name))
    inputs = section["inputs"]
    config = config_of(name, beta=case["config"]["beta"])
    logp, mask, segments = rows_of_pairs(inputs)
    logp = np.where(mask > 0, logp, np.float32(garbage))
    ref = np.stack([inputs["ref_chosen_logps_sum"], inputs["ref_rejected_logps_sum"]], axis=-1)

    def mean(logp):
        sums = partial(train_simpo.pair_sums, segments_BT=segments)
        total, count, metrics = train_simpo.preference(
            sums(jnp.where(mask > 0, logp, 0.0)), sums(jnp.asarray(mask)), f32(ref)[:, None], config
        )
        return total / count, jax.tree.map(lambda x: x / count, metrics)

    (value, metrics), g = jax.value_and_grad(mean, has_aux=True)(logp)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
    expected = [case[f"grad_{k}_token_logps"] for k in ("chosen", "rejected")]
    np.testing.assert_allclose(g, np.concatenate(expected, axis=1), rtol=1e-6, atol=1e-6)
    expected = case["metrics"]
    np.testing.assert_allclose(metrics["pair_accuracy"], expected["rewards/accuracies"], rtol=1e-6)
    if name == "dpo":  # TRL's rewards of IPO are not what its loss compares
        np.testing.assert_allclose(metrics["margin"], expected["rewards/margins"], atol=1e-6)
    np.testing.assert_allclose(metrics["n_chosen"], 3.0)


def simpo_of(case, **knobs):
    given = case["config"]
    return config_of("simpo", beta=given["beta"],
                     gamma_ratio=given["simpo_gamma"] / given["beta"], **knobs)


@pytest.mark.smoke
@pytest.mark.parametrize("smoothing", [0.0, 0.1])
@pytest.mark.parametrize("length", [1, 5])
def test_simpo_is_trls_on_averages(golden, smoothing, length):
    """With label smoothing against the formula in the file; lengths only divide the sums."""
    section = losses(golden)["simpo"]
    case, inputs = section["cases"][0], section["inputs"]
    config = simpo_of(case, label_smoothing=smoothing)
    mean = np.stack([inputs["chosen_avg_logps"], inputs["rejected_avg_logps"]], axis=-1)
    n = f32([[length, 2 * length]] * len(mean))

    def f(mean):
        total, count, metrics = train_simpo.preference(
            (mean * n)[:, None], n[:, None], None, config
        )
        return total / count, (count, metrics)

    (value, (count, metrics)), g = jax.value_and_grad(f, has_aux=True)(f32(mean))
    z = case["config"]["beta"] * (mean[:, 0] - mean[:, 1]) - case["config"]["simpo_gamma"]
    expected = np.mean((1 - smoothing) * np.logaddexp(0, -z) + smoothing * np.logaddexp(0, z))
    np.testing.assert_allclose(value, expected, rtol=1e-6)
    if smoothing == 0.0:
        np.testing.assert_allclose(value, case["mean"], rtol=1e-6)
        g_expected = np.stack([case["grad_chosen"], case["grad_rejected"]], axis=-1)
    else:
        slope = smoothing - 1 + 1 / (1 + np.exp(-z))  # dL/dz
        g_expected = (case["config"]["beta"] * slope / 3)[:, None] * np.array([1, -1])
    np.testing.assert_allclose(g, g_expected, rtol=1e-6)
    rewards = np.array(case["chosen_rewards"]) - case["rejected_rewards"]
    np.testing.assert_allclose(metrics["margin"], rewards.sum(), rtol=2e-6)
    assert count == 3 and metrics["pair_accuracy"] == (rewards > 0).sum()


@pytest.mark.smoke
def test_simpo_from_logits_is_trls(golden):
    """Logits -> token log-probs -> sums of packed pairs -> loss, and back to the logits."""
    section = losses(golden)["simpo_from_logits"]
    case, inputs = section["cases"][0], section["inputs"]
    config = simpo_of(case)
    pairs = lambda x: np.concatenate([x[:3], x[3:]], axis=1)  # row q: chosen q, rejected q
    ids, labels = np.array(inputs["input_ids"]), np.array(inputs["labels"])
    tokens, mask = pairs(ids), pairs((labels != -100).astype(np.float32))
    segments = pairs(np.where(np.arange(6) < 3, 1, 2)[:, None] * (ids > 0))
    logits = f32(inputs["logits"])

    def f(logits):
        x_BTD = jnp.concatenate([logits[:3], logits[3:]], axis=1)  # with an identity for a head
        logp, _ = gemma.token_logps(x_BTD[:, :-1], jnp.eye(7), tokens[:, 1:])
        sums = partial(train_simpo.pair_sums, segments_BT=segments[:, 1:])
        logp_BQG, n_BQG = sums(logp * mask[:, 1:]), sums(jnp.asarray(mask[:, 1:]))
        total, count, metrics = train_simpo.preference(logp_BQG, n_BQG, None, config)
        return total / count, (logp_BQG / n_BQG, count, metrics)

    (value, (mean, count, metrics)), g = jax.value_and_grad(f, has_aux=True)(logits)
    np.testing.assert_allclose(value, case["loss"], rtol=1e-6)
    real = np.asarray(mean)[:, 0]  # the other slots of a row hold no pair
    np.testing.assert_allclose(real.T.ravel(), case["avg_logps"], rtol=1e-6)
    np.testing.assert_allclose(np.abs(g).sum(), case["grad_logits_sum_abs"], rtol=1e-5)
    np.testing.assert_allclose(g[0, 1], case["grad_logits_row0_pos1"], rtol=1e-6, atol=1e-6)
    expected = case["metrics"]
    for ours, theirs in (("margin", "rewards/margins"), ("logp_chosen", "logps/chosen"),
                         ("logp_rejected", "logps/rejected"),
                         ("pair_accuracy", "rewards/accuracies")):
        np.testing.assert_allclose(metrics[ours] / count, expected[theirs], rtol=1e-6)


def test_orpo_is_its_closed_form():
    """-l_w - λ log σ(log odds_w - log odds_l) in float64; the gradient by finite differences."""
    rng = np.random.default_rng(0)
    n = rng.integers(1, 9, (2, 3, 2)).astype(float)
    sums = -n * rng.uniform(0.01, 4.0, n.shape)
    config = config_of("orpo", orpo_lambda=0.3)

    def closed(sums):
        p = np.exp(sums / n)
        odds = p / (1 - p)
        ratio = np.log(odds[..., 0] / odds[..., 1])
        return np.mean(-(sums / n)[..., 0] - 0.3 * np.log(1 / (1 + np.exp(-ratio))))

    def f(x):
        total, count, _ = train_simpo.preference(x, f32(n), None, config)
        return total / count

    value, g = jax.value_and_grad(f)(f32(sums))
    np.testing.assert_allclose(value, closed(sums), rtol=1e-6)
    expected = np.zeros_like(sums)
    for i in np.ndindex(*sums.shape):
        step = np.zeros_like(sums)
        step[i] = 1e-5
        expected[i] = (closed(sums + step) - closed(sums - step)) / 2e-5
    np.testing.assert_allclose(g, expected, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("loss", LOSSES)
def test_certain_words_and_absent_pairs_leave_all_finite(loss):
    """A log-prob of 0 (ORPO's odds are infinite there), and slots of a row that hold no pair."""
    logp, n = f32([[[0.0, 0.0], [-3.0, 0.0], [0.0, 0.0]]]), f32([[[2, 3], [1, 1], [0, 0]]])
    config, ref = config_of(loss), f32(np.zeros((1, 3, 2))) if loss in REFERENCED else None
    f = lambda x: train_simpo.preference(x, n, ref, config)
    (value, count, metrics), g = f(logp), jax.grad(lambda x: f(x)[0])(logp)
    assert count == 2 and metrics["n_chosen"] == 3 and metrics["n_rejected"] == 4
    assert np.isfinite(value) and np.isfinite(g).all() and (g[0, 2] == 0).all()


# ------------------------------------------------------------------------- gradients of the model


def random_pairs(n, seed=0):
    """n pairs of 8 to 30 tokens: a prompt, and two completions of it."""
    rng = np.random.default_rng(seed)
    draw = lambda low, high: rng.integers(3, 97, rng.integers(low, high)).astype(np.int32)
    pairs = []
    for _ in range(n):
        prompt, completions = draw(2, 7), (draw(2, 9), draw(2, 9))
        mask = lambda c: np.array([0] * len(prompt) + [1] * len(c), np.int8)  # noqa: B023
        pairs.append(packed.Pair(*(
            packed.Example(np.concatenate([prompt, c]), mask(c)) for c in completions)))
    return pairs


PAIRS = random_pairs(24)
PACKED = packed.assemble(packed.fill(PAIRS, 48), 16, 48)


def weights(config):
    """(trained, fixed) with B != 0 and a reference of its own, so that every gradient is alive."""
    params = gemma.init(CFG, jax.random.key(0))
    if not config.lora_rank:
        moved = jax.tree.map(lambda x: x + 0.02 * jax.random.normal(jax.random.key(2), x.shape),
                             params)
        return moved, train_simpo.with_reference(params, {}, config)
    trained, fixed = lora.split(live_adapter(CFG))
    start = trained | {"b": jax.tree.map(jnp.zeros_like, trained["b"])}
    return trained, train_simpo.with_reference(start, {"base": params} | fixed, config)


def gradient(batch, n_micro=1, devices=1, config=CONFIG, sharded=False, check_vma=True):
    """(gradient, metrics) of one update whose rows are laid out as asked."""
    mesh = mesh_of(devices)
    specs, fixed_specs = train_simpo.partition_specs(CFG, config, sharded)
    trained, fixed = weights(config)
    trained = stage.put(trained, mesh, specs)
    fixed = stage.put(fixed, mesh, fixed_specs)
    batch = {k: v.reshape(n_micro, -1, v.shape[-1]) for k, v in batch.items()}
    f = jax.jit(train_simpo.grads_on_mesh(CFG, config, mesh, sharded, check_vma))
    return jax.device_get(f(trained, fixed, batch, jax.random.key(0)))


@functools.cache
def undivided(config):
    """The gradient of PACKED in one piece on one device."""
    return gradient(PACKED, config=config)


@pytest.mark.parametrize("loss", ["simpo", "dpo"])
def test_gradient_is_that_of_the_mean_over_all_pairs(loss):
    """Against whole logits, one sequence a row, for which nothing is packed or chunked."""
    assert (PACKED["segments"].max(1) > 2).any() and (PACKED["segments"].max(1) == 0).any()
    config = config_of(loss)
    trained, fixed = weights(config)
    one = packed.assemble([[e] for pair in PAIRS for e in pair[:2]], 48, 24)
    tokens, mask = one["tokens"], one["mask"][:, 1:].astype(np.float32)

    def sums(adapter):
        live = {k: adapter[k] for k in "ab"} | {"scale": fixed["scale"]}
        logits = gemma.logits(fixed["base"], CFG, tokens, one["segments"], live)
        logp = jax.nn.log_softmax(logits[:, :-1])
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        return (logp * mask).sum(axis=1).reshape(1, -1, 2)

    def mean(trained):
        ref = sums(fixed["reference"]) if loss in REFERENCED else None
        n = jnp.asarray(mask.sum(axis=1).reshape(1, -1, 2))
        total, count, metrics = train_simpo.preference(sums(trained), n, ref, config)
        metrics = {"loss": total} | metrics
        return total / count, {k: x / count for k, x in metrics.items()} | {"n_pairs": count}

    (_, metrics), g = jax.jit(jax.value_and_grad(mean, has_aux=True))(trained)
    assert metrics["n_pairs"] == len(PAIRS)
    close(undivided(config), (g, metrics), 2e-5)


@pytest.mark.parametrize("loss, rank, sharded, check_vma", [
    ("simpo", 4, False, True), ("simpo", 4, False, False), ("dpo", 4, True, False),
    ("ipo", 0, False, False), ("dpo", 0, True, True)])
def test_eight_devices_change_no_gradient(loss, rank, sharded, check_vma):
    config = dataclasses.replace(config_of(loss), lora_rank=rank)
    close(gradient(PACKED, 2, 8, config, sharded, check_vma), undivided(config), 2e-5)


@pytest.mark.parametrize("loss,rank", [("simpo", 4), ("dpo", 0)])
def test_a_step_of_a_sharded_base_is_that_of_a_replicated_one(loss, rank):
    config = dataclasses.replace(config_of(loss), lora_rank=rank)
    batch = {k: v[None] for k, v in PACKED.items()}
    check_sharded_step(CFG, config, train_simpo.make_steps, train_simpo.partition_specs,
                       *weights(config), batch, np.float32(1e-3), jax.random.key(0))


def test_remat_changes_no_gradient():
    config = config_of("dpo")
    layer = dataclasses.replace(config, remat="layer")
    close(gradient(PACKED, config=layer), undivided(config))


@pytest.mark.parametrize("loss,rank,sharded", [("dpo", 4, True), ("ipo", 0, False)])
def test_steps_move_what_is_trained_and_nothing_else(loss, rank, sharded):
    """Some B leaves 0, the base stays bit-identical, and so does the reference."""
    mesh = mesh_of(8)
    config = dataclasses.replace(config_of(loss), lora_rank=rank, dtype="bfloat16")
    base = gemma.init(CFG, jax.random.key(0), jnp.bfloat16 if rank else jnp.float32)
    trained, fixed = base, {}
    if rank:
        trained, scale = lora.split(stage.new_adapter(CFG, config))
        fixed = {"base": base} | scale
    specs, fixed_specs = train_simpo.partition_specs(CFG, config, sharded)
    before = jax.device_get(trained)
    trained = stage.put(trained, mesh, specs)
    fixed = train_simpo.with_reference(trained, fixed, config)
    fixed = stage.put(fixed, mesh, fixed_specs)
    fixed_before = jax.device_get(fixed)
    train_step, _ = train_simpo.make_steps(CFG, config, mesh, sharded)
    opt = stage.optimizer(config).init(trained)
    batch = {k: v[None] for k, v in PACKED.items()}
    for _ in range(2):
        trained, opt, metrics = train_step(
            trained, opt, fixed, batch, np.float32(1e-3), jax.random.key(0)
        )
    assert float(metrics["grad_norm"]) > 0
    assert jax.tree.structure(fixed) == jax.tree.structure(fixed_before)
    for x, y in zip(jax.tree.leaves(fixed_before), jax.tree.leaves(fixed), strict=True):
        np.testing.assert_array_equal(x, y)
    moved = jax.tree.map(lambda x, y: bool((np.asarray(x) != y).any()), before, trained)
    assert all(jax.tree.leaves(moved)), moved
    assert ("reference" in fixed) == (loss in REFERENCED)
    if "reference" in fixed:
        assert float(metrics["margin"]) > 0  # it has moved away from the reference, to the chosen


@pytest.mark.parametrize("loss", LOSSES)
def test_only_dpo_and_ipo_run_a_reference(loss, monkeypatch):
    calls = []
    real = gemma.hidden
    monkeypatch.setattr(gemma, "hidden", lambda *a, **kw: calls.append(1) or real(*a, **kw))
    config = config_of(loss)
    trained, fixed = weights(config)
    micro = {k: v[:2] for k, v in PACKED.items()}
    f = partial(train_simpo.loss, cfg=CFG, config=config, fsdp=None)
    jax.eval_shape(f, trained, fixed, micro, jax.random.key(0))
    assert len(calls) == 1 + (loss in REFERENCED)


# --------------------------------------------------------------------------------- whole runs


def preference_row(i, split="train"):
    """A word problem solved, and the same with a wrong result."""
    row = problems.word_problem(split, i)
    wrong = str(int(row["answer"]) + 1)
    return {"prompt": row["question"],
            "chosen": data.format_completion(row["reasoning"], row["answer"]),
            "rejected": data.format_completion(f"It must be {wrong}.", wrong)}


@pytest.fixture(scope="module")
def before(small, tmp_path_factory):
    """60 pairs, and the adapter of a stage before this one."""
    folder = tmp_path_factory.mktemp("before")
    (folder / "pairs.jsonl").write_text("\n".join(json.dumps(preference_row(i)) for i in range(60)))
    cfg = gemma.read_config(small)
    lora.save(folder / "sft", live_adapter(cfg, 3), cfg)
    lora.write_prompt(folder / "sft", "Think.")
    return folder


def fields_of(small, before, out):
    return dict(weights=str(small), out=str(out), data=str(before / "pairs.jsonl"), steps=6,
                batch_rows=8, micro_rows=1, max_length=320, save_every=2, eval_every=3, keep=9,
                learning_rate=1e-3, show=0, max_new=8)


@pytest.mark.parametrize("rank", [4, 2, 0])
def test_the_starting_adapter_is_the_reference(small, before, tmp_path, rank):
    """On weights: same rank, another rank (merged into the base first), all weights."""
    config = train_simpo.resolve(train_simpo.Config(
        **fields_of(small, before, tmp_path), adapter=str(before / "sft"), loss="ipo",
        lora_rank=rank))
    model = stage.load_model(config, mesh_of(8))
    fixed = train_simpo.with_reference(model.trained, model.fixed, config)
    cfg, params = gemma.load(small)
    start = lora.load(before / "sft", cfg)
    for x, y in zip(jax.tree.leaves(model.trained), jax.tree.leaves(fixed["reference"]),
                    strict=True):
        np.testing.assert_array_equal(x, y)
    if rank == 4:
        for k in "ab":
            jax.tree.map(np.testing.assert_array_equal, fixed["reference"][k], start[k])
    tokens = np.arange(3, 23)[None]
    expected = gemma.logits(params, cfg, tokens, lora=start)
    params, adapter = stage.forward_weights(fixed["reference"], fixed, jnp.float32)
    host = jax.device_get((params, adapter))
    np.testing.assert_allclose(
        gemma.logits(host[0], cfg, tokens, lora=host[1]), expected, atol=1e-4
    )


def test_a_stage_learns_the_pairs(small, before, tmp_path, told):
    train_simpo.main(train_simpo.Config(**fields_of(small, before, tmp_path / "a") | dict(
        adapter=str(before / "sft"), lora_rank=4, eval_accuracy=2, report_to="tensorboard",
        steps=12, eval_every=0, learning_rate=5e-3, show=1)))
    metrics = lines(tmp_path / "a/metrics.jsonl")
    assert told == [*range(1, 13), 12, "closed"]  # the steps and the evaluation at the end
    steps = [m for m in metrics if "loss" in m]
    logged = {"loss", "grad_norm", "learning_rate", "n_pairs", *train_simpo.METRICS}
    assert logged <= steps[0].keys()
    held_out = [m for m in metrics if "eval_loss" in m]
    assert held_out[-1]["eval_margin"] > steps[0]["margin"] and {
        "eval_pair_accuracy", "eval_accuracy", "eval_accuracy_low",
        "eval_format"} <= held_out[-1].keys()
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert (tmp_path / "a/samples.jsonl").read_text()
    assert "Held-out margin" in (tmp_path / "a/report.html").read_text()


def test_three_acts_chain_by_their_weights(small, before, tmp_path):
    """Full SFT, an adapter on it, and RL that goes on training that adapter on that model."""
    cfg, params = gemma.load(small)
    tuned = jax.tree.map(lambda x: x + 0.01, params)
    gemma.save(tmp_path / "sft/final", cfg, tuned)
    data.Tokenizer(small).save(tmp_path / "sft/final")
    lora.write_prompt(tmp_path / "sft/final", "Think.")
    config = train_simpo.Config(**fields_of(small, before, tmp_path / "simpo"),
                                adapter=str(tmp_path / "sft"), lora_rank=4)
    begun = stage.load_model(train_simpo.resolve(config), mesh_of(8))
    jax.tree.map(np.testing.assert_array_equal, begun.fixed["base"], tuned)
    assert not any(b.any() for b in begun.trained["b"].values())
    train_simpo.main(dataclasses.replace(config, steps=1, eval_every=0, eval_accuracy=0))
    left = lora.load(tmp_path / "simpo/final", cfg)
    assert all(b.any() for b in left["b"].values())
    config = train_grpo.resolve(train_grpo.Config(
        weights=str(small), adapter=str(tmp_path / "simpo"), lora_rank=4, kl_coef=0.1
    ))
    model = stage.load_model(config, mesh_of(8))
    assert config.system == "Think."
    jax.tree.map(np.testing.assert_array_equal, model.fixed["base"], tuned)
    for k in "ab":  # of which train_grpo.py makes its reference
        jax.tree.map(np.testing.assert_array_equal, model.trained[k], left[k])
