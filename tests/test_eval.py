"""eval.py: the statistics by hand and by scipy, every kind of row, and whole runs."""

import dataclasses
import itertools
import json
from types import SimpleNamespace

import jax
import numpy as np
import pytest
from conftest import ROOT, lines
from test_judge import serving

import data
import eval as evaluation
import gemma
import lora
import problems
import rewards
import rollouts
from sampler import Rollout

TINY = gemma.Config(
    "gemma3_text", 768, 32, 48, 2, 4, 2, 16, 16, 16, (False, True), 1e4, 1e6,
    max_position_embeddings=256, eos_token_id=(1, 11),
)
TOK = data.Tokenizer(ROOT / "tiny")


# ------------------------------------------------------------------------------------ statistics


def test_pass_at_k_is_the_share_of_draws_with_a_right_one():
    assert evaluation.pass_at_k(4, 1, 2) == 0.5
    assert evaluation.pass_at_k(5, 0, 3) == 0.0 and evaluation.pass_at_k(5, 3, 3) == 1.0
    for n, c in itertools.product(range(1, 7), range(7)):
        for k in range(1, n + 1) if c <= n else ():
            draws = [any(i < c for i in draw) for draw in itertools.combinations(range(n), k)]
            assert evaluation.pass_at_k(n, c, k) == pytest.approx(np.mean(draws))
    for k in (5, 0, -1):
        with pytest.raises(ValueError, match=f"pass@{k} of 4"):
            evaluation.pass_at_k(4, 1, k)


def test_ties_of_a_vote_count_as_the_share_that_is_right():
    vote = evaluation.majority
    assert vote(["a", "a", "b"], [True, True, False]) == 1.0
    assert vote(["a", "b", "b"], [True, False, False]) == 0.0
    assert vote(["a", "b", "b", "a", "c"], [True, False, False, True, False]) == 0.5
    assert vote(["a", "b", "c"], [False, False, True]) == pytest.approx(1 / 3)
    assert vote(["a", None, None], [True, False, False]) == 1.0  # no answer, no vote
    assert vote([None, None], [False, False]) == 0.0


def test_bootstrap_is_scipys():
    stats = pytest.importorskip("scipy.stats")
    values = np.random.default_rng(2).random(300) ** 3  # skewed
    ci = stats.bootstrap((values,), np.mean, n_resamples=4000, method="percentile",
                         random_state=1).confidence_interval
    np.testing.assert_allclose(evaluation.bootstrap(values), (ci.low, ci.high), atol=4e-3)


def test_intervals_and_mcnemar_are_scipys():
    stats = pytest.importorskip("scipy.stats")
    for c, n in ((0, 7), (3, 7), (7, 7), (500, 1319)):
        ci = stats.binomtest(c, n).proportion_ci(method="wilson")
        np.testing.assert_allclose(rollouts.wilson(c, n), (ci.low, ci.high), atol=1e-12)
    for wins, losses in ((5, 0), (10, 4), (3, 9), (120, 80)):
        p = stats.binomtest(wins, wins + losses).pvalue
        assert evaluation.mcnemar(wins, losses) == pytest.approx(p)


# -------------------------------------------------------------------------------------- problems


GSM8K = {"question": "How many?", "answer": "He has 2 * 3 = <<2*3=6>>6.\n#### 6"}
CHAT = [{"role": "user", "content": "Hi"}, {"role": "assistant", "content": "Ho"}]


@pytest.mark.parametrize("row, gold, kind", [
    (GSM8K, "6", "number"), ({"question": "How many?", "answer": 6}, "6", "number"),
    ({"question": "Where?", "answer": "Oslo"}, "Oslo", "text"),
    ({"question": "Who?", "answer": ["Ann", "Bo"]}, "Ann, Bo", "list"),
    ({"question": "Who?", "answer": "42", "kind": "text"}, "42", "text"),
    ({"question": "?", "choices": ["Rome", "Oslo"], "answer": "B"}, "B", "choice"),
    ({"question": "?", "choices": ["Rome", "Oslo"], "answer": "Oslo"}, "B", "choice"),
    ({"question": "?", "choices": [4, 5], "answer": 1}, "B", "choice"),
    ({"prompt": "Write a poem.", "rubrics": ["It rhymes."]}, None, "auto"),
    ({"question": "Why?", "reference": "Because."}, None, "auto"),
    ({"prompt": "2?", "completion": data.format_completion("1+1", "2")}, "2", "number"),
    ({"prompt": CHAT[:1], "completion": "Ho"}, None, "auto"), ({"messages": CHAT}, None, "auto"),
    ({"messages": CHAT[:1], "answer": "yes"}, "yes", "boolean"),
])
def test_rows_of_every_shape(row, gold, kind):
    problem = rollouts.read_problem(row, TOK)
    assert (problem.gold, problem.kind, problem.domain) == (gold, kind, "")
    assert problem.prompt[-1] == TOK.encode("\n")[-1] and TOK.decode(problem.prompt)


def test_choices_are_shown():
    row = {"question": "Where is it?", "choices": ["Rome", "Oslo"], "answer": "B", "domain": "geo"}
    problem = rollouts.read_problem(row, TOK)
    assert problem.question == "Where is it?\nA) Rome\nB) Oslo" and problem.domain == "geo"
    assert problem.id == rollouts.read_problem(row, TOK, "Be brief.").id  # whatever the system text


@pytest.mark.parametrize("row, complaint", [
    ({"text": "?"}, "expected messages, prompt or question"),
    ({"question": ""}, "expected messages, prompt or question"),
    ({"question": "?", "answer": " "}, "expected a text, a number or a list"),
    ({"question": "?", "choices": ["a", "b"], "answer": "Z"}, "none of the 2 choices"),
    ({"question": "?", "choices": "ab", "answer": "a"}, "expected a list of .*choices"),
    ({"messages": []}, "expected messages"),
    ({"messages": [{"role": "user", "content": [{"type": "text"}]}]}, "expected a text and a"),
    ({"question": "?", "answer": "1", "kind": "maths"}, "kind 'maths'"),
    ({"question": "many " * 99, "answer": "1"}, "more than --max-prompt 64"),
])
def test_bad_rows_are_named_or_counted(row, complaint, tmp_path):
    file = tmp_path / "rows.jsonl"
    good = {"question": "How many?", "answer": "1"}
    file.write_text("".join(json.dumps(r) + "\n" for r in (good, row, good)))
    config = evaluation.Config(data=str(file), system="Think.", max_prompt=64, rows=0)
    with pytest.raises(ValueError, match=f"rows.jsonl:2: .*{complaint}"):
        rollouts.load_problems(config, TOK)
    config = dataclasses.replace(config, skip_bad_rows=True)
    problems, bad = rollouts.load_problems(config, TOK)
    assert len(problems) == 2 and len({p.id for p in problems}) == 2 and len(bad) == 1


# ---------------------------------------------------------------------------------------- grading


class Parrot:
    """Stands in for a Sampler: says what it is told, in an order of its own."""

    def __init__(self, greedy, sampled):
        self.texts = {0.0: greedy, 1.0: sampled}

    def sample(self, params, prompts, n, *, temperature, **_):
        for p in reversed(list(prompts)):
            texts = self.texts[temperature][p]
            for i in reversed(range(n)):
                ids = np.array([*TOK.encode(texts[i]), TOK.end_of_turn])
                yield Rollout(
                    p, i, ids, np.zeros(len(ids)), "length" if "cut" in texts[i] else "stop"
                )


def complete(parrot, problems, greedy=True, samples=0):
    config = evaluation.Config(samples=samples)
    return evaluation.complete(parrot, (None, None), TOK, problems, config, greedy)


def said(answer):
    return data.format_completion("So", answer)


ROWS = [
    {"question": "How many?", "answer": "6", "task_type": "math"},
    {"question": "How much?", "answer": "7", "task_type": "math"},
    {"question": "Where?", "choices": ["Rome", "Oslo"], "answer": "B", "task_type": "geo"},
    {"prompt": "A poem.", "rubrics": ["It rhymes."], "task_type": "poems"},
]
PROBLEMS = [rollouts.read_problem(row, TOK) for row in ROWS]
PARROT = Parrot(
    [[said("6")], ["It is 7."], [said("A")], [said("Roses")]],
    [[said("6"), said("6.0"), said("5"), "6, cut"], [said("7"), said("8"), said("8"), said("7")],
     ["Oslo", "Rome", "cut", "Oslo"], ["Roses"] * 4])


@pytest.mark.smoke
def test_every_metric_by_hand():
    rows = complete(PARROT, PROBLEMS, samples=4)
    results = evaluation.summarize(rows)
    assert [(r["problem"], r["mode"], r["sample"]) for r in rows[:6]] == [
        (0, "greedy", 0), *((0, "sampled", i) for i in range(4)), (1, "greedy", 0)
    ]
    expected = {
        "n": 4, "n_graded": 3, "pass@1": 2 / 3, "pass@1_tags": 1 / 3, "format": 3 / 4,
        "pass@1_sampled": (3 + 2 + 2) / 12, "pass@1_sampled_tags": (2 + 2 + 0) / 12,
        "pass@2": (1 + 5 / 6 + 5 / 6) / 3, "pass@4": 1.0, "pass@4_tags": 2 / 3,
        "maj@4": (1 + 0.5 + 1) / 3, "maj@4_tags": (1 + 0.5) / 3,
        "format_sampled": 7 / 16, "stop_stop": 1.0, "stop_length": 0.0,
        "stop_length_sampled": 2 / 16, "stop_repetition": 0.0,
        "length": np.mean([r["n_tokens"] for r in rows if r["mode"] == "greedy"]),
    }
    assert {k: results[k] for k in expected} == pytest.approx(expected)
    assert results["intervals"]["pass@1"] == rollouts.wilson(2, 3)
    low, high = results["intervals"]["pass@2"]
    assert low <= results["pass@2"] <= high
    math, geo, poems = (results["domains"][d] for d in ("math", "geo", "poems"))
    assert (math["n"], math["pass@1"], geo["pass@1"]) == (2, 1.0, 0.0)
    assert poems["n_graded"] == 0 and "pass@1" not in poems and poems["format_sampled"] == 0.0
    text = evaluation.table(results)
    assert "66.7  [" in text and "poems" in text


def test_scores_are_means_of_what_was_scored():
    """By hand: a reward for the first letter, one that fails for "cut", one for rows with gold."""
    rows = complete(PARROT, PROBLEMS, samples=4)
    for row in rows:
        parts = {"a": None if "cut" in row["completion"] else float(row["sample"])}
        parts |= {"b": float(row["correct"])} if row["correct"] is not None else {}
        total = None if None in parts.values() else sum(parts.values())
        row |= {"reward": total, "rewards": parts, "errors": {}}
    results = evaluation.summarize(rows)
    # of the samples of a problem: numbers 0 to 3, the fourth and the third of two of them cut
    a = [(0 + 1 + 2) / 3, 6 / 4, (0 + 1 + 3) / 3, 6 / 4]
    b = [3 / 4, 2 / 4, 2 / 4]
    right = [2 / 3, 2 / 4, 2 / 3]  # of those with a total
    expected = {"reward_a_sampled": np.mean(a), "reward_b_sampled": np.mean(b),
                "reward_sampled": np.mean([x + y for x, y in zip(a, [*right, 0], strict=True)]),
                "missing_sampled": 2 / 16, "missing": 0.0, "reward_a": 0.0,
                "reward": (1 + 1 + 0 + 0) / 4}
    assert {k: results[k] for k in expected} == pytest.approx(expected)
    poems = results["domains"]["poems"]
    assert poems["reward_sampled"] == 1.5 and "reward_b" not in poems
    assert "reward_a_sampled           1.333 [" in evaluation.table(results).replace("  [", " [")
    for row in rows:  # a problem of which nothing was scored is in no mean
        row["reward"] = None if row["problem"] == 3 else row["reward"]
    results = evaluation.summarize(rows)
    assert results["reward"] == pytest.approx(2 / 3) and results["missing"] == 1 / 4
    assert "reward" not in results["domains"]["poems"]


def test_without_greedy_the_samples_are_pass_at_1_and_without_gold_there_is_none():
    results = evaluation.summarize(complete(PARROT, PROBLEMS, greedy=False, samples=4))
    assert results["pass@1"] == pytest.approx(7 / 12) and "pass@1_sampled" not in results
    results = evaluation.summarize(complete(PARROT, PROBLEMS[3:]))
    assert (results["pass@1"], results["n"], results["n_graded"]) == (None, 1, 0)


def test_a_comparison_pairs_the_problems_both_have():
    better = Parrot([[said("6")], ["It is 7."], [said("B")], [said("Roses")]], PARROT.texts[1.0])
    ours = complete(better, PROBLEMS)
    # the other run saw the problems in another order, one of them not at all, and sampled too
    shuffled = Parrot([PARROT.texts[0.0][i] for i in (2, 0, 3)],
                      [PARROT.texts[1.0][i] for i in (2, 0, 3)])
    problems = [PROBLEMS[i] for i in (2, 0, 3)]
    theirs = complete(shuffled, problems, samples=4)
    pairs = evaluation.compare(ours, theirs)
    assert pairs["n"] == 3
    expected = dict(n=2, this=1.0, other=0.5, difference=0.5, wins=1, losses=0, p=1)
    assert {k: pairs["pass@1"][k] for k in expected} == expected
    assert pairs["format"]["difference"] == 0
    assert "p" not in pairs["length"] and "maj@4" not in pairs
    assert "1 won, 0 lost" in evaluation.table(evaluation.summarize(ours) | {"compare": pairs})
    with pytest.raises(ValueError, match="none of its 1 problems"):
        evaluation.compare(ours, theirs[:0] + [theirs[0] | {"id": "another"}])


def test_the_verdict_and_the_summary_by_hand():
    pair = dict(n=40, other=0.5, this=0.6, difference=0.1, interval=(0.02, 0.18))
    sentence = lambda **pairs: evaluation.sentence({"n": 50} | pairs)
    assert sentence(**{"pass@1": pair | {"p": 0.031}, "format": pair}) == (
        "Accuracy rose: 50.0 % -> 60.0 %, +10.0 points [+2.0, +18.0] on 40 problems, McNemar p "
        "0.031.")
    fell = pair | dict(this=0.4, difference=-0.1, interval=(-0.18, -0.02))
    assert sentence(format=fell) == (
        "Format fell: 50.0 % -> 40.0 %, -10.0 points [-18.0, -2.0] on 40 problems.")
    for change in (dict(p=0.051), dict(interval=(-0.02, 0.22))):  # p decides where there is one
        assert sentence(**{"pass@1": pair | change}).startswith(
            "Accuracy is unchanged as far as one can tell: 50.0 % -> 60.0 %, +10.0 points [")
    measured = {"pass@1": (0.5, 0.25, 0.75), "pass@1_sampled": (0.375, 0.2, 0.55),
                "maj@4": (0.625, 0.3, 0.9), "stop_length": (0.0625, 0.01, 0.2),
                "format": (1.0, 0.8, 1.0), "length": (81.25, 70, 93.5),
                "reward": (1.25, 1.0, 1.5)}
    results = {k: value for k, (value, *_) in measured.items()} | {
        "n": 16, "n_graded": 12, "intervals": {k: ends for k, (_, *ends) in measured.items()}}
    text = """\
16 problems, 12 with an answer to check; 95 % intervals in brackets
  greedy     50.0 %      [25.0, 75.0]
  sampled    37.5 %      [20.0, 55.0]
  maj@4      62.5 %      [30.0, 90.0]
  format    100.0 %      [80.0, 100.0]
  length     81.2 tokens [70.0, 93.5]
  cut         6.2 %      [1.0, 20.0]
  reward    1.250        [1.000, 1.500]"""
    assert evaluation.summary(results) == text
    whole = text.replace("  cut         6.2 %      [1.0, 20.0]\n", "")
    assert evaluation.summary(results | {"stop_length": 0.0}) == whole


def test_the_pace_leaves_out_the_round_that_compiled(monkeypatch):
    """Its two completions come half a second apart; those of later rounds, later."""
    bars, times, tqdm = [], iter([100.0, 100.5, 130.0, 160.0]), evaluation.tqdm
    monkeypatch.setattr(evaluation, "tqdm", lambda **k: bars.append(tqdm(**k)) or bars[0])
    monkeypatch.setattr(evaluation, "time", SimpleNamespace(time=lambda: next(times)))
    complete(PARROT, PROBLEMS)
    assert (bars[0].start_t, bars[0].initial, bars[0].n) == (100.5, 2, 4)


# -------------------------------------------------------------------------------------- whole runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A random tiny model, an adapter trained under a system text, and rows of two domains."""
    folder = tmp_path_factory.mktemp("model")
    noise = lambda shape: np.random.default_rng(0).normal(0, 0.2, shape).astype("f4")
    params = jax.tree.map(lambda spec: noise(spec.shape(TINY)), gemma.specs(TINY))
    gemma.save(folder / "base", TINY, params)
    TOK.save(folder / "base")
    a_shape, b_shape = lora.shapes(gemma.LINEARS["q_proj"], TINY, 2)
    adapter = {"a": noise(a_shape), "b": noise(b_shape), "scale": np.full(2, 0.5, "f4")}
    adapter = {part: {"q_proj": array} for part, array in adapter.items()}
    lora.save(folder / "adapter", adapter, TINY)
    lora.write_prompt(folder / "adapter", "Be brief.")
    rows = [problems.word_problem("test", i) for i in range(4)] + ROWS[2:]
    (folder / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


@pytest.fixture
def config(folder, tmp_path):
    return evaluation.Config(
        weights=str(folder / "base"), data=str(folder / "rows.jsonl"), out=str(tmp_path / "out"),
        samples=2, max_new=8, max_prompt=128, slots=1, top_k=40,
    )


@pytest.mark.smoke
def test_end_to_end(config, tmp_path, monkeypatch, capsys):
    results = evaluation.main(config)
    printed = capsys.readouterr().out
    out = tmp_path / "out"
    assert json.loads((out / "results.json").read_text()) == json.loads(json.dumps(results))
    assert {"pass@1", "format", "n"} <= results.keys() and results["n"] == 6
    assert printed == evaluation.summary(results) + "\n" and "poems" not in printed
    everything = evaluation.table(results)
    assert "6 problems, 5 with an answer to check" in everything and "poems" in everything
    rows = lines(out / "samples.jsonl")
    assert len(rows) == 6 * 3 and results == evaluation.summarize(rows)
    assert len({r["completion"] for r in rows}) > 10
    monkeypatch.setattr(evaluation, "grade", None)  # calling it would fail
    assert evaluation.main(config) == results  # nothing is left to sample


def test_an_adapter_brings_its_system_text_and_can_be_compared(config, folder, tmp_path):
    config = dataclasses.replace(config, samples=0, rows=2)
    evaluation.main(config)
    tuned = dataclasses.replace(
        config, adapter=str(folder / "adapter"), out=str(tmp_path / "tuned"), compare=config.out
    )
    results = evaluation.main(tuned)
    assert results["compare"]["n"] == 2 and "p" in results["compare"]["pass@1"]
    assert json.loads((tmp_path / "tuned/config.json").read_text())["system"] == "Be brief."
    # the folder belongs to what it was begun with
    with pytest.raises(SystemExit, match="checksum of .* was"):
        evaluation.main(dataclasses.replace(config, adapter=tuned.adapter))
    with pytest.raises(SystemExit, match="--max-new was 8 .* now it is 4"):
        evaluation.main(dataclasses.replace(config, max_new=4))
    with pytest.raises(ValueError, match="finished evaluation"):
        evaluation.main(dataclasses.replace(config, compare=str(tmp_path)))


def test_rewards_and_a_judge(config, tmp_path, monkeypatch, capsys):
    """Free-form rows get a score; another judge samples nothing; a lost verdict is missing."""
    monkeypatch.setenv("JUDGE_API_KEY", "sk-of-this-evaluation")
    lost = lambda body: "It rhymes." in body["messages"][0]["content"]

    def answer(n, body):
        return {"status": 400} if lost(body) else {"content": json.dumps({"score": 4})}

    with serving(answer) as server:
        scored = dataclasses.replace(
            config, rewards="judge:0.6,format:0.2,answer:0.2", judge=server.url, judge_missing=0.9
        )
        results = evaluation.main(scored)
        assert len(server.bodies) == 6 * 3 + sum(map(lost, server.bodies)) // 2
    printed = capsys.readouterr().out
    rows = lines(tmp_path / "out/samples.jsonl")
    for row in rows:
        missing = row["domain"] == "poems"
        assert ("HTTP 400" in row["errors"].get("judge", "")) == missing == (row["reward"] is None)
        assert missing or row["reward"] == pytest.approx(
            0.6 * 0.75 + 0.2 * row["format"] + 0.2 * row["correct"]
        )
    assert results["reward_judge"] == 0.75 and results["missing"] == pytest.approx(1 / 6)
    assert results == evaluation.summarize(rows) and "reward " in printed
    for file in (tmp_path / "out").rglob("*.json*"):
        assert "sk-of-this-evaluation" not in file.read_text(), file
    again = evaluation.main(dataclasses.replace(scored, rewards="format:2", judge=None))
    assert again["reward"] == 2 * results["format"] and "reward_judge" not in again
    same = lines(tmp_path / "out/samples.jsonl")
    assert [row["completion"] for row in same] == [row["completion"] for row in rows]


def test_defaults():
    config = evaluation.resolve(evaluation.Config(model="gemma3-1b", samples=8))
    assert (config.samples, config.data, config.dtype) == (8, "gsm8k:test", "bfloat16")
    assert config.system is data.SYSTEM and all(tag in data.SYSTEM for tag in rewards.TAGS)
