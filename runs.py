"""The run folder that every script shares: metrics, samples, checkpoints, resume, time budget.

    runs/NAME/
        config.json           the resolved config, checksums of the rows and of the files of the
                              model; under `code`: the script, versions and devices
        metrics.jsonl         one object a step; keys ending in _s or holding per_s are timings
        samples.jsonl         prompt, completion, every reward component
        checkpoints/step_N/   the state after N updates: the adapter, resume/ (arrays and
                              counters), manifest.json (the sha256 of each file)
        final/                what `--adapter` takes
        report.html           what report.py makes of these files, now and then and at the end

    with runs.Run(config, {"loss": "loss {:.3f}"}) as run:
        saved = run.restore(arrays)            # the newest valid checkpoint, or None
        while (p := run.progress(step)) < 1 and not run.stopping:
            ...                                # one update, step += 1
            run.log(step, metrics)
            if run.due(config.save_every, step):
                run.save(step, arrays, state, write_model)
        return run.end(step, save, evaluate, write_model)

Other files in the folder are left alone.
"""

import contextlib
import dataclasses
import json
import os
import re
import shutil
import signal
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors.numpy import load_file, save_file

import disk
import hosts
import terminal

# Imports keep the CPU busy, so the CPU time used so far is nearly the age of the process. But the
# kernel of a notebook may be hours old: a run in it counts from its own beginning.
STARTED = None if "ipykernel" in sys.modules else time.monotonic() - time.process_time()

# The flags that may change when a run is resumed, as they do not change what a step computes. All
# others must stay as they were.
MAY_CHANGE = {
    "steps", "time_limit", "save_every", "eval_every",  # how long, and what is saved and measured
    "out", "keep", "report_to", "show", "show_every", "log_samples", "plan",  # where, what is shown
    "micro_rows", "slots", "remat", "shard",  # memory
    "reward_threads", "reward_timeout", "max_missing",  # rewards
    "judge_threads", "judge_limit", "judge_missing",
    *hosts.FLAGS,
}

# ------------------------------------------------------------------------------------- time budget


def parse_time(text: str | float | None) -> float | None:
    """Seconds in "8h45m", "90m", "30s" or a plain number; None stays None."""
    if text is None:
        return None
    number = r"(\d+(?:\.\d+)?)"
    match = re.fullmatch(rf"(?:{number}h)?(?:{number}m)?(?:{number}s)?|{number}", str(text).strip())
    parts = match.groups(default="0") if match else "0000"
    seconds = sum(float(part) * unit for part, unit in zip(parts, (3600, 60, 1, 1), strict=True))
    if seconds <= 0:
        raise ValueError(f"--time-limit {text}: write it like 8h45m, 90m, 30s or 5400 (seconds)")
    return seconds


class Budget:
    """The share of the run that is done, by steps or by the clock, whichever is further.

    With a limit the share follows the clock, p = p0 + (1 - p0) · elapsed / (limit - reserve): p0 is
    the share in the checkpoint, elapsed counts this session alone, from `start` (None: now), and
    the reserve leaves time to finish a step, evaluate, save a checkpoint, write final/ and exit.
    """

    def __init__(self, steps: int | None = None, limit_s: float | None = None,
                 clock: Callable[[], float] = time.monotonic, start: float | None = None):
        self.steps, self.limit_s, self.clock = steps, limit_s, clock
        self.start = clock() if start is None else start
        self.p = self.clock_p = self.clock_p0 = 0.0
        self.longest_s = {"step": 0.0, "eval": 0.0, "save": 0.0}
        self.readings: list[tuple[float, float]] = []  # (seconds, p) of each progress()
        self.apart_s = 0.0  # measured since the last reading, so not part of a step

    @contextlib.contextmanager
    def timed(self, kind: str):
        """Time an "eval" or a "save" (Run times its saves); the reserve has room for both."""
        begin = self.clock()
        yield
        took = self.clock() - begin
        self.apart_s += took
        self.longest_s[kind] = max(took, self.longest_s[kind])

    def progress(self, step: int) -> float:
        """The share p done after `step` updates; call it once between two steps."""
        now = self.clock() - self.start
        if len(self.readings) > 1:  # the first step of a session also compiles, so it is left out
            took = now - self.readings[-1][0] - self.apart_s
            self.longest_s["step"] = max(took, self.longest_s["step"])
        self.apart_s = self.p = 0.0
        if self.steps is not None:
            self.p = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        if self.limit_s is not None:
            step_s, eval_s, save_s = self.longest_s.values()
            # An evaluation that was not measured counts as a step; final/ costs about another save.
            reserve_s = 1.25 * (step_s + (eval_s or step_s) + 2 * save_s)
            reserve_s += min(5.0, 0.05 * self.limit_s)  # the report, and the process's own end
            if not (step_s and eval_s and save_s):  # something was not measured yet
                reserve_s = max(reserve_s, 0.05 * self.limit_s)
            share = now / max(self.limit_s - reserve_s, 1e-9)
            p = self.clock_p0 + (1 - self.clock_p0) * share if share < 1 else 1.0
            self.clock_p = max(p, self.clock_p)
            self.p = max(self.p, self.clock_p)
        self.readings.append((now, self.p))
        return self.p

    def eta_s(self) -> float | None:
        """Seconds from now to p = 1, by the pace since the first step."""
        if len(self.readings) < 3:
            return None
        (since_s, since_p), (then_s, p) = self.readings[1], self.readings[-1]
        if p <= since_p:
            return None
        left_s = (then_s - since_s) * (1 - p) / (p - since_p)
        return max(0.0, left_s - (self.clock() - self.start - then_s))

    def state(self) -> dict:
        """What a checkpoint holds; without a limit nothing that depends on the clock."""
        clock = {"clock_p": self.clock_p, "limit_s": self.limit_s, "longest_s": self.longest_s}
        return {"p": self.p} | (clock if self.limit_s is not None else {})

    def load(self, state: dict) -> None:
        """Go on from a checkpoint; a finished run goes on if --steps or --time-limit grew."""
        self.p = state["p"]
        # With --steps, p0 is the clock's share alone.
        p0 = self.p if self.steps is None else state.get("clock_p", 0.0)
        if p0 == 1 and self.limit_s and self.limit_s > state.get("limit_s", self.limit_s):
            p0 = state["limit_s"] / self.limit_s
        self.clock_p = self.clock_p0 = p0
        self.longest_s |= state.get("longest_s", {})

# -------------------------------------------------------------------------------------- the folder


def claim(folder: Path, kind: str = "run") -> None:
    """Exit unless a folder is new, empty or, as its config.json says, of this kind."""
    with disk.writing(folder):
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names <= {".lock", ".tmp-config.json"}:  # left by a start that was killed
        return
    try:
        begun = disk.read_json(folder / "config.json")["code"]["kind"]
    except (ValueError, LookupError, TypeError):
        begun = None
    if begun != kind:
        raise SystemExit(f"--out {folder} is not empty, and no config.json in it says that it is "
                         f"a {kind!r} folder (kind: {begun}): choose another --out; nothing in it "
                         "was touched")


def model_defaults(model: str, defaults: dict[str, dict]) -> dict | None:
    """The entry of a script's DEFAULTS for a model, or None: gemma3-12b-pt has gemma3-12b's."""
    names = [name for name in defaults if model == name
             or name.startswith("gemma") and model.startswith(name)]
    return defaults[max(names, key=len)] if names else None


def given(values: dict, config_class: type) -> list[str]:
    """The fields of a script's Config, as a dict, that differ from its and its model's defaults."""
    script = sys.modules[config_class.__module__]
    names, defaults = [], getattr(script, "DEFAULTS", {})
    table = dict(model_defaults(str(values.get("model")), defaults) or {})
    table |= getattr(script, "KNOBS", {}).get(values.get("loss"), {})  # train_simpo.py's
    for field in dataclasses.fields(config_class):
        value = disk.plain(values.get(field.name))
        usual = [field.default, table.get(field.name)]
        if field.name == "lora_alpha":  # filled from the rank
            usual += [n * (values.get("lora_rank") or 0) for n in (1, 2)]
        if field.name in ("system", "lora_rank", "lora_alpha") and values.get("adapter"):
            continue  # the adapter's own
        if field.name in values and value not in [disk.plain(x) for x in usual]:
            names.append(field.name)
    return names


def check_unchanged(folder: Path, config: Any, extra: dict | None = None,
                    may_change: Iterable[str] = ()) -> None:
    """Exit if a flag or a fact ({"checksum of the prompts": "3f.."}) has changed.

    The line names the flag that was given, not those that follow from it: --model, not --dtype.
    """
    old = disk.read_json(folder / "config.json")
    new = disk.plain(dataclasses.asdict(config) | (extra or {}))
    told = {name for values in (old, new) for name in given(values, type(config))}
    names = {*old, *new} - MAY_CHANGE - {*may_change, "code"}
    for name in sorted(names, key=lambda name: (name != "model", name not in told, name)):
        was, now = old.get(name, "absent"), new.get(name, "absent")
        if was != now:
            changed = name if " " in name else terminal.flag(name)
            raise SystemExit(f"{changed} was {was!r:.200} when {folder} was begun, now it is "
                             f"{now!r:.200}: put it back, or choose another --out")


def write_config(folder: Path, config: Any, extra: dict | None = None, kind: str = "run") -> None:
    """Write config.json: every flag, `extra`, and under `code` the kind that claim() reads."""
    module = sys.modules.get(type(config).__module__)  # __main__, where a script is run
    code = {"kind": kind, "script": Path(getattr(module, "__file__", None) or "notebook").stem,
            "python": sys.version.split()[0], "jax": jax.__version__,
            "device": jax.devices()[0].device_kind, "n_devices": jax.device_count(),
            "n_processes": hosts.count}
    everything = dataclasses.asdict(config) | (extra or {}) | {"code": code}
    disk.write_json(folder / "config.json", everything)


def _named(tree) -> dict[str, Any]:
    """Leaves by path: {"opt_state": (ScaleByAdamState(mu=...),)} -> {"opt_state/0/mu": ...}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _unflatten(like, named: dict[str, np.ndarray], source: Path):
    """Put the named arrays into the structure of `like`, which gives their shapes and dtypes."""
    wanted = _named(like)
    a, b = ({f"{k} {x.shape} {x.dtype}" for k, x in side.items()} for side in (wanted, named))
    if a != b:
        raise ValueError(f"{source}: expected {sorted(a - b)}, found {sorted(b - a)}")
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in wanted])


# ----------------------------------------------------------------------------------------- the run


def _wandb(folder: Path, config: dict) -> tuple[Callable, Callable]:
    import wandb

    wandb.init(name=folder.name, dir=str(folder), config=config)
    return lambda step, numbers: wandb.log(numbers, step=step), wandb.finish


def _tensorboard(folder: Path, config: dict) -> tuple[Callable, Callable]:
    from tensorboard.summary import Writer

    writer = Writer(str(folder / "tensorboard"))
    log = lambda step, numbers: [writer.add_scalar(k, x, step) for k, x in numbers.items()]
    return log, writer.close


LOGGERS = {"wandb": _wandb, "tensorboard": _tensorboard}  # open(folder, config) -> (log, close)


class Saved(NamedTuple):
    step: int
    arrays: Any  # numpy, in the structure asked for
    state: dict


class Run(contextlib.ExitStack):
    """One open run folder, locked against a second process.

    show, every_s: see terminal.StepLines. facts: what else a resumed run must find unchanged, such
    as stage.facts(). A signal sets `stopping`. Of several processes only the first touches the
    folder and reads the clock; the others make the same calls.
    """

    def __init__(self, config: Any, show: dict[str, str], every_s: float = 30.0,
                 facts: dict[str, str] | None = None):
        super().__init__()  # of what is undone at the end, or if a line below fails
        self.folder, self.keep = Path(config.out), config.keep
        self.config, self.outcome = config, []  # outcome: the last lines of a run
        by_reward = bool(getattr(config, "rewards", True))
        self.step_lines = terminal.StepLines(self.folder, show, every_s, by_reward)
        self.budget = Budget(config.steps, parse_time(config.time_limit), start=STARTED)
        self.step: int | None = None  # of the last line logged; None until restore()
        self.saved_step = self.scored_step = -1  # of the newest checkpoint, and that with a score
        self.asked = self.stopping = ""  # the signal that asks to stop: this process, all of them
        self.refused, self.loggers = set(), {}
        self.report_due = time.monotonic() + 60
        self.logs = [self.folder / "metrics.jsonl", self.folder / "samples.jsonl"]
        loggers = [name for name in config.report_to.split(",") if name]
        if not {*loggers} <= {*LOGGERS}:
            raise ValueError(f"--report-to {config.report_to}: choose from {', '.join(LOGGERS)}")
        with contextlib.ExitStack() as undo:
            undo.push(self)
            if hosts.index == 0:
                self._open(config, loggers, facts)
            terminal.handle_signals(self, self._on_signal)
            if hosts.index == 0:
                self.callback(self.report)  # runs first, however the run ends
            undo.pop_all()

    def _open(self, config, loggers, facts):
        claim(self.folder)
        self.enter_context(disk.lock(self.folder))
        with disk.writing(self.folder):
            disk.tidy(self.folder, r"config\.json|(metrics|samples|held_out)\.jsonl|final")
            disk.tidy(self.folder / "checkpoints", r"step_\d+")
            if self.checkpoints():  # before the first there is nothing to resume
                check_unchanged(self.folder, config, facts)
            write_config(self.folder, config, facts)  # before anything else: claim() looks for it
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            for path in self.logs:
                path.touch()
        for name in loggers:
            try:
                self.loggers[name], close = LOGGERS[name](self.folder, dataclasses.asdict(config))
            except ImportError as error:
                raise SystemExit(f"--report-to {name}: {error}; pip install {name}") from None
            self.callback(self._tell, name, close)

    def _tell(self, name, call, *arguments):
        try:
            call(*arguments)
        except Exception as error:  # a logger may fail in any way and never stops a run
            self.loggers.pop(name, None)
            terminal.say(f"{name} is off for the rest of the run: {error!r}")

    def _on_signal(self, number, frame):
        if self.asked and number == signal.SIGINT:  # the second one does not wait for the step
            raise SystemExit(f"interrupted: the same command continues {self.folder}")
        self.asked = signal.Signals(number).name
        self.stopping = self.asked if hosts.count == 1 else ""
        with contextlib.suppress(OSError):  # not print(): it may be what was interrupted
            os.write(2, f"\n{self.asked}: finishing this step, then saving\n".encode())

    def progress(self, step: int) -> float:
        """The share of the run done after `step` updates, by the clock of the first process."""
        everyone = hosts.everyone([self.budget.progress(step), self.asked])
        self.budget.p = everyone[0][0]
        self.stopping = next((asked for _, asked in everyone if asked), "")
        return self.budget.p

    def due(self, every: int, step: int) -> bool:
        """Whether step is a multiple of `every` (0: never); end() handles the last of --steps."""
        return every > 0 and step % every == 0 and step != self.budget.steps

    def end(self, step: int, save: Callable[[float | None], Any], evaluate: Callable[[], float],
            write_model: Callable[[Path | None], None]) -> Path:
        """After the loop: evaluate, save and write final/. If told to stop, save and exit."""
        if self.budget.p < 1:
            if self.saved_step != step:  # saving again would drop the score
                save(None)
            raise SystemExit(f"stopped by {self.stopping} at step {step} of {self.folder}: the "
                             "same command continues from there")
        if step == 0 and self.budget.clock_p == 1:
            took = ", ".join(f"{k} {s:.0f} s" for k, s in self.budget.longest_s.items() if s)
            raise SystemExit(f"--time-limit {self.budget.limit_s:g} s left no time for a step "
                             f"({took}): raise it, or evaluate less (--eval-rows, --eval-every)")
        if self.scored_step != step:
            save(evaluate())
        return self.finish(write_model)

    def finish(self, write_model: Callable[[Path | None], None]) -> Path:
        """Write final/, the best checkpoint or else the last step, and say what came out."""
        step = self.best() if hosts.index == 0 else None
        if step is not None and (why := disk.verify(self.folder / f"checkpoints/step_{step}")):
            terminal.say(f"step {step} was the best, but {why}: final/ is the last step")
            step = None
        step = hosts.everyone(self.saved_step if step is None else step)[0]

        def write(folder):
            if step == self.saved_step:
                write_model(folder)
            elif folder is not None:
                shutil.copytree(self.folder / f"checkpoints/step_{step}", folder,
                                ignore=shutil.ignore_patterns("resume", "manifest.json"),
                                dirs_exist_ok=True)
            if folder is not None:
                self.describe(folder, step)

        with self.budget.timed("save"):
            disk.publish(self.folder / "final", write)
        hosts.everyone(None)  # nobody leaves before it is there
        terminal.say("\n".join([f"done: {self.folder / 'final'}", *self.outcome]))
        return self.folder / "final"

    def describe(self, folder: Path, step: int) -> None:
        """Write the model card of `step`, and keep what the last lines of the run say."""
        if not hasattr(self.config, "model"):
            return
        try:
            import card  # here: it stands below this file

            card.write(folder, self.folder, step)
            self.outcome = card.ending(folder, self.folder, step)
        except Exception as error:  # the card is only text: the model is written
            terminal.say(f"no model card of {folder}: {error!r}")

    def log(self, step: int, metrics: dict) -> None:
        """Append the line of a step to metrics.jsonl, show it, and pass it to the loggers."""
        metrics = disk.plain(metrics)
        self._append(self.logs[0], step, [metrics])
        self.step = max(step, self.step)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        for name, log in [*self.loggers.items()]:
            self._tell(name, log, step, numbers)
        self.step_lines.say(step, self.budget.steps, numbers, self.budget.eta_s())

    def log_samples(self, step: int, rows: Iterable[dict]) -> None:
        """Append rows (prompt, completion, reward components) to samples.jsonl."""
        self._append(self.logs[1], step, [disk.plain(row) for row in rows])

    def _append(self, path, step, rows):
        assert self.step is not None, "call restore() before the first step"
        if hosts.index == 0:
            with disk.writing(path), open(path, "ab") as file:
                file.write(disk.to_jsonl({"step": step} | row for row in rows))

    def check_finite(self, step: int, metrics: dict, batch: Any) -> None:
        """Stop on a NaN or infinite loss or grad_norm, with the batch in nan_step_N.npz."""
        path = self.folder / f"nan_step_{step}.npz"
        for name in ("loss", "grad_norm"):
            if metrics.get(name) is None or np.isfinite(value := float(metrics[name])):
                continue
            if hosts.index == 0:
                with disk.writing(path):
                    np.savez(path, **_named(jax.device_get(batch)))
            raise SystemExit(f"step {step} of {self.folder}: {name} is {value}; the batch is in "
                             f"{path}")

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory), oldest first, without the ones restore() refused."""
        paths = (self.folder / "checkpoints").glob("step_*")
        return sorted((int(path.name[5:]), path) for path in paths if path.name not in self.refused
                      and re.fullmatch(r"step_(0|[1-9]\d*)", path.name))

    def save(self, step: int, arrays: Any, state: dict,
             write_model: Callable[[Path | None], None] = lambda folder: None,
             score: float | None = None) -> None:
        """Write checkpoints/step_N: arrays (a pytree), state (JSON), the model; high scores win."""
        assert self.step is not None and self.step >= step, f"log step {step} before saving it"
        self.saved_step = step
        self.scored_step = step if score is not None else self.scored_step
        arrays = hosts.whole(arrays)
        record = {"score": score, "state": state, "budget": self.budget.state()}

        def write(directory):
            write_model(directory)
            if directory is None:
                return
            # In a folder of its own, where nobody who loads *.safetensors as the model finds it.
            (directory / "resume").mkdir()
            # safetensors 0.8 writes the wrong bytes for an array that is not in C order
            named = _named(jax.device_get(arrays))
            named = {name: np.asarray(leaf, order="C") for name, leaf in named.items()}
            save_file(named, directory / "resume/arrays.safetensors")
            (directory / "resume/state.json").write_text(json.dumps(disk.plain(record)))

        with self.budget.timed("save"):
            if hosts.index == 0:
                with disk.writing(self.folder):
                    for path in self.logs:  # never behind the checkpoint
                        disk.sync(path)
            disk.publish(self.folder / "checkpoints" / f"step_{step}", write)
            self.refused.discard(f"step_{step}")
            if hosts.index == 0:
                self._drop_old()
        if hosts.index == 0 and time.monotonic() >= self.report_due:
            self.report()

    def best(self) -> int | None:
        """The step of the checkpoint with the highest score, the newer of two equals."""
        scores = []
        for step, path in self.checkpoints():
            with contextlib.suppress(OSError, ValueError, KeyError):
                score = disk.read_json(path / "resume/state.json")["score"]
                scores += [] if score is None else [(score, step)]
        return max(scores, default=(0.0, None))[1]

    def _drop_old(self):
        """Delete all checkpoints but the newest `keep` and the best."""
        kept = {step for step, _ in self.checkpoints()[-max(1, self.keep) :]} | {self.best()}
        for step, path in self.checkpoints():
            if step not in kept:
                with contextlib.suppress(OSError):  # renamed first: never half a checkpoint
                    shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))

    def restore(self, like: Any) -> Saved | None:
        """The newest valid checkpoint in the structure of `like`, or None; drops later log lines.

        `like` holds arrays or ShapeDtypeStructs. Every run calls it before its first step.
        """
        found, arrays = None, like
        for step, directory in reversed(self.checkpoints() if hosts.index == 0 else []):
            if reason := disk.verify(directory):
                self.refused.add(directory.name)
                terminal.say(f"refused {directory}: {reason}; trying the one before, or a fresh "
                             "start")
                continue
            found = step, disk.read_json(directory / "resume/state.json")
            arrays = _unflatten(like, load_file(directory / "resume/arrays.safetensors"), directory)
            break
        self.step, saved = 0, None
        if found := hosts.everyone(found)[0]:  # only the first has read the folder
            step, record = found
            saved = Saved(step, hosts.broadcast(arrays), record["state"])
            terminal.say(f"resuming {self.folder} at step {step}")
            self.budget.load(record["budget"])
            self.step = self.saved_step = step
            self.scored_step = -1 if record["score"] is None else step
        for path in self.logs if hosts.index == 0 else []:  # [1 2 3 {"st], saved 2 -> [1 2]
            rows = [row for row in disk.good_rows(path, step=int) if row["step"] <= self.saved_step]
            with disk.writing(path):
                disk.replace_file(path, disk.to_jsonl(rows))
        return saved

    def report(self) -> None:
        """Write report.html; whatever fails in it, the run goes on."""
        began = time.monotonic()
        try:
            import report  # here: it stands below this file, and a run can do without it

            report.main(report.Config((str(self.folder),)))
        except Exception as error:
            terminal.say(f"no report of {self.folder}: {error!r}")
        self.report_due = time.monotonic() + 100 * (time.monotonic() - began)  # 1 % of the time
