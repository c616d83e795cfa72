"""Merges an adapter into its base: a whole text-only model for vLLM, llama.cpp, Ollama, the Hub.

    python merge.py --adapter runs/grpo --out merged         # or: python lora.py --adapter ...
"""

import dataclasses
import json
from pathlib import Path
from typing import Literal

import jax.numpy as jnp
import tyro

import card
import data
import disk
import gemma
import hub
import lora
import terminal
from commandline import Unset


def main(adapter: str, out: str, model: Unset = None, weights: Unset = None,
         tokenizer: Unset = None, dtype: Literal["float32", "bfloat16"] = "bfloat16") -> None:
    """Writes the merged model, its tokenizer and model card, and prints commands.

    Its chat template adds the system text that the adapter was trained under.

    Args:
        adapter: A run folder, its final/, or a PEFT adapter.
        out: Folder to write; a new or an empty one.
        model: The adapter's base model; default: the one it was trained on.
        weights: Folder of the base's weights; default: the adapter's, or looked for by name.
        tokenizer: Folder or file of the tokenizer, if the weights folder holds none.
        dtype: Of the merged weights; the sum itself is computed in float32.
    """
    model, weights = hub.trained_on(model or "tiny", weights, adapter)
    base, path = hub.find_start(model, weights, adapter)
    if path is None:
        raise ValueError(f"--adapter {adapter}: a whole model already, there is nothing to merge")
    if Path(out).exists() and (not Path(out).is_dir() or any(Path(out).iterdir())):
        raise ValueError(f"--out {out} is there already, and not empty: name another folder")
    tok = data.Tokenizer(tokenizer or base)
    cfg, params = gemma.load(base, jnp.dtype(dtype))
    params = lora.merge(params, lora.load(path, cfg), cfg)
    stops = tuple(sorted({*cfg.eos_token_id, *tok.stop_ids}))  # a base model has only <eos>
    gemma.save(out, dataclasses.replace(cfg, eos_token_id=stops), params)
    system = lora.read_prompt(adapter, None) or ""
    tok.save(out, system)
    file = Path(out) / "config.json"  # llama.cpp's converter reads one stop id there, not a list
    file.write_text(json.dumps(disk.read_json(file) | {"eos_token_id": tok.eos}, indent=2))
    if system:
        lora.write_prompt(Path(out), system)
    card.write_merged(Path(out), path, model)
    print(f"{out}: {path} merged into {base}, {dtype}")
    if system:
        print("its chat template adds the system text of the training:")
        print(terminal.indented(system))
    print(card.commands(Path(out), out, model), end="")
    print(f"the lines for transformers are in {Path(out, 'README.md')}")


def command() -> None:
    """The command line, here and of lora.py."""
    terminal.command(lambda: tyro.cli(main))


if __name__ == "__main__":
    command()
