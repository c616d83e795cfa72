"""hub.py: where model folders, adapters and data are looked for, in which order, and what is said.

Nothing here has a network: a download either fails at once or is a stub.
"""

import hashlib
import json
import os
import shutil
import sys
import time
import types

import pytest
from conftest import one_line

import chat
import download
import gemma
import hub
import model_files
import settings

HUB = {  # name here -> name on the Hub and on Kaggle
    "gemma2-2b": "gemma-2-2b-it",
    "gemma2-2b-it": "gemma-2-2b-it",
    "gemma2-9b-pt": "gemma-2-9b",
    "gemma3-1b": "gemma-3-1b-it",
    "gemma3-1b-pt": "gemma-3-1b-pt",
    "gemma3-4b": "gemma-3-4b-it",
    "gemma3-270m": "gemma-3-270m-it",
    "gemma3-270m-pt": "gemma-3-270m",
}


@pytest.fixture
def bare(tmp_path, monkeypatch):
    """A machine with an empty home, no inputs in /kaggle (here `kaggle`) and no network."""
    for name in ("GEMMA_WEIGHTS", "HF_HOME", "HF_HUB_CACHE", "KAGGLEHUB_CACHE"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setattr(download, "model", lambda *_: (None, "no network"))
    monkeypatch.setattr(hub, "KAGGLE", tmp_path / "kaggle")
    return tmp_path


def place(folder, model, weights="model.safetensors"):
    """What `find` looks at: a config and the presence of weights."""
    folder.mkdir(parents=True)
    cfg = gemma.CONFIGS[model.removesuffix("-it").removesuffix("-pt")]
    (folder / "config.json").write_text(json.dumps(model_files.config_to_dict(cfg)))
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
        (root / "kaggle/input" / name[:7] / "transformers" / name / "1", {}),
        (root / "kaggle/input/somebody" / name, {}),
        (root / "kaggle/input" / name, {}),
        (root / "mine" / name, {"GEMMA_WEIGHTS": root / "mine"}),
        (root / "this one", {"GEMMA_WEIGHTS": root / "this one"}),
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
    versions = [place(bare / f"kaggle/input/gemma-3-1b-it/{n}", "gemma3-1b") for n in (10, 9, 2)]
    for newest in versions:
        os.utime(newest, (2e9, 2e9))
        assert hub.find_model("gemma3-1b") == newest
        os.utime(newest, (1e9, 1e9))


def test_wrong_shapes_and_half_filled_folders_are_passed_by(bare, monkeypatch):
    monkeypatch.setenv("GEMMA_WEIGHTS", str(bare / "mine"))
    place(bare / "mine", "gemma3-4b")
    place(bare / "mine/gemma-3-1b-it", "gemma3-1b", weights=None)
    place(bare / "kaggle/input/gemma-3-1b-it", "gemma3-1b", weights="pytorch_model.bin")
    place(bare / "kaggle/input/gemma-3-1b-it/1", "gemma2-2b")
    (bare / "kaggle/input/gemma-3-1b-it/dangling").symlink_to(bare / "gone")
    with pytest.raises(ValueError, match="no folder of gemma-3-1b-it in "):
        hub.find_model("gemma3-1b")
    hub_cache = bare / "home/.cache/huggingface/hub/models--google--gemma-3-1b-it/snapshots/a"
    place(hub_cache, "gemma3-1b", weights="model-00001-of-00002.safetensors")
    assert hub.find_model("gemma3-1b") == hub_cache


@pytest.mark.parametrize("model", ["gemma3-1b", "gemma2-2b-pt"])
def test_not_found_names_the_places_and_the_command(bare, monkeypatch, model):
    name = {"gemma3-1b": "gemma-3-1b-it", "gemma2-2b-pt": "gemma-2-2b"}[model]
    monkeypatch.setenv("HF_HOME", str(bare / "hf"))
    with pytest.raises(ValueError) as error:
        hub.find_model(model)
    message = str(error.value)
    for words in (
        f"--model {model}: no folder of {name} in $GEMMA_WEIGHTS, {bare / 'kaggle/input'}, "
        f"{bare / 'hf/hub'}, {bare / 'home/.cache/kagglehub'}\n",
        "no network\n",
        f"`hf download google/{name}`, or --weights DIR\n",
        f"Add Input > Models > {name[:7]} > Transformers > {name}",
    ):
        assert words in message, message
    monkeypatch.setenv("GEMMA_WEIGHTS", str(bare / "mine"))
    with pytest.raises(ValueError, match=f" in {bare / 'mine'}, "):
        hub.find_model(model)


FORMATS = [  # as Kaggle mounts them -> what the message says of each
    ("gemma-3/flax/gemma3-1b-it/1", "gemma3-1b-it/_METADATA", "Flax"),
    ("models/google/gemma-3/flax/gemma3-1b-it/1", "gemma3-1b-it/manifest.ocdbt", "Flax"),
    ("gemma-3/flax/gemma-3-1b-it/1", "gemma-3-1b-it/checkpoint", "Flax"),
    ("gemma-3/pytorch/gemma-3-1b-it/1", "model.ckpt", "PyTorch"),
    ("somebody/gemma-3-1b-it", "pytorch_model.bin", "PyTorch"),
    ("gemma-3/keras/gemma-3-1b-it/1", "model.weights.h5", "Keras"),
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
    assert f"--weights {folder}: expected the Transformers version" in message
    assert f"found {name} weights ({folder / file})" in message
    best = place(bare / "kaggle/input/gemma-3/transformers/gemma-3-1b-it/1", "gemma3-1b")
    assert hub.find_model("gemma3-1b") == best


def test_unknown_names_and_wrong_flags(bare):
    for model in ("gemma-3-1b", "gemma3-7b", "gemma3-1b-xx", ""):
        message = one_line(hub.find_model, model)
        assert f"--model {model}: unknown" in message
        assert all(known in message for known in gemma.CONFIGS)
    assert "found no config.json" in one_line(hub.find_model, "gemma3-1b", bare)


def test_downloads_are_tried_last_and_fail_fast_without_a_network(bare, monkeypatch):
    monkeypatch.undo()  # the real download; conftest keeps huggingface_hub offline
    start = time.perf_counter()
    folder, why = download.model("no-such-gemma", "google/no/transformers/such")
    assert folder is None and why.startswith("huggingface_hub: ")
    assert "\n" not in why and time.perf_counter() - start < 30

    asked = []
    stub = types.ModuleType("kagglehub")
    stub.model_download = lambda handle: asked.append(handle) or str(bare)
    monkeypatch.setitem(sys.modules, "kagglehub", stub)
    monkeypatch.delenv("KAGGLE_KERNEL_RUN_TYPE", raising=False)
    assert download.model("no-such-gemma", "handle")[0] is None and not asked
    monkeypatch.setenv("KAGGLE_KERNEL_RUN_TYPE", "Interactive")
    assert download.model("no-such-gemma", "handle") == (bare, "") and asked == ["handle"]

    hf_hub = types.ModuleType("huggingface_hub")
    hf_hub.snapshot_download = lambda name, allow_patterns: asked.append(name) or str(bare)
    monkeypatch.setitem(sys.modules, "huggingface_hub", hf_hub)
    stub.model_download = None
    assert download.model("gemma-3-1b-it", "handle") == (bare, "")
    assert asked == ["handle", "google/gemma-3-1b-it"]
    monkeypatch.setitem(sys.modules, "kagglehub", None)  # not installed
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    folder, why = download.model("gemma-3-1b-it", "handle")
    assert folder is None and "kagglehub: " in why and "huggingface_hub: " in why


def test_a_folder_that_contradicts_its_manifest_is_refused(tmp_path):
    """As adapter, as weights, as the base of an adapter; notes and hidden files may change."""
    sums = {}
    base = place(tmp_path / "sft" / "final", "tiny")
    adapter = tmp_path / "simpo" / "final"
    adapter.mkdir(parents=True)
    named = {"base_model_name_or_path": str(base)}
    (adapter / "adapter_config.json").write_text(json.dumps(named))
    (base / "prompt.json").write_text("{}")
    for folder in (base, adapter):
        sums = {f.name: hashlib.sha256(f.read_bytes()).hexdigest() for f in folder.iterdir()}
        (folder / "manifest.json").write_text(json.dumps({"name": "final", "sha256": sums}))
        (folder / "README.md").write_text("mine")
        (folder / ".DS_Store").touch()
    renamed = shutil.copytree(adapter, tmp_path / "mine")
    assert hub.find_start("tiny", None, str(renamed)) == (base, renamed)
    assert hub.find_model("tiny", base) == base
    (renamed / "adapter_config.json").write_text(json.dumps(named) + " ")
    message = one_line(hub.find_start, "tiny", None, str(renamed))
    assert message == f"--adapter {renamed}: adapter_config.json has changed since it was saved"
    (base / "tokenizer.json").write_text("{}")
    for weights in (None, str(base)):
        message = one_line(hub.find_start, "tiny", weights, str(adapter) if not weights else None)
        assert message == f"--weights {base}: tokenizer.json is not in its manifest"
    (base / "manifest.json").write_text('{"name": "final", "sha256": {}}')
    message = one_line(hub.find_model, "tiny", base)
    assert message == f"--weights {base}: {base / 'manifest.json'} lists no files"


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


def test_an_adapter_names_the_model_it_was_trained_on(tmp_path):
    """By its base's shape, by the base's name where that is gone, else tiny: --model can wait."""
    base, whole = place(tmp_path / "mine", "gemma3-270m"), place(tmp_path / "whole", "gemma2-2b")
    for name, path, expected in (
            ("here", str(base), ("gemma3-270m", str(base))),
            ("gone", "/elsewhere/gemma-3-1b-it", ("gemma3-1b", None)),
            ("pretrained", "google/gemma-3-270m", ("gemma3-270m-pt", None)),
            ("other", "meta/llama", ("tiny", None)), ("empty", "", ("tiny", None))):
        (tmp_path / name).mkdir()
        config = json.dumps({"base_model_name_or_path": path})
        (tmp_path / name / "adapter_config.json").write_text(config)
        assert hub.trained_on("tiny", None, str(tmp_path / name)) == expected, name
    assert hub.trained_on("tiny", None, str(whole)) == ("gemma2-2b", None)
    run = tmp_path / "run"
    shutil.copytree(tmp_path / "here", run / "final")
    (run / "config.json").write_text(json.dumps({"model": "gemma3-270m-pt"}))
    assert hub.trained_on("tiny", None, str(run)) == ("gemma3-270m-pt", str(base))
    named = json.dumps({"base_model_name_or_path": "x" * 300})  # too long for a file's name
    (run / "final" / "adapter_config.json").write_text(named)
    assert hub.trained_on("tiny", None, str(run)) == ("gemma3-270m-pt", None)
    config = settings.resolve(chat.Config(adapter=str(tmp_path / "here")), chat.DEFAULTS)
    assert (config.model, config.weights, config.dtype) == ("gemma3-270m", str(base), "bfloat16")


def test_the_hub_ids_of_models_are_names_too():
    """google/gemma-2-2b is a base model, and so is the 270m without a suffix."""
    for given, short in (("google/gemma-3-1b-it", "gemma3-1b"),
                         ("google/gemma-2-2b", "gemma2-2b-pt"),
                         ("google/gemma-3-1b-pt", "gemma3-1b-pt"), ("tiny", "tiny"),
                         ("google/gemma-3-270m", "gemma3-270m-pt"), ("gemma2-9b", "gemma2-9b"),
                         ("google/gemma-2-27b-it", "gemma2-27b"), ("gemma3-4b-it", "gemma3-4b-it")):
        assert hub.short_name(given) == short
        if "/" in given:
            assert "google/" + hub.hub_name(given) == "google/" + hub.hub_name(short) == given
        assert hub.base_name(given) == hub.base_name(short)
