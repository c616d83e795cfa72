"""A script and all that it needs for Kaggle, as a notebook to import or one file to paste.

    python to_kaggle.py train_grpo.py --model gemma3-1b --time-limit 8h30m
    python to_kaggle.py train_grpo.py --model gemma3-1b --one-file

The flags after the script are the script's own, and its parser reads them here, so a mistake costs
a second now and not a wait for a TPU. What to know:

1. The notebook (File > Import Notebook) has one folded cell with our files as plain text, then
   cells that configure, evaluate, train, evaluate again, compare and show the report.
2. --one-file makes a single cell: the script itself, with the files it imports quoted at its head.
   In a kernel it uses the flags given here and ignores the kernel's own; run as a script, it takes
   them as defaults.
3. The first cell installs missing packages. It replaces JAX and libtpu, both together and before
   anything imports them, only if JAX is too old or libtpu is not the version that JAX requires.
4. The files of --rewards and --reward-file are included. Data and adapters are not: add them as
   Kaggle inputs, where they are found by the names given here.
"""

import ast
import base64
import dataclasses
import importlib
import io
import json
import re
import shlex
import sys
import tarfile
import textwrap
from pathlib import Path
from typing import Any

import tyro

import commandline
import data
import rewards
import terminal

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Config:
    """All other flags are the script's."""

    script: tyro.conf.Positional[str]
    """Script to export, such as train_grpo.py."""
    one_file: bool = False
    """Write one script for a single cell instead of a notebook."""
    to: commandline.Unset = None
    """File to write; default: train_grpo.ipynb, or train_grpo_kaggle.py with --one-file."""


def needed(script: str) -> list[str]:
    """The script, and our files that it imports, directly or not, lazily or not."""
    files = [script]
    for file in files:
        for node in ast.walk(ast.parse((HERE / file).read_text(encoding="utf-8"))):
            modules = [alias.name for alias in node.names] if isinstance(node, ast.Import) else (
                [node.module] if isinstance(node, ast.ImportFrom) else [])
            names = [f"{module}.py" for module in modules]
            files += [n for n in names if n not in files and (HERE / n).is_file()]
    return files


def given(config: Any) -> dict:
    """The fields of a Config that are not at their defaults."""
    return {k: v for k, v in vars(config).items() if v != getattr(type(config), k, None)}


def call(config: Any) -> str:
    """Source that makes a Config: "Config(\n    steps=2,\n)"."""
    lines = "".join(f"    {name}={value!r},\n" for name, value in given(config).items())
    return f"{type(config).__name__}(\n{lines})" if lines else f"{type(config).__name__}()"


def quoted(files: dict[str, str]) -> str:
    """Source that fills the dict FILES, with each text verbatim unless its quotes prevent that."""
    lines = []
    for name, text in files.items():
        plain = "'''" not in text and not text.endswith(("\\", "'"))
        lines.append(f"FILES[{name!r}] = " + (f"r'''\n{text}'''" if plain else repr(f"\n{text}")))
    return "\n\n".join(lines)


def tiny(folder: str) -> str:
    """Source that unpacks tiny/: a .tar.bz2 in base64, deterministic."""
    with io.BytesIO() as buffer:
        with tarfile.open(fileobj=buffer, mode="w:bz2") as tar:
            for file in sorted((HERE / "tiny").iterdir()):
                if file.suffix in (".json", ".safetensors", ".model"):
                    info = tarfile.TarInfo(f"tiny/{file.name}")
                    info.size = file.stat().st_size
                    tar.addfile(info, io.BytesIO(file.read_bytes()))
        packed = base64.encodebytes(buffer.getvalue()).decode()
    return TINY.format(packed=packed, folder=folder)


def install() -> str:
    """Source that installs missing packages of requirements.txt and repairs JAX's version."""
    names = (HERE / "requirements.txt").read_text(encoding="utf-8").split("\n")
    return INSTALL.format(wanted=[n for n in names if n.isidentifier() and n != "jax"])


INSTALL = """\
# Installs missing packages. JAX and libtpu must match: if they do not, or JAX is too old, both are
# replaced, which needs no restart because nothing has imported JAX yet.
import importlib.util
import re
import subprocess
import sys
from importlib import metadata

versions = {{d.name.lower(): d.version for d in metadata.distributions() if d.name}}
install = [name for name in {wanted} if importlib.util.find_spec(name) is None]
jax, libtpu = versions.get("jax", "0"), versions.get("libtpu")
is_old = [int(n) for n in re.findall(r"\\d+", jax)[:2]] < [0, 10]
requires = (metadata.requires("jax") if "jax" in versions else None) or []
asked = [m[1] for r in requires if (m := re.match(r"libtpu==([\\d.]*\\d)", r))]
fits = not libtpu or not asked or f"{{libtpu}}.".startswith(f"{{asked[0]}}.")
keep = ("numpy", "jax", "jaxlib", "libtpu")
if is_old or not fits:
    if "jax" in sys.modules:
        raise SystemExit(f"JAX {{jax}} and libtpu {{libtpu}} must be replaced, but JAX is already "
                         "imported: restart the kernel and run this cell first")
    cuda = [n for n in ("13", "12") if importlib.util.find_spec(f"jax_cuda{{n}}_plugin")]
    extra = "[tpu]" if libtpu else f"[cuda{{cuda[0]}}]" if cuda else ""
    install.append(f"jax{{extra}}>=0.10,<0.13" if is_old else f"jax{{extra}}=={{jax}}")
    keep = ("numpy",)
if install:
    pins = "\\n".join(f"{{name}}=={{versions[name]}}" for name in keep if name in versions)
    pip = [sys.executable, "-m", "pip", "install", "-q", "--constraint", "/dev/stdin", *install]
    if subprocess.run(pip, input=pins, text=True).returncode:
        raise SystemExit(f"pip could not install {{', '.join(install)}}: is Internet on?")
    importlib.invalidate_caches()
"""
TINY = """\
# The tiny model
import base64
import io
import tarfile

packed = \"\"\"
{packed}\"\"\"
with tarfile.open(fileobj=io.BytesIO(base64.b64decode(packed))) as tar:
    tar.extractall({folder}, filter="data")
"""

# --------------------------------------------------------------------------------------- notebook

INTRO = """\
# {title}

Made by `python to_kaggle.py {command}`.

1. **Settings**: Accelerator TPU v5e-8, Internet on, Environment "Always use latest".
2. **Inputs**: Add Input > Models > gemma-3 (or gemma-2) > **Transformers** > the size of `model`.
   The Flax and PyTorch versions cannot be read. Data files and the output of an earlier notebook
   are found among the inputs by the names used in the configuration.
3. **Time**: a TPU session ends after nine hours; {limit}.
4. **Save Version > Save & Run All.** Results are in `/kaggle/working/runs`. To continue a
   stopped run, run the training cell again while that folder is still there.
"""
LIMIT = "training saves before its limit of {}.\n   The evaluations around it take minutes more"
NO_LIMIT = "without `time_limit`, such as 8h30m, what is not saved by then is lost"
PACKAGE = """\
# The code, as plain text: change a file here, then run this cell and those below it.
import sys
from pathlib import Path

FILES = {{}}
{files}

for name, text in FILES.items():
    Path("code", name).parent.mkdir(parents=True, exist_ok=True)
    Path("code", name).write_text(text[1:], encoding="utf-8")
    sys.modules.pop(name.removesuffix(".py"), None)
sys.path[:0] = ["code"] * ("code" not in sys.path)
{tiny}"""
CONFIGURE = """\
import {module} as script

config = script.{config}
"""
BEFORE = """\
import eval as evaluation

{rows}before = evaluation.main(evaluation.{config})
"""
OWN_ROWS = """\
import data
import disk
import hub

resolved = script.resolve(config)
start = hub.find_start(resolved.model, resolved.weights, resolved.adapter)
_, rows = script.load_rows(resolved, data.Tokenizer(resolved.tokenizer or start.weights))
held_out = hub.output("held_out.jsonl")  # the rows that training will not see
disk.replace_file(held_out, disk.to_jsonl(row.fields for row in rows))
"""
AFTER = "after = evaluation.main(evaluation.{config})\n"
REPORT = """\
import html
import subprocess
import sys

from IPython.display import HTML

import hub

folder = hub.output(config.out)
subprocess.run([sys.executable, "code/report.py", folder], check=True, capture_output=True)
page = html.escape((folder / "report.html").read_text(encoding="utf-8"))
HTML(f'<iframe srcdoc="{page}" width="100%" height="900"></iframe>')
"""
COMPLETIONS = """\
import disk

rows = disk.good_rows(hub.output(config.out + "-eval") / "samples.jsonl", mode=str)
for row in [row for row in rows if row["mode"] == "greedy"][:3]:
    print(row["prompt"], row["completion"], f"(expected: {row['gold']})", sep="\\n\\n")
"""
TALK = """\
import chat

talk = chat.Chat(chat.{config})
talk.turn("Mia has 12 cards. She buys 7 more. How many does she have?")
print("\\nThe model before training:")
talk.turn("/base")
"""
SUBMIT = """\
## What to submit

The rules of the 2026 competition: the model writes its reasoning between `<reasoning>` and
`</reasoning>`, then its answer between `<answer>` and `</answer>`. It is trained within one session
of nine hours on one TPU v5e-8.

`/kaggle/working/runs` holds the run; its `final` folder is the model, with a model card: a PEFT
adapter for the base model, or a whole model if all weights were trained.
"""
MERGE = """\
import os
import subprocess
import sys

# A whole model for vLLM, llama.cpp and Ollama. The TPU belongs to this kernel: the CPU merges.
merge = [sys.executable, "code/merge.py", *{flags}, "--out", hub.output("merged")]
done = subprocess.run(merge, capture_output=True, text=True,
                      env=os.environ | {{"JAX_PLATFORMS": "cpu"}})
print(done.stdout, done.stderr[-2000:] * (done.returncode != 0))
"""


def evaluations(config: Any, resolved: Any) -> tuple[str, str]:
    """Sources that evaluate the models before and after training; the second compares them."""
    evaluation = importlib.import_module("eval").Config
    same = ("model", "weights", "tokenizer", "dtype", "max_prompt", "max_new", "skip_bad_rows",
            "system")
    same = {name: value for name, value in given(config).items() if name in same}
    # What the run holds out, unless that is a built-in test split; half an hour at most: greedily
    source = None if config.eval_data or not config.data else data.test_split(config.data)
    own = bool(config.eval_data) or config.data is not None and source is None
    same |= {"data": "held_out" if own else source, "rows": resolved.eval_rows, "samples": 0}
    if "max_prompt" not in same and hasattr(resolved, "max_length"):
        same["max_prompt"] = resolved.max_length
    out = config.out.rstrip("/")
    before = evaluation(**same, adapter=config.adapter, out=f"{out}-eval-before")
    after = evaluation(**same, adapter=out, out=f"{out}-eval", compare=f"{out}-eval-before")
    cells = (BEFORE.format(rows=OWN_ROWS * own, config=call(before)),
             AFTER.format(config=call(after)))
    return tuple(cell.replace("data='held_out'", "data=str(held_out)") for cell in cells)


def chat_config(config: Any) -> Any:
    """Config of chat.py for the model that a run leaves."""
    chat = importlib.import_module("chat").Config
    same = ("model", "weights", "tokenizer", "dtype", "system", "max_new")
    same = {name: value for name, value in given(config).items() if name in same}
    return chat(**same, adapter=config.out)


def merge_flags(config: Any) -> list[str]:
    flags = {"--adapter": config.out} | {
        f"--{name}": value for name, value in given(config).items()
        if name in ("model", "weights", "tokenizer")}
    return [word for flag in flags.items() for word in flag]


def notebook(script: str, config: Any, resolved: Any, files: dict[str, str],
             flags: list[str]) -> str:
    """The .ipynb: setup, configuration and run; around training also evaluations and a report."""
    module = script.removesuffix(".py")
    title, command = sys.modules[module].__doc__.split("\n")[0], shlex.join([script, *flags])
    model = tiny("'code'") if getattr(config, "model", None) == "tiny" else ""
    time_limit = getattr(config, "time_limit", None)
    limit = LIMIT.format(time_limit) if time_limit else NO_LIMIT
    cells = [  # (id, text); cells whose id begins with # are Markdown
        ("# intro", INTRO.format(title=title, command=command, limit=limit)),
        ("install", install()),
        ("package", PACKAGE.format(files=quoted(files), tiny=model)),
        ("# configuration", "## Configuration\n\nEvery field is explained in the script's Config."),
        ("config", CONFIGURE.format(module=module, config=call(config))),
    ]
    run = [("# run", "## Run\n\nInterrupt this cell to save; run it again to continue."),
           ("run", "final = script.main(config)\n")]
    if not script.startswith("train_"):
        cells += run
    else:
        before, after = evaluations(config, resolved)
        cells += [
            ("# before", "## Before training\n\nThe model answers held-out problems."),
            ("before", before),
            *run,
            ("# after", "## After training\n\nThe trained model answers the same problems."),
            ("after", after),
            ("# report", "## Report\n\nCurves of every metric and a browser of completions."),
            ("report", REPORT),
            ("# completions", "## Three answers of the trained model"),
            ("completions", COMPLETIONS),
            ("# talk", "## Talk to it\n\nAsk anything by `talk.turn`; `/base` answers the same with"
             " the model before training."),
            ("talk", TALK.format(config=call(chat_config(config)))),
            ("# submit", SUBMIT),
        ]
        if resolved.lora_rank:
            cells.append(("merge", MERGE.format(flags=merge_flags(config))))
    folded = {"jupyter": {"source_hidden": True}, "_kg_hide-input": True}
    out = []
    for name, text in cells:
        cell = {"id": name.replace("# ", "about-"), "metadata": {},
                "source": text.removesuffix("\n").splitlines(keepends=True)}
        if name.startswith("#"):
            cell["cell_type"] = "markdown"
        else:
            cell |= {"cell_type": "code", "execution_count": None, "outputs": []}
        if name in ("install", "package"):
            cell["metadata"] = folded
        out.append(cell)
    return json.dumps({
        "cells": out,
        "metadata": {
            "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
            "language_info": {"name": "python"},
            "kaggle": {"accelerator": "tpuV5e8", "isInternetEnabled": True},
        },
        "nbformat": 4,
        "nbformat_minor": 5,
    }, indent=1, ensure_ascii=False)


# --------------------------------------------------------------------------------------- one file

HEAD = """

# ---------------------------------------------------------------------------------------- siblings
#
# The files that this script imports; edit them here. They are written to a temporary folder at the
# head of the import path, so they are ordinary modules: tracebacks show their lines, and no nearby
# file of the same name takes their place.

import sys
import tempfile
from pathlib import Path

KERNEL = "ipykernel" in sys.modules  # then sys.argv is not ours
if KERNEL:
{install}
FILES = {{}}
{files}
FOLDER = tempfile.TemporaryDirectory(prefix="{module}-")
for name, text in FILES.items():
    Path(FOLDER.name, name).write_text(text[1:], encoding="utf-8")
    sys.modules.pop(name.removesuffix(".py"), None)
sys.path.insert(0, FOLDER.name)
sys.modules["{module}"] = sys.modules[__name__]  # for a sibling that imports this script
{others}

# -------------------------------------------------------------------------------------- the script

"""


def one_file(script: str, config: Any, files: dict[str, str]) -> str:
    """The script, with its siblings between docstring and imports, and its flags as CONFIG."""
    end = ast.parse(files[script]).body[0].end_lineno  # of the docstring
    lines = files[script].split("\n")
    code, main, tail = "\n".join(lines[end:]).partition('\n\nif __name__ == "__main__":\n')
    parser = re.compile(r"(tyro|commandline)\.cli\(Config,")
    assert len(parser.findall(tail)) == 1, f"{script} ends in another way than the other scripts"
    tail = parser.sub(r"CONFIG if KERNEL else \1.cli(Config, default=CONFIG,", tail)
    siblings = quoted({name: text for name, text in files.items() if name != script})
    others = tiny("FOLDER.name") if getattr(config, "model", "") == "tiny" else ""
    head = HEAD.format(install=textwrap.indent(install(), "    "), files=siblings,
                       module=script.removesuffix(".py"), others=others)
    flags = f"\n\n\nCONFIG = {call(config)}\n"
    return "\n".join(lines[:end]) + head + code.strip() + flags + main + tail


# ------------------------------------------------------------------------------------------- main


def reward_files(config: Any) -> tuple[dict[str, str], Any]:
    """The files that --rewards and --reward-file name, and the Config that finds them by name."""
    files, own = {}, getattr(config, "reward_file", None)
    for path in rewards.files(getattr(config, "rewards", None) or "", own):
        files[path.name] = path.read_text(encoding="utf-8")
    if own:
        config = dataclasses.replace(config, reward_file=own.rpartition("/")[2])
    return files, config


def main(config: Config, flags: list[str]) -> Path:
    """Writes the notebook or the file, after the script's own parser has read the flags."""
    script, is_script = Path(config.script).name, "\ndef main(config: Config)"
    texts = {f.name: f.read_text(encoding="utf-8") for f in HERE.glob("*.py")}
    scripts = sorted(name for name, text in texts.items() if is_script in text)
    if script not in scripts:
        raise ValueError(f"{config.script}: expected one of {', '.join(scripts)}")
    module = importlib.import_module(script.removesuffix(".py"))
    cli = commandline.cli if "commandline.cli(Config" in texts[script] else tyro.cli
    parsed = cli(module.Config, description=module.__doc__, args=flags, prog=script)
    resolved = module.resolve(parsed) if hasattr(module, "resolve") else parsed  # checks values
    trains = script.startswith("train_") and not config.one_file
    also = ("eval.py", "report.py", "chat.py") if trains else ()
    names = dict.fromkeys(name for one in (*also, script) for name in needed(one))
    files = {name: (HERE / name).read_text(encoding="utf-8") for name in names}
    extra, parsed = reward_files(parsed)
    for name in extra.keys() & files.keys():
        raise ValueError(f"--reward-file {name}: rename it, one of ours has that name")
    files = extra | files
    if config.one_file:
        text, end = one_file(script, parsed, files), "_kaggle.py"
    else:
        text, end = notebook(script, parsed, resolved, files, flags), ".ipynb"
    to = Path(config.to or script.replace(".py", end))
    suffix = end[end.index(".") :]
    if to.suffix != suffix or to.resolve().parent == HERE and to.name in texts:
        raise ValueError(f"--to {to}: expected a name that ends in {suffix}, and not that of a "
                         "script here")
    to.write_text(text, encoding="utf-8")
    print(f"{to}: {len(text):,} bytes, {len(files)} files: {', '.join(files)}")
    if script.startswith("train_") and parsed.model != "tiny" and not parsed.time_limit:
        print("A Kaggle session ends after nine hours: --time-limit 8h30m saves the run in time")
    return to


if __name__ == "__main__":
    terminal.command(lambda: main(*tyro.cli(Config, return_unknown_args=True,
                                            description=commandline.introduction(__doc__))))
