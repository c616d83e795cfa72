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

    with runs.Run(config) as run:
        saved = run.restore(arrays)            # the newest valid checkpoint, or None
        while (p := run.progress(step)) < 1 and not run.stopping:
            ...                                # one update, step += 1
            run.log(step, metrics)
            if run.due(config.save_every, step):
                run.save(step, arrays, state, write_model)
        return run.end(step, save, evaluate, write_model)

A file is written under a temporary name and renamed, so a kill leaves the old or the new one. Other
files in the folder are left alone.
"""

import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import json
import math
import os
import re
import shutil
import signal
import sys
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from importlib import metadata
from pathlib import Path
from typing import Any, NamedTuple

import jax
import numpy as np
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from tqdm import tqdm

import gemma
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

# ------------------------------------------------------------------------------------ environment


NEEDED = {"jax": "0.10", "sentencepiece": "0.2.1"}  # before, a tokenizer's file can break into it


def check_versions(**installed: str) -> None:
    """Stop on an old JAX or sentencepiece (CVE-2026-1260) with the command that upgrades it."""
    numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)[:3]]
    # Read off the installed packages: starting a backend to ask it could hang.
    extras = {"libtpu": "[tpu]", "jax_cuda13_plugin": "[cuda13]", "jax_cuda12_plugin": "[cuda12]"}
    extra = next((extra for name, extra in extras.items() if importlib.util.find_spec(name)), "")
    then = ", then restart the kernel" if "ipykernel" in sys.modules else ""
    for name, needed in NEEDED.items():
        version = installed.get(name) or metadata.version(name)
        if numbers(version) < numbers(needed):
            package = f"jax{extra}>=0.10,<0.13" if name == "jax" else f"{name}>={needed}"
            title = "JAX" if name == "jax" else name
            raise SystemExit(f"{title} {version} is too old, {needed} is needed: pip install -U "
                             f'"{package}"{then}')


def compilation_cache() -> None:
    """Keep compiled programs on disk, as a first compile takes minutes on a TPU."""
    folder = os.environ.get("JAX_COMPILATION_CACHE_DIR") or "~/.cache/jax-programs"
    jax.config.update("jax_compilation_cache_dir", os.path.expanduser(folder))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)


# All controls but \n, \t and colours, what reorders or hides text, and halves of surrogate pairs.
_CONTROLS = re.compile(
    "(\x1b\\[[0-9;]*m)|[\x00-\x08\x0b-\x1f\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069"
    "\ud800-\udfff]"
)


def clean(text: str) -> str:
    """Text that cannot drive a terminal: "\\x1b[2J" in a completion is spelled out.

    Colours stay on a terminal alone, and not where $NO_COLOR is set (no-color.org).
    """
    coloured = sys.stderr.isatty() and not os.environ.get("NO_COLOR")
    kept = lambda colour: colour if coloured else ""
    spelled = lambda text: text.encode("unicode_escape").decode()
    return _CONTROLS.sub(lambda m: kept(m[1]) if m[1] else spelled(m[0]), text)


def say(line: str) -> None:
    """Print clean() text to stderr, on the first host alone."""
    if hosts.index == 0:
        line = clean(line)
        with contextlib.suppress(OSError):  # the terminal may be gone: the run must still be saved
            tqdm.write(line + "\x1b[0m" * ("\x1b" in line), file=sys.stderr)


MEMORY = {  # the flags that lower a script's memory, for those whose config has them
    "slots": "lower --slots", "micro_rows": "lower --micro-rows", "remat": "take --remat layer",
    "shard": "take --shard yes", "plan": "see what fits with --plan",
}


def one_line(main: Callable) -> Callable:
    """Decorates a script's main(config): a signal or a fault of the machine ends it in one line."""

    @functools.wraps(main)
    def call(config):
        def stop(number, frame):
            name = signal.Signals(number).name
            raise SystemExit(f"stopped by {name}: the same command continues {config.out}")

        with contextlib.ExitStack() as stack:
            _handle_signals(stack, stop)
            try:
                return main(config)
            except FloatingPointError as error:
                raise SystemExit(f"{error}: are the weights or the adapter damaged?") from error
            except RuntimeError as error:  # XLA's errors are RuntimeErrors
                if "RESOURCE_EXHAUSTED" not in str(error):
                    raise
                first, _, _ = str(error).partition("\n")
                advice = ", ".join(MEMORY[name] for name in MEMORY if hasattr(config, name))
                raise SystemExit(f"out of memory: {advice} ({first})") from error

    return call


def command(call: Callable[[], Any]) -> None:
    """Runs a script's command line: a mistake of the user's ends it in one line, exit code 1.

    Such a line is what a `raise ValueError` in these files states, or the system about a file. Any
    other error is a bug, and keeps its traceback.
    """
    try:
        call()
    except SystemExit as end:  # its text may quote a server
        code = clean(end.code) if isinstance(end.code, str) else end.code
        raise SystemExit(code) from None  # IPython fails to show one that has a context
    except (ValueError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        folder, *ours = (Path(f).resolve().parent for f in (last.filename, __file__, sys.argv[0]))
        stated = folder in ours and last.line.startswith("raise ")
        if not stated and getattr(error, "filename", None) is None:
            raise
        raise SystemExit(clean(f"error: {error}")) from None


def _handle_signals(stack: contextlib.ExitStack, handler: Callable) -> None:
    """Let the handler have SIGTERM, Ctrl-C and a closed terminal until the stack unwinds."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # not on Windows, not under nohup
    for number in numbers:
        with contextlib.suppress(ValueError):  # Python allows it in the main thread alone
            stack.callback(signal.signal, number, signal.signal(number, handler) or signal.SIG_DFL)


# ------------------------------------------------------------------------------------ time budget


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
    the share in the checkpoint, elapsed counts this session alone, from `start` (None: now), and
    the reserve leaves time to finish a step, evaluate, save a checkpoint and write final/.
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
    def measure(self, kind: str):
        """Time a "save" (Run does it) or an "eval": each must also fit in at the end."""
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
            reserve_s = 1.25 * (step_s + eval_s + 2 * save_s)  # final/ costs about another save
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
        clock = {"clock_p": self.clock_p, "longest_s": self.longest_s}
        return {"p": self.p} | (clock if self.limit_s is not None else {})

    def load(self, state: dict) -> None:
        """Go on from a checkpoint."""
        self.p = state["p"]
        # With --steps, p0 is the clock's share alone: a finished run whose --steps grew goes on.
        self.clock_p = self.clock_p0 = self.p if self.steps is None else state.get("clock_p", 0.0)
        self.longest_s |= state.get("longest_s", {})


# ------------------------------------------------------------------------------------------ files


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


@contextlib.contextmanager
def _replacing(target: Path) -> Iterator[Path]:
    """A temporary path for a new file or folder, which then takes the place of `target`."""
    temporary, old = (target.with_name(f".{word}-{target.name}") for word in ("tmp", "old"))
    try:
        yield temporary
        for path in [*temporary.rglob("*"), temporary]:
            _fsync(path)
        if target.is_dir():  # a folder cannot replace a folder; _tidy undoes a kill in between
            os.rename(target, old)
        os.replace(temporary, target)
        _fsync(target.parent)
    finally:
        _tidy(target.parent, re.escape(target.name))


def _tidy(folder: Path, names: str) -> None:
    """Remove what an interrupted write of names left, and put back what it was about to replace."""
    for path in [*folder.glob(".old-*"), *folder.glob(".tmp-*")]:
        target = path.with_name(path.name[5:])
        if not re.fullmatch(names, target.name):  # a file of the user's
            continue
        if path.name.startswith(".old-") and not target.exists():
            os.rename(path, target)
        elif path.is_dir():
            shutil.rmtree(path, ignore_errors=True)
        else:
            path.unlink(missing_ok=True)


def replace_file(path: Path, content: bytes) -> None:
    """Write a file so that a reader or a crash meets the old content or the new one."""
    with _replacing(path) as temporary:
        temporary.write_bytes(content)


def write_json(path: str | Path, value: Any) -> None:
    """replace_file() with a value as JSON."""
    replace_file(Path(path), (json.dumps(_plain(value), indent=2) + "\n").encode())


def _plain(value):
    """Plain Python for JSON, which has no NaN and no infinity: those become null."""
    if hasattr(value, "tolist"):
        value = np.asarray(value).tolist()
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value if isinstance(value, bool | int | float | str | None) else str(value)


def to_jsonl(rows: Iterable[dict]) -> bytes:
    """One line for each row, in UTF-8; half a surrogate pair becomes its escape."""
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    return lines.encode(errors="backslashreplace")


def read_jsonl(path: str | Path) -> Iterator[tuple[int, Any]]:
    """(line number, JSON value) of each line that is not blank; a bad one's is a ValueError."""
    try:
        file = open(path, "rb")
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error})") from None
    with file:
        for n, line in enumerate(file, 1):
            if line.strip():
                try:
                    row = gemma.parse_json(line.decode("utf-8-sig"))
                except ValueError as error:
                    row = error
                yield n, row


def good_rows(path: str | Path, **types: type | tuple) -> list[dict]:
    """The objects of a JSONL file that have all these keys, with values of these types.

    Its other lines, such as the torn last one of a killed run, are left out. Numbers are finite and
    0 or more. No rows where there is no file.
    """

    def fits(value, kind) -> bool:
        right = type(value) in (kind if isinstance(kind, tuple) else (kind,))  # True is no int
        return right and (type(value) not in (int, float) or 0 <= value < 2**53)

    rows = [row for _, row in read_jsonl(path)] if Path(path).exists() else []
    return [row for row in rows if isinstance(row, dict)
            and all(key in row and fits(row[key], kind) for key, kind in types.items())]


# ---------------------------------------------------------------------------------------- folders


def claim(folder: Path, kind: str = "run") -> None:
    """End with a line unless a folder is new, empty, or of this kind by write_config()."""
    with writing(folder):
        names = {path.name for path in folder.iterdir()} if folder.exists() else set()
    if names <= {".lock", ".tmp-config.json"}:  # what a start leaves that was killed
        return
    try:
        begun = gemma.read_json(folder / "config.json")["code"]["kind"]
    except (ValueError, LookupError, TypeError):
        begun = None
    if begun != kind:
        raise SystemExit(f"--out {folder} is not empty, and no config.json in it says that it is "
                         f"a {kind!r} folder (kind: {begun}): choose another --out; nothing in it "
                         "was touched")


@contextlib.contextmanager
def lock(folder: Path):
    """One process at a time in a folder; at any death the kernel unlocks it."""
    with writing(folder):
        folder.mkdir(parents=True, exist_ok=True)
        file = open(folder / ".lock", "a+")
    with file:
        try:
            if fcntl is not None:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise SystemExit(f"{folder} is in use by process {file.read()}: stop that one, or "
                             "choose another folder with --out") from None
        with writing(folder):
            (folder / ".lock").write_text(str(os.getpid()))
        yield


def model_defaults(model: str, defaults: dict[str, dict]) -> dict | None:
    """The entry of a script's DEFAULTS for a model, or None: gemma3-12b-pt has gemma3-12b's."""
    names = [name for name in defaults if model == name
             or name.startswith("gemma") and model.startswith(name)]
    return defaults[max(names, key=len)] if names else None


def given(values: dict, config_class: type) -> list[str]:
    """The fields of a script's settings, as a dict, that are no default of it or of the model."""
    defaults = getattr(sys.modules[config_class.__module__], "DEFAULTS", {})
    table, names = model_defaults(str(values.get("model")), defaults) or {}, []
    for field in dataclasses.fields(config_class):
        value = _plain(values.get(field.name))
        usual = [field.default, table.get(field.name)]
        if field.name == "lora_alpha":  # filled from the rank
            usual += [n * (values.get("lora_rank") or 0) for n in (1, 2)]
        if field.name in ("system", "lora_rank", "lora_alpha") and values.get("adapter"):
            continue  # the adapter's own
        if field.name in values and value not in [_plain(x) for x in usual]:
            names.append(field.name)
    return names


def check_unchanged(folder: Path, config: Any, extra: dict | None = None,
                    may_change: Iterable[str] = ()) -> None:
    """End with a line if a flag or a fact ({"checksum of the prompts": "3f.."}) has changed.

    It names a flag that was given rather than one that followed from it: --model, not --dtype.
    """
    old = gemma.read_json(folder / "config.json")
    new = _plain(dataclasses.asdict(config) | (extra or {}))
    told = {name for values in (old, new) for name in given(values, type(config))}
    names = {*old, *new} - MAY_CHANGE - {*may_change, "code"}
    for name in sorted(names, key=lambda name: (name != "model", name not in told, name)):
        was, now = old.get(name, "absent"), new.get(name, "absent")
        if was != now:
            flag = name if " " in name else "--" + name.replace("_", "-")
            raise SystemExit(f"{flag} was {was!r:.200} when {folder} was begun, now it is "
                             f"{now!r:.200}: put it back, or choose another --out")


def write_config(folder: Path, config: Any, extra: dict | None = None, kind: str = "run") -> None:
    """Write config.json: every flag, `extra`, and under `code` what claim() knows the folder by."""
    module = sys.modules.get(type(config).__module__)  # __main__, where a script is run
    code = {"kind": kind, "script": Path(getattr(module, "__file__", None) or "notebook").stem,
            "python": sys.version.split()[0], "jax": jax.__version__,
            "device": jax.devices()[0].device_kind, "n_devices": jax.device_count(),
            "n_processes": hosts.count}
    write_json(folder / "config.json", dataclasses.asdict(config) | (extra or {}) | {"code": code})


def checksum(rows: Iterable) -> str:
    """A checksum of JSON values, in their order."""
    digest = hashlib.sha256()
    for row in rows:
        digest.update(json.dumps(row, sort_keys=True).encode() + b"\n")
    return digest.hexdigest()[:16]


def file_checksum(path: Path) -> str:
    """Of a whole file up to 256 MiB; of a larger one its size and 64 pieces of a MiB each."""
    size, digest = path.stat().st_size, hashlib.sha256()
    starts, piece = [0], size
    if size > 2**28:
        piece = 2**20
        starts = [(size - piece) * n // 63 for n in range(64)]
    with open(path, "rb") as file:
        for start in starts:
            file.seek(start)
            digest.update(file.read(piece))
    return f"{digest.hexdigest()[:16]} ({len(starts)} x {piece:,} of {size:,} bytes)"


def _checksums(directory: Path) -> dict[str, str]:
    sums = {}
    for path in sorted(path for path in directory.rglob("*") if path.is_file()):
        with open(path, "rb") as file:
            name = path.relative_to(directory).as_posix()
            sums[name] = hashlib.file_digest(file, "sha256").hexdigest()
    return sums


def _publish(target: Path, write: Callable[[Path | None], None]) -> None:
    """Let `write` fill a folder, and seal it with a manifest: all of it appears, or nothing."""
    if hosts.index > 0:
        write(None)  # takes part in gathering arrays that are split over processes
        return
    with writing(target), _replacing(target) as temporary:
        temporary.mkdir()
        write(temporary)
        sums = _checksums(temporary)
        write_json(temporary / "manifest.json", {"name": target.name, "sha256": sums})


def find_change(directory: Path) -> str | None:
    """What is not as the folder's manifest says, or None: every file that a program may read.

    Notes (*.md) and hidden files may change and be added, as by a hub or a file manager.
    """
    try:
        file = directory / "manifest.json"
        sealed = gemma.json_value(gemma.read_json(file), "sha256", dict, ..., file)
        found = _checksums(directory)
    except (OSError, ValueError) as error:
        return str(error)
    if not sealed:
        return f"{file} lists no files"
    for name in sorted({*found, *sealed} - {"manifest.json"}):
        if found.get(name) != sealed.get(name) and not re.search(r"(^|/)\.|\.md$", name):
            how = "has changed since it was saved" if name in sealed else "is not in its manifest"
            return f"{name} {how}"
    return None


def verify(checkpoint: Path) -> str | None:
    """Why a checkpoint cannot be trusted, or None: find_change(), and it must have its own name."""
    if wrong := find_change(checkpoint):
        return wrong
    name = gemma.read_json(checkpoint / "manifest.json").get("name")
    return None if name == checkpoint.name else f"it was saved as {name!r:.60}"


def _named(tree) -> dict[str, Any]:
    """Leaves by path: {"opt_state": (ScaleByAdamState(mu=...),)} -> {"opt_state/0/mu": ...}."""
    leaves = jax.tree_util.tree_flatten_with_path(tree)[0]
    return {jax.tree_util.keystr(path, simple=True, separator="/"): leaf for path, leaf in leaves}


def _fill(like, named: dict[str, np.ndarray], source: Path):
    """Put the named arrays into the structure of `like`, whose shapes and dtypes must be theirs."""
    wanted = _named(like)
    a, b = ({f"{k} {x.shape} {x.dtype}" for k, x in side.items()} for side in (wanted, named))
    if a != b:
        raise ValueError(f"{source}: expected {sorted(a - b)}, found {sorted(b - a)}")
    return jax.tree.unflatten(jax.tree.structure(like), [named[name] for name in wanted])


# ---------------------------------------------------------------------------------------- the run


def _wandb(folder: Path, config: dict) -> tuple[Callable, Callable]:
    import wandb

    wandb.init(name=folder.name, dir=str(folder), config=config)
    return lambda step, numbers: wandb.log(numbers, step=step), wandb.finish


def _tensorboard(folder: Path, config: dict) -> tuple[Callable, Callable]:
    from tensorboard.summary import Writer

    writer = Writer(str(folder / "tensorboard"))
    log = lambda step, numbers: [writer.add_scalar(k, x, step) for k, x in numbers.items()]
    return log, writer.close


WARNINGS = {  # a share that was 1 for three steps in a row -> what is wrong
    "completions/clipped_ratio": "every completion was cut at --max-new: raise it, or teach the "
        "format by train_sft.py first",
    "frac_reward_zero_std": "the completions of each prompt had equal rewards, which teach "
        "nothing: try other --data or --rewards, a larger --group, or train_sft.py first",
}
LOGGERS = {"wandb": _wandb, "tensorboard": _tensorboard}  # open(folder, config) -> (log, close)


def _clock(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def _held_out(metrics: dict[str, float]) -> str:
    """An evaluation in words, the share of right answers first."""
    parts = []
    if "accuracy" in metrics:
        interval = [f"{100 * metrics[f'accuracy_{end}']:.0f}" for end in ("low", "high")
                    if f"accuracy_{end}" in metrics]
        parts.append(f"right {100 * metrics['accuracy']:.1f} %"
                     + (f" ({'-'.join(interval)})" if interval else ""))
    for name, x in metrics.items():
        if name in ("format", "pair_accuracy"):
            parts.append(f"{name.replace('_accuracy', 's right')} {100 * x:.0f} %")
        elif not name.startswith("accuracy"):
            parts.append(f"{name} {x:.2g}" if abs(x) < 100 else f"{name} {x:.0f}")
    return ", ".join(parts)


class Saved(NamedTuple):
    step: int
    arrays: Any  # numpy, in the structure asked for
    state: dict
    budget: dict


class Run(contextlib.ExitStack):
    """One open run folder, locked against a second process.

    keep: checkpoints that stay besides the best one; show: the metrics of the progress line, each
    with its format ("right {:4.0%}"); every_s: between two such lines, after three. A signal sets
    `stopping`. Of several
    processes the first alone has the folder and the clock; the others make the same calls. facts:
    what may not change beside the flags, such as stage.facts().
    """

    def __init__(self, config: Any, show: dict[str, str] | None = None, every_s: float = 30.0,
                 facts: dict[str, str] | None = None):
        super().__init__()  # holds what is undone at the end, or by a failure below
        self.folder, self.keep, self.every_s = Path(config.out), config.keep, every_s
        self.config, self.outcome = config, []  # outcome: the last lines of a run
        self.show = {"loss": "loss {:.3f}"} if show is None else show
        self.streaks, self.top = dict.fromkeys(WARNINGS, 0), None  # top: (accuracy, its step)
        self.budget = Budget(config.steps, parse_time(config.time_limit), start=STARTED)
        self.step: int | None = None  # of the last line logged; None until restore()
        self.saved_step = self.scored_step = -1  # of the newest checkpoint, and that with a score
        self.asked = self.stopping = ""  # the signal that asks to stop: this process, all of them
        self.refused, self.loggers = set(), {}
        self.shown, self.shown_at, self.report_due = 0, 0.0, time.monotonic() + 60
        self.lines = [self.folder / "metrics.jsonl", self.folder / "samples.jsonl"]
        loggers = [name for name in config.report_to.split(",") if name]
        if not {*loggers} <= {*LOGGERS}:
            raise ValueError(f"--report-to {config.report_to}: choose from {', '.join(LOGGERS)}")
        with contextlib.ExitStack() as undo:
            undo.push(self)
            if hosts.index == 0:
                self._open(config, loggers, facts)
            _handle_signals(self, self._on_signal)
            if hosts.index == 0:
                self.callback(self.report)  # the first thing to happen, however the run ends
            undo.pop_all()

    def _open(self, config, loggers, facts):
        claim(self.folder)
        self.enter_context(lock(self.folder))
        with writing(self.folder):
            _tidy(self.folder, r"config\.json|(metrics|samples|held_out)\.jsonl|final")
            _tidy(self.folder / "checkpoints", r"step_\d+")
            if self.checkpoints():  # before the first there is nothing to resume
                check_unchanged(self.folder, config, facts)
            write_config(self.folder, config, facts)  # before anything else: claim() looks for it
            (self.folder / "checkpoints").mkdir(exist_ok=True)
            for path in self.lines:
                path.touch()
        for name in loggers:
            self.loggers[name], close = LOGGERS[name](self.folder, dataclasses.asdict(config))
            self.callback(self._tell, name, close)

    def _tell(self, name, call, *arguments):
        try:
            call(*arguments)
        except Exception as error:  # a logger may fail in any way and never stops a run
            self.loggers.pop(name, None)
            say(f"{name} is off for the rest of the run: {error!r}")

    def _on_signal(self, number, frame):
        if self.asked and number == signal.SIGINT:  # the second one does not wait for the step
            raise SystemExit(f"interrupted: the same command continues {self.folder}")
        self.asked = signal.Signals(number).name
        self.stopping = self.asked if hosts.count == 1 else ""
        with contextlib.suppress(OSError):  # not print(): it may be what was interrupted
            os.write(2, f"\n{self.asked}: finishing this step, then saving\n".encode())

    def progress(self, step: int) -> float:
        """The share of the run done after `step` updates; on all processes that of the first."""
        everyone = hosts.everyone([self.budget.progress(step), self.asked])
        self.budget.p = everyone[0][0]
        self.stopping = next((asked for _, asked in everyone if asked), "")
        return self.budget.p

    def due(self, every: int, step: int) -> bool:
        """Whether step is a multiple of `every` (0: never); end() does the last of --steps."""
        return every > 0 and step % every == 0 and step != self.budget.steps

    def end(self, step: int, save: Callable[[float | None], Any], evaluate: Callable[[], float],
            write_model: Callable[[Path | None], None]) -> Path:
        """After the loop: evaluate, save and write final/. If told to stop, save and exit."""
        if self.budget.p < 1:
            if self.saved_step != step:  # saving again would drop the score
                save(None)
            raise SystemExit(f"stopped by {self.stopping} at step {step} of {self.folder}: the "
                             "same command continues from there")
        if self.scored_step != step:
            save(evaluate())
        return self.finish(write_model)

    def finish(self, write_model: Callable[[Path | None], None]) -> Path:
        """Write final/, the best checkpoint or else the last step, and say what came out."""
        best = self.best() if hosts.index == 0 else None
        best = hosts.everyone(best)[0]
        best = None if best == self.saved_step else best

        def write(folder):
            if best is None:
                write_model(folder)
            elif folder is not None:
                shutil.copytree(self.folder / f"checkpoints/step_{best}", folder,
                                ignore=shutil.ignore_patterns("resume", "manifest.json"),
                                dirs_exist_ok=True)
            if folder is not None:
                self.describe(folder, self.saved_step if best is None else best)

        with self.budget.measure("save"):
            _publish(self.folder / "final", write)
        hosts.everyone(None)  # nobody leaves before it is there
        say("\n".join([f"done: {self.folder / 'final'}", *self.outcome]))
        return self.folder / "final"

    def best(self) -> int | None:
        """The step of the checkpoint with the highest score, the newer of two equals, if sound."""
        scores = self.scores()
        step = max(((score, step) for step, score in scores.items()), default=(0, None))[1]
        if step is not None and (reason := verify(self.folder / f"checkpoints/step_{step}")):
            say(f"step {step} was the best, but {reason}: final/ is the last step")
            return None
        return step

    def describe(self, folder: Path, step: int) -> None:
        """Write the model card of `step`, and keep what the last lines of the run say."""
        self.outcome = []
        if not hasattr(self.config, "model"):
            return
        try:
            import card  # here: it stands below this file

            card.write(folder, self.folder, step)
            self.outcome = card.ending(folder, self.folder, step)
        except Exception as error:  # of a text; the model is there
            say(f"no model card of {folder}: {error!r}")

    def log(self, step: int, metrics: dict) -> None:
        """Append the line of a step to metrics.jsonl, show it, and pass it to the loggers."""
        metrics = _plain(metrics)
        self._append(self.lines[0], step, [metrics])
        self.step = max(step, self.step)
        numbers = {k: v for k, v in metrics.items() if isinstance(v, int | float)}
        for name, log in [*self.loggers.items()]:
            self._tell(name, log, step, numbers)
        self._show(step, numbers)
        for name in WARNINGS.keys() & numbers.keys():
            self.streaks[name] = self.streaks[name] + 1 if numbers[name] == 1 else 0
            if self.streaks[name] == 3:
                say(f"warning: for 3 steps {WARNINGS[name]}")

    def _show(self, step: int, numbers: dict) -> None:
        """Say the line of a step, below a header every 20 lines, or that of an evaluation."""
        of = f"/{self.budget.steps}" if self.budget.steps else ""
        place = f"step {step}{of}".ljust(len("step ") + 2 * len(of) - 1)
        held = {k.removeprefix("eval_"): x for k, x in numbers.items() if k.startswith("eval_")}
        if held:
            say(f"{place}  held out: {_held_out(held)}")
            if "accuracy" in held:
                self.top = max(self.top or (-1.0, 0), (held["accuracy"], step))
        percent = lambda label, x: label.format(x).replace("%", " %")
        form = lambda label: label if "{" in label else label + " {:.4g}"
        shown = [percent(form(label), numbers[k]) for k, label in self.show.items() if k in numbers]
        if not shown or self.shown >= 3 and time.monotonic() - self.shown_at < self.every_s:
            return
        if self.shown % 20 == 0:
            accuracy, at = self.top or (0.0, None)
            best = "" if at is None else f"; best held out {100 * accuracy:.1f} % right, step {at}"
            say(f"\x1b[2m{self.folder}{best}")
        self.shown, self.shown_at, eta = self.shown + 1, time.monotonic(), self.budget.eta_s()
        say("  ".join([place, *shown, *([] if eta is None else [f"{_clock(eta)} left"])]))

    def log_samples(self, step: int, rows: Iterable[dict]) -> None:
        """Append rows (prompt, completion, reward components) to samples.jsonl."""
        self._append(self.lines[1], step, [_plain(row) for row in rows])

    def _append(self, path, step, rows):
        assert self.step is not None, "call restore() before the first step"
        if hosts.index == 0:
            with writing(path), open(path, "ab") as file:
                file.write(to_jsonl({"step": step} | row for row in rows))

    def check_finite(self, step: int, metrics: dict, batch: Any) -> None:
        """Stop on a NaN or infinite loss or grad_norm, with the batch in nan_step_N.npz."""
        path = self.folder / f"nan_step_{step}.npz"
        for name in ("loss", "grad_norm"):
            if metrics.get(name) is None or np.isfinite(value := float(metrics[name])):
                continue
            if hosts.index == 0:
                with writing(path):
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
        """Write checkpoints/step_N: a pytree of arrays, JSON, the adapter; a high score is good."""
        assert self.step is not None and self.step >= step, f"log step {step} before saving it"
        self.saved_step = step
        self.scored_step = step if score is not None else self.scored_step
        arrays = hosts.whole(arrays)
        record = {"score": score, "state": state, "budget": self.budget.state()}

        def write(directory):
            write_model(directory)
            if directory is None:
                return
            # A folder of their own: whoever loads *.safetensors as the model must not find these.
            (directory / "resume").mkdir()
            # safetensors 0.8 writes the wrong bytes for an array that is not in C order
            named = _named(jax.device_get(arrays))
            named = {name: np.asarray(leaf, order="C") for name, leaf in named.items()}
            save_file(named, directory / "resume/arrays.safetensors")
            (directory / "resume/state.json").write_text(json.dumps(_plain(record)))

        with self.budget.measure("save"):
            if hosts.index == 0:
                with writing(self.folder):
                    for path in self.lines:  # never behind the checkpoint
                        _fsync(path)
            _publish(self.folder / "checkpoints" / f"step_{step}", write)
            self.refused.discard(f"step_{step}")
            if hosts.index == 0:
                self._drop_old()
        if hosts.index == 0 and time.monotonic() >= self.report_due:
            self.report()

    def scores(self) -> dict[int, float]:
        """The scores of the checkpoints that have one, by step."""
        scores = {}
        for step, path in self.checkpoints():
            with contextlib.suppress(OSError, ValueError, KeyError):
                score = gemma.read_json(path / "resume/state.json")["score"]
                scores |= {step: score} if score is not None else {}
        return scores

    def _drop_old(self):
        """Delete all checkpoints but the newest `keep` and the best, the newer of two equals."""
        found, scores = self.checkpoints(), [(score, n) for n, score in self.scores().items()]
        kept = {step for step, _ in found[-max(1, self.keep) :]} | {max(scores, default=(0, 0))[1]}
        for step, path in found:
            if step not in kept:
                with contextlib.suppress(OSError):  # renamed first: never half a checkpoint
                    shutil.rmtree(path.rename(path.with_name(f".tmp-{path.name}")))

    def restore(self, like: Any) -> Saved | None:
        """The newest valid checkpoint in the structure of `like`, or None; cuts the later lines.

        `like` holds arrays or ShapeDtypeStructs. Every run calls it before its first step.
        """
        saved = None
        for step, directory in reversed(self.checkpoints() if hosts.index == 0 else []):
            if reason := verify(directory):
                self.refused.add(directory.name)
                say(f"refused {directory}: {reason}; trying the one before, or a fresh start")
                continue
            record = gemma.read_json(directory / "resume/state.json")
            arrays = _fill(like, load_file(directory / "resume/arrays.safetensors"), directory)
            saved = Saved(step, arrays, record["state"], record["budget"])
            break
        if hosts.count > 1:  # only the first has read the folder
            found = hosts.everyone(saved and saved._replace(arrays=None))[0]
            arrays = hosts.broadcast(saved.arrays if saved else like) if found else None
            saved = Saved(*found)._replace(arrays=arrays) if found else None
        self.step, last = 0, -1
        if saved is not None:
            say(f"resuming {self.folder} at step {saved.step}")
            self.budget.load(saved.budget)
            self.step = self.saved_step = self.scored_step = last = saved.step
        for path in self.lines if hosts.index == 0 else []:  # [1 2 3 {"st], last 2 -> [1 2]
            rows = [row for row in good_rows(path, step=int) if row["step"] <= last]
            with writing(path):
                replace_file(path, to_jsonl(rows))
        return saved

    def report(self) -> None:
        """Write report.html; whatever fails in it, the run goes on."""
        began = time.monotonic()
        try:
            import report  # here: it stands below this file, and a run can do without it

            report.main(report.Config((str(self.folder),)))
        except Exception as error:
            say(f"no report of {self.folder}: {error!r}")
        self.report_due = time.monotonic() + 100 * (time.monotonic() - began)  # 1 % of the time
