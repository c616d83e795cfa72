"""Where things are found: model folders, adapters and data, by flag, environment, Kaggle or cache.

    hub.find_model("gemma3-1b")                    # a Hugging Face folder, downloaded if need be
    hub.find_start("gemma3-1b", None, "runs/sft")  # the weights and the adapter a stage begins with
    hub.find_file("mine.jsonl")                    # a path, or a name among Kaggle's inputs

Every search goes from what the user named to what happens to be there: the path itself, then
Kaggle's outputs and inputs, then the caches of the download tools, then a download.
"""

import glob
import hashlib
import http.client
import importlib
import os
import re
import urllib.request
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

SHAPE = ("model_type", "hidden_size", "num_hidden_layers")  # what tells one Gemma from another
OTHER_FORMATS = {  # what a folder without safetensors may hold -> files that show it
    "Flax weights": ("_METADATA", "manifest.ocdbt", "checkpoint"),  # Orbax
    "PyTorch weights": ("*.bin", "*.ckpt", "*.pth", "*.pt"),  # reading one runs its code
    "Keras weights": ("*.weights.h5",),
    "GGUF weights": ("*.gguf",),
}


def other_format(path: Path) -> str | None:
    """The weights of a folder that are not a model's safetensors: "Flax weights (…/_METADATA)"."""
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        return f"a PEFT adapter without its base ({path / 'adapter_config.json'})"
    if any(path.glob("*.safetensors*")):
        return None
    for name, patterns in OTHER_FORMATS.items():
        found = [f for p in patterns for f in (*path.glob(p), *path.glob(f"*/{p}"))]
        if found:
            return f"{name} ({min(found)})"
    return None


def short_name(model: str) -> str:
    """The --model of a Hub id: google/gemma-3-1b-it -> gemma3-1b; other names stay as they are."""
    short = re.sub(r"^google/gemma-([23])-", r"gemma\1-", model)
    if short == model or short.endswith("-pt"):
        return short
    bare = short.startswith("gemma2") or "270m" in short  # see hub_name
    return short.removesuffix("-it") if short.endswith("-it") else short + "-pt" * bare


def base_name(model: str) -> str:
    """The key of gemma.CONFIGS: gemma3-1b-it -> gemma3-1b."""
    return short_name(model).removesuffix("-it").removesuffix("-pt")


def hub_name(model: str) -> str:
    """The model's name on the Hub: gemma3-1b -> gemma-3-1b-it; -pt names the base model."""
    name = short_name(model).replace("gemma2", "gemma-2").replace("gemma3", "gemma-3")
    if not name.endswith(("-it", "-pt")):
        return name + "-it"
    bare = name.startswith("gemma-2") or "270m" in name  # base models published without a suffix
    return name.removesuffix("-pt") if bare else name


def find_model(model: str, weights: str | Path | None = None,
               flags: tuple[str, str] = ("--model", "--weights")) -> Path:
    """The folder of a model: --weights, $GEMMA_WEIGHTS, Kaggle's inputs, the download caches.

    model: a folder, or a name of gemma.CONFIGS, with -it (the default) or -pt; flags: for the
    errors.
    """
    if not weights and model and base_name(model) not in gemma.CONFIGS and Path(model).is_dir():
        weights, flags = model, (flags[0], flags[0])
    if weights is not None:
        other = other_format(Path(weights))
        if other or not (Path(weights) / "config.json").exists():
            raise ValueError(f"{flags[1]} {weights}: expected the Transformers version, a folder "
                             f"with config.json and safetensors, found {other or 'no config.json'}")
        _check_manifest(Path(weights), flags[1])
        return Path(weights)
    base = base_name(model)
    if base not in gemma.CONFIGS:
        raise ValueError(f"{flags[0]} {model}: unknown, expected one of {', '.join(gemma.CONFIGS)}")
    if base == "tiny":
        return Path(__file__).resolve().parent / "tiny"
    name, expected = hub_name(model), gemma.CONFIGS[base]
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
            if any(folder.glob("*.safetensors")):  # not a half-filled cache
                cfg = gemma.read_config(folder)
                if all(getattr(cfg, k) == getattr(expected, k) for k in SHAPE):
                    return folder
    downloaded, why = _download(name, handle)
    if downloaded:
        return downloaded
    flax = name.replace("-", "", 1)  # gemma3-1b-it
    inputs = input_patterns(flax, f"{flax}/*", name, f"{name}/*")
    held = {other_format(Path(f)) for pattern in inputs for f in glob.glob(pattern)} - {None}
    searched = ", ".join(map(str, (root, KAGGLE / "input", hf_cache, kagglehub)))
    raise ValueError("\n".join([
        f"{flags[0]} {model}: no folder of {name} in {searched}",
        *(f"Found {other}, but only Transformers weights can be read" for other in sorted(held)),
        f"Downloading failed: {why}",
        f"Accept the license on its page, then `hf download google/{name}`, or {flags[1]} DIR",
        f"On Kaggle: Add Input > Models > {handle.split('/')[1]} > Transformers > {name}",
    ]))


def _download(name: str, handle: str) -> tuple[Path | None, str]:
    """Asks kagglehub (on Kaggle) and huggingface_hub, where they are installed -> (folder, why)."""
    files = ["*.json", "*.safetensors", "tokenizer.model", "chat_template.jinja"]
    tools, why = {}, []
    if "KAGGLE_KERNEL_RUN_TYPE" in os.environ:
        tools["kagglehub"] = lambda tool: tool.model_download(handle)
    tools["huggingface_hub"] = lambda tool: tool.snapshot_download(
        f"google/{name}", allow_patterns=files)
    for tool, download in tools.items():
        try:
            return Path(download(importlib.import_module(tool))), ""
        except Exception as e:  # any failure of an optional library only means "not here"
            first_line = str(e).strip().partition("\n")[0]
            why.append(f"{tool}: {type(e).__name__} {first_line}")
    return None, "; ".join(why)


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
    if (folder / "adapter_config.json").exists():
        base = _trained_base(folder)
        if base is None or weights and not base.exists():
            found = find_model(model, weights, flags[:2])
            _compare_base(folder, found, hub_name(model))
            return Start(found, folder)
        if not base.exists():
            raise ValueError(f"{flags[2]} {adapter} belongs on the fully fine-tuned {base}, which "
                             f"is not there; {flags[1]} names it where it is now")
        _check_manifest(base, flags[1])
        return Start(base, folder)
    if (folder / "config.json").exists():
        return Start(folder, None)
    raise ValueError(f"{flags[2]} {adapter}: expected adapter_config.json (an adapter), "
                     "config.json (a whole model), or a run folder with final/")


def trained_on(adapter: str) -> tuple[str, str | None]:
    """The --model and --weights that an adapter was trained on; ("tiny", None) where unknown.

    The base that its config names is known by its shape where it is still there, else by its name.
    """
    folder = find_adapter(adapter)
    whole = (folder / "config.json").exists()
    if not whole and not (folder / "adapter_config.json").exists():
        return "tiny", None
    base = folder if whole else _named_base(folder)
    if not (base / "config.json").exists():
        name = short_name(f"google/{base.name}")
        return (name, None) if base_name(name) in gemma.CONFIGS else ("tiny", None)
    cfg = gemma.read_config(base)
    for name, known in gemma.CONFIGS.items():
        if name != "tiny" and all(getattr(cfg, k) == getattr(known, k) for k in SHAPE):
            return name, None if whole else str(base)
    return "tiny", None


def _check_manifest(folder: Path, flag: str) -> None:
    """Raises ValueError where a folder that a run wrote is no longer what the run wrote."""
    if (folder / "manifest.json").exists() and (wrong := disk.find_change(folder)):
        raise ValueError(f"{flag} {folder}: {wrong}")


def _named_base(adapter: Path) -> Path:
    """What an adapter's config calls the model that it was trained on."""
    file = adapter / "adapter_config.json"
    name = gemma.json_value(gemma.read_json(file), "base_model_name_or_path", str, "", file)
    if len(name) > 4000 or max(map(len, Path(name).parts), default=0) > 255:  # no path is longer
        raise ValueError(f"{file}: base_model_name_or_path has {len(name):,} characters")
    return Path(name)


def _compare_base(adapter: Path, weights: Path, name: str) -> None:
    """Says so where an adapter was trained on a model of another name than these weights have."""
    base = _named_base(adapter)
    if base.name not in ("", name) and base.name not in str(weights.resolve()):
        terminal.say(f"--adapter {adapter} was trained on {base}, and is put on {weights}: is "
                     "that the same model?")


def _trained_base(adapter: Path) -> Path | None:
    """The fully fine-tuned model of ours that an adapter was trained on; None: a published one."""
    base = _named_base(adapter)
    ours = base.name == "final" or base.name.startswith("step_")  # see runs.py
    return base if ours and ((base / "prompt.json").exists() or not base.exists()) else None


# ------------------------------------------------------------------------------------------- data

GSM8K = {  # sha256 of grade_school_math/data/*.jsonl in github.com/openai/grade-school-math
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math"


def find_file(source: str, flag: str = "--data") -> Path:
    """A file by its path, or by its name (or the end of its path) among Kaggle's inputs."""
    if (path := Path(source)).is_file():
        return path
    if (found := find_input(source, flag)) and found.is_file():
        return found
    raise ValueError(f"{flag} {source}: no such file; expected problems, solutions, gsm8k, or a "
                     "file of rows (JSON lines or a JSON array)")


def find_gsm8k(split: str) -> Path:
    """GSM8K's own file: $GSM8K, ./gsm8k, Kaggle's inputs, our cache; else downloaded into it.

    What is in our cache must still be what was downloaded, or it is downloaded again.
    """
    cache, name = Path.home() / ".cache" / "gsm8k", f"{split}.jsonl"
    inputs = [Path(f) for pattern in input_patterns("*gsm8k*") for f in sorted(glob.glob(pattern))]
    folders = [Path(os.environ.get("GSM8K", "gsm8k")), *inputs]
    for file in (f for folder in folders for f in (folder / name, folder / "main" / name)):
        if file.is_file():
            return file
    sha256 = lambda content: hashlib.sha256(content).hexdigest()
    if (cache / name).is_file() and sha256((cache / name).read_bytes()) == GSM8K[split]:
        return cache / name
    url = f"{GSM8K_URL}/data/{name}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as e:  # the latter: cut off in the middle
        searched = ", ".join(map(str, [*folders, cache]))
        raise ValueError(f"--data gsm8k: no {name} in $GSM8K, {searched}; {url}: {e}") from None
    if (found := sha256(content)) != GSM8K[split]:
        raise ValueError(f"{url}: expected sha256 {GSM8K[split]}, found {found}")
    with disk.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{name}.{os.getpid()}"  # renamed when whole: a kill leaves no torn file
        partial.write_bytes(content)
        return partial.replace(cache / name)
