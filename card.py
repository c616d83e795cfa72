"""What goes with a model to other people: its README.md on the Hub, Ollama's Modelfile, commands.

    card.write(folder, run, step=60)            # into final/, from the files of its run
    card.write_merged(Path("merged"), source)   # into a merged folder, from the adapter's card
    print(card.commands(folder, "merged"))      # vLLM, llama.cpp, Ollama, the Hub

The card is a function of the run's files alone and holds no times, so a resumed run writes the same
one. It says which step the model is, and that the best of several evaluations flatters a little.
"""

import os
import re
import shlex
from pathlib import Path

import data
import disk
import gemma
import hub
import report
from tokenizer_files import turn

VLLM_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that --max-lora-rank takes
STAGES = {"train_sft": "SFT", "train_simpo": "SimPO", "train_grpo": "GRPO", "train_ppo": "PPO",
          "train_distill": "distillation"}
COLUMNS = {  # metric of an evaluation -> (heading, factor)
    "eval_accuracy": ("held-out accuracy, %", 100),
    "eval_pair_accuracy": ("held-out pairs, %", 100), "eval_loss": ("held-out loss", 1),
    "eval_format": ("format, %", 100), "eval_length": ("tokens", 1),
}
SETTINGS = ("adapter", "data", "eval_data", "rewards", "reward_file", "judge", "loss", "steps",
            "time_limit", "lora_rank", "lora_alpha", "learning_rate", "prompts", "group",
            "batch_rows", "max_length", "max_new", "temperature", "kl_coef", "seed")


# --------------------------------------------------------------------------------------- the result


def outcome(run: report.Run, step: int) -> str:
    """The first evaluation and that of `step`: "held-out accuracy 38.0 % -> 59.5 % (+11.7 ...)"."""
    for name, (label, factor) in COLUMNS.items():
        rows = {s: row for s, row in run.steps.items() if row.get(name) is not None}
        if step not in rows:
            continue
        label, unit = label.removesuffix(", %"), " %" if factor == 100 else ""
        show = lambda row: f"{factor * row[name]:.{1 if unit else 3}f}{unit}"  # noqa: B023
        first = min(rows)
        if first == step:
            return f"{label} {show(rows[step])} at step {step}, the only evaluation"
        before = show(rows[first]) + (f" at step {first}" if first else "")
        ends = [[rows[s].get(name + end) for end in ("", "_low", "_high")] for s in (first, step)]
        points = ""
        if None not in (*ends[0], *ends[1]):
            least, most = report.difference(*ends)
            points = f" ({100 * least:+.1f} ... {100 * most:+.1f} points)"
        return f"{label} {before} -> {show(rows[step])}{points}"
    return ""


def ending(folder: Path, run_folder: Path, step: int) -> list[str]:
    """What a run says last: what it is, what it learned, and what to do next."""
    run = report.read_run(run_folder)
    tokenizer = run.config.get("tokenizer")
    flags = f" --tokenizer {shlex.quote(tokenizer)}" if tokenizer else ""
    adapter = f"--adapter {shlex.quote(str(run_folder))}{flags}"
    lines = [f"  {which(run, step)}", f"  {outcome(run, step)}" * bool(outcome(run, step)),
             f"  report: {run_folder / 'report.html'}", f"  talk: python chat.py {adapter}",
             f"  export: python merge.py {adapter} --out merged" if facts(folder)["rank"] else
             f"  export: see {run_folder / 'final' / 'README.md'}"]
    return [line for line in lines if line]


def which(run: report.Run, step: int) -> str:
    """Which step a model is: "best step 60 of 80", or "last step, 80"."""
    scores = evaluations(run)
    start = scores.pop(0, None)  # no checkpoint
    fell = ", worse than the start" if start is not None and scores.get(step, start) < start else ""
    if n_evaluated(run, step) > 1:
        return f"best step {step} of {max(run.steps)}{fell}"
    return f"last step, {step}{fell}"


def evaluations(run: report.Run) -> dict[int, float]:
    """The scores that checkpoints are chosen by, of each evaluated step; the largest is best."""
    for name, sign in (("eval_accuracy", 1), ("eval_loss", -1), ("eval_format", 1)):
        scores = {s: sign * row[name] for s, row in run.steps.items() if row.get(name) is not None}
        if any(scores):  # of a step after 0
            return scores
    return {}


def n_evaluated(run: report.Run, step: int) -> int:
    """Number of evaluated steps after the start if this one is the best of them, else 0."""
    scores = {s: score for s, score in evaluations(run).items() if s}
    return len(scores) if scores and scores.get(step) == max(scores.values()) else 0


def results(run: report.Run, step: int) -> str:
    """All evaluations as a table, twelve rows at most."""
    rows = [s for s, row in run.steps.items() if any(row.get(k) is not None for k in COLUMNS)]
    if not rows:
        return "The run made no evaluation.\n"
    kept = sorted({rows[0], step, *rows[:: len(rows) // 10 + 1]} & {*rows})
    names = [k for k in COLUMNS if any(run.steps[s].get(k) is not None for s in kept)]
    lines = ["| step | " + " | ".join(COLUMNS[k][0] for k in names) + " |",
             "|---" * (len(names) + 1) + "|"]
    for s in kept:
        cells = []
        for name in names:
            factor, row = COLUMNS[name][1], run.steps[s]
            value, low, high = (row.get(name + end) for end in ("", "_low", "_high"))
            digits = 3 if name == "eval_loss" else 1
            cell = "" if value is None else f"{factor * value:.{digits}f}"
            if None not in (value, low, high):
                cell += f" [{factor * low:.1f}, {factor * high:.1f}]"
            cells.append(cell)
        lines.append(f"| {f'**{s}, this model**' if s == step else s} | " + " | ".join(cells)
                     + " |")
    text = "\n".join(lines) + "\n\nGreedy answers; 95 % intervals in brackets."
    if (n := n_evaluated(run, step)) > 1:
        text += f" The best of {n} evaluations on the same problems: the figure flatters a little."
    return text + "\n"


# ---------------------------------------------------------------------------------- the base model


def hub_id(model: str, base: str) -> str | None:
    """The base's id on the Hub: by its folder's name, else by --model if that says -it or -pt.

    None for tiny, and for a folder of whatever the user named: it may hold either.
    """
    names = {hub.hub_name(name + end) for name in gemma.CONFIGS for end in ("", "-pt")
             if name != "tiny"}
    found = [name for name in names if name in base]
    if found:
        return "google/" + max(found, key=len)
    says = hub.short_name(model) in hub.NAMES and model != hub.base_name(model)
    return "google/" + hub.hub_name(model) if says else None


def facts(folder: Path) -> dict:
    """rank (0: a whole model), base (its folder) and system text of an adapter or model folder."""
    config, prompt = folder / "adapter_config.json", folder / "prompt.json"
    adapter = disk.read_json(config) if config.exists() else {}
    system = disk.read_json(prompt).get("system") if prompt.exists() else ""
    return {"rank": adapter.get("r", 0), "base": adapter.get("base_model_name_or_path") or "",
            "system": system or ""}


# ----------------------------------------------------------------------------------------- commands


def python_lines(base: str, rank: int, system: str) -> str:
    """How transformers answers a question with an adapter or a whole model in this folder."""
    asked = "question"
    if rank and system:  # the base's chat template does not add it
        asked = 'system + "\\n\\n" + question'
    return "".join((
        "from peft import PeftModel\n" * bool(rank),
        "from transformers import AutoModelForCausalLM, AutoTokenizer\n\n",
        f'model = AutoModelForCausalLM.from_pretrained("{base}", dtype="auto")\n',
        'model = PeftModel.from_pretrained(model, ".")\n' * bool(rank),
        f'tokenizer = AutoTokenizer.from_pretrained("{base}")\n',
        f"system = {system!r}\n" * bool(rank and system),
        'question = "Mia has 12 cards. She buys 7 more. How many does she have?"\n',
        f'chat = [{{"role": "user", "content": {asked}}}]\n',
        "prompt = tokenizer.apply_chat_template(\n",
        '    chat, add_generation_prompt=True, return_dict=True, return_tensors="pt")\n',
        "ids = model.generate(**prompt, do_sample=False, max_new_tokens=768)\n",
        'new = ids[0, prompt["input_ids"].shape[1] :]\n',
        "print(tokenizer.decode(new, skip_special_tokens=True))\n"))


def name_of(folder: Path) -> str:
    return folder.resolve().name.removeprefix(".tmp-")  # its final name: see disk.py


def commands(folder: Path, here: str, model: str = "tiny") -> str:
    """Commands for a folder that people call `here`: vLLM, llama.cpp, Ollama and the Hub."""
    told, name = facts(folder), name_of(folder)
    beside = os.path.normpath(Path(here, "..", f"{name}.gguf"))
    quoted, gguf = shlex.quote(here), shlex.quote(beside)
    if told["rank"]:
        base = hub_id(model, told["base"]) or told["base"]
        most = min((r for r in VLLM_RANKS if r >= told["rank"]), default=told["rank"])
        return (f"vllm serve {shlex.quote(base)} --enable-lora --max-lora-rank {most} "
                f"--lora-modules {name}={quoted}\n"
                f"python merge.py --model {model} --adapter {quoted} --out merged\n"
                f"hf upload YOU/{name} {quoted}\n")
    exact = {"float32": "f32", "bfloat16": "bf16"}
    dtype = exact[disk.read_json(folder / "config.json")["torch_dtype"]]
    convert = "python llama.cpp/convert_hf_to_gguf.py"
    return (f"vllm serve {quoted}\n"
            f"{convert} {quoted} --outfile {gguf} --outtype {dtype}\n"
            f"llama-cli -m {gguf} --jinja\n"
            f"ollama create {name} -f {shlex.quote(str(Path(here, 'Modelfile')))}\n"
            f"hf upload YOU/{name} {quoted}\n")


def modelfile(folder: Path) -> str:
    """Ollama's Modelfile: Gemma's turns, with the system text at the head of the first one."""
    system = facts(folder)["system"].replace('"""', "'''")
    first = "{{ if .System }}{{ .System }}" + data.AFTER_SYSTEM + "{{ end }}"
    template = turn("user", first + "{{ .Prompt }}") + turn("model", "{{ .Response }}")
    return "".join((
        f"FROM ../{name_of(folder)}.gguf\n", f'TEMPLATE """{template}"""\n',
        f'SYSTEM """{system}"""\n' * bool(system),
        f'PARAMETER stop "{data.TURN[3]}"\nPARAMETER temperature 0\n'))


# --------------------------------------------------------------------------------------- the files


def front_matter(model: str, base: str | None, rank: int, tags: list[str],
                 trained_on: str) -> str:
    """The Hub's metadata: https://huggingface.co/docs/hub/model-cards."""
    relation = f"base_model_relation: {'adapter' if rank else 'finetune'}"
    lines = [f"base_model: {base}", relation] if base else []
    name = hub.base_name(model)
    lines += ["license: gemma"] * (name in gemma.CONFIGS and name != "tiny")
    lines += [f"library_name: {'peft' if rank else 'transformers'}",
              "pipeline_tag: text-generation"]
    lines += ["datasets:", "- openai/gsm8k"] * ("gsm8k" in trained_on)
    lines += ["tags:", "- reasoning", *(f"- {tag}" for tag in tags)]
    return "---\n" + "\n".join(lines) + "\n---\n"


def usage(folder: Path, model: str) -> str:
    told = facts(folder)
    rank, system = told["rank"], told["system"]
    base = hub_id(model, told["base"]) or told["base"] if rank else "."
    how = ("Put it before the first question, as below:" if rank else
           "The chat template adds it to a conversation that brings none of its own:")
    quote = "> " + system.replace("\n", "\n> ")
    said = f"The model was trained under a system text. {how}\n\n{quote}\n\n" if system else ""
    return (f"## Use\n\n{said}```python\n{python_lines(base, rank, system)}```\n\n"
            f"```sh\n{commands(folder, '.', model)}```\n")


def write(folder: Path, run_folder: Path, step: int) -> None:
    """Writes README.md, curve.svg and, beside a whole model, Modelfile into a run's final/."""
    run, told = report.read_run(run_folder), facts(folder)
    config, rank = run.config, told["rank"]
    script = config["code"]["script"]
    stage, model = STAGES.get(script, script), config["model"]
    base = hub_id(model, told["base"])
    what = f"A LoRA adapter of rank {rank} for" if rank else "All weights of"
    link = f"[{base}](https://huggingface.co/{base})" if base else f"the {model} model"
    values = {k: config.get(k) for k in SETTINGS}
    table = "".join(f"| {k} | `{v}` |\n" for k, v in values.items() if v not in (None, "", False))
    if picture := report.picture(run):
        (folder / "curve.svg").write_text(picture, encoding="utf-8")
    if not rank:
        (folder / "Modelfile").write_text(modelfile(folder), encoding="utf-8")
    tags = [stage.lower()] + ["lora"] * bool(rank)
    (folder / "README.md").write_text("".join((
        front_matter(model, base, rank, tags, str(values["data"])),
        f"\n# {hub.base_name(model)}, {stage}\n\n{what} {link}, trained by `{script}.py`: "
        f"{which(run, step)}.\n\n",
        f"## Results\n\n{results(run, step)}\n",
        "![Held-out results over the steps](curve.svg)\n\n" * bool(picture),
        f"## Training\n\n| setting | value |\n|---|---|\n{table}\n",
        usage(folder, model))), encoding="utf-8")


def write_merged(folder: Path, source: Path, model: str) -> None:
    """Writes README.md and Modelfile of a merged folder, from the adapter's folder `source`."""
    own = source / "README.md"
    text = own.read_text(encoding="utf-8") if own.exists() else ""
    body = re.search(r"(?s)\n---\n(\n# .*)## Use\n", text)  # where the card is one of ours
    tags = [tag for tag in re.findall(r"(?m)^- (\w+)$", text) if tag not in ("reasoning", "lora")]
    (folder / "README.md").write_text("".join((
        front_matter(model, hub_id(model, facts(source)["base"]), 0, tags, text),
        (body[1] if body else f"\n# {model}\n\nA LoRA adapter.\n\n").replace(
            "A LoRA adapter", "A model with a merged LoRA adapter"),
        usage(folder, model))), encoding="utf-8")
    (folder / "Modelfile").write_text(modelfile(folder), encoding="utf-8")
    if (source / "curve.svg").exists():
        (folder / "curve.svg").write_bytes((source / "curve.svg").read_bytes())
