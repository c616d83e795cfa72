"""hub.py: where model folders, adapters and data are looked for, in which order, and what is said.

Nothing here has a network: a download either fails at once or is a stub.
"""

import json
import os
import sys
import time
import types

import pytest

import gemma
import hub


def one_line(call, *arguments) -> str:
    """The message of the ValueError that a call must raise."""
    with pytest.raises(ValueError) as error:
        call(*arguments)
    assert "\n" not in str(error.value)
    return str(error.value)


HUB = {  # name here -> name on the Hub and on Kaggle
    "gemma2-2b-it": "gemma-2-2b-it", "gemma2-9b-pt": "gemma-2-9b", "gemma3-1b": "gemma-3-1b-it",
    "gemma3-1b-pt": "gemma-3-1b-pt", "gemma3-270m-pt": "gemma-3-270m",
}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with an empty home, no inputs in /kaggle (here `kaggle`) and no network."""
    for name in ("GEMMA_WEIGHTS", "HF_HOME", "HF_HUB_CACHE", "KAGGLEHUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(hub, "_download", lambda *_: (None, "no network"))
    monkeypatch.setattr(hub, "KAGGLE", tmp_path / "kaggle")
    return tmp_path


def place(folder, model, weights="model.safetensors"):
    """What `find` looks at: a config and the presence of weights."""
    folder.mkdir(parents=True)
    cfg = gemma.CONFIGS[model.removesuffix("-it").removesuffix("-pt")]
    (folder / "config.json").write_text(json.dumps(gemma.config_to_dict(cfg)))
    if weights:
        (folder / weights).write_bytes(b"")
    return folder


def places(root, model):
    """Every place searched, last first, with what makes it be searched."""
    name = HUB[model]
    handle = f"google/{name[:7]}/transformers/{name}"
    hub = f"models--google--{name}/snapshots/0123abcd"
    return [
        (root / "home/.cache/kagglehub/models" / handle / "2", {}),
        (root / "kagglehub/models" / handle / "1", {"KAGGLEHUB_CACHE": root / "kagglehub"}),
        (root / "home/.cache/huggingface/hub" / hub, {}),
        (root / "hf/hub" / hub, {"HF_HOME": root / "hf"}),
        (root / "hub" / hub, {"HF_HUB_CACHE": root / "hub"}),
        (root / "kaggle/input/models" / handle / "1", {}),
        (root / "kaggle/input" / name, {}),
        (root / "mine" / name, {"GEMMA_WEIGHTS": root / "mine"}),
    ]


@pytest.mark.parametrize("model", HUB)
def test_each_place_is_searched_and_goes_before_the_later_ones(bare, monkeypatch, model):
    for folder, environment in places(bare, model):
        for name, value in environment.items():
            monkeypatch.setenv(name, str(value))
        place(folder, model)
        assert hub.find_model(model) == folder
    named = bare / "kaggle/input" / HUB[model]
    assert hub.find_model(model, named) == named


def test_the_newest_version_is_taken(bare):
    for n, time_s in ((10, 1e9), (9, 2e9), (2, 1.5e9)):
        os.utime(place(bare / f"kaggle/input/gemma-3-1b-it/{n}", "gemma3-1b"), (time_s, time_s))
    assert hub.find_model("gemma3-1b").name == "9"


def test_wrong_shapes_and_half_filled_folders_are_passed_by(bare, monkeypatch):
    monkeypatch.setenv("GEMMA_WEIGHTS", str(bare / "mine"))
    place(bare / "mine", "gemma3-4b")
    place(bare / "mine/gemma-3-1b-it", "gemma3-1b", weights=None)
    place(bare / "kaggle/input/gemma-3-1b-it", "gemma3-1b", weights="pytorch_model.bin")
    place(bare / "kaggle/input/gemma-3-1b-it/1", "gemma2-2b")
    (bare / "kaggle/input/gemma-3-1b-it/dangling").symlink_to(bare / "gone")
    with pytest.raises(ValueError, match="no folder of gemma-3-1b-it found"):
        hub.find_model("gemma3-1b")
    hub_cache = bare / "home/.cache/huggingface/hub/models--google--gemma-3-1b-it/snapshots/a"
    place(hub_cache, "gemma3-1b", weights="model-00001-of-00002.safetensors")
    assert hub.find_model("gemma3-1b") == hub_cache


def test_not_found_lists_every_place_and_the_commands(bare, monkeypatch):
    handle = "google/gemma-3/transformers/gemma-3-1b-it"
    monkeypatch.setenv("HF_HOME", str(bare / "hf"))
    with pytest.raises(ValueError) as error:
        hub.find_model("gemma3-1b")
    for words in (
        "--model gemma3-1b: no folder of gemma-3-1b-it found", "$GEMMA_WEIGHTS (not set)",
        "/kaggle/input/*/*/*/*/gemma-3-1b-it/*", "no network", "--weights DIR",
        str(bare / "hf/hub/models--google--gemma-3-1b-it/snapshots"),
        str(bare / f"home/.cache/kagglehub/models/{handle}"),
        "hf download google/gemma-3-1b-it\n", f"kagglehub.model_download('{handle}')",
    ):
        assert words in str(error.value), str(error.value)


FORMATS = [  # as Kaggle mounts them -> what the message says of each
    ("models/google/gemma-3/flax/gemma3-1b-it/1", "gemma3-1b-it/manifest.ocdbt", "Flax"),
    ("somebody/gemma-3-1b-it", "pytorch_model.bin", "PyTorch"),
    ("gemma-3/keras/gemma-3-1b-it/1", "model.weights.h5", "Keras"),
    ("somebody/gemma-3-1b-it", "gemma-3-1b-it-q4_0.gguf", "GGUF"),
]


@pytest.mark.parametrize("folder, file, name", FORMATS)
def test_other_formats_are_recognised_and_named(bare, folder, file, name):
    folder = bare / "kaggle/input" / folder
    (folder / file).parent.mkdir(parents=True)
    for other in (file, "config.json", "tokenizer.model"):  # of Kaggle's own, not Hugging Face's
        (folder / other).write_text("{}")
    with pytest.raises(ValueError) as error:
        hub.find_model("gemma3-1b")
    found = f"Found {name} weights ({folder / file}), but only Transformers weights"
    assert found in str(error.value)
    assert "Add Input > Models > gemma-3 > Transformers > gemma-3-1b-it" in str(error.value)
    message = one_line(hub.find_model, "gemma3-1b", folder)
    assert f"--weights {folder}: holds {name} weights ({folder / file}), which cannot" in message
    assert "take the Transformers version" in message
    best = place(bare / "kaggle/input/gemma-3/transformers/gemma-3-1b-it/1", "gemma3-1b")
    assert hub.find_model("gemma3-1b") == best


def test_unknown_names_and_wrong_flags(bare):
    for model in ("gemma-3-1b", "gemma3-7b", "gemma3-1b-xx", ""):
        message = one_line(hub.find_model, model)
        assert f"--model {model}: unknown" in message
        assert all(known in message for known in gemma.CONFIGS)
    assert f"--weights {bare}: no config.json" in one_line(hub.find_model, "gemma3-1b", bare)


def test_downloads_are_tried_last_and_fail_fast_without_a_network(bare, monkeypatch):
    monkeypatch.undo()  # the real _download; conftest keeps huggingface_hub offline
    start = time.perf_counter()
    folder, why = hub._download("no-such-gemma", "google/no/transformers/such")
    assert folder is None and why.startswith("huggingface_hub: ")
    assert "\n" not in why and time.perf_counter() - start < 5

    asked = []
    stub = types.ModuleType("kagglehub")
    stub.model_download = lambda handle: asked.append(handle) or str(bare)
    monkeypatch.setitem(sys.modules, "kagglehub", stub)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert hub._download("no-such-gemma", "handle")[0] is None and not asked
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert hub._download("no-such-gemma", "handle") == (bare, "") and asked == ["handle"]

    monkeypatch.setitem(sys.modules, "kagglehub", None)  # not installed
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    folder, why = hub._download("gemma-3-1b-it", "handle")
    assert folder is None and "kagglehub: " in why and "huggingface_hub: " in why


def test_an_adapter_finds_the_fully_fine_tuned_model_it_was_trained_on(tmp_path):
    """Its base is that model, not the one --model or --weights names; gone, it is asked for."""
    tuned = place(tmp_path / "sft" / "final", "tiny")
    (tuned / "prompt.json").write_text('{"system": ""}')
    original = place(tmp_path / "original", "tiny")
    for name, base in (("simpo", tuned), ("other", original), ("hub", "google/gemma")):
        (tmp_path / name / "final").mkdir(parents=True)
        config = json.dumps({"base_model_name_or_path": str(base)})
        (tmp_path / name / "final" / "adapter_config.json").write_text(config)
    for weights in (None, str(original)):
        start = hub.find_start("tiny", weights, str(tmp_path / "simpo"))
        assert start == (tuned, tmp_path / "simpo" / "final")
    assert hub.find_start("tiny", str(original), str(tmp_path / "other")).weights == original
    assert hub.find_start("tiny", None, str(tmp_path / "hub")).weights.name == "tiny"
    tuned.rename(tmp_path / "moved")
    with pytest.raises(ValueError, match=r"sft/final.*--weights names it"):
        hub.find_start("tiny", None, str(tmp_path / "simpo"))
    moved = hub.find_start("tiny", str(tmp_path / "moved"), str(tmp_path / "simpo"))
    assert moved.weights == tmp_path / "moved"
