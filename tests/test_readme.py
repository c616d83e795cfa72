"""Every Python command in the README names a script that exists and flags that it takes."""

import importlib
import re
import shlex

import pytest
import tyro
from conftest import ROOT

pytestmark = pytest.mark.smoke
BLOCKS = re.findall(r"```sh\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
COMMANDS = [
    shlex.split(part)
    for block in BLOCKS
    for line in block.replace("\\\n", " ").splitlines()
    for part in line.split("&&")
]


def test_the_two_commands_are_there():
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert "pip install -r requirements.txt && python train_grpo.py" in lines
    assert "pip install -r requirements-dev.txt && python -m pytest -q -n 2" in lines


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_parses(command):
    if command[0] == "pip":
        assert command[1:3] == ["install", "-r"] and (ROOT / command[3]).exists()
        return
    if command[0] in ("gcloud", "srun"):  # what is before python is theirs
        words = [w for part in command for w in shlex.split(part.removeprefix("--command="))]
        command = words[words.index("python") :]
    assert command[0] == "python"
    if command[1] == "-m":
        assert command[2] == "pytest"
        return
    module = importlib.import_module(command[1].removesuffix(".py"))
    if command[1] == "gemma.py":  # its main has no Config: parsing would run it
        assert set(command[2::2]) <= {"--weights", "--tokenizer"}
    else:
        tyro.cli(module.Config, args=command[2:])


TABLE = re.findall(r"^\| [^|]*\| `(--[^`]+)`", (ROOT / "README.md").read_text(), re.M)


@pytest.mark.parametrize("flags", TABLE)
def test_settings_of_the_literature_parse(flags):
    assert len(TABLE) >= 9
    config = tyro.cli(importlib.import_module("train_grpo").Config, args=flags.split())
    importlib.import_module("train_grpo").resolve(config)
