"""A script and all that it needs as one thing to paste into Kaggle: a notebook, or one file.

    python to_kaggle.py train_grpo.py --model gemma3-1b --adapter runs/sft --time-limit 8h30m
    python to_kaggle.py train_grpo.py --model gemma3-1b --one-file

The flags after the script are the script's own, and its own parser reads them here: a mistake costs
a second now, not the queue for a TPU. What to know:

1. The notebook (File > Import Notebook) has a cell for each file, to read and to change, then cells
   that train, evaluate and show the report, with the flags as `main(Config(...))`.
2. --one-file is for a single cell. It is the script itself, with its siblings quoted at its head.
   In a kernel it takes the flags given here and never looks at the kernel's; run as a script, they
   are its defaults.
3. Neither replaces a package that is there: the TPU build of JAX stays.
4. The file of --reward-file comes along. Data and adapters do not: added as inputs, they are found
   by the names they are given here.
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

HERE = Path(__file__).resolve().parent


@dataclasses.dataclass(frozen=True)
class Config:
    """All other flags are the script's."""

    script: tyro.conf.Positional[str]
    """The script to export, as train_grpo.py."""
    one_file: bool = False
    """One script, for a single cell, instead of a notebook."""
    to: str | None = None
    """The file to write; default: train_grpo.ipynb, with --one-file train_grpo_kaggle.py."""


def needed(script: str, before: tuple[str, ...] = ()) -> tuple[str, ...]:
    """Our files that a script imports, at once or later, each after those it needs, itself last.

    A circle (bench.py measures the script that hands over to it) is entered once.
    """
    modules, before = [], (script, *before)
    for node in ast.walk(ast.parse((HERE / script).read_text())):
        if isinstance(node, ast.Import):
            modules += [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            modules.append(node.module)
    for file in (f"{module}.py" for module in modules):
        if file not in before and (HERE / file).is_file():
            before = needed(file, before)
    return (*(file for file in before if file != script), script)


def given(config: Any) -> dict:
    """The fields of a Config that are not at their defaults."""
    return {k: v for k, v in vars(config).items() if v != getattr(type(config), k, None)}


def call(config: Any) -> str:
    """Source that makes a Config: "Config(\\n    steps=2,\\n)"."""
    lines = "".join(f"    {name}={value!r},\n" for name, value in given(config).items())
    return f"{type(config).__name__}(\n{lines})" if lines else f"{type(config).__name__}()"


def tiny(folder: str) -> str:
    """Source that unpacks tiny/: a .tar.bz2 in base64, the same text for the same files."""
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
    """Source that adds what requirements.txt names and is not there, JAX apart."""
    names = (HERE / "requirements.txt").read_text().split("\n")
    return INSTALL.format(wanted=[n for n in names if n.isidentifier() and n != "jax"])


# --------------------------------------------------------------------------------------- notebook

INTRO = """\
# {title}

By `python to_kaggle.py {command}`.

1. Settings: a TPU v5e-8 as accelerator, Internet on. Add Input > Models > gemma-3 (or gemma-2) >
   **Transformers** > the size of `model`; the Flax and PyTorch ones are not read. Weights, data and
   the adapter of an earlier notebook are found among the inputs by the names in the run cell.
2. Run All. To change a file, change its cell, then run it and the run cell.
3. Results are in `/kaggle/working`. Interrupting the run cell saves; running it again goes on.
"""
INSTALL = """\
# Adds what is missing and changes nothing else: the build of JAX belongs to this machine's TPU.
import importlib.util
import subprocess
import sys
from importlib import metadata

wanted = {wanted}
missing = [name for name in wanted if importlib.util.find_spec(name) is None]
if missing:
    pins = {{d.name: f"{{d.name}}=={{d.version}}" for d in metadata.distributions() if d.name}}
    pins = [pin for name, pin in pins.items() if name.startswith(("jax", "libtpu", "numpy"))]
    pip = [sys.executable, "-m", "pip", "install", "-q", "--constraint", "/dev/stdin", *missing]
    if subprocess.run(pip, input="\\n".join(pins), text=True).returncode:
        raise SystemExit(f"pip could not install {{', '.join(missing)}}: is Internet on?")
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
RUN = """\
import sys

for name in {modules}:
    sys.modules.pop(name, None)  # or a change to a cell above would not count

import {module} as script

script.main(script.{config})
"""
REPORT = """\
import html
import subprocess
import sys

from IPython.display import HTML

import hub

folder = hub.output({out!r})
subprocess.run([sys.executable, "report.py", folder], check=True)
page = html.escape((folder / "report.html").read_text())
HTML(f'<iframe srcdoc="{{page}}" width="100%" height="900"></iframe>')
"""


def notebook(script: str, config: Any, files: dict[str, str], flags: list[str]) -> str:
    """The .ipynb: install, a cell for each file, run, and for training eval and report."""
    module, modules = script.removesuffix(".py"), [file.removesuffix(".py") for file in files]
    title, command = sys.modules[module].__doc__.split("\n")[0], shlex.join([script, *flags])
    cells = {"intro": INTRO.format(title=title, command=command), "install": install()}
    cells |= {file: f"%%writefile {file}\n{text}" for file, text in files.items()}
    if getattr(config, "model", None) == "tiny":
        cells["tiny"] = tiny('"."')
    cells["run"] = RUN.format(modules=modules, module=module, config=call(config))
    if script.startswith("train_"):
        same = ("model", "weights", "tokenizer", "dtype", "max_prompt", "max_new", "skip_bad_rows")
        same = {name: value for name, value in given(config).items() if name in same}
        rows, source = given(config).get("eval_rows"), config.eval_data
        evaluation = importlib.import_module("eval").Config(
            **same, adapter=config.out, data=source, rows=rows, out=f"{config.out}-eval"
        )
        cells["eval"] = RUN.format(modules=modules, module="eval", config=call(evaluation))
    if "report.py" in files:
        cells["report"] = REPORT.format(out=config.out)
    code = {"cell_type": "code", "execution_count": None, "outputs": []}
    return json.dumps({
        "cells": [
            (code if name != "intro" else {"cell_type": "markdown"})
            | {"id": re.sub(r"\W", "-", name), "metadata": {},
               "source": text.removesuffix("\n").splitlines(keepends=True)}
            for name, text in cells.items()
        ],
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
# The files that this script imports; to change one, change it here. They are written to a temporary
# folder, first on the import path: so they are modules like any others, tracebacks show their
# lines, and no file of the same name nearby takes their place.

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
    Path(FOLDER.name, name).write_text(text[1:])
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
    parser = "tyro.cli(Config,"
    assert tail.count(parser) == 1, f"{script} ends in another way than the other scripts"
    tail = tail.replace(parser, "CONFIG if KERNEL else tyro.cli(Config, default=CONFIG,")
    siblings, others = [], [tiny("FOLDER.name")] if getattr(config, "model", "") == "tiny" else []
    own = (getattr(config, "reward_file", None) or "").rpartition(":")[0]
    for name, text in files.items():
        plain = "'''" not in text and not text.endswith("\\")
        quoted = f"r'''\n{text}'''" if plain else repr(f"\n{text}")
        if name == own:  # a flag names its path
            others.append(f"Path({name!r}).write_text({quoted}[1:])\n")
        elif name != script:
            siblings.append(f"FILES[{name!r}] = {quoted}\n")
    head = HEAD.format(install=textwrap.indent(install(), "    "), files="\n".join(siblings),
                       module=script.removesuffix(".py"), others="\n".join(others))
    flags = f"\n\n\nCONFIG = {call(config)}\n"
    return "\n".join(lines[:end]) + head + code.strip() + flags + main + tail


# ------------------------------------------------------------------------------------------- main


def main(config: Config, flags: list[str]) -> Path:
    """Writes the notebook or the file, after the script's own parser has read the flags."""
    script, is_script = Path(config.script).name, "\ndef main(config: Config)"
    scripts = sorted(f.name for f in HERE.glob("*.py") if is_script in f.read_text())
    if script not in scripts:
        raise ValueError(f"{config.script}: expected one of {', '.join(scripts)}")
    module = importlib.import_module(script.removesuffix(".py"))
    parsed = tyro.cli(module.Config, args=flags, prog=script)
    if hasattr(module, "resolve"):
        module.resolve(parsed)  # finds wrong values too
    also = ("eval.py", "report.py") if script.startswith("train_") and not config.one_file else ()
    names = [name for one in (*also, script) for name in needed(one)]
    files = {name: (HERE / name).read_text() for name in names}
    if reward_file := getattr(parsed, "reward_file", None):
        path, _, function = reward_file.rpartition(":")
        if not Path(path).is_file():
            raise ValueError(f"--reward-file {reward_file}: no file {path!r}")
        if Path(path).name in files:
            raise ValueError(f"--reward-file {reward_file}: rename it, one of ours has that name")
        files[Path(path).name] = Path(path).read_text()
        parsed = dataclasses.replace(parsed, reward_file=f"{Path(path).name}:{function}")
    if config.one_file:
        text, end = one_file(script, parsed, files), "_kaggle.py"
    else:
        text, end = notebook(script, parsed, files, flags), ".ipynb"
    to = Path(config.to or script.replace(".py", end))
    to.write_text(text)
    print(f"{to}: {len(text):,} bytes, with {', '.join(files)}")
    return to


if __name__ == "__main__":
    try:
        main(*tyro.cli(Config, description=__doc__, return_unknown_args=True))
    except ValueError as e:
        sys.exit(f"error: {e}")
