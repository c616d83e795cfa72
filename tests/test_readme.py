"""The README: commands name scripts and flags that exist, and example rows are read."""

import importlib
import json
import re
import shlex

import pytest
import tyro
from conftest import ROOT

import data
import eval as evaluation
import judge
import rewards

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
    given = [word.partition("=")[0] for word in command if "=" in word.split("/")[0]]
    if command[len(given)] == "bash":  # what a recipe runs is parsed in test_recipes.py
        script, *more = command[len(given) + 1 :]
        names = re.findall(r"^pick (\w+)", (ROOT / script).read_text(), re.M)
        assert {*given} <= {"ACTS", "OUT", *names} and more in ([], ["--model", "tiny"])
        return
    assert command[0] == "python"
    if command[1] == "-m":
        assert command[2] == "pytest"
        return
    if command[1] == "recipes/table.py":
        assert all(folder.startswith("runs/") for folder in command[2:])
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


# ------------------------------------------------------------------------------------ example rows

TOK = data.Tokenizer(ROOT / "tiny")
LINES = re.findall(r"```json\n(.*?)```", (ROOT / "README.md").read_text(), re.S)
ROWS = [json.loads(line) for block in LINES for line in block.splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.get("task_type", "shape"))
def test_an_example_row_is_read_by_all_who_take_it(row):
    problem = evaluation.read_problem(row, TOK, data.SYSTEM)
    trained = "reasoning" in row or not {"task_type", "rubrics"} & row.keys()
    if trained:  # as SFT shows the question, so it is asked
        ids, mask = data.read_example(row, TOK, data.SYSTEM)
        assert tuple(ids[: mask.argmax()]) == problem.prompt
        _, answer, strict = rewards.parse(TOK.decode(ids[mask.argmax() :]))
        told = problem.gold, problem.kind, problem.choices
        assert problem.gold is None or (strict and rewards.correct(answer, *told))
    assert trained or row.get("rubrics") or row.get("reference")
    given = row | {"question": problem.question, "answer": problem.gold}
    assert judge.rubric(row) and judge.opening("grar", given)


def test_there_is_a_row_of_every_domain():
    domains = "medical, chemistry, legal, robotics, creative writing, summarisation, code"
    assert ", ".join(row["task_type"] for row in ROWS if "task_type" in row) == domains
    kinds = [evaluation.read_problem(row, TOK).kind for row in ROWS if "task_type" in row]
    assert kinds[:3] == ["choice", "number", "boolean"]
