"""Reading answers: where a completion states one, what it says, and whether it is right.

    reasoning, answer, strict = parse(completion)
    correct(answer, "1,042")                        # kind="auto" is told by the right answer
    correct(answer, "B", choices=("Rome", "Oslo"))

What to know when comparing with other graders:

1. Refusing a right answer costs one sample, but paying a wrong one teaches it. So the text around
   a value counts: "not 42", "42 or 43", "over 42", "40-42", "42 * 2" and "42x" state no answer.
2. A completion has one answer: the first value after "the answer is", or else the last value. An
   equation's answer is its last side, unless that is arithmetic: 12 + 30 = 42, but 42 = 6 * 7.
3. A unit may be left out, but must not differ: "42" and "4200 cm" are right for 42 m, and "42 km"
   is wrong. 50 % is right as 0.5 and as 50.
4. Texts must have equal words: "Paris (France)" is Paris, but "Paris, Rome" is not.
5. Completions are hostile text. Nothing is evaluated, values are read from 1,000 characters at most
   (after a cue, or at the end), and patterns over whole texts take time in proportion to the text.
6. Formulas may differ in notation and in the order of a sum. If the package math-verify is
   installed, it decides about all others (formulas.py).
"""

import calendar
import contextlib
import datetime
import math
import re
import unicodedata
from collections.abc import Iterator
from fractions import Fraction
from typing import Any, NamedTuple

KINDS = ("auto", "number", "choice", "boolean", "list", "math", "text")
TAGS = ["<reasoning>", "</reasoning>", "<answer>", "</answer>"]
TAG = re.compile("(" + "|".join(TAGS) + ")", re.IGNORECASE)
LONGEST = 1000  # characters that state an answer


def parse(completion: str) -> tuple[str | None, str | None, bool]:
    """(reasoning, answer, strict). Strict: each tag once, in order, neither empty, no other text.

    The answer is the text after the last <answer> that has any, closed or not; without an <answer>,
    the text after the last tag of all.
    """
    pieces = TAG.split(completion)
    texts, tags = [text.strip() for text in pieces[::2]], pieces[1::2]
    strict = tags == TAGS and [bool(text) for text in texts] == [False, True, False, True, False]
    after = [(tag.lower(), text) for tag, text in zip(tags, texts[1:], strict=True) if text]
    reasoning = next((text for tag, text in after if tag == "<reasoning>"), None)
    if "<answer>" in map(str.lower, tags):
        answers = [text for tag, text in after if tag == "<answer>"]
    else:
        answers = [text for text in texts if text]
    return reasoning, answers[-1] if answers else None, strict


# ---------------------------------------------------------------------------------- plain notation

_CHARACTERS = str.maketrans("−–—﹣－⁄÷×·⋅’‘ʼ\u00a0\u202f\u2009", "-----//***'''   ")
_RAISED = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁻⁺", "0123456789-+")
_SYMBOLS = {"pi": "π", "infty": "∞", "pm": "±", "cdot": "*", "times": "*", "div": "/", "le": "≤",
            "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈"}
_ARGUMENT = r"\s?(?:\{([^{}]{1,300})\}|(\w))"
_FRACTION = re.compile(rf"(\d?)\\[dt]?frac{_ARGUMENT}{_ARGUMENT}")
_ROOT = re.compile(rf"\\sqrt(?!\[){_ARGUMENT}")
_GROUP = re.compile(r"(?<=[\^_√])[{(]([^{}()]{1,300})[})]")
_NOTATION = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d)(?:\{,\}|,?\\[,!;: ])(?=\d{3}(?!\d))", ","),  # 10{,}000 and 10\,000
    (r"\\[,;:! ]|\\q?quad\b|\\[()\[\]]|\\(?:left|right|displaystyle)(?![a-z])", " "),
    (r"\\(?:text|textbf|mathrm|mathbf|mbox)\s?\{([^{}]{0,300})\}", r"\1"),
    (r"(?<!\\)\${1,2}([^$\n]{1,300})(?<!\\)\${1,2}(?!\d)", r" \1 "),  # $x$; not "$5 and $6"
    (r"\^\s?\{?\s?\\circ\s?\}?", "°"),
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"\*\*|__|`|</?(?:b|i|u|p|em|strong|code)>", ""),  # markdown and HTML
    (r"<=", "≤"), (r">=", "≥"), (r"[!=]=|\\not=", "≠"), (r"=>", "="), (r"(?<!\\)\bsqrt\b", "√"),
    (r"(?i)\b(it|that|there|what)'s\b", r"\1 is"), (r" & ", " and "),
    (r"(?<![A-Za-z\\])pi\b", "π"),
)]


def _grouped(m: re.Match, first: int = 1) -> str:
    """An argument of a LaTeX command, in brackets unless it is one number or letter."""
    text = (m[first] or m[first + 1]).strip()
    return text if re.fullmatch(r"[-√]{0,2}(?:[\d.]{1,30}|[A-Za-zπ])", text) else f"({text})"


def plain(text: str) -> str:
    """One notation: ½ -> 1/2, 3½ -> 3 1/2, − -> -, 10⁸ -> 10^8, ٤٢ -> 42, \\sqrt{2} -> √2."""
    text = re.sub(r"(?![0-9])\d", lambda m: str(int(m[0])), text)  # the digits of other scripts
    text = re.sub("(?<=[0-9])(?=[¼-¾⅐-⅞])", " ", text)
    text = re.sub("[¼-¾⅐-⅞]", lambda m: unicodedata.normalize("NFKC", m[0]), text)
    text = re.sub("[⁻⁺]?[⁰¹²³⁴-⁹]++", lambda m: "^" + m[0].translate(_RAISED), text)
    text = text.translate(_CHARACTERS)
    for pattern, replacement in _NOTATION:
        text = pattern.sub(replacement, text)
    text = re.sub(r"\\([A-Za-z]{1,20})", lambda m: _SYMBOLS.get(m[1], m[0]), text)
    mixed = lambda m: m[1] + " " if m[1] else ""  # 3\frac{1}{2} is 3 1/2
    for _ in range(4 if "\\" in text else 1):  # inner arguments first
        text = _GROUP.sub(_grouped, text)
        text = _ROOT.sub(lambda m: "√" + _grouped(m), text)
        text = _FRACTION.sub(lambda m: f"{mixed(m)}{_grouped(m, 2)}/{_grouped(m, 4)}", text)
    return re.sub(r"\\([%$#&{}])", r"\1", text)


# --------------------------------------------------------------------------------- answering spans

_CUE = re.compile(r"\banswers?[*_ ]{0,3}(?:(?:is|are)\b|[:=])|####|\\(?:boxed|fbox) ?\{", re.I)
_BALANCED = re.compile(r"(?:[^{}]|\{(?:[^{}]|\{[^{}]*\})*\})*")  # \boxed{ ends at its own brace
_REASON = re.compile(
    r"(?<=\w)[)\s.,;*$-]{1,4}\b(?:because|since|where|given that"
    r"|which(?!.*\b(?:wrong|incorrect|false)\b))\b.*", re.I | re.S)
_GLOSS = re.compile(r"(?<=\S)(?:\s\([^()]{1,200}\)|,? of course)(?=[\s.,!]*$)")  # Paris (France)
_IS = re.compile(r"\b(?:is|are|was|were|be)\b(?:\s(?:called|named|known as)\b)?", re.I)
_EQUALS = re.compile(rf"=|≈|{_IS.pattern}|\b(?:equals|makes?|gives?)\b", re.I)
_NAME = re.compile(r"^\s*(?:[A-Za-z]\w?(?:\([A-Za-z]\))?|\(\w, ?\w\))\s*=")  # x = 5, f(x) = 2x
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")
_CLAUSE = re.compile(r"[,;:]\s|(?<!all )(?<!thing )\bbut\b|$")
_DENIED = re.compile(r"\b(?:not?|cannot|\w{2,6}n't|never|neither|nor|none|except|without|doubt"
                     r"|nowhere|wrong|incorrect|false|(?:all|\w{2,5}thing) but)\b", re.I)
_UNSURE = re.compile(r"\b(?:or|either|if|unless|otherwise|maybe|perhaps|possibly|depends|sometimes"
                     r"|some|partly|(?:could|might|may) be)\b", re.I)


def _doubted(text: str) -> bool:
    return bool(_DENIED.search(text) or _UNSURE.search(text))


def stated(text: str) -> tuple[str, bool]:
    """(the part of a text that states its answer, in plain notation; whether a cue announced it).

    The part follows the last "answer is", "####" or "\\boxed{"; without one it is the text's end.
    """
    tails = [tail for tail in _CUE.split(text)[1:] if re.search(r"\w", tail)]
    if tails:
        return _BALANCED.match(plain(tails[-1].strip()[:LONGEST]))[0], True
    text = text.strip()
    return plain(text[-LONGEST:].partition(" ")[2] if len(text) > LONGEST else text), False


def line(text: str) -> str:
    """The line that states the answer, without its reason: the first after a cue, or the last."""
    text, cued = stated(text)
    lines = text.strip().split("\n")
    return _REASON.sub("", lines[0 if cued else -1]).strip(" \t:$")


def spans(text: str) -> Iterator[str]:
    """Spans that may be all of the answer: a line and, if nothing in it doubts, parts of it."""
    yield (one := line(text))
    if not _doubted(one):
        yield (sentence := _SENTENCE.split(one)[0])
        yield _GLOSS.sub("", sentence)
        yield _GLOSS.sub("", _IS.split(sentence)[-1])


# -------------------------------------------------------------------------- numbers and their units


class Quantity(NamedTuple):
    """A number of a text; its value is None where it cannot be read, as that of 1/0."""

    value: Fraction | None
    unit: tuple[str, ...] = ()  # its dimension ("length",), or the words: ("red", "apple")
    size: Fraction = Fraction(1)  # of the unit
    start: int = 0
    end: int = 0  # of the unit


_SCALES = {"k": 10**3, "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6,
           "billion": 10**9, "bn": 10**9, "trillion": 10**12}
_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen").split()
_TENS = ["zero", "ten", *"twenty thirty forty fifty sixty seventy eighty ninety".split()]
_WORDS = re.compile(
    rf"\b(?:({'|'.join(_TENS[2:])})(?:[- ]({'|'.join(_ONES[1:10])})\b)?|({'|'.join(_ONES)}))\b")
_ORDINALS = "first second third fourth fifth sixth seventh eighth ninth tenth".split()
_FIGURES = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"\b(?:a |1 )?half\b", "1/2"),
    (r"\b(?:(?:a|(1))[ -]|(\d+)[ -](?=\w+s\b))(?:(quarter)|(" + "|".join(_ORDINALS[2:]) + r"))s?\b",
     lambda m: f"{m[2] or 1}/{4 if m[3] else 1 + _ORDINALS.index(m[4])}"),  # 3 quarters, a third
    (r"(?<=\d) and (?=\d{1,3}/\d)", " "),
    (r"\bkph\b", "km/h"), (r"\bmph\b", "mi/h"),
    (rf"\ba (?={'|'.join(_SCALES)})", "1 "),
    (r"\b(?:minus|negative) (?=[$€£¥]?\d)", "-"), (r"\bper ?cent\b", "%"), (r" per (?=[a-z])", "/"),
    # "twice 42" becomes "* 42": a number beside an operator states no answer
    (r"\b(?:plus|times|(?:added|multiplied|divided) (?:to|by)|factorial|squared|cubed|twice|double"
     r"|root of|bce?)\b", "*"),
    (r"(?<=\d) ?[*x] ?10\^(?=[-+]?\d)", "e"),
    (r"(?<![\d.,])(?!0,)\d{1,3}(?:(?:,\d{3})+(?!,)|(?: \d{3})+|(?:\.\d{3}){2,})(?!\d)",
     lambda m: re.sub("[., ]", "", m[0])),  # 1,042 and 1 042 and 1.000.042
    (r"(?<![\d.,])(\d+),(?=\d+(?![\d,]))", r"\1."),  # 3,14
)]


def figured(text: str) -> str:
    """plain() in lower case, with figures and signs for words: minus six per day -> -6/day."""
    value = lambda m: str(10 * _TENS.index(m[1] or "zero") + _ONES.index(m[2] or m[3] or "zero"))
    text = _WORDS.sub(value, plain(text).casefold())
    for pattern, replacement in _FIGURES:
        text = pattern.sub(replacement, text)
    return text


_NUMBER = re.compile(
    rf"""(?<![a-z0-9_^.])                                    # not within a word or a number
    (?P<sign>[-+]?)[ ]?(?P<money>[$€£¥]|\b(?:usd|eur|gbp|jpy)\b)?[ ]?(?P<minus>-?)
    (?:(?P<whole>\d{{1,15}})[ ](?=\d{{1,15}}/\d))?           # 3 1/2
    (?P<top>\d+(?:\.\d+)?|\.\d+)(?:\^(?P<power>-?\d{{1,3}})(?!\d))?
    (?:[ ]?/[ ]?(?P<bottom>\d+(?:\.\d+)?))?(?:e(?P<e>[-+]?\d{{1,4}})\b)?
    (?:(?:[ ]|(?=k))(?P<scale>{"|".join(_SCALES)})s?\b)?""",
    re.VERBOSE,
)


def _value(m: re.Match) -> Fraction | None:
    """The value of a match of _NUMBER; None for 1/0, 1e999 and more than 200 characters."""
    power, e = int(m["power"] or 1), int(m["e"] or 0)
    if len(m[0]) > 200 or abs(power) * len(m["top"]) > 300 or abs(e) > 300:
        return None
    top, bottom = Fraction(m["top"]), Fraction(m["bottom"] or 1)
    if not bottom or not top and power < 0:
        return None
    value = Fraction(m["whole"] or 0) + top**power / bottom * Fraction(10) ** e
    value *= _SCALES.get(m["scale"], 1)
    return -value if (m["sign"] + m["minus"]).count("-") == 1 else value


_UNITS = {  # dimension: names and size of each unit
    "length": "mm millimeter 1/1000, cm centimeter 1/100, m meter 1, km kilometer 1000, "
              "inch 127/5000, ft foot feet 381/1250, mi mile 201168/125",
    "mass": "mg milligram 1/1000, g gram 1, kg kilogram kilo 1000, lb lbs pound 45359237/100000",
    "time": "s sec second 1, min minute 60, h hr hour 3600, d day 86400, week 604800",
    "volume": "ml milliliter 1/1000, l liter 1", "angle": "° degree 1", "celsius": "°c celsius 1",
    "dollar": "$ usd dollar buck 1, ¢ cent 1/100", "euro": "€ eur euro 1", "yen": "¥ jpy yen 1",
    "sterling": "£ gbp 1", "share": "% percent 1/100",
}
_KNOWN = {name: (dimension, Fraction(size))
          for dimension, units in _UNITS.items() for unit in units.split(", ")
          for *names, size in [unit.split()] for name in names}
_UNIT = re.compile(r"[ ]?(%|°c?|[$€£¥¢]|[a-zµ]+(?:\^[23])?(?:/[a-z]+(?:\^[23])?)*)")
_NO_UNIT = {*"a i in of for to at and or left total all per each on from with by".split()}


def _dimension(unit: str) -> tuple[str, Fraction]:
    """(dimension, size) of a unit: km/hours -> length/time, 1000/3600; boxes -> box, 1."""
    dimensions, sizes = [], []
    for word in re.sub(r"(met|lit)re", r"\1er", unit).split("/"):
        word, caret, power = word.partition("^")
        word = word if word in _KNOWN else re.sub(r"(s|x|z|ch|sh)es$|s$", r"\1", word)
        dimension, size = _KNOWN.get(word, (word, Fraction(1)))
        dimensions.append(dimension + caret + power)
        sizes.append(size ** int(power or 1))
    return "/".join(dimensions), sizes[0] / math.prod(sizes[1:])


def _unit(text: str, at: int) -> tuple[tuple[str, ...], Fraction, int]:
    """(the words that name a number's unit, its size, its end): " red apples in" -> red, apple."""
    names, size = [], Fraction(1)
    while len(names) < 4 and (m := _UNIT.match(text, at)) and m[1] not in _NO_UNIT:
        name, size = _dimension(m[1])
        known = re.split("[/^]", name)[0] in _UNITS
        if not known and (m[0] == m[1] or len(m[1]) == 1):
            break
        names.append(name)
        at = m.end()
        if known:
            break
    return tuple(names), size, at


def found_in(text: str) -> list[Quantity]:
    """The numbers of a text in figured() notation; "1 hour 30 minutes" is one of them."""
    out = []
    for m in _NUMBER.finditer(text):
        value, (unit, size, end) = _value(m), _unit(text, m.end())
        if m["money"]:
            dimension, size = _dimension(m["money"])
            unit = (dimension,)
        start = m.start() + len(m[0]) - len(m[0].lstrip())
        last = out[-1] if out else Quantity(None)
        joined = re.fullmatch(r"(?:,? and|,)? ?", text[last.end : start])
        if joined and unit == last.unit and size < last.size and None not in (value, last.value):
            value = last.value + value * size / last.size
            size, start = last.size, out.pop().start
        out.append(Quantity(value, unit, size, start, end))
    return out


def bare(text: str) -> Quantity | None:
    """The number that is all of a text, but for its unit and a name: "x = 5", "-$5", "45 g"."""
    text = figured(_NAME.sub("", plain(text[:LONGEST]))).strip(" .,;")
    found, *more = found_in(text) or [Quantity(None)]
    whole = found.start == 0 and found.end == len(text) and not more
    return found if whole and found.value is not None else None


# Text before or after a number that makes it say something else: an operator, a bound, a second
# number beside it, a doubt.
_NOT_AFTER = re.compile(
    r"(?:[-+*/^√±<>≤≥≠~_|]\(?|\w\(|(?:\d|hundred|thousand|illion)[)\]\s,:;-]*(?:\b(?:and|to|through|of|over))?[\s(]*"
    r"|\b(?:than|over|under|above|below|before|until|near|at least|at most|up to|almost|nearly"
    r"|exceed\w*|log|ln|sin|cos|tan)\b[ a-z]{0,15})$")
_NOT_BEFORE = re.compile(
    r"[\s)]*(?:[*/^√±<>≤≥≠∞π?_\\]|!+(?=[\w/*+^(-])|\+\s*$|[-+]\s*(?:[\d(√]|[a-z]\b)"
    r"|[\s,:;]*(?:(?:and|to|or)\s)?\s*[-$]?\.?\d|[,;.:-]?\s*(?:or|no|wrong|incorrect)\b)"
    r"|[\w(]|\s[b-hj-z]\b")


def _pick(side: str, first: bool) -> Quantity | None:
    """The first or last number of one side of an equation, of the clauses that deny nothing.

    None if what stands beside it changes what it says.
    """
    found, allowed, at = found_in(side), [], 0
    for m in _CLAUSE.finditer(side):
        if not _doubted(side[at : m.start()]):
            allowed += [f for f in found if at <= f.start < m.end()]
        at = m.end()
    if not allowed or (chosen := allowed[0 if first else -1]).value is None:
        return None
    before = side[max(0, chosen.start - 40) : chosen.start].rstrip()
    operator = side[chosen.start] in "+-" and re.search(r"(?:\d|\)|\b[a-z])$", before)
    changed = _NOT_AFTER.search(before) or _NOT_BEFORE.match(side[chosen.end :])
    return None if operator or changed else chosen


def quantity(text: str) -> Quantity | None:
    """The number that a text states as its answer; None where none is stated for certain."""
    text, cued = stated(text)
    text = figured(text)
    if text.strip(" .!") in ("none", "nothing"):
        return Quantity(Fraction(0))
    sentences = [one for one in _SENTENCE.split(text) if re.search(r"\d", one)]
    if not sentences:
        return None
    sentence = _GLOSS.sub("", _REASON.sub("", sentences[0 if cued else -1]))
    *sides, last = _EQUALS.split(sentence)
    if sides and any(map(_DENIED.search, _CLAUSE.split(sides[-1])[-2:])):  # I do not think it is 42
        return None
    if re.search(r"\d", last) and (found := _pick(last, cued)):
        return found
    calculation = re.fullmatch(r"[\d\s.,+*/^()√!-]+", last)  # 42 = 6 * 7
    remark = not re.search(r"\d|[<>≤≥≠]|\b(?:than|too)\b", last) and not _DENIED.search(last)
    return _pick(sides[-1], cued) if sides and (calculation or remark) else None


def number(text: str) -> int | float | None:
    """The number that a text states as its answer, without its unit; never nan or inf."""
    found = quantity(text)
    if found is None or abs(found.value) > 10**300:
        return None
    return int(found.value) if found.value.denominator == 1 else float(found.value)


def _near(a: Fraction, b: Fraction) -> bool:
    """Whole numbers must be equal, others to 1e-6 of their size."""
    whole = a.denominator == b.denominator == 1
    return a == b or not whole and abs(a - b) <= max(abs(a), abs(b)) / 10**6


def same_quantity(guess: Quantity, gold: Quantity) -> bool:
    """Whether two numbers are equal in their units; one that has none is in the other's."""
    (a, unit, size, *_), (b, wanted, scale, *_) = guess, gold
    if unit and wanted:
        return _near(a * size, b * scale) and not {*unit}.isdisjoint(wanted)
    if "share" in unit:  # 50 % is 0.5 and 50, but 0.5 % is not 0.5
        return _near(a / 100, b) or _near(a, b) and abs(b) > 1
    return _near(a, b) or "share" in wanted and _near(a, b / 100)


# ------------------------------------------------------------------------------- texts and formulas

_DROP = re.compile(r"""[,;:!?"`´“”()\[\]{}…_*~¿¡$]|\.(?!\d)|-(?!\.?\d)""")
_ARTICLE = re.compile(r"^\W{0,9}(?:(?:on|in|at)\s+)?(?:(?:the|an?)\s+)?(?=\w)")
_RANGE = re.compile(r"^(?:(?:from )?(\d+) ?(?:to|-) ?|between (\d+) and )(?=\d+\W*$)")
_BULLET = re.compile(r"(?m)\n?^\s{0,9}(?:[-*•]|\d{1,2}[.)])\s{1,9}(?=\S)")
_PARTS = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))|[;\n]|\band\b", re.I)


_NTH = {word: f"{n}{'st nd rd'.split()[n - 1] if n < 4 else 'th'}"
        for n, word in enumerate(_ORDINALS, 1)}


def words(text: str, hyphen: str = " ") -> str:
    """The words of a text without case, punctuation and article; -1, 0.5, C++ and 5% stay.

    first is 1st, "in the Alps" is Alps.
    """
    text = _ARTICLE.sub("", plain(text).casefold().replace("'", ""))
    text = re.sub(r"(?<=\b[a-z])\.(?=[a-z]\b)|(?<=\d) (?=[ap]\.?m\b)", "", text)  # 3 p.m. -> 3pm
    text = _RANGE.sub(r"\1\2 to ", text)
    text = re.sub(r"(?<=\w)-(?=[^\W\d])", hyphen, text)
    return " ".join(_NTH.get(word, word) for word in _DROP.sub(" ", text).split())


def _day(text: str) -> datetime.date | None:
    """The day that a text names, as January 15th, 2024 and 2024-01-15 do."""
    with contextlib.suppress(ValueError):
        return datetime.date.fromisoformat(text.strip(" ."))
    said = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|\bof\b", "", words(text)).split()
    months = [n for word in said for n, name in enumerate(calendar.month_name)
              if len(word) > 2 and name.casefold().startswith(word)]
    numbers = sorted(int(word) for word in said if re.fullmatch("[0-9]{1,4}", word))
    if len(said) == 3 and len(months) == 1 and len(numbers) == 2:
        with contextlib.suppress(ValueError):
            return datetime.date(numbers[1], months[0], numbers[0])
    return None


def formula(text: str) -> str:
    """A formula without spaces and its own name, its terms in order: y = 1 + x^2 -> +1+x^2."""
    text = _NAME.sub("", plain(text)).strip(" .,;$").casefold()
    text = re.sub(r"\s+(?!(?<=\d )\d)|(?<=[\w)])\*(?=[a-z(√π])", "", text)
    terms = re.split(r"(?<=[^\^*/(=<>])(?=[+-])(?![^(\[{]*[)\]}])", text)  # at no sign in brackets
    return "".join(sorted(term if term[:1] in "+-" else f"+{term}" for term in terms if term))


def _item(part: str) -> str:
    """One item of a list, in one spelling."""
    if found := bare(part):
        return " ".join([str(found.value * found.size), *found.unit])
    return words(_NAME.sub("", part)) if re.search(r"[^\W\d_]{2}", part) else formula(part)


def items(text: str) -> tuple[str, list[str]]:
    """(its brackets, its items) of a list, a point or an interval: "(2.0, b)" -> "()", [2, b]."""
    text = _NAME.sub("", plain(text)).strip(" .;$")
    first, inner, last = re.fullmatch(r"([(\[{]?)(.*?)([)\]}]?)", text, re.S).groups()
    numbered = re.fullmatch(r"[-\d./ ]+", inner)  # 2 3 5
    parts = inner.split() if numbered else _PARTS.split(inner)
    return first + last, [*filter(None, map(_item, parts))]


def same_formula(guess: str, gold: str) -> bool:
    """Whether two formulas, points or intervals are equal but for notation."""
    (brackets, said), (expected, wanted) = items(guess), items(gold)
    if said == wanted and len(said) > 1:
        return brackets == expected or (brackets, expected) == ("", "()")
    return formula(guess) == formula(gold) != ""


def _proved(guess: str, gold: str) -> bool:
    """Whether math-verify finds the formula that a guess states equal to the right one."""
    *_, said = spans(guess)
    said, wanted = _NAME.sub("", said), _NAME.sub("", plain(gold)).strip()
    doubtful = _doubted(said) or re.search("[A-Za-z]{5}|[?,]", said) or "," in wanted
    if doubtful or max(len(said), len(wanted)) > 300:
        return False
    import formulas  # which starts a process, so where it is asked for

    return formulas.equal(said, wanted)


# ----------------------------------------------------------------------------- choices and booleans

_LETTER = re.compile(  # a letter, and the text it introduces
    r"[\s(\[*]*([a-z])(?:[)\].:,;*]+(.*)|\s+(?:-\s*|(?=is\b|\())(.*)|\s*$)", re.I | re.S)
_LEAD = re.compile(r"\b(?:is|are|be|was|choose|pick|select|say|option|choice|answer|letter|with"
                   r"|so|thus|hence|therefore)\b,?", re.I)
_OTHER = re.compile(r"\b([A-H])[)\].:]|(?:\bor|\band|[,/])\s{0,2}[(\[]?([A-H])\b|^\s*([A-H])\s*$")
_NOT = re.compile(r"not|never|cannot|(?:is|are|ai|was|were|do|does|did|have|has|had|ca|could|would"
                  r"|should|wo)nt")
_POLARITY = {**dict.fromkeys(("yes", "true", "correct", "yeah", "yep", "y", "t"), "yes"),
             **dict.fromkeys(("no", "false", "incorrect", "wrong", "nope", "n", "f"), "no")}


def _choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter a text chooses: "B", "B is right", "(B) its text", or the text of choice B."""
    texts, one = [words(choice) for choice in choices], line(text)
    for span in spans(text):
        if len(span) > 1 and words(span) in texts:
            return chr(ord("A") + texts.index(words(span)))
    for span in (one, _LEAD.split(one)[-1]):
        m = _LETTER.match(span)
        n = ord(m[1].upper()) - ord("A") if m else 99
        if n >= (len(choices) or 8):
            continue
        letter, rest = m[1].upper(), m[2] or m[3] or ""
        if words(rest) in texts:
            return letter if texts[n] == words(rest) else None
        named = {i for i, text in enumerate(texts) if text and f" {text} " in f" {words(rest)} "}
        others = {a or b or c for a, b, c in _OTHER.findall(rest)} - {letter}
        return None if _doubted(one) or others or named - {n} else letter
    return None


def _boolean(text: str) -> str | None:
    """yes or no: the first or last word of a line or its predicate, which nothing contradicts."""
    one = re.sub(r"\bno (?:doubt|problem|question)\b", "", line(text).casefold())
    told, values, denial = words(one).split(), set(), 99  # denial: words since the last "not"
    for word in told:
        denial = 0 if _NOT.fullmatch(word) else denial + 1
        value = _POLARITY.get(word) if len(word) > 1 or len(told) == 1 else None
        if value and denial <= 2:
            value, denial = {"yes": "no", "no": "yes"}[value], 99
        values |= {value} - {None}
    if not values and denial == 0 and not _UNSURE.search(one):  # definitely not
        return "no"
    places = {*told[:1], *told[-1:], *words(_IS.split(one)[-1]).split()[:1]}
    if _UNSURE.search(one) or "half" in told or places.isdisjoint(_POLARITY) or len(values) != 1:
        return None
    (said,) = values
    return None if said == "yes" and denial < 99 else said


# ------------------------------------------------------------------------------------ the verdict


_OPERAND = r"(?:\d|(?<![A-Za-z])[A-Za-z]|[)πx√])"
_MATHEMATICS = re.compile(
    rf"[\^√π∞±≤≥≠\\|]|{_OPERAND}\s*[-+*/=<>]\s*[\d(A-Za-zπ√](?![A-Za-z])|^[-(\[]|\d[a-z]\b|\d!")


def kind_of(gold: str, choices: tuple[str, ...] = ()) -> str:
    """What kind of answer the right one is; "(3, 4)" is math, as its order counts."""
    text = plain(gold).strip()
    if choices or re.fullmatch(r"\(?[A-H]\)?\.?", text):
        return "choice"
    if len(text) > 1 and words(gold) in _POLARITY:
        return "boolean"
    if bare(gold):
        return "number"
    if _day(gold):
        return "text"
    if text[:1] not in ("(", "[") and len(items(text)[1]) > 1:
        return "list"
    date = re.fullmatch(r"[\d\s.:/-]*", text)
    return "math" if _MATHEMATICS.search(text) and not date else "text"


def vote(answer: str | None, kind: str, choices: tuple[str, ...] = ()) -> str | None:
    """What an answer says, so that equal votes are equal answers; None where it says nothing."""
    if not answer or not answer.strip():
        return None
    if kind == "number":
        return None if (value := number(answer)) is None else f"{value:.12g}"
    if kind == "choice":
        return _choice(answer, choices)
    if kind == "boolean":
        return _boolean(answer)
    if kind == "list":
        if len(_BULLET.findall(answer)) > 1:
            answer = _BULLET.sub(", ", answer)
        *_, one = spans(answer)
        return None if _doubted(one) else " | ".join(sorted(items(one)[1])) or None
    if kind == "math":
        return formula(line(answer)) or None
    return words(line(answer)) or line(answer) or None


def correct(guess: str | None, gold: Any, kind: str = "auto",
            choices: tuple[str, ...] = ()) -> bool:
    """Whether a guess is the right answer; `kind` is one of KINDS, "auto" asks kind_of(gold)."""
    if kind not in KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(KINDS)}")
    gold = ", ".join(map(str, gold)) if isinstance(gold, list | tuple) else str(gold)
    guess, gold = (guess or "").strip(), gold.strip()
    if not guess or not gold or guess == gold:
        return guess == gold != ""
    if len(gold) > LONGEST:  # an essay
        return words(guess) == words(gold) != ""
    kind = kind_of(gold, choices) if kind == "auto" else kind
    if kind == "number":
        said, wanted = quantity(guess), bare(gold) or quantity(gold)
        return bool(said and wanted) and same_quantity(said, wanted)
    if kind == "math":
        return any(same_formula(span, gold) for span in spans(guess)) or _proved(guess, gold)
    if kind == "text":
        hyphens = (" ", "") if "-" in gold else (" ",)  # non-profit is non profit and nonprofit
        day = _day(gold)
        return any(words(span, hyphen) == words(gold, hyphen) != "" or day and day == _day(span)
                   for span in (guess, *spans(guess)) for hyphen in hyphens)
    said = vote(guess, kind, choices)
    return said is not None and said == vote(gold, kind, choices)
