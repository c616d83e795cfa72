"""Eight CPU devices, float32, no silent broadcasting; two families of tiny random models."""

import json
import os
import sys
from importlib import metadata
from itertools import groupby
from pathlib import Path

# Compiling is most of the suite's time, and these models are too small to gain from optimising.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if metadata.version("jaxlib").startswith("0.10."):  # a later one aborts on the unknown flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
# Tests, workers and subprocesses share what is compiled. Before the first compilation, or a process
# compiles everything anew.
os.environ.setdefault("JAX_COMPILATION_CACHE_DIR", str(Path.home() / ".cache/jax-programs"))
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import numpy as np  # noqa: E402
import pytest  # noqa: E402

import gemma  # noqa: E402
import lora  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = ROOT.parent / "shared"  # reference values that the repository does not ship


@pytest.fixture(scope="session")
def golden() -> Path:
    if not (SHARED / "golden").exists():
        pytest.skip("../shared/golden is absent")
    return SHARED / "golden"


@pytest.fixture(scope="session")
def hf():
    """transformers, on one thread and silent."""
    torch = pytest.importorskip("torch")
    torch.set_num_threads(1)
    transformers = pytest.importorskip("transformers")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    return transformers


KILLER = """
import os, runpy, signal, sys
left = int(sys.argv[1])
def deadly(real):
    def call(*a):
        global left
        left -= 1
        if left < 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(*a)
    return call
os.fsync, os.rename, os.replace = map(deadly, (os.fsync, os.rename, os.replace))
sys.argv = sys.argv[2:]
sys.path.insert(0, os.path.dirname(sys.argv[0]))
runpy.run_path(sys.argv[0], run_name="__main__")
"""


@pytest.fixture(scope="session")
def small(tmp_path_factory):
    """A folder with a random model, the shipped tokenizer, and 40 rows of data."""
    folder = tmp_path_factory.mktemp("small")
    import data
    import problems

    tok = data.Tokenizer(ROOT / "tiny")
    cfg = gemma.Config(
        "gemma3_text", tok.vocab_size, 32, 48, 3, 4, 2, 16, 16, 6, (False, True, False), 1e4, 1e6,
        max_position_embeddings=64, eos_token_id=tok.stop_ids,
    )
    gemma.save(folder, cfg, gemma.init(cfg, jax.random.key(0)))
    tok.save(folder)
    rows = [json.dumps(problems.word_problem("train", i)) for i in range(40)]
    (folder / "rows.jsonl").write_text("\n".join(rows))
    return folder


@pytest.fixture
def told(monkeypatch):
    """The steps that a script with --report-to tensorboard tells its logger, which is not there."""
    import runs

    steps = []
    logger = (lambda step, numbers: steps.append(step)), (lambda: steps.append("closed"))
    monkeypatch.setitem(sys.modules, "tensorboard", sys.modules["json"])  # it is found
    monkeypatch.setitem(runs.LOGGERS, "tensorboard", lambda folder, config: logger)
    return steps


ONE_DEVICE = {**os.environ, "XLA_FLAGS": " ".join(FLAGS[1:])}  # the environment of a subprocess
CFG = gemma.Config(
    "gemma3_text", 97, 32, 48, 3, 4, 2, 16, 16, 6, (False, True, False), 1e4, 1e6,
    max_position_embeddings=64,
)


def spelled(tok, ids: list[int]) -> str:
    """decode() that spells out BOS, EOS, padding and turn markers too."""
    stretches = [(hidden, list(i)) for hidden, i in groupby(ids, tok.hidden.__contains__)]
    return "".join("".join(map(tok.sp.id_to_piece, i)) if hidden else tok.sp.decode(i)
                   for hidden, i in stretches)


def one_line(call, *arguments) -> str:
    """The message of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


def mesh_of(n: int) -> jax.sharding.Mesh:
    """The first n of the eight devices."""
    return jax.make_mesh((n,), ("data",), axis_types=(jax.sharding.AxisType.Auto,),
                         devices=jax.devices()[:n])


def live_adapter(cfg, seed=0, rank=4):
    """A random adapter whose B is not 0, so that every gradient is alive."""
    adapter = lora.init(cfg, jax.random.key(seed), rank, 8.0)
    noise = lambda b: 0.1 * jax.random.normal(jax.random.key(seed + 1), b.shape)
    return adapter | {"b": jax.tree.map(noise, adapter["b"])}


def weights_of(config) -> tuple[dict, dict]:
    """(trained, fixed) of a live adapter on CFG, or of all weights where --lora-rank is 0."""
    params = gemma.init(CFG, jax.random.key(0))
    if not config.lora_rank:
        return params, {}
    trained, fixed = lora.split(live_adapter(CFG))
    return trained, {"base": params} | fixed


def close(got, expected, rtol=1e-5) -> None:
    """Two (gradient, metrics): arrays differ by rtol of their largest entry, which is not 0."""
    found = dict(jax.tree_util.tree_leaves_with_path(got[0]))
    for path, x in jax.tree_util.tree_leaves_with_path(expected[0]):
        assert np.abs(x).max() > 0, jax.tree_util.keystr(path)
        np.testing.assert_allclose(found[path], x, atol=rtol * np.abs(x).max(), rtol=0)
    for name, x in expected[1].items():
        np.testing.assert_allclose(got[1][name], x, rtol=2e-5, atol=1e-6, err_msg=name)


def check_sharded_step(cfg, config, make_steps, specs_of, trained, fixed, *args) -> None:
    """One train_step over eight devices, base replicated and sharded: the same.

    Adam's first moments are a tenth of the gradient, so they are compared with their largest entry,
    to 1e-5; weights to 3e-5, as Adam divides a tiny gradient and its rounding by its own size.
    """
    import stage

    trained, fixed = jax.device_get((trained, fixed))  # so that nothing of it can be donated
    mesh = jax.make_mesh((8,), ("data",), axis_types=(jax.sharding.AxisType.Auto,))
    after = []
    for sharded in (False, True):
        specs, fixed_specs = specs_of(cfg, config, sharded)
        here = stage.put(trained, mesh, specs)
        opt = stage.optimizer(config).init(here)
        base = stage.put(fixed, mesh, fixed_specs)
        here, opt, metrics, *_ = make_steps(cfg, config, mesh, sharded)[0](here, opt, base, *args)
        metrics = {k: metrics[k] for k in ("loss", "grad_norm")}
        after.append(jax.device_get((here, opt[1].mu, metrics)))
    for path, x in jax.tree_util.tree_leaves_with_path(after[0]):
        y, name = dict(jax.tree_util.tree_leaves_with_path(after[1]))[path], path[0].idx
        scale = np.abs(x).max() if name == 1 else max(1.0, np.abs(x).max())
        assert scale > 0, path
        tolerance = 1e-5 * scale if name == 1 else 3e-5
        np.testing.assert_allclose(y, x, rtol=0, atol=tolerance, err_msg=str(path))
    moved = jax.tree.map(lambda x, y: bool((x != y).any()), after[0][0], trained)
    assert all(jax.tree.leaves(moved)), moved


def lines(file: Path) -> list:
    """The values of a JSONL file in which every line is whole."""
    return [json.loads(line) for line in file.read_text().splitlines()]


def contents(run) -> dict:
    """Everything a run leaves but timings, and the record of where it ran.

    report.html is a function of the files compared here and of timings (tests/test_report.py).
    """
    timing = lambda k: k.endswith("_s") or "per_s" in k
    found = {}
    apart = (".lock", "report.html")
    for file in sorted(p for p in run.rglob("*") if p.is_file() and p.name not in apart):
        name = str(file.relative_to(run))
        if file.name == "metrics.jsonl":
            found[name] = [{k: v for k, v in m.items() if not timing(k)} for m in lines(file)]
        elif file.name == "config.json":
            found[name] = {k: v for k, v in json.loads(file.read_text()).items() if k != "out"}
        else:
            found[name] = file.read_bytes()
    return found
