"""The command line of a script: tyro's, with --help in groups and each model's own defaults.

    config = commandline.cli(Config, description=__doc__)

A field's sentence in --help is the one under it in the source.
"""

import dataclasses
import inspect
import os
import re
import shutil
import sys
import textwrap
from functools import partial, reduce
from operator import or_
from typing import Annotated, get_args, get_type_hints

import tyro

import hub
import runs

Unset = Annotated[str | None, tyro.conf.arg(metavar="STR", help_behavior_hint="")]  # shows no None
ALIASES = {"learning_rate": "--lr", "prompts": "--batch-size", "batch_rows": "--batch-size",
           "group": "--num-generations", "max_new": "--max-new-tokens", "out": "--output-dir"}
LAST = ("optimisation", "run", "several_hosts", "judge")  # groups of flags
DESCRIBED = re.compile(r'(?sm)^    # (?P<group>[^\n(]+)|^    (?P<field>\w+): [^\n]+\n'
                       r'    """(?P<help>.*?)"""')


def described(cls: type) -> dict[str, tuple[str, str]]:
    """Field -> (the comment that heads its group, the sentence under it), from the source."""
    found = {}
    for c in reversed(cls.__mro__[:-1]):
        group = ""
        for m in DESCRIBED.finditer(inspect.getsource(c)):
            if m["field"]:
                found[m["field"]] = group, " ".join(m["help"].split())
            else:
                group = re.sub(r"\W+", "_", m["group"].removeprefix("the ").strip())
    return found


def introduction(docstring: str) -> str:
    """What --help says of a script: its docstring up to the notes for readers of the code."""
    paragraphs = docstring.partition("\n1. ")[0].strip().split("\n\n")
    paragraphs[-1] = re.sub(r"[^.]*:\Z", "", paragraphs[-1])  # "What to know:"
    width = min(100, shutil.get_terminal_size().columns) - 1
    fill = partial(textwrap.fill, width=width, initial_indent=" ", subsequent_indent=" ")
    # tyro would join lines that begin with a letter
    paragraphs = [p if p.startswith(" ") else fill(p) for p in paragraphs if p]
    return "\n\n".join(paragraphs)


def cli(config_class, description: str, args: list[str] | None = None, default=None, **more):
    """tyro.cli() for a script's Config, or a union of them, with help in groups.

    tyro shows one group for each nested class, so it reads classes made of the groups here. The
    defaults shown are those of the --model in args. more: as for tyro.cli.
    """
    tyro._experimental_options["ansi_codes"] = not os.environ.get("NO_COLOR")
    args, classes = sys.argv[1:] if args is None else args, get_args(config_class)
    words = " ".join(args).replace("=", " ").split()
    model = hub.short_name(words[words.index("--model") + 1] if "--model" in words[:-1] else "tiny")
    classes = classes or (config_class,)
    defaults = getattr(sys.modules[classes[0].__module__], "DEFAULTS", {})
    table = runs.model_defaults(model, defaults) or {}
    grouped = {_in_groups(cls, default, table): cls for cls in classes}
    shown = f" These are the defaults of --model {model}; name another to see its own."
    about = f"{introduction(description)}\n\n{shown}"
    found = tyro.cli(reduce(or_, grouped), description=about, args=args, config=(
        tyro.conf.OmitArgPrefixes, tyro.conf.DisallowNone, tyro.conf.FlagCreatePairsOff), **more)
    found, *rest = found if more.get("return_unknown_args") else (found,)
    flat = {k: v for part in vars(found).values() for k, v in vars(part).items()}
    config = grouped[type(found)](**flat)
    return (config, *rest) if rest else config


def _in_groups(cls: type, default, table: dict) -> type:
    """A class with one nested class for each group of flags, each flag with its help."""
    types, about, groups = get_type_hints(cls, include_extras=True), described(cls), {}
    for field in dataclasses.fields(cls):
        group, text = about[field.name]
        value = getattr(default, field.name, field.default)
        shown = table.get(field.name) if value is None else value
        hint = "" if shown in (None, "") or shown is False else (
            f"(default: {textwrap.shorten(str(shown), 40)})")
        if value is True:  # tyro makes it --no-greedy
            text, hint = f"Switch off: {text[0].lower()}{text[1:]}", ""
        alias = (ALIASES[field.name],) if field.name in ALIASES else None
        flag = tyro.conf.arg(help=text, help_behavior_hint=hint, aliases=alias)
        groups.setdefault(group, []).append((field.name, Annotated[types[field.name], flag], value))
    parts = []
    for name in sorted(groups, key=lambda name: LAST.index(name) if name in LAST else -1):
        part = dataclasses.make_dataclass(name, groups[name], frozen=True)
        parts.append((f"{name}_", Annotated[part, tyro.conf.arg(name=name)], part()))
    return dataclasses.make_dataclass(cls.__name__, parts, frozen=True)
