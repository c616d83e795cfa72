"""Two processes on loopback do what one does; one that dies, is stopped or differs ends both."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys

import jax
import numpy as np
import pytest
from conftest import FLAGS, ROOT, contents, lines, live_adapter
from safetensors.numpy import load_file

import disk
import gemma
import hosts
import lora
import train_distill
import train_grpo
import train_ppo
import train_sft

pytestmark = pytest.mark.xdist_group("hosts")  # one worker makes the runs
SCRIPTS = {"train_sft": train_sft, "train_grpo": train_grpo, "train_ppo": train_ppo,
           "train_distill": train_distill}
WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from importlib import import_module
jobs, address, n, i = json.loads(sys.argv[2]), sys.argv[3], 2, int(sys.argv[4])
for script, fields in jobs:
    if script == "exec":
        exec(fields)
        continue
    module = import_module(script)
    each = fields.pop("each", [{}] * n)[i]  # what only one of the processes is given
    try:
        module.main(module.Config(**fields, **each, coordinator=address, n_processes=n,
                                  process_id=i))
    except SystemExit as end:
        print("ended:", end, flush=True)
"""


def start(jobs, folder):
    """Two processes of four devices each that run the jobs [(script, fields of its Config)]."""
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        address = f"127.0.0.1:{s.getsockname()[1]}"
    flags = [f.replace("device_count=8", "device_count=4") for f in FLAGS]
    env = os.environ | {"XLA_FLAGS": " ".join(flags)}
    command = [sys.executable, "-c", WORKER, str(ROOT), json.dumps(jobs), address]
    return [
        subprocess.Popen([*command, str(i), str(folder)], stdout=subprocess.PIPE, text=True,
                         stderr=subprocess.STDOUT, env=env)
        for i in range(2)
    ]


# ------------------------------------------------------------- two processes of four = one of eight

RUN = dict(steps=2, save_every=1, eval_every=0, eval_rows=8, seed=3, keep=9, micro_rows=1)
JOBS = {
    # all weights are trained and split, so the arrays of a checkpoint are gathered and spread
    "train_sft": RUN | dict(batch_rows=16, max_length=176, show=0, shard="yes", lora_rank=0),
    "train_grpo": RUN | dict(prompts=3, group=4, max_new=24, max_prompt=88, pack_length=176,
                             slots=4, inner_epochs=2, kl_coef=0.0, rows=30, lora_rank=8,
                             shard="yes", rewards="score:1,judge:0.1", judge="tiny",
                             log_samples=99),
    "train_ppo": RUN | dict(prompts=3, group=4, max_new=24, max_prompt=88, pack_length=176,
                            slots=4, kl_coef=0.1, rows=30, lora_rank=8, rewards="score:1",
                            value_warmup=1, log_samples=99),
    # in one process each device has a copy of the teacher, in two it is split over all eight
    "train_distill": RUN | dict(prompts=3, group=4, max_new=24, max_prompt=88, pack_length=176,
                                slots=4, rows=30, lora_rank=8, rewards="score:1", log_samples=99),
}
SPLIT = "import stage; stage.REPLICATED_BYTES = 1e3"


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """The small model beside its rows and a reward."""
    out = tmp_path_factory.mktemp("hosts")
    shutil.copytree(small, out / "model")
    cfg = gemma.read_config(out / "model")
    lora.save(out / "teacher", live_adapter(cfg, 3), cfg)
    (out / "own.py").write_text("score = lambda text, row: sum(map(ord, text)) % 7 / 7\n")
    return out


def job(folder, out, script, **fields):
    if script != "train_sft":
        fields = {"reward_file": str(folder / "own.py:score")} | fields
    if script == "train_distill":
        fields |= {"teacher": str(folder / "model"), "teacher_adapter": str(folder / "teacher")}
    fields = JOBS[script] | fields
    return script, fields | dict(weights=str(folder / "model"), out=str(folder / out),
                                 data=str(folder / "model/rows.jsonl"))


AGREE = """
# Process 1's clock is far ahead, and it alone gets a signal: all go by process 0's clock, and stop.
import runs, train_sft
times = iter([0.0, 0.0, 10.0 + 89 * i, 20.0, 30.0])
with runs.Run(train_sft.Config(out=sys.argv[5] + "/agree"), {}) as run:
    run.budget = runs.Budget(limit_s=100.0, clock=lambda: next(times))
    assert run.restore({}) is None and run.progress(0) == 0
    assert abs(run.progress(1) - 10 / 95) < 1e-9 and not run.stopping, (run.budget.p, run.stopping)
    if i == 1:
        os.kill(os.getpid(), 15)
        assert run.asked and not run.stopping
    run.progress(2)
    assert run.stopping == "SIGTERM"
assert i or os.path.exists(sys.argv[5] + "/agree/config.json")
# No whole matrix is read for a split base.
import gemma, hosts, jax, model_files, jax.numpy as jnp, numpy as np
read, model_files._read = model_files._read, None
mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
cfg, params = gemma.load(sys.argv[5] + "/model", jnp.float32, mesh, True)
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
values = [{"a": ["\\ud800é", None, 0.1 + 0.2, "x" * 10_000 * n]} for n in (0, 1)]
assert hosts.everyone(values[i]) == values
sent = {"a": np.float32([[-0.0, np.nan, 1e-45]]), "n": np.array(7, np.int32), "e": np.zeros(0)}
there = hosts.broadcast(jax.tree.map(lambda x: x * (i == 0), sent))
assert all(a.tobytes() == b.tobytes() and a.shape == b.shape for a, b in
           zip(jax.tree.leaves(sent), jax.tree.leaves(there)))
model_files._read = read
"""
DIES = """
# Process 1 is killed in the middle of a run, after the checkpoint of step 2.
import runs
if i == 1:
    real = runs.Run.log
    runs.Run.log = lambda run, step, m: os.kill(os.getpid(), 9) if step > 2 else real(run, step, m)
"""


@pytest.fixture(scope="module")
def both(folder):
    """The same two runs by one process and by two, and what two said whose flags differ at last.

    Two processes go on with the first run, which one process began.
    """
    for script, module in SCRIPTS.items():
        module.main(module.Config(**job(folder, f"one/{script}", script)[1]))
    shutil.copytree(folder / "one/train_sft", folder / "two/train_sft")
    shutil.rmtree(folder / "two/train_sft/final")
    shutil.rmtree(folder / "two/train_sft/checkpoints/step_2")
    wrong = job(folder, "two/wrong", "train_sft")
    wrong[1]["each"] = [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    jobs = [("exec", "import hosts; hosts.HEARTBEAT_S = 10"), wrong, ("exec", AGREE),
            *(job(folder, f"two/{script}", script) for script in [*SCRIPTS][:-1]),
            ("exec", SPLIT), job(folder, "two/train_distill", "train_distill"),
            ("exec", DIES), job(folder, "dies", "train_sft", steps=10**6)]
    processes = start(jobs, folder)
    try:
        said = [process.communicate(timeout=300)[0] for process in processes]
    finally:
        for process in processes:
            process.kill()
    return [(process.returncode, text) for process, text in zip(processes, said, strict=True)]


@pytest.mark.parametrize("script", SCRIPTS)
def test_two_processes_of_four_devices_are_one_of_eight(both, folder, script):
    one, two = (folder / side / script for side in ("one", "two"))
    ours, theirs = (lines(run / "metrics.jsonl") for run in (one, two))
    assert len(ours) == len(theirs) >= 3, both
    for a, b in zip(ours, theirs, strict=True):
        assert a.keys() == b.keys()
        for k in a:
            if not k.endswith("_s") and "per_s" not in k:
                assert a[k] == pytest.approx(b[k], rel=1e-5, abs=1e-5), k
    arrays = [load_file(run / "checkpoints/step_2/resume/arrays.safetensors") for run in (one, two)]
    assert arrays[0].keys() == arrays[1].keys()
    for k in arrays[0]:
        np.testing.assert_allclose(arrays[0][k], arrays[1][k], rtol=1e-5, atol=1e-5, err_msg=k)
    if script == "train_sft":
        assert "resuming" in both[0][1]
    else:
        ours, theirs = (lines(run / "samples.jsonl") for run in (one, two))
        assert len(ours) == len(theirs) == 2 * 3 * 4 and len({s["completion"] for s in ours}) > 4
        for a, b in zip(ours, theirs, strict=True):  # a judge's scores agree but for rounding
            near = {k: pytest.approx(a[k], abs=1e-5) for k in ("reward", "rewards", "advantage")}
            assert b == a | near
        assert np.ptp([s["advantage"] for s in ours]) > 1
    assert contents(one / "final").keys() == contents(two / "final").keys()


def test_a_flag_that_differs_ends_all_with_one_line(both, folder):
    for _, said in both:
        assert "ended: --learning-rate is 0.001 in process 0 but 0.002 in process 1" in said, said
    assert not (folder / "two/wrong").exists()


def test_a_process_that_dies_ends_the_other(both, folder):
    (code, said), (other, _) = both
    assert code != 0 and other == -signal.SIGKILL
    assert re.search("another task died|[Gg]loo", said), said
    checkpoints = [*(folder / "dies/checkpoints").glob("step_*")]
    assert all(disk.verify(path) is None for path in checkpoints) and len(checkpoints) > 1


# --------------------------------------------------------------------------------------- the flags


@pytest.mark.parametrize("flags", [
    dict(coordinator="10.0.0.1:8476"),
    dict(coordinator="10.0.0.1:8476", n_processes=2, process_id=2),
    dict(coordinator="auto", n_processes=2, process_id=0),
    dict(process_id=0),
])
def test_flags_that_do_not_belong_together(flags):
    with pytest.raises(ValueError, match="or --coordinator auto alone; found"):
        hosts.connect(train_sft.Config(**flags))


FULL = dict(coordinator="10.0.0.1:8476", n_processes=2, process_id=0)


@pytest.mark.parametrize("flags, address, error", [
    ({}, None, None),
    (dict(coordinator="auto"), None, ValueError("coordinator_address should be defined.\n\nx")),
    (FULL, "10.0.0.1:8476", RuntimeError("DEADLINE_EXCEEDED: Barrier timed out\nx")),
])
def test_who_meets_where(monkeypatch, flags, address, error):
    """Nobody without a flag, even in a SLURM job; and one line where processes do not meet."""
    for name in ("JOB_ID", "STEP_NODELIST", "PROCID", "LOCALID", "NTASKS"):
        monkeypatch.setenv(f"SLURM_{name}", "4")
    calls = []

    def initialize(**given):
        calls.append((given.get("coordinator_address"), given.get("coordinator_bind_address")))
        raise error

    monkeypatch.setattr(jax.distributed, "initialize", initialize)
    before = jax.config.jax_enable_preemption_service
    if error is None:
        hosts.connect(train_sft.Config(**flags))
        assert (calls, hosts.index, hosts.count) == ([], 0, 1)
        return
    with pytest.raises(SystemExit) as stop:
        hosts.connect(train_sft.Config(**flags))
    jax.config.update("jax_enable_preemption_service", before)
    assert calls == [(address, address)]
    assert str(stop.value) == (f"--coordinator {flags['coordinator']}: the processes did not meet: "
                               + str(error).splitlines()[0])


@pytest.mark.parametrize("name", ["sampler.py", "jax", "--seed", "devices"])
def test_code_versions_and_devices_are_compared_too(monkeypatch, name):
    config = train_grpo.Config(process_id=1)
    hosts._check(config)  # nothing differs in one process
    monkeypatch.setattr(hosts, "everyone", lambda mine: [mine, mine, mine | {name: "other"}])
    with pytest.raises(SystemExit, match=f"{name} is .* in process 0 but 'other' in process 2"):
        hosts._check(config)
