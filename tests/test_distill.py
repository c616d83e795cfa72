"""train_distill.py: TRL's divergences, chunks and devices that change no gradient, whole runs."""

import dataclasses
import json
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import CFG, ROOT, close, lines, live_adapter, mesh_of
from test_grpo import samples_of

import data
import divergence
import gemma
import lora
import rewards
import stage
import train_distill
from packed import read_example
from rollouts import pack

LARGER = dataclasses.replace(  # padded to a longer vocabulary, and with a cap as in Gemma 2
    CFG, vocab_size=104, hidden_size=40, num_hidden_layers=2, is_global=(False, True),
    final_logit_softcapping=3.0)
CONFIG = train_distill.resolve(train_distill.Config(
    lora_rank=4, prompts=4, max_prompt=8, max_new=12, pack_length=32, slots=8, steps=4, beta=0.3))
BETAS = (0.0, 0.3, 0.5, 1.0)


def change(**fields):
    return dataclasses.replace(CONFIG, **fields)


# --------------------------------------------------------------------------------- the divergence


def terms_of(beta, temperature=1.0, caps=(None, None), **more):
    cfgs = (dataclasses.replace(CFG, final_logit_softcapping=cap) for cap in caps)
    return divergence.Terms(*cfgs, beta, temperature, **more)


def case(B=2, T=7, D=6, E=5, V=11, seed=0):
    """Hidden states and heads of two models, tokens, weights (some 0) and advantages."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.normal(size=shape).astype(np.float32)
    weight = np.where(rng.random((B, T)) < 0.3, 0.0, rng.random((B, T))).astype(np.float32)
    weight /= weight.sum()
    return (normal(B, T, D), normal(V, D), normal(B, T, E), 2 * normal(V, E),
            rng.integers(0, V, (B, T)), weight, normal(B, T))


def in_float64(terms, x, head, y, head_y, tokens, weight, advantage):
    """The definition, from whole logits."""
    capped = lambda z, cfg: z if not (c := cfg.final_logit_softcapping) else c * jnp.tanh(z / c)
    logp, logq = (jax.nn.log_softmax(capped(z @ w.T, cfg) / terms.temperature) for z, w, cfg in (
        (x, head, terms.student), (y, head_y, terms.teacher)))
    kl = lambda a, b: jnp.sum(jnp.exp(a) * (a - b), axis=-1)
    m = jnp.log(terms.beta * jnp.exp(logq) + (1 - terms.beta) * jnp.exp(logp))
    d = {0.0: kl(logq, logp), 1.0: kl(logp, logq)}.get(
        terms.beta, terms.beta * kl(logq, m) + (1 - terms.beta) * kl(logp, m))
    if terms.rewarded:
        d -= advantage * jnp.take_along_axis(logp, tokens[..., None], axis=-1)[..., 0]
    return jnp.sum(weight * d)


@pytest.mark.smoke
@pytest.mark.parametrize("beta, temperature, caps, rewarded", [
    (0.0, 0.7, (3.0, 2.0), True), (0.3, 1.0, (None, None), False), (0.3, 0.7, (3.0, 2.0), True),
    (0.5, 2.0, (None, 1.5), False), (1.0, 0.7, (3.0, 2.0), True)])
def test_loss_and_gradient_are_those_of_whole_logits_in_float64(beta, temperature, caps, rewarded):
    """In several chunks and in one, with tokens left out, by a frozen head and a trained one."""
    arrays = [*map(jnp.asarray, case())]
    terms = terms_of(beta, temperature, caps, rewarded=rewarded, trains_head=True)
    with jax.enable_x64(True):
        wide = [np.float64(a) if a.dtype == np.float32 else a for a in case()]
        expected, (dx, dhead) = jax.value_and_grad(in_float64, (1, 2))(terms, *wide)
        expected, dx, dhead = (np.asarray(z) for z in (expected, dx, dhead))
    assert abs(expected) > 0.01 and min(np.abs(dx).max(), np.abs(dhead).max()) > 1e-3
    for chunk in (3, None):
        def both(terms, c=chunk):
            f = lambda x, head: divergence.loss(terms, x, head, *arrays[2:], chunk=c)
            return jax.jit(jax.value_and_grad(f, (0, 1), has_aux=True))(*arrays[:2])

        (got, out), g = both(terms)
        np.testing.assert_allclose(got, expected, atol=1e-6)
        np.testing.assert_allclose(g[0], dx, atol=1e-6)
        np.testing.assert_allclose(g[1], dhead, atol=1e-6)
        (got, _), (g, none) = both(terms._replace(trains_head=False))
        np.testing.assert_allclose(g, dx, atol=1e-6)
        assert not none.any() and abs(got - expected) < 1e-6
        weight = arrays[5]
        assert all((np.asarray(z)[weight == 0] == 0).all() for z in out.values())
        if not rewarded:
            np.testing.assert_allclose(np.sum(weight * out["divergence"]), expected, atol=1e-6)


VALUES = json.loads((ROOT / "tests/distill.json").read_text())


def trl_like(student, teacher, mask, beta, temperature):
    """The loss and its gradient by the student's logits, by way of heads that change nothing."""
    V = student.shape[-1]
    weight = np.float32(mask) / mask.sum()
    terms = terms_of(beta, temperature)
    f = lambda x: divergence.loss(terms, x, jnp.eye(V), teacher, jnp.eye(V),
                                  np.zeros(mask.shape, int), weight, chunk=3)[0]
    return jax.value_and_grad(f)(jnp.asarray(student))


@pytest.mark.parametrize("n", range(len(VALUES["cases"])))
def test_values_of_trl_as_numbers(n):
    arrays = (np.array(VALUES[k], t) for k, t in (
        ("student", np.float32), ("teacher", np.float32), ("mask", bool)))
    c = VALUES["cases"][n]
    got, grad = trl_like(*arrays, c["beta"], c["temperature"])
    np.testing.assert_allclose(got, c["loss"], atol=1e-6)
    np.testing.assert_allclose(grad, c["grad"], atol=1e-6)


@pytest.mark.parametrize("beta", BETAS)
def test_nothing_is_learnt_from_oneself(beta):
    x, head, _, _, tokens, weight, _ = case(V=500)
    terms = terms_of(beta, 0.8, trains_head=True)
    f = lambda x, head: divergence.loss(terms, x, head, x, head, tokens, weight)[0]
    got, g = jax.value_and_grad(f, (0, 1))(jnp.asarray(x), jnp.asarray(head))
    assert got == 0 and not g[0].any() and not g[1].any()


@pytest.mark.parametrize("beta", BETAS)
def test_distributions_far_apart_stay_finite(beta):
    """Logits that differ by thousands, as an untrained student has under a sure teacher."""
    logits = np.float32([[[0, 5e3, -5e3, 1]], [[9e3, -9e3, 0, 0]]])
    for student, teacher in (logits, logits[::-1]):
        mask = np.ones((1, 1), bool)
        got, grad = trl_like(student[None], teacher[None], mask, beta, 1.0)
        assert np.isfinite(got) and got >= 0 and np.isfinite(grad).all()
        if 0 < beta < 1:  # at most the entropy of a coin with this bias
            assert got <= -beta * np.log(beta) - (1 - beta) * np.log(1 - beta) + 1e-6


def test_memory_does_not_grow_with_tokens_times_vocabulary():
    """By the compiler: four times the tokens, which would be 3.2 GB of logits more."""
    V, D = 2**15, 8
    shape = lambda *s, t=jnp.float32: jax.ShapeDtypeStruct(s, t)
    temporaries = []
    for T in (8192, 32768):  # chunks of 1,024
        f = lambda *a: divergence.loss(terms_of(0.3), *a)[0]
        compiled = jax.jit(jax.value_and_grad(f)).lower(
            shape(1, T, D), shape(V, D), shape(1, T, D), shape(V, D), shape(1, T, t=jnp.int32),
            shape(1, T)).compile()
        temporaries.append(compiled.memory_analysis().temp_size_in_bytes)
    more = 32768 - 8192
    assert temporaries[1] - temporaries[0] < 20 * more * D * 4 < more * V * 4 / 100


# ------------------------------------------------------------------------- layouts of an update


def weights_for(config):
    """(trained, fixed) of a student under a larger teacher with an adapter."""
    params = gemma.init(CFG, jax.random.key(0))
    trained, fixed = params, {}
    if config.lora_rank:
        trained, fixed = lora.split(live_adapter(CFG, 1))
        fixed |= {"base": params}
    teacher = {"base": gemma.init(LARGER, jax.random.key(5)), "adapter": live_adapter(LARGER, 6)}
    return trained, fixed | {"teacher": teacher}


def packed(samples, config, devices):
    n = sum(len(s.rollout.ids) for s in samples)
    batch, n_micro, spans = pack(samples, [1 / n] * len(samples), config, devices, True)
    assert len(spans) == len(samples)  # also those without an advantage
    return batch, n_micro


def step(config, devices, student=False, teacher=False, check_vma=True, batch=None, adapted=True):
    """(Adam's first moments, a tenth of the clipped gradient, and the metrics) of one update."""
    mesh, pair = mesh_of(devices), train_distill.Pair(CFG, LARGER, 97, teacher, adapted)
    train_step, = train_distill.make_steps(pair, config, mesh, student, check_vma)
    specs, fixed_specs = train_distill.partition_specs(pair, config, student)
    trained, fixed = weights_for(config)
    adapter = fixed["teacher"].pop("adapter")
    fixed_specs["teacher"].pop("adapter", None)
    trained, fixed = (stage.put(x, mesh, s) for x, s in ((trained, specs), (fixed, fixed_specs)))
    if adapted:
        fixed["teacher"]["adapter"] = stage.put(adapter, mesh, jax.sharding.PartitionSpec())
    batch, n_micro = batch or packed(samples_of(zeros=5), config, devices)
    opt = stage.optimizer(config).init(trained)
    _, opt, metrics, _ = train_step(trained, opt, fixed, batch, np.int32(n_micro), np.float32(0))
    return jax.device_get((opt[1].mu, metrics))


@pytest.mark.parametrize("rank, student, teacher, check_vma, adapted", [
    (4, False, True, True, True), (4, False, True, False, True), (4, True, False, True, True),
    (0, False, True, True, True), (0, True, True, False, False)])
def test_devices_and_shards_change_no_gradient(rank, student, teacher, check_vma, adapted):
    """A sharded teacher is a replicated one, eight devices are one, with rewards mixed in."""
    config = change(lora_rank=rank, rewards="format", reward_coef=0.5)
    one = step(config, 1, adapted=adapted)
    close(step(config, 8, student, teacher, check_vma, adapted=adapted), one, 2e-5)
    assert one[1]["divergence"] > 0.1 and one[1]["loss"] != pytest.approx(one[1]["divergence"])


def test_packed_is_unpacked():
    samples, config = samples_of(), change()
    n = sum(len(s.rollout.ids) for s in samples)
    rows = [pack([s], [1 / n], config, 1, True)[0] for s in samples]
    each = {k: np.stack([r[k].reshape(-1, 32)[0] for r in rows])[None] for k in rows[0]}
    batch, n_micro = packed(samples, config, 1)
    assert batch["segments"].max() > 1 and n_micro > 1
    close(step(config, 1, batch=(batch, n_micro)), step(config, 1, batch=(each, 1)), 2e-5)


def test_the_loss_of_a_batch_is_the_mean_over_its_tokens_by_whole_logits():
    """Softcap, temperature, both adapters and the padded rows of the vocabulary included."""
    config, samples = change(temperature=0.7, beta=1.0), samples_of(4)
    trained, fixed = weights_for(config)
    total, n, vocabulary = 0.0, 0, 97
    for s in samples:
        ids = np.array([*s.problem.prompt, *s.rollout.ids])[None]
        z = gemma.logits(fixed["base"], CFG, ids, lora=trained | {"scale": fixed["scale"]})
        t = gemma.logits(fixed["teacher"]["base"], LARGER, ids, lora=fixed["teacher"]["adapter"])
        z, t = (jax.nn.log_softmax(np.float64(a[0, :-1, :vocabulary]) / 0.7) for a in (z, t))
        d = np.sum(np.exp(z) * (z - t), axis=-1)[-len(s.rollout.ids) :]
        total, n = total + d.sum(), n + len(d)
    _, metrics = step(config, 1, batch=packed(samples, config, 1))
    np.testing.assert_allclose(metrics["loss"], total / n, rtol=1e-5)
    np.testing.assert_allclose(metrics["divergence"], total / n, rtol=1e-5)


# ---------------------------------------------------------------------------------------- rollouts


@pytest.mark.parametrize("share", [0.0, 1 / 3, 0.9, 1.0])
def test_the_share_of_prompts_that_the_student_answers(share):
    own = [train_distill.is_own(i, share) for i in range(1000)]
    assert abs(sum(own) - 1000 * share) < 1
    for i in range(0, 1000, 100):
        assert abs(sum(own[:i]) - i * share) < 1


def test_a_rows_solution_is_what_sft_would_train_on():
    tok = data.Tokenizer(ROOT / "tiny")
    row = {"question": "1 + 1?", "reasoning": "One more than one.", "answer": "2"}
    config = change(on_policy=0.5, max_prompt=99, max_new=99, system="Add.")
    problem = train_distill.reader(config, tok)(row)
    s = train_distill.from_row(problem, config, tok)
    ids, mask, _ = read_example(row, tok, "Add.")
    assert [*problem.prompt, *s.rollout.ids] == ids.tolist()
    assert len(s.rollout.ids) == mask.sum() and s.rollout.ids[-1] == tok.end_of_turn
    with pytest.raises(data.TooLong, match="tokens, more than --max-new 3"):
        train_distill.reader(dataclasses.replace(config, max_new=3), tok)(row)
    for on_policy in (0.5, 1.0):  # only a row that is learnt from needs a solution
        read = train_distill.reader(dataclasses.replace(config, on_policy=on_policy), tok)
        if on_policy == 1:
            assert read({"question": "1 + 1?"}).gold is None
        else:
            with pytest.raises(ValueError, match="expected a completion to train on"):
                read({"question": "1 + 1?"})


def test_advantages_are_those_of_grpo():
    groups = [samples_of(4), samples_of(4), samples_of(4)]
    for group, totals in zip(groups, ([1, 2, 3, 6], [1, None, 3, None], [2, None, None, None]),
                             strict=True):
        for s, total in zip(group, totals, strict=True):
            s.scored = rewards.Scored(total, {}, {})
    train_distill.set_advantages(groups)
    got = [[s.advantage for s in group] for group in groups]
    expected = np.array([-2, -1, 0, 3]) / (np.std([1, 2, 3, 6], ddof=1) + 1e-4)
    np.testing.assert_allclose(got[0], expected)
    np.testing.assert_allclose(got[1], [-1 / (2**0.5 + 1e-4), 0, 1 / (2**0.5 + 1e-4), 0])
    assert got[2] == [0, 0, 0, 0]


# ------------------------------------------------------------------------------------- whole runs


def test_another_tokenizer_is_refused_by_name():
    tok = data.Tokenizer(ROOT / "tiny")
    assert train_distill.difference(tok, data.Tokenizer(ROOT / "tiny")) is None
    pieces = [tok.sp.id_to_piece(i) for i in range(tok.vocab_size)]
    for n, other, says in ((7, [*pieces[:7], "x", *pieces[8:]], "'x' in there"),
                           (len(pieces), [*pieces, "more"], "'more' in there"),
                           (len(pieces) - 1, pieces[:-1], "None in there")):
        sp = types.SimpleNamespace(id_to_piece=other.__getitem__)
        sp.id_to_piece = lambda ids, other=other: [other[i] for i in ids]
        theirs = types.SimpleNamespace(sp=sp, vocab_size=len(other), file="there")
        said = train_distill.difference(tok, theirs)
        assert said.startswith(f"token {n} is ") and said.endswith(says), said


def adapter_in(folder, model):
    cfg = gemma.read_config(model)
    lora.save(folder, live_adapter(cfg, 8), cfg, str(model))
    return str(folder)


def test_a_teacher_that_cannot_teach_is_refused(small, tmp_path, monkeypatch):
    config = train_distill.resolve(train_distill.Config(
        weights=str(small), teacher=str(small), max_prompt=24, pack_length=128,
        data=str(small / "rows.jsonl"), out=str(tmp_path / "run")))
    mesh = mesh_of(8)
    model = stage.load_model(config, mesh)
    with pytest.raises(ValueError, match=f"--teacher {small}: it is the student itself"):
        train_distill.add_teacher(model, config, mesh)
    for change, why in (
        (dict(teacher=str(tmp_path)), f"--teacher {tmp_path}: expected the Transformers version"),
        (dict(teacher="gemma3-13b"), "--teacher gemma3-13b: unknown"),
        (dict(teacher_adapter=str(tmp_path)), f"--teacher-adapter {tmp_path}: expected adapter_co"),
    ):
        with pytest.raises(ValueError, match=why):
            train_distill.add_teacher(model, dataclasses.replace(config, **change), mesh)
    better = dataclasses.replace(config, teacher_adapter=adapter_in(tmp_path / "better", small))
    for limit, sharded in ((1e9, False), (1e3, True)):
        monkeypatch.setattr(stage, "REPLICATED_BYTES", limit)
        taught, pair = train_distill.add_teacher(model, better, mesh)
        assert pair.is_sharded == sharded and pair.has_adapter
        base = taught.fixed["teacher"]["base"]
        assert base["embed_tokens"].sharding.is_fully_replicated != sharded
    with monkeypatch.context() as m:
        m.setattr(train_distill, "difference", lambda *_: "token 3 is 'a' in X, 'b' in Y")
        with pytest.raises(ValueError, match="its tokenizer is not the student's: token 3 is 'a'"):
            train_distill.add_teacher(model, better, mesh)


def test_a_teacher_of_another_system_text_is_refused(small, tmp_path):
    adapter = adapter_in(tmp_path, small)
    lora.write_prompt(tmp_path, "Be brief.")
    with pytest.raises(ValueError, match="trained under 'Be brief.'"):
        train_distill.resolve(train_distill.Config(teacher_adapter=adapter, system="Be long."))


@pytest.mark.parametrize("on_policy, rank", [(1.0, 0), (0.5, 4), (0.0, 4)])
def test_the_student_nears_its_teacher(small, tmp_path, on_policy, rank):
    """On its own completions, on rows' solutions, and on both: the divergence shrinks by a quarter.
    """
    rows = [{"question": f"{i} + 1?", "reasoning": "One.", "answer": str(i + 1)} for i in range(40)]
    (tmp_path / "rows.jsonl").write_text("\n".join(map(json.dumps, rows)))
    config = train_distill.Config(
        weights=str(small), teacher=str(small), teacher_adapter=adapter_in(tmp_path / "t", small),
        data=str(tmp_path / "rows.jsonl"), max_prompt=24, max_new=24, pack_length=48, slots=2,
        prompts=8, group=2, steps=8, eval_every=0, eval_rows=2, save_every=0, show=0,
        on_policy=on_policy, lora_rank=rank, learning_rate=0.02 if rank else 0.003, warmup=0.0,
        out=str(tmp_path / "run"))
    final = train_distill.main(config)
    steps = [m for m in lines(tmp_path / "run/metrics.jsonl") if "divergence" in m]
    assert len(steps) == 8 and all(
        m["loss"] == pytest.approx(m["divergence"]) for m in steps)
    assert steps[-1]["divergence"] < 0.75 * steps[0]["divergence"]
    samples = lines(tmp_path / "run/samples.jsonl")
    assert len(samples) == 8 * min(8, int(8 * 2 * on_policy))
    assert ("reward" in steps[0]) == (on_policy > 0)
    if on_policy:
        assert all(m["sampling/sampling_logp_difference/mean"] < 1e-4 for m in steps)
    assert (final / ("adapter_config.json" if rank else "model.safetensors")).exists()
