"""Every field of every script's Config has its sentence in --help and is read by that script."""

import ast
import dataclasses
import importlib
import inspect
import os
import re
import subprocess
import sys
import types

import pytest
from conftest import ROOT

import commandline

pytestmark = pytest.mark.smoke
CONFIGS = [("train_sft", "Config"), ("train_simpo", "Config"), ("train_grpo", "Config"),
           ("train_ppo", "Config"), ("train_distill", "Config"), ("eval", "Config"),
           ("chat", "Config"),
           ("synthesize", "Traces"), ("synthesize", "Pairs")]


def reads(module: types.ModuleType, name: str, seen: set, found: set) -> set:
    """The fields X of every `config.X` in a function, and in ours that it calls, in any file.

    resolve() fills and checks fields, which is not to use them.
    """
    value = inspect.unwrap(getattr(module, name))
    home = inspect.getmodule(value)
    ours = str(getattr(home, "__file__", None) or "").startswith(str(ROOT))
    if name == "resolve" or value in seen or not ours:
        return found
    seen.add(value)
    tree = ast.parse(inspect.getsource(value))
    names = [alias.name for node in ast.walk(tree) if isinstance(node, ast.Import)
             for alias in node.names]
    lazy = {name: importlib.import_module(name) for name in names if (ROOT / f"{name}.py").exists()}
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(ast.Name("config" | "quiet"), field):
                found.add(field)
            case ast.Attribute(ast.Attribute(_, "config"), field):  # self.config, setup.config
                found.add(field)
            case ast.Call(ast.Name("getattr"), [ast.Name("config"), ast.Constant(field), *_]):
                found.add(field)
            case ast.Attribute(ast.Name(owner), function):
                owner = lazy.get(owner) or getattr(home, owner, None)
                if inspect.ismodule(owner) and callable(getattr(owner, function, None)):
                    reads(owner, function, seen, found)
            case ast.Name(function) if callable(getattr(home, function, None)):
                reads(home, function, seen, found)
    return found


@pytest.mark.parametrize("script, cls", CONFIGS)
def test_every_field_is_documented_and_read(script, cls, capsys):
    module = importlib.import_module(script)
    config = getattr(module, cls)
    said = commandline.described(config)
    words = [cls.lower()] if cls != "Config" else []
    page = "".join(shown(module, [*words, "--help"], capsys).split()).replace("│", "")
    read = reads(module, "main", set(), set())
    for field in dataclasses.fields(config):
        _, sentence = said.get(field.name, ("", ""))
        assert len(sentence) > 10 and sentence.endswith("."), field.name
        flag = field.name.replace("_", "-")
        assert f"--{flag}" in page or f"--no-{flag}" in page, field.name
        start = sentence if field.default is not True else f"{sentence[0].lower()}{sentence[1:]}"
        assert "".join(start.split())[:20] in page, field.name
        assert field.name in read, f"{field.name} is never read"


@pytest.mark.parametrize("script", ["merge", "report", "to_kaggle", "check"])
def test_the_other_commands_pages_fit_80_columns_and_show_no_none(script):
    page = subprocess.run([sys.executable, f"{script}.py", "--help"], cwd=ROOT, text=True,
                          env=os.environ | {"COLUMNS": "80"}, capture_output=True,
                          check=True).stdout
    assert "None" not in page
    assert [line for line in page.splitlines() if len(line) > 80] == []


def shown(module, args, capsys, width="80") -> str:
    """What a script prints for these flags before it leaves."""
    with pytest.MonkeyPatch.context() as patch, pytest.raises(SystemExit):
        patch.setenv("COLUMNS", width)
        commandline.cli(module.Config, module.__doc__, args, prog=f"{module.__name__}.py")
    captured = capsys.readouterr()
    return captured.out + captured.err


@pytest.mark.parametrize("script", ["train_grpo", "train_ppo", "train_distill", "train_sft",
                                    "train_simpo", "eval"])
def test_help_is_grouped_and_has_the_defaults_of_the_model(script, capsys):
    module = importlib.import_module(script)
    tiny = shown(module, ["--help"], capsys)
    page = shown(module, ["--model", "google/gemma-3-12b-it", "--help"], capsys)
    groups = re.findall(r"^ (\S+) options *$", page, re.M)
    assert groups[0] == "model" and len(set(groups)) == len(groups) > 3
    assert groups[-1] == "judge" or "judge" not in groups
    assert page[page.index(" model options") :].splitlines()[2].startswith("  --model STR")
    for text, model in ((tiny, "tiny"), (page, "gemma3-12b")):
        assert f"the defaults of --model {model};" in " ".join(text.replace("│", "").split())
        assert re.search(r"bfloat16\)|float32\)", text)[0][:-1] == module.DEFAULTS[
            "tiny" if model == "tiny" else "gemma3"]["dtype"]
    assert "None" not in page and "\x1b" not in page
    assert max(map(len, page.splitlines())) <= 80


def test_flags_people_type(capsys):
    grpo, sft = (importlib.import_module(name) for name in ("train_grpo", "train_sft"))
    got = commandline.cli(grpo.Config, "", [
        "--lr", "2e-5", "--batch-size=4", "--num-generations", "6", "--max-new-tokens", "9",
        "--output-dir", "x", "--sapo"])
    assert got == grpo.Config(learning_rate=2e-5, prompts=4, group=6, max_new=9, out="x", sapo=True)
    assert commandline.cli(sft.Config, "", ["--batch-size", "4"]) == sft.Config(batch_rows=4)
    start = grpo.Config(steps=7, data="a")  # a notebook's flags, changed on the command line
    assert commandline.cli(grpo.Config, "", ["--steps", "9"], default=start) == grpo.Config(
        steps=9, data="a")
    assert "--learning-rate" in shown(sft, ["--learning-rat", "1"], capsys)
    synthesize = importlib.import_module("synthesize")
    pairs = commandline.cli(synthesize.Config, "", ["pairs", "--rows", "3"])
    assert pairs == synthesize.Pairs(rows=3)
    page = shown(importlib.import_module("eval"), ["--help"], capsys)
    assert re.search(r"--no-greedy +Switch off: answer every problem once", page)


def test_help_ends_quietly_when_nobody_reads_on():
    reader, writer = os.pipe()
    os.close(reader)
    with os.fdopen(writer, "wb") as pipe:
        done = subprocess.run([sys.executable, ROOT / "train_sft.py", "--help"], stdout=pipe,
                              stderr=subprocess.PIPE)
    assert done.returncode == 1 and not done.stderr
