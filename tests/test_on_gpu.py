"""on_gpu.py, all of it with the tiny model on a CPU, so that it is ready when a GPU is there."""

import os
import subprocess
import sys

import on_gpu
import pytest
import tyro
from conftest import ROOT, lines
from test_readme import parse


def test_the_commands_for_a_real_model_parse():
    tasks = on_gpu.plan(on_gpu.Config(weights=str(ROOT / "tiny"), gsm8k="gsm8k"))
    assert len(tasks) == 12
    for task in tasks:
        script, *flags = (word.replace("{left}", "60") for word in task.command)
        if script.startswith("tests/"):
            tyro.cli(on_gpu.Config, args=flags)
        else:
            parse(script, flags)


@pytest.mark.slow
def test_quick(tmp_path):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}  # one device, as there
    command = [sys.executable, "tests/on_gpu.py", "--quick", f"--out={tmp_path}", "--budget=900s"]
    done = subprocess.run(command, cwd=ROOT, env=env, capture_output=True, text=True)
    rows = lines(tmp_path / "results.jsonl")
    assert done.returncode == 0, done.stdout + done.stderr[-2000:]
    assert {row["status"] for row in rows} == {"ok"} and len(rows) == 11
    assert (tmp_path / "table.md").read_text() in done.stdout
