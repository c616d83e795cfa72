"""The order of the rooms: what imports what, what a reader pays for, no privates."""

import ast
import subprocess
import sys

import pytest
from conftest import ROOT

pytestmark = pytest.mark.smoke
FILES = {file.stem: ast.parse(file.read_text()) for file in sorted(ROOT.glob("*.py"))}
SCRIPTS = {name for name in FILES if name.startswith("train_")}
AROUND = {"eval", "endpoint", "judge", "synthesize", "bench", "report", "to_kaggle", "chat"}


def imports(name: str) -> set[str]:
    """Our files that a file imports when it is imported itself."""
    found = set()
    for node in FILES[name].body:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add(node.module)
    return found & FILES.keys()


def reached(name: str, path: tuple[str, ...] = ()) -> set[str]:
    """A file and all it imports, directly or not; a circle fails."""
    assert name not in path, f"circle: {' -> '.join((*path, name))}"
    return {name}.union(*(reached(other, (*path, name)) for other in imports(name)))


def test_there_is_no_circle_and_no_script_below_another():
    for name in FILES:
        reached(name)
    for name in SCRIPTS:
        assert not reached(name) & (SCRIPTS - {name} | AROUND), name


@pytest.mark.parametrize("script, n_files, n_lines", [("train_grpo", 15, 6620),
                                                      ("train_sft", 12, 4250)])
def test_what_a_reader_pays(script, n_files, n_lines):
    """Whoever adds more argues for it, and raises the number."""
    assert len(reached(script)) <= n_files, reached(script)
    n = sum((ROOT / f"{name}.py").read_text().count("\n") for name in reached(script))
    assert n <= n_lines, f"{script} and what it imports have {n} lines"


def test_no_line_is_kept_from_the_formatter():
    skip = "# fmt: " + "skip"
    for file in (*ROOT.glob("*.py"), *ROOT.glob("tests/*.py")):
        assert skip not in file.read_text(), file


def test_nobody_uses_another_files_private_names():
    for name, tree in FILES.items():
        for node in ast.walk(tree):
            match node:
                case ast.Attribute(ast.Name(owner), private) if owner in FILES:
                    assert not private.startswith("_"), f"{name}.py uses {owner}.{private}"
                case ast.ImportFrom(owner, names) if owner in FILES:
                    assert not any(n.name.startswith("_") for n in names), f"{name}.py, {owner}"


def test_rooms_that_are_not_asked_for_are_not_imported(tmp_path):
    """By a whole run: neither the judge nor another script, nor an optional package."""
    program = (
        "import sys, train_grpo\n"
        "train_grpo.main(train_grpo.Config(steps=1, prompts=2, group=2, max_new=8, rows=20,"
        f" slots=4, eval_every=0, eval_rows=2, out={str(tmp_path / 'run')!r}))\n"
        "print(*sys.modules)")
    done = subprocess.run([sys.executable, "-c", program], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-2000:]
    modules = set(done.stdout.split())
    assert {"train_grpo", "rollouts", "stage"} <= modules
    lazy = AROUND - {"report"} | {"train_sft", "train_simpo", "train_distill", "train_ppo",
                                  "openai", "wandb", "tensorboard", "sklearn", "math_verify",
                                  "torch", "pandas"}
    assert not lazy & modules, lazy & modules
