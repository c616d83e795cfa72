"""Rows for SFT from a teacher, and preference pairs from the model itself.

    python synthesize.py traces --teacher https://host/v1 --teacher-model NAME
    python synthesize.py traces --model gemma3-4b --slots 16 --samples 4
    python synthesize.py pairs --model gemma3-1b --adapter runs/sft --reference

    python train_sft.py --data runs/traces/rows.jsonl
    python train_simpo.py --data runs/pairs/pairs.jsonl --adapter runs/sft

It reads the data that eval.py reads; docs/data.md shows rows of several domains.

1. Completions are what costs. Each is written to disk as soon as it arrives and never asked for
   again. The rest is derived from them in the order of the data, so another --margin or
   --max-length costs nothing. What got no reply is a reject; the next run asks for it again.
2. traces: a near-duplicate shares more than OVERLAP of its word triples (Jaccard) with a kept trace
   of the same question. Traces of two questions are never compared: those of a template differ in
   their numbers alone. rejects.jsonl has the first reason to leave a completion out.
3. pairs: chosen is the completion with the highest score among those that ended by themselves,
   rejected the one with the lowest score of all. They become a pair if their scores differ, by at
   least --margin; a completion without a score is neither. --reference adds a pair of the row's own
   trace and the worst completion that is not right.
4. --limit and --budget count every request ever sent for the folder, failed ones included. Up to
   --teacher-threads requests under way when one is reached are paid for. The key is in
   $TEACHER_API_KEY.
"""

import dataclasses
import json
import math
from collections import Counter
from concurrent.futures import as_completed
from contextlib import closing
from pathlib import Path

from tqdm import tqdm

import data
import disk
import eval as evaluation
import hub
import judge
import rewards
import rollouts
import runs
import settings
import terminal
from endpoint import Endpoint, Unavailable, read_address
from rollouts import Problem, check

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Traces(settings.Judge, settings.Sampling, settings.Rows):
    """Rows for train_sft.py from a teacher: any OpenAI-compatible endpoint, or --model itself.

    Fields left at None are filled from DEFAULTS.
    """

    # teacher
    teacher: str | None = None
    """http(s)://host/v1, OpenAI-compatible, with its key in $TEACHER_API_KEY; default: --model."""
    teacher_model: str | None = None
    """The model's name at the endpoint."""
    teacher_threads: int = 16
    """Requests in flight at the endpoint."""
    limit: int = 0
    """Requests that may ever be sent for this folder; 0: no limit."""
    price: tuple[float, float] = (0.0, 0.0)
    """Dollars for a million prompt tokens and for a million completion tokens."""
    budget: float = 0.0
    """Dollars, by --price, after which no request is sent for this folder; 0: no limit."""
    samples: int = 1
    """Completions of each question."""

    # filters
    min_length: int = 5
    """Words and punctuation marks of the shortest trace that is kept."""
    max_length: int = 2000
    """Words and punctuation marks of the longest trace that is kept."""
    max_repetition: float = 0.3
    """Largest share of a trace's word 4-grams that may repeat earlier ones."""
    rewards: str = ""
    """Scores to filter by, as in judge:1, or a preset: tunix, ideae, pinocchio, grar."""
    min_reward: float = 0.5
    """Lowest score of --rewards that is kept."""

    # the run
    out: str = "runs/traces"
    """Folder of rows.jsonl and rejects.jsonl; the same command continues what is there."""


@dataclasses.dataclass(frozen=True)
class Pairs(settings.Judge, settings.Sampling, settings.Rows):
    """Preference pairs for train_simpo.py: the best and the worst of several completions."""

    # pairs
    samples: int = 8
    """Completions of each prompt."""
    rewards: str = "format:0.5,answer:1"
    """Weighted sum, as in format:1,answer:3, or a preset: tunix, ideae, pinocchio, grar."""
    margin: float = 0.5
    """Smallest difference between the two scores; equal scores never make a pair."""
    reference: bool = False
    """Add a pair of the row's own trace, scored too, and the worst completion that is not right."""

    # the run
    out: str = "runs/pairs"
    """Folder of pairs.jsonl and rejects.jsonl; the same command continues what is there."""


Config = Traces | Pairs
REAL = dict(dtype="bfloat16", data="gsm8k", rows=0, system=data.SYSTEM, max_prompt=512,
            max_new=768, slots=64)
TINY = dict(dtype="float32", data="problems", rows=200, system="", max_prompt=88, max_new=168,
            slots=32)
DEFAULTS = {"tiny": TINY, "gemma2": REAL, "gemma3": REAL}
TEACHER = dict(rows=0, system=data.SYSTEM, max_new=2048)
MESH_ONLY = ("adapter", "dtype", "base", "top_k", "top_p", "min_p", "repetition", "slots")
HTTP_ONLY = ("teacher_model", "limit", "budget")
KEY_VARIABLE = "TEACHER_API_KEY"
GIVE_UP = 32  # after this many failures in a row the server counts as gone
OVERLAP = 0.8  # share of common word triples above which two traces are near-duplicates


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's or the teacher's defaults; checks the rest."""
    teacher, asks = getattr(config, "teacher", None), isinstance(config, Traces)
    if teacher:
        read_address(teacher, "--teacher", KEY_VARIABLE)
    if config.judge is not None:
        judge.check(config)
    for name in MESH_ONLY if teacher else HTTP_ONLY if asks else ():
        if (value := getattr(config, name)) != getattr(type(config), name):
            where = "is not for a --teacher" if teacher else "needs a --teacher"
            raise ValueError(f"--{name.replace('_', '-')} {value} {where}")
    defaults = {hub.short_name(config.model): TEACHER} if teacher else DEFAULTS
    config = settings.resolve(config, defaults)
    if config.data is None:
        raise ValueError("--data is missing: name problems, gsm8k or JSONL files")
    least = {"samples": 1 if asks else 2}
    least |= {"teacher_threads": 1, "limit": 0, "budget": 0, "price": 0} if asks else {}
    for name, low in least.items():
        value = getattr(config, name)
        if not all(low <= x < math.inf for x in (value if name == "price" else [value])):
            raise ValueError(f"--{name.replace('_', '-')} {value}: expected {low} or more")
    if teacher and config.budget and not any(config.price):
        raise ValueError(f"--budget {config.budget:g} needs --price, as in --price 0.30 2.50")
    return config


# ----------------------------------------------------------------------------------- completions


class Teacher(Endpoint):
    """An endpoint that costs money. Its cache also has a line with the cost of every reply."""

    flag, limit_flag, key_variable = "--teacher", "--limit", KEY_VARIABLE

    def __init__(self, url: str, model: str | None = None, *,
                 price: tuple[float, float] = (0.0, 0.0), budget: float = 0.0, **more):
        self.price, self.budget, self.dollars = price, budget, 0.0
        super().__init__(url, model, **more)
        if self.cache is not None:
            self.dollars = sum(row["dollars"] for row in disk.good_rows(self.cache, dollars=float))

    def admit(self) -> None:
        super().admit()
        if self.budget and self.dollars >= self.budget:
            raise Unavailable(f"all {self.budget:g} dollars of --budget are spent")

    def paid(self, n_prompt: int, n_completion: int) -> None:
        dollars = (n_prompt * self.price[0] + n_completion * self.price[1]) / 1e6
        self.dollars += dollars
        self.append({"tokens": [n_prompt, n_completion], "dollars": dollars})


def ask(teacher: Teacher, problems: list[Problem], config: Traces) -> list[dict]:
    """A row for each completion: {"problem", "sample"} and {"completion", "stop"} or {"error"}."""
    futures, rows, failed = {}, {}, 0
    for i, problem in enumerate(problems):
        chat = data.with_system(problem.chat, config.system)
        for sample in range(config.samples):
            future = teacher.ask(chat, max_tokens=config.max_new, key=f"{config.seed} {sample}",
                                 temperature=config.temperature)
            futures[future] = i, sample
    for future in tqdm(as_completed(futures), "replies", len(futures),
                       mininterval=evaluation.EVERY_S):
        try:
            text = future.result().rpartition("</think>")[2].strip()  # some servers leave it in
            # The halves of a surrogate pair cannot be trained on.
            row = {"completion": text.encode(errors="replace").decode(), "stop": "stop"}
            failed = 0
        except OSError:  # the reply cannot be kept
            raise
        except Exception as e:
            row, failed = {"error": f"{type(e).__name__}: {e}"}, failed + 1
        rows[futures[future]] = row
        if failed == GIVE_UP:  # no more requests; replies in the cache still come
            teacher.stopped = f"not asked for, as {failed} others had no reply: {row['error']}"
    return [{"problem": i, "sample": sample} | row for (i, sample), row in sorted(rows.items())]


def prompt_of(problem: Problem) -> str | list[dict]:
    """The question without the system text, as messages where there are several."""
    return problem.question if len(problem.chat) == 1 else problem.chat


# ---------------------------------------------------------------------------------------- traces


def fault(problem: Problem, row: dict, config: Traces) -> tuple[str, str] | None:
    """(reason, detail) of what is wrong with a completion by itself, or None."""
    if "error" in row:
        return "no reply", row["error"]
    if row["stop"] != "stop":
        return "cut", f"stop reason {row['stop']}"
    reasoning = rewards.parse(text := row["completion"])[0]
    answer, right, strict = check(problem, text)
    if not strict:
        return "format", "expected <reasoning>...</reasoning> <answer>...</answer> and nothing else"
    if right is False:
        return "wrong", f"said {answer[:80]!r}, the answer is {problem.gold[:80]!r}"
    n = len(rewards.WORDS.findall(reasoning))
    if not config.min_length <= n <= config.max_length:
        return "length", (f"{n} words and punctuation marks, not {config.min_length} to "
                          f"{config.max_length}")
    if (share := -rewards.repetition(reasoning, {})) > config.max_repetition:
        return "repetition", f"{share:.2f} of its word 4-grams repeat earlier ones"
    if not rewards.reasoning(text, {}):
        return "no reasoning", "the trace says no more than the answer"
    return None


def triples(text: str) -> set[tuple[str, ...]]:
    """A text's word triples: "a b c d" -> {(a, b, c), (b, c, d)}."""
    pieces = rewards.WORDS.findall(text.casefold())
    return {*zip(pieces, pieces[1:], pieces[2:], strict=False)} or {tuple(pieces)}


def traces(problems: list[Problem], rows: list[dict], tok: data.Tokenizer,
           config: Traces) -> tuple[list[dict], list[dict]]:
    """(rows for SFT, rejects), in order; every completion is in one of the two."""
    kept, rejects, seen = [], [], {}  # seen: question -> (triples, name) of each of its traces

    def reject(row, reason, detail):
        problem, text = problems[row["problem"]], row.get("completion")
        rejects.append({"reason": reason, "detail": detail, "id": problem.id, **row,
                        "question": problem.question, "completion": text})

    for row in rows:
        problem = problems[row["problem"]]
        if wrong := fault(problem, row, config):
            reject(row, *wrong)
            continue
        said = triples(rewards.parse(row["completion"])[0])
        others = seen.setdefault(" ".join(str(prompt_of(problem)).casefold().split()), [])
        overlap = [(len(said & before) / len(said | before), name) for before, name in others]
        if overlap and max(overlap)[0] > OVERLAP:
            share, name = max(overlap)
            reject(row, "near-duplicate", f"{share:.2f} of the word triples are those of {name}")
            continue
        others.append((said, f"sample {row['sample']} of {problem.id}"))
        kept.append(row)
    scored = evaluation.score(problems, kept, tok, config) if config.rewards else [None] * len(kept)
    teacher = config.teacher_model or config.teacher or config.adapter or config.model
    out = []
    for row, s in zip(kept, scored, strict=True):
        if s is not None and s.total is None:
            reject(row, "no score", json.dumps(s.errors))
        elif s is not None and s.total < config.min_reward:
            reject(row, "reward", f"{s.total:.4g} is below --min-reward {config.min_reward:g}")
        else:
            more = {"teacher": teacher} | ({} if s is None else {"reward": s.total})
            out.append(training_row(problems[row["problem"]], row["completion"]) | more)
    return out, sorted(rejects, key=lambda row: (row["problem"], row["sample"]))


def training_row(problem: Problem, completion: str) -> dict:
    """A completion as train_sft.py reads it, with the other fields of the row that it answers.

    A right answer of the row replaces the completion's. The question text holds the choices.
    """
    reasoning, answer, _ = rewards.parse(completion)
    answer, prompt = problem.gold or answer, prompt_of(problem)
    out = {"question": problem.question, "reasoning": reasoning, "answer": answer}
    if isinstance(prompt, list):  # train_sft.py must read the messages, not the question alone
        out |= {"prompt": prompt, "completion": data.format_completion(reasoning, answer)}
    used = ("prompt", "messages", "completion", "choices", *out)
    return out | {k: v for k, v in problem.fields.items() if k not in used}


# ----------------------------------------------------------------------------------------- pairs


def reference_of(problem: Problem) -> str:
    """The row's own trace as a completion, or "" where it has none."""
    completion = data.parse_row(problem.fields).completion or ""
    return completion if completion != problem.gold else ""  # an answer alone is no trace


def choose(group: list[dict], margin: float) -> list[tuple[dict, dict]]:
    """The pairs (chosen, rejected) of one prompt's completions.

    Rows: completion, stop, reward, right, and sample, which is -1 for the row's own trace.
    rewards [1 3 None 3 1], margin 2 -> the second and the first.
    """
    group = [row for row in group if row["reward"] is not None and row["completion"].strip()]
    drawn = [row for row in group if row["sample"] >= 0]
    ended = [row for row in drawn if row["stop"] == "stop"]
    own = [row for row in group if row["sample"] < 0]
    wrong = [row for row in drawn if not row["right"]]
    reward, pairs = lambda row: row["reward"], {}  # by the texts, so that no pair comes twice
    for good, bad in ((ended, drawn), (own, wrong)):
        if good and bad:
            best, worst = max(good, key=reward), min(bad, key=reward)  # the first wins a tie
            apart = best["reward"] - worst["reward"]
            texts = best["completion"].strip(), worst["completion"].strip()
            if texts[0] != texts[1] and apart > 0 and apart >= margin - 1e-9:
                pairs.setdefault(texts, (best, worst))
    return [*pairs.values()]


def pairs(problems: list[Problem], rows: list[dict], tok: data.Tokenizer,
          config: Pairs) -> tuple[list[dict], list[dict]]:
    """(pairs for train_simpo.py, rejects), in order; every prompt is in one of the two."""
    texts = [reference_of(problem) for problem in problems] if config.reference else []
    rows = rows + [{"problem": i, "sample": -1, "completion": text, "stop": "stop"}
                   for i, text in enumerate(texts) if text]
    groups, out, rejects = {}, [], []
    scored = evaluation.score(problems, rows, tok, config)
    for row, s in zip(rows, scored, strict=True):
        _, right, _ = check(problems[row["problem"]], row["completion"])
        row = row | {"reward": s.total, "parts": s.parts, "errors": s.errors, "right": right}
        groups.setdefault(row["problem"], []).append(row)
    for i, group in groups.items():
        problem, made = problems[i], choose(group, config.margin)
        about = {"id": problem.id, "task_type": problem.domain, "prompt": prompt_of(problem)}
        if not made:
            scores = [row["reward"] for row in group]
            known = [r for r in group if r["reward"] is not None and r["sample"] >= 0]
            ended = any(r["stop"] == "stop" for r in known)
            reason = "no score" if len(known) < 2 else "margin" if ended else "cut"
            errors = next((row["errors"] for row in group if row["errors"]), {})
            rejects.append({"reason": reason, **about, "rewards": scores, "errors": errors})
        for pair in made:
            line = dict(about)
            for name, row in zip(("chosen", "rejected"), pair, strict=True):
                line |= {name: row["completion"], f"{name}_reward": row["reward"],
                         f"{name}_rewards": row["parts"], f"{name}_sample": row["sample"]}
            out.append(line)
    return out, rejects


# ------------------------------------------------------------------------------------------ main


@terminal.one_line
def main(config: Config) -> Path:
    """Writes the rows or the pairs and returns their file."""
    terminal.check_versions()
    terminal.compilation_cache()
    config = resolve(config)
    out = Path(config.out)
    settings.show_config(config)
    start = hub.find_start(config.model, config.weights, config.adapter)
    tok = data.Tokenizer(config.tokenizer or start.weights)
    problems, bad = rollouts.load_problems(config, tok)
    make, name = (traces, "rows") if isinstance(config, Traces) else (pairs, "pairs")
    runs.claim(out, name)
    with disk.lock(out):
        if getattr(config, "teacher", None):
            with disk.writing(out):
                runs.write_config(out, config, kind=name)
                (out / "teacher").mkdir(exist_ok=True)
            teacher = Teacher(
                config.teacher, config.teacher_model, threads=config.teacher_threads,
                limit=config.limit, price=config.price, budget=config.budget,
                cache=out / "teacher" / "replies.jsonl")
            with disk.writing(out), closing(teacher):
                rows = ask(teacher, problems, config)
            terminal.say(f"{teacher.n_sent:,} requests and {teacher.dollars:.2f} dollars so far")
        else:
            evaluation.begin_folder(config, name, start, tok, problems)
            rows = evaluation.answer(config, problems, tok, start, greedy=False)
        made, rejects = make(problems, rows, tok, config)
        rejects += [{"reason": "bad row", "detail": line} for line in bad]
        with disk.writing(out):
            disk.replace_file(out / f"{name}.jsonl", disk.to_jsonl(made))
            disk.replace_file(out / "rejects.jsonl", disk.to_jsonl(rejects))
    counts = Counter(row["reason"] for row in rejects).most_common()
    reasons = ", ".join(f"{n:,} {reason}" for reason, n in counts)
    terminal.say(f"{len(made):,} {name} in {out / name}.jsonl, {len(rejects):,} rejects: {reasons}")
    if not made:
        remedy = "; raise --max-new" if counts and counts[0][0] == "cut" else ""
        terminal.say(f"no {name} to train on: {out}/rejects.jsonl says why{remedy}")
    return out / f"{name}.jsonl"


if __name__ == "__main__":
    import commandline

    terminal.command(lambda: main(commandline.cli(Config, description=__doc__)))
