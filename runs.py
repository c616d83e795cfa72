"""The run folder that every script shares: metrics, samples, checkpoints, resume, time budget.

    runs/NAME/
        config.json           the resolved config, and under `code` the versions it last ran with
        metrics.jsonl         one object a step; keys ending in _s or holding per_s are timings
        samples.jsonl         prompt, completion, every reward component
        checkpoints/step_N/   the state after N updates: what `write_model` wrote (the adapter),
                              resume/ (arrays and counters), manifest.json (the sha256 of each)
        final/                what `--adapter` takes
        report.html           what report.py makes of the files above, now and then and at the end

A training script uses it so:

    with runs.Run(config) as run:
        saved = run.restore(arrays)            # the newest valid checkpoint, or None
        while (p := run.progress(step)) < 1 and not run.stopping:
            ...                                # one update, step += 1
            run.log(step, metrics)
            if run.due(config.save_every, step):
                run.save(step, arrays, state, write_model)
        return run.end(step, save, evaluate, write_model)

1. Steps count from 1, so step_N is saved after line N of metrics.jsonl.
2. Every file is written under a temporary name and renamed, so a kill at any moment leaves the old
   file or the new one.
3. Resuming cuts the lines after the checkpoint, so the files of a resumed run equal those of an
   uninterrupted one, timings aside.
4. A folder that no run began is refused. In a run's folder only the names above are ever cut,
   replaced or deleted; other files in it are left alone.
5. Every error about a folder is one line that names the path.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import platform
import re
import shutil
import signal
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import hosts

try:
    import fcntl
except ImportError:  # Windows: two processes in one folder are not noticed there
    fcntl = None

# Imports keep the CPU busy, so the CPU time used so far is nearly the age of the process. But the
# kernel of a notebook may be hours old: a run in it counts from its own beginning.
STARTED = None if "ipykernel" in sys.modules else time.monotonic() - time.process_time()

# The flags that cannot change a result. All others must stay as they were when a run is resumed.
MAY_CHANGE = {
    "steps", "time_limit", "save_every", "eval_every",  # how long, and what is saved and measured
    "out", "keep", "report_to", "show", "show_every", "log_samples", "plan",  # where, what is shown
    "micro_rows", "slots", "remat", "shard",  # memory
    "reward_threads", "reward_timeout", "max_missing",  # rewards
    "judge_threads", "judge_limit", "judge_missing",
    *hosts.FLAGS,
}


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


def compilation_cache() -> None:
    """Keep compiled programs on disk; call it before the first jit.

    A first compile takes minutes on a TPU, and a resumed session should not pay it twice. Where
    the folder cannot be written, JAX warns and compiles again.
    """
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/jax-programs"
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", -1)


# All controls but \n, \t and colours, what reorders or hides text, and halves of surrogate pairs.
_CONTROLS = re.compile(
    "(\x1b\\[[0-9;]*m)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def say(line: str) -> None:
    """Print to stderr without tearing the progress bar; of several hosts the first alone does.

    A completion must not drive the terminal: "\\x1b[2J" is spelled out, and a colour ends.
    """
    if hosts.index == 0:
        line = _CONTROLS.sub(lambda m: m[1] or m[0].encode("unicode_escape").decode(), line)
        with contextlib.suppress(OSError):  # the terminal may be gone: the run must still be saved
            tqdm.write(line + "\x1b[0m" * ("\x1b" in line), file=sys.stderr)


# ---------------------------------------------------------------------------- faults

MEMORY = {  # the flags that lower a script's memory, for those whose config has them
    "slots": "lower --slots", "micro_rows": "lower --micro-rows", "remat": "take --remat layer",
    "shard": "take --shard yes", "plan": "see what fits with --plan",
}
BROKEN = "Gloo|UNAVAILABLE"  # in XLA's error when a collective loses another process


def one_line(main: Callable) -> Callable:
    """Decorates a script's main(config): a fault of the machine or the user ends it in one line.

    So do signals, unless a Run is open, which finishes its step first.
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
            except RuntimeError as error:  # XLA's errors are RuntimeErrors
                first = (str(error).splitlines() or [""])[0]
                if "RESOURCE_EXHAUSTED" in str(error):
                    advice = ", ".join(MEMORY[name] for name in MEMORY if hasattr(config, name))
                    raise SystemExit(f"out of memory: {advice} ({first})") from error
                if hosts.count > 1 and re.search(BROKEN, str(error)):
                    raise SystemExit(
                        f"process {hosts.index} of {hosts.count}: another process ended or was "
                        "lost, its own output says why; the same command on every host continues "
                        f"from the last checkpoint ({first})") from error
                raise
            except FloatingPointError as error:
                raise SystemExit(f"{error}: are the weights or the adapter damaged?") from error
            except KeyboardInterrupt:  # a second Ctrl-C, which does not wait for the step
                raise SystemExit(f"interrupted: the same command continues {config.out}") from None

    return call


def _handle_signals(stack: contextlib.ExitStack, handler: Callable) -> None:
    """Let the handler have SIGTERM, Ctrl-C and a closed terminal until the stack unwinds."""
    if threading.current_thread() is not threading.main_thread():  # Python allows no other
        return
    for name in ("SIGTERM", "SIGINT", "SIGHUP"):
        number = getattr(signal, name, None)
        if number is None:  # Windows has no SIGHUP
            continue
        before = signal.signal(number, handler)
        stack.callback(signal.signal, number, before or signal.SIG_DFL)
        if name == "SIGHUP" and before == signal.SIG_IGN:  # nohup
            signal.signal(number, before)


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
    reading that the session counts from; None: now.
    """

    def __init__(self, steps: int | None = None, limit_s: float | None = None,
                 clock: Callable[[], float] = time.monotonic, start: float | None = None):
        self.steps, self.limit_s, self.clock = steps, limit_s, clock
        self.start = clock() if start is None else start
        self.p = self.clock_p = self.clock_p0 = 0.0
        self.longest_s: dict[str, float] = {}  # of a step, a save, an evaluation
        self.n_readings, self.read_s, self.pace_from = 0, 0.0, (0.0, 0.0)
        self.apart_s = 0.0  # measured apart since the last reading, so not part of a step

    def now_s(self) -> float:
        """Seconds of this session."""
        return self.clock() - self.start

    @contextlib.contextmanager
    def measure(self, kind: str):
        """Time a "save" (Run does it) or an "eval": each must also fit in at the end."""
        begin = self.now_s()
        yield
        took = self.now_s() - begin
        self.apart_s += took
        self.longest_s[kind] = max(took, self.longest_s.get(kind, 0.0))

    def reserve_s(self) -> float:
        """Seconds kept back before the limit; at least 5 % of it until every part was measured."""
        parts = {"step": 1, "eval": 1, "save": 2}  # final/ costs about another save
        measured = 1.25 * sum(n * self.longest_s.get(kind, 0.0) for kind, n in parts.items())
        return measured if self.longest_s.keys() >= {*parts} else max(measured, 0.05 * self.limit_s)

    def progress(self, step: int) -> float:
        """The share p done after `step` updates, 1 at the end; call it once between two steps.

        Step + 1 uses this p for its schedule and step_N holds it, so a resumed run goes on from it.
        """
        now = self.now_s()
        if self.n_readings > 1:  # the first step of a session also compiles, so it is left out
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
        """Seconds to p = 1: what the clock leaves, or with steps by the pace since the first."""
        if self.steps is None and self.limit_s is not None:
            return max(0.0, self.limit_s - self.reserve_s() - self.now_s())
        since_s, p = self.pace_from
        return (self.read_s - since_s) * (1 - self.p) / (self.p - p) if self.p > p else None

    def state(self) -> dict:
        """What a checkpoint holds; without a limit nothing that depends on the clock."""
        if self.limit_s is None:
            return {"p": self.p}
        return {"p": self.p, "clock_p": self.clock_p, "longest_s": self.longest_s}

    def load(self, state: dict) -> None:
        """Go on from a checkpoint; with steps and a limit, p0 is the clock's share alone, so that a
        finished run whose --steps grew goes on."""
        p0 = state["p"] if self.steps is None else state.get("clock_p", 0.0)
        self.p, self.clock_p, self.clock_p0 = state["p"], p0, p0
        for kind, took in state.get("longest_s", {}).items():
            self.longest_s[kind] = max(took, self.longest_s.get(kind, 0.0))


# ---------------------------------------------------------------------------- files


@contextlib.contextmanager
def writing(path: Path):
    """A disk that is full or read-only stops the script with one line."""
    try:
        yield
    except (OSError, SafetensorError) as error:
        why = getattr(error, "strerror", None) or error
        raise SystemExit(f"cannot write {path}: {why}; make room or choose another --out; the "
                         "checkpoints are intact") from error


def _fsync(path: Path) -> None:
    if os.name == "nt":  # Windows opens no folder, and syncs no file that was opened to read
        return
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader or a crash meets the old content or the new one."""
    temporary = path.with_name(f"tmp-{path.name}")
    temporary.write_bytes(content)
    _fsync(temporary)
    os.replace(temporary, path)
    _fsync(path.parent)


def write_json(path: str | Path, value: Any) -> None:
    """replace_file() with a value as JSON."""
    replace_file(Path(path), (json.dumps(_plain(value), indent=2) + "\n").encode())


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


def to_jsonl(rows: Iterable[dict]) -> bytes:
    """One line for each row, in UTF-8; half a surrogate pair becomes its escape."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace")


def _parse(line: bytes) -> dict | ValueError:
    try:
        row = json.loads(line.decode("utf-8-sig"))
    except (ValueError, RecursionError) as error:  # of JSON or UTF-8; brackets nested too deep
        return ValueError(str(error))
    if isinstance(row, dict):
        return row
    return ValueError(f"expected a JSON object, found {type(row).__name__}")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, dict | ValueError]]:
    """(line number, object) for each line that is not blank.

    A line that is torn, not in UTF-8 or no JSON object comes as a ValueError that says why.
    """
    with open(path, "rb") as file:
        for n, line in enumerate(file, 1):
            if line.strip():
                yield n, _parse(line)


def good_rows(path: str | Path) -> list[dict]:
    """The objects of a JSONL file without its bad lines; none where there is no file."""
    rows = read_jsonl(path) if Path(path).exists() else ()
    return [row for _, row in rows if isinstance(row, dict)]


def _cut(path: Path, last: int) -> None:
    """Drop the lines of steps after `last` and a torn one: [1 2 3 {"st], last 2 -> [1 2]."""
    kept = []
    for line in path.read_bytes().split(b"\n"):
        row = _parse(line)
        if isinstance(row, dict) and isinstance(row.get("step"), int) and row["step"] <= last:
            kept.append(line + b"\n")
    replace_file(path, b"".join(kept))


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


# ---------------------------------------------------------------------------- folders

# What a write leaves when it is interrupted; nothing else that begins with tmp- or old- is ours.
_LEFT = re.compile(r"(tmp|old)-(config\.json|(metrics|samples|held_out)\.jsonl|final|step_\d+|"
                   r"\d+-report\.html)")


def claim(folder: Path, kind: str = "run") -> None:
    """End with a line unless a folder is new, empty, or begun by a script of this kind.

    Scripts call it before they touch the folder. write_config() records the kind. Kinds: "run" for
    training, else the name of what the folder holds.
    """
    with writing(folder):
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names <= {".lock", "tmp-config.json"}:  # what a start leaves that was killed
        return
    code = _read_config(folder).get("code")
    if not isinstance(code, dict):
        raise SystemExit(f"--out {folder} is not empty and holds no {kind} of this repository: "
                         "choose another --out; nothing in it was touched")
    if (holds := code.get("kind", "run")) != kind:
        raise SystemExit(f"--out {folder} is a folder of kind {holds!r}, not {kind!r}: choose "
                         "another --out; nothing in it was touched")


@contextlib.contextmanager
def lock(folder: Path):
    """One process at a time in a folder; at any death the kernel unlocks it."""
    with contextlib.ExitStack() as stack:
        with writing(folder):
            folder.mkdir(parents=True, exist_ok=True)
            file = stack.enter_context(open(folder / ".lock", "a+"))
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{folder} is in use by process {file.read()}: stop that one, or "
                             "choose another folder with --out") from None
        with writing(folder):
            file.truncate(0)
            file.write(str(os.getpid()))
            file.flush()
        yield


def _read_config(folder: Path) -> dict:
    path = folder / "config.json"
    try:
        return dict(json.loads(path.read_bytes())) if path.exists() else {}
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path} cannot be read: {error}; put it back, or choose another "
                         "--out") from error


def check_unchanged(folder: Path, config: Any, extra: dict | None = None,
                    may_change: Iterable[str] = ()) -> None:
    """End with a line if a flag that results depend on differs from those the folder began with.

    extra: facts beside the flags, under names with spaces: {"checksum of the weights": "3f.."}.
    may_change: further fields that may differ here, besides MAY_CHANGE.
    """
    old, new = _read_config(folder), _plain(dataclasses.asdict(config) | (extra or {}))
    for name in sorted({*old, *new} - MAY_CHANGE - {*may_change, "code"}):
        was, now = old.get(name, "absent"), new.get(name, "absent")
        if was != now:
            flag = name if " " in name else "--" + name.replace("_", "-")
            raise SystemExit(f"{flag} was {was!r} when {folder} was begun, now it is {now!r}: put "
                             "it back, or choose another --out")


def write_config(folder: Path, config: Any, extra: dict | None = None, kind: str = "run") -> None:
    """Write config.json: every flag, `extra`, and under `code` what claim() knows the folder by."""
    code = {"kind": kind, "python": platform.python_version(), "jax": jax.__version__,
            "device": jax.devices()[0].device_kind, "n_devices": jax.device_count(),
            "n_processes": hosts.count}
    write_json(folder / "config.json", dataclasses.asdict(config) | (extra or {}) | {"code": code})


def _publish(target: Path, write: Callable[[Path], None]) -> None:
    """Let `write` fill a temporary folder, seal it with a manifest, rename it to `target`."""
    temporary, old = (target.with_name(f"{word}-{target.name}") for word in ("tmp", "old"))
    try:
        with writing(target):
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
    left = [path for path in folder.glob("*") if _LEFT.fullmatch(path.name)]
    for path in left:
        target = path.with_name(path.name[4:])
        if path.name.startswith("old-") and not target.exists():
            os.rename(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


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


def _wandb(folder: Path, config: dict) -> tuple[Callable, Callable]:
    import wandb

    wandb.init(name=folder.name, dir=str(folder), config=config)
    return lambda step, numbers: wandb.log(numbers, step=step), wandb.finish


def _tensorboard(folder: Path, config: dict) -> tuple[Callable, Callable]:
    from tensorboard.summary import Writer

    writer = Writer(str(folder / "tensorboard"))

    def log(step, numbers):
        for name, value in numbers.items():
            writer.add_scalar(name, value, step)

    return log, writer.close


LOGGERS = {"wandb": _wandb, "tensorboard": _tensorboard}  # open(folder, config) -> (log, close)


# ---------------------------------------------------------------------------- the run


class Saved(NamedTuple):
    step: int
    arrays: Any  # numpy, in the structure asked for
    state: dict


class Run(contextlib.ExitStack):
    """One open run folder, locked against a second process.

    Of the config it takes out, steps, time_limit, keep (checkpoints that stay besides the best
    one) and report_to. `show` maps the metrics on the progress line to their labels; after the
    first three lines there is one every `every_s` seconds.

    A signal (SIGTERM, Ctrl-C, a closed terminal) sets `stopping`, if the main thread opened the
    run. Of several processes the first alone has the folder and the clock; the others make the
    same calls and write nothing.
    """

    def __init__(self, config: Any, show: dict[str, str] | None = None, every_s: float = 30.0):
        super().__init__()  # holds what is undone at the end, or by a failure below
        self.folder, self.keep, self.every_s = Path(config.out), config.keep, every_s
        self.show = {"loss": "loss"} if show is None else show
        self.budget = Budget(config.steps, parse_time(config.time_limit), start=STARTED)
        self.step: int | None = None  # of the last line logged; None until restore()
        self.saved_step = self.scored_step = -1  # of the newest checkpoint, and that with a score
        self.asked = self.stopping = ""  # the signal that asks to stop: this process, all of them
        self.refused, self.writes, self.loggers = set(), hosts.index == 0, {}
        self.shown, self.shown_at, self.report_due = 0, 0.0, time.monotonic() + 60
        names = [name for name in config.report_to.split(",") if name]
        for name in names:
            if name not in LOGGERS:
                raise ValueError(f"--report-to {name}: choose from {', '.join(LOGGERS)}")
            if importlib.util.find_spec(name) is None:
                raise SystemExit(f"--report-to {name}: not installed; pip install {name}")
        try:
            if self.writes:
                self._open(config)
                self._open_loggers(names, _plain(dataclasses.asdict(config)))
            _handle_signals(self, self._on_signal)
            if self.writes:
                self.callback(self.report)  # the first thing to happen, however the run ends
        except BaseException:
            self.close()
            raise

    def _open(self, config):
        claim(self.folder)
        self.enter_context(lock(self.folder))
        with writing(self.folder):
            _tidy(self.folder)
            _tidy(self.folder / "checkpoints")
            if self.checkpoints():  # before the first there is nothing to resume
                check_unchanged(self.folder, config)
            write_config(self.folder, config)  # before anything else: claim() looks for it
            (self.folder / "checkpoints").mkdir(exist_ok=True)

    def _open_loggers(self, names, config):
        self.callback(self._close_loggers)
        for name in names:
            if opened := self._tell(name, LOGGERS[name], self.folder, config):
                self.loggers[name] = opened

    def _close_loggers(self):
        for name, (_, close) in [*self.loggers.items()]:
            self._tell(name, close)

    def _tell(self, name, call, *arguments):
        try:
            return call(*arguments)
        except Exception as error:  # a logger may fail in any way and never stops a run
            self.loggers.pop(name, None)
            say(f"{name} is off for the rest of the run: {error!r}")

    def _on_signal(self, number, frame):
        if self.asked and number == signal.SIGINT:
            raise KeyboardInterrupt
        self.asked = signal.Signals(number).name
        if hosts.count == 1:
            self.stopping = self.asked
        with contextlib.suppress(OSError):  # not print(): it may be what was interrupted
            os.write(2, f"\n{self.asked}: finishing this step, then saving\n".encode())

    # -------------------------------- the loop

    def progress(self, step: int) -> float:
        """The share of the run done after `step` updates, 1 at the end; call it between two steps.

        All processes get the share of the first, by its clock. If any of them has got a signal
        since the last call, this call sets `stopping` on all.
        """
        everyone = hosts.everyone([self.budget.progress(step), self.asked])
        self.budget.p = everyone[0][0]
        self.stopping = next((asked for _, asked in everyone if asked), "")
        return self.budget.p

    def due(self, every: int, step: int) -> bool:
        """Whether step is a multiple of `every` (0: never), but not the last of --steps.

        end() evaluates and saves the last one.
        """
        last = self.budget.steps is not None and step >= self.budget.steps
        return every > 0 and step % every == 0 and not last

    def end(self, step: int, save: Callable[[float | None], Any], evaluate: Callable[[], float],
            write_model: Callable[[Path | None], None]) -> Path:
        """What follows the loop: a last evaluation, a checkpoint with its score, and final/.

        A run that was told to stop before its end saves only, and exits saying how to go on.
        """
        if self.budget.p < 1:
            if self.saved_step != step:  # saving again would drop the score
                save(None)
            self.stop()
        if self.scored_step != step:
            save(evaluate())
        return self.finish(write_model)

    def stop(self) -> None:
        """End a run that was told to stop, after its last save, with a line on how to go on."""
        newest = hosts.everyone(max(self.checkpoints(), default=(0, None))[0])[0]
        raise SystemExit(f"stopped by {self.stopping} at step {newest} of {self.folder}: the same "
                         "command continues from there")

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

    # -------------------------------- what a step leaves

    def log(self, step: int, metrics: dict) -> None:
        """Append the line of a step to metrics.jsonl, show it, and pass it to the loggers."""
        metrics = _plain(metrics)
        self._append("metrics.jsonl", step, [metrics])
        self.step = max(step, self.step)
        if not self.writes:
            return
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        for name, (log, _) in [*self.loggers.items()]:
            self._tell(name, log, step, numbers)
        self._show(step, numbers)

    def log_samples(self, step: int, rows: Iterable[dict]) -> None:
        """Append rows (prompt, completion, reward components) to samples.jsonl."""
        self._append("samples.jsonl", step, [_plain(row) for row in rows])

    def _append(self, name, step, rows):
        assert self.step is not None, "call restore() before the first step"
        if not self.writes:
            return
        with writing(self.folder / name), open(self.folder / name, "ab") as file:
            file.write(to_jsonl({"step": step} | row for row in rows))

    def _show(self, step, numbers):
        shown = [f"{label} {numbers[k]:.4g}" for k, label in self.show.items() if k in numbers]
        self.shown += 1
        due = self.shown <= 3 or time.monotonic() - self.shown_at >= self.every_s
        if not (shown and due):
            return
        self.shown_at = time.monotonic()
        steps, eta = self.budget.steps, self.budget.eta_s()
        head = f"step {step}" + (f"/{steps}" if steps else "")
        left = [] if eta is None else [f"{tqdm.format_interval(eta)} left"]
        say("  ".join([head, *shown, *left]))

    def check_finite(self, step: int, metrics: dict, batch: Any) -> None:
        """Stop on a NaN or infinite loss or grad_norm, with the batch in nan_step_N.npz."""
        read = {k: float(metrics[k]) for k in ("loss", "grad_norm") if metrics.get(k) is not None}
        if np.isfinite([*read.values()]).all():
            return
        path = self.folder / f"nan_step_{step}.npz"
        if self.writes:
            with writing(path):
                np.savez(path, **_named(jax.device_get(batch)))
        said = ", ".join(f"{name} is {value}" for name, value in read.items())
        raise SystemExit(f"step {step} of {self.folder}: {said}; the batch is in {path}")

    # -------------------------------- checkpoints

    def checkpoints(self) -> list[tuple[int, Path]]:
        """(step, directory), oldest first, without the ones restore() refused."""
        return sorted(
            (int(path.name[5:]), path)
            for path in (self.folder / "checkpoints").glob("step_*")
            if re.fullmatch(r"step_(0|[1-9]\d*)", path.name) and path.name not in self.refused
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
        writes the adapter into the directory it is given, a higher `score` is better. All
        processes call it, because arrays that are split over them are gathered; write_model(None)
        takes part in gathering and writes nothing.
        """
        assert self.step is not None and self.step >= step, f"log step {step} before saving it"
        target = self.folder / "checkpoints" / f"step_{step}"
        self.saved_step = step
        self.scored_step = step if score is not None else self.scored_step
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
            with writing(self.folder):
                for path in self._lines():  # not behind the checkpoint, ever
                    _fsync(path)
            _publish(target, write)
            self.refused.discard(target.name)
            self._drop_old()
            if time.monotonic() >= self.report_due:
                self.report()
        return target

    def _drop_old(self):
        """Delete all checkpoints but the newest `keep` and the best."""
        newest = self.checkpoints()[-max(1, self.keep) :]  # the last one in any case
        kept = {path for _, path in newest} | {self.best()}
        for path in {path for _, path in self.checkpoints()} - kept:
            with contextlib.suppress(OSError):  # renamed first: never half a checkpoint
                shutil.rmtree(path.rename(path.with_name(f"tmp-{path.name}")))

    def _lines(self) -> list[Path]:
        paths = [self.folder / "metrics.jsonl", self.folder / "samples.jsonl"]
        return [path for path in paths if path.exists()]

    def restore(self, like: Any) -> Saved | None:
        """The newest valid checkpoint in the structure of `like`, or None; cuts the later lines.

        `like` holds arrays or ShapeDtypeStructs; a leaf that differs is a ValueError. Call it
        before the first step of every run, so that a fresh start begins with empty files.
        """
        saved, budget = self._newest(like) if self.writes else (None, None)
        if hosts.count > 1:  # only the first has read the folder
            arrays = like if saved is None else saved.arrays
            found = saved and [saved.step, saved.state, budget]
            if (found := hosts.everyone(found)[0]) is not None:
                step, state, budget = found
                saved = Saved(step, hosts.broadcast(arrays), state)
        if saved is not None:
            self.budget.load(budget)
            self.saved_step = self.scored_step = saved.step
        self.step = saved.step if saved else 0
        return saved

    def _newest(self, like) -> tuple[Saved | None, dict | None]:
        """(the newest valid checkpoint, its budget); cuts the lines after it."""
        saved = budget = None
        for step, directory in reversed(self.checkpoints()):
            reason = verify(directory)
            if reason is None:
                record = json.loads((directory / "resume/state.json").read_bytes())
                named = load_file(directory / "resume/arrays.safetensors")
                saved = Saved(step, _fill(like, named, directory), record["state"])
                budget = record["budget"]
                say(f"resuming {self.folder} at step {step}")
                break
            self.refused.add(directory.name)
            say(f"refused {directory}: {reason}; trying the checkpoint before it")
        else:
            if self.refused:
                say(f"no valid checkpoint in {self.folder}: starting again at step 0")
        with writing(self.folder):
            for path in self._lines():
                _cut(path, saved.step if saved else -1)
        return saved, budget

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
