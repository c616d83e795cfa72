"""Word problems: reproducible, disjoint by arithmetic, right in every step, as long as planned."""

import hashlib
import json
import re

import pytest

from data import format_completion
from problems import DIRECT, LARGEST, split_of, word_problem

N = 8_000
WORDS = {"twice": 2, "half": 2, "Half": 2}  # numbers that a question spells


@pytest.fixture(scope="module")
def problems():
    return {split: [word_problem(split, i) for i in range(N)] for split in ("train", "test")}


def chain(problem):
    """The arithmetic of a problem: [(left, sign, right, result)], from its solution."""
    equations = re.findall(r"(\d+) ([-+*/]) (\d+) = (\d+)", problem["solution"])
    return [(int(a), sign, int(b), int(c)) for a, sign, b, c in equations]


# A change of these rows changes the data of every model trained on them: say so in the commit.
@pytest.mark.parametrize(
    ("split", "digest"), [("train", "0b109ccdea2d17ef"), ("test", "51757fa925660a18")]
)
def test_the_same_everywhere(split, digest):
    rows = json.dumps([word_problem(split, i) for i in range(100)], sort_keys=True)
    assert hashlib.sha256(rows.encode()).hexdigest()[:16] == digest


def test_unknown_split():
    with pytest.raises(ValueError, match="valid"):
        word_problem("valid", 0)


def test_splits_share_no_arithmetic(problems):
    """Not one chain of equations in common, hence no question either; the rule is split_of."""
    for split, rows in problems.items():
        assert all(split_of(p["solution"]) == split for p in rows)
    chains = {split: {tuple(chain(p)) for p in rows} for split, rows in problems.items()}
    questions = {split: {p["question"] for p in rows} for split, rows in problems.items()}
    assert not chains["train"] & chains["test"]
    assert not questions["train"] & questions["test"]
    assert len(questions["train"]) > 0.97 * N and len(questions["test"]) > 0.95 * N


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_step_is_right(problems, split):
    """Each equation holds, its operands are given or were just computed, the last is the answer."""
    for problem in problems[split][:5000]:
        equations = chain(problem)
        question = problem["question"]
        given = [int(n) for n in re.findall(r"\d+", question)]
        given += [WORDS[word] for word in re.findall(r"\w+", question) if word in WORDS]
        known, unused = set(given), set(given)
        for a, sign, b, c in equations:
            truth = {"+": a + b, "-": a - b, "*": a * b, "/": a / b}[sign]
            assert c == truth and 2 <= c <= LARGEST, problem
            assert {a, b} <= known, problem
            unused -= {a, b}
            known.add(c)
        assert not unused, problem  # no number of the question is left over
        assert problem["answer"] == str(equations[-1][3])
        assert problem["difficulty"] == len(equations)


@pytest.mark.parametrize("split", ["train", "test"])
def test_every_other_trace_says_the_last_result_alone(problems, split):
    direct = [p for p in problems[split] if p["reasoning"] != p["solution"]]
    assert len(direct) / N == pytest.approx(DIRECT, abs=0.015)
    for p in direct:
        assert "=" not in p["reasoning"] and p["reasoning"].count(".") == 1, p
        assert re.findall(r"\d+", p["reasoning"])[-1] == p["answer"], p
    assert {p["difficulty"] for p in direct} == {1, 2, 3, 4, 5}


def test_reads_as_english(problems):
    """No slot left open, whole sentences, one hero with one pronoun, nobody compared to himself."""
    he, she = re.compile(r"\b(He|he|him|His)\b"), re.compile(r"\b([Ss]he|[Hh]er)\b")
    compared = re.compile(r"(\w+) (?:has|is) [^.?]* (?:than|as) (\w+)\.")
    for problem in problems["train"]:
        question = problem["question"]
        text = f"{question} {problem['solution']} {problem['reasoning']}"
        assert not re.search(r"[{}\[\]|]|  ", text), problem
        assert question.endswith("?") and question.count("?") == 1 and text.endswith(".")
        assert all(re.match("[A-Z0-9]", sentence) for sentence in re.split(r"[.?] ", text)), problem
        assert not (he.search(text) and she.search(text)), problem
        assert all(a != b for a, b in compared.findall(question)), problem
        assert not re.search(r"\b[01] [a-z]", text), problem  # "1 cards"


def test_difficulty_and_length(problems):
    """What the tiny model's sequence length and curriculum count on."""
    rows = problems["train"]
    share = [sum(p["difficulty"] == d for p in rows) / N for d in range(1, 6)]
    assert share == pytest.approx([0.15, 0.30, 0.30, 0.17, 0.08], abs=0.015)
    n_chars = sorted(
        len(p["question"] + format_completion(p["solution"], p["answer"])) for p in rows
    )
    assert 200 < sum(n_chars) / N < 260 and n_chars[int(0.99 * N)] < 400 and n_chars[-1] < 450
    answers = [p["answer"] for p in rows]
    assert max(map(answers.count, set(answers))) < 0.05 * N  # no answer is a good guess
    words = {word for p in rows for word in re.findall("[A-Za-z]+", p["question"] + p["solution"])}
    assert len(words) < 150
