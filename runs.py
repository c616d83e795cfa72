"""The run folder that every script shares: metrics, samples, checkpoints, resume, time budget.

    runs/NAME/
        config.json           the resolved config, and under `code` the versions it last ran with
        metrics.jsonl         one object a step; keys ending in _s or holding per_s are timings
        samples.jsonl         prompt, completion, every reward component
        checkpoints/step_N/   the state after N updates: what `write_model` wrote (the adapter),
                              resume/ (arrays and counters), manifest.json (the sha256 of each)
        final/                what `--adapter` takes
        report.html           what report.py makes of the files above, now and then and at the end

Steps count from 1, so step_N is saved after line N of metrics.jsonl. Everything is written under a
temporary name and renamed, so a kill at any moment leaves the old file or the new one. Resuming
cuts the lines after the checkpoint: the files of a resumed run equal those of an uninterrupted one,
timings aside. What is wrong in a folder is said in one line that names the path.
"""

import contextlib
import dataclasses
import fcntl
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import queue
import re
import shutil
import signal
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import hosts

# Imports keep the CPU busy, so the CPU time used so far is nearly the age of the process. But the
# kernel of a notebook may be hours old: a run in it counts from its own beginning.
STARTED = None if "ipykernel" in sys.modules else time.monotonic() - time.process_time()


# ---------------------------------------------------------------------------- environment

def check_jax(version: str | None = None) -> None:
    """Stop on a JAX older than 0.10 with the command that upgrades it for the accelerator here.

    The accelerator is read off the installed packages: starting a backend to ask it could hang.
    jax[tpu] brings the libtpu that fits; either one upgraded alone would not start.
    """
    version = version or metadata.version("jax")
    if tuple(int(n) for n in re.findall(r"\d+", version)[:2]) >= (0, 10):
        return
    extras = {"libtpu": "[tpu]", "jax_cuda13_plugin": "[cuda13]", "jax_cuda12_plugin": "[cuda12]"}
    extra = next((extra for name, extra in extras.items() if importlib.util.find_spec(name)), "")
    package = f'"jax{extra}>=0.10,<0.13"'  # what this was tried on
    then = ", then restart the kernel" * ("ipykernel" in sys.modules)
    raise SystemExit(f"JAX {version} is too old, 0.10 is needed: pip install -U {package}{then}")


def compilation_cache() -> str | None:
    """Keep compiled programs on disk; call it before the first jit. Returns the folder, or None.

    A first compile takes minutes on a TPU, and a resumed session should not pay it twice.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/jax-programs"
    if "://" not in folder:  # a bucket is JAX's to open
        try:
            folder = str(Path(folder).expanduser())
            os.makedirs(folder, exist_ok=True)
            tempfile.TemporaryFile(dir=folder).close()
        except (OSError, RuntimeError) as error:
            say(f"no compilation cache, every start compiles again: {error}")
            return None
    jax.config.update("jax_compilation_cache_dir", folder)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)
    return folder


def say(line: str) -> None:
    """Print to stderr without tearing the progress bar; of several hosts the first."""
    if hosts.index == 0:
        tqdm.write(line, file=sys.stderr)


# ---------------------------------------------------------------------------- faults


def one_line(main: Callable) -> Callable:
    """Decorates a script's main(config): what is no fault of the program ends it in one line.

    SIGTERM and Ctrl-C too, where no Run is open that finishes its step first.
    """

    @functools.wraps(main)
    def call(config):
        def stop(number, frame):
            name = signal.Signals(number).name
            raise SystemExit(f"stopped by {name}: the same command continues {config.out}")

        with contextlib.ExitStack() as stack:
            _handle_signals(stack, stop)
            try:
                return main(config)
            except RuntimeError as error:  # as XLA's are
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                said = str(error).splitlines()[0]
                raise SystemExit(f"out of memory: {_lower(config, error)} ({said})") from error
            except FloatingPointError as error:
                raise SystemExit(f"{error}: are the weights or the adapter damaged?") from error
            except KeyboardInterrupt:  # the second Ctrl-C of a Run, which did not want to wait
                raise SystemExit(f"interrupted: the same command continues {config.out}") from None

    return call


def _handle_signals(stack: contextlib.ExitStack, handler: Callable) -> None:
    """SIGTERM and Ctrl-C call the handler until the stack unwinds."""
    if threading.current_thread() is threading.main_thread():  # Python allows no other
        for number in (signal.SIGTERM, signal.SIGINT):
            before = signal.signal(number, handler)
            stack.callback(signal.signal, number, before or signal.SIG_DFL)


def _lower(config: Any, error: BaseException) -> str:
    """Which flags need less memory, by the function of ours that ran out of it."""
    names = [frame.f_code.co_qualname for frame, _ in traceback.walk_tb(error.__traceback__)]
    there = lambda *flags: [f for f in flags if hasattr(config, f.replace("-", "_"))]
    if any(name.startswith("OnMesh.") for name in names):
        return "take a smaller --judge"
    if any(name.startswith("Sampler.") for name in names):
        return "lower --" + " or --".join(there("slots", "eval-accuracy", "max-new"))
    if there("micro-rows"):
        return "lower --micro-rows, or take --remat layer or --shard yes"
    return "take --dtype bfloat16 or a smaller --model"


# ---------------------------------------------------------------------------- time budget


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
    """The share of the run that is done: by steps, by the clock, or whichever is further.

    With a limit the share follows the clock, p = p0 + (1 - p0) · elapsed / (limit - reserve): p0 is
    the share in the checkpoint, elapsed counts this session alone, and the reserve leaves time to
    finish the step under way, evaluate, save a checkpoint and write final/. `start` is the clock
    reading the session counts from: a script passes STARTED, a notebook leaves it at now.
    """

    def __init__(self, steps: int | None = None, limit_s: float | None = None,
                 clock: Callable[[], float] = time.monotonic, start: float | None = None,
                 needs: tuple[str, ...] = ("step", "save")):
        self.steps, self.limit_s, self.clock, self.needs = steps, limit_s, clock, needs
        self.last = clock()
        self.elapsed_s = 0.0 if start is None else max(0.0, self.last - start)
        self.p = self.clock_p = self.clock_p0 = 0.0
        self.longest_s: dict[str, float] = {}  # of a step, a save, an evaluation
        self.n_readings, self.read_s, self.pace_from = 0, 0.0, (0.0, 0.0)
        self.apart_s = 0.0  # measured apart since the last reading, so not part of a step

    def now_s(self) -> float:
        """Seconds of this session; a clock set back stands still for one reading, then goes on."""
        reading = self.clock()
        self.elapsed_s += max(0.0, reading - self.last)
        self.last = reading
        return self.elapsed_s

    @contextlib.contextmanager
    def measure(self, kind: str):
        """Time what must also fit in at the end: "save" (Run does it) or "eval"."""
        begin = self.now_s()
        yield
        took = self.now_s() - begin
        self.apart_s += took
        self.longest_s[kind] = max(took, self.longest_s.get(kind, 0.0))

    def reserve_s(self) -> float:
        """Seconds kept back before the limit; 5 % of it until everything needed was measured."""
        parts = {"step": 1, "eval": 1, "save": 2}  # final/ costs about another save
        measured = 1.25 * sum(n * self.longest_s.get(kind, 0.0) for kind, n in parts.items())
        guessed = any(kind not in self.longest_s for kind in self.needs)
        return max(measured, 0.05 * self.limit_s) if guessed else measured

    def progress(self, step: int) -> float:
        """The share p done after `step` updates, 1 at the end; call it once between two steps.

        Step + 1 uses this p for its schedule and step_N holds it, so a resumed run goes on from it.
        """
        now = self.now_s()
        if self.n_readings > 1:  # the first step of a session compiles: no measure of the others
            took = now - self.read_s - self.apart_s
            self.longest_s["step"] = max(took, self.longest_s.get("step", 0.0))
        self.n_readings, self.read_s, self.apart_s = self.n_readings + 1, now, 0.0
        self.p = 0.0
        if self.steps is not None:
            self.p = min(1.0, step / self.steps) if self.steps > 0 else 1.0
        if self.limit_s is not None:
            share = now / max(self.limit_s - self.reserve_s(), 1e-9)
            p = self.clock_p0 + (1 - self.clock_p0) * share if share < 1 else 1.0
            self.clock_p = max(p, self.clock_p)
            self.p = max(self.p, self.clock_p)
        if self.n_readings <= 2:
            self.pace_from = now, self.p
        return self.p

    def eta_s(self) -> float | None:
        """Seconds to p = 1: what the clock leaves, with --steps the pace since the first step."""
        if self.steps is None and self.limit_s is not None:
            return max(0.0, self.limit_s - self.reserve_s() - self.elapsed_s)
        since_s, p = self.pace_from
        return (self.read_s - since_s) * (1 - self.p) / (self.p - p) if self.p > p else None

    def state(self) -> dict:
        """What a checkpoint holds; without a limit nothing that depends on the clock."""
        if self.limit_s is None:
            return {"p": self.p}
        return {"p": self.p, "clock_p": self.clock_p, "longest_s": self.longest_s}

    def load(self, state: dict) -> None:
        """Go on from a checkpoint; a limit beside --steps must not end a run whose steps grew."""
        p0 = state["p"] if self.steps is None else state.get("clock_p", 0.0)
        self.p, self.clock_p, self.clock_p0 = state["p"], p0, p0
        for kind, took in state.get("longest_s", {}).items():
            self.longest_s[kind] = max(took, self.longest_s.get(kind, 0.0))


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def _writing(path: Path):
    """A disk that is full or read-only stops the run with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SystemExit(f"cannot write {path}: {why}; make room or choose another --out; the "
                         "checkpoints are intact") from error


@contextlib.contextmanager
def lock(folder: Path):
    """One process at a time in a folder; at any death the kernel unlocks it."""
    with contextlib.ExitStack() as stack:
        with _writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a+"))
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{folder} is in use by process {file.read()}: stop that one, or "
                             "choose another folder with --out") from None
        with _writing(folder):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _fsync(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def _replace(path: Path, content: bytes) -> None:
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_bytes(content)
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """Write a JSON file at once: a reader or a crash meets the old file or the new one."""
    _replace(Path(path), (json.dumps(_plain(value), indent=2) + "\n").encode())


def _plain(value):
    """Plain Python for JSON, which has no NaN and no infinity: those become null."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if hasattr(value, "tolist"):
        return _plain(np.asarray(value).tolist())
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    return value if value is None or isinstance(value, bool | int | str) else str(value)


def _cut(path: Path, last: int) -> None:
    """Drop the lines of steps after `last` and a torn one: [1 2 3 {"st], last 2 -> [1 2]."""
    kept = []
    for line in path.read_bytes().splitlines():
        with contextlib.suppress(ValueError, KeyError, TypeError):
            if json.loads(line)["step"] <= last:
                kept.append(line + b"\n")
    _replace(path, b"".join(kept))


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def verify(directory: Path) -> str | None:
    """Why a checkpoint or a final/ cannot be trusted, or None: every file against the manifest."""
    try:
        manifest = json.loads((directory / "manifest.json").read_bytes())
        if manifest["name"] != directory.name:
            return f"it was saved as {manifest['name']}"
        for name, sha256 in manifest["sha256"].items():
            if _sha256(directory / name) != sha256:
                return f"{name} has changed since it was saved"
    except FileNotFoundError as error:
        return f"{Path(error.filename).relative_to(directory)} is missing"
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        return f"manifest.json cannot be read: {error!r}"
    return None


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, seal it with a manifest, rename it to `target`."""
    temporary, old = (target.with_name(f"{word}-{target.name}") for word in ("tmp", "old"))
    try:
        with _writing(target):
            temporary.mkdir()
            write(temporary)
            files = sorted(path for path in temporary.rglob("*") if path.is_file())
            files = {path.relative_to(temporary).as_posix(): _sha256(path) for path in files}
            write_json(temporary / "manifest.json", {"name": target.name, "sha256": files})
            for path in [*temporary.rglob("*"), temporary]:
                _fsync(path)
            if target.exists():  # a folder cannot replace a folder; _tidy undoes a kill in between
                os.rename(target, old)
            os.rename(temporary, target)
            _fsync(target.parent)
    finally:
        _tidy(target.parent)


def _tidy(folder: Path) -> None:
    """Remove what an interrupted write left, and put back what it was about to replace."""
    for old in folder.glob("old-*"):
        target = old.with_name(old.name.removeprefix("old-"))
        if not target.exists():
            os.rename(old, target)
    for left in [*folder.glob("tmp-*"), *folder.glob("old-*")]:
        if left.is_dir():
            shutil.rmtree(left, ignore_errors=True)
        else:
            left.unlink(missing_ok=True)


def _named(tree) -> dict[str, Any]:
    """Leaves by path: {"opt_state": (ScaleByAdamState(mu=...),)} -> {"opt_state/0/mu": ...}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    named = {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}
    assert len(named) == len(leaves), "two leaves share a name"
    return named


def _fill(like, named: dict[str, np.ndarray], source: Path):
    """Put the named arrays into the structure of `like`, whose shapes and dtypes must be theirs."""
    wanted = _named(like)
    for name in sorted({*wanted, *named}):
        sides = (side.get(name) for side in (wanted, named))
        a, b = ("nothing" if x is None else f"{x.shape} {x.dtype}" for x in sides)
        if a != b:
            raise ValueError(f"{source}: {name}: expected {a}, found {b}")
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in wanted])


# ---------------------------------------------------------------------------- optional loggers

LOGGERS = ("wandb", "tensorboard")


class _Reporter:
    """A logger behind a bounded queue in its own thread: a run never waits for it or dies of it."""

    def __init__(self, *arguments):
        self.lines = queue.Queue(maxsize=256)
        self.thread = threading.Thread(target=self._work, args=arguments, daemon=True)
        self.thread.start()

    def _work(self, name, folder, config):
        try:
            if name == "wandb":
                import wandb

                wandb.init(name=folder.name, dir=str(folder), config=config)
                write, close = lambda step, numbers: wandb.log(numbers, step=step), wandb.finish
            else:
                from tensorboard.summary import Writer

                writer = Writer(str(folder / "tensorboard"))
                one, close = writer.add_scalar, writer.close
                write = lambda step, numbers: [one(k, v, step) for k, v in numbers.items()]
            while (item := self.lines.get()) is not None:
                write(*item)
            close()
        except Exception as error:  # a logger may fail in any way and never stops a run
            say(f"{name} is off for the rest of the run: {error!r}")

    def put(self, step: int, metrics: dict):
        with contextlib.suppress(queue.Full):  # hung, slow or off: metrics.jsonl has the line
            self.lines.put_nowait((step, metrics))

    def close(self, patience_s: float = 5.0):
        if self.thread.is_alive():
            with contextlib.suppress(queue.Full):
                self.lines.put(None, timeout=patience_s)
            self.thread.join(patience_s)


# ---------------------------------------------------------------------------- the run


class Saved(NamedTuple):
    step: int
    arrays: Any  # numpy, in the structure asked for
    state: dict


class Run(contextlib.ExitStack):
    """One open run folder, locked against a second process.

    `may_change` names the config fields a resumed run may give anew. `keep` checkpoints stay, and
    the one with the best score. `show` are the metrics on the progress line (a dict: with labels),
    `every_s` its period where stderr is no terminal; 0: a line for every step, anywhere. Where the
    main thread opens it, SIGTERM or Ctrl-C sets `stopping`. Of several hosts the first alone has
    the folder and the clock; the others' calls take part and write nothing.
    """

    def __init__(self, out: str | Path, config: Any, may_change: Iterable[str] = (),
                 budget: Budget | None = None, keep: int = 2, report_to: Iterable[str] = (),
                 show: dict[str, str] | tuple[str, ...] = ("loss", "tokens_per_s"),
                 every_s: float = 30.0):
        super().__init__()  # what is undone at the end, or by a failure below
        self.folder, self.budget = Path(out), budget or Budget()
        self.keep, self.every_s = keep, every_s
        self.show = show if isinstance(show, dict) else {name: name for name in show}
        self.step: int | None = None  # of the last line logged; None until restore()
        self.asked = self.stopping = ""  # to stop: this process; all of them
        self.bar, self.refused, self.writes = None, set(), hosts.index == 0
        self.shown, self.shown_at, self.report_due = 0, 0.0, time.monotonic() + 60
        config = _plain(dataclasses.asdict(config) if dataclasses.is_dataclass(config) else config)
        for name in report_to:
            if name not in LOGGERS:
                raise ValueError(f"--report-to {name}: choose from {', '.join(LOGGERS)}")
            if importlib.util.find_spec(name) is None:
                raise SystemExit(f"--report-to {name}: not installed; pip install {name}")
        try:
            if self.writes:
                self._open(config, {*may_change, *hosts.FLAGS})
            names = report_to if self.writes else ()
            self.reporters = [_Reporter(name, self.folder, config) for name in names]
            for reporter in self.reporters:
                self.callback(reporter.close)
            _handle_signals(self, self._on_signal)
            if self.writes:
                self.callback(self.report)  # first of all, however the run ends
        except BaseException:
            self.close()
            raise

    def _open(self, config, may_change):
        self.enter_context(lock(self.folder))
        with _writing(self.folder):
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            _tidy(self.folder)
            _tidy(self.folder / "checkpoints")
            self._check_config(config, may_change)

    def _check_config(self, config, may_change):
        path = self.folder / "config.json"
        try:  # before the first checkpoint there is nothing to resume, so nothing to compare
            old = json.loads(path.read_bytes()) if self.checkpoints() else config
        except (OSError, ValueError) as error:
            raise SystemExit(f"{path} of a run to resume cannot be read: {error}; put it back, or "
                             "choose another --out") from error
        for field in sorted({*old, *config} - may_change - {"code"}):
            was, now = old.get(field, "absent"), config.get(field, "absent")
            if was != now:
                raise SystemExit(f"--{field.replace('_', '-')} was {was!r} when {self.folder} was "
                                 f"begun, now it is {now!r}: put it back, or choose another "
                                 "--out")
        code = {"python": platform.python_version(), "jax": jax.__version__,
                "device": jax.devices()[0].device_kind, "n_devices": jax.device_count(),
                "n_processes": hosts.count}
        write_json(path, config | {"code": code})

    def _on_signal(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if hosts.count == 1:
            self.stopping = self.asked
        with contextlib.suppress(OSError):  # not print(): it may be what was interrupted
            os.write(2, f"\n{self.asked}: finishing this step, then saving\n".encode())

    def progress(self, step: int) -> float:
        """budget.progress(step), the same on all hosts: by the clock of the first.

        A signal that any of them got since the last call now sets `stopping` on all.
        """
        everyone = hosts.everyone((self.budget.progress(step), self.asked))
        self.budget.p = everyone[0][0]
        self.stopping = next((asked for _, asked in everyone if asked), "")
        return self.budget.p

    def stop(self) -> None:
        """End a run that was told to stop, after its last save, with a line on how to go on."""
        newest = hosts.everyone(max(self.checkpoints(), default=(0, None))[0])[0]
        raise SystemExit(f"stopped by {self.stopping} at step {newest} of {self.folder}: the same "
                         "command continues from there")

    # -------------------------------- what a step leaves

    def log(self, step: int, metrics: dict) -> None:
        """Append the line of a step to metrics.jsonl, show it, and pass it to the loggers."""
        metrics = _plain(metrics)
        self._append("metrics.jsonl", step, [metrics])
        self.step = max(step, self.step)
        if not self.writes:
            return
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        for reporter in self.reporters:
            reporter.put(step, numbers)
        self._show(step, numbers)

    def log_samples(self, step: int, rows: Iterable[dict]) -> None:
        """Append rows (prompt, completion, reward components) to samples.jsonl."""
        self._append("samples.jsonl", step, [_plain(row) for row in rows])

    def _append(self, name, step, rows):
        assert self.step is not None, "call restore() before the first step"
        if not self.writes:
            return
        lines = "".join(json.dumps({"step": step} | row, ensure_ascii=False) + "\n" for row in rows)
        with _writing(self.folder / name), open(self.folder / name, "ab") as file:
            file.write(lines.encode(errors="backslashreplace"))  # half a surrogate pair: its escape

    def _show(self, step, metrics):
        steps, eta = self.budget.steps, self.budget.eta_s()
        shown = [f"{label} {metrics[k]:.4g}" for k, label in self.show.items() if k in metrics]
        head = f"step {step}" + (f"/{steps}" if steps else "")
        left = "" if eta is None else f"{tqdm.format_interval(eta)} left"
        line = "  ".join(filter(None, [head, *shown, left]))
        terminal = sys.stderr.isatty()
        if terminal:
            if self.bar is None:
                self.bar = tqdm(total=100, bar_format="{percentage:3.0f}%|{bar:20}| {desc}")
                self.callback(self.bar.close)
            self.bar.n = 100 * self.budget.p
            self.bar.set_description_str(f"{head}  {left}" if self.every_s == 0 else line)
        self.shown += 1
        due = self.shown <= 3 or time.monotonic() - self.shown_at >= self.every_s
        if shown and (self.every_s == 0 or (due and not terminal)):
            say(line)
            self.shown_at = time.monotonic()

    def check_finite(self, step: int, metrics: dict, batch: Any) -> None:
        """Stop on a NaN or infinite loss or grad_norm, with the batch in nan_step_N.npz."""
        read = {k: float(metrics[k]) for k in ("loss", "grad_norm") if metrics.get(k) is not None}
        if np.isfinite([*read.values()]).all():
            return
        path = self.folder / f"nan_step_{step}.npz"
        if self.writes:
            with _writing(path):
                np.savez(path, **_named(jax.device_get(batch)))
        said = ", ".join(f"{name} is {value}" for name, value in read.items())
        raise SystemExit(f"step {step} of {self.folder}: {said}; the batch is in {path}")

    # -------------------------------- checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory), oldest first, without the ones restore() refused."""
        return sorted(
            (int(path.name[5:]), path)
            for path in (self.folder / "checkpoints").glob("step_*")
            if path.name[5:].isdigit() and path.name not in self.refused
        )

    def best(self) -> Path | None:
        """The checkpoint with the highest score, the newer of two equals; None without scores."""
        scored = []
        for step, directory in self.checkpoints():
            with contextlib.suppress(OSError, ValueError, KeyError):
                score = json.loads((directory / "resume/state.json").read_bytes())["score"]
                scored += [(score, step, directory)] if score is not None else []
        return max(scored)[-1] if scored else None

    def save(self, step: int, arrays: Any, state: dict,
             write_model: Callable[[Path | None], None] = lambda folder: None,
             score: float | None = None) -> Path:
        """Write checkpoints/step_N, all of it or nothing; log step N before.

        `arrays` is any pytree of arrays (an optimizer state too), `state` is JSON, `write_model`
        writes the adapter into the directory it is given, a higher `score` is better. All hosts
        call it: what is split over them is gathered, and write_model(None) gathers and no more.
        """
        assert self.step is not None and self.step >= step, f"log step {step} before saving it"
        target = self.folder / "checkpoints" / f"step_{step}"
        arrays = hosts.whole(arrays)
        record = {"score": _plain(score), "state": state, "budget": self.budget.state()}

        def write(directory):
            write_model(directory)
            # A folder of their own: whoever loads *.safetensors as the model must not find these.
            (directory / "resume").mkdir()
            # safetensors 0.8 writes the wrong bytes for an array that is not in C order
            named = _named(jax.device_get(arrays))
            named = {name: np.asarray(leaf, order="C") for name, leaf in named.items()}
            save_file(named, directory / "resume/arrays.safetensors")
            (directory / "resume/state.json").write_text(json.dumps(record, indent=2) + "\n")

        with self.budget.measure("save"):
            if not self.writes:
                write_model(None)
                return target
            with _writing(self.folder):
                for path in self.folder.glob("*.jsonl"):  # not behind the checkpoint, ever
                    _fsync(path)
            _publish(target, write)
            self.refused.discard(target.name)
            newest = self.checkpoints()[-max(1, self.keep) :]  # the last one in any case
            kept = {path for _, path in newest} | {self.best()}
            for path in {path for _, path in self.checkpoints()} - kept:
                with contextlib.suppress(OSError):  # renamed first: never half a checkpoint
                    shutil.rmtree(path.rename(path.with_name(f"tmp-{path.name}")))
            if time.monotonic() >= self.report_due:
                self.report()
        return target

    def restore(self, like: Any) -> Saved | None:
        """The newest valid checkpoint in the structure of `like`, or None; cuts the later lines.

        `like` holds arrays or ShapeDtypeStructs; a leaf that differs is a ValueError. Call it
        before the first step of every run, so that a fresh start begins with empty files.
        """
        saved = record = None
        for step, directory in reversed(self.checkpoints() if self.writes else []):
            reason = verify(directory)
            if reason is None:
                record = json.loads((directory / "resume/state.json").read_bytes())
                named = load_file(directory / "resume/arrays.safetensors")
                saved = Saved(step, _fill(like, named, directory), record["state"])
                say(f"resuming {self.folder} at step {step}")
                break
            self.refused.add(directory.name)
            say(f"refused {directory}: {reason}; trying the checkpoint before it")
        else:
            if self.refused:
                say(f"no valid checkpoint in {self.folder}: starting again at step 0")
        if self.writes:
            with _writing(self.folder):
                for path in self.folder.glob("*.jsonl"):
                    _cut(path, saved.step if saved else -1)
        if hosts.count > 1:  # only the first has read the folder
            arrays = like if saved is None else saved.arrays
            saved, record = hosts.everyone((saved and saved._replace(arrays=None), record))[0]
            saved = saved and saved._replace(arrays=hosts.told(arrays))
        if saved is not None:
            self.budget.load(record["budget"])
        self.step = saved.step if saved else 0
        return saved

    def report(self) -> None:
        """Write report.html; whatever fails in it, the run goes on."""
        began = time.monotonic()
        try:
            import report  # here: it stands below this file, and a run can do without it

            if self.step is not None:
                report.main(report.Config((str(self.folder),)))
        except Exception as error:
            say(f"no report of {self.folder}: {error!r}")
        self.report_due = time.monotonic() + 100 * (time.monotonic() - began)  # 1 % of the time

    def finish(self, write_model: Callable[[Path | None], None]) -> Path:
        """Write final/, all of it or nothing, in place of an earlier one."""
        with self.budget.measure("save"):
            if self.writes:
                _publish(self.folder / "final", write_model)
            else:
                write_model(None)
        hosts.everyone(None)  # nobody leaves before it is there
        say(f"done: {self.folder / 'final'}")
        return self.folder / "final"
