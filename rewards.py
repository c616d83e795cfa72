"""Text -> score: where a completion's answer is, and whether it is right.

    reasoning, answer, strict = parse(completion)
    correct(answer, "1,042")                        # kind="auto": told by the right answer
    correct(answer, "B", choices=("Rome", "Oslo"))

What to know when comparing with other graders:

1. Format and accuracy are two questions. `strict` asks for the format alone; the answer is read the
   same way with and without tags, and nobody but the caller combines the two.
2. Of several numbers the *last* counts, so a completion has one answer however many it lists.
   "42%" and "$42" are 42; "42 m" is not "42 km", but "42" is either.
3. Text must be equal, but for case, spaces and punctuation. A part of it is never enough, and an
   empty answer matches nothing.
4. Completions are hostile text: nothing is evaluated, and every pattern takes time in proportion to
   the text: what may repeat is possessive (`++`), bounded, or starts at places of its own.
"""

import math
import re
import unicodedata
from fractions import Fraction
from typing import Any

KINDS = ("auto", "number", "choice", "boolean", "list", "text")

# ------------------------------------------------------------------------------------------- tags

TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
_TAG = re.compile("(" + "|".join(TAGS) + ")", re.IGNORECASE)


def parse(completion: str) -> tuple[str | None, str | None, bool]:
    """(reasoning, answer, strict). Strict: each tag once, in order, neither empty, no other text.

    The answer asks for no format: it is what follows the last <answer> that has any text, closed or
    not; without such a tag, what follows the last tag of all; without tags, the whole text. Of it
    `correct` reads what follows "the answer is", the last number, or else the last line.
    """
    pieces = _TAG.split(completion)
    texts, tags = [text.strip() for text in pieces[::2]], pieces[1::2]
    strict = tags == TAGS and [bool(text) for text in texts] == [False, True, False, True, False]
    after = [(tag.lower(), text) for tag, text in zip(tags, texts[1:], strict=True) if text]
    reasoning = next((text for tag, text in after if tag == "<reasoning>"), None)
    if "<answer>" in map(str.lower, tags):
        answers = [text for tag, text in after if tag == "<answer>"]
    else:
        answers = [text for text in texts if text]
    return reasoning, answers[-1] if answers else None, strict


# ---------------------------------------------------------------------------------------- numbers

_PLAIN = str.maketrans("−–﹣－⁄", "----/")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_DECIMAL = r"(?:(?:\d{1,3}(?:[,\u00a0\u202f]\d{3}(?!\d))++|\d++)(?:\.\d++)?+|\.\d++)"
_NUMBER = re.compile(
    rf"""(?<![a-z0-9_^])                       # not inside a word or a number; no power
    (?P<sign>-?(?:[$€£¥][ ]?)?-?)
    (?:(?P<whole>\d{{1,15}})[ ](?=\d{{1,15}}/\d))?+                                # 3 1/2
    (?P<top>{_DECIMAL})
    (?:e(?P<e>[-+]?\d++)|[ ]?(?:[×x*·]|\\times|\\cdot)[ ]?10\^\{{?(?P<ten>[-+]?\d++))?+
    (?:[ ]?/[ ]?(?P<bottom>{_DECIMAL}))?+
    (?:[ ](?P<many>hundred|thousand|million|billion|trillion)\b)?+
    (?![ ]?\^)                                 # 2^10 is not read, rather than read as 2""",
    re.IGNORECASE | re.VERBOSE,
)
_MANY = {"hundred": 2, "thousand": 3, "million": 6, "billion": 9, "trillion": 12}


def _simple(text: str) -> str:
    """½ -> 1/2, 3½ -> 3 1/2, − -> -, 10⁸ -> 10^8, ٤٢ -> 42, \\frac{1}{2} -> 1/2."""
    text = re.sub(r"(?![0-9])\d", lambda m: str(int(m[0])), text)  # the digits of other scripts
    text = re.sub("(?<=[0-9])(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[⁻⁺]?[⁰¹²³⁴-⁹]++", lambda m: "^" + m[0].translate(_RAISED), text)
    text = re.sub(r"\\[dt]?frac\{(\d{1,15})\}\{(\d{1,15})\}", r"\1/\2", text)
    return text.translate(_PLAIN)


def _find(text: str) -> tuple[int | float | None, list[str], list[str]]:
    """The last number of a text, the words before it and the words after it.

    "about 42 km" -> (42, ["about"], ["km"]). More than 200 characters, 1/0 or 1e999 give None.
    """
    text, m = _simple(text), None
    for m in _NUMBER.finditer(text):  # noqa: B007
        pass
    if m is None:
        return None, _words(text), []
    before, after = _words(text[: m.start()]), _words(text[m.end() :])
    read = lambda name: Fraction(re.sub(r"[,\s]", "", m[name] or "0"))
    power = (m["e"] or m["ten"] or "0").lstrip("+")
    if len(m[0]) > 200 or len(power) > 4 or m["bottom"] and not read("bottom"):
        return None, before, after
    power = int(power) + _MANY.get((m["many"] or "").lower(), 0)
    value = read("top") * Fraction(10) ** power
    value = read("whole") + (value / read("bottom") if m["bottom"] else value)
    value = -value if "-" in m["sign"] else value
    if abs(value) > 1e300:
        return None, before, after
    return int(value) if value.denominator == 1 else float(value), before, after


def number(text: str) -> int | float | None:
    """The last number in a text as a person reads it; None where there is none, never nan or inf.

    1,042 · −42 · $42 · 42. · 4.2e1 · 3 × 10^8 · ½ · 3 1/2 · 42 apples · 42% · 4.2 million
    """
    return _find(text)[0]


# ------------------------------------------------------------------------------- all other answers

_MINUS = str.maketrans("−–", "--", "'’‘ʼ")
_DROP = re.compile(r"""[,;:!?"`´“”()\[\]{}…—_*~¿¡]|\.(?!\d)|-(?!\.?\d)|(?<=\w)-""")
_BOOLEANS = {"yes": "yes", "true": "yes", "no": "no", "false": "no"}
_CUE = re.compile(r"\banswers?(?:\s{1,3}(?:is|are)\b|\s{0,3}[:=])|####|\\boxed\{", re.IGNORECASE)
_LETTER = re.compile(
    r"(?:option|choice)?[ ]?[(\[]?([a-z])(?:[)\].:}]{0,3}$|[)\].:]{1,3}(.*)|[ ][-–—](.*))",
    re.IGNORECASE | re.DOTALL,
)
_OTHER_LETTER = re.compile(r"\b([A-H])[)\].:]|(?:\bor|\band|[,/])\s{0,2}[(\[]?([A-H])\b")
_COMMA = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))|[;\n]|\band\b", re.IGNORECASE)


def _words(text: str) -> list[str]:
    """Words without case, punctuation and markup; what carries meaning stays: -1, 0.5, C++, 5 %."""
    return _DROP.sub(" ", text.casefold().translate(_MINUS)).split()


def _same(text: str) -> str:
    """What must be equal in two texts: their words, or the text itself where it has none ("?")."""
    return " ".join(_words(text)) or text.strip()


def _line(text: str) -> str:
    """The line that holds the answer: what follows the last "answer is", or else the last line."""
    head, *tails = _CUE.split(text)
    if tails and _words(tails[-1]):
        return tails[-1].strip().partition("\n")[0].strip()
    return text.strip().rpartition("\n")[2].strip()


def _choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter a text chooses: "B", "(B)", "B.", "B) its text" or the text of choice B."""
    line = _line(text).strip(" \t*_`\"'")
    texts = [_same(choice) for choice in choices]
    if len(line) > 1 and _same(line) in texts:
        return chr(ord("A") + texts.index(_same(line)))
    m = _LETTER.match(line)
    n = ord(m[1].upper()) - ord("A") if m else 99
    if n >= (len(choices) or 8):
        return None
    letter, rest = m[1].upper(), m[2] or m[3] or ""
    if _same(rest) in texts:
        return letter if texts[n] == _same(rest) else None
    others = {a or b for a, b in _OTHER_LETTER.findall(rest)} - {letter}
    return None if others else letter  # the rest may explain the choice, and must not add another


def _boolean(text: str) -> str | None:
    """yes or no, as the first word, or as the last one of a sentence that denies nothing."""
    words = _words(_line(text))
    said = [_BOOLEANS.get(word) for word in words]
    if not words or len({*said[:3]} - {None}) > 1:  # "yes and no"
        return None
    denied = any(word == "not" or word.endswith("nt") for word in words)
    return said[0] or (None if denied or len({*said} - {None}) > 1 else said[-1])


def _items(text: str) -> list[str]:
    """The parts of a list, numbers as numbers: "2.0, b and a" -> ["2", "a", "b"]."""
    return sorted(filter(None, (_item(part) for part in _COMMA.split(text))))


def _item(part: str) -> str:
    value, before, after = _find(part)
    return " ".join(_words(part)) if value is None or before or after else f"{value:.12g}"


def kind_of(gold: str, choices: tuple[str, ...] = ()) -> str:
    """What kind of answer the right one is; "(3, 4)" is text, as its order counts."""
    words = _words(gold)
    if choices or re.fullmatch(r"\(?[A-H]\)?\.?", gold.strip()):
        return "choice"
    if len(words) == 1 and words[0] in _BOOLEANS:
        return "boolean"
    value, before, after = _find(gold)
    if value is not None and not before and len(after) <= 1 and "(" not in gold:
        return "number"
    return "list" if len(_items(gold)) > 1 and gold.strip()[0] not in "([" else "text"


def vote(answer: str | None, kind: str, choices: tuple[str, ...] = ()) -> str | None:
    """What an answer says, so that equal votes are equal answers; None where it says nothing."""
    if not answer:
        return None
    if kind == "number":
        value = number(_line(answer))
        value = number(answer) if value is None else value
        return None if value is None else f"{value:.12g}"
    if kind == "choice":
        return _choice(answer, choices)
    if kind == "boolean":
        return _boolean(answer)
    if kind == "list":
        return " | ".join(_items(_line(answer))) or None
    return _same(_line(answer)) or None


def correct(guess: str | None, gold: Any, kind: str = "auto",
            choices: tuple[str, ...] = ()) -> bool:  # fmt: skip
    """Whether a guess is the right answer; `kind` is one of KINDS, "auto" asks kind_of(gold).

    Whole numbers must be equal, others to 1e-6 of their size. gold: a text, or what str() or
    ", ".join() makes one.
    """
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    gold = ", ".join(map(str, gold)) if isinstance(gold, list | tuple) else str(gold)
    kind = kind_of(gold, choices) if kind == "auto" else kind
    if not guess or not _same(guess) or not _same(gold):
        return False
    if _same(gold) in (_same(guess), _same(_line(guess))):
        return True
    if kind != "number":
        said = vote(guess, kind, choices)
        return kind != "text" and said is not None and said == vote(gold, kind, choices)
    where = _line(guess) if number(_line(guess)) is not None else guess
    (a, _, unit), (b, _, wanted) = _find(where), _find(gold)
    if a is None or b is None:
        return False
    unit, wanted = ({w.rstrip("s") for w in words} - {"%", "percent"} for words in (unit, wanted))
    if unit and wanted and not unit & wanted:
        return False
    return a == b if isinstance(a, int) and isinstance(b, int) else math.isclose(a, b, rel_tol=1e-6)
