"""The README: commands name scripts and flags that exist, and example rows are read."""

import functools
import importlib
import io
import json
import re
import runpy
import shlex
import sys

import pytest
import tyro
from conftest import ROOT

import commandline
import data
import judge
import packed
import rewards
import rollouts

pytestmark = pytest.mark.smoke
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
BLOCKS = [b for page in PAGES for b in re.findall(r"```sh\n(.*?)```", page.read_text(), re.S)]


def commands(blocks):
    lines = [line for block in blocks for line in block.replace("\\\n", " ").splitlines()]
    return [shlex.split(part) for line in lines for part in line.split("&&")]


COMMANDS = commands(BLOCKS)


def test_the_two_commands_are_there():
    lines = [line for block in BLOCKS for line in block.splitlines()]
    assert "pip install -r requirements.txt && python train_grpo.py" in lines
    assert "pip install -r requirements-dev.txt && python -m pytest -q -n 2" in lines


def parse(script, flags):
    """As the script itself would: what it gives tyro.cli, with nothing behind it."""
    text = (ROOT / script).read_text()
    parser, entry = re.findall(r"(tyro|commandline)\.cli\((\w+)", text)[-1]
    entry = getattr(importlib.import_module(script.removesuffix(".py")), entry)
    if not isinstance(entry, type) and callable(entry):  # a function would do its work
        entry = functools.wraps(entry)(lambda **_: None)
    by_place = (tyro.conf.PositionalRequiredArgs,) if "PositionalRequiredArgs" in text else ()
    by_tyro = functools.partial(tyro.cli, config=by_place)
    parser = commandline.cli if parser == "commandline" else by_tyro
    config, rest = parser(entry, description="", args=flags, return_unknown_args=True)
    assert not rest or script == "to_kaggle.py", rest
    if rest:  # of the script that it is given
        parse(config.script, rest)


@pytest.mark.parametrize("command", COMMANDS, ids=" ".join)
def test_command_parses(command):
    if command[0] in ("gcloud", "srun"):  # what is before python is theirs
        words = [w for part in command for w in shlex.split(part.removeprefix("--command="))]
        command = words[words.index("python") :]
    program, *arguments = command
    if program in ("vllm", "llama-cli") or arguments[0].startswith("llama.cpp/"):
        return  # not ours
    if program == "pip":
        assert arguments[:2] == ["install", "-r"] and (ROOT / arguments[2]).exists()
        return
    given = [word.partition("=")[0] for word in command if "=" in word.split("/")[0]]
    if command[len(given)] == "bash":  # what a recipe runs is parsed in test_recipes.py
        script, *more = command[len(given) + 1 :]
        names = re.findall(r"^pick (\w+)", (ROOT / script).read_text(), re.M)
        assert {*given} <= {"ACTS", "OUT", *names} and more in ([], ["--model", "tiny"])
        return
    assert program == "python"
    if arguments[0] == "-m":
        assert arguments[1] == "pytest"
        return
    if arguments[0] == "recipes/table.py":
        assert all(folder.startswith("runs/") for folder in arguments[1:])
        return
    parse(arguments[0], arguments[1:])


def test_the_chain_of_the_page_runs(tmp_path, monkeypatch, capsys):
    """Its stages, then talking, merging and exporting: as they stand, but tiny and short."""
    quick = "--steps 1 --prompts 2 --group 2 --max-new 8 --eval-rows 2 --rows 20 --slots 4"
    packed = "--steps 1 --batch-rows 8 --micro-rows 1 --max-length 256 --max-new 8 --eval-rows 2"
    short = {
        "train_sft.py": packed, "train_simpo.py": packed, "train_grpo.py": quick,
        "train_ppo.py": quick, "train_distill.py": quick, "chat.py": "--max-new 8",
        "synthesize.py": "--rows 12 --max-new 64", "eval.py": "--rows 2 --max-new 8"}
    tiny = {"gemma3-1b": "tiny", "gemma3-12b": "tiny", "gsm8k": "problems",
            "gsm8k:test": "problems:test"}
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "stdin", io.StringIO("What is 2 + 2?\n/base\n"))
    page = commands(re.findall(r"```sh\n(.*?)```", PAGES[0].read_text(), re.S))
    chain = [c for c in page if c[0] == "python" and (
        c[1] in ("chat.py", "merge.py", "eval.py", "to_kaggle.py") or "gemma3-1b" in c)]
    assert [c[1] for c in chain[1:8]] == [
        "train_sft.py", "synthesize.py", "train_simpo.py", "train_grpo.py", "train_ppo.py",
        "train_distill.py", "eval.py"]
    for _, script, *flags in chain:
        flags = [tiny.get(word, word) for word in flags]
        if "--time-limit" in flags and script != "to_kaggle.py":
            at = flags.index("--time-limit")
            del flags[at : at + 2]
        monkeypatch.setattr(sys, "argv", [script, *flags, *short.get(script, "").split()])
        runpy.run_path(str(ROOT / script), run_name="__main__")
    said, told = capsys.readouterr()
    assert told.count("done: runs/") == 5 and "hf upload YOU/merged" in said
    assert "columns nothing reads" not in told  # in a file of our own
    made = {str(path.relative_to(tmp_path)) for path in tmp_path.glob("runs/*/*.json*")}
    assert {"runs/pairs/pairs.jsonl", "runs/eval/results.json"} <= made
    assert (tmp_path / "merged/Modelfile").exists() and (tmp_path / "train_grpo.ipynb").exists()


@pytest.mark.parametrize(
    "wrong", ["train_sft.py --stepz 2", "check.py --weight x", "to_kaggle.py eval.py --row 2"]
)
def test_a_wrong_command_would_not_parse(wrong):
    script, *flags = wrong.split()
    with pytest.raises((SystemExit, AssertionError)):
        parse(script, flags)


def test_the_page_is_short_and_its_sizes_and_links_are_true():
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 250
    sizes = re.findall(r"^\| `(\w+\.py)` \| (\d+) \|", text, re.M)
    assert len(sizes) == 15
    for name, lines in sizes:
        n = len((ROOT / name).read_text().splitlines())
        assert abs(n - int(lines)) <= 0.2 * n, f"{name} has {n} lines"
    for link in re.findall(r"\]\((?!http)([^)#]+)\)", text):
        assert (ROOT / link).exists(), link
    for name in re.findall(r"`(\w+\.(?:py|sh))`", text):
        assert name == "my.py" or [*ROOT.glob(name), *ROOT.glob(f"recipes/{name}")], name


TABLE = [flags for page in PAGES
         for flags in re.findall(r"^\| [^|]*\| `(--[^`]+)`", page.read_text(), re.M)]


@pytest.mark.parametrize("flags", TABLE)
def test_settings_of_the_literature_parse(flags):
    assert len(TABLE) >= 9
    config = commandline.cli(importlib.import_module("train_grpo").Config, "", flags.split())
    importlib.import_module("train_grpo").resolve(config)


# ------------------------------------------------------------------------------------ example rows

TOK = data.Tokenizer(ROOT / "tiny")
LINES = [b for page in PAGES for b in re.findall(r"```json\n(.*?)```", page.read_text(), re.S)]
ROWS = [json.loads(line) for block in LINES for line in block.splitlines()]


@pytest.mark.parametrize("row", ROWS, ids=lambda row: row.get("task_type", "shape"))
def test_an_example_row_is_read_by_all_who_take_it(row):
    problem = rollouts.read_problem(row, TOK, data.SYSTEM)
    trained = "reasoning" in row or not {"task_type", "rubrics"} & row.keys()
    if trained:  # as SFT shows the question, so it is asked
        ids, mask, _ = packed.read_example(row, TOK, data.SYSTEM)
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
    kinds = [rollouts.read_problem(row, TOK).kind for row in ROWS if "task_type" in row]
    assert kinds[:3] == ["choice", "number", "boolean"]


def test_no_requirement_replaces_an_installed_jax():
    """A bound, an extra or a jaxlib of its own could swap a TPU build for another."""
    for file in ("requirements.txt", "requirements-dev.txt"):
        lines = (ROOT / file).read_text().splitlines()
        assert [line for line in lines if line.startswith("jax")] in (["jax"], [])
