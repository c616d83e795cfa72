"""Eight CPU devices, float32, no silent broadcasting; two families of tiny random models."""

import os
import sys
from importlib import metadata
from pathlib import Path

# Compiling is most of the suite's time, and these models are too small to gain from optimising.
FLAGS = ["--xla_force_host_platform_device_count=8", "--xla_backend_optimization_level=0"]
if metadata.version("jaxlib").startswith("0.10."):  # a later one aborts on the unknown flag
    FLAGS.append("--xla_cpu_use_fusion_emitters=false")
os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *FLAGS])
os.environ["JAX_PLATFORMS"] = "cpu"
os.environ["HF_HUB_OFFLINE"] = "1"  # nothing in the tests reaches for a hub
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]

import jax  # noqa: E402
import pytest  # noqa: E402

jax.config.update("jax_numpy_rank_promotion", "raise")

SHARED = ROOT.parent / "shared"  # reference values that the repository does not ship


@pytest.fixture(scope="session")
def golden() -> Path:
    if not (SHARED / "golden").exists():
        pytest.skip("../shared/golden is absent")
    return SHARED / "golden"
