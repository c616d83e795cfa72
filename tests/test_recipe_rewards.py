"""The recipes' own rewards: their published tables, and what they pay for nothing."""

import math
import sys

import pytest
from test_rewards import A_, GOLD, R_, A, R, tagged

import rewards
from rewards import prepare, read_mix, score

pytest.importorskip("sklearn", reason="IDEA-E's TF-IDF is scikit-learn's")


def scored(text, completion, row=None, traces=("apples pears",), recipe=None, judge=None):
    """score() of a mix given as the flag would give it; recipe: the file of its rewards."""
    own = str(rewards.preset_file(recipe[0])) + f":{recipe[1]}" if recipe else None
    mix = read_mix(text, own)
    return score(mix, prepare(mix, traces, own, judge), completion, row or {})


def part(name, completion, row=None, traces=("apples pears",)):
    """One reward of the recipe that has it."""
    recipe = next(p for p in rewards.PRESETS
                  if name in rewards.read_file(str(rewards.preset_file(p)))[0])
    return scored("", completion, row, traces, (recipe, name)).parts[name]


def test_tags_of_pinocchio():
    assert part("tags_pinocchio", tagged("42")) == 1 and part("tags_pinocchio", "") == 0
    for tag, share in zip(rewards.TAGS, (0.3, 0.3, 0.2, 0.2), strict=True):
        assert part("tags_pinocchio", f"x{tag}x") == share
        assert part("tags_pinocchio", tagged("42") + tag) == pytest.approx(1 - share)


def test_tunix_answers():
    for completion, expected in [
        (tagged("100"), 3), (tagged("\n100 "), 1.5), (tagged("100.0"), 0.5), (tagged("110"), 0.5),
        (tagged("111"), 0.25), (tagged("80"), 0.25), (tagged("121"), -1), (tagged("-100"), -1),
        (tagged("1e999"), -0.5), (tagged("many"), -0.5), ("100", 0), (f"{A}100{A_}", 0), ("", 0),
        (tagged("100") + "!", 0),
    ]:
        assert part("answer_tunix", completion, {"answer": "100"}) == expected, completion
    for said, gold, expected in [("-9", "-10", 0.5), ("0.0", "0", 0.5), ("1", "0", -1),
                                 ("1", "Oslo", -0.5)]:
        assert part("answer_tunix", tagged(said), {"answer": gold}) == expected
    for completion, right in [
        (tagged("It is 42, not 43"), 1), (tagged("$42.00"), 1), (tagged("43, not 42"), 0),
        (tagged("Oslo"), 0), (tagged(""), 0), ("42", 0), (f"{A}42{A_}", 1),
        (tagged("1" * 10_000), 0),
    ]:
        assert part("first_number", completion, {"answer": "42"}) == right, completion


def test_ideae_answers():
    for said, gold, expected in [
        ("100", "100", 4), ("$100", "100", 3.5), ("95", "100", 2.5), ("106", "100", 1.25),
        ("111", "100", 0), ("100 or 200", "100", 2.5), ("many", "100", 0), ("", "100", 0),
        ("(b)", "B", 3.5), ("A", "B", 0), ("True", "yes", 3.5), ("no", "yes", 0),
        ("Oslo", "Oslo", 4), ("It is Oslo.", "Oslo", 2.5), ("Oslomet", "Oslo", 0),
    ]:
        assert part("answer_ideae", tagged(said), {"answer": gold}) == expected, (said, gold)
        assert part("answer_ideae", said, {"answer": gold}) == 0  # a recipe reads its own tags


def test_markers_are_paid_in_the_scaffold_phase():
    full = tagged("42", "[I] a [D] b [E] c [A] d [E] e [E]")
    count = lambda completion, p=0.0: part("markers", completion, {"progress": p})
    assert count(full) == 5 and count(full, 0.49) == 5 and count(full, 0.5) == count(full, 1) == 0
    assert count(tagged("42", "[E] [A] [A]")) == 2 and count(tagged("[I]")) == count("[I]") == 0


# ----------------------------------------------------------------------------------------- TF-IDF

TRACES = [
    "First we add 12 and 7, which makes 19 apples.",
    "We divide the apples among the children; the the the of apples.",
]


def test_both_readings_of_tfidf():
    row = {"reasoning": TRACES[0]}
    get = lambda name, completion: part(name, completion, row, traces=TRACES)
    same, other = tagged("19", TRACES[0]), tagged("19", "we divide the apples")
    assert get("tfidf", same) == pytest.approx(1) and 0 < get("tfidf", other) < 0.5
    for text in (TRACES[0], R + TRACES[0], TRACES[0] + R_, tagged("19", "zebra")):
        assert get("tfidf", text) == 0
    without = scored("", same, {"reasoning": None}, TRACES, ("ideae", "tfidf"))
    assert "tfidf" not in without.parts  # the row has no trace to be like
    # the other reading: a trace that is not the answer said early
    assert get("contrast", tagged("Paris", TRACES[0])) == 1
    assert get("contrast", tagged(TRACES[0], TRACES[0])) == pytest.approx(0)
    assert 0.4 < get("contrast", tagged("19 apples", TRACES[0])) < 0.6
    for text in (TRACES[0], tagged("", TRACES[0]), tagged("19", "zebra"), f"{R}apples{R_}{A}19"):
        assert get("contrast", text) == 0


def test_what_tfidf_needs(monkeypatch):
    for traces in ([], ["", "the of"]):
        with pytest.raises(ValueError, match="--rewards tfidf: .*reasoning"):
            prepare(read_mix("ideae"), traces)
    monkeypatch.setitem(sys.modules, "sklearn.feature_extraction.text", None)
    with pytest.raises(ValueError, match="^--rewards ideae: needs scikit-learn [^\n]*$"):
        prepare(read_mix("ideae"), TRACES)


def judged(**values):
    return {name: rewards.Reward(lambda c, r, v=v: v) for name, v in values.items()}


def test_the_sum_of_tunix():
    """Its range is -2 (no tag once) to 9.5: what has no format has no answer that could cost -1."""
    for completion, expected in [
        (tagged("42"), 3 + 2 + 3 + 1.5), (tagged("42 or 45"), 3 + 2 - 0.5 + 1.5),
        (tagged("45"), 3 + 2 + 0.5), (tagged("99"), 3 + 2 - 1), (tagged("many"), 3 + 2 - 0.5),
        (tagged("42") + "!", 2 + 1.5), ("42", -2), (f"{R}I see{R_}{A}42", 1.5 - 0.5),
    ]:
        assert scored("tunix", completion, GOLD).total == pytest.approx(expected), completion


def test_the_sum_of_ideae():
    for completion, expected in [
        (tagged("42", "apples pears [I] [D] [E] [A] [E]"), 0.75 + 0.25 + 0.5 + 2.25 + 4),
        (tagged("$42", "apples"), 0.75 + 0.25 + 2.25 / math.sqrt(2) + 3.5),
        (tagged("43", "zebra"), 0.75 + 0.25 + 2.5), (f"{A}42{A_}", 4), ("42", -0.25),
    ]:
        assert scored("ideae", completion, GOLD, ["apples pears"]).total == pytest.approx(expected)


def test_the_sum_of_pinocchio():
    for completion, correctness, quality, penalty, expected in [
        (tagged("42"), 1, 5, 0, 5 + 5 + 5), (tagged("42"), 0.5, 3, 2, 2.5 + 3 + 5 - 2),
        (f"{R}a{R_}{A}42", 1, 4, 3, 5 + 4 + 5 * 0.8 - 3), ("", 0, 0, 6, -6), ("", 0, 0, 17, -10),
    ]:
        judge = judged(judge_correctness=correctness, judge_reasoning=quality,
                       judge_penalty=penalty)
        assert scored("pinocchio", completion, {}, judge=judge).total == pytest.approx(expected)


def test_the_sum_of_grar():
    total = lambda text, judge: scored("grar", text, GOLD, judge=judged(judge=judge)).total
    assert total(tagged("42"), 1) == 1 and total("", 0) == 0
    assert total(tagged("42"), 0.25) == pytest.approx(0.2 + 0.2 + 0.6 * 0.25)
    assert total(tagged("41"), 0.25) == pytest.approx(0.2 + 0.6 * 0.25)
    assert total("42", 0.25) == pytest.approx(0.2 + 0.6 * 0.25)
    assert total(tagged("42"), 3) == 1 and total("", -1) == 0
    assert total(tagged("42"), None) is None  # a lost judgement is no bad one


JUNK = tagged("yes no A B C D 1 2 3 42 Paris", "[I] [D] [E] [A] [E]")
HONEST = tagged("97", "There are apples. Then there are pears. We count all of them.")


@pytest.mark.parametrize(
    "recipe, junk, repaired",
    [("ideae", JUNK, "ideae,answer_ideae:0,answer:4,markers:0"),
     ("tunix", tagged("many"), "format:0.9,answer:4.5")],
)
def test_the_repaired_variants_pay_no_constant_line(recipe, junk, repaired):
    total = lambda text, completion: scored(text, completion, GOLD).total
    right = HONEST.replace("97", "42")
    assert total(recipe, junk) > total(recipe, HONEST)  # as published
    assert total(repaired, junk) <= total(repaired, HONEST) < total(repaired, right)
