"""answers.py: what a person would say of an answer, for each kind and for hostile text."""

import importlib.util
import json
import math
import threading
import time
from pathlib import Path

import pytest
from conftest import lines
from hypothesis import example, given, settings
from hypothesis import strategies as st

import answers
import formulas
from answers import correct, kind_of, number, parse, vote

GOOD = "<reasoning>12 + 7 = 19</reasoning>\n<answer>19</answer>"


@pytest.fixture(scope="module", autouse=True)
def no_formulas():
    """No second process, but for the tests of formulas.py."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(formulas, "equal", lambda guess, gold: False)
        yield


def test_strict_is_the_format_alone_and_the_answer_needs_none():
    for completion, strict, answer in [
        (GOOD, True, "19"),
        (f"\n {GOOD} \n", True, "19"),
        ("<reasoning>a\nb</reasoning><answer>\nParis\n</answer>", True, "Paris"),
        (f"Sure! {GOOD}", False, "19"),
        (f"{GOOD} Bye!", False, "19"),
        (f"{GOOD}{GOOD}", False, "19"),
        ("<reasoning>a</reasoning> so <answer>19</answer>", False, "19"),
        ("<answer>19</answer>\n<reasoning>a</reasoning>", False, "19"),
        ("<reasoning>a<answer>19</answer></reasoning>", False, "19"),
        ("<reasoning></reasoning><answer>19</answer>", False, "19"),
        ("<reasoning>a</reasoning><answer> </answer>", False, None),
        ("<reasoning>a</reasoning><answer>19", False, "19"),
        ("<reasoning>a</reasoning><answer>", False, None),
        ("<reasoning>a</reasoning><answer>1</answer><answer>19</answer>", False, "19"),
        ("<reasoning>a</reasoning><answer>19</answer><answer>", False, "19"),
        ("<Reasoning>a</Reasoning><Answer>19</Answer>", False, "19"),
        ("<reasoning>a</reasoning>\n19", False, "19"),
        ("<reasoning>it is 19</reasoning>", False, "it is 19"),
        ("<reasoning>it is 19", False, "it is 19"),
        ("19</answer>", False, "19"),
        ("It is 19.", False, "It is 19."),
        ("", False, None),
        (" \n", False, None),
    ]:
        assert parse(completion)[1:] == (answer, strict), completion
    assert parse(GOOD)[0] == "12 + 7 = 19"
    assert parse("<reasoning>cut off")[0] == "cut off"
    assert parse("<answer>19</answer>")[0] is None


# --------------------------------------------------------------------------------------- verdicts

NUMBERS = [
    ("42", 42), ("42.", 42), ("42.0", 42), ("1,042", 1042), ("1,234,567.5", 1234567.5),
    ("1\u202f042", 1042), ("-42", -42), ("−42", -42), ("–42", -42), ("+42", 42), ("- 42", -42),
    ("$42", 42), ("-$42", -42), ("$-42", -42), ("$ 1,042.50", 1042.5), ("\\$42", 42), ("42€", 42),
    ("42%", 42), ("42 apples", 42), ("42km", 42), ("**42**", 42), ("(42)", 42), ("x=42", 42),
    ("4.2e1", 42), ("4.2E+1", 42), ("420e-1", 42), ("3 × 10^8", 3e8), ("3 x 10⁸ m/s", 3e8),
    ("3 \\times 10^{-2}", 0.03), ("4.2 million", 4200000), ("½", 0.5), ("-½", -0.5), ("3½", 3.5),
    ("⅓", 1 / 3), ("1/2", 0.5), ("1⁄2", 0.5), ("3 1/2", 3.5), ("-3 1/2", -3.5), ("10 / 4", 2.5),
    ("\\frac{1}{2}", 0.5), (".5", 0.5), ("The answer is 42", 42), ("12 + 7 = 19", 19),
    ("10-15", None), ("10 m²", 10), ("٤٢", 42), ("４２", 42), ("答案是42", 42), ("4\n2", 2),
    ("", None), ("none", 0), ("nan", None), ("inf", None), ("-Infinity", None), ("H2O", None),
    ("²", None), ("2^10", 1024), ("9^999", None), ("0^-1", None), ("1/0", None),
    ("1e999", None), ("1e-99999", None),
    ("9" * 10_000, None), ("1" + ",000" * 9_999, None), ("-", None), ("$", None), ("1e", None),
]

RIGHT = [
    ("42", "42"), ("42.0", "42"), ("1,042", "1042"), ("$1,042.00", "1042"), ("42%", "42"),
    ("42 apples", "42"), ("42", "42 apples"), ("42 red apples", "42 apples"), ("42 km.", "42 km"),
    ("0.333333333", "1/3"), ("½", "0.5"), ("−7", "-7"), ("The answer is 42.", "42"),
    ("The answer is 42. Check: 84 / 2", "42"), ("It makes 42.\nI hope this helps!", "42"),
    ("so 6 * 7 = 42", "42"), ("#### 42", "42"), ("\\boxed{42}", "42"), ("42", 42), ("2.5", 2.5),
    ("12:30", "12:30"), ("42 percent", "42%"), ("9" * 400, "9" * 400),
    ("Paris", "paris"), ("  PARIS. ", "Paris"), ("The answer is Paris.", "Paris"),
    ("Well.\nAnswer: **New   York**", "New York"), ("well-known", "well known"),
    ("don't", "dont"), ("C++", "c++"), ("(3, 4)", "(3,4)"), ("+", "+"),
    ("yes", "Yes"), ("Yes, it can.", "yes"), ("true", "yes"), ("No.", "false"), ("no", False),
    ("It is true.", "True"), ("No, that is not correct", "no"),
    ("B", "B"), ("b", "B"), ("(B)", "B"), ("B.", "B"), ("B) Oslo", "B"), ("**B**", "B"),
    ("Option B", "B"), ("The correct answer is (B).", "B"), ("B: because it is cold", "B"),
    ("a, b", "b, a"), ("b and a", "a, b"), ("2.0; 1", "1, 2"), ("1, 2, and 3", "3, 2, 1"),
    ("red, green", ["green", "red"]), ("1,042, 7", "7, 1042"),
]


WRONG = [
    ("", "42"), (" ", "42"), (".", "42"), ("", ""), ("...", "..!"), ("x", ""), (None, "42"),
    ("4", "42"), ("142", "42"), ("42 or 43", "42"), ("42.001", "42"), ("1234567", "1234568"),
    ("-42", "42"), (".5", "5"), ("1, -2", "1, 2"), ("(-3, 4)", "(3, 4)"),
    ("42 m", "42 km"), ("0.33", "1/3"), ("nan", "nan or inf"), ("forty", "42"),
    ("9" * 400, "9" * 399 + "8"), ("1e999", "42"), ("2^10", "10"),
    ("Par", "Paris"), ("Paris, France", "Paris"), ("not Paris", "Paris"), ("C", "C++"),
    ("(4, 3)", "(3, 4)"), ("It is Paris or Rome", "Paris"),
    ("no", "yes"), ("yes and no", "yes"), ("yes/no", "no"), ("It is not true", "true"),
    ("It isn't true", "true"), ("maybe", "yes"), ("yesterday", "yes"),
    ("A", "B"), ("A or B", "B"), ("A) B) C)", "A"), ("A, B", "A"), ("B) or C", "B"),
    ("a dog", "A"), ("Boat", "B"), ("I think so", "B"),
    ("a", "a, b"), ("a, b, c", "a, b"), ("a, b, b", "a, b"), ("ab", "a, b"),
]

CHOICES = ("Rome", "Oslo", "A. thaliana")
CHOSEN = {"right": ["B", "b)", "Oslo", "oslo.", "B) Oslo", "(B) Vitamin C", "The answer is Oslo"],
          "wrong": ["A", "Rome", "B) Rome", "Osl", "Z", "", "C. Oslo", "Rome, Oslo"]}
LATEX = [
    (r"-\frac{3}{4}", ["-3/4", r"\frac{-3}{4}", "-0.75"], [r"\frac34", "3/4"]),
    ("-$5", ["-5", "$-5", r"-\$5"], ["$5", "5"]),
    (r"\$18.90", ["18.90", "$18.9"], ["$18", "18.90 euros"]),
    (r"4\sqrt{2}", [r"$4\sqrt2$", "4√2", r"It is $4\sqrt{2}$."], [r"4\sqrt3", "4", "2"]),
    (r"\frac{\pi}{2}", [r"$\frac{\pi}{2}$", r"\dfrac\pi2", "π/2"], [r"\pi", "1/2", r"-\pi/2"]),
    (r"90^\circ", ["90", "90°", "90 degrees"], [r"45^\circ", "90 km"]),
    ("10000", ["10{,}000", r"10\,000", r"10,\!000", "10 000"], ["10", "0", "1000"]),
    ("(0,1)", ["(0, 1)", r"\left(0, 1\right)"], ["[0,1]", "(1,0)", "1"]),
    ("[0,1)", ["$[0, 1)$"], ["(0,1]", "[0,1]"]),
    (r"e^{-x}", ["e^(-x)", "$e^{-x}$"], ["e^x", "e"]),
    ("x=5", ["5", "x = 5"], ["x = 6", "y > 5"]),
    ("5!", ["5!"], ["5"]), ("3x", ["3 x", "y = 3x"], ["3"]), ("3", ["3.0"], [r"\pm 3", "3x"]),
    (r"\text{(B)}", ["B", "(b)"], ["A", "BC"]), ("Monday", [r"\text{Monday}"], ["Sunday"]),
    ("7/2", [r"3\frac{1}{2}", "3½"], ["31/2"]),
]


def test_numbers_are_what_a_person_reads():
    assert [(text, number(text)) for text, value in NUMBERS if number(text) != value] == []


def test_answers_that_must_be_right_or_wrong():
    assert [pair for pair in RIGHT if not correct(*pair)] == []
    assert [pair for pair in WRONG if correct(*pair)] == []
    for gold, kind in (("B", "auto"), ("Oslo", "choice")):
        assert all(correct(guess, gold, kind, CHOICES) for guess in CHOSEN["right"])
        assert not any(correct(guess, gold, kind, CHOICES) for guess in CHOSEN["wrong"])
    assert correct("A. thaliana", "C", "choice", CHOICES)
    for gold, right, wrong in LATEX:
        assert [guess for guess in right if not correct(guess, gold)] == []
        assert [guess for guess in wrong if correct(guess, gold)] == []


HERE = Path(__file__).parent
PUBLIC = [(v["gold"], v["kind"], tuple(v["choices"]), v["guess"], v["right"])
          for v in lines(HERE / "verdicts.jsonl")]
CITIES = ("Rome", "Oslo", "Bern", "Paris")
OWN = [(gold, "auto", CITIES if gold == "B" else (), guess, side == "right")
       for gold, sides in json.loads((HERE / "answers.json").read_text()).items()
       for side, guesses in sides.items() for guess in guesses]
MORE = [(gold, "auto", tuple(choices), guess, guesses is right)
        for gold, choices, right, wrong in json.loads((HERE / "answers_more.json").read_text())
        for guesses in (right, wrong) for guess in guesses]


@pytest.mark.parametrize("table", [PUBLIC, OWN, MORE], ids=["public", "own", "more"])
def test_the_rates_of_false_and_missed_rewards(table):
    """Below 2 % of the wrong answers are paid, and below 5 % of the right ones refused.

    Refused of the public table: "1.042 (German)" for 1042, as "1.042" alone is wrong there;
    "Paris, France" for Paris, as "Paris, Rome" must be; and dates and times in another notation.
    """
    verdicts = [(v, correct(v[3], v[0], v[1], v[2])) for v in table]
    paid = [v for v, found in verdicts if found and not v[4]]
    refused = [v for v, found in verdicts if not found and v[4]]
    n_right = sum(v[4] for v in table)
    assert len(paid) < 0.02 * (len(table) - n_right), paid
    assert len(refused) < 0.05 * n_right, refused


def test_kinds():
    golds = {"42": "number", "$1,042": "number", "5 km": "number", "-3/4": "number", "B": "choice",
             "(C)": "choice", "True": "boolean", "no": "boolean", "a, b": "list", "x=5": "number",
             "salt and pepper": "list", "(3, 4)": "math", "Paris": "text", "12:30": "text",
             "room 42": "text", "": "text", "\\text{(B)}": "choice", "90^\\circ": "number",
             "24\\pi": "math", "5!": "math", "x^2 + 1": "math", "3x": "math", "-x": "math",
             "C++": "text", "2024-01-15": "text", "10-20": "text", "non-profit": "text"}
    assert {gold: kind_of(gold) for gold in golds} == golds
    assert kind_of("Oslo", ("Rome", "Oslo")) == "choice"
    assert correct("42 m", "room 42", "number") and not correct("42 m", "room 42")
    with pytest.raises(ValueError, match="maths.*auto, number"):
        correct("1", "1", "maths")


def test_equal_votes_are_equal_answers():
    for kind, a, b in [
        ("number", "42", "It is 42.0"), ("number", "½", "1/2"), ("choice", "(B)", "B. Oslo"),
        ("boolean", "Yes.", "true"), ("list", "a, b", "b and a"), ("text", "Oslo!", "oslo"),
        ("math", "$1 + x^2$", "y = x² + 1"),
    ]:
        assert vote(a, kind) == vote(b, kind) is not None
    for kind in answers.KINDS[1:]:
        assert vote(None, kind) is vote("", kind) is vote(" \n", kind) is None
    assert vote("no number", "number") is None


# ------------------------------------------------------------------------------------ math-verify

EQUAL = formulas.equal


@pytest.fixture
def verifier(monkeypatch):
    """formulas.py as it is, with a process of its own."""
    monkeypatch.setattr(formulas, "equal", EQUAL)
    formulas._verifier.cache_clear()
    yield monkeypatch
    formulas._verifier.cache_clear()


def test_without_math_verify_formulas_are_compared_by_notation(verifier, capsys):
    verifier.setattr(formulas, "WORKER", "import no_such_package")
    assert correct("1 + x^2", "x^2 + 1") and not correct("(x + 1)^2", "x^2 + 2x + 1")
    assert not correct("(x + 1)^2", "x^2 + 2x + 1")
    assert capsys.readouterr().err.count("pip install math-verify") == 1  # said once


@pytest.mark.skipif(importlib.util.find_spec("math_verify") is None, reason="needs math-verify")
def test_with_math_verify(verifier):
    """A formula that takes for ever is wrong, in any thread, and the next one is checked."""
    for guess, gold, right in [
        ("(x + 1)^2", "x^2 + 2x + 1", True), (r"\sqrt{8}", r"2\sqrt{2}", True),
        (r"\frac{1}{\sqrt{3}}", r"\frac{\sqrt{3}}{3}", True), ("sin x", r"\sin(x)", True),
        ("3 < x", "x > 3", True), ("x < 3", "x > 3", False), ("120", "5!", True),
        ("5", "5!", False), ("24", r"24\pi", False), ("x^2+1 or x^2", "x^2", False),
        ("not x^2", "x^2", False), ("[0,1]", "(0,1)", False), ("e^x", "e^{-x}", False),
    ]:
        assert correct(guess, gold, "math") == right, guess
    verifier.setattr(formulas, "WORKER", formulas.WORKER.replace("alarm(5)", "alarm(2)"))
    formulas._verifier.cache_clear()
    guesses, found = ["9^{9^{9^{9}}}", r"\sqrt{8}", "9^{9^{9^{9}}}", r"\sqrt{8}"], {}

    def check(i):
        found[i] = correct(guesses[i], r"2\sqrt{2}")

    threads = [threading.Thread(target=check, args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    assert found == {0: False, 1: True, 2: False, 3: True}


# ----------------------------------------------------------------------------------- hostile text

HARD = st.text(
    st.one_of(st.sampled_from(list("0123456789.,-−$/^e%()[]{}<>:;=\n \\½⅓²⁸٤４ABanswerπ√!")),
              st.characters()), max_size=80)
COMPLETION = st.lists(st.one_of(HARD, st.sampled_from(answers.TAGS)), max_size=8).map("".join)


@settings(max_examples=150, deadline=None)
@given(COMPLETION, HARD, st.sampled_from(answers.KINDS))
@example("<answer>" + "9" * 10_000, "9" * 10_000, "number")
@example("\ud800<answer>\ud800", "\ud800", "auto")
@example("nan", "nan", "number")
def test_any_text_gets_an_answer_of_the_right_type(completion, gold, kind):
    reasoning, answer, strict = parse(completion)
    assert isinstance(strict, bool) and not (strict and not (reasoning and answer))
    assert answer is None or answer.strip() == answer != ""
    value = number(completion)
    assert value is None or math.isfinite(value)
    first = correct(answer, gold, kind)
    assert first is correct(answer, gold, kind) and isinstance(first, bool)
    assert correct("", gold, kind) is correct(None, gold, kind) is False
    assert correct(gold, gold) == bool(gold.strip())
    for k in answers.KINDS[1:]:
        said = vote(answer, k)
        assert said is None or isinstance(said, str) and said


@given(st.integers(-(10**12), 10**12), st.sampled_from(["{}", "{:,}", "${}", "{}.", "{} pies"]))
def test_whole_numbers_survive_their_spellings(n, spelling):
    assert number(spelling.format(n)) == n
    assert correct(spelling.format(n), str(n)) and not correct(spelling.format(n), str(n + 1))


HOSTILE = ["9", ",000", "1 ", "1/", "1e", "1.", "-", "$", "3 x 10^", " ", "\n", "<answer>",
           "answer is ", "½", "²", "٤", "A) ", "(", "yes ", "\\frac{1}{", "and ", "1 1/",
           "\u0301\u0323", "\\boxed{", "word ", "<reasoning></answer>", GOOD, "İ", "_", "\\text{",
           "^{", "√(", "one and a ", "n't ", "x = ", "1 km ", "$a", "because ", " (a"]


@pytest.mark.parametrize("piece", HOSTILE)
def test_time_grows_with_the_text_and_no_faster(piece):
    """Eight times the text in less than 24 times the CPU time; what is quadratic takes 64."""

    def cost(n):
        text, best = piece * (n // len(piece)), math.inf
        for _ in range(2):
            began = time.process_time()
            _, answer, _ = parse(text)
            answers.words(text)
            for kind in answers.KINDS:
                correct(answer or text, "1 apple", kind)
                correct("1", text, kind)
            best = min(best, time.process_time() - began)
        return best

    assert cost(16_000) < 24 * cost(2_000) + 0.02
