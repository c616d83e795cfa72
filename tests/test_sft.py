"""train_sft.py: gradients that no layout changes, a frozen base, and runs that survive a kill."""

import dataclasses
import os
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from conftest import ROOT
from jax.sharding import AxisType

import data
import gemma
import lora
import train_sft

CFG = gemma.Config(
    "gemma3_text", 97, 32, 48, 3, 4, 2, 16, 16, 6, (False, True, False), 1e4, 1e6,
    max_position_embeddings=64,
)  # fmt: skip
CONFIG = train_sft.resolve(
    train_sft.Config(lora_rank=4, max_length=32, batch_rows=8, micro_rows=8, steps=4)
)


def mesh_of(n):
    return jax.make_mesh((n,), ("data",), axis_types=(AxisType.Auto,), devices=jax.devices()[:n])


def examples(n, seed=0, longest=20):
    rng = np.random.default_rng(seed)
    rows = []
    for _ in range(n):
        length = int(rng.integers(4, longest))
        mask = (np.arange(length) >= rng.integers(1, length - 1)).astype(np.int8)
        rows.append((rng.integers(3, 97, length).astype(np.int32), mask))
    return rows


def weights(config=CONFIG, seed=0, dtype=jnp.float32):
    """(trained, fixed) with B != 0, so that every gradient is alive."""
    params = gemma.init(CFG, jax.random.key(seed), dtype)
    if not config.lora_rank:
        return params, {}
    adapter = train_sft.new_adapter(CFG, config)
    noise = lambda b: 0.1 * jax.random.normal(jax.random.key(seed + 1), b.shape)
    trained, fixed = lora.split(adapter | {"b": jax.tree.map(noise, adapter["b"])})
    return trained, {"base": params} | fixed


def gradient(batch, n_micro=1, devices=1, config=CONFIG, sharded=False, check_vma=True):
    """(gradient, metrics) of one update whose rows are laid out as asked."""
    mesh = mesh_of(devices)
    trained, fixed = weights(config)
    trained = train_sft.place(trained, mesh, train_sft.trained_specs(CFG, config, sharded))
    fixed = train_sft.place(fixed, mesh, train_sft.fixed_specs(CFG, config, sharded))
    batch = {k: v.reshape(n_micro, -1, v.shape[-1]) for k, v in batch.items()}
    f = jax.jit(train_sft.grads_on_mesh(CFG, config, mesh, sharded, check_vma))
    out = f(trained, fixed, batch, jax.random.key(0))
    assert jax.tree.map(lambda x: x.shape, out[0]) == jax.tree.map(lambda x: x.shape, trained)
    return jax.device_get(out)


def close(got, expected, rtol=1e-5):
    """Relative to the size of each array's largest entry."""
    for path, x in jax.tree_util.tree_leaves_with_path(expected[0]):
        y = dict(jax.tree_util.tree_leaves_with_path(got[0]))[path]
        assert np.abs(x).max() > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(y, x, atol=rtol * np.abs(x).max(), rtol=0)
    np.testing.assert_allclose(got[1]["loss"], expected[1]["loss"], rtol=1e-6)
    assert got[1]["n_tokens"] == expected[1]["n_tokens"]


ROWS = examples(20)
PACKED = data.assemble(
    [[ROWS[i] for i in b] for b in data.pack([len(r[0]) for r in ROWS], 32)], 16, 32
)
ONE_EACH = data.assemble([[r] for r in ROWS], 24, 32)


@pytest.mark.smoke
def test_packing_changes_no_gradient():
    assert (PACKED["segments"].max(1) > 1).any()
    close(gradient(PACKED), gradient(ONE_EACH))


def test_gradient_is_that_of_the_mean_over_all_tokens():
    """Against the textbook loss on whole logits, one example a row."""
    trained, fixed = weights()

    batch = data.assemble([[r] for r in ROWS], len(ROWS), 32)
    tokens, mask = batch["tokens"], batch["mask"][:, 1:]

    def total(trained):
        lora_live = trained | {"scale": fixed["scale"]}
        logits = gemma.logits(fixed["base"], CFG, tokens, batch["segments"], lora_live)
        logp = jax.nn.log_softmax(logits[:, :-1])
        logp = jnp.take_along_axis(logp, tokens[:, 1:, None], axis=2)[..., 0]
        return -(logp * mask).sum() / mask.sum()

    value, g = jax.jit(jax.value_and_grad(total))(trained)
    close(gradient(PACKED), (g, {"loss": value, "n_tokens": mask.sum()}))


@pytest.mark.parametrize("n_micro", [2, 4, 8])
def test_micro_batches_change_no_gradient(n_micro):
    close(gradient(PACKED, n_micro), gradient(PACKED))


@pytest.mark.smoke
@pytest.mark.parametrize("check_vma", [True, False])
@pytest.mark.parametrize("rank,sharded", [(4, False), (4, True), (0, False), (0, True)])
def test_eight_devices_change_no_gradient(rank, sharded, check_vma):
    config = dataclasses.replace(CONFIG, lora_rank=rank)
    one = gradient(PACKED, config=config)
    close(gradient(PACKED, 2, 8, config, sharded, check_vma), one, 2e-5)


@pytest.mark.parametrize("remat", ["attention", "layer"])
def test_remat_changes_no_gradient(remat):
    config = dataclasses.replace(CONFIG, remat=remat)
    close(gradient(PACKED, config=config), gradient(PACKED))
    close(gradient(PACKED, 1, 8, config, True), gradient(PACKED), 2e-5)


@pytest.mark.parametrize("sharded", [False, True])
def test_one_step_moves_b_and_leaves_the_base_bit_identical(sharded):
    mesh = mesh_of(8)
    base = gemma.init(CFG, jax.random.key(0), jnp.bfloat16)
    config = dataclasses.replace(CONFIG, dtype="bfloat16", learning_rate=3e-6)
    trained, fixed = lora.split(train_sft.new_adapter(CFG, config))
    before = jax.device_get((base, trained))
    fixed = train_sft.place(
        {"base": base} | fixed, mesh, train_sft.fixed_specs(CFG, config, sharded)
    )
    trained = train_sft.place(trained, mesh, train_sft.trained_specs(CFG, config, sharded))
    train_step, _ = train_sft.make_steps(CFG, config, mesh, sharded)
    opt = train_sft.optimizer(config).init(trained)
    batch = {k: v[None] for k, v in PACKED.items()}
    for _ in range(2):
        trained, opt, metrics = train_step(
            trained, opt, fixed, batch, np.float32(3e-6), jax.random.key(0)
        )
    assert float(metrics["grad_norm"]) > 0
    for x, y in zip(jax.tree.leaves(before[0]), jax.tree.leaves(fixed["base"]), strict=True):
        np.testing.assert_array_equal(x, y)
    for name in trained["b"]:
        assert np.abs(trained["b"][name]).max() > 0, name
        assert (np.asarray(trained["a"][name]) != before[1]["a"][name]).any(), (
            name
        )  # lr 3e-6 moves A
    assert {x.dtype for x in jax.tree.leaves((trained, opt[1].mu, opt[1].nu))} == {jnp.dtype("f4")}


def test_learning_rate_warms_up_and_ends_at_its_share():
    config = dataclasses.replace(CONFIG, learning_rate=1.0, warmup=0.1, final_lr=0.1)
    rates = [train_sft.schedule(p, config) for p in (0.0, 0.05, 0.1, 0.55, 1.0)]
    np.testing.assert_allclose(rates, [0.0, 0.5, 1.0, 0.55, 0.1], atol=1e-9)


def test_programs_are_the_jitted_functions_with_their_shapes():
    config = train_sft.Config(max_length=64, batch_rows=8, micro_rows=1)
    for name, (f, arguments) in train_sft.programs(config, mesh_of(8)).items():
        assert f.lower(*arguments) is not None, name
    config = dataclasses.replace(config, lora_rank=0, shard="yes")
    f, arguments = train_sft.programs(config, mesh_of(8))["train_step"]
    assert f.lower(*arguments).compile().memory_analysis().argument_size_in_bytes > 0


# --------------------------------------------------------------------------------- whole runs


def run(folder, *flags, kill_at=None, expect=0):
    """train_sft.py as a command; kill_at: kill -9 itself after so many calls of os.replace."""
    script = ROOT / "train_sft.py"
    small = ["--steps", "6", "--batch-rows", "8", "--micro-rows", "4", "--max-length", "224",
             "--save-every", "2", "--eval-every", "3", "--eval-rows", "8", "--keep", "9"]  # fmt: skip
    command = [sys.executable, str(script), *small, "--out", str(folder), *flags]
    if kill_at is not None:
        killer = (
            "import os, runpy, signal, sys\n"
            "real, left = os.replace, [int(sys.argv[1])]\n"
            "def replace(*a):\n"
            "    left[0] -= 1\n"
            "    if left[0] < 0: os.kill(os.getpid(), signal.SIGKILL)\n"
            "    return real(*a)\n"
            "os.replace = replace\n"
            "sys.argv = sys.argv[2:]\n"
            "sys.path.insert(0, os.path.dirname(sys.argv[0]))\n"
            "runpy.run_path(sys.argv[0], run_name='__main__')\n"
        )
        command = [sys.executable, "-c", killer, str(kill_at), *command[1:]]
    done = subprocess.run(command, capture_output=True, text=True, env=os.environ, timeout=300)
    assert done.returncode == expect, done.stderr[-3000:]
    return done.stderr
