"""Every field of every script's Config has its sentence in --help and is read by that script."""

import ast
import dataclasses
import importlib
import inspect
import re
import types

import pytest
import tyro
from conftest import ROOT

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


def sentences(cls: type) -> dict[str, str]:
    """The string under each field, those of the classes below included."""
    found = {}
    for c in reversed(cls.__mro__[:-1]):
        body = ast.parse(inspect.getsource(c)).body[0].body
        for field, doc in zip(body, body[1:], strict=False):
            if isinstance(field, ast.AnnAssign) and isinstance(doc, ast.Expr):
                found[field.target.id] = doc.value.value
    return found


@pytest.mark.parametrize("script, cls", CONFIGS)
def test_every_field_is_documented_and_read(script, cls):
    module = importlib.import_module(script)
    config, said = getattr(module, cls), sentences(getattr(module, cls))
    letters = lambda text: re.sub(r"[\s│]", "", text)
    page = letters(tyro.extras.get_parser(config).format_help())
    read = reads(module, "main", set(), set())
    for field in dataclasses.fields(config):
        assert len(said.get(field.name, "")) > 10 and said[field.name].endswith("."), field.name
        assert "--" + field.name.replace("_", "-") in page, field.name
        assert letters(said[field.name])[:20] in page, field.name
        assert field.name in read, f"{field.name} is never read"
