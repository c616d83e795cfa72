"""The run folder: kills, torn and edited files, full disks, strangers' files, clocks, signals."""

import dataclasses
import errno
import importlib.util
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from conftest import ROOT, contents

import disk
import hosts
import runs
import settings
import synthesize
import terminal
import train_grpo
import train_simpo

LIKE = {"w": np.zeros(4, np.float32)}


@pytest.fixture(autouse=True)
def no_report(monkeypatch):
    """tests/test_report.py has it."""
    monkeypatch.setattr(runs.Run, "report", lambda run: None)


@pytest.fixture(scope="module")
def whole(tmp_path_factory):
    """A run of six steps that nothing interrupted."""
    with pytest.MonkeyPatch.context() as m:
        m.setattr(runs.Run, "report", lambda run: None)
        folder = tmp_path_factory.mktemp("whole") / "x"
        train(folder)
    return folder


@dataclasses.dataclass(frozen=True)
class Config:
    lr: float = 1e-4
    steps: int | None = 6
    time_limit: str | None = None
    out: str = "x"
    keep: int = 2
    report_to: str = ""
    sizes: tuple = (1, 2)


def open_run(out, budget=None, show=None, every_s=30.0, **fields):
    run = runs.Run(Config(out=str(out), **fields), show or {"loss": "loss {:.3f}"}, every_s)
    run.budget = budget or run.budget
    return run


def model(directory):
    (directory / "adapter.txt").write_text("adapter")


def train(out, steps=6, every=2, until=None, **fields):
    """A run whose numbers depend on the step and the restored arrays alone."""
    with open_run(out, steps=steps, **fields) as run:
        saved = run.restore(LIKE)
        step, w = (saved.step, saved.arrays["w"]) if saved else (0, LIKE["w"])
        save = lambda score: run.save(step, {"w": w}, {"seen": step}, model, score)
        while (p := run.progress(step)) < 1 and not run.stopping:
            w = w * np.float32(0.9) + np.random.default_rng(step).normal(size=4).astype("float32")
            step += 1
            run.log(step, {"loss": w.sum(), "p": p, "step_s": time.perf_counter()})
            run.log_samples(step, [{"prompt": "é", "completion": str(w[0])}])
            if run.due(every, step):
                save(-abs(step - 2))
            if step == until:
                return
        run.end(step, save, lambda: -abs(step - 2), model)


def test_a_step_saved_without_a_score_is_evaluated_when_the_run_goes_on(tmp_path):
    """As SIGTERM saves it, and then --steps is lowered to that step."""
    with open_run(tmp_path / "x", steps=9) as run:
        run.restore(LIKE)
        for step, score in ((2, 0.5), (4, None)):
            run.log(step, {"loss": 1.0})
            run.save(step, LIKE, {}, model, score)
    with open_run(tmp_path / "x", steps=4) as run:
        saved = run.restore(LIKE)
        assert saved.step == 4 and run.progress(saved.step) == 1
        save = lambda score: run.save(4, LIKE, {}, model, score)
        run.end(4, save, lambda: 0.75, model)
        assert run.best() == 4


def run_python(code, *arguments, **options):
    command = [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)]
    return subprocess.Popen(command, env=os.environ | {"PYTHONPATH": f"{ROOT}:{ROOT}/tests"},
                            **options)


# ------------------------------------------------------------------ kills, torn and edited files


DRIVER = """
import os, shutil, signal, sys
from pathlib import Path
import conftest, runs, terminal, test_runs

device = type("Device", (), {"device_kind": "fake"})
runs.jax.devices, runs.jax.device_count = lambda: [device], lambda: 1
terminal.say = runs.Run.report = lambda *_: None
os.fsync = lambda handle: None  # a kill, unlike a power cut, keeps what was written
operations = [(os, "fsync"), (os, "rename"), (os, "replace"), (shutil, "rmtree"),
              (runs, "save_file"), (Path, "mkdir"), (Path, "write_bytes"), (Path, "write_text"),
              (Path, "rename"), (Path, "unlink"), (Path, "touch")]

def attempt(out, die_at):
    if (child := os.fork()) == 0:
        count = 0
        def faulty(real):
            def call(*a, **k):
                nonlocal count
                count += 1
                if count == die_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                return real(*a, **k)
            return call
        for owner, name in operations:
            setattr(owner, name, faulty(getattr(owner, name)))
        try:
            test_runs.train(out, steps=3, every=1, keep=1)
            os._exit(0)
        except BaseException as error:
            print(repr(error), file=sys.stderr)
            os._exit(3)
    return os.waitpid(child, 0)[1]

root, k = Path(sys.argv[1]), 1
assert attempt(root / "whole", 0) == 0
whole = conftest.contents(root / "whole")
while (status := attempt(root / f"kill{k}", k)) != 0:
    assert status == signal.SIGKILL, (k, status)
    assert attempt(root / f"kill{k}", 0) == 0, k
    assert conftest.contents(root / f"kill{k}") == whole, k
    k += 1
print(k)
"""


def test_kill_at_every_file_operation_loses_nothing(tmp_path):
    """One process imports; each attempt is a fork that kills itself at the k-th operation."""
    driver = run_python(DRIVER, tmp_path, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    out, err = driver.communicate(timeout=60)
    assert driver.returncode == 0, err
    assert int(out) > 60  # it did meet the faults


def flip(path):
    content = bytearray(path.read_bytes())
    content[-1] ^= 1
    path.write_bytes(content)


ARRAYS, STATE = "resume/arrays.safetensors", "resume/state.json"
BROKEN = {  # what happens to step_6 -> why it is refused
    "truncated": (lambda d: os.truncate(d / ARRAYS, 99), f"{ARRAYS} has changed"),
    "edited": (lambda d: flip(d / STATE), f"{STATE} has changed"),
    "missing": (lambda d: (d / "adapter.txt").unlink(), "adapter.txt has changed"),
    "unsealed": (lambda d: (d / "manifest.json").unlink(), "manifest.json: cannot be read"),
    "manifest": (lambda d: os.truncate(d / "manifest.json", 1), "manifest.json: cannot be read"),
    "blank": (lambda d: (d / "manifest.json").write_text('{"name": "step_6", "sha256": {}}'),
              "manifest.json lists no files"),
    "added": (lambda d: (d / "model.safetensors").touch(), "model.safetensors is not in its man"),
    "renamed": (lambda d: d.rename(d.with_name("step_8")), "was saved as 'step_6'"),
}


@pytest.mark.parametrize("how", BROKEN)
def test_broken_checkpoint_is_refused_by_name(whole, tmp_path, capsys, how):
    out = shutil.copytree(whole, tmp_path / "x")
    breaks, reason = BROKEN[how]
    breaks(out / "checkpoints/step_6")
    with open_run(out) as run:
        saved = run.restore(LIKE)
        assert saved.step == 4 and saved.state == {"seen": 4}
    line = capsys.readouterr().err.splitlines()[0]
    name = "step_8" if how == "renamed" else "step_6"
    assert line.startswith(f"refused {out}/checkpoints/{name}: ") and reason in line
    train(out)  # and trains over it, to the same end
    again = contents(out)
    assert contents(whole) == {key: value for key, value in again.items() if "step_8" not in key}


def test_a_large_file_is_known_by_its_pieces(tmp_path, monkeypatch):
    """A flipped bit at either end is seen; the text says how much of the file was read."""
    file = tmp_path / "x"
    with open(file, "wb") as sparse:
        sparse.truncate(2**28 + 5)
    first = disk.file_checksum(file)
    assert first.endswith(" (64 x 1,048,576 of 268,435,461 bytes)")
    for at in (0, 2**28 + 4):
        with open(file, "r+b") as sparse:
            sparse.seek(at)
            sparse.write(b"\1")
        assert (second := disk.file_checksum(file)) != first
        first = second
    file.write_bytes(b"a")
    assert disk.file_checksum(file) == "ca978112ca1bbdca (1 x 1 of 1 bytes)"  # sha256 of "a"


def test_no_valid_checkpoint_starts_again(whole, tmp_path):
    out = shutil.copytree(whole, tmp_path / "x")
    for path in (out / "checkpoints").iterdir():
        flip(path / ARRAYS)
    with open_run(out) as run:
        assert run.restore(LIKE) is None
        assert (out / "metrics.jsonl").read_bytes() == b""


def test_resume_cuts_later_and_torn_lines(whole, tmp_path):
    train(tmp_path / "x", until=4)
    with open(tmp_path / "x/metrics.jsonl", "a") as file:
        file.write('{"step": 5, "loss": 1}\n{"step": 6, "lo')
    with open(tmp_path / "x/samples.jsonl", "ab") as file:
        file.write(b'{"step": 5, "prompt": "\xc3')
    train(tmp_path / "x")
    assert contents(tmp_path / "x") == contents(whole)


# ------------------------------------------------------------------ folders that are not a run's


def everything(folder):
    return {str(p.relative_to(folder)): p.read_bytes() if p.is_file() else None
            for p in sorted(Path(folder).rglob("*"))}


FOREIGN = {  # files -> what the line says
    "home": ({"thesis.tex": "x", "metrics.jsonl": "mine", "tmp-final/notes": "n"}, "is not empty"),
    "model": ({"config.json": '{"model_type": "gemma3_text"}', "model.safetensors": "x"},
              "is not empty"),
    "parent": ({"sft/config.json": "{}"}, "is not empty"),
    "eval": ({"config.json": '{"code": {"kind": "eval"}}', "samples.jsonl": "x"},
             "[(]kind: eval[)]"),
    "broken": ({"config.json": '{"code', "final/x": "x"}, "[(]kind: None[)]"),
    "other": ({"config.json": '[{"code": "x"}]'}, "is not empty"),
}


@pytest.mark.parametrize("name", FOREIGN)
def test_a_folder_that_no_run_began_is_refused_and_untouched(tmp_path, name):
    files, says = FOREIGN[name]
    for file, content in files.items():
        (tmp_path / file).parent.mkdir(exist_ok=True)
        (tmp_path / file).write_text(content)
    before = everything(tmp_path)
    with pytest.raises(SystemExit, match=says) as stop:
        open_run(tmp_path)
    assert "choose another --out" in str(stop.value) and "\n" not in str(stop.value)
    assert everything(tmp_path) == before


def test_a_folder_is_claimed_by_kind(tmp_path):
    runs.claim(tmp_path / "new")
    assert not (tmp_path / "new").exists()
    runs.claim(tmp_path, "pairs")
    runs.write_config(tmp_path, Config(), {"checksum of the weights": "3f"}, "pairs")
    runs.claim(tmp_path, "pairs")
    with pytest.raises(SystemExit, match="[(]kind: pairs[)]: choose another --out"):
        runs.claim(tmp_path)
    runs.check_unchanged(tmp_path, Config(), {"checksum of the weights": "3f"})
    with pytest.raises(SystemExit, match="^checksum of the weights was '3f' when .* it is '40'"):
        runs.check_unchanged(tmp_path, Config(), {"checksum of the weights": "40"})
    with pytest.raises(SystemExit, match="^--sizes was"):
        runs.check_unchanged(tmp_path, Config(lr=1, sizes=()), {"checksum of the weights": "3f"},
                             may_change=("lr",))


def test_files_of_the_user_survive_in_a_run_folder(whole, tmp_path):
    out, mine = tmp_path / "x", {}
    train(out, until=3)
    for name in ("mine.jsonl", "tmp-notes", "old-thesis/a.tex", "checkpoints/tmp-x",
                 ".tmp-mine", ".old-mine/a", "checkpoints/.tmp-step_x",
                 "checkpoints/step_1_copy/a", "checkpoints/step_007/a", "tmp-step_x/a"):
        mine[name] = b'{"step": 5}\n{"torn'
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_bytes(mine[name])
    train(out)
    found = contents(out)
    assert {name: found.pop(name) for name in mine} == mine
    assert found == contents(whole)


# ------------------------------------------------------------------ full disks, locks, config


def test_disk_full_in_any_fsync_loses_nothing(tmp_path, monkeypatch):
    with open_run(tmp_path / "x") as run:
        run.restore(LIKE)
        for step in (1, 2):
            run.log(step, {})
        run.save(1, LIKE, {"seen": 1}, model)
        real, left, k = os.fsync, ["step_1"], 0
        while "step_2" not in left:  # the last one, of the parent, comes after the rename
            calls, k = iter(range(99)), k + 1

            def fsync(handle, calls=calls, last=k - 1):
                if next(calls) == last:
                    raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
                real(handle)

            monkeypatch.setattr(os, "fsync", fsync)
            with pytest.raises(SystemExit, match=f"cannot write {tmp_path}/x.*No space left"):
                run.save(2, LIKE, {"seen": 2}, model)
            left = sorted(path.name for path in (tmp_path / "x/checkpoints").iterdir())
            assert left[0] == "step_1"
            assert all(disk.verify(tmp_path / "x/checkpoints" / name) is None for name in left)
        assert k > 9


def test_kernel_refusing_bytes_loses_nothing(tmp_path):
    with open_run(tmp_path / "x") as run:
        run.restore(LIKE)
        run.log(1, {})
        soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (4096, hard))  # safetensors raises its own error
        try:
            with pytest.raises(SystemExit, match="step_1: .*File too large"):
                run.save(1, {"w": np.zeros(100_000, np.float32)}, {}, model)
            with pytest.raises(SystemExit, match="samples.jsonl: File too large"):
                run.log_samples(1, [{"prompt": "x" * 100_000}])
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert [*(tmp_path / "x/checkpoints").iterdir()] == []


def test_an_interrupted_writer_leaves_the_folder_clean(tmp_path):
    with open_run(tmp_path / "x") as run:
        run.restore(LIKE)
        run.log(1, {})

        def interrupted(directory):
            (directory / "half").write_text("h")
            raise KeyboardInterrupt

        with pytest.raises(KeyboardInterrupt):
            run.save(1, LIKE, {}, interrupted)
        assert [*(tmp_path / "x/checkpoints").iterdir()] == []


@pytest.mark.parametrize("name", ["rename", "replace"])
def test_replacing_final_keeps_one_of_the_two(tmp_path, monkeypatch, name):
    new = lambda directory: (directory / "adapter.txt").write_text("new")
    with open_run(tmp_path / "x") as run:
        run.finish(model)
        real = getattr(os, name)

        def interrupted(*paths):
            if "final" in str(paths[0]) and "manifest" not in str(paths[0]):
                monkeypatch.undo()
                raise KeyboardInterrupt
            real(*paths)

        monkeypatch.setattr(os, name, interrupted)
        with pytest.raises(KeyboardInterrupt):
            run.finish(new)
        assert (tmp_path / "x/final/adapter.txt").read_text() == "adapter"
        run.finish(new)
        assert (tmp_path / "x/final/adapter.txt").read_text() == "new"
        assert {path.name for path in (tmp_path / "x").iterdir()} == {
            ".lock", "checkpoints", "config.json", "final", "metrics.jsonl", "samples.jsonl"}


LINES = {  # fields of a run opened on what train() left -> the line that refuses them
    "changed": (dict(lr=3e-4), "--lr was 0.0001 when {x} was begun, now it is 0.0003: put it back, "
                               "or choose another --out"),
    "unwritable": (dict(out="{x}/metrics.jsonl/y"), "cannot write {x}/metrics.jsonl/y: Not a "
                   "directory; make room or choose another --out; the checkpoints are intact"),
    "logger": (dict(report_to="mlflow"), "--report-to mlflow: choose from wandb, tensorboard"),
    "bad time": (dict(time_limit="8h45"), "--time-limit 8h45: write it like 8h45m, 90m, 30s or "
                                          "5400 (seconds)"),
}


@pytest.mark.parametrize("name", LINES)
def test_errors_of_a_start_are_one_line(whole, tmp_path, name):
    shutil.copytree(whole, tmp_path / "x")
    before = everything(tmp_path)
    fields, line = LINES[name]
    fields = dict(out=tmp_path / "x") | fields
    fields["out"] = str(fields["out"]).format(x=tmp_path / "x")
    with pytest.raises((SystemExit, ValueError)) as stop:
        open_run(**fields)
    assert str(stop.value) == line.format(x=tmp_path / "x")
    before.pop("x/.lock")
    found = everything(tmp_path)
    assert {file: found[file] for file in before} == before


def test_what_cannot_change_the_result_may_change(whole, tmp_path):
    train(tmp_path / "other", lr=1.0, until=1)
    train(tmp_path / "other")  # nothing was saved yet, so nothing is resumed
    out = shutil.copytree(whole, tmp_path / "x")
    open_run(out, steps=9, time_limit="9h", keep=1).close()
    saved = json.loads((out / "config.json").read_text())
    assert saved["steps"] == 9 and saved["sizes"] == [1, 2]
    assert saved["code"]["kind"] == "run" and saved["code"]["script"] == "test_runs"
    assert saved["code"]["jax"] == jax.__version__


def test_every_flag_that_may_change_exists_and_memory_flags_are_among_them():
    scripts = train_grpo.Config, synthesize.Traces, synthesize.Pairs
    fields = {field.name for script in scripts for field in dataclasses.fields(script)}
    assert runs.MAY_CHANGE <= fields
    assert terminal.MEMORY.keys() <= runs.MAY_CHANGE and {*hosts.FLAGS} <= runs.MAY_CHANGE


# ------------------------------------------------------------------ lines of JSON


def test_one_reader_of_lines_survives_what_is_torn(tmp_path):
    rows = [{"a": "é\r\n\ud800 \u2028"}, {"b": [1.5, None]}]
    file = tmp_path / "a.jsonl"
    bad = [b'{"torn": "\xc3', b"\xff\xfe\x00", b"3", b"[" * 100_000, b'{"a": 1}}']
    text = b"\xef\xbb\xbf" + disk.to_jsonl(rows[:1]) + b"\n  \r\n" + b"\n".join(bad) + b"\n"
    file.write_bytes(text + disk.to_jsonl(rows[1:]).replace(b"\n", b"\r\n") + b'{"st')
    read = [*disk.read_jsonl(file)]
    assert [n for n, _ in read] == [1, 4, 5, 6, 7, 8, 9, 10]
    assert [row for _, row in read if isinstance(row, dict)] == rows == disk.good_rows(file)
    wrong = [str(row) for _, row in read if isinstance(row, ValueError)]
    assert len(wrong) == 5 and read[3] == (6, 3)
    assert disk.good_rows(tmp_path / "none") == []


def test_a_line_cannot_drive_the_terminal(capsys):
    terminal.say("a\x1b[2J\x1b]0;t\x07\r\u202e\ud800\x9b\tb\nc")
    said = capsys.readouterr().err.splitlines()
    assert said == ["a\\x1b[2J\\x1b]0;t\\x07\\r\\u202e\\ud800\\x9b\tb", "c"]


def test_colours_go_to_a_terminal_alone_and_can_be_refused(capsys, monkeypatch):
    for is_terminal, no_color, expected in (
        (True, "", "\x1b[36mb\x1b[0mc\x1b[0m"), (True, "1", "bc"), (False, "", "bc"),
    ):
        monkeypatch.setenv("NO_COLOR", no_color)
        monkeypatch.setattr(sys.stderr, "isatty", lambda is_terminal=is_terminal: is_terminal)
        terminal.say("\x1b[36mb\x1b[0mc")
        assert capsys.readouterr().err.strip() == expected


# ------------------------------------------------------------------ arrays and retention


def test_optimizer_state_comes_back_bitwise(tmp_path):
    params = {"a": jnp.full((2, 3), 1 / 3), "b": {"c": jnp.ones((), jnp.bfloat16) / 3}}
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    _, opt_state = optimizer.update(params, optimizer.init(params), params)
    fortran = np.asfortranarray(np.arange(6, dtype=np.int8).reshape(2, 3))
    arrays = {
        "params": params,
        "opt": opt_state,
        "odd": [fortran, np.zeros((0, 2)), np.bool_(True), np.float32(np.nan), fortran.T[::2]],
    }
    with open_run(tmp_path / "x") as run:
        run.restore(arrays)
        run.log(1, {})
        run.save(1, arrays, {"float": 0.1 + 0.2})
        like = jax.tree.map(lambda leaf: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype), arrays)
        saved = run.restore(like)
        assert saved.state == {"float": 0.1 + 0.2}
        assert jax.tree.structure(saved.arrays) == jax.tree.structure(arrays)
        for old, new in zip(jax.tree.leaves(arrays), jax.tree.leaves(saved.arrays), strict=True):
            assert (old.dtype, old.shape) == (new.dtype, new.shape)
            assert np.asarray(old).tobytes() == new.tobytes()
        wrong = {"params": {"a": jax.ShapeDtypeStruct((2, 4), "float32")}, "extra": jnp.zeros(3)}
        with pytest.raises(ValueError, match=r"expected .*extra \(3,\).*a \(2, 4\) float32'\], "
                                             r"found .*params/a \(2, 3\).*b/c \(\) bfloat16"):
            run.restore({**like, **wrong})


@pytest.mark.parametrize("keep, kept", [
    (2, {2: [1, 2], 5: [3, 4, 5], 6: [5, 6], 7: [6, 7], 8: [6, 7, 8]}),
    (0, {2: [1, 2], 3: [3], 5: [3, 5], 8: [6, 8]}),  # the newest stays in any case
])
def test_retention_keeps_newest_and_best(tmp_path, keep, kept):
    scores = {1: 0.1, 2: None, 3: 0.9, 4: np.float32(0.2), 5: float("nan"), 6: 0.9, 7: 0.3, 8: 0.3}
    with open_run(tmp_path / "x", keep=keep) as run:
        run.restore(LIKE)
        for step, score in scores.items():
            run.log(step, {})
            run.save(step, LIKE, {}, score=score)
            if step in kept:
                assert [step for step, _ in run.checkpoints()] == kept[step]


def test_log_writes_plain_json_and_comes_before_save(tmp_path):
    with open_run(tmp_path / "x") as run:
        with pytest.raises(AssertionError, match="call restore"):
            run.log(1, {})
        run.restore(LIKE)
        run.log(1, {"loss": jnp.bfloat16(0.5), "n": np.int64(3), "kl": float("nan"), "note": None})
        run.log_samples(1, [{"completion": "a\r\n\ud800é", "rewards": {"format": None, "n": [1]}}])
        with pytest.raises(AssertionError, match="log step 2 before saving it"):
            run.save(2, LIKE, {})
    line = (tmp_path / "x/metrics.jsonl").read_text()
    assert line == '{"step": 1, "loss": 0.5, "n": 3, "kl": null, "note": null}\n'
    sample = json.loads((tmp_path / "x/samples.jsonl").read_text())
    assert sample == {"step": 1, "completion": "a\r\n\ud800é",
                      "rewards": {"format": None, "n": [1]}}


# ------------------------------------------------------------------ time


@pytest.mark.parametrize("text, seconds", [
    ("8h45m", 31500), ("90m", 5400), ("1h2m3s", 3723), ("45", 45), (0.5, 0.5), ("1.5h", 5400),
    (None, None),
])
def test_parse_time(text, seconds):
    assert runs.parse_time(text) == seconds


@pytest.mark.parametrize("text", ["", "8h45", "h", "0", "-5m", "nan", "1d", "5 minutes", 0])
def test_parse_time_refuses(text):
    with pytest.raises(ValueError, match="--time-limit .*8h45m"):
        runs.parse_time(text)


class FakeClock:
    def __init__(self, now=1000.0):
        self.now = now

    def __call__(self):
        return self.now


def test_steps_alone_ignore_the_clock():
    clock = FakeClock()
    budget = runs.Budget(steps=4, clock=clock)
    shares = []
    for step in range(6):
        shares.append(budget.progress(step))
        clock.now += 1e6
    assert shares == [0, 0.25, 0.5, 0.75, 1, 1]
    assert budget.state() == {"p": 1}
    longer = runs.Budget(steps=8)
    longer.load(budget.state())
    assert longer.progress(4) == 0.5  # more steps are a longer run


def test_whichever_is_further_counts():
    budget = runs.Budget(steps=10, limit_s=1000, clock=FakeClock())
    budget.clock.now += 500
    assert budget.progress(2) == 500 / 950 and budget.progress(8) == 0.8


def session(budget, clock, step_s, save_s=0.0, eval_s=0.0, compile_s=0.0):
    """A training loop that takes as long as it is told; returns its shares."""
    step, shares = 0, [budget.progress(0)]
    while shares[-1] < 1:
        clock.now += step_s + (compile_s if len(shares) == 1 else 0)
        step += 1
        shares.append(budget.progress(step))
        if step % 10 == 0 or shares[-1] >= 1:
            for kind, took in (("eval", eval_s), ("save", save_s)):
                with budget.timed(kind):
                    clock.now += took
    with budget.timed("save"):
        clock.now += save_s
    return shares


@pytest.mark.parametrize("step_s, save_s, eval_s, compile_s", [
    (1, 0.1, 0.1, 0), (10, 30, 60, 300), (100, 20, 200, 600),
])
def test_run_ends_before_its_limit(step_s, save_s, eval_s, compile_s):
    clock = FakeClock()
    budget = runs.Budget(limit_s=7200, clock=clock, start=940)
    shares = session(budget, clock, step_s, save_s, eval_s, compile_s=compile_s)
    assert shares == sorted(shares) and shares[0] == pytest.approx(60 / (0.95 * 7200))
    used = clock.now - 940
    tail = 2 * save_s + eval_s
    assert 7195 - 1.25 * (step_s + tail) + tail <= used + 1e-6 and used <= 7195


def test_a_notebook_of_yesterday_has_its_whole_limit_left(monkeypatch):
    """The second stage of a session in one kernel, too, counts from its own beginning."""
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    spec = importlib.util.spec_from_file_location("fresh_runs", runs.__file__)
    notebook = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(notebook)
    assert notebook.STARTED is None and runs.STARTED is not None
    clock = FakeClock(86400.0)
    assert notebook.Budget(limit_s=3600, clock=clock, start=notebook.STARTED).progress(0) == 0


def test_a_new_session_has_its_own_limit_and_repeats_exactly():
    first = runs.Budget(limit_s=1000, clock=FakeClock())
    first.longest_s |= {"eval": 1.0, "save": 1.0}
    for step in range(6):
        p = first.progress(step)
        first.clock.now += 90
    reserve_s = 1.25 * 93 + 5
    assert p == pytest.approx(450 / (1000 - reserve_s))
    for limit_s, next_p in ((100, 1), (100, 1), (10_000, p + (1 - p) * 40 / (10_000 - reserve_s))):
        budget = runs.Budget(limit_s=limit_s, clock=FakeClock(5e6))
        budget.load(json.loads(json.dumps(first.state())))
        assert budget.progress(5) == p
        budget.clock.now += 40
        assert budget.progress(6) == pytest.approx(next_p)


def test_an_evaluation_that_was_not_measured_counts_as_a_step():
    """With --eval-every 0 the only one comes after the last step."""
    budget = runs.Budget(limit_s=1000, clock=FakeClock())
    for step in range(5):
        p = budget.progress(step)
        budget.clock.now += 90
    assert p == pytest.approx(360 / (1000 - 1.25 * 180 - 5))


def test_a_finished_run_goes_on_if_its_limit_grew():
    """As one whose --steps grew: the learning rate of its end is not that of the longer run."""
    first = runs.Budget(limit_s=100, clock=FakeClock())
    first.clock.now += 100
    assert first.progress(7) == 1
    for limit_s, p in ((50, 1), (100, 1), (400, 0.25)):
        later = runs.Budget(limit_s=limit_s, clock=FakeClock())
        later.load(json.loads(json.dumps(first.state())))
        assert later.progress(7) == p


def test_a_limit_that_leaves_no_time_for_a_step_is_told(tmp_path):
    """An evaluation as long as the limit: no model would be trained, and "done" would hide it."""
    budget = runs.Budget(limit_s=100, clock=FakeClock())
    with open_run(tmp_path / "run", budget) as run:
        run.restore({})
        with run.budget.timed("eval"):
            budget.clock.now += 80
        assert run.progress(0) == 1
        with pytest.raises(SystemExit, match=r"--time-limit 100 s left no time for a step \(eval "
                                             r"80 s\): raise it, or evaluate less"):
            run.end(0, None, None, None)
    assert not (tmp_path / "run/final").exists()


def test_steps_may_grow_after_a_finished_run_with_a_limit():
    budget, clock = runs.Budget(steps=2, limit_s=100, clock=FakeClock()), FakeClock()
    assert budget.progress(2) == 1
    for steps, p in ((4, 0.5), (None, 1)):  # by the clock alone, a finished run stays finished
        longer = runs.Budget(steps=steps, limit_s=100, clock=clock)
        longer.load(budget.state())
        assert longer.progress(2) == p


# ------------------------------------------------------------------ signals, the end, NaN

SLOW = """
    import time
    import sys, runs, test_runs
    real = runs.Run.log
    runs.Run.log = lambda *a: (time.sleep(0.05), real(*a))
    test_runs.train(sys.argv[1], steps=999, every=0)
"""


def test_a_closed_terminal_saves_though_nothing_can_be_said(tmp_path):
    ours, theirs = os.openpty()
    process = run_python(SLOW, tmp_path / "x", stderr=theirs, stdout=theirs, stdin=theirs)
    os.close(theirs)
    said = b""
    while b"step 1/999" not in said:
        said += os.read(ours, 1000)
    os.close(ours)  # from here on every print of the process fails
    process.send_signal(signal.SIGHUP)
    assert process.wait(timeout=30) in (1, 120)
    n = len((tmp_path / "x/metrics.jsonl").read_text().splitlines())
    assert [path.name for path in (tmp_path / "x/checkpoints").iterdir()] == [f"step_{n}"]


def test_nohup_still_holds(tmp_path):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with open_run(tmp_path / "x") as run:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not run.stopping
    finally:
        signal.signal(signal.SIGHUP, before)


ENDS = {  # (step, p, saved at, saved with a score at, resumed at) -> what end() calls
    "told to stop": ((4, 0.5, None, None, None), ["save None"]),
    "told to stop, saved": ((4, 0.5, 4, None, None), []),
    "told to stop at once after a resume": ((4, 0.5, None, None, 4), []),
    "finished": ((4, 1.0, 2, 2, None), ["evaluate", "save 0.5", "final"]),
    "finished, saved": ((4, 1.0, 4, None, None), ["evaluate", "save 0.5", "final"]),
    "finished, saved with a score": ((4, 1.0, None, 4, None), ["final"]),
    "finished before": ((4, 1.0, None, None, 4), ["final"]),
    "nothing to do": ((0, 1.0, None, None, None), ["evaluate", "save 0.5", "final"]),
}


@pytest.mark.parametrize("name", ENDS)
def test_end_does_what_is_still_to_do(tmp_path, name):
    (step, p, saved, scored, resumed), expected = ENDS[name]
    if resumed:
        train(tmp_path / "x", steps=8, every=resumed, until=resumed)
    done = []
    with open_run(tmp_path / "x", steps=8) as run:
        run.restore(LIKE)
        run.log(step, {})
        for at, score in ((saved, None), (scored, 0.1)):
            if at:
                run.save(at, LIKE, {}, score=score)
        run.budget.p, run.asked, run.stopping = p, "SIGTERM", "SIGTERM"
        with pytest.raises(SystemExit) if p < 1 else open(os.devnull):
            save = lambda score: done.append(f"save {score}") or run.save(
                step, LIKE, {}, score=score)
            run.end(step, save, lambda: done.append("evaluate") or 0.5,
                    lambda folder: done.append("final"))
    assert done == expected


def test_final_is_the_best_step_unless_that_one_is_damaged(whole, tmp_path, capsys):
    """Steps 2, 4 and 6 have scores 0, -2 and -4; each checkpoint's model names its step."""
    for damaged, expected in ((False, 2), (True, 6)):
        folder = tmp_path / str(damaged)
        with open_run(folder, steps=6, keep=3) as run:
            run.restore(LIKE)
            named = lambda step: lambda to: (to / "adapter.txt").write_text(str(step))  # noqa: B023
            for step in (2, 4, 6):
                run.log(step, {})
                run.save(step, LIKE, {}, named(step), score=2 - step)
            if damaged:
                (folder / "checkpoints/step_2/adapter.txt").write_text("?")
            run.finish(named(6))
        assert (folder / "final/adapter.txt").read_text() == str(expected)
        assert disk.verify(folder / "final") is None and not (folder / "final/resume").exists()
    assert "step 2 was the best, but adapter.txt has changed" in capsys.readouterr().err


def test_due_on_multiples_but_not_on_the_last_step(tmp_path):
    with open_run(tmp_path / "x", steps=6) as run:
        assert [step for step in range(1, 7) if run.due(2, step)] == [2, 4]
        assert not any(run.due(0, step) for step in range(7))


def test_second_interrupt_ends_in_one_line_and_handlers_come_back(tmp_path, capfd):
    before = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    with open_run(tmp_path / "x") as run:
        os.kill(os.getpid(), signal.SIGINT)
        assert run.stopping == "SIGINT"
        with pytest.raises(SystemExit, match=f"interrupted: the same .* continues {tmp_path}/x$"):
            os.kill(os.getpid(), signal.SIGINT)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == before


def test_nan_stops_with_the_batch(tmp_path):
    batch = {"tokens_BT": jnp.arange(6).reshape(2, 3), "rest": (np.ones(2, np.float32), ["a"])}
    with open_run(tmp_path / "x") as run:
        run.check_finite(6, {"loss": 1.0, "kl": float("nan"), "grad_norm": None}, batch)
        for metrics in ({"loss": jnp.float32(jnp.nan)}, {"loss": 1.0, "grad_norm": jnp.inf}):
            with pytest.raises(SystemExit, match="step 7 of .* is (nan|inf); .*nan_step_7.npz"):
                run.check_finite(7, metrics, batch)
    with np.load(tmp_path / "x/nan_step_7.npz") as saved:
        assert saved["tokens_BT"].tolist() == [[0, 1, 2], [3, 4, 5]]
        assert saved["rest/0"].tolist() == [1, 1] and saved["rest/1/0"] == "a"


def test_lines_now_and_then(tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    budget, show = runs.Budget(steps=100, clock=FakeClock()), {"loss": "loss", "ok": "ok {:4.0%}"}
    with open_run("x", budget, show, every_s=3600) as run:
        run.restore(LIKE)
        for step in range(1, 6):
            budget.clock.now += 10
            budget.progress(step)
            run.log(step, {"loss": 2.0, "ok": 0.2, "other": 1})
        run.step_lines.every_s = 0
        run.log(5, {"eval_accuracy": 0.38, "eval_accuracy_low": 0.3, "eval_accuracy_high": 0.46,
                    "eval_pair_accuracy": 0.75, "eval_format": 1.0, "eval_loss": 2.0})
        run.log(6, {"loss": 2.0})
        budget.clock.now += 60
        run.log(7, {"loss": 2.0})
    assert capsys.readouterr().err.splitlines() == [
        "x",
        "step 1/100    loss 2  ok  20 %",
        "step 2/100    loss 2  ok  20 %",
        "step 3/100    loss 2  ok  20 %  16:10 left",
        "step 5/100    held out: right 38.0 % (30-46), pairs right 75 %, format 100 %,",
        "              loss 2",
        "step 6/100    loss 2  15:50 left",
        "step 7/100    loss 2  14:50 left",
    ]


def test_a_header_every_20_lines_and_warnings_in_time(tmp_path, capsys):
    show = {"reward": "reward {:5.2f}"}
    cut, flat = "completions/clipped_ratio", "frac_reward_zero_std"
    with open_run(tmp_path / "x", show=show, every_s=0.0, steps=None, time_limit="1h") as run:
        run.restore(LIKE)
        for step in range(1, 42):
            run.log(step, {"reward": 0.5, cut: 1.0, flat: float(step % 3 > 0 or step > 30)})
            run.log(step, {"eval_accuracy": 0.5 if step == 2 else 0.25})
    said = capsys.readouterr().err.splitlines()
    headers = [i for i, line in enumerate(said) if str(tmp_path) in line]
    assert said[headers[0] + 1] == "step 1     reward  0.50" and len(headers) == 3
    assert all(len(line) < 80 for line in said if str(tmp_path) not in line)
    steps = lambda i, j: sum("reward " in line for line in said[i:j] if "warning" not in line)
    assert steps(headers[0], headers[1]) == 20 == steps(headers[1], headers[2])
    warned = [i for i, line in enumerate(said) if line.startswith("warning")]
    assert [said[i].split()[4] for i in warned] == ["every", "the"]  # each once
    assert said[warned[0] - 1].startswith("step 3 ") and said[warned[1] - 1].startswith("step 33 ")


def test_the_flag_that_was_given_is_named_and_not_what_followed_from_it(tmp_path, capsys):
    first = train_grpo.resolve(train_grpo.Config(out=str(tmp_path), steps=9, adapter=None))
    runs.write_config(tmp_path, first)
    changed = train_grpo.resolve(train_grpo.Config(out=str(tmp_path), model="google/gemma-3-1b-it"))
    with pytest.raises(SystemExit, match="^--model was 'tiny' when"):
        runs.check_unchanged(tmp_path, changed)
    changed = dataclasses.replace(first, slots=3, lora_rank=8, lora_alpha=8.0)
    with pytest.raises(SystemExit, match="^--lora-rank was 16 when"):
        runs.check_unchanged(tmp_path, changed)
    settings.show_config(dataclasses.replace(changed, sapo=True, system="Think first. " * 20))
    said = capsys.readouterr().err.splitlines()
    assert said[0].startswith("given    --system Think first.") and max(map(len, said[:-1])) <= 80
    assert "--sapo" in "".join(said) and "--lora-alpha" not in "".join(said)
    assert said[-2] == "default  --model tiny --data problems --learning-rate 0.001 --max-new 104"
    assert said[-1] == f"all      {tmp_path}/config.json"
    settings.show_config(train_simpo.resolve(train_simpo.Config(loss="dpo", beta=0.2)))
    assert capsys.readouterr().err.startswith("given    --loss dpo --beta 0.2\n")  # and no more


# ------------------------------------------------------------------ loggers, environment


@pytest.mark.parametrize("fails", [False, True])
def test_a_logger_gets_the_numbers_and_stops_nothing(tmp_path, monkeypatch, capsys, fails):
    seen = []

    def log(step, numbers):
        if fails:
            raise RuntimeError("quota")
        seen.append((step, numbers))

    opened = lambda folder, config: (log, lambda: seen.append(config["lr"]))
    monkeypatch.setitem(runs.LOGGERS, "json", opened)  # a module that is there
    with open_run(tmp_path / "x", report_to="json") as run:
        run.restore(LIKE)
        for step in (1, 2):
            run.log(step, {"loss": np.float32(0.5), "note": "text", "kl": None})
    assert seen == [(1, {"loss": 0.5}), (2, {"loss": 0.5})][: 2 * (not fails)] + [1e-4]
    assert capsys.readouterr().err.count("json is off for the rest of the run") == fails


@pytest.mark.parametrize("version, installed, command", [
    ("0.4.35", "libtpu", 'pip install -U "jax[tpu]>=0.10,<0.13", then restart the kernel'),
    ("0.9.2", "jax_cuda12_plugin",
     'pip install -U "jax[cuda12]>=0.10,<0.13", then restart the kernel'),
    ("0.5", "numpy", 'pip install -U "jax>=0.10,<0.13", then restart the kernel'),
    ("0.10.0", "", None), ("0.12.1.dev3", "", None), ("1.0", "", None),
])
def test_old_jax_names_the_one_command(monkeypatch, version, installed, command):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: name == installed)
    monkeypatch.setitem(sys.modules, "ipykernel", sys)
    found = {"jax": version, "sentencepiece": "1.0"}
    monkeypatch.setattr(terminal.metadata, "version", found.__getitem__)
    if command is None:
        return terminal.check_versions()
    with pytest.raises(SystemExit) as stop:
        terminal.check_versions()
    assert str(stop.value) == f"JAX {version} is too old, 0.10 is needed: {command}"


def test_a_mistake_is_a_line_and_a_bug_keeps_its_traceback(tmp_path):
    """A script's own `raise`, ours, a file's error; int(), unpacking and numpy raise bugs."""

    def end(line: str) -> str:
        script = tmp_path / "script.py"
        script.write_text("import sys\nimport numpy as np\nimport runs\nimport stage\n"
                          "import terminal\n\n\n"
                          f"def main():\n    {line}\n\n\nterminal.command(main)\n")
        done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True,
                              text=True, env=os.environ | {"PYTHONPATH": str(ROOT)})
        assert done.returncode == 1
        return done.stderr

    assert end('raise ValueError("--lr 9: "\n        "too high")') == "error: --lr 9: too high\n"
    assert end('stage.parse = runs.parse_time("soon")').startswith("error: --time-limit soon: ")
    assert end('raise SystemExit("judge: \\x1b[2J")') == "judge: \\x1b[2J\n"
    assert end('raise ValueError("judge: \\x9b2J")') == "error: judge: \\x9b2J\n"
    assert end('open("/nowhere")').startswith("error: [Errno 2] No such file or directory: '/now")
    for bug in ('int("x")', "a, b = [1]", "np.zeros(2).reshape(3)", "{}[0]"):
        assert end(bug).startswith("Traceback (most recent call last)")


def test_an_old_sentencepiece_is_named_too(monkeypatch):
    """CVE-2026-1260: a tokenizer's file writes where it should not."""
    found = {"jax": "1.0"}
    monkeypatch.setattr(terminal.metadata, "version", found.__getitem__)
    for version in ("0.2.1", "0.2.1.dev0", "0.3", "1.0"):
        found["sentencepiece"] = version
        terminal.check_versions()
    for version in ("0.2.0", "0.1.99", "0.2"):
        found["sentencepiece"] = version
        with pytest.raises(SystemExit, match=f"^sentencepiece {version} is too old, 0.2.1 is need"):
            terminal.check_versions()


OLD_JAX = """
import runpy, sys
from importlib import metadata
import jax, jax.experimental.layout, jax.sharding, optax
for owner, names in {
    jax: ["shard_map", "P", "NamedSharding", "typeof", "set_mesh"],
    jax.lax: ["pcast", "pvary"],
    jax.sharding: ["AxisType", "AbstractMesh", "get_abstract_mesh", "set_mesh"],
    jax.experimental.layout: ["Layout", "Format", "with_layout_constraint"],
}.items():
    for name in names:
        owner.__dict__.pop(name, None)
        assert not hasattr(owner, name), name
version = metadata.version
metadata.version = lambda name: "0.4.30" if name == "jax" else version(name)
for script in sys.argv[1:]:
    sys.argv = [script, *["pairs", "--data", "problems"] * (script == "synthesize.py")]
    try:
        runpy.run_path(script, run_name="__main__")
    except SystemExit as stop:
        print(script, stop)
"""


def test_scripts_can_be_imported_on_an_old_jax():
    """It can only be named if no import fails before: names that came later are looked up late.

    Tried on JAX 0.4.30, 0.5.3 and 0.7.2 themselves; here what they lack is taken away.
    """
    scripts = ["train_grpo.py", "train_sft.py", "train_simpo.py", "train_ppo.py",
               "train_distill.py", "eval.py",
               "synthesize.py"]
    command = [sys.executable, "-c", OLD_JAX, *scripts]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    lines = done.stdout.splitlines()
    assert [line.split()[0] for line in lines] == scripts, done.stderr
    assert all("JAX 0.4.30 is too old, 0.10 is needed: pip install -U" in line for line in lines)


def test_three_steps_in_a_row_that_teach_nothing_are_warned_of_once(capsys, tmp_path):
    lines = terminal.StepLines(tmp_path, {}, every_s=0.0)
    good, bad = {"accuracy": 0.3, "frac_reward_zero_std": 0.9}, {"accuracy": 0.04}
    for step, numbers in enumerate([bad, bad, good, bad, bad, bad, bad], 1):
        lines.say(step, None, numbers, None)
        out = " ".join(capsys.readouterr().err.split())
        assert ("at most 4 % of the completions" in out) == (step == 6)
    for step in range(3):
        lines.say(step, None, {"frac_reward_zero_std": 1.0}, None)
    out = " ".join(capsys.readouterr().err.split())
    assert out.startswith("warning: for 3 steps the completions of each prompt")
    lines = terminal.StepLines(tmp_path, {}, every_s=0.0, by_reward=False)  # a distillation
    for step in range(3):
        lines.say(step, None, {"accuracy": 0.0, "completions/clipped_ratio": 1.0}, None)
    out = " ".join(capsys.readouterr().err.split())
    assert "every completion was cut" in out and "at most 4 %" not in out
