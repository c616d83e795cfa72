"""Text -> score: where a completion's answer is, whether it is right, and what it is worth.

    reasoning, answer, strict = parse(completion)
    correct(answer, "1,042")                        # kind="auto": told by the right answer
    correct(answer, "B", choices=("Rome", "Oslo"))

    mix = read_mix("format:1,answer:3,tfidf:2.25")  # or a preset: "tunix", "tunix,overlong:1"
    functions = prepare(mix, traces)                # traces: the rows' reference reasoning
    score(mix, functions, completion, row)          # (total, parts, errors)

What to know when comparing with other graders:

1. Format and accuracy are two questions. `strict` asks for the format alone; the answer is read the
   same way with and without tags, and only weights combine the two. The graded rewards of published
   recipes (answer_tunix, first_number, answer_ideae, tfidf, contrast, markers) read what their
   recipes read: text between both of its tags.
2. Of several numbers the *last* counts, so a completion has one answer however many it lists.
   "42%" and "$42" are 42; "42 m" is not "42 km", but "42" is either.
3. Text must be equal, but for case, spaces and punctuation. A part of it is never enough, and an
   empty answer matches nothing.
4. Completions are hostile text: nothing is evaluated, and every pattern takes time in proportion to
   the text: what may repeat is possessive (`++`), bounded, or starts at places of its own.
5. Missing is not zero. A reward that fails, or gives NaN or None, is None and so is the total; one
   that does not apply to a row (no right answer, no reference trace) is no part of its sum.
"""

import functools
import importlib.util
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from fractions import Fraction
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

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


def _value(text: str) -> int | float | None:
    """The number in the line of the answer, or else the last one of the text."""
    value = number(_line(text))
    return number(text) if value is None else value


def vote(answer: str | None, kind: str, choices: tuple[str, ...] = ()) -> str | None:
    """What an answer says, so that equal votes are equal answers; None where it says nothing."""
    if not answer:
        return None
    if kind == "number":
        return None if (value := _value(answer)) is None else f"{value:.12g}"
    if kind == "choice":
        return _choice(answer, choices)
    if kind == "boolean":
        return _boolean(answer)
    if kind == "list":
        return " | ".join(_items(_line(answer))) or None
    return _same(_line(answer)) or None


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


# ----------------------------------------------------------------------------------------- TF-IDF

# The words scikit-learn leaves out as English: the list of the Glasgow Information Retrieval Group,
# http://ir.dcs.gla.ac.uk/resources/linguistic_utils/stop_words
_STOP_WORDS = set(
    """
a about above across after afterwards again against all almost alone along already also although
always am among amongst amoungst amount an and another any anyhow anyone anything anyway anywhere
are around as at back be became because become becomes becoming been before beforehand behind being
below beside besides between beyond bill both bottom but by call can cannot cant co con could
couldnt cry de describe detail do done down due during each eg eight either eleven else elsewhere
empty enough etc even ever every everyone everything everywhere except few fifteen fifty fill find
fire first five for former formerly forty found four from front full further get give go had has
hasnt have he hence her here hereafter hereby herein hereupon hers herself him himself his how
however hundred i ie if in inc indeed interest into is it its itself keep last latter latterly least
less ltd made many may me meanwhile might mill mine more moreover most mostly move much must my
myself name namely neither never nevertheless next nine no nobody none noone nor not nothing now
nowhere of off often on once one only onto or other others otherwise our ours ourselves out over own
part per perhaps please put rather re same see seem seemed seeming seems serious several she should
show side since sincere six sixty so some somehow someone something sometime sometimes somewhere
still such system take ten than that the their them themselves then thence there thereafter thereby
therefore therein thereupon these they thick thin third this those though three through throughout
thru thus to together too top toward towards twelve twenty two un under until up upon us very via
was we well were what whatever when whence whenever where whereafter whereas whereby wherein
whereupon wherever whether which while whither who whoever whole whom whose why will with within
without would yet you your yours yourself yourselves
""".split()
)


class TfIdf:
    """Cosines as from scikit-learn's TfidfVectorizer(stop_words="english", max_features=500).

    Lower-case words of two characters or more, idf = ln((1 + n) / (1 + df)) + 1, unit vectors. Of
    equally frequent words at the limit numpy's argsort chooses, as there; it is not a stable sort,
    so two kinds of processor may keep different ones.
    """

    def __init__(self, texts: Iterable[str], max_features: int = 500):
        n, counts, documents = 0, Counter(), Counter()
        for n, text in enumerate(texts, 1):  # noqa: B007
            words = Counter(self._words(text))
            counts.update(words)
            documents.update(words.keys())
        words = sorted(counts)
        kept = (-np.array([counts[word] for word in words], float)).argsort()[:max_features]
        self.idf = {words[i]: math.log((1 + n) / (1 + documents[words[i]])) + 1 for i in kept}

    @staticmethod
    def _words(text: str) -> list[str]:
        return [w for w in re.findall(r"\b\w\w+\b", text.lower()) if w not in _STOP_WORDS]

    def vector(self, text: str) -> dict[str, float]:
        """Word -> weight, of length 1; empty where the text has none of the words fitted on."""
        counts = Counter(word for word in self._words(text) if word in self.idf)
        weights = {word: n * self.idf[word] for word, n in counts.items()}
        norm = math.sqrt(sum(weight**2 for weight in weights.values()))
        return {word: weight / norm for word, weight in weights.items()}

    def cosine(self, a: str, b: str) -> float:
        """0 (no word in common, or nothing to compare) to 1."""
        a, b = self.vector(a), self.vector(b)
        return min(1.0, sum(weight * b.get(word, 0.0) for word, weight in a.items()))


# ---------------------------------------------------------------------------------------- rewards

# A reward is f(completion, row) -> a number, or None where it could not be computed. `row` is the
# data row with what the trainer adds: question, answer, kind, choices, reasoning (the reference
# trace), n_tokens, max_new, overlong_buffer (tokens), stop, progress (of the run, 0 to 1).

SCAFFOLD = 0.5  # share of the run in which `markers` pays; IDEA-E's own schedule is not known
# A word, or a sign, or a character of a script that does not part words; 20 letters at most, so
# that one endless word repeats itself too.
_PIECE = re.compile(
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{1,20}+|\S"
)


def _between(completion: str, tag: str) -> str:
    """The text from the first <tag> to its </tag>; "" without either."""
    text, closed, _ = completion.partition(f"<{tag}>")[2].partition(f"</{tag}>")
    return text.strip() if closed else ""


def _off(guess: str, gold: str) -> float | None:
    """Distance of two numbers as a share of the second: ("9", "10") -> 0.1; None without both."""
    a, b = _value(guess), _value(gold)
    if a is None or b is None:
        return None
    return round(abs(a - b) / abs(b), 9) if b else math.inf if a else 0.0


def _told(row: dict) -> tuple[str, str, tuple]:
    """(right answer, its kind, choices) of a row."""
    gold, choices = str(row["answer"]).strip(), tuple(row.get("choices") or ())
    kind = row.get("kind") or "auto"
    return gold, kind_of(gold, choices) if kind == "auto" else kind, choices


def strict_format(completion: str, row: dict) -> float:
    """1 for each tag once, in order, neither part empty, and no other text; else 0."""
    return float(parse(completion)[2])


def tags(completion: str, row: dict) -> float:
    """+0.25 for each of the four tags that is there exactly once, else -0.25: -1 to 1."""
    return sum(0.25 if completion.count(tag) == 1 else -0.25 for tag in TAGS)


def tags_pinocchio(completion: str, row: dict) -> float:
    """0.3 for each tag of the reasoning there exactly once, 0.2 for each of the answer: 0 to 1."""
    shares = zip(TAGS, (0.3, 0.3, 0.2, 0.2), strict=True)
    return sum((share for tag, share in shares if completion.count(tag) == 1), 0.0)


def answer(completion: str, row: dict) -> float:
    """1 if `correct` finds the answer right, else 0."""
    return float(correct(parse(completion)[1], *_told(row)))


def answer_tunix(completion: str, row: dict) -> float:
    """The same text 3, but for white space 1.5; within 10 % 0.5, 20 % 0.25, else -1; unread -0.5.

    Unread: no number in the guess or in the right answer. 0 outside the strict format, where Tunix
    finds no answer: with a -1 there its range would begin at -3, and it begins at -2.
    """
    if not parse(completion)[2]:
        return 0.0
    said, gold = _TAG.split(completion)[6], str(row["answer"])
    if said.strip() == gold.strip():
        return 3.0 if said == gold else 1.5
    off = _off(said, gold)
    return -0.5 if off is None else 0.5 if off <= 0.1 else 0.25 if off <= 0.2 else -1.0


def first_number(completion: str, row: dict) -> float:
    """1 if the first number of the answer is the right one, else 0."""
    m = _NUMBER.search(_simple(_between(completion, "answer")))
    return float(bool(m) and correct(m[0], row["answer"], "number"))


def answer_ideae(completion: str, row: dict) -> float:
    """The same text 4; the right letter, boolean or number 3.5; a number within 5 %, or the right
    answer among the words of the answer, 2.5; within 10 % 1.25; else 0."""
    said, (gold, kind, choices) = _between(completion, "answer"), _told(row)
    if said == gold:
        return 4.0
    if kind in ("number", "choice", "boolean") and correct(said, gold, kind, choices):
        return 3.5
    off = _off(said, gold) if kind == "number" else None
    off = math.inf if off is None else off
    if off <= 0.05 or f" {_same(gold)} " in f" {_same(said)} ":
        return 2.5
    return 1.25 if off <= 0.1 else 0.0


def markers(completion: str, row: dict) -> float:
    """How many of the markers [I] [D] [E] [A] [E] the trace has, in any order: 0 to 5.

    0 once the share SCAFFOLD of the run is over.
    """
    trace = _between(completion, "reasoning") if row.get("progress", 0.0) < SCAFFOLD else ""
    return float(sum(min(trace.count(f"[{m}]"), n) for m, n in Counter("IDEAE").items()))


def tfidf(fitted: TfIdf, completion: str, row: dict) -> float:
    """Cosine of the trace and the reference trace: 0 to 1; 0 without both tags of the trace."""
    return fitted.cosine(_between(completion, "reasoning"), row["reasoning"])


def contrast(fitted: TfIdf, completion: str, row: dict) -> float:
    """1 - cosine of the trace and the answer: 1 for a trace that does not just say the answer.

    0 without both parts, or where the trace has none of the words fitted on.
    """
    trace, said = _between(completion, "reasoning"), _between(completion, "answer")
    return 1.0 - fitted.cosine(trace, said) if said and fitted.vector(trace) else 0.0


def overlong(completion: str, row: dict) -> float:
    """0 up to max_new - overlong_buffer tokens, then linear to -1 at max_new (arXiv 2503.14476).

    max_new 100, overlong_buffer 20: 70, 80, 90, 100, 110 tokens -> 0, 0, -0.5, -1, -1
    """
    left = row["max_new"] - row["n_tokens"]
    return max(-1.0, min(0.0, left / max(row["overlong_buffer"], 1) - 1.0))


def length(completion: str, row: dict) -> float:
    """Minus the share of max_new that was used: 0 to -1; a negative weight asks for long text."""
    return -min(1.0, row["n_tokens"] / row["max_new"])


def repetition(completion: str, row: dict) -> float:
    """Minus the share of four words in a row that were there before; -1 for a loop cut short."""
    if row.get("stop") == "repetition":
        return -1.0
    pieces = _PIECE.findall(completion.casefold())
    fours = list(zip(pieces, pieces[1:], pieces[2:], pieces[3:], strict=False))
    return len(set(fours)) / len(fours) - 1.0 if fours else 0.0


def language(completion: str, row: dict) -> float:
    """Share of the letters in the row's "script" ("LATIN"; also several, "CJK HIRAGANA").

    It tells scripts apart, not languages: French and gibberish score as English does, and π lowers
    the score of a proof. Without letters it is 1. Scripts are words of Unicode's character names.
    """
    scripts = set((row.get("script") or "LATIN").upper().split())
    letters = Counter(filter(str.isalpha, _TAG.sub("", completion)))
    inside = sum(n for c, n in letters.items() if scripts & {*unicodedata.name(c, "").split()})
    return inside / letters.total() if letters else 1.0


def reasoning(completion: str, row: dict) -> float:
    """1 if the trace has five different words or signs, as 3 + 4 = 7 has, and is not the answer."""
    trace, said, _ = parse(completion)
    several = len(set(_PIECE.findall((trace or "").casefold()))) >= 5
    return float(several and _same(trace) != _same(said or ""))


# -------------------------------------------------------------------------------- weights and sums


class Reward(NamedTuple):
    """A function, and the field without which a row has no such reward ("": every row has it)."""

    function: Callable[[str, dict], float | None]
    needs: str = ""


class Mix(NamedTuple):
    """total = clip(sum of weight * reward, low, high); a reward of weight 0 is only logged."""

    weights: dict[str, float]
    low: float = -math.inf
    high: float = math.inf


class Scored(NamedTuple):
    total: float | None
    parts: dict[str, float | None]
    errors: dict[str, str]


REWARDS = {
    "format": Reward(strict_format),
    "tags": Reward(tags),
    "tags_pinocchio": Reward(tags_pinocchio),
    "answer": Reward(answer, "answer"),
    "answer_tunix": Reward(answer_tunix, "answer"),
    "first_number": Reward(first_number, "answer"),
    "answer_ideae": Reward(answer_ideae, "answer"),
    "markers": Reward(markers),
    "overlong": Reward(overlong),
    "length": Reward(length),
    "repetition": Reward(repetition),
    "language": Reward(language),
    "reasoning": Reward(reasoning),
}
FITTED = {"tfidf": Reward(tfidf, "reasoning"), "contrast": Reward(contrast)}  # on the traces
JUDGED = ("judge", "judge_correctness", "judge_reasoning", "judge_penalty")  # by another model
PRESETS = {
    # format 3 + four tags at 0.5 + answer -1 to 3 + its first number 1.5: -2 to 9.5
    "tunix": Mix({"format": 3, "tags": 2, "answer_tunix": 1, "first_number": 1.5}),
    # 0.75 + four tags at 0.0625 + five markers at 0.1 + 2.25 cos + answer 0 to 4: -0.25 to 7.75
    "ideae": Mix({"format": 0.75, "tags": 0.25, "markers": 0.1, "tfidf": 2.25, "answer_ideae": 1}),
    # 0.5 * 10 * correctness (0..1) + 0.5 * 2 * reasoning (0..5) + format 5 - penalties: -10 to 15
    "pinocchio": Mix(
        {"tags_pinocchio": 5, "judge_correctness": 5, "judge_reasoning": 1, "judge_penalty": -1},
        low=-10,
    ),
    # 0.2 * format + 0.2 * numeric_exact + 0.6 * judge (0 to 1); `answer` checks texts as well
    "grar": Mix({"format": 0.2, "answer": 0.2, "judge": 0.6}, low=0, high=1),
}


def read_mix(text: str, reward_file: str | None = None) -> Mix:
    """The weights of --rewards: "format:1,answer:3" · "tunix" · "tunix,overlong:1", both at once.

    A bare name has weight 1, and so has the function of --reward-file where it is not named.
    """
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    preset = PRESETS[items.pop(0)] if items and items[0] in PRESETS else Mix({})
    own = {_own(reward_file)[1]: 1.0} if reward_file else {}
    known, named = [*REWARDS, *FITTED, *JUDGED, *own], {}
    for item in items:
        name, colon, weight = (part.strip() for part in item.partition(":"))
        wrong = f"--rewards {item!r}: "
        if name in PRESETS:
            raise ValueError(wrong + "a preset comes first, once and without a weight")
        if name not in known:
            raise ValueError(wrong + f"expected one of {', '.join([*PRESETS, *known])}")
        if name in named:
            raise ValueError(wrong + f"{name} has its weight already")
        try:
            named[name] = float(weight) if colon else 1.0
        except ValueError:
            named[name] = math.nan
        if not math.isfinite(named[name]):
            raise ValueError(wrong + "the weight must be a number")
    if not (weights := preset.weights | own | named):
        raise ValueError("--rewards is empty: expected something like format:0.5,answer:1")
    return preset._replace(weights=weights)


def _own(reward_file: str) -> tuple[str, str]:
    """my.py:score -> ("my.py", "score")"""
    path, _, name = reward_file.rpartition(":")
    if not path.endswith(".py") or not name.isidentifier():
        raise ValueError(f"--reward-file {reward_file!r}: expected my.py:score, file and function")
    if name in {*REWARDS, *FITTED, *JUDGED, *PRESETS}:
        raise ValueError(f"--reward-file {reward_file}: rename it, {name} is one of our rewards")
    return path, name


def _load(path: str, name: str) -> Reward:
    """The user's function(completion, row)."""
    wrong = f"--reward-file {path}:{name}: "
    if not Path(path).is_file():
        raise ValueError(wrong + f"no file {Path(path).absolute()}")
    spec = importlib.util.spec_from_file_location("reward_file", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except Exception as e:
        raise ValueError(wrong + f"{type(e).__name__}: {e}") from e
    if not callable(function := getattr(module, name, None)):
        raise ValueError(wrong + f"the file has no function {name}")
    return Reward(function)


def prepare(mix: Mix, traces: Iterable[str], reward_file: str | None = None,
            judge: Mapping[str, Reward] | None = None) -> dict[str, Reward]:
    """The functions of a mix; TF-IDF is fitted on the reference traces, once, if the mix has it."""
    functions = REWARDS | dict(judge or {})
    if reward_file:
        path, name = _own(reward_file)
        functions[name] = _load(path, name)
    if fitted := [name for name in mix.weights if name in FITTED]:
        model = TfIdf(traces)
        if not model.idf:
            raise ValueError(f'--rewards {fitted[0]}: no row of the data has words in "reasoning"')
        for name in fitted:
            function, needs = FITTED[name]
            functions[name] = Reward(functools.partial(function, model), needs)
    if missing := [name for name in mix.weights if name not in functions]:
        raise ValueError(f"--rewards {missing[0]}: needs --judge")
    return {name: functions[name] for name in mix.weights}


def score(mix: Mix, functions: Mapping[str, Reward], completion: str, row: dict) -> Scored:
    """(total, the rewards that apply to the row, why some of them are None).

    The total is None where a reward with a weight is, and where none with a weight applies: such a
    row would teach nothing, and its 0 would be compared with others'.
    """
    parts, errors = {}, {}
    for name, (function, needs) in functions.items():
        given = row.get(needs)
        if needs and (given is None or not str(given).strip() or given in ((), [], {})):
            continue
        try:
            value = function(completion, row)
            if value is None or not math.isfinite(value):
                raise ValueError(f"returned {value}")
            parts[name] = float(value)
        except Exception as e:
            line = " ".join(f"{type(e).__name__}: {e}"[:200].split())
            parts[name], errors[name] = None, _safe(line)
    total, terms = None, {name: part for name, part in parts.items() if mix.weights[name]}
    if not terms:
        errors["total"] = "no reward with a weight applies to the row"
    elif None not in terms.values():
        total = sum(mix.weights[name] * part for name, part in terms.items())
        total = min(max(total, mix.low), mix.high)
        if not math.isfinite(total):
            total, errors["total"] = None, f"the sum is {total}"
    return Scored(total, parts, errors)


# --------------------------------------------------------------------------------------- terminal

# All controls but \n and \t, what reorders or hides text, and halves of surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]"
)
_COLOURS = {"<reasoning>": "\033[36m", "<answer>": "\033[1;32m"}  # cyan; bold green


def _safe(text: str) -> str:
    """Text that cannot drive a terminal: escape sequences and the like are spelt out, \\x1b[2J."""
    return _UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def colour(completion: str) -> str:
    """A completion for the terminal, with its reasoning and its answer in colour."""
    pieces = _TAG.split(_safe(completion))
    for i, tag in enumerate(pieces[1::2], 1):
        on = _COLOURS.get(tag.lower())
        pieces[2 * i] = f"{on}{pieces[2 * i]}\033[0m" if on else pieces[2 * i]
    return "".join(pieces)
