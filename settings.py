"""The flags that scripts share, their defaults, and the checks before anything is loaded.

    class Config(settings.Training): ...         # a script adds its own fields
    config = settings.resolve(config, DEFAULTS)  # fills the fields left at None

The sentence under a field is its --help. Where a script means something else by a field, or has
another default, its Config declares the field again.
"""

import dataclasses
import math
import textwrap
from pathlib import Path
from typing import Literal

import gemma
import hub
import lora
import runs
import terminal

# --------------------------------------------------------------------------------- shared flags


@dataclasses.dataclass(frozen=True)
class Model:
    """The model, of every script that loads one."""

    # model
    model: str = "tiny"
    """Which Gemma: tiny, gemma3-270m/1b/4b/12b/27b, gemma2-2b/9b/27b; add -pt for a base model."""
    weights: str | None = None
    """Folder with config.json and safetensors; default: looked for by the model's name."""
    tokenizer: str | None = None
    """Tokenizer folder or file, if the weights folder holds no tokenizer."""
    adapter: str | None = None
    """An earlier run (its final/), a PEFT adapter or a fully fine-tuned model; --model may then be
    left out. Default: none."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the base and the activations; what is trained has float32 masters."""
    base: Literal["dtype", "int8"] = "dtype"
    """The base model's weights: in --dtype; or int8, with half the bytes of bfloat16; then
    only an adapter can be trained."""


@dataclasses.dataclass(frozen=True)
class Rows(Model):
    """The rows, of every script that reads data."""

    # data
    data: str | None = None
    """Comma-separated: problems, solutions, gsm8k (built in), files (JSON, JSON lines, CSV,
    Parquet) or hf:owner/name of the Hub; gsm8k:test, mine.csv[:50%]."""
    system: str | None = None
    """System text before every question; default: the one the adapter was trained under."""
    columns: str = ""
    """Names of your columns, OURS=YOURS, as in question=instruction,answer=response."""
    skip_bad_rows: bool = False
    """Skip and count rows that cannot be used, instead of stopping."""

    # the run
    seed: int = 0
    """Seed of all that is random: a new adapter, the order of rows, dropout, sampling."""


@dataclasses.dataclass(frozen=True)
class Training(Rows):
    """Every training script."""

    # data
    eval_data: str | None = None
    """Held-out rows, as in --data; default: a built-in set's test split, else 2 % of prompts."""

    # LoRA
    lora_rank: int | None = None
    """Rank of the adapter, by default that of --adapter; 0 trains every weight of the model."""
    lora_alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; default: --adapter's, or the rank (SFT and
    SimPO: twice the rank)."""
    lora_targets: str = "q,k,v,o,gate,up,down"
    """Which matrices get an adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    # optimisation
    steps: int | None = None
    """Steps to run; beside --time-limit alone there is no default, and the clock decides."""
    time_limit: str | None = None
    """Time limit, as in 8h45m; the schedule follows the clock, and the run saves before the end."""
    micro_rows: int | None = None
    """Packed rows computed at once on each device; lower it when out of memory."""
    learning_rate: float | None = None
    """Peak learning rate: linear warm-up, then cosine decay."""
    warmup: float = 0.05
    """Share of the run spent warming up."""
    final_lr: float = 0.1
    """Learning rate at the end, as a share of the peak."""
    weight_decay: float = 0.0
    """AdamW's weight decay, on every trained array."""
    adam_b2: float = 0.99
    """AdamW's beta2; 0.999 suits runs of many thousand steps."""
    clip_norm: float = 1.0
    """Clip gradients to this global norm."""
    remat: Literal["none", "attention", "layer", "auto"] | None = None
    """What the backward pass recomputes: attention (everything but matmuls with weights; 4N FLOPs
    per token, like none) or the whole layer (6N). auto: attention, or layer if the base is
    sharded."""
    shard: Literal["auto", "yes", "no"] = "auto"
    """Shard the base over the devices; auto: if a copy takes over 40 % of a device's memory."""

    # the run
    out: str = "runs/train"
    """Run folder; the same command continues the run in it."""
    eval_every: int | None = None
    """Steps between evaluations, from step 0 on; the best checkpoint is kept. 0: evaluate only at
    the end."""
    eval_rows: int | None = None
    """Maximum number of held-out rows; 0: all of them."""
    save_every: int | None = None
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Latest checkpoints to keep, besides the best."""
    report_to: str = ""
    """Also log to wandb, tensorboard or both, comma-separated; install them first."""
    plan: bool = False
    """Print whether the run fits the TPU or GPU here, else a v5e-8, and how far its time goes;
    needs no weights and runs nothing."""

    # several hosts (hosts.py)
    coordinator: str | None = None
    """host:port of process 0, which the others join; auto: JAX finds it (SLURM, GKE, TPUs)."""
    n_processes: int | None = None
    """Number of processes, each on its own host or GPU."""
    process_id: int | None = None
    """Number of this process, from 0."""


@dataclasses.dataclass(frozen=True)
class Sampling:
    """Completions and their scores, of every script that samples answers to its rows."""

    # data
    rows: int | None = None
    """Problems to take from the start of each source; 0: all of them."""

    # rewards
    reward_file: str | None = None
    """Your own rewards, docs/rewards.md: my.py, or my.py:score, a function of (completion, row)."""
    reward_threads: int = 16
    """Completions scored at once, in threads."""
    reward_timeout: float = 60.0
    """Seconds without a new score after which the pending scores count as missing."""

    # sampling
    max_prompt: int | None = None
    """Longest prompt, in tokens; a row with a longer one is a bad row."""
    max_new: int | None = None
    """Longest completion, in tokens; a longer one is cut, with stop reason "length"."""
    temperature: float = 1.0
    """Temperature of sampled completions and, in training, of the trainer's log-probs."""
    top_k: int = 0
    """Sample from the k likeliest tokens, which biases the ratios of training; 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that add up to this probability."""
    min_p: float = 0.0
    """Sample from tokens at least this probable, relative to the likeliest token."""
    repetition: int = 0
    """Stop a completion after this many tokens of a loop (stop reason "repetition"); 0: never."""
    slots: int | None = None
    """Completions decoded at once on each device; lower it when out of memory."""


@dataclasses.dataclass(frozen=True)
class Judge:
    """A judge beside the model (judge.py)."""

    # judge
    judge: str | None = None
    """A Gemma by name or folder, run on the mesh; or http(s)://host/v1, OpenAI-compatible, with
    its key in $JUDGE_API_KEY."""
    judge_model: str | None = None
    """The model's name at the endpoint."""
    judge_weights: str | None = None
    """Folder of the judge's weights; default: looked for by name."""
    judge_base: Literal["dtype", "int8"] = "dtype"
    """The judge's weights: bfloat16 (a small judge: float32), or int8."""
    judge_style: Literal["grar", "implicit", "explicit", "pinocchio"] = "grar"
    """One metric 1-5, all items at once, or item by item; pinocchio's needs an endpoint."""
    judge_calls: Literal["completion", "group"] = "completion"
    """What one request to an endpoint judges: a completion, or all completions of a question."""
    judge_threads: int = 16
    """Requests in flight at an endpoint."""
    judge_limit: int = 0
    """Requests that may be sent, counting those of earlier sessions; 0: no limit."""
    judge_missing: float = 0.2
    """Stop if more than this share of the latest 200 judgements is missing."""


# -------------------------------------------------------------------------------------- defaults


def resolve(config, defaults: dict[str, dict], alpha_per_rank: float = 1.0):
    """Fills the fields of a script's Config left at None from its model's defaults.

    The system text, the rank and alpha are those of --adapter, so that a chain of stages trains one
    adapter, and so is the model where --model is left out; a new adapter has alpha = alpha_per_rank
    * rank. With --time-limit and without --steps the clock alone decides, so steps stays None.
    """
    system = lora.read_prompt(config.adapter or config.weights, config.system)
    model, weights = hub.trained_on(config.model, config.weights, config.adapter)
    config = dataclasses.replace(config, model=hub.short_name(model), weights=weights,
                                 system=system)
    if hasattr(config, "out"):
        config = dataclasses.replace(config, out=str(hub.output(config.out)))
    if (table := runs.model_defaults(config.model, defaults)) is None:
        raise ValueError(f"--model {config.model}: expected one of {', '.join(gemma.CONFIGS)}")
    if config.adapter and getattr(config, "lora_rank", 0) is None:
        table = table | lora.read_size(hub.find_adapter(config.adapter))
    unset = {k: v for k, v in table.items() if getattr(config, k) is None}
    if runs.parse_time(getattr(config, "time_limit", None)) is not None:
        unset.pop("steps", None)
    config = dataclasses.replace(config, **unset)
    check_ranges(config)
    check_name(config)
    if getattr(config, "lora_alpha", 0.0) is None:
        config = dataclasses.replace(config, lora_alpha=alpha_per_rank * config.lora_rank)
    return config


RANGES = (  # (smallest value, largest value, fields)
    (1, math.inf, "batch_rows micro_rows max_length max_prompt max_new slots prompts inner_epochs "
     "reward_threads minibatches group"),
    (0, math.inf, "lora_rank steps learning_rate weight_decay kl_coef entropy_coef clip_high "
     "dual_clip cispo_cap is_cap is_floor off_policy_mask top_k repetition resample rows eval_rows "
     "eval_every eval_accuracy save_every keep show show_every log_samples reward_timeout "
     "max_drift reward_coef value_clip value_lr value_warmup temperature seed"),
    (0, 1, "warmup final_lr adam_b2 prompt_loss clip_low min_p max_missing overlong_buffer "
     "on_policy gamma lam"),
    (1e-9, 1, "top_p"), (0, 0.999, "lora_dropout"),
    (1e-9, math.inf, "clip_norm sapo_pos sapo_neg"),
)


def check_ranges(config) -> None:
    """Raises ValueError for a number out of its range, before anything is loaded."""
    for low, high, names in RANGES:
        for name in names.split():
            value = getattr(config, name, None)
            if value is not None and not low <= value <= high:
                raise ValueError(f"{terminal.flag(name)} {value}: expected {low:g} to {high:g}")
    if hasattr(config, "lora_targets"):
        lora.parse_targets(config.lora_targets)
        if config.base == "int8" and not config.lora_rank:
            raise ValueError("--base int8 with --lora-rank 0: int8 weights cannot be trained; "
                             "leave one of the two out")


def check_name(config) -> None:
    """Raises ValueError if --model names another size than that of the given folder.

    The name picks the defaults: a Gemma of a billion weights must not get those of the tiny model.
    """
    folder = Path(config.weights) if config.weights else None
    if folder is None and config.adapter:
        folder = hub.find_adapter(config.adapter)
    if folder is None or not (folder / "config.json").exists():
        return
    cfg, named = gemma.read_config(folder), gemma.CONFIGS[hub.base_name(config.model)]
    if cfg.n_params > max(10**8, 1.5 * named.n_params):
        raise ValueError(f"--model {config.model} has {named.n_params:,} weights, but {folder} "
                         f"holds {cfg.n_params:,}: name its size with --model")


FACTS = ("model", "data", "steps", "learning_rate", "lora_rank", "samples", "max_new", "margin")


def show_config(config) -> None:
    """Prints the flags that were given, then up to five important defaults."""
    values = dataclasses.asdict(config)
    given = runs.given(values, type(config))
    others = [k for k in FACTS if k not in given and values.get(k) is not None][:5]
    for title, names in (("given", given), ("default", others)):
        words = []
        for name in names:
            flag, value = terminal.flag(name), values[name]
            text = textwrap.shorten(str(value), 60, placeholder="…")
            words.append(flag if value is True else f"{flag}\u00a0{text}".replace(" ", "\u00a0"))
        if words or title == "given":
            terminal.say_wrapped(f"{title:9}{' '.join(words) or 'nothing'}", 9)
    terminal.say(f"{'all':9}{config.out}/config.json")
