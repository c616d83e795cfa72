"""synthesize.py: pairs by rule, rows through every fault of a server, nothing paid for twice."""

import dataclasses
import json
import re
from collections import Counter
from contextlib import closing
from pathlib import Path

import numpy as np
import pytest
import tyro
from conftest import ROOT, lines
from test_judge import serving

import data
import disk
import packed
import problems
import rollouts
import synthesize
from synthesize import Pairs, Teacher, Traces, choose

TOK = data.Tokenizer(ROOT / "tiny")
CHAT = [{"role": "user", "content": " Hi "}, {"role": "assistant", "content": "Ho"},
        {"role": "user", "content": "And?"}]
N = 24


def write(path, rows):
    path.write_bytes(disk.to_jsonl(rows))
    return str(path)


def problems_of(rows, system=""):
    return [rollouts.read_problem(row, TOK, system) for row in rows]


# ----------------------------------------------------------------------------------------- pairs


def group(*scores, **more):
    return [{"sample": i, "completion": f"text {i}", "stop": "stop", "right": False, "reward": r}
            | more for i, r in enumerate(scores)]


def samples_of(pairs):
    return [(best["sample"], worst["sample"]) for best, worst in pairs]


@pytest.mark.parametrize("scores, margin, expected", [
    ((1, 3, None, 3, 1), 2, [(1, 0)]),  # of equal ones the first
    ((1, 3, None, 3, 1), 2.1, []),
    ((0.2, 0.3), 0.1, [(1, 0)]),  # as decimals, whatever their binary difference
    ((2, 2, 2), 0, []),  # a tie is no pair, without a margin either
    ((2, 2.5), 0, [(1, 0)]),
    ((None, None, 5), 0, []),  # missing is neither best nor worst
    ((None, -1, None, -2), 1, [(1, 3)]),
    ((), 0, []),
])
def test_best_and_worst(scores, margin, expected):
    assert samples_of(choose(group(*scores), margin)) == expected


def test_who_may_be_chosen_and_rejected():
    rows = group(0, 1, 5)
    rows[2]["stop"] = "length"  # its end was never seen: not chosen, and no reason to stop
    assert samples_of(choose(rows, 1)) == [(1, 0)]
    rows[2]["reward"] = -5  # but rejected
    assert samples_of(choose(rows, 1)) == [(1, 2)]
    rows[2]["completion"] = " \n"  # nothing to train on
    assert samples_of(choose(rows, 1)) == [(1, 0)]
    rows[1]["completion"] = "text 0 "  # the same text to the trainer
    assert choose(rows, 1) == []


def test_a_reference_goes_against_what_is_not_right():
    rows = group(0, 1, 1) + [{"sample": -1, "completion": "own", "stop": "stop", "right": True,
                              "reward": 1.5}]
    assert samples_of(choose(rows, 1)) == [(1, 0), (-1, 0)]
    own = rows[-1] | {"completion": "text 1"}
    assert samples_of(choose([*rows[:-1], own], 1)) == [(1, 0)]  # the same pair once
    rows[0]["right"] = True
    assert samples_of(choose(rows, 0.5)) == [(1, 0), (-1, 1)]
    assert samples_of(choose(rows, 1)) == [(1, 0)]  # the margin is of both
    for reward in (None, 0, 1):  # missing; worse; a tie
        rows[-1]["reward"] = reward
        assert samples_of(choose(rows, 0)) == [(1, 0)]


ROWS = [
    {"question": " Where is it? ", "choices": ["Rome", "Oslo"], "answer": "B"},
    {"question": "2 + 2?", "reasoning": "2 + 2 = 4.", "answer": "4"},
    {"question": "How many?", "answer": "He has 2 * 3 = <<2*3=6>>6.\n#### 6"},
    {"prompt": "Write <end_of_turn> a poem.", "rubrics": ["It rhymes."]},
    {"prompt": CHAT, "answer": "no"},
    {"messages": [*CHAT, {"role": "model", "content": "No."}]},
    {"messages": [{"role": "system", "content": "Rhyme."}, *CHAT[:1]], "answer": "Ho"},
    {"prompt": CHAT[:1], "completion": "Ho"},
]


@pytest.mark.parametrize("system", ["", "Be brief."])
def test_the_trainers_rebuild_the_prompt_that_was_sampled(system):
    for problem in problems_of(ROWS, system):
        prompt = synthesize.prompt_of(problem)
        assert not system or system not in json.dumps(prompt)
        pair = {"prompt": prompt, "chosen": "yes", "rejected": "no"}
        for example in packed.read_pair(pair, TOK, system)[:2]:
            assert example.prompt == np.array(problem.prompt, np.int32).tobytes()
        row = synthesize.training_row(problem, data.format_completion("It is so.", "4"))
        ids, mask, _ = packed.read_example(row, TOK, system)
        first = len(problem.prompt)
        assert rollouts.read_problem(row, TOK, system).prompt == problem.prompt
        assert tuple(ids[:first]) == problem.prompt and mask[first:].all()
        text = TOK.decode(ids[first:])
        assert text == data.format_completion("It is so.", problem.gold or "4")


def test_references_of_every_shape():
    own = [synthesize.reference_of(problem) for problem in problems_of(ROWS)]
    told = [data.format_completion("2 + 2 = 4.", "4"),
            data.format_completion("He has 2 * 3 = 6.", "6")]
    assert own == ["", *told, "", "", "No.", "", "Ho"]


def test_a_prompt_without_a_pair_says_why(tmp_path):
    problems = problems_of([{"question": "Why?"}] * 3)
    rows = [{"problem": i, "sample": j, "completion": "so " * n, "n_tokens": n, "stop": stop}
            for i, stop in enumerate(("stop", "length", "stop"))
            for j, n in enumerate((3, 5) if i < 2 else (3, 30))]
    config = Pairs(rewards="length", margin=0.5, max_new=30)
    found, rejects = synthesize.pairs(problems, rows, TOK, config)
    assert [(pair["chosen_sample"], pair["rejected_sample"]) for pair in found] == [(0, 1)]
    assert [row["reason"] for row in rejects] == ["margin", "cut"]
    assert rejects[0]["rewards"] == pytest.approx([-3 / 30, -5 / 30])


def mesh_config(tmp_path, name, **more):
    rows = [problems.word_problem("train", i) for i in range(6)]
    fields = dict(
        data=write(tmp_path / "rows.jsonl", rows), out=str(tmp_path / name), samples=4,
        system="Think.", temperature=1.4, slots=3, max_prompt=120, max_new=64, seed=1,
    )
    return fields | more


def test_pairs_of_the_model_itself_are_what_train_simpo_reads(tmp_path):
    made = lambda name, **more: synthesize.main(
        Pairs(**mesh_config(tmp_path, name, margin=0.1, reference=True,
                            rewards="format:0.5,answer:1,length:0.3") | more))
    file = made("whole")
    journal = (file.parent / "samples.jsonl").read_bytes()
    rows, rejects = lines(file), lines(file.parent / "rejects.jsonl")
    assert {row["chosen_sample"] for row in rows} > {-1} and len(rows) > 6
    config = Pairs(**mesh_config(tmp_path, "whole", rows=0))
    problems = {p.id: p for p in rollouts.load_problems(config, TOK)[0]}
    assert {row["id"] for row in rows} | {row["id"] for row in rejects} == {*problems}
    read_pair = lambda row: packed.read_pair(row, TOK, "Think.")
    (found,), _ = data.load(str(file), read_pair)
    for row, pair in zip(rows, found, strict=True):
        assert row["chosen_reward"] - row["rejected_reward"] >= 0.1 - 1e-9
        assert row["chosen_rewards"].keys() == {"format", "answer", "length"}
        for example in pair[:2]:
            assert example.prompt == np.array(problems[row["id"]].prompt, np.int32).tobytes()
    # another margin samples nothing; another seed is refused rather than mixed in
    assert len(lines(made("whole", margin=1.4))) < len(rows)
    assert (file.parent / "samples.jsonl").read_bytes() == journal
    with pytest.raises(SystemExit, match="--seed was 1"):
        made("whole", seed=2)


def test_a_model_that_answers_nothing_right_leaves_rejects_and_a_word_about_them(tmp_path, capsys):
    config = Traces(**mesh_config(tmp_path, "traces", rewards="length:-1", min_reward=0.1))
    synthesize.main(config)
    assert f"no rows to train on: {config.out}/rejects.jsonl says why" in capsys.readouterr().err
    rows, rejects = (lines(Path(config.out) / f"{name}.jsonl") for name in ("rows", "rejects"))
    assert len(rows) + len(rejects) == 24 and rejects
    source = {row["question"]: row for row in lines(tmp_path / "rows.jsonl")}
    for row in rows:
        assert source[row["question"]]["answer"] == row["answer"] and row["teacher"] == "tiny"
        assert row["difficulty"] == source[row["question"]]["difficulty"] and row["reward"] >= 0.1
    assert {row["reason"] for row in rejects} <= {"cut", "format", "wrong", "near-duplicate",
                                                  "reward", "length", "repetition"}


def test_all_completions_of_a_prompt_are_judged_by_one_request(tmp_path):
    """The row's own trace among them; of a prompt without a verdict nothing becomes a pair."""

    def answer(n, body):
        prompt = body["messages"][0]["content"]
        if "Why not?" in prompt:
            return {"status": 400}
        said = re.findall(r"Response (\d):\n\w+\n.*?It says (\d)", prompt, re.S)
        verdicts = [{"response": int(i), "score": int(d)} for i, d in said]
        return {"content": json.dumps({"responses": verdicts[::-1]})}

    rows = [{"question": q, "reasoning": "It says 4", "answer": "x", "rubrics": ["It is true."]}
            for q in ("Why?", "Why not?", "And why?")]
    problems = problems_of(rows)
    said = [["3", "1", "2"], ["9", "2", "9"], ["1", "5", "2"]]
    rows = [{"problem": i, "sample": j, "completion": f"It says {d}", "stop": "stop"}
            for i, digits in enumerate(said) for j, d in enumerate(digits)]
    with serving(answer) as server:
        config = Pairs(judge=server.url, rewards="judge", margin=0.5, out=str(tmp_path), max_new=9,
                       reference=True, judge_calls="group", judge_missing=0.9)
        made, (reject,) = synthesize.pairs(problems, rows, TOK, config)
        assert sum("Why not?" not in b["messages"][0]["content"] for b in server.bodies) == 2
    found = [(p["prompt"], p["chosen_sample"], p["rejected_sample"]) for p in made]
    assert found == [("Why?", 0, 1), ("Why?", -1, 1), ("And why?", 1, 0), ("And why?", -1, 0)]
    assert [p["chosen_reward"] for p in made] == [0.5, 0.75, 1, 0.75]
    assert reject["rewards"] == [None] * 4 and "HTTP 400" in reject["errors"]["judge"]


# ---------------------------------------------------------------------------------------- traces


def question(body):
    """The number of the question that a request asks."""
    return int(body["messages"][0]["content"].split("of card ")[1].split("?")[0])


def reply(i, sample=0):
    words = "first second third fourth fifth sixth".split()[sample]
    trace = f"By the {words} way the value of card {i} is {i} + {i} = {2 * i} dollars in all."
    return {"content": data.format_completion(trace, f"{2 * i} dollars"), "slow": 0.0}


CARDS = [{"question": f"What is the value of card {i}?", "answer": str(2 * i), "task_type": "math",
          "source": i} for i in range(N)]


def teacher_of(server, folder, **more):
    fast = {"threads": 8, "retries": 2, "request_s": 0.4}
    return Teacher(server.url, "m", cache=folder / "replies", **fast | more)


def traces_of(teacher, config=None, rows=CARDS):
    config = synthesize.resolve(config or Traces(teacher=teacher.url, data="rows.jsonl"))
    problems = problems_of(rows)
    with closing(teacher):
        replies = synthesize.ask(teacher, problems, config)
    return synthesize.traces(problems, replies, TOK, config)


def test_faults_of_a_server_and_every_row_once(tmp_path):
    """Some questions meet a fault once, some always; only the latter get no reply."""
    once = {1: {"status": 500}, 5: "hang up", 6: "never", 9: {"text": '{"choices": [{"mess'}}
    always = {3: {"status": 500}, 4: {"text": ""}, 7: {"status": 400, "text": "I will not"}}
    asked = Counter()

    def answer(n, body):
        i = question(body)
        asked[i] += 1
        fault = always.get(i) or (once.get(i) if asked[i] == 1 else None)
        return fault or reply(i) | {"slow": 0.01 * (i % 5)}  # out of order, and slowly

    with serving(answer) as server:
        rows, rejects = traces_of(teacher_of(server, tmp_path))
        assert [row["source"] for row in rows] == [i for i in range(N) if i not in always]
        details = {row["problem"]: row["detail"] for row in rejects}
        assert [*details] == [*always] and {row["reason"] for row in rejects} == {"no reply"}
        assert "HTTP 500" in details[3] and "JSON" in details[4] and "I will not" in details[7]
        # again: the same rows, and requests for what had no reply alone
        before = Counter(asked)
        lost = {*always}
        always.clear()
        again, rejects = traces_of(teacher_of(server, tmp_path))
        assert not rejects and {*(asked - before)} == lost
        assert [row for row in again if row["source"] not in lost] == rows
    file = write(tmp_path / "rows.jsonl", again)
    read_example = lambda row: packed.read_example(row, TOK, data.SYSTEM)
    (found,), _ = data.load(file, read_example)
    assert len(found) == N
    assert again[1] == {
        "question": "What is the value of card 1?", "answer": "2", "task_type": "math",
        "reasoning": "By the first way the value of card 1 is 1 + 1 = 2 dollars in all.",
        "source": 1, "teacher": server.url,
    }


def test_limits_hold_over_sessions(tmp_path):
    tokens = {"prompt_tokens": 1000, "completion_tokens": 500, "total_tokens": 3000}

    def answer(n, body):
        message = {"content": reply(question(body))["content"]}
        return {"text": json.dumps({"choices": [{"message": message}], "usage": tokens})}

    run = lambda name, **more: traces_of(teacher_of(server, tmp_path / name, **more))
    with serving(answer) as server:
        for limit, n_rows in ((5, 5), (8, 8)):
            rows, rejects = run("limit", limit=limit, threads=1)
            assert len(rows) == len(server.bodies) == n_rows and len(rejects) == N - n_rows
            assert f"all {limit} requests of --limit are spent" in rejects[-1]["detail"]
        before = len(server.bodies)
        # 1,000 tokens at 1 dollar, 2,000 with the hidden ones at 2 dollars a million
        for budget, n_rows in ((0.015, 3), (0.021, 5)):
            rows, rejects = run("budget", budget=budget, price=(1.0, 2.0), threads=1)
            assert len(rows) == len(server.bodies) - before == n_rows
            assert f"all {budget} dollars of --budget are spent" in rejects[-1]["detail"]
            with (tmp_path / "budget" / "replies").open("ab") as file:  # a torn line
                for dollars in ("-1.0", "NaN", "1e999", '"9"', "[]"):
                    file.write(b'{"dollars": %s}\n' % dollars.encode())
                file.write(b'{"doll')


def test_a_server_that_is_gone_is_left_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(synthesize, "GIVE_UP", 4)
    with serving(lambda n, body: {"status": 500} if n >= 6 else reply(question(body))) as server:
        rows, rejects = traces_of(teacher_of(server, tmp_path, threads=2, retries=1))
        assert len(rows) == 6 and len(rejects) == N - 6
        assert len(server.bodies) <= 6 + 2 * 6  # four, and what was under way then
        assert "not asked for, as 4 others had no reply" in rejects[-1]["detail"]


def test_every_reason_to_leave_a_trace_out(tmp_path):
    say = data.format_completion
    good = "Half of 24 is 12, and then 3 more make 12 + 3 = 15 cards."
    cases = [
        (say(good, "15"), None),
        (say(good.upper().replace(",", " ,"), "$15"), "near-duplicate"),
        (say("First take 24 / 2 = 12 for the half. Adding 3 gives the total of 15.", "15"), None),
        (f"<think>Hm.</think>\n{say('Twelve is one half of the cards; plus three: 15.', '15')}",
         None),
        (say(good, "16"), "wrong"),
        ("15", "format"), ("", "format"), (say(good, "15") + " Bye.", "format"),
        (say("So 15 it is.", "15"), "length"),
        (say("It is more than 3 and less than this. " * 20, "15"), "repetition"),
        (say("15 cards! 15 cards! 15 cards! 15 cards!", "15"), "repetition"),
        (say("wait " * 3000, "15"), "length"),
    ]
    row = {"question": "24 cards, half are lost, 3 found. How many?", "answer": 15}
    with serving(lambda n, body: {"content": cases[n][0]}) as server:
        config = Traces(teacher=server.url, data="rows.jsonl", samples=len(cases), seed=3,
                        min_length=10)
        made, rejects = traces_of(teacher_of(server, tmp_path, threads=1), config, [row])
        reasons = {row["sample"]: row["reason"] for row in rejects}
        assert reasons == {i: why for i, (_, why) in enumerate(cases) if why}
        assert len(made) == 3 and {row["answer"] for row in made} == {"15"}
        assert "are those of sample 0" in rejects[0]["detail"]
        # the same question elsewhere in the data shares its replies, and so its duplicates
        n = len(server.bodies)
        twice, rejects = traces_of(teacher_of(server, tmp_path, threads=1), config, [row, row])
        assert twice == made and len(server.bodies) == n
        assert len(rejects) == 2 * len(cases) - 3
        # with a score to reach: the judge's own server is asked about the kept ones only
        verdicts = iter([2, 9, 9])
        with serving(lambda n, body: {"content": json.dumps({"score": next(verdicts)})}) as other:
            config = dataclasses.replace(
                config, rewards="judge", min_reward=0.8, judge=other.url, judge_style="implicit",
                judge_threads=1, out=str(tmp_path))
            best, rejects = traces_of(teacher_of(server, tmp_path, threads=1), config, [row])
        assert [row["reasoning"] for row in best] == [row["reasoning"] for row in made[1:]]
        assert rejects[0]["reason"] == "reward" and rejects[0]["sample"] == 0
        trace = "Here, to be clear, the result of it all must be nothing but: fifteen."
        (problem,) = problems_of([row | {"answer": trace, "kind": "text"}])
        row = {"completion": say(trace, trace), "stop": "stop"}
        assert synthesize.fault(problem, row, config)[0] == "no reasoning"
        assert synthesize.fault(problem, row | {"stop": "length"}, config)[0] == "cut"


# ------------------------------------------------------------------------------ flags and formats


def test_flags():
    command = "traces --teacher http://h/v1 --data x.jsonl --price 0.3 2.5 --budget 1".split()
    config = synthesize.resolve(tyro.cli(synthesize.Config, args=command))
    assert isinstance(config, Traces) and config.price == (0.3, 2.5) and config.max_new == 2048
    assert config.system == data.SYSTEM and config.slots is None
    config = synthesize.resolve(tyro.cli(synthesize.Config, args=["pairs", "--reference"]))
    assert isinstance(config, Pairs) and config.reference and config.data == "problems"
    for bad, match in (
        (Traces(teacher="http://h/v1"), "--data is missing"),
        (Traces(teacher="http://h/v1", data="x", top_k=5), "--top-k 5 is not for a --teacher"),
        (Traces(limit=5), "--limit 5 needs a --teacher"),
        (Traces(teacher="http://h/v1", data="x", budget=5.0), "--budget 5 needs --price"),
        (Traces(teacher="http://h/v1", data="x", budget=np.nan), "--budget nan: expected 0"),
        (Traces(teacher="http://h/v1", data="x", price=(1.0, -1.0)), "--price .*-1.0.: expected 0"),
        (Traces(teacher="http://h/v1", data="x", limit=-1), "--limit -1: expected 0"),
        (Traces(teacher="http://h/v1", data="x", teacher_threads=0), "--teacher-threads 0: exp"),
        (Traces(teacher="http://me:sk@h/v1", data="x"), "--teacher: expected http.*TEACHER_API"),
        (Pairs(judge="https://me:sk@h/v1", rewards="judge"), "--judge: expected http.*JUDGE_API"),
        (Pairs(samples=1), "--samples 1: expected 2"),
        (Pairs(model="gemma9"), "--model gemma9: expected one of gemma2"),
        (Pairs(model="tinyx"), "--model tinyx: expected one of gemma2"),
    ):
        with pytest.raises(ValueError, match=match):
            synthesize.resolve(bad)
