"""On-policy distillation: the model learns from a teacher's distribution on its own completions.

    loss = mean over completion tokens of D(student, teacher) (arXiv 2306.13649)

D, over the whole vocabulary, is a KL or Jensen-Shannon divergence (--beta, see divergence.py).

    python train_distill.py --teacher-adapter runs/teacher   # the tiny model
    python train_distill.py --model gemma3-1b --teacher gemma3-12b
    python train_distill.py --model gemma3-1b --on-policy 0  # rows' solutions

Deviations from common practice, and why:

1. The teacher decodes nothing: it costs one forward pass. It is sharded over the devices if it is
   large, and its layers are gathered one at a time. Of both models only hidden states exist.
2. As in GKD, no gradient goes through the sampling of the tokens. --rewards adds GRPO's
   - A log p(token), whose gradient does follow the sampling.
3. Rows of the vocabulary behind the tokenizer's last token are left out of both distributions.

What to know: the gradient of the reverse KL at a token is proportional to the student's probability
of it. So --beta 1 sharpens a student, but cannot teach it a token it never gives: a base model took
up the whole format except for its end, <end_of_turn> (LOG.md). Begin with SFT, or with --beta 0.
"""

import dataclasses
import time
from functools import partial
from itertools import zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import data
import divergence
import gemma
import hosts
import hub
import lora
import rewards
import rollouts
import runs
import settings
import stage
import terminal
from rollouts import Problem, Sample
from sampler import Rollout, Sampler

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config(rollouts.Settings):
    """Fields left at None take the model's defaults from DEFAULTS; the result is printed."""

    # distillation
    teacher: str | None = None
    """A Gemma by name or folder, with the student's tokenizer; default: a larger one."""
    teacher_adapter: str | None = None
    """A run or an adapter, as in --adapter, that makes the teacher."""
    teacher_base: Literal["dtype", "int8"] = "dtype"
    """The teacher's weights: bfloat16 (a small teacher: float32), or int8."""
    beta: float = 1.0
    """The divergence: 0 forward KL, 1 reverse KL, Jensen-Shannon's in between."""
    on_policy: float = 1.0
    """Share of prompts that the student answers itself; the others bring their rows' solutions."""
    group: int = 4
    """Completions per prompt that the student answers itself."""
    rewards: str | None = None
    """Add GRPO's advantage by these rewards, as in format:1,answer:3; default: no rewards."""
    reward_coef: float = 1.0
    """Weight of the advantage beside the divergence, with --rewards."""

    # the run
    out: str = "runs/distill"


REAL = dict(
    dtype="bfloat16", data="gsm8k", rows=0, system=data.SYSTEM, prompts=64, max_prompt=512,
    max_new=768, slots=32, lora_rank=64, steps=200, pack_length=2048, micro_rows=1,
    learning_rate=1e-4, remat="auto", eval_every=50, eval_rows=256, save_every=25,
)
DEFAULTS = {
    "tiny": dict(
        teacher="tiny", dtype="float32", data="problems", rows=5000, system="", prompts=32,
        max_prompt=88, max_new=104, slots=64, lora_rank=16, steps=80, pack_length=384,
        micro_rows=1, learning_rate=5e-3, remat="none", eval_every=20, eval_rows=200,
        save_every=20,
    ),
    "gemma2": REAL | dict(teacher="gemma2-9b"),
    "gemma3": REAL | dict(teacher="gemma3-12b"),
    **{name: REAL | dict(teacher=f"{name[:6]}-27b", lora_rank=32, slots=8)
       for name in gemma.LARGE},
}
SHOWN = {  # metrics printed each step; metrics.jsonl has all of them
    "divergence": "divergence {:5.2f}", "accuracy": "right {:4.0%}",
    "completions/mean_length": "length {:4.0f}", "step_s": "{:5.1f} s",
}


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    config = settings.resolve(config, DEFAULTS)
    if not 0 <= config.beta <= 1:
        raise ValueError(f"--beta {config.beta:g}: expected 0 to 1")
    if config.group < (least := 2 if config.rewards else 1):
        raise ValueError(f"--group {config.group}: expected {least} or more")
    rollouts.check_settings(config)
    if config.rewards:
        rollouts.check_rewards(config)
    for name in ("judge", "reward_file", "reward_coef"):
        value = getattr(config, name)
        if value != getattr(Config, name) and not config.rewards:
            raise ValueError(f"{terminal.flag(name)} {value}: needs --rewards")
    lora.read_prompt(config.teacher_adapter, config.system)  # the teacher reads the same prompts
    return config


# --------------------------------------------------------------------------------------- teacher


class Pair(NamedTuple):
    """What a program must know of the two models."""

    student: gemma.Config
    teacher: gemma.Config
    n_words: int  # tokens of the tokenizer: further rows of an embedding are padding
    is_sharded: bool  # the teacher, over the mesh
    has_adapter: bool  # the teacher


def teacher_of(config: Config, mesh: Mesh) -> tuple[gemma.Config, jnp.dtype, bool]:
    """(shape, dtype, whether it is sharded) of the teacher, without its weights."""
    cfg = stage.shape_of(config.teacher, flag="--teacher")
    return cfg, *stage.frozen_layout(cfg, mesh, config.teacher_base == "int8")


def difference(tok: data.Tokenizer, other: data.Tokenizer) -> str | None:
    """The first token that two tokenizers do not share, in words; None: they are the same."""
    both = [one.sp.id_to_piece(list(range(one.vocab_size))) for one in (tok, other)]
    for i, (mine, its) in enumerate(zip_longest(*both)):
        if mine != its:
            return f"token {i} is {mine!r} in {tok.file}, {its!r} in {other.file}"
    return None


def add_teacher(model: stage.Model, config: Config, mesh: Mesh) -> tuple[stage.Model, Pair]:
    """Loads the teacher into fixed["teacher"]; raises ValueError if it cannot teach this model."""
    given = f"--teacher {config.teacher}"
    start = hub.find_start(config.teacher, None, config.teacher_adapter,
                           ("--teacher", "--teacher", "--teacher-adapter"))
    if start == hub.find_start(config.model, config.weights, config.adapter):
        raise ValueError(f"{given}: it is the student itself; name a larger model, or a better one "
                         "with --teacher-adapter")
    tok = data.Tokenizer(start.weights)
    if differs := difference(tok, model.tok):
        raise ValueError(f"{given}: its tokenizer is not the student's: {differs}")
    int8 = config.teacher_base == "int8"
    dtype, sharded = stage.frozen_layout(gemma.read_config(start.weights), mesh, int8)
    cfg, base = gemma.load(start.weights, dtype, mesh, sharded, int8)
    teacher = {"base": base}
    if start.adapter is not None:
        teacher["adapter"] = stage.put(lora.load(start.adapter, cfg), mesh, P())
    terminal.say(f"the teacher's {cfg.n_params:,} weights {'sharded' if sharded else 'on each'}")
    facts = {f"{k} of the teacher": v for k, v in stage.checksums(start, tok).items()}
    model = model._replace(fixed=model.fixed | {"teacher": teacher},
                           checksums=model.checksums | facts)
    return model, Pair(model.cfg, cfg, tok.vocab_size, sharded, start.adapter is not None)


def partition_specs(pair: Pair, config: Config, sharded: bool) -> tuple[dict, dict]:
    """PartitionSpecs of (trained, fixed); sharded: the student's base."""
    specs, fixed = stage.partition_specs(pair.student, config, sharded)
    adapter = {"adapter": P()} if pair.has_adapter else {}
    int8 = config.teacher_base == "int8"
    teacher = {"base": gemma.pspecs(pair.teacher, pair.is_sharded, int8)} | adapter
    return specs, fixed | {"teacher": teacher}


# -------------------------------------------------------------------------------------- rollouts


class Setup(NamedTuple):
    """Everything that stays the same during a run."""

    config: Config
    mesh: Mesh
    model: stage.Model
    problems: list[Problem]
    order: rollouts.Order
    sampler: Sampler
    scorer: rollouts.Scorer
    train_step: Any


class State(NamedTuple):
    """Everything that a step changes and a checkpoint holds."""

    trained: dict
    opt: Any
    step: int = 0
    drawn: int = 0  # problems taken so far
    num_tokens: int = 0  # of prompts and completions so far

    @property
    def arrays(self) -> dict:
        return {"trained": self.trained, "opt": self.opt}


def from_row(problem: Problem, config: Config, tok: data.Tokenizer) -> Sample:
    """A row's own completion, with the stop token, in the place of one by the student."""
    ids, _ = tok.example(data.conversation(problem.fields, config.system))
    ids = np.array(ids[len(problem.prompt) :], np.int32)
    done = Rollout(0, 0, ids, np.zeros(len(ids), np.float32), "stop")
    return Sample(problem, 0, done, "", None, False, rewards.Scored(None, {}, {}))


def reader(config: Config, tok: data.Tokenizer):
    """rollouts.problem_reader; to learn from rows' solutions, each must have one that fits."""
    read = rollouts.problem_reader(config, tok)

    def read_both(row: dict) -> Problem:
        problem = read(row)
        n = len(from_row(problem, config, tok).rollout.ids) if config.on_policy < 1 else 0
        if n > config.max_new:
            raise data.TooLong(n, config.max_new, "--max-new")
        return problem

    return read_both


def is_own(i: int, share: float) -> bool:
    """Whether the student answers the i-th problem of the run: at share 0.5 every second one."""
    return int((i + 1) * share + 1e-9) > int(i * share + 1e-9)


def set_advantages(groups: list[list[Sample]]) -> None:
    """GRPO's advantage (reward - mean) / std of each sample in its group; 0 if it has no reward."""
    for group in groups:
        there = [s.scored.total for s in group if s.scored.total is not None]
        std = np.std(there, ddof=1) if len(there) > 1 else np.inf
        for s in group:
            d = 0.0 if s.scored.total is None else s.scored.total - np.mean(there)
            s.advantage = float(d / (std + 1e-4))


def rollout(setup: Setup, state: State, p: float) -> tuple[list, list, dict[str, float]]:
    """The completions of a step -> (groups of the student's own, rows' solutions, seconds)."""
    config, tok = setup.config, setup.model.tok
    weights = stage.forward_weights(state.trained, setup.model.fixed, jnp.dtype(config.dtype))
    own, given = [], []
    for n, i in enumerate(setup.order.take(state.drawn, config.prompts, p), state.drawn):
        (own if is_own(n, config.on_policy) else given).append(setup.problems[i])
    groups, times = rollouts.sample_groups(
        setup.sampler, weights, tok, own, setup.scorer, config, step=state.step, first=0, p=p)
    if config.rewards:
        set_advantages(groups)
    return groups, [from_row(problem, config, tok) for problem in given], times


# ------------------------------------------------------------------------------------------ loss


def loss(trained, fixed, b: dict, pair: Pair, config: Config, fsdp: str | None):
    """The loss of one micro-batch -> (sum, (sums of metrics, logp_BT)). Per-device sizes."""
    student, adapter = stage.forward_weights(trained, fixed, jnp.dtype(config.dtype))
    teacher, axis = fixed["teacher"], "data" if pair.is_sharded else None
    row = b["tokens"], b["positions"], b["segments"], b["parents"]
    x_BTD = gemma.hidden(student, pair.student, *row, lora=adapter, remat=config.remat, fsdp=fsdp)
    y_BTE = gemma.hidden(teacher["base"], pair.teacher, *row, lora=teacher.get("adapter"),
                         fsdp=axis)
    # The prompt's last token, wherever in the row it is, predicts a completion's first token.
    x_BTD, y_BTE = (jnp.take_along_axis(z, b["source"][:, :, None], axis=1) for z in (x_BTD, y_BTE))
    terms = divergence.Terms(pair.student, pair.teacher, config.beta, config.temperature,
                             bool(config.rewards), not config.lora_rank)
    total, out = divergence.loss(
        terms, x_BTD, gemma.head(student, pair.student, fsdp, pair.n_words),
        y_BTE, gemma.head(teacher["base"], pair.teacher, axis, pair.n_words),
        b["tokens"], b["weight"], config.reward_coef * b["advantage"])
    return total, ({k: jnp.sum(out[k]) for k in ("divergence", "entropy")}, out["logp"])


# ------------------------------------------------------------------------------------ train_step


def grads(trained, fixed, batch, n_micro, *, specs, **kw):
    """Gradient of the first n_micro micro-batches [n, B, T] -> (gradient, metrics, logp)."""
    replicated = jax.tree.map(lambda s: "data" not in s, specs)
    # Make replicated leaves varying; otherwise their gradients arrive summed over devices.
    trained = jax.tree.map(lambda r, x: stage.vary(x) if r else x, replicated, trained)
    f = jax.value_and_grad(partial(loss, **kw), has_aux=True)

    def micro(i, carry):
        sums, logp_nBT = carry
        (total, (metrics, logp_BT)), g = f(trained, fixed, jax.tree.map(lambda x: x[i], batch))
        sums = jax.tree.map(jnp.add, sums, (g, metrics | {"loss": total}))
        return sums, logp_nBT.at[i].set(logp_BT)

    zero = {k: stage.vary(jnp.zeros(())) for k in ("divergence", "entropy", "loss")}
    zeros = (jax.tree.map(jnp.zeros_like, trained), zero), jnp.zeros_like(batch["sampler"])
    (g, metrics), logp_nBT = lax.fori_loop(0, n_micro, micro, zeros)
    n_tokens, metrics = lax.psum((jnp.sum(batch["mask"]), metrics), "data")
    metrics = {k: v if k == "loss" else v / jnp.maximum(n_tokens, 1.0) for k, v in metrics.items()}
    # Replicated: g{unreduced} -> all-reduce. Sharded: the transpose of all-gather has already
    # summed it over the devices.
    g = jax.tree.map(lambda r, x: lax.psum(x, "data") if r else x, replicated, g)
    return g, metrics, logp_nBT


def make_steps(pair: Pair, config: Config, mesh: Mesh, sharded: bool,
               check_vma: bool | None = None):
    """One jitted function, train_step(trained, opt, fixed, batch, n_micro, lr)."""
    if check_vma is None:
        check_vma = not gemma.on_tpu(mesh)  # JAX's splash attention raises under True
    specs, fixed_specs = partition_specs(pair, config, sharded)
    fsdp, rows = "data" if sharded else None, P(None, "data")
    mesh_grads = jax.shard_map(
        partial(grads, specs=specs, pair=pair, config=config, fsdp=fsdp), mesh=mesh,
        in_specs=(specs, fixed_specs, rows, P()), out_specs=(specs, P(), rows),
        check_vma=check_vma)
    tx = stage.optimizer(config)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trained, opt, fixed, batch, n_micro, lr):
        g, metrics, logp_nBT = mesh_grads(trained, fixed, batch, n_micro)
        metrics["grad_norm"] = optax.global_norm(g)
        updates, opt = tx.update(g, opt, trained)  # outside shard_map: clipping needs global norms
        trained = jax.tree.map(lambda x, u: x - lr * u, trained, updates)
        return trained, opt, metrics, logp_nBT

    return (train_step,)


def programs(config: Config, mesh: Mesh) -> dict:
    """Each jitted function of a run with its argument shapes: name -> (function, arguments)."""
    config = resolve(config)
    cfg = stage.shape_of(config.model, config.weights)
    sharded, (teacher, dtype, split) = stage.base_is_sharded(cfg, config, mesh), teacher_of(
        config, mesh)
    pair = Pair(cfg, teacher, min(cfg.vocab_size, teacher.vocab_size), split, False)

    def weights():
        trained, fixed = stage.random_weights(cfg, config)
        base = gemma.init(teacher, jax.random.key(0), dtype, config.teacher_base == "int8")
        return trained, fixed | {"teacher": {"base": base}}

    specs = partition_specs(pair, config, sharded)
    trained, opt, fixed = stage.state_shapes(config, mesh, weights, specs)
    n_micro, lr = (jax.ShapeDtypeStruct((), t) for t in (jnp.int32, jnp.float32))
    train_step, = make_steps(pair, config, mesh, sharded)
    batch = rollouts.packed_shapes(config, mesh)
    out = rollouts.programs(cfg, config, mesh, trained, fixed)
    out["train_step"] = train_step, (trained, opt, fixed, batch, n_micro, lr)
    return out


# ------------------------------------------------------------------------------------------ main


def update(setup: Setup, state: State, groups: list[list[Sample]], given: list[Sample],
           lr: float) -> tuple[State, dict[str, float], dict]:
    """Makes one update -> (state, metrics, the batch)."""
    began, config = time.perf_counter(), setup.config
    samples = [s for group in groups for s in group]
    n_own, samples = len(samples), samples + given
    weight = 1 / sum(len(s.rollout.ids) for s in samples)
    host, n_micro, spans = rollouts.pack(samples, [weight] * len(samples), config,
                                         setup.mesh.size, all_advantages=True)
    batch = stage.put(host, setup.mesh, P(None, "data"))
    trained, opt, metrics, logp = setup.train_step(
        state.trained, state.opt, setup.model.fixed, batch, np.int32(n_micro), np.float32(lr))
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    logp_RT = np.asarray(hosts.whole(logp)).reshape(-1, config.pack_length)
    metrics |= rollouts.drift(samples, [span for span in spans if span[0] < n_own], logp_RT)
    metrics["update_s"] = time.perf_counter() - began
    n_tokens = sum(len(s.rollout.ids) + len(s.problem.prompt) for s in samples)
    return State(trained, opt, state.step + 1, state.drawn + config.prompts,
                 state.num_tokens + n_tokens), metrics, host


def load_rows(config: Config, tok: data.Tokenizer) -> tuple[list[Problem], list[Problem]]:
    """(problems to learn from, held-out ones) of a resolved Config."""
    return rollouts.load_split(config, reader(config, tok))


@terminal.one_line
def main(config: Config) -> Path | dict:
    """Trains, and returns the folder that the next stage takes as --adapter."""
    terminal.check_versions()
    if config.plan:
        import bench  # here: bench imports this file

        return bench.plan("distill", config)
    config = resolve(config)
    mesh = stage.begin(config)

    # load
    model, pair = add_teacher(stage.load_model(config, mesh), config, mesh)
    problems, held_out = load_rows(config, model.tok)
    state = State(model.trained, stage.init_optimizer(config, model.trained, mesh, model.specs))
    model = model._replace(trained=None)  # so a resumed run does not hold the starting weights too

    # compile
    train_step, = make_steps(pair, config, mesh, model.sharded)
    sampler = rollouts.make_sampler(model.cfg, config, mesh)

    # loop: rollout -> update -> log -> save
    scored = dataclasses.replace(config, rewards=config.rewards or "format")  # there is one to log
    facts = stage.facts(config, model, [problems], held_out)
    with (runs.Run(config, SHOWN, every_s=0.0, facts=facts) as run,
          rollouts.Scorer(scored, problems, mesh) as scorer):
        setup = Setup(config, mesh, model, problems,
                      rollouts.Order(problems, config.curriculum, config.seed), sampler, scorer,
                      train_step)
        stage.keep_held_out(config, held_out)

        def evaluate() -> float:
            weights = stage.forward_weights(state.trained, model.fixed, jnp.dtype(config.dtype))
            return rollouts.evaluate(sampler, weights, model.tok, held_out, state.step, run)

        def write(folder: Path | None) -> None:
            stage.write_model(folder, config, model, state.trained)

        def save(score: float | None = None) -> None:
            counters = {"drawn": state.drawn, "num_tokens": state.num_tokens}
            run.save(state.step, state.arrays, counters, write, score)

        saved = run.restore(state.arrays)
        if saved is not None:
            arrays = stage.put_like(saved.arrays, state.arrays)
            state, saved = State(**arrays, step=saved.step, **saved.state), None
        elif config.eval_every:
            evaluate()

        while (p := run.progress(state.step)) < 1 and not run.stopping:
            began, before, lr = time.perf_counter(), state.num_tokens, stage.schedule(p, config)
            groups, given, times = rollout(setup, state, p)
            state, metrics, batch = update(setup, state, groups, given, lr)
            run.check_finite(state.step, metrics, batch)
            step_s = time.perf_counter() - began
            rollouts.log_step(run, scorer, state.step, groups, metrics | times | {
                "learning_rate": lr, "p": p, "num_tokens": state.num_tokens, "step_s": step_s,
                "tokens_per_s": (state.num_tokens - before) / step_s})
            samples = [s for group in groups for s in group]
            if trouble := scorer.trouble([s.scored for s in samples]):
                save()
                raise SystemExit(f"step {state.step}: {trouble}")
            if run.due(config.eval_every, state.step):
                save(evaluate())
            elif run.due(config.save_every, state.step):
                save()
        return run.end(state.step, save, evaluate, write)


if __name__ == "__main__":
    import commandline

    terminal.command(lambda: main(commandline.cli(Config, description=__doc__)))
