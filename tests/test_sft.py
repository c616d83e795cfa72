"""train_sft.py: gradients that no layout changes, a frozen base, and whole runs."""

import dataclasses
import functools
import json
import subprocess
import sys
import time

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CFG, ONE_DEVICE, ROOT, check_sharded_step, close, lines, mesh_of, weights_of
from safetensors.numpy import load_file

import data
import gemma
import lora
import model_files
import packed
import rollouts
import stage
import train_sft
from sampler import Rollout

CONFIG = train_sft.resolve(
    train_sft.Config(lora_rank=4, max_length=32, batch_rows=8, micro_rows=8, steps=4)
)


def random_examples(n, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(rng.integers(4, longest))
        mask = (np.arange(length) >= rng.integers(1, length - 1)).astype(np.int8)
        rows.append(packed.Example(rng.integers(3, 97, length).astype(np.int32), mask))
    return rows


def gradient(batch, n_micro=1, devices=1, config=CONFIG, sharded=False, check_vma=True):
    """(gradient, metrics) of one update whose rows are laid out as asked."""
    mesh = mesh_of(devices)
    specs = stage.partition_specs(CFG, config, sharded)
    trained, fixed = stage.put(weights_of(config), mesh, specs)
    batch = {k: v.reshape(n_micro, -1, v.shape[-1]) for k, v in batch.items()}
    f = jax.jit(train_sft.grads_on_mesh(CFG, config, mesh, sharded, check_vma))
    out = f(trained, fixed, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, out[0]) == jax.tree.map(lambda x: x.shape, trained)
    return jax.device_get(out)


ROWS = random_examples(20)
PACKED = packed.assemble(packed.fill(ROWS, 32), 16, 32)
ONE_EACH = packed.assemble([[r] for r in ROWS], 24, 32)


@functools.cache
def whole_gradient(config=CONFIG):
    """That of PACKED in one piece on one device."""
    return gradient(PACKED, config=config)


@pytest.mark.smoke
def test_gradient_is_that_of_the_mean_over_all_tokens():
    """Against the textbook loss on whole logits, one example a row."""
    assert (PACKED["segments"].max(1) > 1).any()
    trained, fixed = weights_of(CONFIG)
    batch = packed.assemble([[r] for r in ROWS], len(ROWS), 32)
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]

    def total(trained):
        lora_live = trained | {"scale": fixed["scale"]}
        logits = gemma.logits(fixed["base"], CFG, tokens, batch["segments"], lora_live)
        logp = jax.nn.log_softmax(logits[:, :-1])
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        return -(logp * mask).sum() / mask.sum()

    value, g = jax.jit(jax.value_and_grad(total))(trained)
    close(whole_gradient(), (g, {"loss": value, "n_tokens": mask.sum()}))


def test_prompts_weigh_what_they_are_given():
    """prompt [p p p] completion [c c], weight w -> [w w 1 1]: nothing predicts the first token."""
    trained, fixed = weights_of(CONFIG)
    batch = {k: jnp.asarray(v[:4]) for k, v in ONE_EACH.items()}

    @jax.jit
    def sums(w):
        config = dataclasses.replace(CONFIG, prompt_loss=w)
        return train_sft.loss(trained, fixed, batch, jax.random.key(0), CFG, config, None)

    logits = gemma.logits(fixed["base"], CFG, batch["tokens"], batch["segments"],
                          trained | {"scale": fixed["scale"]})
    logp = jax.nn.log_softmax(logits[:, :-1])
    logp = jnp.take_along_axis(logp, batch["tokens"][:, 1:, None], axis=2)[..., 0]
    completion, real = batch["mask"][:, 1:] > 0, batch["segments"][:, 1:] > 0
    for w in (0.0, 0.25, 1.0):
        weight = jnp.where(completion, 1.0, jnp.where(real, w, 0.0))
        total, count = sums(w)
        np.testing.assert_allclose(total, -(logp * weight).sum(), rtol=1e-5)
        np.testing.assert_allclose(count, weight.sum(), rtol=1e-6)


@pytest.mark.parametrize("rank, sharded, check_vma", [
    (4, False, True), (4, False, False), (4, True, False), (0, False, False), (0, True, True)])
def test_eight_devices_change_no_gradient(rank, sharded, check_vma):
    config = dataclasses.replace(CONFIG, lora_rank=rank)
    close(gradient(PACKED, 2, 8, config, sharded, check_vma), whole_gradient(config))


@pytest.mark.parametrize("rank", [4, 0])
def test_a_step_of_a_sharded_base_is_that_of_a_replicated_one(rank):
    config = dataclasses.replace(CONFIG, lora_rank=rank)
    batch = {k: v[None] for k, v in PACKED.items()}
    check_sharded_step(CFG, config, train_sft.make_steps, stage.partition_specs,
                       *weights_of(config), batch, np.float32(1e-3), jax.random.key(0))


@pytest.mark.parametrize("remat", ["attention", "layer"])
def test_remat_changes_no_gradient(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    close(gradient(PACKED, config=config), whole_gradient())
    close(gradient(PACKED, 1, 8, config, True), whole_gradient(), 2e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_step_moves_b_and_leaves_the_base_bit_identical(sharded):
    mesh = mesh_of(8)
    base = gemma.init(CFG, jax.random.key(0), jnp.bfloat16)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", learning_rate=3e-6)
    trained, fixed = lora.split(stage.new_adapter(CFG, config))
    before = jax.device_get((base, trained))
    specs = stage.partition_specs(CFG, config, sharded)
    trained, fixed = stage.put((trained, {"base": base} | fixed), mesh, specs)
    train_step, _ = train_sft.make_steps(CFG, config, mesh, sharded)
    opt = stage.optimizer(config).init(trained)
    batch = {k: v[None] for k, v in PACKED.items()}
    for _ in range(2):
        trained, opt, metrics = train_step(
            trained, opt, fixed, batch, np.float32(3e-6), jax.random.key(0)
        )
    assert float(metrics["grad_norm"]) > 0
    for x, y in zip(jax.tree.leaves(before[0]), jax.tree.leaves(fixed["base"]), strict=True):
        np.testing.assert_array_equal(x, y)
    for name in trained["b"]:
        assert np.abs(trained["b"][name]).max() > 0, name
        assert (np.asarray(trained["a"][name]) != before[1]["a"][name]).any(), name
    assert {x.dtype for x in jax.tree.leaves((trained, opt[1].mu, opt[1].nu))} == {jnp.dtype("f4")}


def test_from_scratch_begins_with_random_weights_of_the_same_shape(small):
    _, stored = gemma.load(small)
    config = train_sft.Config(weights=str(small), from_scratch=True, seed=5)
    models = [stage.load_model(train_sft.resolve(config), mesh_of(8)).trained for _ in "ab"]
    for a, b, c in zip(*map(jax.tree.leaves, (*models, stored)), strict=True):
        np.testing.assert_array_equal(a, b)
        assert a.shape == c.shape and (not np.any(a) or (np.asarray(a) != c).any())


@pytest.mark.parametrize("sharded", ["yes", "no"])
def test_all_weights_are_trained_in_float32_and_left_in_bfloat16(small, tmp_path, sharded):
    config = train_sft.resolve(train_sft.Config(
        weights=str(small), lora_rank=0, dtype="bfloat16", shard=sharded))
    mesh = mesh_of(8)
    model = stage.load_model(config, mesh)
    assert {x.dtype for x in jax.tree.leaves(model.trained)} == {jnp.dtype("float32")}
    params, adapter = stage.forward_weights(model.trained, model.fixed, jnp.bfloat16)
    assert adapter is None and {x.dtype for x in jax.tree.leaves(params)} == {jnp.dtype("bfloat16")}
    split = {x.sharding.is_fully_replicated for x in jax.tree.leaves(model.trained)}
    assert split == ({True} if sharded == "no" else {True, False})  # norms stay whole
    opt = stage.optimizer(config).init(model.trained)
    assert {x.dtype for x in jax.tree.leaves((opt[1].mu, opt[1].nu))} == {jnp.dtype("float32")}
    stage.write_model(tmp_path, config, model, model.trained)
    stored = load_file(tmp_path / "model.safetensors")
    assert {x.dtype for x in stored.values()} == {jnp.dtype("bfloat16")}


def test_learning_rate_warms_up_and_ends_at_its_share():
    """By the clock at a step's beginning; with --steps at its end, so that the first step moves."""
    config = dataclasses.replace(CONFIG, learning_rate=1.0, warmup=0.1, final_lr=0.1, steps=None)
    rates = [stage.schedule(p, config) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 0.55, 0.1], atol=1e-9)
    config = dataclasses.replace(config, steps=20)
    rates = [stage.schedule(p, config) for p in (0.0, 0.05, 0.95)]
    np.testing.assert_allclose(rates, [0.5, 1.0, 0.1], atol=1e-9)


@pytest.mark.parametrize("model, rank, expected", [
    ("gemma3-1b", 16, (False, False)),  # 2 GB on each device
    ("gemma3-1b", 0, (True, False)),  # 16 bytes a weight are split, a copy of 2 GB fits
    ("gemma2-2b", 0, (True, False)),
    ("gemma3-4b", 16, (True, True)),
    ("gemma3-12b", 16, (True, True)),
])
def test_what_is_split_and_what_rollouts_gather_follows_from_the_sizes(model, rank, expected):
    config = train_sft.resolve(train_sft.Config(model=model, lora_rank=rank))
    args = gemma.CONFIGS[model], config, mesh_of(8)
    assert (stage.base_is_sharded(*args), stage.rollouts_are_sharded(*args)) == expected
    whole = dataclasses.replace(config, shard="no")
    assert not stage.rollouts_are_sharded(args[0], whole, args[2])


def test_a_real_gemma_does_not_get_the_tiny_models_defaults(tmp_path):
    hf = model_files.config_to_dict(gemma.CONFIGS["gemma3-270m"])
    (tmp_path / "config.json").write_text(json.dumps(hf))
    with pytest.raises(ValueError, match="--model tiny has 887,168 weights, but .* holds 268,098"):
        train_sft.resolve(train_sft.Config(weights=str(tmp_path)))
    train_sft.resolve(train_sft.Config(model="gemma3-270m-pt", weights=str(tmp_path)))


@pytest.mark.parametrize("rank, dtype", [(4, "float32"), (0, "bfloat16")])
def test_a_reference_is_kept_in_the_precision_it_is_read_in(rank, dtype):
    """By GRPO and DPO alike: an adapter in float32, all weights in the compute dtype."""
    config = dataclasses.replace(CONFIG, lora_rank=rank, dtype="bfloat16")
    copy = stage.reference_copy(weights_of(config)[0], config)
    assert {x.dtype for x in jax.tree.leaves(copy)} == {jnp.dtype(dtype)}


def test_answers_to_equal_prompts_are_counted_apart():
    """Two held-out rows of one prompt, and a row with nothing to check, are three answers."""
    tok = data.Tokenizer(ROOT / "tiny")
    rows = [{"question": "1 + 1?", "reasoning": "So.", "answer": "2"}] * 2
    rows += [{"prompt": "Hi", "completion": "Ho"}]
    problems = [rollouts.read_problem(row, tok) for row in rows]
    ids = tok.encode(data.format_completion("So.", "2")) + [tok.end_of_turn]

    class Parrot:
        def sample(self, params, prompts, **_):
            for p in prompts:
                yield Rollout(p, 0, np.array(ids), np.zeros(len(ids)), "stop")

    answers = rollouts.answer(Parrot(), (None, None), tok, problems)
    metrics = rollouts.accuracy(answers)
    assert [row["correct"] for row in answers] == [True, True, None]
    assert metrics["eval_accuracy"] == 1.0 and metrics["eval_format"] == 1.0


# --------------------------------------------------------------------------------- whole runs


def sft(small, out, *flags, code=0):
    """Runs train_sft.py as a user would; returns what it printed."""
    command = [sys.executable, str(ROOT / "train_sft.py"), "--weights", str(small), "--out",
               str(out), "--data", str(small / "rows.jsonl"), "--steps", "6", "--batch-rows", "4",
               "--micro-rows", "2", "--max-length", "176", "--save-every", "2", "--eval-every", "3",
               "--eval-rows", "8", "--eval-accuracy", "4", "--keep", "9", "--lora-dropout", "0.1",
               *flags]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_DEVICE, timeout=300)
    assert done.returncode == code, done.stderr[-3000:]
    return done.stderr


def config_of(small, out, **more):
    """A run in this process, of one step that is not evaluated."""
    fields = dict(weights=str(small), out=str(out), data=str(small / "rows.jsonl"), steps=1,
                  batch_rows=8, micro_rows=1, max_length=176, eval_every=0, eval_accuracy=0, show=0)
    return train_sft.Config(**fields | more)


def test_no_sampler_is_compiled_where_nothing_is_to_be_answered(small, tmp_path, monkeypatch):
    monkeypatch.setattr(rollouts, "Sampler", None)  # calling it would fail
    train_sft.main(config_of(small, tmp_path, show=2))
    assert (tmp_path / "held_out.jsonl").read_text().count("question") == 1
    with pytest.raises(TypeError, match="NoneType"):
        train_sft.main(config_of(small, tmp_path / "b", eval_accuracy=1))


@pytest.fixture(scope="session")
def whole(small, tmp_path_factory):
    """The folder of an uninterrupted run."""
    out = tmp_path_factory.mktemp("whole")
    sft(small, out)
    return out


@pytest.mark.xdist_group("sft")
def test_what_an_evaluation_leaves(whole):
    """Loss, accuracy and format of held-out rows, some completions, and the checkpoint's score."""
    measured = {m["step"]: m for m in lines(whole / "metrics.jsonl") if "eval_loss" in m}
    assert list(measured) == [0, 3, 6]
    for step, m in measured.items():
        assert 0 <= m["eval_accuracy"] <= 1 and 0 <= m["eval_format"] <= 1 and m["eval_loss"] > 0
        if step == 0:  # before the first update there is no checkpoint
            continue
        state = json.loads((whole / f"checkpoints/step_{step}/resume/state.json").read_text())
        assert state["score"] == m["eval_accuracy"]
    rows = lines(whole / "samples.jsonl")
    assert [row["step"] for row in rows] == [0, 3, 6]  # one of the 40 rows is held out
    assert all({"prompt", "completion", "correct", "format", "stop"} <= row.keys() for row in rows)


def test_ends_before_the_time_limit_with_checkpoint_and_evaluation(small, tmp_path):
    """Its own clock decides: the steps go on until little is left, and all is saved in time."""
    began = time.monotonic()
    sft(small, tmp_path, "--time-limit", "45s", "--steps", "1000000", "--save-every", "0")
    assert time.monotonic() - began < 45
    metrics = lines(tmp_path / "metrics.jsonl")
    last = max(m["step"] for m in metrics)
    assert "eval_loss" in metrics[-1] and metrics[-1]["step"] == last > 6
    rates = [m["learning_rate"] for m in metrics if "learning_rate" in m]
    assert metrics[-2]["p"] > 0.8 and rates[-1] < 0.5 * max(rates)
    assert (tmp_path / "checkpoints" / f"step_{last}" / "manifest.json").exists()
    assert (tmp_path / "final" / "adapter_model.safetensors").exists()


@pytest.mark.xdist_group("sft")
def test_stages_chain_and_a_full_fine_tune_is_the_next_base(small, whole, tmp_path, capsys):
    """LoRA 16 -> LoRA 4 on top (merged, stacked again in final/) -> all weights -> LoRA."""
    cfg, params = gemma.load(small)
    first = lora.load(whole / "final", cfg)
    train_sft.main(config_of(small, tmp_path / "b", steps=4, adapter=str(whole), lora_rank=4))
    assert "merged into the base" in capsys.readouterr().err
    both = lora.load(tmp_path / "b" / "final", cfg)
    assert lora.rank(both) == 20
    tokens = np.arange(3, 23)[None]
    live = lambda a: gemma.logits(params, cfg, tokens, lora=a)
    assert np.abs(live(both) - live(first)).max() > 1e-4
    train_sft.main(config_of(small, tmp_path / "c", adapter=str(tmp_path / "b"), lora_rank=0))
    _, full = gemma.load(tmp_path / "c" / "final")
    close_to = gemma.logits(full, cfg, tokens)
    assert 1e-4 < np.abs(close_to - live(both)).max() < 2.0
    train_sft.main(config_of(small, tmp_path / "d", adapter=str(tmp_path / "c")))


def test_system_text_travels_and_a_mismatch_is_an_error(small, tmp_path):
    train_sft.main(config_of(small, tmp_path / "a", system="Think."))
    assert json.loads((tmp_path / "a/final/prompt.json").read_text()) == {"system": "Think."}
    following = config_of(small, tmp_path / "b", adapter=str(tmp_path / "a"))
    with pytest.raises(ValueError, match="--system 'Do not think.'"):
        train_sft.main(dataclasses.replace(following, system="Do not think."))
    train_sft.main(following)
    assert json.loads((tmp_path / "b/final/prompt.json").read_text()) == {"system": "Think."}
