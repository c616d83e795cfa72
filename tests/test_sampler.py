"""Rollouts against transformers, against the trainer's log-probs, and against themselves.

Lengths are made long-tailed by temperature and stop ids: at temperature 50 the tiny models are
nearly uniform over 96 words, so k stop ids end a rollout with probability k/96 at every token.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import live_adapter, mesh_of
from jax.sharding import PartitionSpec as P
from test_gemma import TINY, random_params

import gemma
import stage
from sampler import Rollout, Rules, Sampler, draw

FAMILIES = ("gemma2", "gemma3")
CONTEXT = 100  # shorter than the longest prompt plus the longest completion
CFG = {  # with a head of its own: a tied random model mostly repeats its last token
    family: dataclasses.replace(cfg, max_position_embeddings=CONTEXT, tie_word_embeddings=False)
    for family, cfg in TINY.items()
}
params_of = functools.cache(lambda family: random_params(CFG[family], seed=4))


def sampler(family="gemma3", n_devices=1, slots=4, **sizes):
    """Equal samplers share what is compiled: the tests use few different ones."""
    sizes = {"max_prompt": 40, "max_new": 64, "cached_prompts": 3, "chunk": 8} | sizes
    return Sampler(CFG[family], mesh_of(n_devices), slots, dtype=jnp.float32, **sizes)


def random_prompts(*lengths, seed=0):
    rng = np.random.default_rng(seed)
    return [rng.integers(1, 96, n).tolist() for n in lengths]


def by_number(rollouts) -> dict[tuple, Rollout]:
    rollouts = list(rollouts)
    found = {(r.prompt, r.index): r for r in rollouts}
    assert len(found) == len(rollouts), "a rollout was handed out twice"
    return found


def tokens(rollouts) -> dict[tuple, list]:
    return {k: [*r.ids.tolist(), r.stop] for k, r in by_number(rollouts).items()}


def long_tailed(**more):
    return {"temperature": 50.0, "stop": (5, 9), **more}


# ---------------------------------------------------------------------------------- which tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_greedy_equals_transformers_generate(tmp_path, family):
    """64 tokens after prompts of mixed lengths: a cached window of 5 turns many times over."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    gemma.save(tmp_path, CFG[family], params_of(family))
    model = transformers.AutoModelForCausalLM.from_pretrained(
        tmp_path, attn_implementation="eager"
    ).eval()
    model.generation_config.eos_token_id = None
    prompts = random_prompts(1, 3, 9, 17, 31, 36)
    ours = by_number(
        sampler(family).sample(params_of(family), prompts, n=2, temperature=0, stop=())
    )
    assert len(ours) == 12
    padded = np.array([[0] * (36 - len(p)) + p for p in prompts])  # on the left, masked
    with torch.no_grad():
        theirs = model.generate(
            torch.tensor(padded), attention_mask=torch.tensor(padded > 0).long(), do_sample=False,
            max_new_tokens=64,
        )[:, 36:].tolist()
    for i, ids in enumerate(theirs):
        assert ours[i, 0].ids.tolist() == ours[i, 1].ids.tolist() == ids, f"prompt {i}"
        assert ours[i, 0].stop == "length" and len(set(ids)) > 15


def reference_distribution(logits_V, temperature, top_k=0, top_p=1.0, min_p=0.0, forbidden=()):
    """Sorts, in float64: what transformers' four warpers do one after the other."""
    x_V = np.float64(logits_V) / temperature
    x_V[list(forbidden)] = -np.inf
    if top_k:
        x_V[x_V < np.sort(x_V)[-top_k]] = -np.inf
    p_V = np.exp(x_V - x_V.max())
    if top_p < 1:
        order = np.argsort(-p_V)
        before = np.cumsum(p_V[order]) - p_V[order]
        p_V[order[before >= top_p * p_V.sum()]] = 0
    p_V[p_V < min_p * p_V.max()] = 0
    return p_V / p_V.sum()


@pytest.mark.parametrize("rules", [
    {"temperature": 1.7, "forbidden": (0, 3, 299)},
    {"top_k": 7, "temperature": 1.3},
    {"top_k": 200},
    {"top_p": 0.9},
    {"min_p": 0.05},
    {"top_k": 40, "top_p": 0.8, "min_p": 0.02, "temperature": 1.5, "forbidden": (17,)},
], ids=str)
def test_frequencies_of_100k_draws_match_the_softmax(rules, n=100_000, V=300):
    """Chi-square over 300 words (three blocks, the last one short), and the exact support."""
    stats = pytest.importorskip("scipy.stats")
    rules = {"temperature": 1.0} | rules
    logits_V = np.random.default_rng(1).normal(0, 2, V).astype(np.float32)
    expected_V = n * reference_distribution(logits_V, **rules)
    forbidden_V = np.zeros(V, bool)
    forbidden_V[list(rules.pop("forbidden", ()))] = True
    settings = {"top_p": 1.0, "min_p": 0.0, "forbidden_V": forbidden_V} | rules
    compiled = Rules(rules.get("top_k", 0), "top_p" in rules, "min_p" in rules)
    keys = jax.random.split(jax.random.key(0, impl="threefry2x32"), n).reshape(10, -1)
    rows = jnp.broadcast_to(logits_V, (n // 10, V))
    settings = {k: jnp.float32(v) if np.ndim(v) == 0 else v for k, v in settings.items()}
    # Settings as arguments: as constants they would be folded at compile time.
    one = jax.jit(lambda rows, key_B, settings: draw(rows, key_B, compiled, settings))
    drawn = [one(rows, key_B, settings) for key_B in keys]
    token_B, logp_B = (np.concatenate(z) for z in zip(*drawn, strict=True))
    counts_V = np.bincount(token_B, minlength=V)
    assert not counts_V[expected_V == 0].any(), "drew a token that was ruled out"
    common = expected_V >= 5
    assert counts_V[expected_V >= 20].all(), "never drew a token that is allowed"
    seen = [*counts_V[common], counts_V[~common].sum()]
    wanted = [*expected_V[common], expected_V[~common].sum()]
    if wanted[-1] < 5:
        seen[-2:], wanted[-2:] = [sum(seen[-2:])], [sum(wanted[-2:])]
    if len(wanted) > 1:
        assert stats.chisquare(seen, wanted).pvalue > 1e-3
    untruncated_V = jax.nn.log_softmax(logits_V / rules["temperature"])
    np.testing.assert_allclose(logp_B, untruncated_V[token_B], atol=1e-5)


def test_rollouts_have_noise_of_their_own():
    """The first two tokens of 3000 rollouts: each right, and independent of each other."""
    stats = pytest.importorskip("scipy.stats")
    family, prompt = "gemma3", random_prompts(6)[0]
    make = functools.partial(sampler(family, slots=64).sample, params_of(family))
    rollouts = list(make([prompt], n=3000, max_new=2, temperature=0.7, stop=()))
    first, second = np.array([r.ids for r in rollouts]).T
    logits_BTV = gemma.logits(params_of(family), CFG[family], jnp.asarray([prompt]))
    expected_V = 3000 * np.asarray(jax.nn.softmax(logits_BTV[0, -1] / 0.7), np.float64)
    common = expected_V >= 5
    seen = [*np.bincount(first, minlength=96)[common], sum(~common[first])]
    wanted = [*expected_V[common], expected_V[~common].sum()]
    assert stats.chisquare(seen, np.array(wanted) * 3000 / sum(wanted)).pvalue > 1e-3
    assert np.mean(first == second) < 0.5
    few = functools.partial(make, [prompt, prompt], n=4, max_new=16, temperature=2.0, stop=())
    calls = [few(seed=0, step=0), few(seed=0, step=1), few(seed=1, step=0)]
    streams = [tuple(ids) for call in calls for ids in tokens(call).values()]
    assert len(set(streams)) == 3 * 8, "two of (seed, step, prompt, rollout) share their noise"


@pytest.mark.smoke
@pytest.mark.parametrize("family", FAMILIES)
def test_tokens_do_not_depend_on_devices_slots_or_order(family):
    prompts = random_prompts(5, 40, 23, 1, 12, 33, 2, 30, 8, 19, 27)
    numbered = dict(enumerate(prompts))
    params = params_of(family)
    settings = {"n": 5, "temperature": 1.3, "stop": range(3, 8), "top_k": 30}
    expected = tokens(sampler(family).sample(params, prompts, **settings))
    assert len(expected) == 55 and len({len(ids) for ids in expected.values()}) > 10
    others = [sampler(family, slots=64), sampler(family, n_devices=8)]
    for s in others:
        assert tokens(s.sample(params, prompts, **settings)) == expected
    backwards = dict(reversed(numbered.items()))
    assert tokens(sampler(family).sample(params, backwards, **settings)) == expected
    sharded = stage.put(params, mesh_of(8), gemma.pspecs(CFG[family], True))
    assert tokens(others[1].sample(sharded, backwards, **settings)) == expected


def test_a_base_that_stays_sharded_gives_the_rollouts_of_a_replicated_one(family="gemma2"):
    """Eight devices that have 15, 3 and 1 rollouts to share: each waits for all at every step."""
    cfg, params = CFG[family], params_of(family)
    adapter = live_adapter(cfg)
    settings = {"lora": adapter, "temperature": 1.3, "top_k": 20, "top_p": 0.95, "min_p": 0.01,
           "stop": range(3, 8)}
    split = sampler(family, n_devices=8, slots=2, shard=True)
    compiled = split.programs(params, adapter)["decode"][1][2]["layers"]
    assert compiled["q_proj"].sharding.spec == P(None, "data", None, None)  # never unstacked
    for prompts, n in ((random_prompts(5, 40, 33), 5), (random_prompts(40), 3), ([[7]], 1)):
        expected = by_number(sampler(family).sample(params, prompts, n, **settings))
        stats = {}
        found = by_number(split.sample(params, prompts, n, stats=stats, **settings))
        assert found.keys() == expected.keys()
        for k, r in found.items():
            assert (r.ids.tolist(), r.stop) == (expected[k].ids.tolist(), expected[k].stop)
            np.testing.assert_allclose(r.logps, expected[k].logps, atol=1e-5)
    assert stats["slot_steps"] % (8 * 2) == 0  # the seven devices without work stepped with it


# --------------------------------------------------------------------------------- log-probs, ends


@pytest.mark.parametrize("family", FAMILIES)
def test_logps_are_the_trainers(family):
    """With an adapter, a temperature and every truncation: gemma.hidden on the whole sequence."""
    cfg, params = CFG[family], params_of(family)
    adapter = live_adapter(cfg)
    prompts = random_prompts(3, 40, 14)
    for temperature in (0.6, 0):
        rollouts = sampler(family).sample(
            params, prompts, n=3, lora=adapter, temperature=temperature, top_k=20, top_p=0.95,
            min_p=0.01, stop=(5, 9),
        )
        for r in rollouts:
            row = np.zeros(CONTEXT + 4, int)  # one shape, and padding cannot be seen from before
            row[: len(prompts[r.prompt]) + len(r.ids)] = [*prompts[r.prompt], *r.ids]
            x_BTD = hidden(params, cfg, row[None], lora=adapter)
            logp_BT, _ = gemma.token_logps(
                x_BTD[:, :-1], gemma.head(params, cfg), jnp.asarray(row[None, 1:]),
                temperature=temperature or 1.0, softcap=cfg.final_logit_softcapping,
            )
            start = len(prompts[r.prompt]) - 1
            np.testing.assert_allclose(r.logps, logp_BT[0, start : start + len(r.ids)], atol=1e-5)
            assert r.logps.dtype == np.float32 and r.ids.dtype == np.int32


hidden = jax.jit(gemma.hidden, static_argnames="cfg")


def test_each_rollout_says_why_it_ended():
    stop = (5, 9, 11)
    prompts = random_prompts(4, 40)
    make = functools.partial(sampler().sample, params_of("gemma3"), prompts, temperature=3.0)
    rollouts = by_number(make(n=30, stop=stop))
    assert len(rollouts) == 60
    for r in rollouts.values():
        n, limit = len(r.ids), min(64, CONTEXT - len(prompts[r.prompt]))
        assert n == len(r.logps) and not np.isin(r.ids[:-1], stop).any()
        assert (r.stop == "stop") == (r.ids[-1] in stop), "the stop token is part of the rollout"
        assert r.stop == "stop" or (r.stop == "length" and n == limit)
    assert {r.stop for r in rollouts.values()} == {"stop", "length"}
    shorter = by_number(make(n=30, stop=stop, max_new=7))
    for k, r in rollouts.items():
        assert shorter[k].ids.tolist() == r.ids[:7].tolist()
        assert shorter[k].stop == ("stop" if shorter[k].ids[-1] in stop else "length")
    assert any(len(r.ids) == 7 and r.stop == "stop" for r in shorter.values())
    default = by_number(make(n=30))  # the config's stop id is 1
    assert any(r.ids[-1] == 1 for r in default.values())


def test_forbidden_tokens_are_never_drawn():
    allowed = {0, 7, 20, 31}
    forbidden = set(range(40)) - allowed
    make = functools.partial(sampler().sample, params_of("gemma3"), random_prompts(4, 9),
                             forbidden=forbidden, vocab_size=40, stop=())
    for temperature in (0, 5.0):
        rollouts = list(make(n=4, temperature=temperature))
        drawn = set(np.concatenate([r.ids for r in rollouts]).tolist())
        assert drawn == allowed if temperature else drawn <= allowed
    # They still count in the log-probs, which are the trainer's.
    assert all(np.exp(r.logps).mean() < 0.2 for r in make(n=4, temperature=50.0))


def first_repetition(ids, limit):
    """Length at which, for some period p <= 64, `limit` tokens in a row equal the one p before."""
    for n in range(1, len(ids) + 1):
        for p in range(1, 65):
            if n >= limit + p and ids[n - limit : n] == ids[n - limit - p : n - p]:
                return n
    return None


def test_repetition_is_a_stop_reason_of_its_own_and_off_by_default():
    settings = {"forbidden": range(3), "vocab_size": 6, "temperature": 4.0, "stop": ()}
    make = functools.partial(sampler().sample, params_of("gemma3"), random_prompts(4, 9), n=20,
                             **settings)
    free = by_number(make())
    assert {r.stop for r in free.values()} == {"length"}
    ended = by_number(make(repetition=8))
    assert {r.stop for r in ended.values()} == {"length", "repetition"}
    for k, r in ended.items():
        n = first_repetition(free[k].ids.tolist(), 8)
        assert r.ids.tolist() == free[k].ids[:n].tolist()
        assert r.stop == ("repetition" if n else "length")


# ------------------------------------------------------------------------------------ work and flow


@pytest.mark.parametrize("n_devices, slots, n, chunk", [(1, 8, 4, 8), (8, 4, 16, 8), (1, 8, 1, 64)])
def test_slots_refill(n_devices, slots, n, chunk):
    """Long-tailed lengths (mean 34 of at most 64), a queue of ten times the slots.

    In the last case fewer prompts are cached than slots get free while the host is away.
    """
    n_prompts, stats = 10 * slots * n_devices // n, {}
    prompts = random_prompts(*[1 + i % 30 for i in range(n_prompts)])
    s = sampler(n_devices=n_devices, slots=slots, cached_prompts=4, chunk=chunk)
    rollouts = list(s.sample(params_of("gemma3"), prompts, n, stats=stats, **long_tailed()))
    lengths = np.array([len(r.ids) for r in rollouts])
    assert len(rollouts) == n_prompts * n and stats["tokens"] == lengths.sum()
    assert lengths.std() > 20
    assert stats["slot_steps"] <= 1.15 * lengths.sum()
    assert n_prompts <= stats["prefills"] <= (1 if n_devices == 1 else 1.5) * n_prompts


def test_a_prompt_is_prefilled_once_however_often_it_is_given():
    stats = {}
    prompts = random_prompts(4, 9) * 3
    list(sampler().sample(params_of("gemma3"), prompts, 3, stats=stats, **long_tailed()))
    assert stats["prefills"] == 2


def test_rollouts_are_handed_out_while_others_decode():
    stats, seen = {}, []
    s, prompts = sampler(), random_prompts(4, 9, 13)
    for r in s.sample(params_of("gemma3"), prompts, 8, stats=stats, **long_tailed()):
        seen.append((stats["rounds"], len(r.ids)))
    rounds = [n for n, _ in seen]
    assert rounds[0] <= 3 and rounds[-1] > 10 and len(set(rounds)) > 5
    # One that is dropped half way leaves nothing behind.
    again = functools.partial(s.sample, params_of("gemma3"), prompts, 8, **long_tailed())
    next(again())
    one, other = again(), again()
    mixed = [next(one), next(other)]
    assert tokens([mixed[0], *one]) == tokens([mixed[1], *other])


def test_nothing_is_compiled_after_the_first_call():
    compiled = []
    jax.monitoring.register_event_duration_secs_listener(
        lambda event, *_, **__: compiled.append(event) if "backend_compile" in event else None
    )
    jax.jit(lambda x: x + len(compiled))(1)
    assert compiled
    make = functools.partial(sampler(n_devices=8).sample, params_of("gemma3"))
    list(make(random_prompts(3), 2))
    before = len(compiled)
    list(make(random_prompts(40, 1, 33), 3, temperature=0.5, seed=4, stop=(7, 8), forbidden=(1, 2)))
    list(make({5: [1, 2]}, 5, temperature=0, step=2, max_new=9, vocab_size=90))
    assert len(compiled) == before


def test_caches_are_updated_in_place():
    """No operation of a compiled step copies a cache, and no temporary is as large as they are."""
    s = sampler(slots=7, max_prompt=11)
    function, args = s.programs(params_of("gemma3"))["decode"]
    compiled = function.lower(*args).compile()
    caches = args[-1]["cache"]["k"] + args[-1]["cache"]["v"]
    shapes = {"f32[" + ",".join(map(str, c.shape)) + "]" for c in caches}
    text = compiled.as_text()
    assert all(shape in text for shape in shapes)
    copied = [f"= {shape}" for shape in shapes]
    copies = [x for x in text.splitlines() if " copy(" in x and any(c in x for c in copied)]
    assert not copies, copies[0]
    state_bytes = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(args[-1]))
    assert compiled.memory_analysis().alias_size_in_bytes >= 0.99 * state_bytes


# ------------------------------------------------------------------------------------------ errors


@pytest.mark.parametrize("prompts, settings, message", [
    ([[]], {}, "prompt 0 has 0 tokens"),
    ([[1], [1] * 41], {}, "prompt 1 has 41 tokens .*expected 1 to 40"),
    ([[1, 96]], {}, "prompt 0 has 2 tokens with ids up to 96, expected .* below 96"),
    ([[1]], {"temperature": -0.5}, "temperature=-0.5, .*: expected 0"),
    ([[1]], {"temperature": float("nan")}, "temperature=nan"),
    ([[1]], {"top_p": 0.0}, "top_p=0.0"),
    ([[1]], {"min_p": 2.0}, "min_p=2.0"),
    ([[1]], {"max_new": 65}, "max_new=65, .*expected 1 to 64"),
])
def test_what_cannot_be_sampled_is_said_at_the_call(prompts, settings, message):
    with pytest.raises(ValueError, match=message):
        sampler().sample(params_of("gemma3"), prompts, **settings)


def test_the_length_of_the_context_and_the_dtype_are_checked():
    bf16 = jax.tree.map(lambda w: w.astype(jnp.bfloat16), params_of("gemma3"))
    with pytest.raises(ValueError, match="parameters in bfloat16: expected .* float32"):
        sampler().sample(bf16, [[1]])
    with pytest.raises(ValueError, match="expected 1 or more of each"):
        sampler(slots=0)
    short = dataclasses.replace(CFG["gemma3"], max_position_embeddings=20)
    with pytest.raises(ValueError, match="prompt 0 has 20 tokens .*expected 1 to 19"):
        Sampler(short, mesh_of(1), dtype=jnp.float32).sample(params_of("gemma3"), [[1] * 20])
    assert list(sampler().sample(params_of("gemma3"), [])) == []
