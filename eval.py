"""Evaluation: pass@k, majority votes, format and length of a model, and two of them compared.

    python eval.py                                                 # the tiny model, word problems
    python eval.py --model gemma3-1b --data gsm8k:test --samples 8 --adapter runs/sft
    python eval.py --adapter runs/grpo --out runs/eval-grpo --compare runs/eval-sft
    python eval.py --data mine.jsonl --rewards judge:0.6,format:0.2,answer:0.2 --judge gemma3-12b

Every problem is answered once greedily and `samples` times at a temperature. What to know:

1. pass@k is the unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. (arXiv 2107.03374), from
   the c right ones of n samples. maj@k lets k samples vote; a tie counts as the share of the tied
   answers that is right, what a fair draw scores on average. No answer, no vote.
2. Answers are read as the reward reads them (rewards.py): `pass@1` with or without tags, so that
   format and accuracy stay two numbers; `pass@1_tags` counts completions in strict format only.
3. Intervals are for 95 %: Wilson's where a problem counts 0 or 1 (everything greedy), else
   percentiles of 2,000 bootstrap resamples *of problems*: the samples of one are not independent.
4. --compare pairs the same problems: the exact McNemar test where they count 0 or 1, and a paired
   bootstrap interval of every difference.
5. Rows without an answer to check (rubrics, a reference) count for format, length, stops and
   --rewards: the mean score of what was scored; `missing` is the share that could not be.

Rows: what data.messages reads, {"question", "answer"}, {"question", "choices", "answer"} (a letter,
a text or a number from 0), {"prompt", "rubrics" | "reference"}; `task_type` or `domain` names the
row of the table. The folder gets results.json (pass@1, format, n, ...) and samples.jsonl. The same
command continues: a rollout's noise depends on (seed, problem, sample) alone, so what is finished
stays, and the results are those of an uninterrupted run. Scores come last, in the order of the
data; other --rewards sample nothing again.
"""

import contextlib
import dataclasses
import functools
import hashlib
import itertools
import json
import math
import sys
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import numpy as np
from tqdm import tqdm

import data
import gemma
import hosts
import judge
import lora
import rewards
import runs
from sampler import Rollout, Sampler

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Sampling(judge.Config):
    """What is answered, by whom and how; the flags that synthesize.py has too."""

    # model
    model: str = "tiny"
    """Which Gemma: tiny, gemma3-270m/1b/4b/12b/27b, gemma2-2b/9b/27b; -pt for the base model."""
    weights: str | None = None
    """Folder of the weights (config.json, safetensors); default: looked for by name."""
    tokenizer: str | None = None
    """Folder or file of the tokenizer, where the weights folder has no tokenizer.model."""
    adapter: str | None = None
    """The final/ of a run, a PEFT adapter, or a fully fine-tuned model; default: the bare model."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Of the weights and the activations."""

    # data
    data: str | None = None
    """Comma-separated: problems (built in), gsm8k, JSONL files; :test for a test split."""
    rows: int | None = None
    """Problems from the start of each source; 0: all of them."""
    system: str | None = None
    """System text put before every question; default: the one the adapter was trained under."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be used, counting them, instead of stopping at the first."""

    # sampling
    temperature: float = 1.0
    """Of the random completions."""
    top_k: int = 0
    """Draw from the k likeliest tokens; 0: from all."""
    top_p: float = 1.0
    """Draw from the likeliest tokens that add up to this probability."""
    min_p: float = 0.0
    """Draw from tokens at least this probable, as a share of the likeliest one's probability."""
    max_prompt: int | None = None
    """Tokens of the longest prompt."""
    max_new: int | None = None
    """Tokens after which a completion is cut; its stop reason is then "length"."""
    repetition: int = 0
    """End a completion after so many tokens of a loop (stop reason "repetition"); 0: never."""
    slots: int | None = None
    """Completions that a device writes at a time; lower it when out of memory."""
    seed: int = 0
    """Of the random completions."""
    reward_file: str | None = None
    """Rewards of your own: my.py (README) or my.py:score, one function of (completion, row)."""


@dataclasses.dataclass(frozen=True)
class Config(Sampling):
    """Every field left at None is filled from DEFAULTS for the model; the result is printed."""

    greedy: bool = True
    """Answer every problem once with the likeliest tokens: pass@1."""
    samples: int | None = None
    """Random completions of every problem, the k of pass@k and maj@k; 0: none."""
    rewards: str = ""
    """Weighted sum, as in judge:0.6,format:0.2, or a preset: tunix, ideae, pinocchio, grar."""
    out: str = "runs/eval"
    """Folder of results.json and samples.jsonl; the same command continues what is there."""
    compare: str | None = None
    """Folder of an earlier evaluation, to compare with on the problems both have."""


REAL = dict(
    dtype="bfloat16", data="gsm8k:test", rows=0, system=data.SYSTEM, samples=4, max_prompt=512,
    max_new=768, slots=64,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", data="problems:test", rows=100, system="", samples=4, max_prompt=88,
        max_new=104, slots=32,
    ),
    "gemma2": REAL,
    "gemma3": REAL,
}
# What a resumed evaluation may not give anew; the weights and prompts themselves are checked too.
FIXED = ("dtype", "greedy", "samples", "temperature", "top_k", "top_p", "min_p", "max_new",
         "repetition", "seed")
EVERY_S = 10.0  # between two lines of progress
N_RESAMPLES = 2_000
Z = 1.959963984540054  # the normal distribution has 95 % within Z standard deviations


def fill(config, defaults: dict[str, dict]):
    """Any script's Config with the fields left at None filled from its model's defaults.

    The system text is the one that the adapter was trained under. With a time limit and without
    steps the clock alone decides, so steps stay None.
    """
    system = lora.read_prompt(config.adapter or config.weights, config.system)
    config = dataclasses.replace(config, system=system, out=str(runs.output(config.out)))
    covers = lambda name: name.startswith("gemma") and config.model.startswith(name)
    names = [name for name in defaults if config.model == name or covers(name)]
    if not names:
        raise ValueError(f"--model {config.model}: expected one of {', '.join(gemma.CONFIGS)}")
    table = defaults[max(names, key=len)]  # gemma3-12b-pt: gemma3-12b before gemma3
    filled = {k: v for k, v in table.items() if getattr(config, k) is None}
    if runs.parse_time(getattr(config, "time_limit", None)) is not None:
        filled.pop("steps", None)
    return dataclasses.replace(config, **filled)


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    config = fill(config, DEFAULTS)
    if config.samples < 0 or not (config.greedy or config.samples):
        raise ValueError(f"--samples {config.samples} leaves nothing to do: expected 1 or more, or "
                         "0 without --no-greedy")
    if not 0 <= config.temperature < math.inf:
        raise ValueError(f"--temperature {config.temperature}: expected 0 (greedy) or more")
    asked = []  # of the judge; mistakes are better said before the sampling
    if config.rewards or config.reward_file:
        mix = rewards.read_mix(config.rewards, config.reward_file)
        asked = [name for name in mix.weights if name in rewards.JUDGED]
    if asked and config.judge is None:
        raise ValueError(f"--rewards {asked[0]}: needs --judge")
    if config.judge is not None and not asked:
        raise ValueError(f"--judge {config.judge}: needs --rewards, as in judge:1")
    return config


# -------------------------------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row, ready to be answered and graded."""

    id: str  # of question and answer, whatever the system text: pairs runs of two models
    prompt: tuple[int, ...]  # token ids
    question: str  # to read
    gold: str | None  # the right answer; None: nothing to check
    kind: str  # how to check it, one of rewards.KINDS
    choices: tuple[str, ...]
    domain: str
    row: dict = dataclasses.field(default_factory=dict, compare=False)  # all that the data said


def load_problems(source: str, tok: data.Tokenizer, system: str = "", rows: int = 0,
                  max_prompt: int | None = None,
                  skip_bad_rows: bool = False) -> tuple[list[Problem], list[str]]:
    """The first `rows` problems of each source (0: all), and what was wrong with those left out.

    Says how many of each there are.
    """
    problems, bad, seen = [], [], Counter()
    for one in filter(None, (s.strip() for s in source.split(","))):
        n_before = len(problems)
        for where, row in data.read_rows(one):
            if rows and len(problems) - n_before == rows:
                break
            try:
                if isinstance(row, ValueError):
                    raise row
                name = Path(one.partition(":")[0]).stem
                problem = read_problem(row, tok, system, name)
                if max_prompt and len(problem.prompt) > max_prompt:
                    raise ValueError(f"{len(problem.prompt)} tokens, more than --max-prompt "
                                     f"{max_prompt}")
            except (ValueError, KeyError, TypeError) as e:
                bad.append(f"{where}: {e}")
                if not skip_bad_rows:
                    raise ValueError(f"{bad[-1]} (--skip-bad-rows leaves such rows out)") from None
                continue
            seen[problem.id] += 1
            if (n := seen[problem.id]) > 1:  # the same row again is another problem
                problem = dataclasses.replace(problem, id=f"{problem.id}-{n}")
            problems.append(problem)
    if not problems:
        raise ValueError(f"--data {source}: no usable row" + (f"; first: {bad[0]}" if bad else ""))
    left_out = f", {len(bad)} bad rows left out, first: {bad[0]}" if bad else ""
    runs.say(f"data: {len(problems):,} problems of {source}{left_out}")
    return problems, bad


def read_problem(row: dict, tok: data.Tokenizer, system: str = "", source: str = "") -> Problem:
    """A row of any known shape; the prompt is what training on it would have shown the model."""
    if isinstance(row.get("answer"), str) and "####" in row["answer"]:
        row = row | data.gsm8k_row(row)
    choices = row.get("choices") or ()
    if not isinstance(choices, list | tuple):
        raise ValueError(f"expected a list of choices, found {choices!r:.60}")
    choices = tuple(map(str, choices))
    chat = row.get("messages", row.get("prompt", row.get("question")))
    if chat is None:
        raise ValueError(f"expected messages, prompt or question, found keys {sorted(row)}")
    if isinstance(chat, str) and chat.strip():
        chat = [{"role": "user", "content": data.asked(chat, choices)}]
    is_turn = lambda m: isinstance(m, dict) and "role" in m and isinstance(m.get("content"), str)
    if not isinstance(chat, list) or not chat or not all(map(is_turn, chat)):
        raise ValueError("expected a text or a list of messages, each with role and a text as "
                         f"content, found {chat!r:.60}")
    completion = row.get("completion")
    if chat[-1]["role"] in ("assistant", "model"):
        completion, chat = chat[-1]["content"], chat[:-1]
    gold = _gold(row, completion, choices)
    identity = json.dumps([chat, gold, choices], sort_keys=True)
    if system and chat[0]["role"] != "system":
        chat = [{"role": "system", "content": system}, *chat]
    if (kind := row.get("kind", "auto")) not in rewards.KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(rewards.KINDS)}")
    return Problem(
        id=hashlib.sha256(identity.encode()).hexdigest()[:16],
        prompt=tuple(tok.chat(data.fold_system(chat))),
        question=chat[-1]["content"],
        gold=gold,
        kind=rewards.kind_of(gold, choices) if gold is not None and kind == "auto" else kind,
        choices=choices,
        domain=str(row.get("task_type") or row.get("domain") or source),
        row=row,
    )


def _gold(row: dict, completion, choices: tuple[str, ...]) -> str | None:
    """The right answer of a row, where it has one: of a completion only what is in its tags."""
    gold = row.get("answer")
    if choices and isinstance(gold, int) and 0 <= gold < len(choices):
        return chr(ord("A") + gold)
    if gold is None and isinstance(completion, str):
        _, answer, strict = rewards.parse(completion)
        gold = answer if strict else None
    if gold is None:
        return None
    gold = ", ".join(map(str, gold)) if isinstance(gold, list) else str(gold).strip()
    if choices and (letter := rewards.vote(gold, "choice", choices)) is None:
        raise ValueError(f"answer {gold!r:.60} is none of the {len(choices)} choices")
    if not gold:
        raise ValueError("the answer is empty (leave it out where there is nothing to check)")
    return letter if choices else gold


# --------------------------------------------------------------------------------------- answers


def evaluate(sampler: Sampler, params: dict, tok: data.Tokenizer, problems: list[Problem], *,
             adapter: dict | None = None, greedy: bool = True, samples: int = 0,
             temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0,
             max_new: int | None = None, repetition: int = 0, seed: int = 0,
             journal: Path | None = None,
             every_s: float | None = EVERY_S) -> tuple[dict, list[dict]]:
    """Answers all problems -> (results, one row for each completion, in the problems' order).

    journal: a file that gets the rows of a problem as soon as it is finished, and whose finished
    problems are not sampled again. every_s: seconds between lines of progress, None for none.
    """
    n_of = {"greedy": int(greedy), "sampled": samples}
    rows = [] if journal is None else read_journal(journal, problems, n_of)
    done = {(row["mode"], row["problem"]) for row in rows}
    began, n_before, n_all = time.monotonic(), len(rows), len(problems) * sum(n_of.values())
    shown, n_done = began, n_before
    for mode, n in n_of.items():
        mine = hosts.share(range(len(problems)))
        todo = {i: problems[i].prompt for i in mine if (mode, i) not in done}
        if not n:
            continue
        # Truncation leaves the likeliest token alone; given here too, it compiles only once.
        rollouts = sampler.sample(
            params, todo, n, lora=adapter, seed=seed, max_new=max_new, repetition=repetition,
            temperature=0.0 if mode == "greedy" else temperature, top_k=top_k, top_p=top_p,
            min_p=min_p, stop=tok.stop_ids, forbidden=tok.forbidden_ids, vocab_size=tok.vocab_size,
        )
        unfinished = {}
        for rollout in rollouts:
            group = unfinished.setdefault(rollout.prompt, {})
            group[rollout.index] = grade(rollout, mode, problems[rollout.prompt], tok)
            n_done += 1
            if len(group) == n:
                new = [group[i] for i in sorted(unfinished.pop(rollout.prompt))]
                rows += new
                if journal is not None:
                    with runs._writing(journal), journal.open("ab") as f:
                        f.write(to_lines(new))
            now = time.monotonic()
            if every_s is not None and now - shown >= every_s:
                show(n_done, n_all, (now - began) / (n_done - n_before))
                shown = now
    rows = [row for part in hosts.gather(rows) for row in part]
    rows.sort(key=lambda row: (row["problem"], row["mode"], row["sample"]))
    return summarize(rows), rows


def check(problem: Problem, completion: str) -> tuple[str | None, bool | None, bool]:
    """(the answer, whether it is right or None where there is nothing to check, strict format)."""
    _, answer, strict = rewards.parse(completion)
    if problem.gold is None:
        return answer, None, strict
    right = rewards.correct(answer, problem.gold, problem.kind, problem.choices)
    return answer, right, strict


def grade(rollout: Rollout, mode: str, problem: Problem, tok: data.Tokenizer) -> dict:
    """A completion as a row of samples.jsonl."""
    completion = tok.decode(rollout.ids)
    answer, right, strict = check(problem, completion)
    said = None if right is None else rewards.vote(answer, problem.kind, problem.choices)
    return {
        "problem": rollout.prompt, "id": problem.id, "domain": problem.domain, "mode": mode,
        "sample": rollout.index, "correct": right, "format": strict, "stop": rollout.stop,
        "n_tokens": len(rollout.ids), "gold": problem.gold, "answer": answer, "vote": said,
        "prompt": problem.question, "completion": completion,
    }


def reward_functions(config, problems: list[Problem]) -> tuple[rewards.Mix, dict]:
    """(weights, functions) of a script's --rewards; a judge's read row["verdict"]."""
    mix = rewards.read_mix(config.rewards, config.reward_file)
    traces = [trace for p in problems if isinstance(trace := p.row.get("reasoning"), str)]
    names = rewards.JUDGED if config.judge_style == "pinocchio" else ("judge",)
    names = names if config.judge else ()
    judged = {name: rewards.Reward(functools.partial(verdict, name)) for name in names}
    return mix, rewards.prepare(mix, traces, config.reward_file, judged)


def row_of(problem: Problem, n_tokens: int, stop: str, max_new: int, overlong: float = 0.2,
           progress: float = 0.0) -> dict:
    """What a reward is told besides the completion: all that the data's row has, and this."""
    return problem.row | {
        "question": problem.question, "answer": problem.gold, "kind": problem.kind,
        "choices": problem.choices, "n_tokens": n_tokens, "max_new": max_new,
        "overlong_buffer": overlong * max_new, "stop": stop, "progress": progress,
    }


def score(problems: list[Problem], rows: list[dict], tok: data.Tokenizer,
          config) -> list[rewards.Scored]:
    """What --rewards gives each row; judged in their order, so the same after a kill."""
    mix, functions = reward_functions(config, problems)
    given, scored, judging = [], [], contextlib.nullcontext()
    for row in rows:
        n_tokens = row.get("n_tokens") or len(tok.encode(row["completion"]))
        given.append(row_of(problems[row["problem"]], n_tokens, row["stop"], config.max_new))
    if config.judge and not mix.weights.keys().isdisjoint(rewards.JUDGED):
        cache = Path(config.out) / "judge" / "replies.jsonl"
        judging = contextlib.closing(judge.open(config, cache=cache))
    with judging as judge_:
        if judge_:
            groups = judge.in_groups([row["problem"] for row in rows])
            for row, about, group in zip(rows, given, groups, strict=True):
                about["verdict"] = judge_.submit(row["completion"], dict(about), group)
                judge_.pump()
            judge_.pump(flush=True)
        progress = tqdm(rows, "scores", mininterval=EVERY_S)
        for row, about in zip(progress, given, strict=True):
            scored.append(rewards.score(mix, functions, row["completion"], about))
            if judge_ and (trouble := judge_.trouble()):
                raise SystemExit(f"{trouble}; the same command continues from there")
    return scored


def verdict(name: str, completion: str, row: dict) -> float:
    """What the judge said of a completion, waiting for it; a judgement it failed is missing."""
    parts = row["verdict"].result()
    if parts[name] is None:
        raise RuntimeError(parts["judge_error"])
    return parts[name]


def show(n_done: int, n_all: int, s_each: float) -> None:
    left = tqdm.format_interval(s_each * (n_all - n_done))
    runs.say(f"{n_done:,}/{n_all:,} completions  {1 / s_each:.3g} a second  {left} left")


def to_lines(rows: Iterable[dict]) -> bytes:
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace")


def read_lines(path: Path) -> list[dict]:
    rows = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError):  # torn by a kill
            row = json.loads(line)
            rows += [row] if isinstance(row, dict) else []
    return rows


def read_journal(path: Path, problems: list[Problem], n_of: dict[str, int]) -> list[dict]:
    """The rows of finished problems; cuts off a torn line and what it left incomplete."""
    if not path.exists():
        return []
    rows = read_lines(path)
    counts = Counter((row["mode"], row["problem"]) for row in rows)
    rows = [row for row in rows if counts[row["mode"], row["problem"]] == n_of[row["mode"]]]
    for row in rows:
        if row["problem"] >= len(problems) or row["id"] != problems[row["problem"]].id:
            raise ValueError(f"{path}: problem {row['problem']} is not that of --data any more")
    runs._replace(path, to_lines(rows))
    return rows


# ------------------------------------------------------------------------------------ statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that one of k drawn without replacement from n samples is among the c right ones.

    n 4, c 1, k 2 -> 1 - C(3, 2) / C(4, 2) = 0.5.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} right: expected 1 <= k <= n and c <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: list[str | None], right: list[bool]) -> float:
    """1 if the commonest answer is right; of tied ones, the share that is. None does not vote.

    votes [a a b b c], right [1 1 0 0 1] -> 0.5.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    tied = [vote for vote, n in counts.items() if n == max(counts.values())]
    return sum(right[votes.index(vote)] for vote in tied) / max(1, len(tied))


def wilson(c: int, n: int) -> tuple[float, float]:
    """Wilson's score interval of a rate of c in n (JASA 22, 1927)."""
    middle, half = (c + Z**2 / 2) / (n + Z**2), Z * math.sqrt(c * (n - c) / n + Z**2 / 4)
    half /= n + Z**2
    return max(0.0, middle - half), min(1.0, middle + half)


def bootstrap(values: Iterable[float]) -> tuple[float, float]:
    """Percentile interval of a mean over problems (Efron 1979); the same for the same values."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(N_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def is_binary(name: str, values: np.ndarray) -> bool:
    return not name.startswith(("length", "reward")) and bool(np.isin(values, (0.0, 1.0)).all())


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value of McNemar's test: are wins and losses a fair coin's?"""
    n, tail = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(tail + 1)) / 2**n)


def measure(rows: list[dict]) -> dict[str, float]:
    """What the completions of one problem add to each mean; no pass@ without a right answer."""
    greedy, sampled = ([r for r in rows if r["mode"] == m] for m in ("greedy", "sampled"))
    graded, mean = rows[0]["correct"] is not None, lambda values: float(np.mean(values))
    out, k = {}, len(sampled)
    groups = [("", greedy or sampled)] + [("_sampled", sampled)] * bool(greedy and sampled)
    for tags in ("", "_tags") if graded else ():
        right = lambda group, tags=tags: [r["correct"] and (r["format"] or not tags) for r in group]
        for suffix, group in groups:
            out[f"pass@1{suffix}{tags}"] = mean(right(group))
        for j in sorted({2**i for i in range(1, k.bit_length())} | {k}) if k > 1 else ():
            out[f"pass@{j}{tags}"] = pass_at_k(k, sum(right(sampled)), j)
        if k > 1:
            votes = [r["vote"] if r["format"] or not tags else None for r in sampled]
            out[f"maj@{k}{tags}"] = majority(votes, right(sampled))
    for suffix, group in groups:
        out[f"format{suffix}"] = mean([r["format"] for r in group])
        out[f"length{suffix}"] = mean([r["n_tokens"] for r in group])
        for stop in ("stop", "length", "repetition"):
            out[f"stop_{stop}{suffix}"] = mean([r["stop"] == stop for r in group])
        out |= measure_scores([r for r in group if "reward" in r], suffix)
    return out


def measure_scores(rows: list[dict], suffix: str) -> dict[str, float]:
    """Means of --rewards over the completions that have them; missing ones are in none, not 0."""
    if not rows:
        return {}
    columns = {"reward": [r["reward"] for r in rows]}
    for name in dict.fromkeys(name for r in rows for name in r["rewards"]):
        columns[f"reward_{name}"] = [r["rewards"].get(name) for r in rows]
    there = {name: [x for x in column if x is not None] for name, column in columns.items()}
    out = {f"{name}{suffix}": float(np.mean(column)) for name, column in there.items() if column}
    return out | {f"missing{suffix}": float(np.mean([r["reward"] is None for r in rows]))}


def by_problem(rows: Iterable[dict]) -> dict[str, tuple[str, dict[str, float]]]:
    """Each problem's domain and what it adds to the means, by its id."""
    groups = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return {id: (group[0]["domain"], measure(group)) for id, group in groups.items()}


def summarize(rows: list[dict]) -> dict:
    """Means over problems with their intervals, of all and of each domain."""
    everything, domains = [], {}
    for domain, measured in by_problem(rows).values():
        everything.append(measured)
        domains.setdefault(domain, []).append(measured)
    parts = {domain: means(domains[domain]) for domain in sorted(domains)}
    return {"pass@1": None} | means(everything) | {"domains": parts}


def names_of(measured: list[dict[str, float]]) -> list[str]:
    """Of all metrics, in the order of the problem that has most: one with an answer to check."""
    return list(dict.fromkeys(itertools.chain(max(measured, key=len), *measured)))


def means(measured: list[dict[str, float]]) -> dict:
    out = {"n": len(measured), "n_graded": sum("pass@1" in m for m in measured), "intervals": {}}
    for name in names_of(measured):
        values = np.array([m[name] for m in measured if name in m])
        out[name] = float(values.mean())
        rate = wilson(int(values.sum()), len(values)) if is_binary(name, values) else None
        out["intervals"][name] = rate or bootstrap(values)
    return out


def eval_metrics(results: dict) -> dict[str, float]:
    """What a training script logs of an evaluation; without answers to check, no accuracy."""
    names = {"eval_accuracy": "pass@1", "eval_format": "format", "eval_length": "length"}
    out = {ours: results[name] for ours, name in names.items() if results[name] is not None}
    limits = results["intervals"].get("pass@1", ())
    return out | dict(zip(("eval_accuracy_low", "eval_accuracy_high"), limits, strict=False))


def compare(rows: list[dict], others: list[dict]) -> dict:
    """This run against another on the problems both have; a positive difference: this is higher."""
    ours, theirs = by_problem(rows), by_problem(others)
    both = [(ours[id][1], theirs[id][1]) for id in ours if id in theirs]
    if not both:
        raise ValueError(f"--compare: none of its {len(theirs)} problems is among the {len(ours)} "
                         "of this run")
    out = {"n": len(both)}
    for name in names_of([a for a, _ in both]):
        pairs = np.array([(a[name], b[name]) for a, b in both if name in a and name in b])
        if not len(pairs):
            continue
        (this, other), difference = pairs.mean(0), pairs[:, 0] - pairs[:, 1]
        out[name] = {"n": len(pairs), "this": float(this), "other": float(other),
                     "difference": float(this - other),
                     "interval": bootstrap(difference)}
        if is_binary(name, pairs):
            wins, losses = int((difference > 0).sum()), int((difference < 0).sum())
            out[name] |= {"wins": wins, "losses": losses, "p": mcnemar(wins, losses)}
    return out


# ------------------------------------------------------------------------------------------ main


def table(results: dict) -> str:
    """The results for people: rates in percent, lengths in tokens, rewards as they are."""
    scale = lambda name: 1 if name.startswith(("length", "reward")) else 100
    digits = lambda name: 3 if name.startswith("reward") else 1

    def cell(part, name):
        if name not in part["intervals"]:
            return f"{'-':>6}{'':18}"
        value, (low, high) = part[name], part["intervals"][name]
        interval = ", ".join(f"{scale(name) * x:.{digits(name)}f}" for x in (low, high))
        return f"{scale(name) * value:6.{digits(name)}f}  {f'[{interval}]':16}"

    lines = [f"{results['n']} problems, {results['n_graded']} with an answer to check; percent and "
             "95 % interval: Wilson, of averaged samples bootstrap"]
    lines += [f"  {name:26}{cell(results, name)}" for name in results["intervals"]]
    if len(results["domains"]) > 1:
        names = ["pass@1", "format", "length"] + ["reward"] * ("reward" in results)
        lines.append(f"  {'domain':20}{'n':>6}  " + "".join(f"{name:24}" for name in names))
        for domain, part in results["domains"].items():
            cells = "".join(cell(part, name) for name in names)
            lines.append(f"  {domain:20.20}{part['n']:6}{cells}")
    pairs = dict(results.get("compare", {}))
    if pairs:
        lines.append(f"compared on {pairs.pop('n')} problems: this run, the other, the difference")
    for name, pair in pairs.items():
        this, other, d, low, high = (
            scale(name) * x
            for x in (pair["this"], pair["other"], pair["difference"], *pair["interval"])
        )
        n = digits(name)
        line = f"  {name:26}{this:6.{n}f}{other:8.{n}f}{d:+8.{n}f} [{low:+.{n}f}, {high:+.{n}f}]"
        if "p" in pair:
            line += f"  {pair['wins']} won, {pair['losses']} lost, McNemar p {pair['p']:.3g}"
        lines.append(line)
    return "\n".join(line.rstrip() for line in lines)


def fingerprint(start: lora.Start) -> str:
    """Tells other weights apart without reading gigabytes: sizes and samples of the files."""
    digest, folders = hashlib.sha256(), [start.weights] + [start.adapter] * bool(start.adapter)
    for file in [f for folder in folders for f in sorted(folder.glob("*.safetensors"))]:
        size = file.stat().st_size
        digest.update(f"{file.name} {size}".encode())
        with file.open("rb") as f:
            for at in (0, size // 2, max(0, size - 2**16)):
                f.seek(at)
                digest.update(f.read(2**16))
    return digest.hexdigest()[:16]


def check_folder(config, start: lora.Start, problems: list[Problem]) -> None:
    """Begins a folder; completions of something else in it are an error, not overwritten."""
    prompts = repr([(p.id, p.prompt) for p in problems]).encode()
    out, record = Path(config.out), dataclasses.asdict(config)
    record |= {"checksum of the weights": fingerprint(start),
               "checksum of the prompts": hashlib.sha256(prompts).hexdigest()[:16]}
    if (out / "config.json").exists() and (out / "samples.jsonl").exists():
        try:
            old = dict(json.loads((out / "config.json").read_bytes()))
        except (ValueError, TypeError) as e:
            raise ValueError(f"{out / 'config.json'} cannot be read: {e}; put it back, or choose "
                             "another --out") from None
        for key in [key for key in record if key in FIXED or " " in key]:
            if (was := old.get(key)) != (now := record[key]):
                flag = key if " " in key else "--" + key.replace("_", "-")
                raise ValueError(f"{flag} was {was!r} when {out} was begun, now it is {now!r}: "
                                 "put it back, or choose another --out")
    with runs._writing(out):
        out.mkdir(parents=True, exist_ok=True)
        runs.write_json(out / "config.json", record)


def answer(config, start: lora.Start, tok: data.Tokenizer, problems: list[Problem],
           greedy: bool) -> tuple[dict, list[dict]]:
    """evaluate() with the model of a script's Config; its folder keeps what is finished."""
    check_folder(config, start, problems)
    mesh, dtype = gemma.all_devices(), jnp.dtype(config.dtype)
    cfg, params = gemma.load(start.weights, dtype, mesh)
    adapter = None if start.adapter is None else lora.load(start.adapter, cfg)
    if adapter is not None:
        runs.say(lora.describe(adapter))
    sampler = Sampler(cfg, mesh, slots=config.slots, max_prompt=config.max_prompt,
                      max_new=config.max_new, dtype=dtype)
    return evaluate(
        sampler, params, tok, problems, adapter=adapter, greedy=greedy, samples=config.samples,
        temperature=config.temperature, top_k=config.top_k, top_p=config.top_p,
        min_p=config.min_p, repetition=config.repetition, seed=config.seed,
        journal=Path(config.out) / "samples.jsonl",
    )


@runs.one_line
def main(config: Config) -> dict:
    """Runs the evaluation, writes its folder, prints the table and returns the results."""
    runs.check_jax()
    runs.compilation_cache()
    config = resolve(config)
    runs.say(" ".join(f"{k}={v}" for k, v in dataclasses.asdict(config).items() if v is not None))
    others = None
    if config.compare is not None:
        file = runs.output(config.compare) / "samples.jsonl"
        if not file.is_file():
            raise ValueError(f"--compare {config.compare}: no samples.jsonl there")
        others = read_lines(file)

    start = lora.start(config.model, config.weights, config.adapter)
    tok = data.Tokenizer(config.tokenizer or start.weights)
    problems, _ = load_problems(config.data, tok, config.system, config.rows, config.max_prompt,
                                config.skip_bad_rows)
    out = Path(config.out)
    with runs.lock(out):
        results, rows = answer(config, start, tok, problems, config.greedy)
        if config.rewards or config.reward_file:
            for row, scored in zip(rows, score(problems, rows, tok, config), strict=True):
                row |= {"reward": scored.total, "rewards": scored.parts, "errors": scored.errors}
            results = summarize(rows)
        if others is not None:
            results["compare"] = compare(rows, others)
        with runs._writing(out):
            runs._replace(out / "samples.jsonl", to_lines(rows))
            runs.write_json(out / "results.json", results)
    print(table(results))
    return results


if __name__ == "__main__":
    import tyro

    try:
        main(tyro.cli(Config, description=__doc__))
    except ValueError as e:
        sys.exit(f"error: {e}")
