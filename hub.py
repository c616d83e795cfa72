"""Where things are found: model folders, adapters and data, by flag, environment, Kaggle or cache.

    hub.find_model("gemma3-1b")                    # a Hugging Face folder, downloaded if need be
    hub.find_start("gemma3-1b", None, "runs/sft")  # the weights and the adapter a stage begins with
    hub.find_file("mine.jsonl")                    # a path, or a name among Kaggle's inputs

What the user named comes first, then Kaggle's outputs and inputs, then the caches of the download
tools, then a download (download.py).
"""

import glob
import os
from pathlib import Path
from typing import NamedTuple

import disk
import gemma
import terminal

KAGGLE = Path("/kaggle")  # inputs lie in input/; only what is in working/ survives the session

# ----------------------------------------------------------------------------------------- kaggle


def output(folder: str) -> Path:
    """Where a folder of results goes: on Kaggle into /kaggle/working."""
    working = KAGGLE / "working"
    return working / folder if working.is_dir() else Path(folder)


def input_patterns(*names: str) -> list[str]:
    """Glob patterns among Kaggle's inputs. Not `**`: some inputs hold a million files."""
    return [f"{KAGGLE}/input/{'*/' * depth}{name}" for name in names for depth in range(6)]


def find_input(name: str, flag: str) -> Path | None:
    """The one Kaggle input of this name, or None; several are an error that lists them."""
    if Path(name).is_absolute() or ".." in Path(name).parts:
        return None
    found = sorted({f for pattern in input_patterns(name) for f in glob.glob(pattern)})
    if len(found) > 1:
        raise ValueError(f"{flag} {name}: several inputs have it, give more of the path of one: "
                         + ", ".join(found))
    return Path(found[0]) if found else None


# ----------------------------------------------------------------------------------------- models

NAMES = {}  # --model -> its name on the Hub: the chat model, or with -pt the base model
for _model in gemma.CONFIGS:
    if _model != "tiny":
        _name, _bare = _model.replace("gemma", "gemma-"), "gemma2" in _model or "270m" in _model
        NAMES |= {_model: f"{_name}-it", f"{_model}-it": f"{_name}-it",
                  f"{_model}-pt": _name if _bare else f"{_name}-pt"}
SHAPE = ("model_type", "hidden_size", "num_hidden_layers")  # what tells one Gemma from another


def short_name(model: str) -> str:
    """The --model of a Hub id: google/gemma-3-1b-it -> gemma3-1b; other names stay as they are."""
    return next((short for short, name in NAMES.items() if model == f"google/{name}"), model)


def base_name(model: str) -> str:
    """The key of gemma.CONFIGS: gemma3-1b-it -> gemma3-1b."""
    return short_name(model).removesuffix("-it").removesuffix("-pt")


def hub_name(model: str) -> str:
    """The model's name on the Hub: gemma3-1b -> gemma-3-1b-it; -pt names the base model."""
    return NAMES.get(short_name(model), model)


def find_model(model: str, weights: str | Path | None = None,
               flags: tuple[str, str] = ("--model", "--weights")) -> Path:
    """The folder of a model: --weights, $GEMMA_WEIGHTS, Kaggle's inputs, the download caches.

    model: a folder, or a name of gemma.CONFIGS, with -it (the default) or -pt. flags: for errors.
    """
    base = base_name(model)
    if not weights and model and base not in gemma.CONFIGS and Path(model).is_dir():
        weights, flags = model, (flags[0], flags[0])
    if weights is not None:
        return _check_model(Path(weights), flags[1])
    if base not in gemma.CONFIGS:
        raise ValueError(f"{flags[0]} {model}: unknown, expected one of {', '.join(gemma.CONFIGS)}")
    if base == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    name = hub_name(model)
    handle = f"google/{name[: len('gemma-3')]}/transformers/{name}"
    cache = Path.home() / ".cache"
    hf_home = Path(os.environ.get("HF_HOME", cache / "huggingface"))
    hf_cache = os.environ.get("HF_HUB_CACHE", hf_home / "hub")
    kagglehub = os.environ.get("KAGGLEHUB_CACHE", cache / "kagglehub")
    root = os.environ.get("GEMMA_WEIGHTS", "$GEMMA_WEIGHTS")
    for pattern in (root, f"{root}/{name}", *input_patterns(name, f"{name}/*"),
                    f"{hf_cache}/models--google--{name}/snapshots/*",
                    f"{kagglehub}/models/{handle}/*"):
        folders = [Path(file).parent for file in glob.glob(f"{pattern}/config.json")]
        for folder in sorted(folders, key=os.path.getmtime, reverse=True):
            complete = any(folder.glob("*.safetensors"))  # not a half-filled cache
            if complete and _has_shape(gemma.read_config(folder), base):
                return folder
    import download  # here: a model that is there needs none

    folder, why = download.model(name, handle)
    if folder:
        return folder
    flax = name.replace("-", "", 1)  # gemma3-1b-it
    inputs = input_patterns(flax, f"{flax}/*", name, f"{name}/*")
    held = {download.other_format(Path(f)) for pattern in inputs for f in glob.glob(pattern)}
    searched = ", ".join(map(str, (root, KAGGLE / "input", hf_cache, kagglehub)))
    raise ValueError("\n".join([
        f"{flags[0]} {model}: no folder of {name} in {searched}",
        *(f"Found {it}, but only Transformers weights can be read" for it in sorted(held - {None})),
        f"Downloading failed: {why}",
        f"Accept the license on its page, then `hf download google/{name}`, or {flags[1]} DIR",
        f"On Kaggle: Add Input > Models > {handle.split('/')[1]} > Transformers > {name}",
    ]))


def _has_shape(cfg: gemma.Config, name: str) -> bool:
    return all(getattr(cfg, k) == getattr(gemma.CONFIGS[name], k) for k in SHAPE)


def _check_model(folder: Path, flag: str) -> Path:
    """The folder; ValueError unless it is a Transformers model, unchanged since a run wrote it."""
    is_there = (folder / "config.json").exists()
    if not is_there or not any(folder.glob("*.safetensors*")):
        import download

        if (other := download.other_format(folder)) or not is_there:
            raise ValueError(f"{flag} {folder}: expected the Transformers version, a folder with "
                             f"config.json and safetensors, found {other or 'no config.json'}")
    _check_manifest(folder, flag)
    return folder


def _check_manifest(folder: Path, flag: str) -> None:
    if (folder / "manifest.json").exists() and (wrong := disk.find_change(folder)):
        raise ValueError(f"{flag} {folder}: {wrong}")


# --------------------------------------------------------------------------------------- adapters


class Start(NamedTuple):
    """Where a stage begins: a folder of weights, and a PEFT adapter on top or None."""

    weights: Path
    adapter: Path | None


def find_adapter(adapter: str) -> Path:
    """The folder that --adapter names, or its final/ where it is a run."""
    folder = next(filter(Path.is_dir, (Path(adapter), KAGGLE / "working" / adapter)), None)
    folder = folder or find_input(adapter, "--adapter") or Path(adapter)
    return folder / "final" if (folder / "final").is_dir() else folder


def find_start(model: str, weights: str | None, adapter: str | None,
               flags: tuple[str, str, str] = ("--model", "--weights", "--adapter")) -> Start:
    """--adapter is a PEFT adapter, the final/ of a run, or a whole model, which is a new base."""
    if adapter is None:
        return Start(find_model(model, weights, flags[:2]), None)
    folder = find_adapter(adapter)
    _check_manifest(folder, flags[2])
    if (base := _named_base(folder)) is None:
        if (folder / "config.json").exists():
            return Start(folder, None)
        raise ValueError(f"{flags[2]} {adapter}: expected adapter_config.json (an adapter), "
                         "config.json (a whole model), or a run folder with final/")
    # A fully fine-tuned base is named by its folder in a run, and has prompt.json beside it.
    of_a_run, is_there = base.name == "final" or base.name[:5] == "step_", os.path.exists(base)
    if of_a_run and is_there and (base / "prompt.json").exists():
        _check_manifest(base, flags[1])
        return Start(base, folder)
    if of_a_run and not is_there and not weights:
        raise ValueError(f"{flags[2]} {adapter} belongs on the fully fine-tuned {base}, which "
                         f"is not there; {flags[1]} names it where it is now")
    found = find_model(model, weights, flags[:2])
    named = base.name in ("", hub_name(model)) or base.name in str(found.resolve())
    if not named and not _is_base_of_run(found, folder):
        terminal.say(f"{flags[2]} {folder} was trained on {base}, and is put on {found}: is that "
                     "the same model?")
    return Start(found, folder)


def _is_base_of_run(weights: Path, adapter: Path) -> bool:
    """Whether the run that ended in this final/ began from the same weight files, by checksum."""
    run = adapter.parent / "config.json"
    if adapter.name != "final" or not run.exists():
        return False
    sums = {f"checksum of {file.name}": disk.file_checksum(file)
            for file in weights.glob("*.safetensors")}
    return bool(sums) and sums.items() <= disk.read_json(run).items()


def trained_on(model: str, weights: str | None, adapter: str | None) -> tuple[str, str | None]:
    """--model and --weights; where both are left out, those that the adapter was trained on.

    The model is, in this order:
    1. the --model of the run that made the adapter;
    2. if the base that the adapter's config names still exists, the model with its shape (a fully
       fine-tuned model is its own base);
    3. if that base is gone, the model with its name;
    4. tiny.
    """
    if not adapter or weights or model != "tiny":
        return model, weights
    folder = find_adapter(adapter)
    base, run = _named_base(folder), folder.parent / "config.json"
    config = (base or folder) / "config.json"
    is_there = os.path.exists(config)  # Path.exists raises where a name is too long
    if folder.name == "final" and run.exists():
        name = disk.json_value(disk.read_json(run), "model", str, "tiny", run)
        if base_name(name) in gemma.CONFIGS and base_name(name) != "tiny":
            return name, str(base) if base and is_there else None
    if not is_there:
        name = short_name(f"google/{base.name}") if base else "tiny"
        return name if base_name(name) in gemma.CONFIGS else "tiny", None
    cfg = gemma.read_config(config.parent)
    for name in gemma.CONFIGS:
        if name != "tiny" and _has_shape(cfg, name):
            return name, str(base) if base else None
    return "tiny", None


def _named_base(folder: Path) -> Path | None:
    """The model that a PEFT adapter says it was trained on; None if the folder is no adapter."""
    file = folder / "adapter_config.json"
    if not file.exists():
        return None
    return Path(disk.json_value(disk.read_json(file), "base_model_name_or_path", str, "", file))


# ------------------------------------------------------------------------------------------- data


def find_file(source: str, flag: str = "--data") -> Path:
    """A file by its path, or by its name (or the end of its path) among Kaggle's inputs."""
    if (path := Path(source)).is_file():
        return path
    if (found := find_input(source, flag)) and found.is_file():
        return found
    raise ValueError(f"{flag} {source}: no such file; expected problems, solutions, gsm8k, "
                     "hf:owner/name, or a file (JSON, JSON lines, CSV, Parquet)")


def find_gsm8k(split: str) -> Path:
    """GSM8K's own file: in $GSM8K, ./gsm8k or Kaggle's inputs, or else our cache of a download."""
    inputs = [f for pattern in input_patterns("*gsm8k*") for f in sorted(glob.glob(pattern))]
    folders = [Path(folder) for folder in (os.environ.get("GSM8K", "gsm8k"), *inputs)]
    for file in (f / part / f"{split}.jsonl" for f in folders for part in (".", "main")):
        if file.is_file():
            return file
    import download

    return download.gsm8k(split, folders)
