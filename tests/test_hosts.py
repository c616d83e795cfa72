"""Two processes on loopback do what one does; one that dies, is stopped or differs ends both."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from importlib import import_module

import numpy as np
import pytest
from conftest import FLAGS, ROOT, contents
from safetensors.numpy import load_file

import data
import hosts
import train_grpo
import train_sft

WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from importlib import import_module
jobs, address, n, i = json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
for script, fields in jobs:
    if script == "exec":
        exec(fields)
        continue
    module = import_module(script)
    each = fields.pop("each", [{}] * n)[i]  # what only one of the processes is given
    module.main(module.Config(**fields, **each, coordinator=address, n_processes=n, process_id=i))
"""


def free_port():
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


class Pair:
    """Two processes of four devices each that run the jobs [(script, fields of its Config)]."""

    def __init__(self, jobs, folder):
        address = f"127.0.0.1:{free_port()}"
        flags = [f.replace("device_count=8", "device_count=4") for f in FLAGS]
        env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_COORDINATOR_BIND_ADDRESS": address}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", WORKER, str(ROOT), json.dumps(jobs), address, "2", str(i),
                 str(folder)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                text=True, env=env,
            )
            for i in range(2)
        ]

    def wait_for(self, what, timeout_s=600):
        end = time.monotonic() + timeout_s
        while not what():
            for process in self.processes:
                assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)

    def ends(self, codes, timeout_s=600):
        """Waits for both -> what each said."""
        said = []
        for process, code in zip(self.processes, codes, strict=True):
            try:
                said.append(process.communicate(timeout=timeout_s)[0])
            except subprocess.TimeoutExpired:
                for p in self.processes:
                    p.kill()
                raise AssertionError([p.communicate()[0][-3000:] for p in self.processes]) from None
            assert process.returncode == code, said[-1][-3000:]
        return said


def lines(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


# ------------------------------------------------------------- two processes of four = one of eight

SMALL = dict(steps=2, save_every=0, eval_every=0, eval_rows=8, seed=3)
JOBS = {
    "train_sft": SMALL | dict(batch_rows=16, micro_rows=1, max_length=176, show=0),
    "train_simpo": SMALL | dict(batch_rows=8, micro_rows=1, max_length=256, show=0),
    "train_grpo": SMALL | dict(prompts=3, group=4, max_new=24, max_prompt=88, pack_length=176,
                               slots=4, micro_rows=1, inner_epochs=2, kl_coef=0.1, rows=30,
                               rewards="score:1,judge:0.1", judge="tiny", log_samples=99),
}
KINDS = [(script, shard, 8) for shard in ("no", "yes") for script in reversed(JOBS)]
KINDS += [("train_sft", "yes", 0)]  # all weights are trained: the arrays of a checkpoint are split


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """The small model beside rows and pairs."""
    out = tmp_path_factory.mktemp("hosts")
    shutil.copytree(small, out / "model")
    rows = [json.loads(line) for line in (small / "rows.jsonl").read_text().splitlines()]
    good = lambda row: data.format_completion(row["reasoning"], row["answer"])
    bad = data.format_completion("No.", "7")
    pairs = [{"prompt": r["question"], "chosen": good(r), "rejected": bad} for r in rows]
    (out / "own.py").write_text("score = lambda text, row: sum(map(ord, text)) % 7 / 7\n")
    (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return out


def job(folder, out, script, **fields):
    source = "pairs.jsonl" if script == "train_simpo" else "model/rows.jsonl"
    if script == "train_grpo":
        fields = {"reward_file": str(folder / "own.py:score")} | fields
    fields = JOBS[script] | fields
    return script, fields | dict(weights=str(folder / "model"), data=str(folder / source),
                                 out=str(folder / out))


def alone(script, fields):
    """The same in this process, which has eight devices."""
    module = import_module(script)
    module.main(module.Config(**fields))


AGREE = """
# Process 1's clock is far ahead, and it alone gets a signal: all go by process 0's clock, and stop.
import runs
times = iter([0.0, 0.0, 10.0 + 89 * i, 20.0, 30.0])
budget = runs.Budget(limit_s=100.0, clock=lambda: next(times))
with runs.Run(sys.argv[6] + "/agree", {}, budget=budget) as run:
    assert run.restore({}) is None and run.progress(0) == 0
    assert abs(run.progress(1) - 10 / 95) < 1e-9 and not run.stopping, (budget.p, run.stopping)
    if i == 1:
        os.kill(os.getpid(), 15)
        assert run.asked and not run.stopping
    run.progress(2)
    assert run.stopping == "SIGTERM"
assert i or os.path.exists(sys.argv[6] + "/agree/config.json")
# No whole matrix is read for a split base.
import gemma, hosts, jax, jax.numpy as jnp, numpy as np
gemma._read = None
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
cfg, params = gemma.load(sys.argv[6] + "/../model", jnp.float32, mesh, True)
assert [s.data.shape for s in params["embed_tokens"].addressable_shards] == [(768, 4)] * 4
# A base too large for one device is split once more, over each process's own, to sample from.
own, whole = hosts.own(mesh), hosts.whole(params)
for spec in (gemma.pspecs(cfg, True), gemma.pspecs(cfg, False)):
    here = jax.tree.map(lambda x, s: hosts.on_own(x, own, s), params, spec)
    assert here["embed_tokens"].sharding.mesh.size == 4 and here["norm"].is_fully_addressable
    n = here["embed_tokens"].addressable_shards[0].data.shape[1]
    assert n == (8 if "data" in spec["embed_tokens"] else 32)
    jax.tree.map(np.testing.assert_array_equal, here, whole)
# What is exchanged comes back in order, whatever its size, and to the bit.
assert hosts.everyone(i) == [0, 1] and hosts.join(hosts.share([*"abcde"])) == [*"abcde"]
assert hosts.gather("x" * (i * 1000 + 1)) == ["x", "x" * 1001]
sent = {"a": np.float32([[-0.0, np.nan, 1e-45]]), "n": np.array(7, np.int32)}
told = hosts.told(jax.tree.map(lambda x: x * (i == 0), sent))
assert all(a.tobytes() == b.tobytes() and a.shape == b.shape for a, b in
           zip(jax.tree.leaves(sent), jax.tree.leaves(told)))
"""


@pytest.fixture(scope="module")
def both(folder):
    """Everything that two processes do and that one does, in two folders each."""
    name = lambda side, script, shard, rank: f"{side}/{script}-{shard}-{rank}"
    jobs = [job(folder, name("two", *kind), kind[0], shard=kind[1], lora_rank=kind[2])
            for kind in KINDS]
    wrong = job(folder, "two/wrong", "train_sft")
    wrong[1]["each"] = [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    pair = Pair([*jobs, ("exec", AGREE), wrong], folder / "two")
    for kind in KINDS:
        alone(*job(folder, name("one", *kind), kind[0], shard=kind[1], lora_rank=kind[2]))
    said = pair.ends([1, 1])
    return {kind: [folder / name(side, *kind) for side in ("one", "two")] for kind in KINDS}, said


@pytest.mark.parametrize("kind", KINDS, ids=str)
def test_two_processes_of_four_devices_are_one_of_eight(both, kind):
    one, two = both[0][kind]
    ours, theirs = (lines(run / "metrics.jsonl") for run in (one, two))
    assert len(ours) == len(theirs) >= 3
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            if not k.endswith("_s") and "per_s" not in k:
                assert a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-5), k
    arrays = [load_file(run / "checkpoints/step_2/resume/arrays.safetensors") for run in (one, two)]
    assert arrays[0].keys() == arrays[1].keys()
    for k in arrays[0]:
        np.testing.assert_allclose(arrays[0][k], arrays[1][k], rtol=1e-5, atol=1e-5, err_msg=k)
    if kind[0] == "train_grpo":
        ours, theirs = (lines(run / "samples.jsonl") for run in (one, two))
        assert len(ours) == len(theirs) == 2 * 3 * 4 and len({s["completion"] for s in ours}) > 4
        for a, b in zip(ours, theirs, strict=True):  # of a judge the scores, too, but for rounding
            near = {k: pytest.approx(a[k], abs=1e-5) for k in ("reward", "rewards", "advantage")}
            assert b == a | near
        assert np.ptp([s["advantage"] for s in ours]) > 1
    assert contents(one / "final").keys() == contents(two / "final").keys()


def test_a_flag_that_differs_ends_all_with_one_line(both, folder):
    for said in both[1]:
        last = said.strip().splitlines()[-1]
        assert re.match("--learning-rate is 0.001 in process 0 but 0.002 in process 1", last), said
    assert not (folder / "two/wrong").exists()


# ------------------------------------------------ one process, then two, a kill, a signal, then one

LOST = r"host 0 of 2: another host ended or was lost.*the same command on every host continues"


def test_a_run_goes_on_with_another_number_of_processes_after_a_kill_and_a_signal(folder):
    flags = dict(steps=8, save_every=1, keep=99, judge=None, rewards="score:1", kl_coef=0.0)
    whole, chain = (job(folder, name, "train_grpo", **flags) for name in ("whole", "chain"))
    alone(*whole)
    shutil.copytree(folder / "whole", folder / "chain")
    shutil.rmtree(folder / "chain/final")
    run = folder / "chain"
    for n in range(2, 9):  # as if this process had died after step 1
        shutil.rmtree(run / f"checkpoints/step_{n}")
    saved = lambda n: (run / f"checkpoints/step_{n}").exists()

    pair = Pair([chain], folder)
    pair.wait_for(lambda: saved(2))
    pair.processes[1].kill()
    killed = time.monotonic()
    said = pair.ends([1, -signal.SIGKILL])
    assert time.monotonic() - killed < hosts.HEARTBEAT_S + 20
    assert "resuming" in said[0] and re.match(LOST, said[0].strip().splitlines()[-1]), said[0]
    assert not (run / "final").exists()

    pair = Pair([chain], folder)  # the same command
    step = max(n for n in range(9) if saved(n))
    pair.wait_for(lambda: saved(step + 1))
    pair.processes[1].send_signal(signal.SIGTERM)
    said = pair.ends([1, 1])
    step = max(n for n in range(9) if saved(n))
    assert 4 <= step + 1 and step < 8
    for each in said:
        assert f"stopped by SIGTERM at step {step} of" in each.strip().splitlines()[-1], each

    alone(*chain)
    ours, theirs = (lines(folder / name / "samples.jsonl") for name in ("whole", "chain"))
    assert len(ours) == len(theirs) == 8 * 3 * 4
    for a, b in zip(ours, theirs, strict=True):  # the same problems, the same tokens
        assert b == a
    ours, theirs = (lines(folder / name / "metrics.jsonl") for name in ("whole", "chain"))
    for a, b in zip(ours, theirs, strict=True):
        assert [b.get(k) for k in ("step", "p", "learning_rate", "num_tokens")] == [
            a.get(k) for k in ("step", "p", "learning_rate", "num_tokens")
        ]
        assert b.get("loss", 0.0) == pytest.approx(a.get("loss", 0.0), rel=1e-4, abs=1e-5)


@pytest.mark.parametrize("flags, why", [
    (dict(coordinator="10.0.0.1:8476"), "--n-processes None"),
    (dict(coordinator="10.0.0.1", n_processes=2, process_id=0), "--coordinator 10.0.0.1 "),
    (dict(coordinator="10.0.0.1:8476", n_processes=2, process_id=2), "--process-id 2"),
])
def test_flags_that_do_not_belong_together(flags, why):
    with pytest.raises(ValueError, match=re.escape(why)):
        hosts.connect(train_sft.Config(**flags))


@pytest.mark.parametrize("n", [1, 4])
def test_a_cluster_is_what_jax_detects_with_more_than_one_process(monkeypatch, n):
    names = "JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID"
    slurm = dict.fromkeys(names, "0") | {"NTASKS": str(n)}
    for name, value in slurm.items():
        monkeypatch.setenv(f"SLURM_{name}", value)
    assert hosts.detected() == (n > 1)


@pytest.mark.parametrize("name", ["sampler.py", "own.py", "jax", "--seed", "the device"])
def test_code_versions_and_devices_are_compared_too(folder, monkeypatch, name):
    config = train_grpo.Config(reward_file=str(folder / "own.py:score"), process_id=1)
    hosts._check(config)  # of one process nothing differs
    monkeypatch.setattr(hosts, "everyone", lambda mine: [mine, mine, mine | {name: "other"}])
    with pytest.raises(SystemExit, match=f"{name} is .* in process 0 but 'other' in process 2"):
        hosts._check(config)
