"""Prompts -> scored samples: the problems of a step, their completions and scores, packed rows.

    problems, bad = rollouts.load_problems(config, tok)
    order = rollouts.Order(problems, curriculum="", seed=0)
    with rollouts.Scorer(config, problems, mesh) as scorer:
        groups, seconds = rollouts.sample_groups(...)      # one group of G samples for each prompt
    batch, n_micro, spans = rollouts.pack(samples, weights, config, mesh.size)

1. Threads score each completion as soon as it is finished, while the devices decode others.
2. Notes 3, 5 and 6 of train_grpo.py explain packed rows, missing rewards and token ids.
"""

import dataclasses
import functools
import hashlib
import json
import math
import queue
import re
import threading
import time
from collections import Counter
from concurrent.futures import Future, wait
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import data
import gemma
import hosts
import rewards
import runs
import settings
import stage
import terminal
from sampler import Rollout, Sampler

# ----------------------------------------------------------------------------------------- settings


@dataclasses.dataclass(frozen=True)
class Settings(settings.Judge, settings.Sampling, settings.Training):
    """Flags of the scripts that learn from their own completions; each adds its algorithm's."""

    # data
    curriculum: str = ""
    """Order by the rows' "difficulty": ordered (easy first), or phases START:LOW-HIGH, where START
    is a share of the run, as in 0:1-2,0.3:1-3,0.6:1-5; default: shuffled."""

    # rewards
    rewards: str | None = None
    """Weighted sum, as in format:1,answer:3, or a preset: tunix, ideae, pinocchio, grar."""
    overlong_buffer: float = 0.2
    """The reward "overlong" falls from 0 to -1 over this last share of --max-new (DAPO)."""
    max_missing: float = 0.5
    """Save and stop if more than this share of a step's completions has no reward."""

    # sampling
    prompts: int | None = None
    """Prompts (groups) per step."""
    group: int = 8
    """Completions per prompt, G."""
    max_drift: float = 0.5
    """Stop if sampler and trainer log-probs differ by more than this on average."""

    # optimisation
    pack_length: int | None = None
    """Tokens per packed row of the update."""

    # the run
    show: int = 2
    """Completions printed every --show-every steps, with their rewards."""
    show_every: int = 10
    """Steps between printed completions."""
    log_samples: int = 8
    """Completions per step kept in samples.jsonl, besides those whose reward failed."""


# -------------------------------------------------------------------------------------- problems


@dataclasses.dataclass(frozen=True)
class Problem:
    """One row, ready to be answered and graded."""

    id: str  # hash of question and answer, not of the system text, so that runs can be paired
    prompt: tuple[int, ...]  # token ids
    question: str  # as text
    gold: str | None  # the right answer; None: nothing to check
    kind: str  # how to check it, one of rewards.KINDS
    choices: tuple[str, ...]
    domain: str
    trace: str = ""  # the row's own reasoning
    chat: list[dict] = dataclasses.field(default_factory=list, compare=False)  # its messages
    fields: dict = dataclasses.field(default_factory=dict, compare=False)  # of the row itself


def read_problem(row: dict, tok: data.Tokenizer, system: str = "") -> Problem:
    """Parses a row of any known shape; its prompt is the one that SFT on the row would use."""
    chat, completion, gold, choices, fields = data.parse_row(row)
    trace, answer, strict = rewards.parse(completion or "")
    if gold is None and strict:  # take it from the completion's tags
        gold = answer
    if (kind := fields.get("kind", "auto")) not in rewards.KINDS:
        raise ValueError(f"kind {kind!r}: expected one of {', '.join(rewards.KINDS)}")
    if gold is not None and kind == "auto":
        kind = rewards.kind_of(gold, choices)
    identity = json.dumps([chat, gold, choices], sort_keys=True)
    return Problem(
        id=hashlib.sha256(identity.encode()).hexdigest()[:16],
        prompt=tuple(tok.chat(data.with_system(chat, system))),
        question=chat[-1]["content"], gold=gold, kind=kind, choices=choices,
        domain=str(fields.get("task_type") or fields.get("domain") or ""),
        trace=trace or "", chat=chat, fields=fields,
    )


def problem_reader(config, tok: data.Tokenizer):
    """read_problem with a script's --system, and with --max-prompt as the longest prompt."""

    def read(row: dict) -> Problem:
        problem = read_problem(row, tok, config.system)
        if config.max_prompt and len(problem.prompt) > config.max_prompt:
            raise data.TooLong(len(problem.prompt), config.max_prompt, "--max-prompt")
        return problem

    return read


def numbered(problems: list[Problem]) -> list[Problem]:
    """Makes ids unique: the second problem with an id gets id-2."""
    seen, out = Counter(), []
    for problem in problems:
        seen[problem.id] += 1
        n = seen[problem.id]
        out.append(dataclasses.replace(problem, id=f"{problem.id}-{n}") if n > 1 else problem)
    return out


def load_problems(config, tok: data.Tokenizer) -> tuple[list[Problem], list[str]]:
    """The problems of a script's --data, and the errors of the rows left out."""
    sources, bad = data.load(config.data, problem_reader(config, tok), rows=config.rows,
                             skip_bad_rows=config.skip_bad_rows, what="problems",
                             columns=config.columns)
    return numbered([problem for source in sources for problem in source]), bad


def load_split(config, read) -> tuple[list[Problem], list[Problem]]:
    """(problems to learn from, held-out ones) of --data and --eval-data; read: problem_reader()."""
    sources, held_out = data.load_split(config, read, rows=config.rows)
    return numbered([problem for source in sources for problem in source]), numbered(held_out)


def check(problem: Problem, completion: str) -> tuple[str | None, bool | None, bool]:
    """Grades a completion -> (its answer, whether that is right, whether the format is strict).

    Right is None where the problem has no answer to check.
    """
    _, answer, strict = rewards.parse(completion)
    if problem.gold is None:
        return answer, None, strict
    right = rewards.correct(answer, problem.gold, problem.kind, problem.choices)
    return answer, right, strict


def read_curriculum(curriculum: str) -> list[tuple[float, float, float]]:
    """The phases (start, lowest difficulty, highest) of --curriculum; none if ordered or empty."""
    phases = []
    for part in curriculum.split(",") if curriculum not in ("", "ordered") else ():
        try:
            start, _, span = part.partition(":")
            low, _, high = span.partition("-")
            phases.append((float(start), float(low), float(high or low)))
        except ValueError:
            raise ValueError(f"--curriculum {part!r}: expected ordered, or a share of the run and "
                             "difficulties, as 0.3:1-2") from None
    starts = [start for start, _, _ in phases]
    if phases and (starts[0] != 0 or starts != sorted(starts) or starts[-1] >= 1):
        raise ValueError(f"--curriculum {curriculum}: the phases must start at 0, go up and stay "
                         "below 1")
    return phases


class Order:
    """Chooses the problems of a step from (seed, number drawn so far, progress)."""

    def __init__(self, problems: list[Problem], curriculum: str, seed: int):
        self.seed, self.ordered = seed, curriculum == "ordered"
        self.phases = [(0.0, list(range(len(problems))))]
        if not curriculum:
            return
        difficulty = [p.fields.get("difficulty") for p in problems]
        for p, d in zip(problems, difficulty, strict=True):
            if not isinstance(d, int | float) or not abs(d) < 1e15:
                raise ValueError(f"--curriculum: expected a number as difficulty, found {d!r} in "
                                 f"the row {p.question!r:.60}")
        if self.ordered:
            order = np.random.default_rng((seed, 0, 0)).permutation(len(problems))
            self.phases = [(0.0, sorted(order.tolist(), key=lambda i: difficulty[i]))]
            return
        self.phases = []
        for start, low, high in read_curriculum(curriculum):
            rows = [i for i, d in enumerate(difficulty) if low <= d <= high]
            if not rows:
                raise ValueError(f"--curriculum {start:g}:{low:g}-{high:g}: no problem has such a "
                                 "difficulty")
            self.phases.append((start, rows))

    def take(self, drawn: int, n: int, p: float, in_step: int = 0) -> list[int]:
        """Indices of the next n problems at progress p.

        drawn: problems taken before this call; in_step: how many of them in this step.
        """
        phase = max(i for i, (start, _) in enumerate(self.phases) if start <= p)
        rows = self.phases[phase][1]
        if self.ordered:
            first = int(p * len(rows))  # then the harder ones, and after the last the easier
            walk = rows[first:] + rows[:first][::-1]
            return [walk[(in_step + j) % len(rows)] for j in range(n)]
        taken = []
        for j in range(drawn, drawn + n):
            lap, at = divmod(j, len(rows))
            order = np.random.default_rng((self.seed, phase, lap)).permutation(len(rows))
            taken.append(rows[order[at]])
        return taken


# --------------------------------------------------------------------------------------- scoring


@dataclasses.dataclass
class Sample:
    """One completion with its score."""

    problem: Problem
    group: int  # index among the step's groups
    rollout: Rollout
    text: str
    right: bool | None  # whether the answer is right; None: nothing to check
    strict: bool  # whether the format is strict
    scored: rewards.Scored
    advantage: float = 0.0

    def row(self) -> dict:
        """The sample as a line of samples.jsonl."""
        return {
            "id": self.problem.id, "prompt": self.problem.question, "completion": self.text,
            "gold": self.problem.gold, "correct": self.right, "format": self.strict,
            "reward": self.scored.total, "advantage": self.advantage,
            "rewards": self.scored.parts, "errors": self.scored.errors, "group": self.group,
            "n_tokens": len(self.rollout.ids), "stop": self.rollout.stop,
        }


def reward_row(problem: Problem, n_tokens: int, stop: str, config, p: float = 0.0) -> dict:
    """The `row` that a reward function gets: the data's row plus what the trainer adds."""
    overlong, chat = getattr(config, "overlong_buffer", 0.2), problem.chat
    if chat and chat[0]["role"] != "system" and getattr(config, "system", None):
        chat = [{"role": "system", "content": config.system}, *chat]
    return problem.fields | {
        "question": problem.question, "conversation": chat, "answer": problem.gold,
        "kind": problem.kind, "choices": problem.choices, "n_tokens": n_tokens, "stop": stop,
        "max_new": config.max_new, "overlong_buffer": overlong * config.max_new, "progress": p,
    } | ({"reasoning": problem.trace} if problem.trace else {})


def check_settings(config) -> None:
    """Raises ValueError for settings that cannot work, before anything is loaded."""
    if not 0 < config.temperature < math.inf:  # chat.py and eval.py take 0
        raise ValueError(f"--temperature {config.temperature}: expected more than 0, as log-probs "
                         "are divided by it")
    if config.pack_length < (longest := config.max_prompt + config.max_new):
        raise ValueError(f"--pack-length {config.pack_length}: expected --max-prompt + --max-new = "
                         f"{longest} or more")
    read_curriculum(config.curriculum)


def check_rewards(config, trains: bool = False) -> None:
    """Raises ValueError for --rewards, --reward-file and --judge that do not match.

    trains: whether the script gives sample_groups the policy's log-probs.
    """
    mix = rewards.read_mix(config.rewards, config.reward_file)
    if "prob" in mix.weights and not trains:
        raise ValueError("--rewards prob: only train_grpo.py computes it")
    judged = [name for name in mix.weights if name in rewards.JUDGED]
    if judged and config.judge is None:
        raise ValueError(f"--rewards {judged[0]}: needs --judge")
    if {*judged} - {"judge"} and config.judge_style != "pinocchio":
        raise ValueError(f"--rewards {judged[0]}: needs --judge-style pinocchio")
    if config.judge is not None:
        import judge  # here: most runs have none

        judge.check(config)
        if not judged:
            raise ValueError(f"--judge {config.judge}: needs --rewards, as in judge:1")


class Scorer:
    """Scores completions by --rewards and --judge, in threads.

    A reward that never returns is missing after --reward-timeout seconds. The threads are daemons,
    so such a reward cannot keep the program from exiting either.
    """

    def __init__(self, config, problems: list[Problem], mesh: Mesh | None = None):
        self.config, self.mesh, self.judge = config, mesh, None
        self.mix = rewards.read_mix(config.rewards, config.reward_file)
        traces = [p.trace for p in problems if p.trace]
        by_model = {n: rewards.Reward(functools.partial(verdict, n)) for n in rewards.JUDGED}
        by_model["prob"] = rewards.Reward(lambda _, row: row["prob"].result(), needs="answer")
        self.functions = rewards.prepare(self.mix, traces, config.reward_file, by_model)
        if config.judge:  # one that gives what --rewards names, see check_rewards
            import judge  # here: most runs have none

            cache = Path(config.out) / "judge" / "replies.jsonl"
            self.judge = judge.open(config, mesh, cache=cache)
        self.verdicts: list[Future] = []  # asked of the judge since the last collect()
        self.tasks, self.progress_s = queue.SimpleQueue(), 0.0
        for _ in range(config.reward_threads):
            self._start_thread()

    def _start_thread(self) -> None:
        threading.Thread(target=self._work, daemon=True).start()

    def _work(self) -> None:
        while (task := self.tasks.get()) is not None:
            future, completion, row = task
            if not future.set_running_or_notify_cancel():
                continue
            try:
                scored = rewards.score(self.mix, self.functions, completion, row)
            except BaseException as e:  # a reward that fails costs its own sample only
                scored = rewards.Scored(None, {}, {"total": repr(e)})
            self.progress_s = time.monotonic()
            future.set_result(scored)

    def submit(self, completion: str, row: dict, place: tuple) -> Future:
        """Queues a completion -> future of rewards.Scored.

        place: (its question, its index in the group, the group's size).
        """
        if self.judge is not None:
            row["verdict"] = self.judge.submit(completion, row, place)
            self.verdicts.append(row["verdict"])
            self.judge.pump()
        future = Future()
        self.tasks.put((future, completion, row))
        return future

    def collect(self, futures: list[Future]) -> list[rewards.Scored]:
        """Waits for these futures -> their scores, in order.

        When no score has arrived for --reward-timeout seconds, those still pending are missing. The
        judge has its own timeouts.
        """
        if self.judge is not None:
            self.judge.pump(flush=True)
            wait(self.verdicts)
            self.verdicts.clear()
        self.progress_s, scores = time.monotonic(), []
        for future in futures:
            while not future.done():
                left = self.config.reward_timeout - (time.monotonic() - self.progress_s)
                if left <= 0:
                    break
                wait([future], left)
            if future.done():
                scores.append(future.result())
                continue
            if not future.cancel() and not future.done():
                self._start_thread()  # replaces the stuck one
            why = f"no score within --reward-timeout {self.config.reward_timeout:g} s"
            scores.append(rewards.Scored(None, {}, {"total": why}))
        return scores

    def stats(self) -> dict[str, float]:
        """The judge's metrics since the last call, over all hosts."""
        if self.judge is None:
            return {}
        import judge

        return judge.total(hosts.everyone(self.judge.stats()))

    def trouble(self, scores: list[rewards.Scored]) -> str | None:
        """Why the run should save and stop (scores or judgements are missing), or None."""
        missing = [s for s in scores if s.total is None]
        if len(missing) > self.config.max_missing * len(scores):
            reasons = Counter(next(iter(s.errors.values()), "no reason") for s in missing)
            return (f"{len(missing)} of {len(scores)} completions have no reward, more than "
                    f"--max-missing {self.config.max_missing:g}; {reasons.most_common(1)[0][0]}")
        troubles = hosts.everyone(self.judge.trouble()) if self.judge else []
        return next(filter(None, troubles), None)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for _ in range(self.config.reward_threads):
            self.tasks.put(None)
        if self.judge is not None:
            self.judge.close()


def verdict(name: str, completion: str, row: dict) -> float:
    """Waits for the judge's score of this name; raises if the judgement failed."""
    parts = row["verdict"].result()
    if parts[name] is None:
        raise RuntimeError(parts["judge_error"])
    return parts[name]


def answer_probs(problems: list[Problem], texts_QG: list[list[str]], tok: data.Tokenizer, config,
                 mesh: Mesh, logps) -> list[list[float | None]]:
    """The policy's mean probability of the right answer's tokens after each trace (RLPR).

    arXiv 2506.18254. The right answer replaces what follows the completion's first <answer>. The
    result is 0 where there is no <answer>, or no room for the right answer within --max-new, and
    None where no right answer is known. Probabilities are at --temperature. RLPR also subtracts the
    probability without a trace: it is the same for a whole group, so the group's mean removes it.

    logps: function of (arrays of pack, micro-batches used) -> the policy's log-probs, same shape.
    """
    probs_QG = [[None if q.gold is None else 0.0] * len(texts)
                for q, texts in zip(problems, texts_QG, strict=True)]
    samples, places = [], []
    for q, texts in enumerate(texts_QG):
        gold = tok.encode((problems[q].gold or "").strip())
        for g, text in enumerate(texts):
            opened = re.search(r"(?i)<answer>\s*", text)
            ids = tok.encode(text[: opened.end()]) + gold if opened else []
            if gold and ids and len(ids) <= config.max_new:
                rollout = Rollout(q, g, np.array(ids, np.int32), np.zeros(len(ids)), "stop")
                samples.append(Sample(problems[q], q, rollout, text, None, False,
                                      rewards.Scored(None, {}, {})))
                places.append((q, g, len(gold)))
    if not samples:
        return probs_QG
    batch, n_micro, spans = pack(samples, [1.0] * len(samples), config, mesh.size, True)
    mask_RT = batch["mask"].reshape(-1, config.pack_length)
    for i, r, span in spans:  # keep only the answer: no other token needs logits
        mask_RT[r, span.start : span.stop - places[i][2]] = 0.0
    batch = stage.put(batch, mesh, P(None, "data"))
    logp_RT = np.asarray(hosts.whole(logps(batch, np.int32(n_micro)))).reshape(mask_RT.shape)
    for i, r, span in spans:
        q, g, n = places[i]
        probs_QG[q][g] = float(np.exp(logp_RT[r, span.stop - n : span.stop]).mean())
    return probs_QG


# -------------------------------------------------------------------------------------- sampling


def token_rules(tok: data.Tokenizer) -> dict:
    """Arguments of Sampler.sample from a tokenizer: ids that stop, ids that are never sampled."""
    return {"stop": tok.stop_ids, "forbidden": tok.forbidden_ids, "vocab_size": tok.vocab_size}


def make_sampler(cfg: gemma.Config, config, mesh: Mesh) -> Sampler:
    """The Sampler of a stage that learns from its own completions."""
    in_place = stage.rollouts_are_sharded(cfg, config, mesh)
    return Sampler(cfg, mesh, slots=config.slots, max_prompt=config.max_prompt,
                   max_new=config.max_new, cached_prompts=min(16, max(4, config.slots // 4)),
                   dtype=jnp.dtype(config.dtype), shard=in_place)


def programs(cfg: gemma.Config, config, mesh: Mesh, trained, fixed) -> dict:
    """The programs of sampling and of a judge: name -> (jitted function, argument shapes).

    trained, fixed: ShapeDtypeStructs of a stage's weights.
    """
    cast = functools.partial(stage.forward_weights, dtype=jnp.dtype(config.dtype))
    out = make_sampler(cfg, config, mesh).programs(*jax.eval_shape(cast, trained, fixed))
    if config.judge:
        import judge  # here: most runs have none

        out |= judge.programs(config, mesh)
    return out


def sample_groups(sampler: Sampler, weights: tuple, tok: data.Tokenizer, problems: list[Problem],
                  scorer: Scorer, config, *, step: int, first: int, p: float,
                  logps=None) -> tuple[list[list[Sample]], dict[str, float]]:
    """Samples and scores --group completions per problem -> (one group per problem, seconds).

    weights: (params, adapter). first: number of prompts that this step has sampled already; a
    rollout's noise depends on (seed, step, its prompt's index in the step, its index in the group).
    logps: the policy's log-probs, for the reward `prob`, see answer_probs.
    """
    began, futures, finished, probs = time.perf_counter(), {}, {}, {}
    mine = hosts.share(range(len(problems)))
    params, adapter = weights
    completions = sampler.sample(
        params, {first + i: problems[i].prompt for i in mine}, config.group, lora=adapter,
        seed=config.seed, step=step, temperature=config.temperature, top_k=config.top_k,
        top_p=config.top_p, min_p=config.min_p, repetition=config.repetition, **token_rules(tok))
    for r in completions:
        problem, text = problems[r.prompt - first], tok.decode(r.ids)
        row = reward_row(problem, len(r.ids), r.stop, config, p)
        if "prob" in scorer.mix.weights:
            row["prob"] = probs[r.prompt, r.index] = Future()
        futures[r.prompt, r.index] = scorer.submit(text, row, (r.prompt, r.index, config.group))
        finished[r.prompt, r.index] = r, text
    rollout_s = time.perf_counter() - began
    if "prob" in scorer.mix.weights:  # one forward pass over the completions of all hosts
        texts = hosts.join([[finished[first + i, g][1] for g in range(config.group)] for i in mine])
        found = answer_probs(problems, texts, tok, config, scorer.mesh, logps)
        for (q, g), future in probs.items():
            future.set_result(found[q - first][g])
    keys, as_json = sorted(futures), {}  # as_json: for the other hosts
    for key, scored in zip(keys, scorer.collect([futures[key] for key in keys]), strict=True):
        r, text = finished[key]
        as_json[key] = r.ids.tolist(), r.logps.tolist(), r.stop, text, scored
    rows = hosts.join([[as_json[first + i, g] for g in range(config.group)] for i in mine])
    groups = [[_sample(problems[i], first + i, g, *values) for g, values in enumerate(group)]
              for i, group in enumerate(rows)]
    reward_s = time.perf_counter() - began - rollout_s
    return groups, {"rollout_s": rollout_s, "reward_s": reward_s}


def _sample(problem: Problem, group: int, index: int, ids: list[int], logps: list[float], stop: str,
            text: str, scored: list) -> Sample:
    rollout = Rollout(group, index, np.array(ids, np.int32), np.array(logps, np.float32), stop)
    _, right, strict = check(problem, text)
    return Sample(problem, group, rollout, text, right, strict, rewards.Scored(*scored))


def answer(sampler: Sampler, weights: tuple, tok: data.Tokenizer,
           problems: list[Problem]) -> list[dict]:
    """Answers held-out problems greedily -> one row of samples.jsonl per problem."""
    params, adapter = weights
    mine = hosts.share(range(len(problems)))
    rows = {}
    for r in sampler.sample(params, {i: problems[i].prompt for i in mine}, lora=adapter,
                            temperature=0.0, **token_rules(tok)):
        problem, text = problems[r.prompt], tok.decode(r.ids)
        _, right, strict = check(problem, text)
        rows[r.prompt] = {"prompt": problem.question, "completion": text, "gold": problem.gold,
                          "correct": right, "format": strict, "n_tokens": len(r.ids),
                          "stop": r.stop}
    return hosts.join([rows[i] for i in mine])


def evaluate(sampler: Sampler, weights: tuple, tok: data.Tokenizer, problems: list[Problem],
             step: int, run: runs.Run) -> float:
    """Logs and prints held-out greedy accuracy and format -> the checkpoint's score."""
    with run.budget.timed("eval"):
        metrics = accuracy(answer(sampler, weights, tok, problems))
    run.log(step, metrics)
    return metrics.get("eval_accuracy", metrics["eval_format"])


def accuracy(rows: list[dict]) -> dict[str, float]:
    """The metrics of these answers; no accuracy if no row has an answer to check."""
    graded = [row["correct"] for row in rows if row["correct"] is not None]
    metrics = {"eval_format": float(np.mean([row["format"] for row in rows])),
               "eval_length": float(np.mean([row["n_tokens"] for row in rows]))}
    if graded:
        low, high = wilson(sum(graded), len(graded))
        metrics = {"eval_accuracy": float(np.mean(graded)), "eval_accuracy_low": low,
                   "eval_accuracy_high": high} | metrics
    return metrics


Z = 1.959963984540054  # 95 % of a normal distribution lie within Z standard deviations


def wilson(c: int, n: int) -> tuple[float, float]:
    """Wilson's 95 % interval for a rate of c out of n (JASA 22, 1927)."""
    middle, half = (c + Z**2 / 2) / (n + Z**2), Z * math.sqrt(c * (n - c) / n + Z**2 / 4)
    half /= n + Z**2
    return max(0.0, middle - half), min(1.0, middle + half)


# --------------------------------------------------------------------------------------- packing

INTS = ("tokens", "segments", "parents", "positions", "source")  # arrays [.., B, T] of an update
FLOATS = ("mask", "weight", "advantage", "sampler", "old", "ref")


def packed_size(config, n_devices: int) -> tuple[int, int]:
    """(maximum number of micro-batches, rows of each over all devices) of an update.

    A new row is opened only if no other has room, so any two rows together hold more tokens than
    fit in one, and there are at most 2 total / pack_length + 1 rows.
    """
    n_samples = config.prompts * config.group
    total = n_samples * (config.max_prompt + config.max_new)
    n_rows = min(n_samples, 2 * total // config.pack_length + 1)
    rows = config.micro_rows * n_devices
    return -(-n_rows // rows), rows


def packed_shapes(config, mesh: Mesh) -> dict[str, jax.ShapeDtypeStruct]:
    """Shapes of the arrays of `pack`, on the mesh."""
    n_max, rows = packed_size(config, mesh.size)
    array = functools.partial(jax.ShapeDtypeStruct, (n_max, rows, config.pack_length),
                              sharding=NamedSharding(mesh, P(None, "data")))
    return {k: array(np.int32 if k in INTS else np.float32) for k in INTS + FLOATS}


def pack(samples: list[Sample], weights: list[float], config, n_devices: int,
         all_advantages: bool = False) -> tuple[dict, int, list]:
    """Packs samples -> (arrays [max. micro-batches, rows, pack_length], micro-batches used, spans).

    spans: (index of the sample, flat row, slice) of each completion. Samples without a gradient are
    left out: those of weight 0, and without a KL term or all_advantages those of advantage 0.
    Prompt [p p], completions [c c] and [d] with advantages 2 and -1, log-probs l and m:
    segments 1 1 2 2 3, parents 1 1 1 1 1, source 0 0 1 2 1 (the token that predicts this one),
    mask 0 0 1 1 1, advantage 0 0 2 2 -1, sampler 0 0 l l m.
    """
    n_max, rows = packed_size(config, n_devices)
    groups = {}  # prompt -> its samples
    for i, s in enumerate(samples):
        if weights[i] and (s.advantage or all_advantages or config.kl_coef):
            groups.setdefault(s.problem.prompt, []).append(i)
    prompts, live = list(groups), list(groups.values())
    lengths = [[len(samples[i].rollout.ids) for i in group] for group in live]
    packed = data.pack([len(p) for p in prompts], lengths, config.pack_length)
    shape = n_max * rows, config.pack_length
    batch = {k: np.zeros(shape, np.int32) for k in INTS}
    batch |= {k: np.zeros(shape, np.float32) for k in FLOATS}
    spans, n_micro = [], -(-len(packed) // rows)
    for b, parts in enumerate(packed):
        # Row b goes to micro-batch b % n_micro, so that empty rows are not all in the last one.
        r, at, segment = (b % n_micro) * rows + b // n_micro, 0, 0

        def put(ids, position, r=r, **values):
            """Appends a segment whose first token has the given position."""
            nonlocal at, segment
            span, segment = slice(at, at + len(ids)), segment + 1
            values |= {"tokens": ids, "segments": segment,
                       "positions": np.arange(position, position + len(ids))}
            for k, v in values.items():
                batch[k][r, span] = v
            at = span.stop
            return span

        for q, here in parts:
            prompt = put(prompts[q], 0)
            batch["parents"][r, prompt] = parent = segment
            for i in (live[q][j] for j in here):
                s = samples[i]
                span = put(s.rollout.ids, len(prompts[q]), parents=parent, mask=1.0,
                           weight=weights[i], advantage=s.advantage, sampler=s.rollout.logps)
                batch["source"][r, span] = np.arange(span.start - 1, span.stop - 1)
                batch["source"][r, span.start] = prompt.stop - 1
                spans.append((i, r, span))
    return {k: v.reshape(n_max, rows, -1) for k, v in batch.items()}, n_micro, spans


# --------------------------------------------------------------------------------------- metrics


def summarize(groups: list[list[Sample]], mix: rewards.Mix) -> dict[str, float]:
    """Metrics of a step's completions, named as in TRL where TRL has them."""
    samples = [s for group in groups for s in group]

    def mean(values, of=np.mean):
        """Applies `of` to the values that are not None; None (no such metric) if all are."""
        present = [v for v in values if v is not None]
        return float(of(present)) if present else None

    spread = lambda x: np.std(x, ddof=1) if len(x) > 1 else 0.0
    std = [mean((s.scored.total for s in group), spread) for group in groups]
    lengths = np.array([len(s.rollout.ids) for s in samples])
    ended = lengths[[s.rollout.stop == "stop" for s in samples]]
    out = {
        "reward": mean(s.scored.total for s in samples),
        "reward_std": mean((s.scored.total for s in samples), spread),
        "frac_reward_zero_std": mean(None if x is None else x < 1e-6 for x in std),
        "frac_reward_missing": mean(s.scored.total is None for s in samples),
        "accuracy": mean(s.right for s in samples),
        "format": mean(s.strict for s in samples),
        "completions/mean_length": lengths.mean(),
        "completions/min_length": lengths.min(),
        "completions/max_length": lengths.max(),
        "completions/mean_terminated_length": ended.mean() if len(ended) else None,
        "completions/clipped_ratio": mean(s.rollout.stop == "length" for s in samples),
        "completions/repetition_ratio": mean(s.rollout.stop == "repetition" for s in samples),
    }
    for name in mix.weights:
        parts = [s.scored.parts[name] for s in samples if name in s.scored.parts]
        out |= {f"rewards/{name}/mean": mean(parts), f"rewards/{name}/std": mean(parts, spread),
                f"rewards/{name}/missing": mean(part is None for part in parts)}
    return {k: float(v) for k, v in out.items() if v is not None}


def drift(samples: list[Sample], spans: list, logp_RT: np.ndarray) -> dict[str, float]:
    """Differences between the trainer's and the sampler's log-probs of the same tokens."""
    differences = [np.abs(logp_RT[r, span] - samples[i].rollout.logps) for i, r, span in spans]
    if not differences:
        return {}
    d = np.concatenate(differences)
    name = "sampling/sampling_logp_difference/"
    return {name + "mean": float(d.mean()), name + "p99": float(np.percentile(d, 99)),
            name + "max": float(d.max())}


def log_step(run: runs.Run, scorer: Scorer, step: int, groups: list[list[Sample]],
             metrics: dict[str, float]) -> None:
    """Logs a step and prints some of its completions; stops if sampler and trainer disagree."""
    config, samples = scorer.config, [s for group in groups for s in group]
    seen = summarize(groups, scorer.mix) if groups else {}
    run.log(step, seen | metrics | scorer.stats())
    failed = [s for s in samples[config.log_samples :] if s.scored.errors]
    run.log_samples(step, [s.row() for s in samples[: config.log_samples] + failed])
    if config.show and (step == 1 or config.show_every and step % config.show_every == 0):
        print_samples(samples[:: max(1, len(samples) // config.show)][: config.show])
    difference = metrics.get("sampling/sampling_logp_difference/mean", 0.0)
    if difference > config.max_drift:
        raise SystemExit(f"step {step}: the log-probs of sampler and trainer differ by "
                         f"{difference:.3g} on average, more than --max-drift {config.max_drift}")


def print_samples(samples: list[Sample]) -> None:
    """Prints completions, coloured by tag, with their rewards."""
    number = lambda x: "missing" if x is None else f"{x:.3g}"
    for s in samples:
        parts = ", ".join(f"{name} {number(part)}" for name, part in s.scored.parts.items())
        terminal.say(terminal.indented(
            f"{s.problem.question}\n{rewards.colour(s.text)}\nreward {number(s.scored.total)} "
            f"({parts}), advantage {s.advantage:+.2f}, {s.rollout.stop}"))
        for name, error in s.scored.errors.items():
            terminal.say(f"  {name}: {error}")
