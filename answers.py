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

1. A refused right answer costs one sample; a paid wrong one is learnt. So a reading must account
   for what stands around the value: "not 42", "42 or 43", "over 42", "40-42", "42 * 2", "42x" and
   "B or C" say neither 42 nor B.
2. A completion has one answer. It is the first value after "the answer is", or else the last one;
   an equation's last side, or the number before its arithmetic: 12 + 30 = 42, 42 = 6 * 7.
3. A unit may be missing, not differ: "42" and "42 m" are right for 42 m, "42 km" is wrong, and
   "4200 cm" is right. 50 % is 0.5, and also 50.
4. Texts must have equal words. "Paris (France)" is Paris; "Paris, France" is not, because "Paris,
   Rome" is not.
5. Completions are hostile text: nothing is evaluated, only the last (or first) 1,000 characters of
   an answer are read, and every pattern over a whole text takes time in proportion to the text.
6. Formulas are equal but for notation and the order of a sum. Where the package math-verify is
   installed, it decides about the others, in a process that is killed after a few seconds.
"""

import functools
import json
import queue
import re
import subprocess
import sys
import threading
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

    The answer asks for no format: it is what follows the last <answer> that has any text, closed or
    not; without such a tag, what follows the last tag of all; without tags, the whole text.
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
    (r"<=", "≤"), (r">=", "≥"), (r"[!=]=|\\not=", "≠"), (r"=>", "="), (r"\bsqrt\b", "√"),
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

_CUE = re.compile(r"\banswers?[*_ ]{0,3}(?:(?:is|are)\b|[:=])|####|\\(?:boxed|fbox) ?\{", re.IGNORECASE)
_REASON = re.compile(r"(?<=\w)[)\s.,;*$-]{1,4}\b(?:because|since|which|where|given that)\b.*", re.I | re.S)
_GLOSS = re.compile(r"(?<=\S)\s\([^()]{1,200}\)(?=[\s.,!]*$)")  # Paris (France)
_IS = re.compile(r"\b(?:is|are|was|were|be)\b", re.IGNORECASE)
_EQUALS = re.compile(rf"=|≈|{_IS.pattern}|\b(?:equals|makes?|gives?)\b", re.IGNORECASE)
_NAME = re.compile(r"^\s*(?:[A-Za-z]\w?(?:\([A-Za-z]\))?|\(\w, ?\w\))\s*=")  # x = 5, f(x) = 2x
_SENTENCE = re.compile(r"(?<=[.!?])\s+|\n")
_DENIED = re.compile(
    r"\b(?:not?|cannot|\w{2,6}n't|never|neither|nor|none|except|without|wrong|incorrect|false|"
    r"(?:all|\w{2,5}thing) but)\b", re.I)
_UNSURE = re.compile(
    r"\b(?:or|either|if|unless|otherwise|maybe|perhaps|possibly|depends|sometimes|some|partly)\b", re.I)


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
    lines = [one for one in text.split("\n") if one.strip()] or [""]
    return _REASON.sub("", lines[0 if cued else -1]).strip(" \t:$")


def spans(text: str) -> Iterator[str]:
    """Spans of a line that may be the whole answer: the line, its first sentence, its predicate."""
    one = line(text)
    yield one
    yield (one := _SENTENCE.split(one)[0])
    yield _GLOSS.sub("", one)
    subject, *predicate = _IS.split(one)
    if predicate and not _DENIED.search(one) and not _UNSURE.search(one):
        yield _GLOSS.sub("", predicate[-1])


# ---------------------------------------------------------------------------------------- numbers


class Quantity(NamedTuple):
    value: Fraction
    unit: tuple[str, ...]  # words after the number, or the currency: ("km",), ("red", "apple")


_UNITS = {  # the sizes of a dimension's units, and their names
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
_ENDS = {*"a i in of for to at and or left total altogether all per each on from with by is".split()}
_DIGITS = r"""(?:\d{1,3}(?:,\d{3}(?!\d))+(?:\.\d+)?          # 1,042.5
    |\d{1,3}(?:\.\d{3}(?!\d)){2,}(?:,\d+)?                   # 1.000.042
    |\d{1,3}(?:[ ]\d{3}(?!\d))+                              # 1 042
    |(?:0,\d+|\d+,(?!\d{3}(?!\d))\d+)                        # 3,14
    |\d+(?:\.\d+)?|\.\d+)"""
_SCALES = {"k": 10**3, "dozen": 12, "hundred": 100, "thousand": 10**3, "million": 10**6,
           "billion": 10**9, "trillion": 10**12, "bn": 10**9}
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
_UNIT = re.compile(r"[ ]?(%|°[cf]?|[$€£¥¢]|[a-zµ]+(?:\^[23])?(?:/[a-z]+(?:\^[23])?)*)")
_CLAUSE = re.compile(r"[,;:]\s|(?<!all )(?<!thing )\bbut\b|$")
# What leaves the number before or after it unsaid: an operator, a bound, another number beside it.
_NOT_AFTER = re.compile(
    r"""(?:[-+*/^√±<>≤≥≠~_]\(?|\w\(|\d[)\]\s,:;-]*(?:\b(?:and|to|through|of|over))?[\s(]*
    |\b(?:than|over|under|above|below|at[ ]least|at[ ]most|up[ ]to|almost|nearly|exceed\w*|log|ln|sin|cos
    |tan|root[ ]of)\b[ a-z]{0,15})$""",
    re.VERBOSE,
)
_NOT_BEFORE = re.compile(
    r"""[\s)]*(?:[*/^√±<>≤≥≠∞π?_\\]|!+(?=[\w/*+^(-])|\+\s*$|[-+]\s*(?:[\d(√]|[a-z]\b)
    |[\s,:;]*(?:(?:and|to|or)\s)?\s*[-$]?\.?\d|[,;.:-]?\s*(?:or|no|wrong|incorrect)\b)
    |[\w(]|\s[b-hj-z]\b""",
    re.VERBOSE,
)
_SPELT = {word: Fraction(n) for n, word in enumerate(
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen "
    "sixteen seventeen eighteen nineteen".split())} | {word: Fraction(10 * n) for n, word in
    enumerate("twenty thirty forty fifty sixty seventy eighty ninety".split(), 2)} | {
    "half": Fraction(1, 2), "third": Fraction(1, 3), "thirds": Fraction(1, 3),
    "quarter": Fraction(1, 4), "quarters": Fraction(1, 4)} | {
    word: Fraction(n) for word, n in _SCALES.items() if word != "k"}
_SPELT_OUT = re.compile(r"(?<!\d )(?<![\w-])(?:{0})(?:(?:[ -]| and a |(?<=red) and |(?<=sand) and )(?:{0}))*+\b"
                        .format("|".join(sorted(_SPELT, key=len, reverse=True))))


def _figures(m: re.Match) -> str:
    """forty-two -> 42, three and a half -> 7/2; words that make no number stay as they are."""
    total = current = Fraction(0)
    previous = None
    for word in re.split("[ -]", m[0]):
        n = _SPELT.get(word)
        if n is None:  # and, a
            pass
        elif n < 1:
            current = current + n if previous == "a" else (current or 1) * n
        elif word in _SCALES:
            current = (current or 1) * n
            if n >= 1000:
                total, current = total + current, Fraction(0)
        elif current % 10 or current % 100 and n > 9 or previous == "zero":
            return m[0]
        else:
            current += n
        previous = word
    return str(total + current)


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
        if m[1] in _ENDS or not known and (attached or len(m[1]) == 1):
            break
        names.append(name)
        at = m.end()
        if known:
            break
    return tuple(names), at


class Found(NamedTuple):
    quantity: Quantity | None
    start: int
    end: int  # of its unit


def quantities(text: str) -> list[Found]:
    """The numbers of a text in _figured notation; "1 hour 30 minutes" is one of them."""
    out = []
    for m in _NUMBER.finditer(text):
        value, (unit, end) = _value(m), _unit(text, m.end())
        unit = (_name(m["money"]),) if m["money"] else unit
        start = m.start() + len(m[0]) - len(m[0].lstrip())
        before = out[-1] if out else None
        if before and value is not None and before.quantity and unit and before.quantity.unit:
            (a, (big, *_)), (small, *_) = before.quantity, unit
            size, dimension = (_KNOWN.get(big, ("", 1))[1], _KNOWN.get(big, (0,))[0])
            joined = re.fullmatch(r"(?:,? and|,)? ?", text[before.end : start])
            if joined and dimension == _KNOWN.get(small, (1,))[0] and size > _KNOWN[small][1]:
                value = a + value * _KNOWN[small][1] / size
                unit, start = before.quantity.unit, out.pop().start
        out.append(Found(None if value is None else Quantity(value, unit), start, end))
    return out


_SIGNS = [(re.compile(pattern), sign) for pattern, sign in (
    (r"\b(?:minus|negative) (?=[$€£¥]?\d)", "-"), (r"\b(?:plus|added to)\b", "+"),
    (r"\b(?:times|multiplied by)\b", "*"), (r"\bdivided by\b", "/"),
    (r"\b(?:twice|double|triple)\b", "2*"), (r" squared\b", "^2"), (r" cubed\b", "^3"),
    (r"\bsquare root of\b", "√"), (r" factorial\b", "!/"), (r"\bper ?cent\b", "%"),
    (r" per (?=[a-z])", "/"), (r"(?<=\d) and (?:a|1|one) 1/2\b", " 1/2"),
)]


def _figured(text: str) -> str:
    """Lower case, with figures for number words: "minus forty-two km per hour" -> "-42 km/hour"."""
    text = _SPELT_OUT.sub(_figures, text.casefold())
    for pattern, sign in _SIGNS:
        text = pattern.sub(sign, text)
    return text


def _free(text: str, found: Found) -> bool:
    """Whether nothing beside a number changes what it says."""
    before, after = text[max(0, found.start - 40) : found.start], text[found.end :]
    operator = text[found.start] in "+-" and re.search(r"(?:\d|\)|\b[a-z])\s*$", before)
    dash = text[found.start : found.start + 2] == "- " and before.strip()
    return not (operator or dash or _NOT_AFTER.search(before.rstrip()) or _NOT_BEFORE.match(after))


def bare(text: str) -> Quantity | None:
    """The number that is all of a text, but for its unit and a name: "x = 5", "-$5", "45 g"."""
    text = _figured(_NAME.sub("", plain(text))).strip(" .,;")
    match quantities(text):
        case [found] if found.start == 0 and found.end == len(text):
            return found.quantity
    return None


def _pick(side: str, first: bool) -> Quantity | None:
    """The first or last number of one side of an equation, in a clause that does not deny it."""
    found, allowed, at = quantities(side), [], 0
    for m in _CLAUSE.finditer(side):
        clause, at, began = side[at : m.start()], m.end(), at
        if not _DENIED.search(clause) and not _UNSURE.search(clause):
            allowed += [f for f in found if began <= f.start < at]
    if not allowed or not _free(side, chosen := allowed[0 if first else -1]):
        return None
    return chosen.quantity


def quantity(text: str) -> Quantity | None:
    """The number that a text states as its answer; None where none is stated for certain."""
    text, cued = stated(text)
    text = _figured(text)
    if text.strip(" .!") in ("none", "nothing"):
        return Quantity(Fraction(0), ())
    sentences = [one for one in _SENTENCE.split(text) if re.search(r"\d", one)]
    if not sentences:
        return None
    sentence = _REASON.sub("", sentences[0 if cued else -1])
    *sides, last = _EQUALS.split(_GLOSS.sub("", sentence))
    lead = _CLAUSE.split(sides[-1])[-2:] if sides else []  # I don't think it is 42
    if any(map(_DENIED.search, lead)):
        return None
    if re.search(r"\d", last) and (found := _pick(last, cued)):
        return found
    calculation = re.fullmatch(r"[\d\s.,+*/^()√!-]+", last)  # 42 = 6 * 7
    remark = not re.search(r"\d|[<>≤≥≠]|\b(?:than|too)\b", last) and not _DENIED.search(last)
    return _pick(sides[-1], cued) if sides and (calculation or remark) else None


def same_quantity(guess: Quantity, gold: Quantity) -> bool:
    """Whether two numbers are equal in their units; one that has none is in the other's."""
    (a, unit), (b, wanted) = guess, gold
    near = lambda a, b: a == b or (a.denominator, b.denominator) != (1, 1) and (
        abs(a - b) <= max(abs(a), abs(b)) / 10**6)
    if unit and wanted:
        (dimension, size, _), (other, scale, _) = (
            _KNOWN.get(words[0], (words[0], 1, "")) for words in (unit, wanted))
        return near(a * size, b * scale) if dimension == other else (
            near(a, b) and not {*unit}.isdisjoint(wanted))
    if "%" in unit:
        return near(a / 100, b) or near(a, b) and abs(b) > 1
    return near(a, b) or "%" in wanted and near(a, b / 100)


def number(text: str) -> int | float | None:
    """The number that a text states, as quantity() finds it; None where there is none."""
    found = quantity(text)
    if found is None or abs(found.value) > 10**300:
        return None
    value = found.value
    return int(value) if value.denominator == 1 else float(value)


# ------------------------------------------------------------------------------ all other answers

_DROP = re.compile(r"""[,;:!?"`´“”()\[\]{}…_*~¿¡$]|\.(?!\d)|-(?!\.?\d)""")
_ARTICLE = re.compile(r"^\W{0,9}(?:the|an?)\s+(?=\w)")
_PARTS = re.compile(r"(?<!\d),|,(?!\d{3}(?!\d))|[;\n]|\band\b", re.IGNORECASE)
_POLARITY = {"yes": "yes", "true": "yes", "correct": "yes", "yeah": "yes", "yep": "yes",
             "no": "no", "false": "no", "incorrect": "no", "wrong": "no", "nope": "no"}


def words(text: str, hyphen: str = " ") -> str:
    """The words of a text without case, punctuation and article; -1, 0.5, C++ and 5% stay."""
    text = _ARTICLE.sub("", plain(text).casefold().replace("'", ""))
    text = re.sub(r"(?<=\w)-(?=[^\W\d])", hyphen, text)
    return " ".join(_DROP.sub(" ", text).split())


_MONTHS = "jan feb mar apr may jun jul aug sep oct nov dec".split()
_NAMED_DATE = re.compile(r"(?:(\d{1,2})(?:st|nd|rd|th)?(?: of)? )?([a-z]{3})[a-z]*\.?"
                         r"(?: (\d{1,2})(?:st|nd|rd|th)?)?,? (\d{4})")
_RANGE = re.compile(r"(?:(?:from|between) )?([\d.]+) ?(?:-|to|and) ?([\d.]+)")


def _clock(text: str) -> tuple[int, str] | None:
    """(minutes since the last noon or midnight, half of the day if told): 15:30 -> (210, "p")."""
    m = re.fullmatch(r"(\d{1,2})(?::(\d\d)|\.(\d\d)(?= ?[ap]))(?: ?([ap])\.?m)?", text)
    if not m:
        return None
    hour, half = int(m[1]), m[4] or ""
    return hour % 12 * 60 + int(m[2] or m[3]), half or ("p" if hour > 12 else "")


def _special(text: str) -> str:
    """Dates and ranges in one spelling: "15 January 2024" -> 2024-01-15, "10 to 20" -> 10..20."""
    text = plain(text).casefold().strip(" .")
    if m := _NAMED_DATE.fullmatch(text):
        if m[2] in _MONTHS and (m[1] is None) != (m[3] is None):
            return f"{m[4]}-{_MONTHS.index(m[2]) + 1:02}-{int(m[1] or m[3]):02}"
    if (m := _RANGE.fullmatch(text)) and ("and" not in text or text.startswith("between")):
        return f"{m[1]}..{m[2]}"
    return text


def same_text(guess: str, gold: str) -> bool:
    """Whether two texts have the same words, or are the same date, range or time of day."""
    if words(gold) and any(words(guess, h) == words(gold, h) for h in (" ", "")):
        return True
    guess, gold = _special(guess), _special(gold)
    times = _clock(guess), _clock(gold)
    if None in times:
        return guess == gold != ""
    (a, half), (b, wanted) = times
    return a == b and (half == wanted or not half or not wanted)


def formula(text: str) -> str:
    """A formula without spaces and its own name, the terms of its sum in order: 1 + x² -> 1+x^2."""
    text = _NAME.sub("", plain(text)).strip(" .,;$").casefold()
    text = re.sub(r"\s+(?!(?<=\d )\d)|(?<=[\w)])\*(?=[a-z(√π])", "", text)
    terms, depth, began = [], 0, 0
    for i, c in enumerate(text):
        depth += (c in "([{") - (c in ")]}")
        if c in "+-" and not depth and i > began and text[i - 1] not in "^*/(=<>":
            terms.append(text[began:i])
            began = i
    terms.append(text[began:])
    return "".join(sorted(t if t[:1] in "+-" else f"+{t}" for t in terms if t))


def sequence(text: str) -> tuple[str, list[str]] | None:
    """(its brackets, its items) of "(3, 4)" or "x = 3, y = 4"; None for what has no comma."""
    text = _NAME.sub("", plain(text)).strip(" .;$")
    brackets = text[0] + text[-1] if len(text) > 1 and text[0] in "([{" and text[-1] in ")]}" else ""
    parts = _PARTS.split(text[1:-1] if brackets else text)
    return (brackets, [_item(part) for part in parts]) if len(parts) > 1 else None


def same_formula(guess: str, gold: str) -> bool:
    """Whether two formulas or sequences are equal but for notation."""
    if formula(guess) == formula(gold) != "":
        return True
    said, wanted = sequence(guess), sequence(gold)
    bare_pair = said and not said[0] and wanted and wanted[0] == "()"
    return bool(said and wanted) and said[1] == wanted[1] and (said[0] == wanted[0] or bare_pair)


def _item(part: str) -> str:
    """One item of a list, in one spelling."""
    if found := bare(part):
        return " ".join([str(found.value), *found.unit])
    return words(_NAME.sub("", part)) if re.search(r"[^\W\d_]{2}", part) else formula(part)


def items(text: str) -> list[str]:
    """The items of a list, sorted: "2.0, b and a" -> ["2", "a", "b"]; a doubt makes none."""
    *_, one = spans(text)
    one = _NAME.sub("", one).strip(" .()[]{}$")
    if _DENIED.search(one) or re.search(r"\bor\b", one):
        return []
    parts = _PARTS.split(one)
    if len(parts) == 1 and re.fullmatch(r"[-\d./ ]+", one):  # 2 3 5
        parts = one.split()
    return sorted(filter(None, map(_item, parts)))


_LETTER = re.compile(r"[\s(\[*]*([a-z])(?:[)\].:,;*]+(.*)|\s+(?:-\s*|(?=is\b|\())(.*)|\s*$)", re.I | re.S)
_LEAD = re.compile(r"\b(?:is|are|be|was|choose|pick|select|say|option|choice|answer|letter|with|so|thus|hence|therefore)\b,?", re.I)
_OTHER = re.compile(r"\b([A-H])[)\].:]|(?:\bor|\band|[,/])\s{0,2}[(\[]?([A-H])\b|^\s*([A-H])\s*$")


def _choice(text: str, choices: tuple[str, ...]) -> str | None:
    """The letter a text chooses: "B", "(B)", "B is right", "B) its text" or the text of choice B."""
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
    """yes or no: the first or last word of a line or of its predicate, which nothing contradicts."""
    one = re.sub(r"\bno (?:doubt|problem|question)\b", "", line(text).casefold())
    if one.strip(" .") in ("y", "t", "n", "f"):
        return "yes" if one.strip(" .") in "yt" else "no"
    told, said, denial = words(one).split(), [], 99
    for word in told:
        denial = 0 if word in ("not", "never", "cannot") or word.endswith("nt") else denial + 1
        value = _POLARITY.get(word)
        if value and 0 < denial <= 2:
            value, denial = {"yes": "no", "no": "yes"}[value], 99
        said.append(value)
    values = {*said} - {None}
    places = [*told[:1], *told[-1:], *words(_IS.split(one)[-1]).split()[:1]]
    if len(values) != 1 or _UNSURE.search(one) or not any(word in _POLARITY for word in places):
        return None
    (value,) = values
    return None if value == "yes" and denial < 99 else value


# ------------------------------------------------------------------------------------ math-verify

# The process that math-verify runs in: its own time limits need signals, which reach main threads
# alone, and some formulas (9^{9^{9}}) keep it busy for ever. So the process ends itself.
_WORKER = """
import json, resource, signal, sys
signal.alarm(60)
resource.setrlimit(resource.RLIMIT_AS, (4 << 30, 4 << 30))
from math_verify import parse, verify
replies, sys.stdout = sys.stdout, sys.stderr
print("ready", file=replies, flush=True)
for line in sys.stdin:
    signal.alarm(5)
    try:
        gold, guess = (parse(f"${text}$", parsing_timeout=None) for text in json.loads(line))
        right = bool(gold and guess) and verify(gold, guess, timeout_seconds=None)
    except Exception:
        right = False
    signal.alarm(0)
    print("right" if right else "wrong", file=replies, flush=True)
"""
_TO_LATEX = [(re.compile(pattern), replacement) for pattern, replacement in (
    (r"√\(([^()]*)\)", r"\\sqrt{\1}"), (r"√([\d.]+|\w)", r"\\sqrt{\1}"), ("π", r"\\pi "),
    ("∞", r"\\infty "), (r"\*", r"\\cdot "), (r"\^(-?[\d.]+|-\w)", r"^{\1}"),
    (r"(?<!\\)\b(sin|cos|tan|log|ln)\b", r"\\\1"),
)]


class Verifier:
    """math-verify in a process of its own, which serves all threads one after the other."""

    def __init__(self):
        self.lock, self.process = threading.Lock(), None

    def start(self) -> bool:
        self.process = subprocess.Popen([sys.executable, "-c", _WORKER], text=True, bufsize=1,
                                        stdin=subprocess.PIPE, stdout=subprocess.PIPE,
                                        stderr=subprocess.DEVNULL)
        return self.process.stdout.readline() == "ready\n"

    def __call__(self, guess: str, gold: str) -> bool:
        """Whether math-verify finds two formulas equal; what takes it too long is not."""
        with self.lock:
            if self.process.poll() is not None:
                self.start()
            try:
                self.process.stdin.write(json.dumps([gold, guess]) + "\n")
                reply = self.process.stdout.readline()
            except BrokenPipeError:
                reply = ""
            if not reply:
                self.process.wait()
        return reply == "right\n"


@functools.cache
def _verifier() -> Verifier | None:
    """The running Verifier; without the package None, which is said once."""
    verifier = Verifier()
    if verifier.start():
        return verifier
    print("math-verify is not installed: formulas are right if equal but for notation and the order "
          "of a sum (pip install math-verify)", file=sys.stderr)
    return None


def _verified(guess: str, gold: str) -> bool:
    """Whether math-verify finds the formula that a guess states equal to the right one."""
    *_, said = spans(guess)
    said, wanted = _NAME.sub("", said), _NAME.sub("", plain(gold)).strip()
    doubtful = _DENIED.search(said) or _UNSURE.search(said) or re.search("[A-Za-z]{5}|[?,]", said)
    if doubtful or max(len(said), len(wanted)) > 300 or "," in wanted or not _verifier():
        return False
    for pattern, replacement in _TO_LATEX:
        said, wanted = pattern.sub(replacement, said), pattern.sub(replacement, wanted)
    return _verifier()(said, wanted)


# ------------------------------------------------------------------------------------ the verdict


def kind_of(gold: str, choices: tuple[str, ...] = ()) -> str:
    """What kind of answer the right one is."""
    text = plain(gold).strip()
    if choices or re.fullmatch(r"\(?[A-H]\)?\.?", text):
        return "choice"
    if words(gold) in _POLARITY:
        return "boolean"
    if bare(gold):
        return "number"
    if len(parts := _PARTS.split(text)) > 1 and text[0] not in "([" and all(map(words, parts)):
        return "list"
    operand = r"(?:\d|(?<![A-Za-z])[A-Za-z]|[)πx√])"
    dashes = re.fullmatch(r"[\d\s.:/-]*", text)
    mathematics = rf"[\^√π∞±≤≥≠\\|]|{operand}\s*[-+*/=<>]\s*[\d(A-Za-zπ√](?![A-Za-z])|^[-(\[]|\d[a-z]\b|\d!"
    return "math" if not dashes and re.search(mathematics, text) else "text"


def vote(answer: str | None, kind: str, choices: tuple[str, ...] = ()) -> str | None:
    """What an answer says, so that equal votes are equal answers; None where it says nothing."""
    if not answer or not answer.strip():
        return None
    if kind == "number":
        return None if (found := quantity(answer)) is None else f"{float(found.value):.12g}"
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
    kind = kind_of(gold, choices) if kind == "auto" else kind
    guess, gold = (guess or "").strip(), gold.strip()
    if not guess or not gold or guess == gold:
        return guess == gold != ""
    if kind == "number":
        said, wanted = quantity(guess), bare(gold) or quantity(gold)
        return bool(said and wanted) and same_quantity(said, wanted)
    if kind == "math":
        return any(same_formula(span, gold) for span in spans(guess)) or _verified(guess, gold)
    if kind == "text":
        return any(same_text(span, gold) for span in spans(guess))
    said = vote(guess, kind, choices)
    return said is not None and said == vote(gold, kind, choices)
