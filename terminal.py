"""What a person at the terminal meets: safe text, step lines, one-line errors, versions.

    runs.Run prints by StepLines:
    step 20/80  reward  0.61  right  54%  length   61    6.1 s  6:04 left
"""

import contextlib
import importlib.util
import os
import re
import signal
import sys
import textwrap
import time
import traceback
from collections.abc import Callable
from functools import partial, wraps
from importlib import metadata
from pathlib import Path
from typing import Any

import jax
from tqdm import tqdm

import hosts

# ------------------------------------------------------------------------------------ environment

# An older sentencepiece may let a malicious tokenizer file run code.
NEEDED = {"jax": "0.10", "sentencepiece": "0.2.1"}


def check_versions() -> None:
    """Stop on an old JAX or sentencepiece (CVE-2026-1260) with the command that upgrades it."""
    numbers = lambda version: [int(n) for n in re.findall(r"\d+", version)[:3]]
    # Read off the installed packages: starting a backend to ask it could hang.
    extras = {"libtpu": "[tpu]", "jax_cuda13_plugin": "[cuda13]", "jax_cuda12_plugin": "[cuda12]"}
    extra = next((extra for name, extra in extras.items() if importlib.util.find_spec(name)), "")
    then = ", then restart the kernel" if "ipykernel" in sys.modules else ""
    for name, needed in NEEDED.items():
        version = metadata.version(name)
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


# ------------------------------------------------------------------------------------------- lines

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


def flag(name: str) -> str:
    """The flag of a field of a Config: learning_rate -> --learning-rate."""
    return "--" + name.replace("_", "-")


def say(line: str) -> None:
    """Print clean() text to stderr, on the first host alone."""
    if hosts.index == 0:
        line = clean(line)
        with contextlib.suppress(OSError):  # the terminal may be gone: the run must still be saved
            tqdm.write(line + "\x1b[0m" * ("\x1b" in line), file=sys.stderr)


def say_wrapped(text: str, indent: int) -> None:
    """Says a text in lines of at most 79 columns, the later ones indented; none ends at \\u00a0."""
    say(textwrap.fill(text, 79, subsequent_indent=" " * indent, break_long_words=False,
                      break_on_hyphens=False).replace("\u00a0", " "))


def indented(text: str) -> str:
    """Each line of a text by two columns, wrapped to at most 79."""
    wrap = partial(textwrap.fill, width=79, initial_indent="  ", subsequent_indent="  ",
                   break_long_words=False, break_on_hyphens=False)
    return "\n".join(wrap(line) for line in text.split("\n"))


WARNINGS = {  # of three steps in a row: metric -> (from, to), what is wrong
    "completions/clipped_ratio": ((1, 1), "every completion was cut at --max-new: raise it, or "
        "teach the format by train_sft.py first"),
    "frac_reward_zero_std": ((1, 1), "the completions of each prompt had equal rewards, which "
        "teach nothing: try other --data or --rewards, a larger --group, or train_sft.py first"),
    "accuracy": ((0, 0.04), "at most 4 % of the completions were right, so that groups differ in "
        "little but format and length: take easier --data, or run train_sft.py for longer first"),
}


def clock_of(seconds: float) -> str:
    """65 -> 1:05, 3700 -> 1:01:40."""
    minutes, s = divmod(round(seconds), 60)
    h, m = divmod(minutes, 60)
    return f"{h}:{m:02}:{s:02}" if h else f"{m}:{s:02}"


def evaluation_in_words(metrics: dict[str, float]) -> str:
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


class StepLines:
    """The lines of a run's steps and evaluations, and warnings.

    show: the metrics of a step's line, each with its format ("right {:4.0%}"). After three lines
    the next ones are at least every_s seconds apart. by_reward: whether rewards teach the model;
    distillation may only count them.
    """

    def __init__(self, folder: Path, show: dict[str, str], every_s: float, by_reward: bool = True):
        self.folder, self.show, self.every_s, self.by_reward = folder, show, every_s, by_reward
        self.streaks, self.best = dict.fromkeys(WARNINGS, 0), ""  # best: held-out accuracy
        self.top, self.n_shown, self.shown_at = 0.0, 0, 0.0

    def say(self, step: int, n_steps: int | None, numbers: dict[str, float],
            eta_s: float | None) -> None:
        """Says what a step's metrics tell; n_steps: --steps, eta_s: seconds left, if known."""
        of = f"/{n_steps}" if n_steps else ""
        width = 2 * len(of) - 1 if of else 4  # of the numbers
        place = f"step {step}{of}".ljust(len("step ") + width)
        held = {k.removeprefix("eval_"): x for k, x in numbers.items() if k.startswith("eval_")}
        if held:
            say_wrapped(f"{place}  held out: {evaluation_in_words(held)}", len(place) + 2)
        if held.get("accuracy", -1.0) >= self.top:  # the newer of two equals
            self.top = held["accuracy"]
            self.best = f"; best held out {100 * self.top:.1f} % right, step {step}"
        self._say_step(place, numbers, eta_s)
        for name in WARNINGS.keys() & numbers.keys():
            (low, high), wrong = WARNINGS[name]
            self.streaks[name] = self.streaks[name] + 1 if low <= numbers[name] <= high else 0
            matters = self.by_reward or name == "completions/clipped_ratio"
            if matters and self.streaks[name] == 3:
                say_wrapped(f"warning: for 3 steps {wrong}", len("warning: "))

    def _say_step(self, place: str, numbers: dict[str, float], eta_s: float | None) -> None:
        form = lambda label: label if "{" in label else label + " {:.4g}"
        shown = [form(label).format(numbers[k]).replace("%", " %")
                 for k, label in self.show.items() if k in numbers]
        if not shown or self.n_shown >= 3 and time.monotonic() - self.shown_at < self.every_s:
            return
        if self.n_shown % 20 == 0:
            say(f"\x1b[2m{self.folder}{self.best}")
        self.n_shown, self.shown_at = self.n_shown + 1, time.monotonic()
        say("  ".join([place, *shown, *([] if eta_s is None else [f"{clock_of(eta_s)} left"])]))


# ------------------------------------------------------------------------------------------ errors

MEMORY = {  # the flags that lower a script's memory, for those whose config has them
    "slots": "lower --slots", "micro_rows": "lower --micro-rows", "remat": "take --remat layer",
    "shard": "take --shard yes", "plan": "see what fits with --plan",
}


def one_line(main: Callable) -> Callable:
    """Decorates a script's main(config): a signal or a fault of the machine ends it in one line."""

    @wraps(main)
    def call(config):
        def stop(number, frame):
            name = signal.Signals(number).name
            raise SystemExit(f"stopped by {name}: the same command continues {config.out}")

        with contextlib.ExitStack() as stack:
            handle_signals(stack, stop)
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

    Mistakes are ValueErrors and OSErrors that our files raise, and OSErrors about a file. Any other
    error is a bug and keeps its traceback.
    """
    try:
        call()
    except SystemExit as end:  # its text may quote a server
        code = clean(end.code) if isinstance(end.code, str) else end.code
        raise SystemExit(code) from None  # IPython fails to show one that has a context
    except BrokenPipeError:  # as in `--help | head`
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())  # for Python's last flush
        raise SystemExit(1) from None
    except (ValueError, OSError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        folder, *ours = (Path(f).resolve().parent for f in (last.filename, __file__, sys.argv[0]))
        stated = folder in ours and last.line.startswith("raise ")
        if not stated and getattr(error, "filename", None) is None:
            raise
        raise SystemExit(clean(f"error: {error}")) from None


def handle_signals(stack: contextlib.ExitStack, handler: Callable) -> None:
    """Let the handler have SIGTERM, Ctrl-C and a closed terminal until the stack unwinds."""
    numbers = [signal.SIGTERM, signal.SIGINT]
    if hasattr(signal, "SIGHUP") and signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
        numbers.append(signal.SIGHUP)  # not on Windows, not under nohup
    for number in numbers:
        with contextlib.suppress(ValueError):  # Python allows it in the main thread alone
            stack.callback(signal.signal, number, signal.signal(number, handler) or signal.SIG_DFL)
