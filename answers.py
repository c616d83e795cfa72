"""Reading answers: where a completion states one, what it says, and whether it is right.

    reasoning, answer, strict = parse(completion)
    correct(answer, "1,042")                        # kind="auto" is told by the right answer
    correct(answer, "B", choices=("Rome", "Oslo"))

The guess and the right answer ("gold") take the same four steps:

    plain      one notation for LaTeX, Unicode and markdown     $\\frac{1}{2}$ kg -> 1/2 kg
    span       the words that state the answer                  So the answer is 42. Easy! -> 42.
    value      what those words say, by kind                    1.5 hours -> 3/2, hour
    compare    numbers with their units, texts word by word     3/2 hour = 90 min

What to know when comparing with other graders:

1. Refusing a right answer costs one sample, but paying a wrong one teaches it. So the text around
   a value counts: "not 42", "42 or 43", "over 42", "40-42", "42 * 2", "42x" and "B or C" state no
   answer.
2. A completion has one answer: the first value after "the answer is", or else the last value. An
   equation's answer is its last side, unless that is arithmetic: 12 + 30 = 42, but 42 = 6 * 7.
3. A unit may be left out, but must not differ: "42", "42 m" and "4200 cm" are right for 42 m, and
   "42 km" is wrong. 50 % is right as 0.5 and as 50.
4. Texts must have equal words. "Paris (France)" is Paris; "Paris, France" is not, because "Paris,
   Rome" is not.
5. Completions are hostile text. Nothing is evaluated, values are read from 1,000 characters at most
   (after a cue, or at the end), and patterns over whole texts take time in proportion to the text.
6. Formulas may differ in notation and in the order of a sum. If the package math-verify is
   installed, it decides about all others (formulas.py).
"""

import contextlib
import datetime
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

    The answer needs no strict format. It is the text after the last <answer> that has any, closed
    or not; without an <answer>, the text after the last tag of all; without tags, the whole text.
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
            "leq": "≤", "ge": "≥", "geq": "≥", "ne": "≠", "neq": "≠", "approx": "≈", "degree": "°"}
_ARGUMENT = r"\s?(?:\{([^{}]{1,300})\}|(\w))"
_FRACTION = re.compile(rf"(\d?)\\[dt]?frac{_ARGUMENT}{_ARGUMENT}")
_ROOT = re.compile(rf"\\sqrt(?!\[){_ARGUMENT}")
_GROUP = re.compile(r"(?<=[\^_√])[{(]([^{}()]{1,300})[})]")
_NOTATION = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"(?<=\d)(?:\{,\}|,?\\[,!;: ])(?=\d{3}(?!\d))", ","),  # 10{,}000 and 10\,000
    (r"\\[,;:! ]|\\q?quad\b|\\[()\[\]]|\\(?:left|right|displaystyle)(?![a-z])", " "),
    (r"\\(?:text|textbf|textit|mathrm|mathbf|mbox)\s?\{([^{}]{0,300})\}", r"\1"),
    (r"(?<!\\)\${1,2}([^$\n]{1,300})(?<!\\)\${1,2}(?!\d)", r" \1 "),  # $x$; not "$5 and $6"
    (r"\^\s?\{?\s?\\circ\s?\}?", "°"),
    (r"(?<=\d)\*\*(?=\d)", "^"),
    (r"\*\*|__|`|</?(?:b|i|u|p|em|strong|code)>", ""),  # markdown and HTML
    (r"<=", "≤"), (r">=", "≥"), (r"[!=]=|\\not=", "≠"), (r"=>", "="), (r"(?<!\\)\bsqrt\b", "√"),
    (r"(?i)\b(it|that|there|what)'s\b", r"\1 is"),
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
_REASON = re.compile(
    r"(?<=\w)[)\s.,;*$-]{1,4}\b(?:because|since|which|where|given that)\b.*", re.I | re.S)
_GLOSS = re.compile(r"(?<=\S)\s\([^()]{1,200}\)(?=[\s.,!]*$)")  # Paris (France)
_IS = re.compile(r"\b(?:is|are|was|were|be)\b", re.I)
_EQUALS = re.compile(rf"=|≈|{_IS.pattern}|\b(?:equals|makes?|gives?)\b", re.I)
_NAME = re.compile(r"^\s*(?:[A-Za-z]\w?(?:\([A-Za-z]\))?|\(\w, ?\w\))\s*=")  # x = 5, f(x) = 2x
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")
_CLAUSE = re.compile(r"[,;:]\s|(?<!all )(?<!thing )\bbut\b|$")
_DENIED = re.compile(r"\b(?:not?|cannot|\w{2,6}n't|never|neither|nor|none|except|without|wrong"
                     r"|incorrect|false|(?:all|\w{2,5}thing) but)\b", re.I)
_UNSURE = re.compile(r"\b(?:or|either|if|unless|otherwise|maybe|perhaps|possibly|depends|sometimes"
                     r"|some|partly)\b", re.I)


def stated(text: str) -> tuple[str, bool]:
    """(the part of a text that states its answer, in plain notation; whether a cue announced it).

    The part follows the last "answer is", "####" or "\\boxed{"; without one it is the text's end.
    """
    tails = [tail for tail in _CUE.split(text)[1:] if re.search(r"\w", tail)]
    if not tails:
        text = text.strip()
        return plain(text[-LONGEST:].partition(" ")[2] if len(text) > LONGEST else text), False
    text, depth = plain(tails[-1].strip()[:LONGEST]), 0
    for i, character in enumerate(text):  # \boxed{ ends at its own brace
        depth += (character == "{") - (character == "}")
        if depth < 0:
            return text[:i], True
    return text, True


def line(text: str) -> str:
    """The line that states the answer, without its reason: the first after a cue, or the last."""
    text, cued = stated(text)
    lines = text.strip().split("\n")
    return _REASON.sub("", lines[0 if cued else -1]).strip(" \t:$")


def spans(text: str) -> Iterator[str]:
    """Spans that may be all of the answer: a line and, if nothing in it doubts, parts of it."""
    yield (one := line(text))
    if not _DENIED.search(one) and not _UNSURE.search(one):
        yield (sentence := _SENTENCE.split(one)[0])
        yield _GLOSS.sub("", sentence)
        yield _GLOSS.sub("", _IS.split(sentence)[-1])


# -------------------------------------------------------------------------- numbers and their units


class Quantity(NamedTuple):
    value: Fraction
    unit: tuple[str, ...]  # the currency, or the words after the number: ("km",), ("red", "apple")


class Found(NamedTuple):
    quantity: Quantity | None  # None: a number that cannot be read
    start: int
    end: int  # of its unit


_SCALES = {"k": 10**3, "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6,
           "billion": 10**9, "bn": 10**9, "trillion": 10**12}
_ONES = ("zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen "
         "fifteen sixteen seventeen eighteen nineteen")
_TENS = "twenty thirty forty fifty sixty seventy eighty ninety"
_SPELT = {
    **{word: n for n, word in enumerate(_ONES.split())},
    **{word: 10 * n for n, word in enumerate(_TENS.split(), 2)},
    "half": Fraction(1, 2), "third": Fraction(1, 3), "thirds": Fraction(1, 3),
    "quarter": Fraction(1, 4), "quarters": Fraction(1, 4),
    **{word: n for word, n in _SCALES.items() if len(word) > 2},
}
_WORD = f"(?:{'|'.join(sorted(_SPELT, key=len, reverse=True))})"
_WORDS = re.compile(  # not after a figure: "1 hundred" is read by _NUMBER
    rf"(?<!\d )(?<![\w-]){_WORD}(?:(?:[ -]| and a |(?<=red) and |(?<=sand) and ){_WORD})*+\b")
# What a sign stands beside is no number by itself, so any operator does for "twice".
_SIGNS = [(re.compile(pattern), sign) for pattern, sign in (
    (r"\b(?:minus|negative) (?=[$€£¥]?\d)", "-"), (r"\b(?:plus|added to)\b", "+"),
    (r"\b(?:times|multiplied by)\b", "*"), (r"\bdivided by\b", "/"), (r" factorial\b", "*"),
    (r"\b(?:twice|double|triple)\b", "*"), (r" squared\b", "^2"), (r" cubed\b", "^3"),
    (r"\bsquare root of\b", "√"), (r"\bper ?cent\b", "%"), (r" per (?=[a-z])", "/"),
    (r"(?<=\d) and (?:a|1) 1/2\b", " 1/2"),
)]


def _figures(m: re.Match) -> str:
    """forty-two -> 42, three and a half -> 7/2; words that make no number stay as they are."""
    total = current = 0
    previous = None
    for word in re.split("[ -]", m[0]):
        n = _SPELT.get(word)
        if n is None:  # and, a
            pass
        elif n and n < 1:
            current = current + n if previous == "a" else (current or 1) * n
        elif word in _SCALES:
            current = (current or 1) * n
            if n >= 1000:
                total, current = total + current, 0
        elif current % 10 or current % 100 and n > 9 or previous == "zero":
            return m[0]
        else:
            current += n
        previous = word
    return str(total + current)


def figured(text: str) -> str:
    """plain() in lower case, with figures and signs for words: minus six per day -> -6/day."""
    text = _WORDS.sub(_figures, plain(text).casefold())
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    return text


_DIGITS = r"""(?:\d{1,3}(?:,\d{3}(?!\d))+(?:\.\d+)?          # 1,042.5
    |\d{1,3}(?:\.\d{3}(?!\d)){2,}(?:,\d+)?                   # 1.000.042
    |\d{1,3}(?:[ ]\d{3}(?!\d))+                              # 1 042
    |(?:0,\d+|\d+,(?!\d{3}(?!\d))\d+)                        # 3,14
    |\d+(?:\.\d+)?|\.\d+)"""
_NUMBER = re.compile(
    rf"""(?<![a-z0-9_^.])                                    # not within a word or a number
    (?P<sign>[-+]?)[ ]?(?P<money>[$€£¥]|\b(?:usd|eur|gbp|jpy)\b)?[ ]?(?P<minus>-?)
    (?:(?P<whole>\d{{1,15}})[ ](?=\d{{1,15}}/\d))?           # 3 1/2
    (?P<top>{_DIGITS})(?:\^(?P<power>-?\d{{1,3}})(?!\d))?
    (?:[ ]?/[ ]?(?P<bottom>{_DIGITS}))?
    (?:e(?P<e>[-+]?\d{{1,4}})\b|[ ]?[*x][ ]?10\^(?P<ten>[-+]?\d{{1,4}}))?
    (?:(?:[ ]|(?=k))(?P<scale>{"|".join(_SCALES)})s?\b)?""",
    re.VERBOSE,
)


def _decimal(text: str) -> Fraction:
    """1,042.5 · 1.000.042 · 1 042 · 3,14"""
    if re.fullmatch(r"\d{1,3}(?:\.\d{3}){2,}(?:,\d+)?", text):
        text = text.replace(".", "").replace(",", ".")
    elif "," in text and not re.match(r"(?!0,)\d{1,3}(?:,\d{3})+(?!\d)", text):
        text = text.replace(",", ".")
    return Fraction(re.sub("[, ]", "", text))


def _value(m: re.Match) -> Fraction | None:
    """The value of a match of _NUMBER; None for 1/0, 1e999 and more than 200 characters."""
    power, e = int(m["power"] or 1), int(m["e"] or m["ten"] or 0)
    if len(m[0]) > 200 or abs(power) * len(m["top"]) > 300 or abs(e) > 300:
        return None
    top, bottom = _decimal(m["top"]), _decimal(m["bottom"] or "1")
    if not bottom or not top and power < 0:
        return None
    value = Fraction(m["whole"] or 0) + top**power / bottom * Fraction(10) ** e
    value *= _SCALES.get(m["scale"], 1)
    return -value if (m["sign"] + m["minus"]).count("-") == 1 else value


_UNITS = {  # dimension: names and size of each unit
    "length": "mm millimeter millimetre 1/1000, cm centimeter centimetre 1/100, m meter metre 1, "
              "km kilometer kilometre 1000, inch 127/5000, ft foot feet 381/1250, "
              "yd yard 1143/1250, mi mile 201168/125",
    "mass": "mg milligram 1/1000, g gram 1, kg kilogram kilo 1000, t ton tonne 1000000, "
            "oz ounce 28349523125/1000000000, lb lbs pound 45359237/100000",
    "time": "ms millisecond 1/1000, s sec second 1, min minute 60, h hr hour 3600, d day 86400, "
            "week 604800",
    "volume": "ml milliliter millilitre 1/1000, cl 1/100, l liter litre 1",
    "dollars": "$ usd dollar buck 1, ¢ cent 1/100", "euros": "€ eur euro 1", "yen": "¥ jpy yen 1",
    "sterling": "£ gbp 1", "share": "% percent 1/100", "angle": "° degree 1",
    "celsius": "°c celsius 1", "fahrenheit": "°f fahrenheit 1",
}
_KNOWN = {name: (dimension, Fraction(size), names[0])
          for dimension, units in _UNITS.items() for unit in units.split(", ")
          for *names, size in [unit.split()] for name in names}
_UNIT = re.compile(r"[ ]?(%|°[cf]?|[$€£¥¢]|[a-zµ]+(?:\^[23])?(?:/[a-z]+(?:\^[23])?)*)")
_NO_UNIT = {*"a i in of for to at and or left total all per each on from with by".split()}


def _name(unit: str) -> str:
    """One name for the spellings of a unit: grams -> g, km/hour -> km/h, boxes -> box."""
    singular = lambda word: re.sub(r"(s|x|z|ch|sh)es$|s$", r"\1", word)
    known = lambda word: _KNOWN.get(word) or _KNOWN.get(singular(word))
    return "/".join(known(word)[2] if known(word) else singular(word) for word in unit.split("/"))


def _unit(text: str, at: int) -> tuple[tuple[str, ...], int]:
    """(the words that name a number's unit, where they end): " red apples in" -> red, apple."""
    names = []
    while len(names) < 4 and (m := _UNIT.match(text, at)):
        name, attached = _name(m[1]), m[0] == m[1]
        known = re.split("[/^]", name)[0] in _KNOWN
        if m[1] in _NO_UNIT or not known and (attached or len(m[1]) == 1):
            break
        names.append(name)
        at = m.end()
        if known:
            break
    return tuple(names), at


def _measure(unit: tuple[str, ...]) -> tuple[str, Fraction]:
    """(dimension, size) of a unit; an unknown one is a dimension of its own."""
    return _KNOWN.get(unit[0], (unit[0], Fraction(1)))[:2] if unit else ("", Fraction(1))


def found_in(text: str) -> list[Found]:
    """The numbers of a text in figured() notation; "1 hour 30 minutes" is one of them."""
    out = []
    for m in _NUMBER.finditer(text):
        value, (unit, end) = _value(m), _unit(text, m.end())
        unit = (_name(m["money"]),) if m["money"] else unit
        start = m.start() + len(m[0]) - len(m[0].lstrip())
        if value is not None and out and (last := out[-1]).quantity:
            (dimension, size), (other, bigger) = _measure(unit), _measure(last.quantity.unit)
            joined = re.fullmatch(r"(?:,? and|,)? ?", text[last.end : start])
            if joined and dimension == other and size < bigger:
                value = last.quantity.value + value * size / bigger
                unit, start = last.quantity.unit, out.pop().start
        out.append(Found(None if value is None else Quantity(value, unit), start, end))
    return out


def numbers(text: str) -> list[Quantity]:
    """All numbers that can be read in the first LONGEST characters of a text."""
    return [found.quantity for found in found_in(figured(text[:LONGEST])) if found.quantity]


def bare(text: str) -> Quantity | None:
    """The number that is all of a text, but for its unit and a name: "x = 5", "-$5", "45 g"."""
    text = figured(_NAME.sub("", plain(text[:LONGEST]))).strip(" .,;")
    match found_in(text):
        case [found] if found.start == 0 and found.end == len(text):
            return found.quantity
    return None


# Text before or after a number that makes it say something else: an operator, a bound, a second
# number beside it, a doubt.
_NOT_AFTER = re.compile(
    r"""(?:[-+*/^√±<>≤≥≠~_]\(?|\w\(|\d[)\]\s,:;-]*(?:\b(?:and|to|through|of|over))?[\s(]*
    |\b(?:than|over|under|above|below|at[ ]least|at[ ]most|up[ ]to|almost|nearly|exceed\w*
    |log|ln|sin|cos|tan|root[ ]of)\b[ a-z]{0,15})$""",
    re.VERBOSE,
)
_NOT_BEFORE = re.compile(
    r"""[\s)]*(?:[*/^√±<>≤≥≠∞π?_\\]|!+(?=[\w/*+^(-])|\+\s*$|[-+]\s*(?:[\d(√]|[a-z]\b)
    |[\s,:;]*(?:(?:and|to|or)\s)?\s*[-$]?\.?\d|[,;.:-]?\s*(?:or|no|wrong|incorrect)\b)
    |[\w(]|\s[b-hj-z]\b""",
    re.VERBOSE,
)


def _alone(text: str, found: Found) -> bool:
    """Whether nothing beside a number changes what it says."""
    before, sign = text[max(0, found.start - 40) : found.start], text[found.start : found.start + 2]
    operator = sign[0] in "+-" and re.search(r"(?:\d|\)|\b[a-z])\s*$", before)
    dash = sign == "- " and before.strip()
    changed = _NOT_AFTER.search(before.rstrip()) or _NOT_BEFORE.match(text[found.end :])
    return not (operator or dash or changed)


def _pick(side: str, first: bool) -> Quantity | None:
    """The first or last number of one side of an equation, of the clauses that deny nothing."""
    found, allowed, at = found_in(side), [], 0
    for m in _CLAUSE.finditer(side):
        clause, began, at = side[at : m.start()], at, m.end()
        if not _DENIED.search(clause) and not _UNSURE.search(clause):
            allowed += [f for f in found if began <= f.start < at]
    if not allowed or not _alone(side, chosen := allowed[0 if first else -1]):
        return None
    return chosen.quantity


def quantity(text: str) -> Quantity | None:
    """The number that a text states as its answer; None where none is stated for certain."""
    text, cued = stated(text)
    text = figured(text)
    if text.strip(" .!") in ("none", "nothing"):
        return Quantity(Fraction(0), ())
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


def same_quantity(guess: Quantity, gold: Quantity) -> bool:
    """Whether two numbers are equal in their units; one that has none is in the other's."""
    (a, unit), (b, wanted) = guess, gold
    if unit and wanted:
        (dimension, size), (other, scale) = _measure(unit), _measure(wanted)
        if dimension == other:
            return _near(a * size, b * scale)
        return _near(a, b) and not {*unit}.isdisjoint(wanted)
    if "%" in unit:
        return _near(a / 100, b) or _near(a, b) and abs(b) > 1
    return _near(a, b) or "%" in wanted and _near(a, b / 100)


def _near(a: Fraction, b: Fraction) -> bool:
    """Whole numbers must be equal, others to 1e-6 of their size."""
    whole = a.denominator == b.denominator == 1
    return a == b or not whole and abs(a - b) <= max(abs(a), abs(b)) / 10**6


# ---------------------------------------------------------------------------------- texts and lists

_DROP = re.compile(r"""[,;:!?"`´“”()\[\]{}…_*~¿¡$]|\.(?!\d)|-(?!\.?\d)""")
_ARTICLE = re.compile(r"^\W{0,9}(?:the|an?)\s+(?=\w)")
_PARTS = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))|[;\n]|\band\b", re.I)
_DATES = ("%Y-%m-%d", "%d %B %Y", "%d %b %Y", "%B %d %Y", "%b %d %Y")
_CLOCK = re.compile(r"(\d{1,2})(?::(\d\d)|\.(\d\d)(?= ?[ap]))(?: ?([ap])\.?m)?")
_RANGE = re.compile(r"(?:(?:from )?([\d.]+) ?(?:-|to) ?|between ([\d.]+) and )([\d.]+)")


def words(text: str, hyphen: str = " ") -> str:
    """The words of a text without case, punctuation and article; -1, 0.5, C++ and 5% stay."""
    text = _ARTICLE.sub("", plain(text).casefold().replace("'", ""))
    text = re.sub(r"(?<=\w)-(?=[^\W\d])", hyphen, text)
    return " ".join(_DROP.sub(" ", text).split())


def _date_or_range(text: str) -> Any:
    """January 15th, 2024 -> a date; between 10 and 20 -> ("10", "20"); anything else -> None."""
    if m := _RANGE.fullmatch(text):
        return m[1] or m[2], m[3]
    text = re.sub(r"(?<=\d)(?:st|nd|rd|th)\b|[.,]", "", text)
    for form in _DATES if len(text) < 30 else ():
        with contextlib.suppress(ValueError):
            return datetime.datetime.strptime(text, form)
    return None


def _clock(text: str) -> tuple[int, str] | None:
    """(minutes since noon or midnight, the half of the day if told): 15:30 -> (210, "p")."""
    m = _CLOCK.fullmatch(text)
    half = m and (m[4] or "p" * (int(m[1]) > 12))
    return m and (int(m[1]) % 12 * 60 + int(m[2] or m[3]), half)


def same_text(guess: str, gold: str) -> bool:
    """Whether two texts have the same words, or are the same date, range or time of day."""
    if words(guess) == words(gold) != "" or (
            "-" in gold and words(guess, "") == words(gold, "") != ""):
        return True
    guess, gold = (plain(text[:LONGEST]).casefold().strip(" .") for text in (guess, gold))
    if said := _clock(guess):
        wanted = _clock(gold) or (-1, "")
        return said[0] == wanted[0] and (said[1] == wanted[1] or not said[1] or not wanted[1])
    return (said := _date_or_range(guess)) is not None and said == _date_or_range(gold)


def _item(part: str) -> str:
    """One item of a list, in one spelling."""
    if found := bare(part):
        return " ".join([str(found.value), *found.unit])
    return words(_NAME.sub("", part)) if re.search(r"[^\W\d_]{2}", part) else formula(part)


def items(text: str) -> list[str]:
    """The items of a list, sorted: "2.0, b and a" -> ["2", "a", "b"]. With "not" or "or": none."""
    *_, one = spans(text)
    one = _NAME.sub("", one).strip(" .()[]{}$")
    if _DENIED.search(one) or re.search(r"\bor\b", one):
        return []
    parts = one.split() if re.fullmatch(r"[-\d./ ]+", one) else _PARTS.split(one)  # 2 3 5
    return sorted(filter(None, map(_item, parts)))


# ------------------------------------------------------------------------------------- mathematics


def formula(text: str) -> str:
    """A formula without spaces and its own name, its terms in order: y = 1 + x^2 -> +1+x^2."""
    text = _NAME.sub("", plain(text)).strip(" .,;$").casefold()
    text = re.sub(r"\s+(?!(?<=\d )\d)|(?<=[\w)])\*(?=[a-z(√π])", "", text)
    terms, depth = [""], 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c in "+-" and not depth and i and text[i - 1] not in "^*/(=<>":
            terms.append("")
        terms[-1] += c
    return "".join(sorted(t if t[:1] in "+-" else f"+{t}" for t in terms if t))


def sequence(text: str) -> tuple[str, list[str]] | None:
    """(its brackets, its items) of "(3, 4)" or "x = 3, y = 4"; None for what has no comma."""
    text = _NAME.sub("", plain(text)).strip(" .;$")
    m = re.fullmatch(r"([(\[{])(.*)([)\]}])", text)
    parts = _PARTS.split(m[2] if m else text)
    return (m[1] + m[3] if m else "", [*map(_item, parts)]) if len(parts) > 1 else None


def same_formula(guess: str, gold: str) -> bool:
    """Whether two formulas, points or intervals are equal but for notation."""
    said, wanted = sequence(guess), sequence(gold)
    if said and wanted and said[1] == wanted[1]:
        return said[0] == wanted[0] or (said[0], wanted[0]) == ("", "()")
    return formula(guess) == formula(gold) != ""


def _proved(guess: str, gold: str) -> bool:
    """Whether math-verify finds the formula that a guess states equal to the right one."""
    *_, said = spans(guess)
    said, wanted = _NAME.sub("", said), _NAME.sub("", plain(gold)).strip()
    doubt = _DENIED.search(said) or _UNSURE.search(said) or re.search("[A-Za-z]{5}|[?,]", said)
    if doubt or "," in wanted or max(len(said), len(wanted)) > 300:
        return False
    import formulas  # which starts a process, so where it is asked for

    return formulas.equal(said, wanted)


# ----------------------------------------------------------------------------- choices and booleans

_LETTER = re.compile(  # a letter, and the text it introduces
    r"[\s(\[*]*([a-z])(?:[)\].:,;*]+(.*)|\s+(?:-\s*|(?=is\b|\())(.*)|\s*$)", re.I | re.S)
_LEAD = re.compile(r"\b(?:is|are|be|was|choose|pick|select|say|option|choice|answer|letter|with"
                   r"|so|thus|hence|therefore)\b,?", re.I)
_OTHER = re.compile(r"\b([A-H])[)\].:]|(?:\bor|\band|[,/])\s{0,2}[(\[]?([A-H])\b|^\s*([A-H])\s*$")
_POLARITY = {"yes": "yes", "true": "yes", "correct": "yes", "yeah": "yes", "yep": "yes",
             "no": "no", "false": "no", "incorrect": "no", "wrong": "no", "nope": "no"}


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
        doubt = _DENIED.search(one) or _UNSURE.search(one)
        return None if doubt or others or named - {n} else letter
    return None


def _boolean(text: str) -> str | None:
    """yes or no: the first or last word of a line or its predicate, which nothing contradicts."""
    one = re.sub(r"\bno (?:doubt|problem|question)\b", "", line(text).casefold())
    if (letter := one.strip(" .")) in ("y", "t", "n", "f"):
        return "yes" if letter in "yt" else "no"
    told, values, denial = words(one).split(), set(), 99  # denial: words since the last "not"
    for word in told:
        denial = 0 if word in ("not", "never", "cannot") or word.endswith("nt") else denial + 1
        value = _POLARITY.get(word)
        if value and denial <= 2:
            value, denial = {"yes": "no", "no": "yes"}[value], 99
        values.add(value)
    places = [*told[:1], *told[-1:], *words(_IS.split(one)[-1]).split()[:1]]
    values -= {None}
    if _UNSURE.search(one) or _POLARITY.keys().isdisjoint(places) or len(values) != 1:
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
    if words(gold) in _POLARITY:
        return "boolean"
    if bare(gold):
        return "number"
    if len(parts := _PARTS.split(text)) > 1 and text[0] not in "([" and all(map(words, parts)):
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
        return " | ".join(items(answer)) or None
    if kind == "math":
        return formula(line(answer)) or None
    return words(line(answer)) or line(answer) or None


def correct(guess: str | None, gold: Any, kind: str = "auto",
            choices: tuple[str, ...] = ()) -> bool:
    """Whether a guess is the right answer; `kind` is one of KINDS, "auto" asks kind_of(gold).

    Whole numbers must be equal, others to 1e-6 of their size. gold: a text, or what str() or
    ", ".join() makes one.
    """
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
        return any(same_text(span, gold) for span in (guess, *spans(guess)))
    said = vote(guess, kind, choices)
    return said is not None and said == vote(gold, kind, choices)
