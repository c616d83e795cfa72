"""One fault suite over the scripts: each fault ends in one line, and the same command goes on.

A fault meets a folder whose run was stopped half-way. What the same command makes of the folder
afterwards must equal what a run that met no fault leaves, byte for byte but for timings.
"""

import builtins
import contextlib
import dataclasses
import errno
import functools
import io
import itertools
import json
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import KILLER, ONE_DEVICE, ROOT, contents, live_adapter
from safetensors.numpy import load_file
from test_judge import serving

import data
import disk
import eval as evaluation
import gemma
import judge
import lora
import runs
import sampler
import synthesize
import train_distill
import train_grpo
import train_ppo
import train_sft
import train_simpo

TRAINERS = ("train_sft", "train_simpo", "train_grpo", "train_ppo", "train_distill")
ON_ROLLOUTS = ("train_grpo", "train_ppo", "train_distill")
SCRIPTS = (*TRAINERS, "eval", "synthesize")
MODULE = {"train_sft": train_sft, "train_simpo": train_simpo, "train_grpo": train_grpo,
          "train_ppo": train_ppo, "train_distill": train_distill, "eval": evaluation,
          "synthesize": synthesize}
every_script = pytest.mark.parametrize(  # what one worker has run serves all tests of a script
    "name", [pytest.param(name, marks=pytest.mark.xdist_group(name)) for name in SCRIPTS])


def configs(folder: Path) -> dict:
    """The command of each script, on a model of 0.1 M weights and rows of a few tokens."""
    rows, start = str(folder / "rows.jsonl"), dict(weights=str(folder), system="Add.")
    start["adapter"] = str(folder / "adapter")
    run = dict(lora_rank=4, steps=4, save_every=1, eval_every=2, micro_rows=1, show=1, keep=9,
               max_new=8)
    rollouts = dict(max_prompt=32, max_new=8, slots=1, data=rows)
    return {
        "train_sft": train_sft.Config(**start, **run, data=rows, batch_rows=8, max_length=64,
                                      eval_rows=8, lora_dropout=0.1),
        "train_simpo": train_simpo.Config(**start, **run, data=str(folder / "pairs.jsonl"),
                                          batch_rows=8, max_length=64, eval_rows=8, loss="dpo"),
        "train_grpo": train_grpo.Config(**start, **run | rollouts, prompts=2, group=4, eval_rows=4,
                                        inner_epochs=2, kl_coef=0.1, pack_length=40,
                                        base="int8", is_cap=2.0, resample=1, curriculum="ordered",
                                        rewards="language:1,repetition:1"),
        "train_ppo": train_ppo.Config(**start, **run | rollouts, prompts=2, group=4, eval_rows=4,
                                      inner_epochs=2, minibatches=2, value_warmup=1, kl_coef=0.1,
                                      pack_length=40, rewards="language:1,repetition:1"),
        "train_distill": train_distill.Config(
            **start, **run | rollouts | dict(max_new=32), teacher=str(folder), prompts=4, group=3,
            teacher_adapter=str(folder / "teacher"), on_policy=0.5, eval_rows=4, pack_length=64,
            beta=0.4, rewards="language:1,repetition:1"),
        "eval": evaluation.Config(**start, **rollouts, samples=2, rows=8),
        "synthesize": synthesize.Pairs(**start, **rollouts, samples=3, rows=8, margin=0.01,
                                       rewards="language:1,repetition:1"),
    }


@dataclasses.dataclass
class World:
    """The folder of the model, the commands, and what they leave with and without a stop."""

    folder: Path
    configs: dict
    compiled: list
    wholes: dict = dataclasses.field(default_factory=dict)

    def run(self, name: str, out: Path, **change):
        return MODULE[name].main(dataclasses.replace(self.configs[name], out=str(out), **change))

    def ends(self, name: str, out: Path, *says: str, **change) -> str:
        """The command ends in one line, as a script shows it, that says all of this."""
        with pytest.raises((SystemExit, ValueError)) as end:
            self.run(name, out, **change)
        line = str(end.value)
        assert "\n" not in line and all(part in line for part in says), line
        return line

    def whole(self, name: str) -> dict:
        if name not in self.wholes:
            out = self.folder / f"whole-{name}"
            self.run(name, out)
            self.wholes[name] = contents(out)
        return self.wholes[name]

    def half(self, name: str, out: Path, number=signal.SIGTERM) -> Path:
        """A folder whose run a signal stopped: after two of four steps, or some completions."""
        first = self.folder / f"half-{name}-{number.name}"
        if not first.exists():
            self.stop(name, first, number)
        return Path(shutil.copytree(first, out, dirs_exist_ok=True))

    def stop(self, name: str, out: Path, number: signal.Signals) -> None:
        owner, step, last = (evaluation, "grade", 20)
        if name in TRAINERS:
            owner, step, last = runs.Run, "log", 3  # the first is an evaluation
        real, calls = getattr(owner, step), []

        def one(*a, **k):
            calls.append(a)
            if len(calls) == last:
                os.kill(os.getpid(), number)
            return real(*a, **k)

        with pytest.MonkeyPatch.context() as m:
            m.setattr(owner, step, one)
            self.ends(name, out, f"stopped by {number.name}", "the same command continues")

    def goes_on(self, name: str, out: Path) -> None:
        """The same command ends as if nothing had been."""
        self.run(name, out)
        found, whole = contents(out), self.whole(name)
        assert found.keys() == whole.keys()
        for file in whole:
            assert found[file] == whole[file], file


@pytest.fixture(scope="module")
def world(small, tmp_path_factory):
    folder = tmp_path_factory.mktemp("faults")
    for file in small.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    rows = [{"question": f"{i} + 1?", "reasoning": f"{i} and 1.", "answer": str(i + 1),
             "difficulty": i % 5} for i in range(40)]
    pairs = [{"prompt": r["question"], "chosen": f"It is {r['answer']}.", "rejected": "No idea."}
             for r in rows]
    for name, lines in (("rows", rows), ("pairs", pairs)):
        (folder / f"{name}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    cfg, params = gemma.load(folder)
    lora.save(folder / "adapter", live_adapter(cfg, 3), cfg)
    lora.save(folder / "teacher", live_adapter(cfg, 7), cfg)
    wider = dataclasses.replace(cfg, hidden_size=48)
    lora.save(folder / "other", live_adapter(wider), wider)
    norm = params["norm"].at[0].set(jnp.nan)
    gemma.save(folder / "nan", cfg, params | {"norm": norm})
    compiled = []
    with pytest.MonkeyPatch.context() as m:  # the same program is traced once
        for script in map(MODULE.get, TRAINERS):
            m.setattr(script, "make_steps", once_for_each_shape(script.make_steps, compiled))
        yield World(folder, configs(folder), compiled)


def once_for_each_shape(make_steps, compiled):
    blank = dict(out="", steps=0, time_limit=None, judge=None, rewards="any", judge_limit=0)

    @functools.cache
    def made(*a):
        steps = make_steps(*a)
        compiled.extend(steps)
        return steps

    def make(cfg, config, mesh, sharded):
        known = {k: v for k, v in blank.items() if hasattr(config, k)}
        return made(cfg, dataclasses.replace(config, **known), mesh, sharded)

    return make


@contextlib.contextmanager
def in_place_of(file: Path, content: bytes):
    before = file.read_bytes()
    file.write_bytes(content)
    try:
        yield
    finally:
        file.write_bytes(before)


@contextlib.contextmanager
def refusing(number: int, part: str, after: int = 0):
    """The system refuses to open for writing, or to make, what has `part` in its path."""
    left = [after]

    def refuse(real, writes):
        def call(path, *a, **k):
            if part in str(path) and writes(*a, **k):
                left[0] -= 1
                if left[0] < 0:
                    raise OSError(number, os.strerror(number), str(path))
            return real(path, *a, **k)

        return call

    writes = lambda mode="r", *a, **k: bool({*mode} & {*"wax+"})
    with pytest.MonkeyPatch.context() as m:
        m.setattr(io, "open", refuse(io.open, writes))
        m.setattr(builtins, "open", refuse(builtins.open, writes))
        m.setattr(os, "mkdir", refuse(os.mkdir, lambda *a: True))
        yield
    assert left[0] < 0, "nothing was refused"


# -------------------------------------------------------------------------------------- the process

TORN = """
import os, pathlib, runpy, signal, sys
real, left = pathlib.Path.open, int(sys.argv[1])
def torn(path, mode="r", *a, **k):
    global left
    file = real(path, mode, *a, **k)
    if path.name == "samples.jsonl" and mode == "ab":
        left -= 1
        if left < 0:
            file.write(b'{"problem": 0, "mode": "gre')
            file.flush()
            os.kill(os.getpid(), signal.SIGKILL)
    return file
pathlib.Path.open = torn
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@every_script
def test_kill_9(world, tmp_path, name):
    """At a file operation, or in the middle of a line; then the same command continues.

    Who evaluates has one device when it is killed and eight when it continues.
    """
    killer, at = (KILLER, 38) if name in TRAINERS else (TORN, 2)
    command = [sys.executable, "-c", killer, str(at), str(ROOT / f"{name}.py")]
    command += ["pairs"] * (name == "synthesize")
    config = dataclasses.replace(world.configs[name], out=str(tmp_path))
    unset = type(config)()
    for field in dataclasses.fields(config):
        if (value := getattr(config, field.name)) != getattr(unset, field.name):
            command += ["--" + field.name.replace("_", "-"), str(value)]
    world.whole(name)  # before, so that the process finds its programs in the cache
    done = subprocess.run(command, capture_output=True, text=True, timeout=300,
                          env=os.environ if name in TRAINERS else ONE_DEVICE)
    assert done.returncode == -signal.SIGKILL, done.stderr[-3000:]
    if name in TRAINERS:
        assert disk.verify(tmp_path / "checkpoints/step_1") is None
        assert not (tmp_path / "final").exists()
    else:
        assert len((tmp_path / "samples.jsonl").read_bytes().splitlines()) > 2
    world.goes_on(name, tmp_path)


@every_script
def test_sigterm(world, tmp_path, name):
    out = world.half(name, tmp_path)
    if name in TRAINERS:
        assert {p.name for p in (out / "checkpoints").iterdir()} == {"step_1", "step_2"}
    world.goes_on(name, out)
    # what an update leaves, a checkpoint brings or a start makes is the same to the compiler
    assert {step._cache_size() for step in world.compiled} <= {0, 1}


@pytest.mark.xdist_group("train_ppo")
def test_final_of_ppo_is_the_policy_and_nothing_of_the_critic(world):
    """lora.load() refuses a tensor that is none of an adapter's."""
    world.whole("train_ppo")
    run, cfg = world.folder / "whole-train_ppo", gemma.read_config(world.folder)
    saved = load_file(run / "checkpoints/step_4/resume/arrays.safetensors")
    adapter = lora.load(run / "final", cfg)
    for side, name in itertools.product("ab", adapter["a"]):
        x = adapter[side][name]
        np.testing.assert_array_equal(x, saved.pop(f"trained/policy/{side}/{name}"))
        assert (x != saved[f"trained/critic/adapter/{side}/{name}"]).any()
    assert not [name for name in saved if name.startswith("trained/policy")]
    assert [f.name for f in (run / "final").rglob("*.safetensors")] == ["adapter_model.safetensors"]


def test_ctrl_c(world, tmp_path):
    """Where no run folder waits for the end of the step; tests/test_runs.py has the other case."""
    world.half("eval", tmp_path, signal.SIGINT)


MEMORY = {  # what lowers the memory of each
    name: (dict(slots=2) if name not in ("train_sft", "train_simpo") else {})
    | (dict(micro_rows=2, remat="layer", shard="yes") if name in TRAINERS else {})
    for name in SCRIPTS
}


@every_script
def test_out_of_memory(world, tmp_path, monkeypatch, name):
    """The line names flags that the script has, and the run goes on with what it advises."""
    out, lower = world.half(name, tmp_path), MEMORY[name]

    def full(*a, **k):
        raise jax.errors.JaxRuntimeError("RESOURCE_EXHAUSTED: Out of memory: 9 bytes\n  a\n  b")

    flags = ["--" + flag.replace("_", "-") for flag in lower]
    with monkeypatch.context() as m:
        if name in ("train_sft", "train_simpo"):
            m.setattr(MODULE[name], "make_steps", lambda *a: (full, full))
        else:
            m.setattr(sampler.Sampler, "decode", full)
        line = world.ends(name, out, "out of memory: ", *flags, "9 bytes")
        assert ("--slots" in line) == ("slots" in lower)
    if name in ON_ROLLOUTS:  # they have all of the flags
        world.run(name, out, **lower)
        assert contents(out).keys() == world.whole(name).keys()


def test_out_of_memory_of_a_real_device(world, tmp_path):
    """What XLA itself says when an allocation fails, in a process that may have 6 GB."""
    command = [sys.executable, str(ROOT / "eval.py"), "--weights", str(world.folder), "--rows", "2",
               "--data", str(world.folder / "rows.jsonl"), "--out", str(tmp_path), "--slots",
               "9000000"]
    command = ["bash", "-c", 'ulimit -v 6000000; exec "$@"', "bash", *command]
    done = subprocess.run(command, capture_output=True, text=True, env=ONE_DEVICE, timeout=300)
    assert done.returncode == 1 and "Traceback" not in done.stderr
    line = done.stderr.splitlines()[-1]
    assert line.startswith("out of memory: lower --slots (RESOURCE_EXHAUSTED"), line


def test_other_errors_of_the_devices_are_not_hidden(world, tmp_path, monkeypatch):
    def broken(*a, **k):
        raise jax.errors.JaxRuntimeError("INTERNAL: a fault of ours")

    monkeypatch.setattr(sampler.Sampler, "decode", broken)
    with pytest.raises(jax.errors.JaxRuntimeError, match="INTERNAL"):
        world.run("eval", tmp_path)


# ------------------------------------------------------------------------- the disk and the weights


def faults(world, name, out):
    """(what happens, what the line says, whether that is a matter of the weights)."""
    weights, adapter = (world.folder / file for file in
                        ("model.safetensors", "adapter/adapter_model.safetensors"))
    half = weights.read_bytes()[:-1000]
    other = (world.folder / "other/adapter_model.safetensors").read_bytes()
    nan = (world.folder / "nan/model.safetensors").read_bytes()
    written = ".tmp-step_3" if name in TRAINERS else "samples.jsonl"
    is_nan = ("the logits are not finite", "weights")
    rows = Path(world.configs[name].data)
    other_row = rows.read_bytes().replace(b"0 + 1?", b"0 + 2?", 1)
    of_rows = f"the rows of --data {rows}" if name in TRAINERS else "the prompts"
    yield disk.lock(out), (f"{out} is in use by process {os.getpid()}", "--out"), False
    yield refusing(errno.ENOSPC, written, 2), (str(out), "No space left on device"), False
    yield refusing(errno.EROFS, str(out)), (f"cannot write {out}", "Read-only", "--out"), False
    yield in_place_of(out / "config.json", b'{"seed": '), ("config.json", "another --out"), False
    yield in_place_of(rows, other_row), (f"checksum of {of_rows} was", "put it back"), False
    yield in_place_of(weights, half), (str(weights), "a part of one"), True
    yield in_place_of(adapter, other), (
        str(adapter), "has lora_A, lora_B of shapes", "(4, 48)", "expected ((4, 32)"), True
    yield in_place_of(weights, nan), is_nan, True


@every_script
def test_a_fault_is_one_line_and_the_run_goes_on(world, tmp_path, name):
    """Weights that are not what they were are an error; so a new folder meets their faults too."""
    out = world.half(name, tmp_path / "x")
    for n, (fault, says, in_weights) in enumerate(faults(world, name, out)):
        with fault:
            if in_weights:
                world.ends(name, tmp_path / f"new{n}", *says)
                continued = world.ends(name, out)  # a trainer loads the weights first
                assert "safetensors was" in continued or all(part in continued for part in says)
            else:
                world.ends(name, out, *says)
        assert not [*out.rglob(".tmp-step*")]
    world.goes_on(name, out)


# ------------------------------------------------------------------------------------- the endpoint


@pytest.mark.parametrize("name", ["train_grpo", "synthesize"])
def test_judge_down(world, tmp_path, monkeypatch, name):
    """Down after some judgements: the run stops; up again: those that it had are not asked for.

    Nor are others, and the run stops again, where a limit is spent; with a higher one it goes on.
    """
    up = [9]
    asked = []

    def answer(n, body):
        text = body["messages"][0]["content"]
        if up[0] == 0:
            return "hang up"
        up[0] -= 1
        asked.append(text)
        return {"content": json.dumps({"score": 1 + len(text) % 5})}

    monkeypatch.setattr(judge, "ENOUGH", 4)
    monkeypatch.setattr(judge, "Endpoint", functools.partial(judge.Endpoint, retries=0))
    with serving(answer) as server:
        change = dict(judge=server.url, rewards="judge:1", judge_threads=1)
        flag = "--max-missing" if name == "train_grpo" else "--judge-missing"
        world.ends(name, tmp_path, flag, "Remote", **change)
        up[0] = 10**6
        world.ends(name, tmp_path, flag, "all 9 requests of --judge-limit", **change, judge_limit=9)
        assert len(asked) == 9
        world.run(name, tmp_path, **change, judge_limit=10**6)
        assert len(asked) > 9 and len({*asked}) == len(asked)
    if name == "train_grpo":
        assert disk.verify(tmp_path / "final") is None
    else:
        assert (tmp_path / "pairs.jsonl").exists()


def test_teacher_down(world, tmp_path, monkeypatch, capsys):
    """Every question it did not answer is a reject, said so, and asked for by the same command."""
    up = [5]

    def answer(n, body):
        if up[0] == 0:
            return "hang up"
        up[0] -= 1
        trace = "It is one more than the number."
        return {"content": data.format_completion(trace, str(len(body["messages"][0]["content"])))}

    real = synthesize.Teacher
    monkeypatch.setattr(synthesize, "Teacher", functools.partial(real, retries=0))
    monkeypatch.setenv("TEACHER_API_KEY", "sk-teacher-1234")
    with serving(answer) as server:
        rows = world.folder / "rows.jsonl"
        config = synthesize.Traces(teacher=server.url, data=str(rows), out=str(tmp_path), rows=12,
                                   teacher_threads=1, weights=str(world.folder))
        synthesize.main(config)
        assert "7 no reply" in capsys.readouterr().err
        up[0], before = 10**6, len(server.bodies)
        synthesize.main(config)
        assert len(server.bodies) - before == 7 and "no reply" not in capsys.readouterr().err
        assert {*server.keys} == {"Bearer sk-teacher-1234"}
    for file in tmp_path.rglob("*.json*"):
        assert "sk-teacher" not in file.read_text(), file
