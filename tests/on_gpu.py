"""The first quarter of an hour on an NVIDIA GPU: is it right, how fast is it, does it learn?

    python tests/on_gpu.py --make-reference reference.npz --weights DIR    # on a CPU, beforehand
    python tests/on_gpu.py --reference reference.npz --weights DIR --gsm8k DIR --out DIR
    python tests/on_gpu.py --quick                     # all of it on this CPU, with the tiny model

Each task is a process of its own with a time by which it must have ended, a share of --budget; what
one leaves over the next may use. A task that cannot start in time is skipped, one that fails or
takes too long is recorded, and the next one runs. Where no command may take that long, give parts:
--tasks correct,speed --budget 480s, then --tasks recipe,tiny --budget 360s.

--out holds results.jsonl (one line a task), table.md, the log of each task, and the run folders.
Without --weights the real model is left out; without --reference the CPU's values are computed
first, on this machine.
"""

import contextlib
import dataclasses
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import jax  # noqa: E402
import jax.numpy as jnp  # noqa: E402
import numpy as np  # noqa: E402
from jax.sharding import PartitionSpec as P  # noqa: E402

import bench  # noqa: E402
import data  # noqa: E402
import gemma  # noqa: E402
import packed  # noqa: E402
import problems  # noqa: E402
import rewards  # noqa: E402
import rollouts  # noqa: E402
import runs  # noqa: E402
import stage  # noqa: E402
import train_grpo  # noqa: E402
import train_sft  # noqa: E402
from sampler import Rollout, Sampler  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    budget: str | None = None
    """Time for all tasks together; default: 840s, or 290s with --quick."""
    out: str = "runs/on_gpu"
    """Folder for everything that is written."""
    weights: str | None = None
    """Folder of a real Gemma, for the comparison with the CPU and for the recipe."""
    gsm8k: str | None = None
    """Folder with GSM8K's train.jsonl and test.jsonl; default: where the scripts look."""
    reference: str | None = None
    """The file of --make-reference."""
    make_reference: str | None = None
    """Only write the values of this machine's CPU to this file."""
    tasks: str = ""
    """Run only tasks whose names begin so, as in "correct,speed sft"; default: all."""
    quick: bool = False
    """Everything with the tiny model and a few steps, on the CPU."""
    inside: str = ""
    """Run one task in this process; the script calls itself with this."""


# ----------------------------------------------------------------------------------- correctness


def values(weights: str, dtype: str) -> dict[str, np.ndarray]:
    """What must be the same on every device up to rounding: an adapter's forward, decoding, steps.

    Rows of the window + 128 tokens, so that local and global layers differ.
    """
    cfg, tok = gemma.read_config(weights), data.Tokenizer(weights)
    mesh, T, out = gemma.all_devices(jax.devices()[:1]), cfg.sliding_window + 128, {}
    rows = [problems.word_problem("train", i) for i in range(100)]
    sequences = [packed.read_example(row, tok) for row in rows]
    shared = dict(weights=weights, dtype=dtype, lora_rank=16, micro_rows=1)
    config = bench.script_config("sft", bench.Config(**shared, rows=2, length=T))
    model, rng = stage.load_model(config, mesh), np.random.default_rng(0)
    # B of a new adapter is 0, and with it the gradient of A.
    b = jax.tree.map(lambda x: np.float32(rng.normal(0, 0.02, x.shape)), model.trained["b"])
    trained, fixed = stage.put({"a": model.trained["a"], "b": b}, mesh, P()), model.fixed
    params, adapter = stage.forward_weights(trained, fixed, jnp.dtype(dtype))
    fresh = lambda: jax.tree.map(jnp.copy, trained)  # the steps donate theirs

    @jax.jit
    def forward(tokens_BT):
        x_BTD, head_VD = gemma.hidden(params, cfg, tokens_BT, lora=adapter), gemma.head(params, cfg)
        logp_BT, _ = gemma.token_logps(x_BTD[:, :-1], head_VD, tokens_BT[:, 1:],
                                       softcap=cfg.final_logit_softcapping)
        return {"logits": gemma.read_logits(cfg, head_VD, x_BTD[:, -1]), "logps": logp_BT}

    tokens_BT = np.concatenate([e.ids for e in sequences])[: 3 * T].reshape(3, T)
    prompt = rollouts.read_problem(rows[0], tok).prompt
    tokens_BT[2, -len(prompt) :] = prompt  # what the last row asks is far from its start
    out |= forward(tokens_BT)
    sampler = Sampler(cfg, mesh, slots=64, max_prompt=T, max_new=32, dtype=jnp.dtype(dtype))
    draw = lambda prompts, *args, **kw: sampler.sample(params, prompts, *args, lora=adapter, **kw)
    out["greedy"] = np.full((2, 32), -1)
    for r in draw([prompt, tokens_BT[2].tolist()], temperature=0.0):
        out["greedy"][r.prompt, : len(r.ids)] = r.ids

    # chi-squared of the counts of a sampled token, as standard deviations above its mean
    n, hot = 2048, 1.5
    drawn = [r.ids[0] for r in draw([tokens_BT[2].tolist()], n, temperature=hot, max_new=1)]
    counts_V = np.bincount(drawn, minlength=cfg.vocab_size)
    expected_V = n * np.asarray(jax.nn.softmax(out["logits"][2] / hot), float)
    often_V = expected_V >= 5
    pooled = lambda x_V: np.append(x_V[often_V], x_V[~often_V].sum())
    chi2 = np.sum((pooled(counts_V) - pooled(expected_V)) ** 2 / (pooled(expected_V) + 1e-9))
    out["sampling"] = (chi2 - often_V.sum()) / np.sqrt(2 * often_V.sum())

    batch = packed.Batches([sequences], T, 2, seed=0).batch(0)
    batch = stage.put({k: v[:, None] for k, v in batch.items()}, mesh, P(None, "data"))
    opt = stage.init_optimizer(config, trained, mesh, model.specs)
    step, _ = train_sft.make_steps(cfg, config, mesh, False)
    *_, metrics = step(fresh(), opt, fixed, batch, np.float32(1e-3), jax.random.key(0))
    out |= {"sft loss": metrics["loss"], "sft grad_norm": metrics["grad_norm"]}

    # With --cispo-cap the first update has PPO's gradient, and a loss that depends on the log-probs
    config = bench.script_config("grpo", bench.Config(
        **shared, prompts=2, group=4, prompt_length=T // 2, new_tokens=T // 2, kl_coef=0.0),
        pack_length=2 * T, is_cap=0.0, cispo_cap=5.0)
    samples = []
    for i, e in enumerate(sequences[:8]):
        ids, q = e.ids[e.mask > 0], i // 4
        rollout = Rollout(q, i % 4, ids, np.zeros(len(ids), np.float32), "stop")
        samples.append(rollouts.Sample(rollouts.read_problem(rows[q], tok), q, rollout, "", None,
                                       False, rewards.Scored(0.0, {}, {}), i % 4 - 1.5))
    host, n_micro, _ = rollouts.pack(samples, train_grpo.token_weights(samples, config), config, 1)
    opt = stage.init_optimizer(config, trained, mesh, model.specs)
    step, _ = train_grpo.make_steps(cfg, config, mesh, False)
    _, _, metrics, _ = step(fresh(), opt, fixed, stage.put(host, mesh, P(None, "data")),
                            np.int32(n_micro), np.bool(True), np.float32(1e-3))
    out |= {f"grpo {k}": metrics[k] for k in ("loss", "grad_norm", "entropy")}
    return {k: np.asarray(v) for k, v in out.items()}


# A GPU multiplies float32 matrices in TF32 (10 bits of mantissa) unless told "highest".
EXACT, TF32, BF16 = MODES = ("float32", "highest"), ("float32", "default"), ("bfloat16", "default")
LIMITS = {  # of the errors that `correct` returns, in the order of MODES
    "logits": (1e-3, 5e-2, 2e-1), "logps": (1e-4, 1e-2, 3e-2), "loss": (1e-4, 5e-3, 2e-2),
    "entropy": (1e-4, 1e-2, 5e-2), "grad_norm": (1e-3, 3e-2, 5e-2),
    "greedy": (0.0, 1.0, 1.0),  # a near tie may go either way, but not in float32
    "sampling": (5.0, 5.0, 5.0),
}


def make_reference(file: str, weights: str | None) -> None:
    """Writes the values of the tiny and of a real model."""
    jax.config.update("jax_platforms", "cpu")
    out = {}
    for name, folder in {"tiny": str(ROOT / "tiny"), "real": weights}.items():
        for dtype, precision in (EXACT, BF16) if folder else ():
            with jax.default_matmul_precision(precision):
                out |= {f"{name} {dtype} {k}": v for k, v in values(folder, dtype).items()}
    np.savez(file, **out)


def correct(name: str, weights: str, reference: str, modes: tuple) -> dict:
    """Errors against the CPU, and for each mode the one nearest to its limit.

    They are relative, but of logits the largest over their standard deviation, of log-probs the
    mean, and of greedy tokens the share from the first that differs.
    """
    known, found = np.load(reference), {"wrong": [], "errors": {}}
    apart = {
        "logits": lambda x, y: np.abs(x - y).max() / y.std(),
        "logps": lambda x, y: np.abs(x - y).mean(),
        "greedy": lambda x, y: np.mean(np.cumsum(x != y, axis=1) > 0),
        "sampling": lambda x, _: x,
    }
    relative = lambda x, y: np.abs(x - y) / np.abs(y)
    for dtype, precision in modes:
        with jax.default_matmul_precision(precision):
            here = values(weights, dtype)
        mode, worst = f"{dtype} {precision}", {}
        for key, x in here.items():
            error = float(apart.get(key, relative)(x, known[f"{name} {dtype} {key}"]))
            limit = LIMITS[key.split()[-1]][MODES.index((dtype, precision))]
            worst[error / (limit or 1e-9)] = text = f"{key} {error:.2g} of at most {limit:g}"
            found["errors"][f"{mode}: {key}"] = error
            found["wrong"] += [] if error <= limit else [f"{mode}: {text}"]
        found[mode] = worst[max(worst)]
        print(json.dumps(found), flush=True)  # what is done if the time ends in the next mode
    return found


# ----------------------------------------------------------------------------------------- speed

SHAPES = dict(rows=16, length=2048, micro_rows=8, prompts=64, group=8, prompt_length=128,
              new_tokens=256, slots=512, repeats=3)
QUICK = dict(rows=4, length=128, micro_rows=2, prompts=2, group=4, prompt_length=32, new_tokens=16,
             slots=8, repeats=1, weights=str(ROOT / "tiny"))
REACHED = {"H100": (790e12, 3.0e12), "H200": (790e12, 4.3e12)}  # FLOP/s, bytes/s of good kernels


def shares(figures: dict) -> dict:
    """The figures of bench.py, with shares of what good kernels reach on this card."""
    card = next((v for k, v in REACHED.items() if k in figures["device"]), (None, None))
    for name, top in zip(("sft_model_flops_per_s", "rollout_bytes_per_s"), card, strict=True):
        if top and name in figures:
            figures[f"{name}_of_reached"] = figures[name] / top
    return figures


def profile(phase: str, shapes: dict, out: Path) -> dict:
    """One step under the profiler: share of the time without a kernel, and the largest kernels."""
    config = bench.Config(**bench.MEASURED | shapes)
    steps = {"sft": bench.sft_steps, "grpo": bench.grpo_steps}[phase](
        config, stage.shape_of(config.model, config.weights), gemma.all_devices())
    next(steps), next(steps)
    options = jax.profiler.ProfileOptions()
    options.python_tracer_level = 0
    with jax.profiler.trace(str(out / f"trace_{phase}"), profiler_options=options):
        next(steps)
    file = max((out / f"trace_{phase}").rglob("*.xplane.pb"))
    kinds = ("/device:GPU", "Stream") if jax.default_backend() == "gpu" else ("/host:CPU", "tf_XLA")
    events = sorted((e.start_ns, e.duration_ns, e.name)
                    for plane in jax.profiler.ProfileData.from_file(str(file)).planes
                    for line in plane.lines for e in line.events
                    if plane.name.startswith(kinds[0]) and line.name.startswith(kinds[1]))
    busy, end, kernels = 0, events[0][0], {}
    for start, length, name in events:
        busy += max(0, start + length - max(start, end))
        end = max(end, start + length)
        kernels[name] = kernels.get(name, 0) + length
    largest = sorted(kernels, key=kernels.get)[:-4:-1]
    return {"idle": 1 - busy / (end - events[0][0])} | {
        name[:60]: kernels[name] / sum(kernels.values()) for name in largest}


# ----------------------------------------------------------------------------------------- tasks


class Task(NamedTuple):
    name: str
    share: float  # of the time, besides what the tasks before it leave
    least_s: float  # it is skipped when less is left
    command: list[str]  # {left}: seconds that are left to it
    folder: str = ""  # of a run or an evaluation, whose results are read


def plan(config: Config) -> list[Task]:
    """All tasks in their order."""
    out, tiny = Path(config.out).resolve(), str(ROOT / "tiny")
    real = config.weights or (tiny if config.quick else None)
    reference = config.reference or str(out / "reference.npz")
    flags = [f"--{k.replace('_', '-')}={v}" for k, v in (QUICK if config.quick else SHAPES).items()]
    given = [f"--reference={reference}", f"--out={out}"] + ["--quick"] * config.quick
    given += [f"--weights={config.weights}"] * (config.weights is not None)
    inside = lambda name: ["tests/on_gpu.py", "--inside", name, *given]
    measure = ["bench.py", "--model", "gemma3-1b", "--json", *flags, "--phases"]
    tasks = [Task("correct tiny", 15, 30, inside("correct tiny"))]
    if not Path(reference).exists():
        tasks = [Task("correct reference", 45, 30, [
            "tests/on_gpu.py", "--make-reference", reference, *given]), *tasks]
    if config.weights:
        tasks.append(Task("correct real", 12, 40, inside("correct real")))
    tasks += [
        Task("speed sft", 9, 40, [*measure, "sft"]),
        Task("speed grpo", 10, 50, [*measure, "grpo"]),
        Task("speed profile sft", 4, 25, inside("speed profile sft")),
        Task("speed profile grpo", 4, 25, inside("speed profile grpo")),
    ]
    if real:
        sized = bench.script_config("sft", bench.Config(weights=real))
        start = ["--model", sized.model, "--weights", real]
        test, sft = ["eval.py", *start, "--samples=0"], ["--eval-every=0", "--save-every=0"]
        if config.quick:
            test, sft, grpo = ([*test, "--rows=40"], [*sft, "--steps=2", "--batch-rows=4"],
                               [*sft, "--steps=2", "--prompts=4", "--eval-rows=40"])
        else:  # 92 steps are two epochs
            test, sft, grpo = ([*test, "--data=gsm8k:test", "--slots=256"],
                               [*sft, "--data=gsm8k", "--steps=92"],
                               [*sft, "--data=gsm8k", "--slots=256", "--micro-rows=4"])
        limit = "--time-limit={left}s"
        tasks += [
            Task("recipe before", 7, 30, [*test, f"--out={out}/before"], "before"),
            Task("recipe sft", 10, 45, ["train_sft.py", *start, *sft, limit, f"--out={out}/sft"],
                 "sft"),
            Task("recipe grpo", 14, 60, ["train_grpo.py", *start, *grpo, limit,
                                         f"--adapter={out}/sft", f"--out={out}/grpo"], "grpo"),
            Task("recipe after", 7, 30, [*test, f"--adapter={out}/grpo",
                                         f"--compare={out}/before", f"--out={out}/after"], "after"),
        ]
    short = ["--steps=2", "--eval-rows=40"] if config.quick else []
    tasks.append(Task("tiny", 10, 40, ["train_grpo.py", *short, f"--out={out}/tiny"], "tiny"))
    chosen = tuple(filter(None, config.tasks.split(",")))
    return [t for t in tasks if not chosen or t.name.startswith(chosen)]


def run_inside(config: Config) -> dict:
    """A task of this file, in a process of its own."""
    kind, what = config.inside.split(" ", 1)
    if kind == "speed":
        shapes = QUICK if config.quick else SHAPES
        return profile(what.split()[-1], shapes, Path(config.out))
    weights = config.weights if what == "real" else str(ROOT / "tiny")
    return correct(what, weights, config.reference, (EXACT, BF16) if config.quick else MODES)


def figures_of(task: Task, log: str, out: Path) -> dict:
    """The figures that a task left: JSON on its last line, or the numbers in its folder."""
    folder = out / task.folder
    if (folder / "results.json").exists() and task.folder:
        found = json.loads((folder / "results.json").read_text())
        return {k: found[k] for k in ("n", "pass@1", "format", "length")}
    if task.folder:
        rows = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        merged = {k: v for row in rows for k, v in row.items()}
        wanted = ("step", "loss", "reward", "accuracy", "eval_accuracy", "tokens_per_s", "step_s",
                  "sampling/sampling_logp_difference/mean")
        return {k: merged[k] for k in wanted if k in merged}
    lines = [line for line in log.splitlines() if line.startswith("{")]
    return json.loads(lines[-1]) if lines else {}


def run_task(task: Task, config: Config, end: float) -> dict:
    """Runs one task until `end` at the latest -> its line of results.jsonl."""
    out, began, left = Path(config.out).resolve(), time.monotonic(), end - time.monotonic()
    row = {"task": task.name, "status": "skipped", "seconds": 0.0}
    if left < (least_s := 3.0 if config.quick else task.least_s):
        return row | {"error": f"needs {least_s:.0f} s, {max(0, left):.0f} s are left"}
    command = [sys.executable, *(word.replace("{left}", f"{0.9 * left:.0f}")
                                 for word in task.command)]
    env = os.environ | {"JAX_COMPILATION_CACHE_DIR": str(Path.home() / ".cache" / "jax-programs"),
                        "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0", "HF_HUB_OFFLINE": "1"}
    if config.quick:  # most of its time is the compiler's
        env["JAX_PLATFORMS"] = "cpu"
        env["XLA_FLAGS"] = "--xla_backend_optimization_level=0"
    if config.gsm8k:
        env["GSM8K"] = str(Path(config.gsm8k).resolve())
    log = out / f"{task.name.replace(' ', '_')}.log"
    with log.open("w") as f:
        f.write(" ".join(command) + "\n")
        f.flush()
        try:
            done = subprocess.run(command, cwd=ROOT, env=env, stdout=f, stderr=subprocess.STDOUT,
                                  timeout=left).returncode
            row["status"] = "failed" if done else "ok"
        except subprocess.TimeoutExpired:
            row["status"] = "too slow"
    row["seconds"], text = round(time.monotonic() - began, 1), log.read_text()
    with contextlib.suppress(OSError, ValueError):
        row |= figures_of(task, text, out)
    if row["status"] != "ok":
        row["error"] = row.pop("wrong", None) or text.strip().splitlines()[-1][:300]
    return row | (shares(row) if "device" in row else {})


APART = ("task", "status", "seconds", "errors", "device", "jax", "peak_rss_bytes")


def table(rows: list[dict]) -> str:
    """Task, status, seconds and the figures, as Markdown."""
    short = lambda v: f"{v:.4g}" if isinstance(v, float) else str(v)
    lines = ["| task | status | seconds | figures |", "|---|---|---|---|"]
    for row in rows:
        figures = ", ".join(f"{k} {short(v)}" for k, v in row.items() if v and k not in APART)
        lines.append(f"| {row['task']} | {row['status']} | {row['seconds']:g} | {figures} |")
    return "\n".join(lines)


def main(config: Config) -> int:
    if config.make_reference:
        make_reference(config.make_reference, config.weights)
        return 0
    if config.inside:
        found = run_inside(config)
        print(json.dumps(found))
        return int(bool(found.get("wrong")))
    budget = runs.parse_time(config.budget or ("290s" if config.quick else "840s"))
    began, rows = time.monotonic(), []
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    jax.config.update("jax_platforms", "cpu")  # of this process: the tasks need the GPU's memory
    tasks, share = plan(config), 0.0
    for task in tasks:
        share += task.share / sum(t.share for t in tasks)
        print(f"{time.monotonic() - began:4.0f} s  {task.name}", flush=True)
        rows.append(run_task(task, config, began + share * budget))
        with (out / "results.jsonl").open("a") as f:
            f.write(json.dumps(rows[-1]) + "\n")
    (out / "table.md").write_text(table(rows) + "\n")
    print(table(rows))
    return int(any(row["status"] != "ok" for row in rows))


if __name__ == "__main__":
    import tyro

    sys.exit(main(tyro.cli(Config, description=__doc__)))
