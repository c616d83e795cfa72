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
import lzma
import re
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


# --------------------------------------------------------------------------------- what is needed


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


def call(function: str, config: Any, **changed) -> str:
    """Source of a call with all that is no default: Config(\n    steps=2,\n)."""
    fields = {f.name: getattr(config, f.name) for f in dataclasses.fields(config)
              if getattr(config, f.name) != f.default}  # fmt: skip
    lines = "".join(f"    {name}={value!r},\n" for name, value in (fields | changed).items())
    return f"{function}(\n{lines})" if lines else f"{function}()"


def tiny() -> str:
    """The model in tiny/ as a .tar.xz in lines of base64; the same text for the same files."""
    buffer = io.BytesIO()
    with tarfile.open(fileobj=buffer, mode="w") as tar:
        for file in sorted((HERE / "tiny").iterdir()):
            if file.suffix in (".json", ".safetensors", ".model"):
                info = tarfile.TarInfo(f"tiny/{file.name}")
                info.size = file.stat().st_size
                tar.addfile(info, io.BytesIO(file.read_bytes()))
    packed = base64.b64encode(lzma.compress(buffer.getvalue())).decode()
    return "\n".join(textwrap.wrap(packed, 100))


# ------------------------------------------------------------------------------------------ cells

INTRO = """\
# {title}

By `python to_kaggle.py {command}`.

1. Settings: a TPU v5e-8 as accelerator, Internet on. Add Input > Models > gemma-3 (or gemma-2) >
   **Transformers** > the size of `model`; the Flax and PyTorch ones are not read. Weights, data and
   the adapter of an earlier notebook are found among the inputs by the names in the run cell.
2. Run All. To change a file, change its cell, and run it and the run cell.
3. Results are in `/kaggle/working`. Interrupting the run cell saves; running it again goes on.
"""
INSTALL = """\
# Adds what is missing and changes nothing else: the build of JAX belongs to this machine's TPU.
import importlib.util
import subprocess
import sys
import tempfile
from importlib import metadata

missing = [name for name in {packages} if importlib.util.find_spec(name) is None]
if missing:
    installed = {{d.name: d.version for d in metadata.distributions() if d.name}}
    kept = [n for n in installed if n.lower().startswith(("jax", "libtpu", "numpy"))]
    with tempfile.NamedTemporaryFile("w", suffix=".txt") as constraints:
        constraints.write("".join(f"{{name}}=={{installed[name]}}\\n" for name in kept))
        constraints.flush()
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "-c", constraints.name]
        if subprocess.run([*pip, *missing]).returncode:
            raise SystemExit(f"pip could not install {{', '.join(missing)}}: is Internet on?")
    importlib.invalidate_caches()
"""
TINY = """\
# The tiny model
import base64
import io
import tarfile

archive = \"\"\"
{archive}
\"\"\"
with tarfile.open(fileobj=io.BytesIO(base64.b64decode(archive))) as tar:
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

import runs

folder = runs.output({out!r})
subprocess.run([sys.executable, "report.py", folder], check=True)
page = html.escape((folder / "report.html").read_text())
HTML(f'<iframe srcdoc="{{page}}" width="100%" height="900"></iframe>')
"""


def install() -> str:
    lines = (HERE / "requirements.txt").read_text().split("\n")
    return INSTALL.format(packages=[n for n in lines if n.isidentifier() and n != "jax"])


def notebook(script: str, config: Any, flags: list[str], files: dict[str, str]) -> str:
    """The .ipynb: install, a cell for each file, run, eval, report."""
    module = script.removesuffix(".py")
    title = sys.modules[module].__doc__.split("\n")[0]
    modules = [file.removesuffix(".py") for file in files]
    run = call(type(config).__name__, config)
    cells = [("intro", INTRO.format(title=title, command=" ".join([script, *flags])))]
    cells += [("install", install())]
    cells += [(file, f"%%writefile {file}\n{text}") for file, text in files.items()]
    if getattr(config, "model", None) == "tiny":
        cells += [("tiny", TINY.format(archive=tiny(), folder='"."'))]
    cells += [("run", RUN.format(modules=modules, module=module, config=run))]
    if script.startswith("train_"):
        evaluation = importlib.import_module("eval")
        same = ("model", "weights", "tokenizer", "dtype", "max_prompt", "max_new", "skip_bad_rows")
        same = {name: getattr(config, name) for name in same if hasattr(config, name)}
        same |= {"data": config.eval_data, "rows": getattr(config, "eval_rows", None)}
        other = evaluation.Config(**same, adapter=config.out, out=f"{config.out}-eval")
        call_eval = RUN.format(modules=modules, module="eval", config=call("Config", other))
        cells += [("eval", call_eval)]
    if (HERE / "report.py").exists():
        cells += [("report", REPORT.format(out=config.out))]
    return json.dumps(
        {
            "cells": [cell(name, text.removesuffix("\n")) for name, text in cells],
            "metadata": {
                "kernelspec": {"name": "python3", "display_name": "Python 3", "language": "python"},
                "language_info": {"name": "python"},
                "kaggle": {"accelerator": "tpuV5e8", "isInternetEnabled": True},
            },
            "nbformat": 4,
            "nbformat_minor": 5,
        },
        indent=1,
        ensure_ascii=False,
    )


def cell(name: str, text: str) -> dict:
    code = {} if name == "intro" else {"execution_count": None, "outputs": []}
    return {
        "cell_type": "code" if code else "markdown",
        "id": re.sub(r"\W", "-", name),
        "metadata": {},
        "source": text.splitlines(keepends=True),
        **code,
    }


# --------------------------------------------------------------------------------------- one file

SIBLINGS = """
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
    lines = files[script].splitlines(keepends=True)
    after = ast.parse(files[script]).body[0].end_lineno  # of the docstring
    code, main, tail = "".join(lines[after:]).partition('\nif __name__ == "__main__":\n')
    parse = "tyro.cli(Config,"
    assert tail.count(parse) == 1, f"{script} does not end as the others do"
    siblings, others = {}, ""
    for name, text in files.items():
        plain = "'''" not in text and not text.endswith("\\")
        quoted = f"r'''\n{text}'''" if plain else repr(f"\n{text}")
        if (HERE / name).exists():
            siblings[name] = f"FILES[{name!r}] = {quoted}\n"
        else:
            others += f"Path({name!r}).write_text({quoted}[1:])\n"
    del siblings[script]
    if getattr(config, "model", None) == "tiny":
        others += TINY.format(archive=tiny(), folder="FOLDER.name")
    head = SIBLINGS.format(
        install=textwrap.indent(install(), "    "), files="\n".join(siblings.values()),
        others=others, module=script.removesuffix(".py"),
    )  # fmt: skip
    tail = tail.replace(parse, "CONFIG if KERNEL else tyro.cli(Config, default=CONFIG,")
    config = f"\n\nCONFIG = {call(type(config).__name__, config)}\n"
    return "".join(lines[:after]) + head + code.lstrip("\n") + config + main + tail


# ------------------------------------------------------------------------------------------- main


def main(config: Config, flags: list[str]) -> Path:
    """Writes the notebook or the file, after the script's own parser has read the flags."""
    script = Path(config.script).name
    scripts = [
        f.name for f in sorted(HERE.glob("*.py")) if "\ndef main(config: Config)" in f.read_text()
    ]
    if script not in scripts:
        raise ValueError(f"{config.script}: expected one of {', '.join(scripts)}")
    module = importlib.import_module(script.removesuffix(".py"))
    parsed = tyro.cli(module.Config, args=flags, prog=script)
    if resolve := getattr(module, "resolve", None):
        resolve(parsed)  # what is wrong with a value is wrong now
    files = dict.fromkeys(needed(script))
    if not config.one_file:
        also = ("eval.py", "report.py") if script.startswith("train_") else ()
        for name in (name for name in also if (HERE / name).exists()):
            files |= dict.fromkeys(needed(name))
    files = {name: (HERE / name).read_text() for name in files}
    if reward_file := getattr(parsed, "reward_file", None):
        path, _, function = reward_file.rpartition(":")
        files[Path(path).name] = Path(path).read_text()
        parsed = dataclasses.replace(parsed, reward_file=f"{Path(path).name}:{function}")
    if config.one_file:
        text = one_file(script, parsed, files)
    else:
        text = notebook(script, parsed, flags, files)
    to = Path(config.to or script.replace(".py", "_kaggle.py" if config.one_file else ".ipynb"))
    to.write_text(text)
    print(f"{to}: {len(text):,} bytes with {', '.join(files)}")
    return to


if __name__ == "__main__":
    try:
        main(*tyro.cli(Config, description=__doc__, return_unknown_args=True))
    except ValueError as e:
        sys.exit(f"error: {e}")
