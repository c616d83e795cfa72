"""Completion -> score: built-in rewards, rewards of a file, and their weighted sum.

    mix = read_mix("format:1,answer:3")             # or a recipe: "tunix", "tunix,overlong:1"
    functions = prepare(mix, traces)                # traces: the rows' reference reasoning
    score(mix, functions, completion, row)          # (total, parts, errors)

A reward is a function of (completion, row) that returns a number, or None where it could not be
computed. `row` is the data's row and what the trainer adds: question, conversation (all messages
up to the completion, the system text first), answer, kind, choices, n_tokens, max_new,
overlong_buffer (tokens), stop, progress (share of the run, 0 to 1).

A file of rewards (--reward-file my.py, and recipes/NAME.py for --rewards NAME) defines

    REWARDS = {"short": short, "cited": Reward(cited, needs="source")}
    WEIGHTS = {"short": 0.5, "cited": 2, "format": 1}   # default: 1 for each of REWARDS
    RANGE = (0, 1)                                      # optional: the sum is clipped to it
    def fit(traces): ...                                # optional: called once, before any scoring

and --reward-file my.py:short takes one function of any file.

Missing is not zero: a reward that raises, or returns NaN or None, is None, and so is the total. A
reward that does not apply to a row (no right answer, no reference trace) is left out of the sum.
"""

import ast
import functools
import importlib.util
import math
import re
import sys
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

from answers import KINDS as KINDS
from answers import TAG, TAGS, correct, kind_of, parse, words
from answers import vote as vote

HERE = Path(__file__).resolve().parent
# Modules that a reward file may import which are no helpers of its own.
OURS = {*"adapter_files answers card check commandline data disk divergence download endpoint "
        "formulas gemma hosts hub judge lora merge model_files packed problems report rewards "
        "rollouts runs sampler settings splash stage tables terminal tokenizer_files".split()}
# A word, a sign, or a character of a script that writes no spaces. Words are cut after 20 letters,
# so that an endless word counts as a repetition.
WORDS = re.compile(
    r"[^\W\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff]{1,20}+|\S")


# ------------------------------------------------------------------------------- built-in rewards


def strict_format(completion: str, row: dict) -> float:
    """1 if each tag is there once, in order, around text, with no text outside; else 0."""
    return float(parse(completion)[2])


def tags(completion: str, row: dict) -> float:
    """+0.25 for each of the four tags that is there exactly once, else -0.25: -1 to 1."""
    return sum(0.25 if completion.count(tag) == 1 else -0.25 for tag in TAGS)


def told(row: dict) -> tuple[str, str, tuple]:
    """(right answer, its kind, choices) of a row."""
    gold, choices = str(row["answer"]).strip(), tuple(row.get("choices") or ())
    kind = row.get("kind") or "auto"
    return gold, kind_of(gold, choices) if kind == "auto" else kind, choices


def answer(completion: str, row: dict) -> float:
    return float(correct(parse(completion)[1], *told(row)))


def overlong(completion: str, row: dict) -> float:
    """0 up to max_new - overlong_buffer tokens, then linear to -1 at max_new (arXiv 2503.14476).

    max_new 100, overlong_buffer 20: 70, 80, 90, 100, 110 tokens -> 0, 0, -0.5, -1, -1
    """
    left = row["max_new"] - row["n_tokens"]
    return max(-1.0, min(0.0, left / max(row["overlong_buffer"], 1) - 1.0))


def length(completion: str, row: dict) -> float:
    """Minus the share of max_new that was used: 0 to -1. A negative weight rewards long texts."""
    return -min(1.0, row["n_tokens"] / row["max_new"])


def repetition(completion: str, row: dict) -> float:
    """Minus the share of word 4-grams that occurred before; -1 if the sampler stopped a loop."""
    if row.get("stop") == "repetition":
        return -1.0
    pieces = WORDS.findall(completion.casefold())
    fours = list(zip(pieces, pieces[1:], pieces[2:], pieces[3:], strict=False))
    return len(set(fours)) / len(fours) - 1.0 if fours else 0.0


def language(completion: str, row: dict) -> float:
    """Share of the letters that are in the row's "script" ("LATIN"; several: "CJK HIRAGANA").

    Scripts are words of Unicode's character names: French and gibberish score as English does, and
    π lowers the score of a proof. Without letters the share is 1.
    """
    scripts = set(str(row.get("script") or "LATIN").upper().split())
    letters = Counter(filter(str.isalpha, TAG.sub("", completion)))
    inside = sum(n for c, n in letters.items() if scripts & {*unicodedata.name(c, "").split()})
    return inside / letters.total() if letters else 1.0


def reasoning(completion: str, row: dict) -> float:
    """1 if the trace has five different words or signs (as "3 + 4 = 7") and is not the answer."""
    trace, said, _ = parse(completion)
    several = len(set(WORDS.findall((trace or "").casefold()))) >= 5
    return float(several and words(trace) != words(said or ""))


# -------------------------------------------------------------------------------- weights and sums


class Reward(NamedTuple):
    function: Callable[[str, dict], float | None]
    needs: str = ""  # the field without which a row has no such reward


class Mix(NamedTuple):
    """total = clip(sum of weight * reward, low, high); a reward of weight 0 is only logged."""

    weights: dict[str, float]
    low: float = -math.inf
    high: float = math.inf
    preset: str = ""  # the recipe whose file defines some of the rewards


class Scored(NamedTuple):
    total: float | None
    parts: dict[str, float | None]
    errors: dict[str, str]


REWARDS = {
    "format": Reward(strict_format), "tags": Reward(tags), "answer": Reward(answer, "answer"),
    "overlong": Reward(overlong), "length": Reward(length), "repetition": Reward(repetition),
    "language": Reward(language), "reasoning": Reward(reasoning),
}
JUDGED = ("judge", "judge_correctness", "judge_reasoning", "judge_penalty")  # by another model
BY_POLICY = ("prob",)  # by the model in training, see rollouts.answer_probs
PRESETS = ("tunix", "ideae", "pinocchio", "grar")  # recipes/NAME.py


def read_mix(text: str, reward_file: str | None = None) -> Mix:
    """The weights of --rewards: "format:1,answer:3", "tunix", or both: "tunix,overlong:1".

    A bare name has weight 1. A reward file adds its own weights, unless --rewards names them.
    """
    items = [item.strip() for item in text.split(",")] if text.strip() else []
    mix, known = Mix({}), {*REWARDS, *JUDGED, *BY_POLICY}
    if items and items[0] in PRESETS:
        preset = items.pop(0)
        rewards, mix, _ = read_file(str(preset_file(preset)))
        known, mix = known | rewards.keys(), mix._replace(preset=preset)
    if reward_file:
        rewards, own, _ = read_file(reward_file)
        known |= rewards.keys()
        low, high = own[1:3] if own[1:3] != (-math.inf, math.inf) else mix[1:3]
        mix = Mix(mix.weights | own.weights, low, high, mix.preset)
    named = {}
    for item in items:
        name, colon, weight = (part.strip() for part in item.partition(":"))
        try:
            value = float(weight) if colon else 1.0
        except ValueError:
            value = math.nan
        if name not in known or name in named or not math.isfinite(value):
            raise ValueError(f"--rewards {item!r}: expected NAME:WEIGHT, each name once, of "
                             f"{', '.join(sorted(known))}; or first one of {', '.join(PRESETS)}")
        named[name] = value
    if not (weights := mix.weights | named):
        raise ValueError("--rewards is empty: expected something like format:0.5,answer:1")
    return mix._replace(weights=weights)


# ------------------------------------------------------------------------------- files of rewards


def preset_file(name: str) -> Path:
    """The file of a recipe: in recipes/, or beside this one, as in an exported notebook."""
    places = [HERE / "recipes" / f"{name}.py", HERE / f"{name}.py"]
    return _first_file(places, f"--rewards {name}")


def own_file(given: str) -> tuple[Path, str]:
    """(path, function or "") of my.py or my.py:score, in the working directory or beside this file,
    where an exported notebook writes it."""
    path, name = (given, "") if given.endswith(".py") else given.rpartition(":")[::2]
    return _first_file([Path(path), HERE / path], f"--reward-file {given}"), name


def _first_file(places: list[Path], flag: str) -> Path:
    if found := [path for path in places if path.is_file()]:
        return found[0]
    raise ValueError(f"{flag}: no file '{places[0]}'")


def read_file(given: str) -> tuple[dict[str, Reward], Mix, Callable[[list[str]], None] | None]:
    """(rewards, mix, fit) of my.py, or of the one function of my.py:score."""
    path, name = own_file(given)
    wrong = f"--reward-file {given}: "
    try:
        module = _run(str(path.resolve()), path.stat().st_mtime_ns)
    except (Exception, SystemExit) as e:
        raise ValueError(wrong + f"{type(e).__name__}: {e}") from e
    functions, weights = getattr(module, "REWARDS", {}), getattr(module, "WEIGHTS", None)
    limits = getattr(module, "RANGE", ())
    if not (isinstance(functions, dict) and isinstance(weights, dict | None)
            and isinstance(limits, tuple | list) and len(limits) in (0, 2)
            and all(isinstance(n, int | float) for n in (*(weights or {}).values(), *limits))):
        raise ValueError(wrong + "expected REWARDS = {name: function}, WEIGHTS = {name: number} "
                         "and RANGE = (low, high)")
    if name:
        functions, weights = {name: functions.get(name) or getattr(module, name, None)}, None
    for reward, function in functions.items():
        if not callable(getattr(function, "function", function)):
            raise ValueError(wrong + f"the file has no function {reward}")
        if reward in {*REWARDS, *JUDGED, *BY_POLICY, *PRESETS}:
            raise ValueError(wrong + f"rename {reward}, a reward of that name is built in")
    weights = dict.fromkeys(functions, 1.0) if weights is None else dict(weights)
    if not weights:
        raise ValueError(wrong + "expected REWARDS = {name: function} in it, or my.py:score")
    rewards = {name: f if isinstance(f, Reward) else Reward(f) for name, f in functions.items()}
    mix = Mix(weights, *limits)
    return rewards, mix, getattr(module, "fit", None)


@functools.cache  # a file runs once, and again when it changed
def _run(path: str, changed: int) -> ModuleType:
    if (folder := str(Path(path).parent)) not in sys.path:
        sys.path.append(folder)  # last: a helper.py of the user's must not replace one of ours
    spec = importlib.util.spec_from_file_location(f"rewards_of_{Path(path).stem}", path)
    sys.modules[spec.name] = module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def files(text: str | None, reward_file: str | None = None) -> list[Path]:
    """The files that --rewards and --reward-file need, with the helpers beside them."""
    first = (text or "").partition(",")[0].strip()
    wanted = [preset_file(first)] if first in PRESETS else []
    wanted += [own_file(reward_file)[0]] if reward_file else []
    for path in wanted:  # the loop appends to this list
        for node in ast.walk(ast.parse(path.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            beside = [path.with_name(f"{name}.py") for name in names if name not in OURS]
            wanted += [file for file in beside if file.is_file() and file not in wanted]
    return wanted


# ---------------------------------------------------------------------------------------- scoring


def prepare(mix: Mix, traces: Iterable[str], reward_file: str | None = None,
            by_model: Mapping[str, Reward] | None = None) -> dict[str, Reward]:
    """The functions of a mix; a file's fit() is called here, on the reference traces.

    by_model: functions of JUDGED and BY_POLICY.
    """
    functions = REWARDS | dict(by_model or {})
    chosen = [str(preset_file(mix.preset))] if mix.preset else []
    for path in [*chosen, reward_file] if reward_file else chosen:
        rewards, _, fit = read_file(path)
        functions |= rewards
        if fit and not rewards.keys().isdisjoint(mix.weights):
            fit(list(traces))
    if missing := [name for name in mix.weights if name not in functions]:
        raise ValueError(f"--rewards {missing[0]}: needs --judge, or a file that defines it")
    return {name: functions[name] for name in mix.weights}


def score(mix: Mix, functions: Mapping[str, Reward], completion: str, row: dict) -> Scored:
    """(total, the rewards that apply to the row, why some of them are None).

    Where no reward with a weight applies the total is None: a 0 would be compared with other rows.
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
            parts[name] = None
            errors[name] = printable(" ".join(f"{type(e).__name__}: {e}"[:200].split()))
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


# Control characters but \n and \t, marks that reorder or hide text, and halves of surrogate pairs.
_UNSAFE = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ud800-\udfff]")
_COLOURS = {"<reasoning>": "\033[36m", "<answer>": "\033[1;32m"}  # cyan; bold green


def printable(text: str) -> str:
    """Text that cannot drive a terminal: escape sequences are spelt out, as in \\x1b[2J."""
    return _UNSAFE.sub(lambda m: m[0].encode("unicode_escape").decode(), text)


def colour(completion: str) -> str:
    """A completion for the terminal, with its reasoning and its answer in colour."""
    pieces = TAG.split(printable(completion))
    for i, tag in enumerate(pieces[1::2], 1):
        on = _COLOURS.get(tag.lower())
        pieces[2 * i] = f"{on}{pieces[2 * i]}\033[0m" if on else pieces[2 * i]
    return "".join(pieces)
