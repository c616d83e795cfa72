"""bench.py --target and --plan: the formulas are right, and the default runs fit a v5e-8."""

import dataclasses
import json
import math
import os
import subprocess
import sys

import jax
import pytest
from conftest import ROOT, mesh_of

import bench
import gemma
import model_files
import stage
import train_distill
import train_grpo
import train_ppo
import train_sft
import train_simpo

GIB = 2**30


def config_in(folder, layers: int = 3):
    """A folder with a config.json in which matrix products are nearly all of the work."""
    cfg = gemma.Config(
        "gemma3_text", 2048, 512, 1536, layers, 4, 2, 64, 64, 64, (True,) * layers, 1e4, 1e6,
        max_position_embeddings=256,
    )
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(model_files.config_to_dict(cfg)))
    return str(folder)


# -------------------------------------------------------------------------------------- formulas


def counted(jaxpr, n: int) -> tuple[float, float]:
    """(FLOPs, bytes that arrive in collectives) of a traced program; while loops run once."""
    flops, arrived, share = 0.0, 0.0, (n - 1) / n
    size = lambda variables: sum(v.aval.size * v.aval.dtype.itemsize for v in variables)
    for eqn in jaxpr.eqns:
        name, times = eqn.primitive.name, eqn.params.get("length", 1)
        if name == "dot_general":
            (contracted, _), _ = eqn.params["dimension_numbers"]
            depth = math.prod(eqn.invars[0].aval.shape[i] for i in contracted)
            flops += 2 * eqn.outvars[0].aval.size * depth
        elif name in ("reduce_scatter", "psum_scatter"):
            arrived += share * size(eqn.invars)
        elif name.startswith("psum"):
            arrived += 2 * share * size(eqn.invars)
        elif name.startswith(("all_gather", "all_to_all")):
            arrived += share * size(eqn.outvars)
        for inner in jax.tree.leaves(list(eqn.params.values())):
            inner = getattr(inner, "jaxpr", inner)
            if hasattr(inner, "eqns"):
                more = counted(inner, n)
                flops, arrived = flops + times * more[0], arrived + times * more[1]
    return flops, arrived


@pytest.mark.parametrize("shard, rank, remat, base", [
    ("no", 16, "none", "dtype"), ("no", 16, "attention", "dtype"), ("no", 16, "layer", "dtype"),
    ("no", 0, "none", "dtype"), ("yes", 16, "none", "dtype"), ("yes", 16, "auto", "dtype"),
    ("yes", 0, "auto", "dtype"), ("no", 16, "attention", "int8"), ("yes", 16, "auto", "int8"),
])
def test_the_formulas_are_those_of_the_program(tmp_path, shard, rank, remat, base):
    """A product more or less with each weight would be 20 %."""
    config = train_sft.resolve(train_sft.Config(
        weights=config_in(tmp_path), dtype="float32", max_length=128, batch_rows=16, micro_rows=1,
        remat=remat, lora_rank=rank, shard=shard, base=base,
    ))
    programs = train_sft.programs(config, mesh_of(8))
    function, arguments = programs["train_step"]
    cfg = gemma.read_config(config.weights)
    work = bench.step_work("sft", config, cfg, mesh_of(8), programs)["sft"]
    flops, arrived = counted(function.trace(*arguments).jaxpr.jaxpr, 8)
    assert work.flops == pytest.approx(flops, rel=0.01)
    assert work.ici == pytest.approx(arrived, rel=0.03)  # of embedded tokens besides


@pytest.mark.parametrize("module, fields", [
    (train_sft, dict(max_length=64, batch_rows=8, micro_rows=1)),
    (train_simpo, dict(max_length=64, batch_rows=8, micro_rows=1, loss="dpo")),
    (train_grpo, dict(kl_coef=0.1)), (train_ppo, dict(kl_coef=0.1)), (train_distill, {})])
def test_programs_are_the_jitted_functions_with_their_shapes(module, fields):
    for name, (f, arguments) in module.programs(module.Config(**fields), mesh_of(8)).items():
        assert f.lower(*arguments) is not None, name


def test_a_size_goes_before_its_family():
    """What is left open is filled from gemma3-12b's own row, for the base model too."""
    slots = lambda model: train_grpo.resolve(train_grpo.Config(model=model)).slots
    assert slots("gemma3-12b") == slots("gemma3-12b-pt") == slots("gemma2-27b") == 8
    assert slots("gemma3-1b-pt") == 32


@pytest.mark.parametrize("base", ["dtype", "int8"])
def test_a_decode_step_reads_the_weights_and_the_caches(tmp_path, base):
    config = train_grpo.resolve(train_grpo.Config(
        weights=config_in(tmp_path), dtype="float32", base=base, slots=2, max_prompt=32, max_new=32,
        pack_length=64,
    ))
    mesh = mesh_of(1)
    programs = train_grpo.programs(config, mesh)
    function, arguments = programs["decode"]
    step = bench.policy_cost(config, gemma.read_config(config.weights), mesh,
                             programs["train_step"][1][0], stage.rollouts_are_sharded
                             ).decode_step(config.slots, 64)
    held = bench.tree_bytes(arguments[2]) + bench.tree_bytes(arguments[-1]["cache"])
    assert held < step.bytes < 1.3 * held
    flops, _ = counted(function.trace(*arguments).jaxpr.jaxpr, 1)
    assert step.flops == pytest.approx(flops, rel=0.1)


# --------------------------------------------------------------------------------- without libtpu


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(bench, "find_libtpu", lambda: None)
    monkeypatch.setattr(bench, "set_environment", lambda target: None)


@pytest.mark.parametrize("module", [train_sft, train_simpo, train_grpo, train_ppo, train_distill])
def test_without_the_compiler_arguments_are_added_up(no_compiler, module, capsys):
    """--plan of each script, with no weights and no libtpu: exact arguments, and a session."""
    out = module.main(module.Config(model="gemma3-1b", plan=True))
    printed = capsys.readouterr().out
    assert "temporaries come on top" in printed and "9 h are" in printed
    name = module.__name__.removeprefix("train_")
    phase = f"{name}_update" if name in bench.ON_ROLLOUTS else name
    row = out["phases"][phase]
    weights = 2 * gemma.CONFIGS["gemma3-1b"].n_params
    if name == "distill":  # the teacher is split over eight cores
        weights += 2 * gemma.CONFIGS["gemma3-12b"].n_params / 8
    trained = 1.4 * GIB if name == "ppo" else 0.7 * GIB  # PPO has two adapters
    assert weights < row["arguments_bytes"] < weights + trained and "total_bytes" not in row
    assert out["session"]["steps"] == int(9 * 3600 / out["step_s"])
    assert out["step_s"] == pytest.approx(2 * sum(
        p.get("roofline_s", 0.0) for p in out["phases"].values()))
    if name in bench.ON_ROLLOUTS:
        assert out["session"]["rollouts"] == out["session"]["steps"] * 256


def test_flags_reach_the_plan(no_compiler, tmp_path, capsys):
    """The time limit is the session; a judge takes memory beside every other phase."""
    config = train_grpo.Config(
        weights=config_in(tmp_path), plan=True, time_limit="90m",
        judge="gemma3-12b", rewards="judge:1", kl_coef=0.0, lora_rank=8,
    )
    out = train_grpo.main(config)
    assert out["session_s"] == 5400 and "grpo_reference" not in out["phases"]
    judge = gemma.CONFIGS["gemma3-12b"].n_params * 2 / 8
    assert out["phases"]["grpo_judge"]["arguments_bytes"] == pytest.approx(judge, rel=0.01)
    assert out["phases"]["grpo_update"]["beside_bytes"] == pytest.approx(judge, rel=0.01)
    with pytest.raises(ValueError, match="--judge gemma3-13b"):
        train_grpo.main(dataclasses.replace(config, judge="gemma3-13b"))


def test_json_and_phases(no_compiler, capsys):
    config = bench.Config(model="tiny", target="v5e:2x4", phases="sft,grpo_update", json=True,
                          judge="tiny", prompts=3, group=5, new_tokens=7)
    out = bench.main(config)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hbm_bytes"] == out["hbm_bytes"]
    assert out["hbm_bytes"].keys() == {"sft", "sft_eval", "grpo_update"}
    session = out["grpo"]["session"]
    assert session["rollouts"] == 3 * 5 * session["steps"] == session["tokens"] / 7
    for wrong, name in (
        (dict(phases="speed"), "--phases speed"),
        (dict(target="h100"), "--target"),
    ):
        with pytest.raises(ValueError, match=name):
            bench.main(dataclasses.replace(config, **wrong))


@pytest.mark.parametrize("message", [
    "RESOURCE_EXHAUSTED: Ran out of memory on HBM, the total memory required for HLO temporaries "
    "(21.52G) exceeds available HBM (15.75G).",
    "RESOURCE_EXHAUSTED: XLA:TPU compile permanent error. Ran out of memory in memory space hbm. "
    "Used 21.52G of 15.75G hbm. Exceeded hbm capacity by 5.77G.",
    "INTERNAL: something else",
])
def test_too_large_a_program_is_reported(capsys, message):
    """The compiler's message in, one line with the numbers and the flag out; others are raised."""

    class Refused:
        def lower(self):
            raise jax.errors.JaxRuntimeError(message)

    if "hbm" not in message.lower():
        with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
            bench.compiled_memory(Refused(), ())
        return
    row = bench.compiled_memory(Refused(), ())
    assert row == {"total_bytes": pytest.approx(21.52 * GIB)}
    phases = {"sft": {"hbm_bytes": row["total_bytes"]}, "sft_eval": {"hbm_bytes": 14 * GIB}}
    bench.print_phases("sft", phases, 15.75 * GIB, True)
    out = capsys.readouterr().out
    assert "\nsft needs up to 21.52 GiB of a core's 15.75; lower --micro-rows or" in out
    assert "fits" not in out


# ------------------------------------------------------------------------------------ with libtpu


def compiled(*flags: str) -> dict:
    """What bench.py --json says of a v5e-8."""
    return last_line("bench.py", "--target", "v5e:2x4", "--json", *flags)


def last_line(*command: str) -> dict:
    """JSON at the end of what Python prints, in a process of its own: this one has no libtpu."""
    drop = ("XLA_FLAGS", "JAX_PLATFORMS", "JAX_COMPILATION_CACHE_DIR")
    environment = {k: v for k, v in os.environ.items() if k not in drop} | {"JAX_PLATFORMS": "cpu"}
    done = subprocess.run([sys.executable, *command], env=environment, capture_output=True,
                          text=True, cwd=ROOT)
    assert done.returncode == 0, done.stderr[-3000:]
    if "pip install" in done.stderr:
        pytest.skip(next(line for line in done.stderr.splitlines() if "pip install" in line))
    print(done.stdout)
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture
def libtpu():
    if bench.find_libtpu() is None:
        pytest.skip("no libtpu here: bench.py --target says how to get it")


def test_the_default_grpo_run_of_gemma3_1b_fits(libtpu):
    out = compiled("--model", "gemma3-1b", "--phases", "grpo_update,grpo_decode")
    assert out["hbm_bytes"].keys() == {"grpo_update", "grpo_decode"}
    for phase, n_bytes in out["hbm_bytes"].items():
        assert n_bytes < 15 * GIB, f"{phase}: {n_bytes / GIB:.2f} GiB"
        row = out["phases"][phase]  # the outputs take the place of donated arguments
        assert row["total_bytes"] < 1.02 * (row["arguments_bytes"] + row["temporaries_bytes"])


@pytest.mark.slow
@pytest.mark.parametrize(("student", "teacher"), [
    ("gemma3-1b", "gemma3-12b"), ("gemma2-2b", "gemma2-9b")])
def test_distillation_from_a_larger_gemma_fits(libtpu, student, teacher):
    plan = f"t.main(t.Config(model={student!r}, teacher={teacher!r}, plan=True))"
    out = last_line("-c", f"import json, train_distill as t; print(json.dumps({plan}))")
    used = {name: phase["hbm_bytes"] for name, phase in out["phases"].items()}
    assert {"distill_update", "distill_decode"} <= used.keys()
    assert max(used.values()) < 15.75 * GIB, used


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma3-1b", "gemma2-2b"])
@pytest.mark.parametrize(("limit", "flags"), [
    (15, ("--phases", "sft,simpo,grpo")),
    (15, ("--phases", "sft,simpo,grpo", "--lora-rank", "0", "--slots", "20")),
    (15.75, ("--phases", "grpo", "--judge", "gemma3-12b")),
], ids=["lora", "full", "judged"])
def test_every_program_fits(libtpu, model, limit, flags):
    """The table is printed (pytest -s), for LOG.md."""
    out = compiled("--model", model, *flags)
    assert out["hbm_bytes"] and max(out["hbm_bytes"].values()) < limit * GIB
