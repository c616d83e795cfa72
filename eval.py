"""Evaluation: pass@k, majority votes, format and length of a model, and two models compared.

    python eval.py                               # the tiny model, word problems
    python eval.py --model gemma3-1b --adapter runs/sft --data gsm8k:test
    python eval.py --adapter runs/grpo --out runs/eval2 --compare runs/eval
    python eval.py --data mine.jsonl --rewards judge,format --judge gemma3-12b

Every problem is answered once greedily and --samples times at --temperature. What to know:

1. pass@k is the unbiased estimator 1 - C(n-c, k) / C(n, k) of Chen et al. (arXiv 2107.03374), for
   c right ones among n samples. maj@k lets k samples vote; a tie scores the share of the tied
   answers that are right, the mean of a fair draw. A sample without an answer has no vote.
2. Answers are read as the reward reads them (rewards.py): `pass@1` with or without tags, so that
   format and accuracy stay separate; `pass@1_tags` counts completions in strict format only.
3. Intervals are at 95 %: Wilson's where each problem scores 0 or 1 (rates of greedy answers), else
   percentiles of 2,000 bootstrap resamples *of problems*: one problem's samples are dependent.
4. --compare pairs the problems of two runs: McNemar's exact test where they score 0 or 1, and a
   paired bootstrap interval of every difference.
5. Rows without an answer to check (rubrics, a reference) still count for format, length, stops and
   --rewards, a mean over the scored completions; `missing` is the share without a score.

Rows have any shape that data.parse_row reads; the table has a line per `task_type` or `domain`. The
folder gets results.json (pass@1, format, n, ...) and samples.jsonl. The same command continues: a
rollout's noise depends on (seed, problem, sample) alone, so finished completions are kept, and the
results are those of an uninterrupted run. Scoring comes last: new --rewards sample nothing again.
"""

import dataclasses
import itertools
import math
import re
import textwrap
import time
from collections import Counter
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from tqdm import tqdm

import data
import disk
import gemma
import hub
import rewards
import rollouts
import runs
import settings
import stage
import terminal
from rollouts import Problem, check, wilson
from sampler import Rollout, Sampler

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config(settings.Judge, settings.Sampling, settings.Rows):
    """Fields left at None take the model's defaults from DEFAULTS; the result is printed."""

    # evaluation
    greedy: bool = True
    """Answer every problem once greedily, for pass@1."""
    samples: int | None = None
    """Sampled completions per problem, the k of pass@k and maj@k; 0: none."""
    rewards: str = ""
    """Weighted sum, as in format:1,answer:3, or a preset: tunix, ideae, pinocchio, grar."""

    # the run
    out: str = "runs/eval"
    """Folder of results.json and samples.jsonl; the same command continues what is there."""
    compare: str | None = None
    """Folder of an earlier evaluation to compare with, on the problems both share."""
    all: bool = False
    """Print every metric and domain, and the comparison of each; results.json always has them."""


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
    **dict.fromkeys(gemma.LARGE, REAL | dict(slots=8)),
}
MAY_CHANGE = (  # flags that may change in a continued folder: checksummed, or used after sampling
    "model", "weights", "tokenizer", "adapter", "data", "rows", "system", "max_prompt", "compare",
    "all", "rewards", "reward_file", "reward_timeout", "judge", "judge_model", "judge_weights",
    "judge_style", "judge_calls", "skip_bad_rows", "margin", "reference", "min_length",
    "max_length", "max_repetition", "min_reward",
)
EVERY_S = 10.0  # between two progress lines
N_RESAMPLES = 2_000


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    config = settings.resolve(config, DEFAULTS)
    if config.samples < 0 or not (config.greedy or config.samples):
        raise ValueError(f"--samples {config.samples} leaves nothing to do: expected 1 or more, or "
                         "0 without --no-greedy")
    if not 0 <= config.temperature < math.inf:
        raise ValueError(f"--temperature {config.temperature}: expected 0 (greedy) or more")
    if config.rewards or config.reward_file:  # report mistakes before sampling
        rollouts.check_rewards(config)
    elif config.judge is not None:
        raise ValueError(f"--judge {config.judge}: needs --rewards, as in judge:1")
    return config


# --------------------------------------------------------------------------------------- answers


def answer(config, problems: list[Problem], tok: data.Tokenizer, start: hub.Start,
           greedy: bool) -> list[dict]:
    """Loads the model and runs `complete`, with samples.jsonl in --out as the journal."""
    model, weights = stage.load_to_sample(start, config)
    sampler = Sampler(**model, slots=config.slots, max_prompt=config.max_prompt,
                      max_new=config.max_new)
    journal = Path(config.out) / "samples.jsonl"
    return complete(sampler, weights, tok, problems, config, greedy, journal)


def complete(sampler: Sampler, weights: tuple, tok: data.Tokenizer, problems: list[Problem],
             config, greedy: bool = True, journal: Path | None = None) -> list[dict]:
    """Answers all problems -> one row per completion, in the problems' order.

    journal: a file that gets a problem's rows as soon as all of them are there; problems already in
    it are not sampled again.
    """
    n_of = {"greedy": int(greedy), "sampled": config.samples}
    rows = [] if journal is None else read_journal(journal, problems, n_of)
    finished = {(row["mode"], row["problem"]) for row in rows}
    progress = tqdm(total=len(problems) * sum(n_of.values()), initial=len(rows),
                    desc="completions", mininterval=EVERY_S, smoothing=0)
    first = None  # when the first completion came
    for mode, n in n_of.items():
        todo = {i: p.prompt for i, p in enumerate(problems) if n and (mode, i) not in finished}
        unfinished = {}
        # Truncation keeps the likeliest token, so greedy decoding can use the same rules, and both
        # modes share one compiled program.
        for rollout in sampler.sample(
                weights[0], todo, max(1, n), lora=weights[1], seed=config.seed,
                temperature=0.0 if mode == "greedy" else config.temperature, top_k=config.top_k,
                top_p=config.top_p, min_p=config.min_p, repetition=config.repetition,
                **rollouts.token_rules(tok)):
            group = unfinished.setdefault(rollout.prompt, {})
            group[rollout.index] = grade(rollout, mode, problems[rollout.prompt], tok)
            progress.update()
            now = time.time()
            first = first or now
            if now - first < 1:  # the pace begins after the round that compiled
                progress.start_t, progress.initial = now, progress.n
            if len(group) == n:
                new = [group[i] for i in sorted(unfinished.pop(rollout.prompt))]
                rows += new
                if journal is not None:
                    with disk.writing(journal), journal.open("ab") as f:
                        f.write(disk.to_jsonl(new))
    progress.close()
    return sorted(rows, key=lambda row: (row["problem"], row["mode"], row["sample"]))


def grade(rollout: Rollout, mode: str, problem: Problem, tok: data.Tokenizer) -> dict:
    """A completion as a row of samples.jsonl."""
    completion = tok.decode(rollout.ids)
    said, right, strict = check(problem, completion)
    vote = None if right is None else rewards.vote(said, problem.kind, problem.choices)
    return {
        "problem": rollout.prompt, "id": problem.id, "domain": problem.domain, "mode": mode,
        "sample": rollout.index, "correct": right, "format": strict, "stop": rollout.stop,
        "n_tokens": len(rollout.ids), "gold": problem.gold, "answer": said, "vote": vote,
        "prompt": problem.question, "completion": completion,
    }


def places(questions: list) -> list[tuple]:
    """(question, index in its group, group size): a b a -> (a, 0, 2) (b, 0, 1) (a, 1, 2)."""
    size, seen, out = Counter(questions), Counter(), []
    for question in questions:
        out.append((question, seen[question], size[question]))
        seen[question] += 1
    return out


def score(problems: list[Problem], rows: list[dict], tok: data.Tokenizer,
          config) -> list[rewards.Scored]:
    """Scores each row by --rewards, in order, so that scores are the same after a kill."""
    scored = []
    with rollouts.Scorer(config, problems) as scorer:
        placed = zip(rows, places([row["problem"] for row in rows]), strict=True)
        blocks = itertools.groupby(placed, lambda r: r[0]["problem"] // 16)
        for _, block in tqdm(blocks, "scores of 16 problems", mininterval=EVERY_S):
            futures = []
            for row, place in block:
                n_tokens = row.get("n_tokens") or len(tok.encode(row["completion"]))
                told = rollouts.reward_row(problems[row["problem"]], n_tokens, row["stop"], config)
                futures.append(scorer.submit(row["completion"], told, place))
            scored += scorer.collect(futures)
            if scorer.judge and (trouble := scorer.judge.trouble()):
                raise SystemExit(f"{trouble}; the same command continues from there")
    return scored


COMPLETION = {  # of samples.jsonl: what a line must hold to count
    **dict.fromkeys(("problem", "sample", "n_tokens"), int), "format": bool,
    **dict.fromkeys(("id", "domain", "mode", "stop", "completion"), str),
    "correct": (bool, type(None)), "vote": (str, type(None)),
}


def read_journal(path: Path, problems: list[Problem], n_of: dict[str, int]) -> list[dict]:
    """The rows of finished problems; drops a torn line and the rows of unfinished problems."""
    if not path.exists():
        return []
    rows = disk.good_rows(path, **COMPLETION)
    counts = Counter((row["mode"], row["problem"]) for row in rows)
    rows = [row for row in rows if counts[row["mode"], row["problem"]] == n_of.get(row["mode"])]
    for row in rows:
        for name in ("reward", "rewards", "errors"):  # of --rewards that may have changed
            row.pop(name, None)
        if row["problem"] >= len(problems) or row["id"] != problems[row["problem"]].id:
            raise ValueError(f"{path}: problem {row['problem']} is no longer the one in --data")
    disk.replace_file(path, disk.to_jsonl(rows))
    return rows


# ------------------------------------------------------------------------------------ statistics


def pass_at_k(n: int, c: int, k: int) -> float:
    """Chance that k of n samples, drawn without replacement, hold at least one of the c right ones.

    n 4, c 1, k 2 -> 1 - C(3, 2) / C(4, 2) = 0.5.
    """
    if not 0 <= c <= n or not 1 <= k <= n:
        raise ValueError(f"pass@{k} of {n} samples, {c} right: expected 1 <= k <= n and c <= n")
    return 1.0 - math.comb(n - c, k) / math.comb(n, k)


def majority(votes: list[str | None], right: list[bool]) -> float:
    """1 if the most common answer is right; in a tie, the share that is. None does not vote.

    votes [a a b b c], right [1 1 0 0 1] -> 0.5.
    """
    counts = Counter(vote for vote in votes if vote is not None)
    tied = [vote for vote, n in counts.items() if n == max(counts.values())]
    return sum(right[votes.index(vote)] for vote in tied) / max(1, len(tied))


def bootstrap(values: Iterable[float]) -> tuple[float, float]:
    """Percentile interval of a mean over problems (Efron 1979); deterministic."""
    values, rng = np.asarray(values, float), np.random.default_rng(0)
    n = len(values)
    means = [values[rng.integers(0, n, n)].mean() for _ in range(N_RESAMPLES)]
    low, high = np.percentile(means, [2.5, 97.5])
    return float(low), float(high)


def is_binary(name: str, values: np.ndarray) -> bool:
    return not name.startswith(("length", "reward")) and bool(np.isin(values, (0.0, 1.0)).all())


def mcnemar(wins: int, losses: int) -> float:
    """Exact two-sided p-value of McNemar's test: are wins and losses equally likely?"""
    n, tail = wins + losses, min(wins, losses)
    return min(1.0, 2 * sum(math.comb(n, i) for i in range(tail + 1)) / 2**n)


def rates(rows: list[dict]) -> dict[str, float]:
    """The value of one problem in each mean; no pass@ without a right answer."""
    greedy, sampled = ([r for r in rows if r["mode"] == m] for m in ("greedy", "sampled"))
    graded, mean = rows[0]["correct"] is not None, lambda values: float(np.mean(values))
    out, k = {}, len(sampled)
    groups = [("", greedy or sampled)] + [("_sampled", sampled)] * bool(greedy and sampled)
    for tags in ("", "_tags") if graded else ():
        right = lambda group, tags=tags: [bool(r["correct"] and (r["format"] or not tags))
                                          for r in group]
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
        scored = [r for r in group if "reward" in r and isinstance(r.get("rewards"), dict)]
        out |= measure_scores(scored, suffix)
    return out


def measure_scores(rows: list[dict], suffix: str) -> dict[str, float]:
    """Means of --rewards over the completions that have them; missing ones are left out, not 0."""
    if not rows:
        return {}
    columns = {"reward": [r["reward"] for r in rows]}
    for name in dict.fromkeys(name for r in rows for name in r["rewards"]):
        columns[f"reward_{name}"] = [r["rewards"].get(name) for r in rows]
    there = {name: [x for x in column if isinstance(x, int | float)]
             for name, column in columns.items()}
    out = {f"{name}{suffix}": float(np.mean(column)) for name, column in there.items() if column}
    return out | {f"missing{suffix}": float(np.mean([r["reward"] is None for r in rows]))}


def by_problem(rows: Iterable[dict]) -> dict[str, tuple[str, dict[str, float]]]:
    """id of a problem -> (its domain, its value in each mean)."""
    groups = {}
    for row in rows:
        groups.setdefault(row["id"], []).append(row)
    return {id: (group[0]["domain"], rates(group)) for id, group in groups.items()}


def summarize(rows: list[dict]) -> dict:
    """Means over problems with their intervals, for all problems and for each domain."""
    everything, domains = [], {}
    for domain, measured in by_problem(rows).values():
        everything.append(measured)
        domains.setdefault(domain, []).append(measured)
    parts = {domain: means(domains[domain]) for domain in sorted(domains)}
    return {"pass@1": None} | means(everything) | {"domains": parts}


def names_of(measured: list[dict[str, float]]) -> list[str]:
    """All metrics, in the order of the problem that has most: one with an answer to check."""
    return list(dict.fromkeys(itertools.chain(max(measured, key=len), *measured)))


def means(measured: list[dict[str, float]]) -> dict:
    out = {"n": len(measured), "n_graded": sum("pass@1" in m for m in measured), "intervals": {}}
    for name in names_of(measured):
        values = np.array([m[name] for m in measured if name in m])
        out[name] = float(values.mean())
        rate = wilson(int(values.sum()), len(values)) if is_binary(name, values) else None
        out["intervals"][name] = rate or bootstrap(values)
    return out


def compare(rows: list[dict], others: list[dict]) -> dict:
    """Compares this run with another on shared problems; positive differences: this is higher."""
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


def scale(name: str) -> int:
    """Rates are shown in percent, lengths in tokens, rewards as they are."""
    return 1 if name.startswith(("length", "reward")) else 100


def digits(name: str) -> int:
    return 3 if name.startswith("reward") else 1


def summary(results: dict) -> str:
    """What a person wants to know, a line each, with 95 % intervals."""
    votes = [name for name in results if re.fullmatch(r"maj@\d+", name)]
    sampled = "pass@1_sampled" if "pass@1_sampled" in results else "pass@1"
    greedy = [("greedy", "pass@1")] * (sampled != "pass@1" or not votes)
    named = [*greedy, ("sampled", sampled)] if votes else greedy
    named += [(name, name) for name in votes[-1:]]
    cut = [("cut", "stop_length")] * (results.get("stop_length", 0) > 0)  # at --max-new
    named += [("format", "format"), ("length", "length"), *cut, ("reward", "reward")]
    lines = [f"{results['n']} problems, {results['n_graded']} with an answer to check; "
             "95 % intervals in brackets"]
    for label, name in named:
        if results.get(name) is not None:
            value, *ends = (scale(name) * x for x in (results[name], *results["intervals"][name]))
            unit = {1: "tokens" if name == "length" else "", 100: "%"}[scale(name)]
            low, high = (f"{x:.{digits(name)}f}" for x in ends)
            lines.append(f"  {label:8}{value:7.{digits(name)}f} {unit:7}[{low}, {high}]".rstrip())
    return "\n".join(lines)


def sentence(pairs: dict) -> str:
    """Whether the model changed: its accuracy, or its format where no answer can be checked."""
    name = next((name for name in ("pass@1", "format") if name in pairs), None)
    if name is None:
        return f"compared on {pairs['n']} problems: nothing to compare"
    pair, what = pairs[name], {"pass@1": "Accuracy", "format": "Format"}[name]
    low, high = pair["interval"]
    if "p" in pair:
        changed, why = pair["p"] < 0.05, f", McNemar p {pair['p']:.2g}"
    else:
        changed, why = low > 0 or high < 0, ""
    verb = "is unchanged as far as one can tell" if not changed else (
        "rose" if pair["difference"] > 0 else "fell")
    return (f"{what} {verb}: {100 * pair['other']:.1f} % -> {100 * pair['this']:.1f} %, "
            f"{100 * pair['difference']:+.1f} points [{100 * low:+.1f}, {100 * high:+.1f}] on "
            f"{pair['n']} problems{why}.")


def table(results: dict) -> str:
    """All results as text: rates in percent, lengths in tokens, rewards as they are."""

    def cell(part, name):
        if name not in part["intervals"]:
            return f"{'-':>6}{'':18}"
        value, (low, high) = part[name], part["intervals"][name]
        interval = ", ".join(f"{scale(name) * x:.{digits(name)}f}" for x in (low, high))
        return f"{scale(name) * value:6.{digits(name)}f}  {f'[{interval}]':16}"

    lines = [f"{results['n']} problems, {results['n_graded']} with an answer to check; percent and "
             "95 % interval: Wilson, or bootstrap if samples are averaged"]
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


def begin_folder(config, kind: str, start: hub.Start, tok: data.Tokenizer,
                 problems: list[Problem]) -> None:
    """Writes config.json; refuses a folder of other weights, prompts or sampling."""
    out, prompts = Path(config.out), disk.checksum((p.id, p.prompt) for p in problems)
    facts = stage.checksums(start, tok) | {"checksum of the prompts": prompts}
    if (out / "samples.jsonl").exists():
        runs.check_unchanged(out, config, facts, MAY_CHANGE)
    with disk.writing(out):
        runs.write_config(out, config, facts, kind)


@terminal.one_line
def main(config: Config) -> dict:
    """Runs the evaluation, writes its folder, prints the table and returns the results."""
    terminal.check_versions()
    terminal.compilation_cache()
    config = resolve(config)
    settings.show_config(config)
    others = None
    if config.compare is not None:
        file = hub.output(config.compare) / "samples.jsonl"
        if not file.with_name("results.json").is_file() or config.compare == config.out:
            raise ValueError(f"--compare {config.compare}: expected the folder of another, "
                             "finished evaluation, with results.json and samples.jsonl")
        others = disk.good_rows(file, **COMPLETION)

    start = hub.find_start(config.model, config.weights, config.adapter)
    tok = data.Tokenizer(config.tokenizer or start.weights)
    problems, _ = rollouts.load_problems(config, tok)
    if others is not None and not {p.id for p in problems} & {row["id"] for row in others}:
        raise ValueError(f"--compare {config.compare}: has none of these {len(problems)} problems")
    out = Path(config.out)
    runs.claim(out, "eval")
    with disk.lock(out):
        begin_folder(config, "eval", start, tok, problems)
        rows = answer(config, problems, tok, start, config.greedy)
        if config.rewards or config.reward_file:
            for row, scored in zip(rows, score(problems, rows, tok, config), strict=True):
                row |= {"reward": scored.total, "rewards": scored.parts, "errors": scored.errors}
        results = summarize(rows)
        if others is not None:
            results["compare"] = compare(rows, others)
        with disk.writing(out):
            disk.replace_file(out / "samples.jsonl", disk.to_jsonl(rows))
            disk.write_json(out / "results.json", results)
    # the names of domains are text of the rows
    print(terminal.clean(table(results)) if config.all else summary(results))
    if others is not None:
        print(textwrap.fill(sentence(results["compare"]), 79))
    return results


if __name__ == "__main__":
    import commandline

    terminal.command(lambda: main(commandline.cli(Config, description=__doc__)))
