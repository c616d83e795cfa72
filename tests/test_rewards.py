"""rewards.py: the built-in rewards, files of rewards, and sums that miss nothing in silence."""

import functools
import math
import os
import subprocess
import sys
import time

import numpy as np
import pytest
from conftest import ROOT
from hypothesis import example, given, settings
from hypothesis import strategies as st

import rewards
from rewards import Mix, Reward, prepare, read_mix, score

GOOD = "<reasoning>12 + 7 = 19</reasoning>\n<answer>19</answer>"


# ---------------------------------------------------------------------------------------- rewards


def scored(text, completion, row=None, traces=("a trace",), **more):
    """score() of a mix given as the flag would give it."""
    mix = read_mix(text, more.get("reward_file"))
    return score(mix, prepare(mix, traces, **more), completion, row or {})


def part(name, completion, row=None, **more):
    return scored(name, completion, row, **more).parts[name]


def tagged(answer, trace="I see"):
    return f"<reasoning>{trace}</reasoning>\n<answer>{answer}</answer>"


R, A = "<reasoning>", "<answer>"
R_, A_ = "</reasoning>", "</answer>"
COMPLETIONS = [  # (completion, format, answer), where 42 is right; more in test_answers.py
    *((tagged(text), 1, 1) for text in ["42", "42.0", "4.2e1", "\n42\n", "The answer is 42"]),
    *((tagged(text), 1, 0) for text in [
        "1,042", "-42", "nan", "1e999", "1/0", "9" * 10_000, "四十二", "\ud800", "\x00"]),
    (f"{R_}I see{R}{A_}42{A}", 0, 0), (f"{R}I {R}see{R_}{R_}{A}42{A_}", 0, 1),
    (tagged(f"{A}42{A_}"), 0, 1), (tagged("42") * 2, 0, 1),
    (tagged("41") + tagged("42"), 0, 1), (tagged("42") + tagged("41"), 0, 0),
    (A * 1000 + "42", 0, 1), (tagged("42").replace("<", "< "), 0, 0),
    (tagged(" "), 0, 0), (R + R_ + A + A_, 0, 0), ("", 0, 0), ("<", 0, 0), (A_, 0, 0),
]


def test_format_and_answer_of_a_completion():
    row = {"answer": "42", "kind": "number"}
    for completion, strict, right in COMPLETIONS:
        assert scored("format:1,answer:3", completion, row) == (
            strict + 3 * right, {"format": strict, "answer": right}, {}), completion
    for said, gold, kind, choices, right in [
        ("(B)", "B", "choice", (), 1), ("Oslo", "B", "choice", ("Rome", "Oslo"), 1),
        ("A or B", "B", "choice", (), 0), ("True", "yes", "boolean", (), 1),
        ("b, a", "a, b", "list", (), 1), (" paris.", "Paris", "text", (), 1),
        ("0.333333333", "1/3", None, None, 1), ("0.333", "1/3", None, None, 0),
    ]:
        row = {"answer": gold, "kind": kind, "choices": choices}
        assert part("answer", tagged(said), row) == right


def test_tags_are_graded_one_by_one():
    for n in range(5):
        assert part("tags", " x ".join(rewards.TAGS[:n])) == (2 * n - 4) / 4
    assert part("tags", tagged("42") + A) == 0.5  # twice is not once
    assert part("tags", tagged("42").upper()) == -1


def test_overlong_is_the_published_table():
    """Maximum 100, buffer 20, penalty 10; 110 is the paper's -10, not the -15 of an open ramp."""
    for n, expected in zip([70, 80, 90, 100, 110], [0, 0, -5, -10, -10], strict=True):
        row = {"n_tokens": n, "max_new": 100, "overlong_buffer": 20}
        assert scored("overlong:10", "x", row).total == expected
    row = {"n_tokens": 99, "max_new": 100, "overlong_buffer": 0}
    assert part("overlong", "x", row) == 0 and part("overlong", "x", row | {"n_tokens": 100}) == -1
    assert part("length", "x", row | {"n_tokens": 25}) == -0.25
    assert part("length", "x", row | {"n_tokens": 500}) == -1


def test_repetition_falls_with_every_repeated_run():
    once = "one two three four five six seven"
    assert part("repetition", once) == part("repetition", "") == part("repetition", "a a a") == 0
    # 14 words make 11 fours, of which the last 4 are those of the beginning
    assert part("repetition", once + " " + once.upper()) == pytest.approx(-4 / 11)
    for loop in ("so " * 500, "哈" * 500, "a" * 5000, "-" * 500, "1 + 1 = 2\n" * 100):
        assert -1 < part("repetition", loop) < -0.9
    assert part("repetition", once, {"stop": "repetition"}) == -1


def test_language_is_the_share_of_letters_in_a_script():
    share = lambda completion, script=None: part("language", completion, {"script": script})
    assert share("All in Latin, même ça: 42 %") == share("") == share("42") == 1
    assert share("Да") == share(tagged("四", "二")) == 0
    assert share("ab Да") == 0.5 and share(tagged("да", "да"), "Cyrillic") == 1
    assert share("日本のカメラ", "CJK HIRAGANA KATAKANA") == 1
    assert share("日本のカメラ", "CJK") == pytest.approx(2 / 6)


def test_reasoning_is_there_and_more_than_the_answer():
    for trace in ("3 + 4 = 7", "3+4=7", "first we add them up", "三加四等于七"):
        assert part("reasoning", tagged("7", trace)) == 1
    for trace in ("", " ", "7", "so so so so so so", "3 + 4 =", "-----", "=" * 99):
        assert part("reasoning", tagged("7", trace)) == 0
    assert part("reasoning", tagged("first we add them up", "First, we add them up.")) == 0
    assert part("reasoning", "first we add them up") == part("reasoning", "") == 0


# ---------------------------------------------------------------------------------- mixes and sums


def test_read_mix(tmp_path):
    assert read_mix("format:1,answer:3").weights == {"format": 1, "answer": 3}
    assert read_mix(" format , overlong : -1e-1 ").weights == {"format": 1, "overlong": -0.1}
    tunix = read_mix("tunix")
    assert tunix.preset == "tunix" and tunix.weights["answer_tunix"] == 1
    assert read_mix("grar,judge:2,repetition") == Mix(
        {"format": 0.2, "answer": 0.2, "judge": 2, "repetition": 1}, 0, 1, "grar"
    )
    (tmp_path / "my.py").write_text("def mine(completion, row): return 1\n")
    mine = f"{tmp_path}/my.py:mine"
    assert read_mix("format:0.5", mine).weights == {"mine": 1, "format": 0.5}
    assert read_mix("mine:2", mine) == Mix({"mine": 2})
    assert read_mix("", mine).weights == {"mine": 1}
    assert read_mix("tunix,mine:0", mine).weights == tunix.weights | {"mine": 0}
    assert read_mix("grar", mine)[1:] == read_mix("grar")[1:] == (0, 1, "grar")
    assert read_mix("tunix") == tunix  # none of this changed a preset


@pytest.mark.parametrize("text, reason", [
    ("", "empty"), (" ", "empty"), (",", "''"), ("format,", "''"), ("format:", "NAME:WEIGHT"),
    ("formt:1", "'formt:1'.*format.*judge.*tunix"), ("format:1,format:2", "'format:2'.*once"),
    ("format:x", "'format:x'"), ("format:nan", "'format:nan'"), ("answer:inf", "inf"),
    ("format:1:2", "1:2"), ("tunix,tunix", "'tunix'"), ("format,tunix", "'tunix'"),
    ("tunix:2", "'tunix:2'"), ("mine", "'mine'"),
])
def test_a_mix_that_cannot_be_read_says_so_in_a_line(text, reason):
    with pytest.raises(ValueError, match=f"^--rewards .*{reason}[^\n]*$"):
        read_mix(text)


def test_prepare_gives_what_the_mix_names():
    unread = prepare(read_mix("tunix,length:0"), (1 / 0 for _ in "x"))  # nothing to fit
    assert list(unread) == ["format", "tags", "answer_tunix", "first_number", "length"]
    for preset, name in {"grar": "judge", "pinocchio": "judge_correctness"}.items():
        with pytest.raises(ValueError, match=f"--rewards {name}: needs --judge"):
            prepare(read_mix(preset), [])


GOLD = {"answer": "42", "reasoning": "apples and pears", "progress": 0.1}


def test_what_does_not_apply_is_no_part():
    both = "format:1,answer:1"
    for nothing in ({}, {"answer": None}, {"answer": " "}, {"answer": [], "reasoning": ""}):
        assert scored(both, tagged("42"), nothing) == (1, {"format": 1}, {})
    assert scored(both, tagged("0"), {"answer": 0}).parts == {"format": 1, "answer": 1}
    assert scored(both, tagged("no"), {"answer": False}).parts == {"format": 1, "answer": 1}
    total, parts, errors = scored("answer:1,format:0", tagged("42"))
    assert total is None and parts == {"format": 1} and list(errors) == ["total"]


def fails(_, row):
    raise RuntimeError("line one\nline \033[2Jtwo " + "x" * 1000)


@pytest.mark.parametrize(
    "value, reason",
    [(None, "returned None"), (math.nan, "nan"), (-math.inf, "-inf"), ("1", "str"),
     (np.float32("nan"), "nan"), (10**400, "Overflow"), ([1.0], "list"), (1j, "complex")],
)
def test_what_is_no_number_is_missing_and_says_why(value, reason):
    functions = {"format": rewards.REWARDS["format"], "odd": Reward(lambda c, r: value)}
    total, parts, errors = score(Mix({"format": 1, "odd": 2}), functions, tagged("42"), {})
    assert (total, parts) == (None, {"format": 1, "odd": None})
    assert list(errors) == ["odd"] and reason in errors["odd"]
    # of weight 0 it is still reported, but spoils nothing
    total, _, again = score(Mix({"format": 1, "odd": 0}), functions, tagged("42"), {})
    assert total == 1 and again == errors


def test_any_kind_of_number_is_a_score():
    for value in (True, 1, np.float32(1), np.int64(1), np.array(1.0)):
        total, parts, errors = score(Mix({"a": 2}), {"a": Reward(lambda c, r, v=value: v)}, "", {})
        assert (total, parts, errors) == (2, {"a": 1}, {}) and type(parts["a"]) is float


def test_an_exception_is_a_short_line_with_the_sample():
    functions = {"mine": Reward(fails), "format": rewards.REWARDS["format"]}
    total, parts, errors = score(Mix({"mine": 1, "format": 1}), functions, tagged("42"), {})
    assert (total, parts) == (None, {"mine": None, "format": 1})
    assert errors["mine"].startswith("RuntimeError: line one line \\x1b[2Jtwo xxx")
    assert len(errors["mine"]) < 250 and errors["mine"].isprintable()
    assert part("overlong", "x", {"max_new": 1}) is None  # a field that the trainer owes
    huge = {"a": Reward(lambda c, r: 1e308), "b": Reward(lambda c, r: 1e308)}
    assert score(Mix({"a": 1, "b": 1}), huge, "", {})[::2] == (None, {"total": "the sum is inf"})

    def stopped(completion, row):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        score(Mix({"a": 1}), {"a": Reward(stopped)}, "", {})


def test_one_function_of_a_file(tmp_path):
    file = tmp_path / "my.py"
    file.write_text(
        "from __future__ import annotations\nfrom dataclasses import dataclass\n"
        "@dataclass\nclass Limit:\n    n: int = 10\n"
        "def brief(completion, row):\n    return len(completion) <= row.get('n', Limit().n)\n")
    at = f"{file}:brief"
    assert scored("format:1", "short", reward_file=at) == (1, {"format": 0, "brief": 1}, {})
    assert scored("brief:-2", "short", {"n": 3}, reward_file=at).total == 0


SEVERAL = """
from helper_of_my_rewards import LIMIT
from rewards import Reward

seen = set()

def fit(traces):
    seen.update(traces)

REWARDS = {
    "brief": lambda completion, row: len(completion) <= LIMIT,
    "cited": Reward(lambda completion, row: row["source"] in completion, needs="source"),
    "known": lambda completion, row: completion in seen,
}
WEIGHTS = {"brief": 0.5, "cited": 2, "format": 1}
RANGE = (-1, 2)
"""


@pytest.fixture
def several(tmp_path):
    """A file of three rewards, which imports the module beside it."""
    (tmp_path / "helper_of_my_rewards.py").write_text("LIMIT = 9\n")
    (tmp_path / "my.py").write_text(SEVERAL)
    return tmp_path / "my.py"


def test_several_rewards_of_a_file(several):
    own = str(several)
    assert read_mix("", own) == Mix({"brief": 0.5, "cited": 2, "format": 1}, -1, 2)
    assert read_mix("brief:3,known", own).weights == {
        "brief": 3, "cited": 2, "format": 1, "known": 1}
    assert scored("", "short", reward_file=own) == (0.5, {"brief": 1, "format": 0}, {})
    assert scored("", "see me", {"source": "me"}, reward_file=own).total == 2  # clipped
    assert scored("known:1", "abc", {}, ["abc"], reward_file=own).parts["known"] == 1  # fitted
    assert scored("answer:1", "see 42", {"answer": "42", "source": "see"},
                  reward_file=f"{own}:cited").total == 2
    assert read_mix("tunix", own).weights["cited"] == 2
    several.write_text("REWARDS = {'other': lambda completion, row: 1}\n")
    os.utime(several, ns=(1, 1))
    assert read_mix("", own) == Mix({"other": 1})  # a file that changed is read again


def test_the_files_that_a_mix_needs(several):
    helper = several.with_name("helper_of_my_rewards.py")
    assert rewards.files("format:1") == rewards.files(None) == []
    assert rewards.files("", f"{several}:cited") == rewards.files("", str(several)) == [
        several, helper]
    several.with_name("data.py").write_text("")  # which `import data` does not mean
    several.write_text("import data\nimport formulas\n" + SEVERAL)
    names = [path.name for path in rewards.files("ideae,tfidf:0", str(several))]
    assert names == ["ideae.py", "my.py", "recipe_text.py", helper.name]
    modules = {path.stem for path in ROOT.glob("*.py") if "__main__" not in path.read_text()}
    assert modules <= rewards.OURS


def test_a_relative_file_is_also_found_beside_the_code(several, monkeypatch):
    """As an exported notebook needs it, which writes its code into a folder of its own."""
    monkeypatch.setattr(rewards, "HERE", several.parent)
    (elsewhere := several.parent / "elsewhere").mkdir()
    monkeypatch.chdir(elsewhere)
    assert scored("", "short", reward_file="my.py:brief").total == 1
    assert rewards.files("", "my.py")[0] == several
    (elsewhere / "my.py").write_text("brief = lambda completion, row: 7\n")  # this one comes first
    assert scored("", "short", reward_file="my.py:brief").total == 7


@pytest.mark.parametrize("flat", [False, True])
def test_presets_are_found_where_a_notebook_writes_them(tmp_path, flat):
    """The files of a recipe in recipes/, or all of them beside rewards.py; by another process."""
    names = ["rewards.py", "answers.py", *(f"recipes/{n}" for n in ("tunix.py", "recipe_text.py"))]
    (tmp_path / "recipes").mkdir()
    for name in names:
        place = tmp_path / (name.removeprefix("recipes/") if flat else name)
        place.write_text((ROOT / name).read_text())
    code = f"""import rewards
mix = rewards.read_mix("tunix")
print(rewards.score(mix, rewards.prepare(mix, []), {tagged("4")!r}, {{"answer": 4}}).total)"""
    run = functools.partial(subprocess.run, [sys.executable, "-c", code], cwd=tmp_path, text=True,
                            capture_output=True)
    done = run()
    assert done.stdout == "9.5\n", done.stderr
    (tmp_path / ("tunix.py" if flat else "recipes/tunix.py")).unlink()
    assert "ValueError: --rewards tunix: no file" in run().stderr


@pytest.mark.parametrize(
    "where, reason",
    [("none.py:score", "no file 'none.py'"), ("my.py:none", "no function none"),
     ("my.py:number", "no function number"), ("bad.py:score", "SyntaxError"),
     ("my.py", "expected REWARDS.*my.py:score"), ("", "no file"), ("my.txt:score", "no file"),
     ("my.py:format", "rename"), ("my.py:tunix", "rename"), ("raises.py:score", "RuntimeError: oh"),
     ("clash.py", "rename answer"), ("ends.py", "SystemExit: 3"),
     *(("WRONG " + text, "expected REWARDS = .name: function.") for text in (
         "REWARDS = [len]", "WEIGHTS = ['a']", "WEIGHTS = {'a': '1'}", "RANGE = 5",
         "RANGE = (1,)"))],
)
def test_a_reward_file_that_cannot_be_used(tmp_path, monkeypatch, where, reason):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my.py").write_text(
        "number = 3\ndef score(completion, row): return 1\nformat = tunix = score\n")
    (tmp_path / "bad.py").write_text("def score(\n")
    (tmp_path / "raises.py").write_text("raise RuntimeError('oh')\n")
    (tmp_path / "clash.py").write_text("REWARDS = {'answer': len}\n")
    (tmp_path / "ends.py").write_text("raise SystemExit(3)\n")
    if where.startswith("WRONG "):
        where, text = f"wrong{hash(where)}.py", where.removeprefix("WRONG ")
        (tmp_path / where).write_text(f"REWARDS = {{'a': len}}\n{text}\n")
    with pytest.raises(ValueError, match=f"^--reward-file .*{reason}"):
        rewards.read_file(where)


# --------------------------------------------------------------------------------------- terminal


def test_colour_shows_the_parts_and_nothing_drives_the_terminal():
    assert rewards.colour(GOOD) == (
        "<reasoning>\033[36m12 + 7 = 19\033[0m</reasoning>\n<answer>\033[1;32m19\033[0m</answer>"
    )
    assert rewards.colour("plain\n\ttext, 哈 é 👩‍💻") == "plain\n\ttext, 哈 é 👩‍💻"
    hostile = "".join(map(chr, [*range(32), *range(127, 160), 0x202E, 0x2066, 0x200F, 0xD800]))
    shown = rewards.colour(f"{hostile}<answer>{hostile}\033[0m\033]0;title\a\r")
    ours = shown.replace("\033[1;32m", "").replace("\033[0m", "", 1)
    assert all(c.isprintable() or c in "\n\t" for c in ours) and shown.encode()
    assert "\\x1b]0;title\\x07\\r" in shown and "\\u202e" in shown and "\\ud800" in shown


# ----------------------------------------------------------------------------------- hostile text

HARD = st.text(st.one_of(st.sampled_from(list("0123456789.,-−$/^%()<>:; \n\\½²٤ABanswer")),
                         st.characters()), max_size=80)
COMPLETION = st.lists(st.one_of(HARD, st.sampled_from(rewards.TAGS)), max_size=8).map("".join)
EVERY = read_mix(",".join(rewards.REWARDS))
FUNCTIONS = prepare(EVERY, [])
FIELDS = {"max_new": 100, "overlong_buffer": 20, "progress": 0.1, "stop": "stop"}
KINDS = [kind for kind in rewards.KINDS if kind not in ("auto", "math")]  # no second process


@settings(max_examples=100, deadline=None)
@given(COMPLETION, HARD, st.sampled_from(KINDS), st.integers(0, 200))
@example("<answer>" + "9" * 10_000, "9" * 10_000, "number", 0)
@example(f"{R}a{R_}{A}1e300{A_}", "1e-300", "number", 1)
@example(f"{R}a{R_}{A}\ud800{A_}", "\ud800", "text", 1)
def test_every_reward_of_any_text_is_a_finite_number(completion, gold, kind, n):
    row = FIELDS | {"answer": gold, "kind": kind, "n_tokens": n}
    total, parts, errors = score(EVERY, FUNCTIONS, completion, row)
    assert errors == {} and math.isfinite(total)
    assert ("answer" in parts) == bool(gold.strip())
    low = {"tags": -1, "overlong": -1, "length": -1, "repetition": -1}
    high = {"overlong": 0, "length": 0, "repetition": 0}
    for name, value in parts.items():
        assert type(value) is float and low.get(name, 0) <= value <= high.get(name, 1)
    assert score(EVERY, FUNCTIONS, completion, row) == (total, parts, errors)
    assert all(
        c.isprintable() or c in "\n\t\033" or ord(c) > 159 for c in rewards.colour(completion)
    )


@pytest.mark.parametrize("piece", ["9", "哈", "İ", "word ", "\x1b[", "<answer>", GOOD])
def test_time_grows_with_the_text_and_no_faster(piece):
    """Eight times the text in less than 24 times the CPU time; what is quadratic takes 64."""

    def cost(n):
        text = piece * (n // len(piece))
        best = math.inf
        for _ in range(2):
            began = time.process_time()
            for completion in (text, f"{R}{text}{R_}{A}{text}{A_}"):
                row = FIELDS | {"answer": "1 apple", "n_tokens": 9}
                assert not score(EVERY, FUNCTIONS, completion, row).errors
                rewards.colour(completion)
            best = min(best, time.process_time() - began)
        return best

    assert cost(16_000) < 24 * cost(2_000) + 0.02
