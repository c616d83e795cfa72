"""Downloads of models and of GSM8K, for hub.py where neither is on this machine.

    download.model("gemma-3-1b-it", "google/gemma-3/transformers/gemma-3-1b-it")  # (folder, "")
    download.gsm8k("train", searched)                                             # a file
"""

import hashlib
import http.client
import importlib
import os
import urllib.request
from pathlib import Path

import disk

GSM8K = {  # sha256 of grade_school_math/data/*.jsonl in github.com/openai/grade-school-math
    "train": "17f347dc51477c50d4efb83959dbb7c56297aba886e5544ee2aaed3024813465",
    "test": "3730d312f6e3440559ace48831e51066acaca737f6eabec99bccb9e4b3c39d14",
}
GSM8K_URL = "https://raw.githubusercontent.com/openai/grade-school-math/master/grade_school_math"
OTHER_FORMATS = {  # what a folder without safetensors may hold -> files that show it
    "Flax weights": ("_METADATA", "manifest.ocdbt", "checkpoint"),  # Orbax
    "PyTorch weights": ("*.bin", "*.ckpt", "*.pth", "*.pt"),  # reading one runs its code
    "Keras weights": ("*.weights.h5",),
    "GGUF weights": ("*.gguf",),
}


def model(name: str, handle: str) -> tuple[Path | None, str]:
    """(folder, "") by kagglehub (on Kaggle) or huggingface_hub; (None, why) if neither can."""
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


def other_format(path: Path) -> str | None:
    """Weights of a folder that are no model in safetensors: "Flax weights (.../_METADATA)"."""
    if not (path / "config.json").exists() and (path / "adapter_config.json").exists():
        return f"a PEFT adapter without its base ({path / 'adapter_config.json'})"
    if any(path.glob("*.safetensors*")):
        return None
    for name, patterns in OTHER_FORMATS.items():
        found = [f for p in patterns for f in (*path.glob(p), *path.glob(f"*/{p}"))]
        if found:
            return f"{name} ({min(found)})"
    return None


def gsm8k(split: str, searched: list[Path]) -> Path:
    """GSM8K's file in our cache. It is downloaded if it is not there or its checksum is wrong.

    searched: the folders without it, for the error.
    """
    cache, name = Path.home() / ".cache" / "gsm8k", f"{split}.jsonl"
    sha256 = lambda content: hashlib.sha256(content).hexdigest()
    if (cache / name).is_file() and sha256((cache / name).read_bytes()) == GSM8K[split]:
        return cache / name
    url = f"{GSM8K_URL}/data/{name}"
    try:
        with urllib.request.urlopen(url, timeout=30) as response:
            content = response.read()
    except (OSError, http.client.HTTPException) as e:  # the latter: cut off in the middle
        places = ", ".join(map(str, [*searched, cache]))
        raise ValueError(f"--data gsm8k: no {name} in $GSM8K, {places}; {url}: {e}") from None
    if (found := sha256(content)) != GSM8K[split]:
        raise ValueError(f"{url}: expected sha256 {GSM8K[split]}, found {found}")
    with disk.writing(cache):
        cache.mkdir(parents=True, exist_ok=True)
        partial = cache / f"{name}.{os.getpid()}"  # renamed when whole: a kill leaves no torn file
        partial.write_bytes(content)
        return partial.replace(cache / name)
