"""What to_kaggle.py writes is run by a real Jupyter kernel, on the tiny model."""

import ast
import importlib
import json
import os
import re
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from queue import Empty

import pip
import pytest
from conftest import ONE_DEVICE, ROOT

import commandline
import disk
import hub
import lora
import stage
import to_kaggle

nbclient, nbformat = map(pytest.importorskip, ("nbclient", "nbformat"))
KernelManager = pytest.importorskip("jupyter_client").KernelManager
QUICK = "--prompts 2 --group 2 --max-new 16 --eval-rows 4 --rows 50 --slots 4".split()


def export(folder, *flags, script="train_grpo.py", one_file=False):
    """The exported file, written into a folder that holds nothing else."""
    folder.mkdir(exist_ok=True)
    to = str(folder / ("one.py" if one_file else "it.ipynb"))
    return to_kaggle.main(to_kaggle.Config(script, one_file, to), list(flags))


@pytest.fixture
def one_device(monkeypatch):
    monkeypatch.setenv("XLA_FLAGS", ONE_DEVICE["XLA_FLAGS"])


# ---------------------------------------------------------------------------------- in a kernel


def test_notebook_trains_evaluates_and_reports(tmp_path, one_device):
    path = export(tmp_path / "nb", "--steps", "2", *QUICK)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    there = {"metadata": {"path": path.parent}}
    client = nbclient.NotebookClient(notebook, timeout=600, startup_timeout=300, resources=there)
    client.execute()  # raises where a cell does
    assert len(notebook.cells) < 20
    for folder in (path.parent / "code", path.parent / "code/tiny"):
        for file in (f for f in folder.iterdir() if f.is_file()):
            assert file.read_bytes() == (ROOT / file.relative_to(path.parent / "code")).read_bytes()
    lines = (path.parent / "runs/grpo/metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [0, 1, 2, 2]
    results = json.loads((path.parent / "runs/grpo-eval/results.json").read_text())
    assert results["n"] == 4 and "pass@1" in results and results["compare"]["n"] == 4
    outputs = {cell.id: cell.get("outputs", []) for cell in notebook.cells}
    (page,) = (o.data["text/html"] for o in outputs["report"] if o.output_type == "execute_result")
    assert page.count("&lt;figure") > 3  # the report itself, quoted
    assert not [o for out in outputs.values() for o in out if o.output_type == "execute_result"
                and "text/html" not in o.data]  # no stray values
    said = {id: "".join(o.text for o in out if o.output_type == "stream" and o.name == "stdout")
            for id, out in outputs.items()}
    assert said["talk"].count("<reasoning>") == 2 and "model before training" in said["talk"]
    assert "hf upload YOU/merged" in said["merge"]
    assert "greedy" in said["before"] and "Accuracy is unchanged" in said["after"]
    ids = [cell.id for cell in notebook.cells if cell.cell_type == "code"]
    assert ids == ["install", "package", "config", "before", "run", "after", "report",
                   "completions", "talk", "merge"]
    assert {"config.json", "model.safetensors", "Modelfile", "README.md"} <= {
        file.name for file in (path.parent / "merged").iterdir()}


def test_evaluation_is_on_the_data_of_the_training(tmp_path):
    """Its test split, the --eval-data given, or the rows that training held out of the user's."""
    for flags, expected in (
        (["--data", "gsm8k"], "data='gsm8k:test'"),
        (["--data", "mine.jsonl"], "data=str(held_out)"),
        (["--data", "mine.jsonl", "--eval-data", "other.jsonl"], "data=str(held_out)"),
    ):
        cells = json.loads(export(tmp_path / "nb", *flags).read_text())["cells"]
        text = "".join("".join(cell["source"]) for cell in cells
                       if cell["id"] in ("before", "after"))
        assert text.count(expected) == 2 and ("held_out.jsonl" in text) == ("held_out" in expected)


@pytest.mark.parametrize("script", ["train_sft", "train_grpo", "train_ppo"])
def test_own_rows_are_held_out_before_training_as_the_run_does(tmp_path, monkeypatch, script):
    """The cell before training writes the file that the run writes too."""
    (tmp_path / "mine.jsonl").write_text("".join(
        json.dumps({"q": f"{n} + {n}?", "reasoning": f"{n} and {n}.", "answer": 2 * n}) + "\n"
        for n in range(120)))
    monkeypatch.chdir(tmp_path)
    flags = ["--data", "mine.jsonl", "--columns", "question=q", "--steps", "1", "--out", "run"]
    export(tmp_path / "nb", *flags, script=f"{script}.py")
    module = importlib.import_module(script)
    scope = {"script": module, "config": commandline.cli(module.Config, "", flags)}
    exec(to_kaggle.OWN_ROWS, scope)
    assert scope["held_out"].read_bytes().count(b"\n") == 3
    seen = []
    monkeypatch.setattr(stage, "keep_held_out", lambda config, rows: seen.extend(rows) or 1 / 0)
    with pytest.raises(ZeroDivisionError):
        module.main(scope["config"])
    assert disk.to_jsonl(row.fields for row in seen) == scope["held_out"].read_bytes()


def talk(client, code, until=None, then=None):
    """Runs a cell: (all it printed, its error or None); when `until` is printed calls `then`.

    A thread of the kernel's sends what is written to file descriptor 2, perhaps after the cell's
    end: so this reads until nothing has come for a second.
    """
    said, error, sent, ended = "", None, client.execute(code), False
    deadline = time.monotonic() + 900
    while time.monotonic() < deadline:
        try:
            message = client.get_iopub_msg(timeout=1)
        except Empty:
            if ended:
                return said, error
            continue
        content = message["content"]
        if message["parent_header"].get("msg_id") != sent:
            continue
        said += content.get("text", "")
        if then and until in said:
            then = then()
        if message["msg_type"] == "error":
            error = f"{content['ename']}: {content['evalue']}"
            said += re.sub(r"\x1b\[[0-9;]*m", "", "\n".join(content["traceback"]))
        elif content.get("execution_state") == "idle":
            ended = True
    raise AssertionError(f"the cell did not end: {said[-2000:]}")


def test_one_file_in_a_kernel(tmp_path, one_device):
    path = export(tmp_path / "one", "--steps", "1000", *QUICK, one_file=True)
    cell = path.read_text()
    path.unlink()
    kernel = KernelManager()
    # ipykernel shows what is written to file descriptor 2, but not where it believes to be tested
    environment = {k: v for k, v in os.environ.items() if k != "PYTEST_CURRENT_TEST"}
    kernel.start_kernel(cwd=str(path.parent), env=environment)
    client = kernel.blocking_client()
    client.start_channels()
    try:
        client.wait_for_ready(timeout=300)
        said, error = talk(client, cell, "step 2/", kernel.interrupt_kernel)
        stopped = re.fullmatch(
            r"SystemExit: stopped by SIGINT at step (\d+) of runs/grpo: .*", error
        )
        assert stopped and "SIGINT: finishing this step, then saving" in said, (error, said[-500:])
        # nothing is left behind: signals are the kernel's again, the folder is unlocked
        said, error = talk(client, "print('on')\nwhile True: pass", "on\n", kernel.interrupt_kernel)
        assert error == "KeyboardInterrupt: ", said[-500:]
        n = int(stopped[1]) + 1
        said, error = talk(client, f"main(dataclasses.replace(CONFIG, steps={n}, eval_every=0))")
        for expected in (f"resuming runs/grpo at step {n - 1}", f"step {n}/{n}",
                         "done: runs/grpo/final"):
            assert error is None and expected in said, (expected, error, said[-2000:])
        # a sibling's error shows its lines
        said, error = talk(client, 'gemma.load("nowhere")')
        assert error.startswith("ValueError: nowhere/config.json: no such file")
        assert "cfg = read_config(" in said or "gemma.py" in said
    finally:
        client.stop_channels()
        kernel.shutdown_kernel(now=True)
    assert {p.name for p in path.parent.iterdir()} == {"runs"}


# -------------------------------------------------------------------------------------- exporting


def test_one_file_as_a_script_takes_flags(tmp_path):
    path = export(tmp_path, "--prompts", "3", one_file=True)
    run = lambda *flags: subprocess.run(
        [sys.executable, path.name, *flags], cwd=tmp_path, capture_output=True, text=True
    )
    assert re.search(r"--prompts .*\(default: 3\)", " ".join(run("--help").stdout.split()))
    wrong = run("--group", "1")
    assert wrong.returncode and wrong.stderr == "error: --group 1: expected 2 or more, to compare\n"


def test_the_same_flags_give_the_same_bytes(tmp_path):
    for one_file in (False, True):
        first, second = (
            export(tmp_path / name, "--steps", "2", one_file=one_file).read_bytes() for name in "ab"
        )
        assert first == second


@pytest.mark.parametrize(
    "script, flags, message",
    [
        ("train_grpo.py", ["--group", "1"], "--group 1: expected 2 or more"),
        ("train_grpo.py", ["--reward-file", "no.py:f"], "--reward-file no.py:f: no file 'no.py'"),
        ("gemma.py", [], "gemma.py: expected one of bench.py, chat.py, eval.py"),
    ],
)
def test_a_wrong_value_fails_at_export(tmp_path, script, flags, message):
    with pytest.raises(ValueError, match=message):
        export(tmp_path, *flags, script=script)
    assert not any(tmp_path.iterdir())


def test_a_typo_fails_at_export(tmp_path, capsys):
    with pytest.raises(SystemExit):
        export(tmp_path, "--stepz", "2")
    assert "--stepz" in capsys.readouterr().err
    assert not any(tmp_path.iterdir())


def test_all_files_that_are_needed_come_along():
    files = to_kaggle.needed("bench.py")
    assert files[0] == "bench.py" and len(set(files)) == len(files)
    assert {"train_grpo.py", "judge.py", "data.py", "runs.py"} < set(files)
    assert "model_files.py" in to_kaggle.needed("gemma.py")  # only a function imports it


def test_a_reward_file_comes_along(tmp_path):
    text = "def score(completion, row):\n    \"\"\"A '''quoted''' word.\"\"\"\n    return 0.0\n"
    (tmp_path / "my.py").write_text(text)
    flags = ["--model", "gemma3-1b", "--reward-file", f"{tmp_path}/my.py:score"]
    cells = json.loads(export(tmp_path / "nb", *flags).read_text())["cells"]
    sources = {cell["id"]: "".join(cell["source"]) for cell in cells}
    assert repr("\n" + text) in sources["package"] and "tarfile" not in sources["package"]
    assert "reward_file='my.py:score'" in sources["config"]
    assert "adapter='runs/grpo'" in sources["after"] and "model='gemma3-1b'" in sources["after"]
    one = export(tmp_path / "one", *flags, one_file=True).read_text()
    strings = {node.value for node in ast.walk(ast.parse(one)) if isinstance(node, ast.Constant)}
    assert "\n" + text in strings and "\n" + (ROOT / "gemma.py").read_text() in strings


def test_a_reward_file_beside_the_scripts_is_written_where_its_flag_says(tmp_path, monkeypatch):
    here = tmp_path / "here"
    here.mkdir()
    for file in (*ROOT.glob("*.py"), ROOT / "requirements.txt"):
        (here / file.name).write_bytes(file.read_bytes())
    (here / "my.py").write_text("def score(completion, row):\n    return 0.0\n")
    monkeypatch.setattr(to_kaggle, "HERE", here)
    flags = ["--model", "gemma3-1b", "--reward-file"]
    one = export(tmp_path / "one", *flags, f"{here}/my.py:score", one_file=True).read_text()
    assert "FILES['my.py'] = " in one
    with pytest.raises(ValueError, match="rewards.py: rename it, one of ours has that name"):
        export(tmp_path / "one", *flags, f"{here}/rewards.py:score")


@pytest.mark.parametrize("script", ["train_sft.py", "train_simpo.py", "train_ppo.py",
                                    "train_distill.py", "eval.py",
                                    "synthesize.py"])
def test_other_scripts_export_too(tmp_path, script):
    flags = ["pairs", "--data", "gsm8k"] if script == "synthesize.py" else []
    flags += ["--model", "gemma3-1b"]
    notebook = nbformat.read(export(tmp_path / "nb", *flags, script=script), as_version=4)
    nbformat.validate(notebook)
    # the machine, and no image: "dockerImageVersionId" would pin one
    assert notebook.metadata.kaggle == {"accelerator": "tpuV5e8", "isInternetEnabled": True}
    ids = {cell.id for cell in notebook.cells}
    after = {"before", "after", "talk", "merge"}
    assert after & ids == (after if script.startswith("train_") else set())
    ast.parse(export(tmp_path / "one", *flags, script=script, one_file=True).read_text())


# ------------------------------------------------------------------------------ inputs and outputs


def test_output_goes_where_kaggle_keeps_it(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "KAGGLE", tmp_path)
    assert hub.output("runs/sft") == Path("runs/sft")
    (tmp_path / "working").mkdir()
    assert hub.output("runs/sft") == tmp_path / "working/runs/sft"
    assert hub.output("/elsewhere/sft") == Path("/elsewhere/sft")
    monkeypatch.chdir(tmp_path)
    for name in ("train_sft", "train_simpo", "train_grpo", "train_ppo", "train_distill", "eval"):
        module = importlib.import_module(name)
        out = module.resolve(module.Config(model="tiny")).out
        assert Path(out).parent == tmp_path / "working/runs"
        assert module.resolve(module.Config(model="tiny", out=out)).out == out


def test_adapters_are_found_in_the_output_and_among_the_inputs(tmp_path, monkeypatch):
    monkeypatch.setattr(hub, "KAGGLE", tmp_path)
    monkeypatch.chdir(ROOT)
    with pytest.raises(ValueError, match="--adapter runs/a: expected adapter_config.json"):
        hub.find_start("tiny", None, "runs/a")
    last = None
    for where in ("input/notebooks/me/first/runs/a", "working/runs/a"):
        last = tmp_path / where / "final"
        last.mkdir(parents=True)
        (last / "adapter_config.json").write_text("{}")
        lora.write_prompt(last, where)
        assert hub.find_start("tiny", None, "runs/a").adapter == last
        assert lora.read_prompt("runs/a", None) == where
    assert hub.find_start("tiny", None, str(last)).adapter == last
    for where in ("first", "second"):
        (tmp_path / "input/notebooks/me" / where / "runs/b").mkdir(parents=True)
    with pytest.raises(
        ValueError, match="--adapter runs/b: several inputs have it, .*second/runs/b"
    ):
        hub.find_start("tiny", None, "runs/b")


# ----------------------------------------------------------------------------------- installation


def wheel(folder, name, version, requires=""):
    """A package of one empty module."""
    info, needs = f"{name}-{version}.dist-info", f"Requires-Dist: {requires}\n" * bool(requires)
    needs += "Provides-Extra: tpu\n" * ("extra" in requires)
    metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{needs}"
    with zipfile.ZipFile(folder / f"{name}-{version}-py3-none-any.whl", "w") as file:
        file.writestr(f"{name}.py", "")
        file.writestr(f"{info}/METADATA", metadata)
        file.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any"
        )
        file.writestr(f"{info}/RECORD", f"{info}/RECORD,,\n")
    return file.filename


def test_the_install_cell_leaves_jax_alone(tmp_path, monkeypatch):
    """The newest optax wants a newer JAX; on a machine with its own build an older one must do."""
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path))
    monkeypatch.setenv("PIP_DISABLE_PIP_VERSION_CHECK", "1")
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", tmp_path / "venv"], check=True)
    (tmp_path / "pip").symlink_to(Path(pip.__file__).parent)  # quicker than one of its own
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (site,) = (tmp_path / "venv").glob("lib/*/site-packages")
    for there in ("jax 0.10.0", "numpy 1.0", "tqdm 1.0", "libtpu 0.0.37"):
        requires = 'libtpu==0.0.37.*; extra == "tpu"' if there[:3] == "jax" else ""
        zipfile.ZipFile(wheel(tmp_path, *there.split(), requires)).extractall(site)
    wheel(tmp_path, "jax", "0.13.0")
    wheel(tmp_path, "jax", "0.12.0", 'libtpu==0.0.44.*; extra == "tpu"')
    for version in ("0.0.17", "0.0.37", "0.0.44"):
        wheel(tmp_path, "libtpu", version)
    wheel(tmp_path, "optax", "1.0", "jax>=0.9")
    wheel(tmp_path, "optax", "2.0", "jax>=0.12")
    for name in ("numpy", "safetensors", "sentencepiece", "tqdm"):
        wheel(tmp_path, name, "2.0")

    def run():
        command = [tmp_path / "venv/bin/python", "-c", to_kaggle.install()]
        done = subprocess.run(command, capture_output=True, text=True)
        return done.stderr, {p.stem for p in site.glob("*.dist-info")}

    error, _ = run()
    assert error.endswith("pip could not install optax, safetensors, sentencepiece, tyro: is "
                          "Internet on?\n")
    wheel(tmp_path, "tyro", "2.0")
    error, installed = run()
    assert error == "" and installed == {
        "jax-0.10.0", "libtpu-0.0.37", "numpy-1.0", "tqdm-1.0", "optax-1.0", "safetensors-2.0",
        "sentencepiece-2.0", "tyro-2.0",
    }
    # Kaggle's image of August 2026: an old JAX, and a libtpu that is not the one JAX asks for
    for there, jax, libtpu in (
        ("jax 0.7.2", "0.12.0", "0.0.44"), ("jax 0.10.0", "0.10.0", "0.0.37"),
    ):
        for old in (*site.glob("jax-*"), *site.glob("libtpu-*")):
            shutil.rmtree(old)
        requires = f'libtpu=={"0.0.20" if "0.7" in there else "0.0.37"}.*; extra == "tpu"'
        package = wheel(tmp_path, *there.split(), requires)
        zipfile.ZipFile(package).extractall(site)
        zipfile.ZipFile(tmp_path / "libtpu-0.0.17-py3-none-any.whl").extractall(site)
        error, installed = run()
        assert error == "" and {f"jax-{jax}", f"libtpu-{libtpu}"} <= installed, (error, installed)
