"""Several processes on loopback do what one does; when one dies, is told to stop or differs, all end."""

import dataclasses
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

import jax
import numpy as np
import pytest
from conftest import FLAGS, ROOT, contents
from safetensors.numpy import load_file

import data
import hosts
import train_grpo
import train_sft
import train_simpo

WORKER = """
import json, os, sys
sys.path.insert(0, sys.argv[1])
from importlib import import_module
jobs, address, n, i = json.loads(sys.argv[2]), sys.argv[3], int(sys.argv[4]), int(sys.argv[5])
for script, fields in jobs:
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

    def __init__(self, jobs, worker=WORKER):
        address = f"127.0.0.1:{free_port()}"
        flags = [f.replace("device_count=8", "device_count=4") for f in FLAGS]
        env = os.environ | {"XLA_FLAGS": " ".join(flags), "JAX_COORDINATOR_BIND_ADDRESS": address}
        self.processes = [
            subprocess.Popen(
                [sys.executable, "-c", worker, str(ROOT), json.dumps(jobs), address, "2", str(i)],
                stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, env=env,
            )
            for i in range(2)
        ]  # fmt: skip

    def wait_for(self, what, timeout_s=240):
        end = time.monotonic() + timeout_s
        while not what():
            for process in self.processes:
                assert process.poll() is None, process.stdout.read()[-3000:]
            assert time.monotonic() < end
            time.sleep(0.05)

    def ends(self, codes, timeout_s=240):
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
    "train_simpo": SMALL | dict(batch_rows=8, micro_rows=1, max_length=256, show=0, loss="dpo"),
    "train_grpo": SMALL | dict(prompts=3, group=4, max_new=24, max_prompt=88, pack_length=176,
                               slots=4, micro_rows=1, inner_epochs=2, kl_coef=0.1, rows=30,
                               rewards="length:1,answer:1", log_samples=99),
}  # fmt: skip
KINDS = [(script, shard, rank) for script in JOBS for shard, rank in (("no", 8), ("yes", 8))]
KINDS += [("train_sft", "yes", 0)]  # all weights are trained: the arrays of a checkpoint are split


@pytest.fixture(scope="module")
def folder(small, tmp_path_factory):
    """The small model beside rows and pairs."""
    out = tmp_path_factory.mktemp("hosts")
    shutil.copytree(small, out / "model")
    rows = [json.loads(line) for line in (small / "rows.jsonl").read_text().splitlines()]
    pairs = [{"prompt": r["question"], "chosen": data.format_completion(r["reasoning"], r["answer"]),
              "rejected": data.format_completion("No.", "7")} for r in rows]  # fmt: skip
    (out / "pairs.jsonl").write_text("\n".join(map(json.dumps, pairs)))
    return out


def job(folder, out, script, **fields):
    source = "pairs.jsonl" if script == "train_simpo" else "model/rows.jsonl"
    fields = JOBS[script] | fields
    return script, fields | dict(weights=str(folder / "model"), data=str(folder / source),
                                 out=str(folder / out))  # fmt: skip


def alone(script, fields):
    """The same in this process, which has eight devices."""
    module = import_module(script)
    module.main(module.Config(**fields))


AGREE = """
import os, signal, sys
sys.path.insert(0, sys.argv[1])
"""


@pytest.fixture(scope="module")
def both(folder):
    """Everything that two processes do and that one does, in two folders each."""
    name = lambda side, script, shard, rank: f"{side}/{script}-{shard}-{rank}"
    jobs = [job(folder, name("two", *kind), kind[0], shard=kind[1], lora_rank=kind[2])
            for kind in KINDS]  # fmt: skip
    wrong = job(folder, "two/wrong", "train_sft")
    wrong[1]["each"] = [{"learning_rate": 1e-3}, {"learning_rate": 2e-3}]
    pair = Pair([*jobs, wrong])
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
        for a, b in zip(ours, theirs, strict=True):
            assert b == a | {"advantage": pytest.approx(a["advantage"], abs=1e-5)}
    assert contents(one / "final").keys() == contents(two / "final").keys()


def test_a_flag_that_differs_ends_all_with_one_line(both, folder):
    for said in both[1]:
        last = said.strip().splitlines()[-1]
        assert re.match("--learning-rate is 0.001 in process 0 but 0.002 in process 1", last), said
    assert not (folder / "two/wrong").exists()
