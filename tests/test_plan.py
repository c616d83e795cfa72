"""bench.py --target and --plan: what is counted is right, and the default runs fit a v5e-8."""

import dataclasses
import functools
import json
import os
import subprocess
import sys
import types

import jax
import pytest
from conftest import ROOT
from jax import lax
from jax.sharding import AxisType

import bench
import gemma
import train_grpo
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
    (folder / "config.json").write_text(json.dumps(gemma.config_to_dict(cfg)))
    return str(folder)


def mesh_of(n: int):
    devices = jax.devices()[:n]
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=devices)


# -------------------------------------------------------------------------------------- counting


@pytest.mark.parametrize(
    "rank, remat", [(16, "none"), (16, "attention"), (16, "layer"), (0, "none")]
)
def test_counted_flops_are_those_of_the_compiled_program(tmp_path, monkeypatch, rank, remat):
    """Of one layer, and of three whose scan the compiler unrolls; it counts a loop's body once."""
    config = train_sft.Config(
        weights=config_in(tmp_path), dtype="float32", batch_rows=2, micro_rows=2, max_length=128,
        remat=remat, lora_rank=rank,
    )
    unrolled = types.SimpleNamespace(**vars(lax))
    unrolled.scan = functools.partial(lax.scan, unroll=True)
    monkeypatch.setattr(gemma, "lax", unrolled)
    found = {}
    for layers in (1, 3):
        config_in(tmp_path, layers)
        function, arguments = train_sft.programs(config, mesh_of(1))["train_step"]
        traced, work = bench.traced_work(function, arguments, 1)
        found[layers] = work.run().flops
        if layers == 3 or (rank, remat) == (16, "none"):
            theirs = traced.lower().compile().cost_analysis()["flops"]
            # The compiler leaves out the gradient of the first layer's input where that is frozen.
            assert found[layers] == pytest.approx(theirs, rel=0.06 if layers == 1 else 0.03)
    cfg = gemma.read_config(tmp_path)
    layer = cfg.n_params - cfg.vocab_size * cfg.hidden_size
    a_token = (6 if remat == "layer" or not rank else 4) * layer / 3 * 256
    assert found[3] - found[1] == pytest.approx(2 * a_token, rel=0.2)  # attention and LoRA besides


def test_loops_make_the_trips_they_are_given():
    inner = bench.Work(flops=10.0)
    work = bench.Work(1.0, loops=((4, bench.Work(2.0, loops=((6, inner),))),))
    assert work.run().flops == 1 + 4 * (2 + 6 * 10)
    assert work.run(3).flops == 1 + 3 * (2 + 6 * 10)
    assert work.run(3, 0.4).flops == 1 + 3 * (2 + 3 * 10)  # 2.4 chunks are three
    assert (work * 2 + work).run().flops == 3 * work.run().flops


def test_collectives_are_counted(tmp_path):
    """A split base is gathered for each pass over it; a gradient is summed once."""
    common = dict(weights=config_in(tmp_path), dtype="float32", batch_rows=8, micro_rows=1,
                  max_length=128, remat="none")
    found = {}
    for shard in ("no", "yes"):
        config = train_sft.Config(**common, shard=shard)
        function, arguments = train_sft.programs(config, mesh_of(8))["train_step"]
        found[shard] = bench.traced_work(function, arguments, 8)[1].run()
        trained, _, fixed = arguments[:3]
    adapter, base = bench.tree_bytes(trained), bench.tree_bytes(fixed["base"]) * 8
    assert found["no"].ici == pytest.approx(2 * adapter * 7 / 8, rel=0.01)
    # Forward and again backward: a gathered weight kept in between would be kept for all layers.
    assert 1.9 * base < found["yes"].ici / (7 / 8) < 2.2 * base


def test_a_split_base_has_whole_layers_computed_again(tmp_path):
    """remat auto, by the FLOPs; neither makes a product with a weight a third time."""

    def flops(**how):
        config = train_sft.Config(
            weights=config_in(tmp_path), dtype="float32", batch_rows=8, micro_rows=1,
            max_length=128, **how,
        )
        function, arguments = train_sft.programs(config, mesh_of(8))["train_step"]
        return bench.traced_work(function, arguments, 8)[1].run().flops

    attention, layer = (flops(remat=remat, shard="no") for remat in ("attention", "layer"))
    assert flops(remat="auto", shard="no") == attention < 0.8 * layer
    assert flops(remat="auto", shard="yes") == pytest.approx(layer, rel=1e-3)


def test_a_size_goes_before_its_family():
    """What is left open is filled from gemma3-12b's own row, for the base model too."""
    slots = lambda model: train_grpo.resolve(train_grpo.Config(model=model)).slots
    assert slots("gemma3-12b") == slots("gemma3-12b-pt") == 8 and slots("gemma3-1b-pt") == 32


def test_decoding_reads_the_weights_and_the_caches(tmp_path):
    config = train_grpo.Config(
        weights=config_in(tmp_path), dtype="float32", slots=2, max_prompt=32, max_new=32,
        pack_length=64,
    )
    programs = train_grpo.programs(config, mesh_of(1))
    function, arguments = programs["decode"]
    step = bench.traced_work(function, arguments, 1)[1].loops[0][1]
    cache = bench.tree_bytes(arguments[-1]["cache"])
    weights = bench.tree_bytes(arguments[2])
    assert weights + cache < step.bytes < 1.3 * (weights + cache)


# --------------------------------------------------------------------------------- without libtpu


@pytest.fixture
def no_compiler(monkeypatch):
    monkeypatch.setattr(bench, "find_libtpu", lambda: None)
    monkeypatch.setattr(bench, "prepare", lambda target: None)


@pytest.mark.parametrize("module", [train_sft, train_simpo, train_grpo])
def test_without_the_compiler_arguments_are_added_up(no_compiler, module, capsys):
    """--plan of each script, with no weights and no libtpu: exact arguments, and a session."""
    out = module.main(module.Config(model="gemma3-1b", plan=True))
    printed = capsys.readouterr().out
    assert "temporaries come on top" in printed and "9 h are" in printed
    name = module.__name__.removeprefix("train_")
    phase = {"grpo": "grpo_update"}.get(name, name)
    row = out["phases"][phase]
    weights = 2 * gemma.CONFIGS["gemma3-1b"].n_params
    assert weights < row["arguments_bytes"] < weights + 0.7 * GIB and "total_bytes" not in row
    assert out["session"]["steps"] == int(9 * 3600 / out["step_s"])
    assert out["step_s"] == pytest.approx(2 * sum(
        p.get("roofline_s", 0.0) for p in out["phases"].values()))
    if name == "grpo":
        assert out["session"]["rollouts"] == out["session"]["steps"] * 32 * 8


def test_flags_reach_the_plan(no_compiler, tmp_path, capsys):
    """The time limit is the session; a judge takes memory beside every other phase."""
    config = train_grpo.Config(
        weights=config_in(tmp_path), model="gemma3-1b", plan=True, time_limit="90m",
        judge="gemma3-12b", kl_coef=0.0, lora_rank=8,
    )
    out = train_grpo.main(config)
    assert out["session_s"] == 5400 and "grpo_reference" not in out["phases"]
    judge = gemma.CONFIGS["gemma3-12b"].n_params * 2 / 8
    assert out["phases"]["grpo_judge"]["arguments_bytes"] == pytest.approx(judge, rel=0.01)
    assert out["phases"]["grpo_update"]["beside_bytes"] == pytest.approx(judge, rel=0.01)
    with pytest.raises(ValueError, match="--judge gemma3-13b"):
        train_grpo.main(dataclasses.replace(config, judge="gemma3-13b"))


def test_json_and_phases(no_compiler, capsys):
    config = bench.Config(model="tiny", target="v5e:2x4", phases="sft,grpo_update", json=True)
    out = bench.main(config)
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["hbm_bytes"] == out["hbm_bytes"]
    assert out["hbm_bytes"].keys() == {"sft", "sft_eval", "grpo_update"}
    assert out["sessions"]["grpo"]["rollouts"] > 0
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
])
def test_too_large_a_program_is_reported(capsys, message):
    """The compiler's message in, one line with the numbers and the flag out; others are raised."""

    class Refused:
        def lower(self):
            raise jax.errors.JaxRuntimeError(self.message)

    refused = Refused()
    refused.message = message
    row = bench.memory(refused)
    assert row["needs_bytes"] == pytest.approx(21.52 * GIB)
    needs = row["needs_bytes"]
    row |= {
        "arguments_bytes": GIB,
        "hbm_bytes": needs,
        "least_bytes": needs,
        "flags": "--micro-rows",
    }
    close = row | {"hbm_bytes": 16 * GIB, "least_bytes": 14 * GIB}
    bench.show_phases({"sft": row, "sft_eval": close}, 15.75 * GIB, True)
    out = capsys.readouterr().out
    for line in (
        "sft does not fit: needs 21.52 GiB or more, a core has 15.75; lower --micro-rows",
        "sft_eval may not fit: needs 14.00 to 16.00 GiB, a core has 15.75; if so, lower --micro",
    ):
        assert line in out
    assert "It fits" not in out
    refused.message = "INTERNAL: something else"
    with pytest.raises(jax.errors.JaxRuntimeError, match="something else"):
        bench.memory(refused)


# ------------------------------------------------------------------------------------ with libtpu


def compiled(*flags: str) -> dict:
    """What bench.py --json says of a v5e-8, from a process of its own: this one has no libtpu."""
    drop = ("XLA_FLAGS", "JAX_PLATFORMS")
    environment = {k: v for k, v in os.environ.items() if k not in drop} | {"JAX_PLATFORMS": "cpu"}
    command = [sys.executable, str(ROOT / "bench.py"), "--target", "v5e:2x4", "--json", *flags]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
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
    """Its update and decoding, on each core of a v5e-8; and their FLOPs are the compiler's."""
    out = compiled("--model", "gemma3-1b", "--phases", "grpo_update,grpo_decode")
    assert out["hbm_bytes"].keys() == {"grpo_update", "grpo_decode"}
    for phase, n_bytes in out["hbm_bytes"].items():
        assert n_bytes < 15 * GIB, f"{phase}: {n_bytes / GIB:.2f} GiB"
        row = out["phases"][phase]
        assert row["arguments_bytes"] < row["peak_bytes"] < row["total_bytes"]
        assert row["aliased_bytes"] == pytest.approx(row["output_bytes"], rel=0.02)  # donated
    decode = out["phases"]["grpo_decode"]
    assert decode["flops"] / 768 == pytest.approx(decode["compiler_flops"], rel=0.03)  # one token


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma3-1b", "gemma2-2b"])
@pytest.mark.parametrize("flags", [(), ("--lora-rank", "0", "--slots", "20")], ids=["lora", "full"])
@pytest.mark.parametrize("script", ["sft", "simpo", "grpo"])
def test_every_program_fits(libtpu, model, flags, script):
    """By default and with all weights trained; the table is printed (pytest -s), for LOG.md."""
    out = compiled("--model", model, "--phases", script, *flags)
    assert out["hbm_bytes"] and max(out["hbm_bytes"].values()) < 15 * GIB


@pytest.mark.slow
@pytest.mark.parametrize("model", ["gemma3-1b", "gemma2-2b"])
def test_a_12b_judge_fits_beside_the_policy(libtpu, model):
    out = compiled("--model", model, "--phases", "grpo", "--judge", "gemma3-12b")
    assert "grpo_judge" in out["hbm_bytes"] and max(out["hbm_bytes"].values()) < 15.75 * GIB
