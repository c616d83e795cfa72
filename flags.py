"""The flags that training scripts share: a script's Config adds its own to one of these.

    @dataclasses.dataclass(frozen=True)
    class Config(flags.Rollouts):
        beta: float = 1.0
        '''One sentence.'''

A script may give a flag another default, with the sentence again.
"""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class Stage:
    """The flags of every training stage."""

    # model
    model: str = "tiny"
    """Which Gemma: tiny, gemma3-270m/1b/4b/12b/27b, gemma2-2b/9b/27b; add -pt for a base model."""
    weights: str | None = None
    """Folder of the weights (config.json, safetensors); default: looked for by name."""
    tokenizer: str | None = None
    """Tokenizer folder or file, if the weights folder holds no tokenizer."""
    adapter: str | None = None
    """An earlier run (its final/), a PEFT adapter or a fully fine-tuned model; default: none."""
    dtype: Literal["float32", "bfloat16"] | None = None
    """Precision of the frozen base and the activations; trained arrays have float32 masters."""

    # data
    data: str | None = None
    """Comma-separated: problems, solutions, gsm8k (built in), or files; :test for a test split."""
    eval_data: str | None = None
    """Held-out rows, as in --data; default: a built-in set's test split, else 2 % of prompts."""
    system: str | None = None
    """System text before every question; default: the one the adapter was trained under."""
    skip_bad_rows: bool = False
    """Skip and count rows that cannot be used, instead of stopping at the first."""

    # LoRA
    lora_rank: int | None = None
    """Rank of the adapter; 0 trains every weight of the model."""
    lora_alpha: float | None = None
    """The adapter's output is scaled by alpha / rank; default: the rank."""
    lora_targets: str = "q,k,v,o,gate,up,down"
    """Which matrices get an adapter."""
    rslora: bool = False
    """Scale by alpha / sqrt(rank) instead (arXiv 2312.03732)."""

    # optimisation
    steps: int | None = None
    """Steps to run; with --time-limit, whichever ends first."""
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
    seed: int = 0
    """Seed of the adapter, the prompt order and the sampling."""
    eval_every: int | None = None
    """Steps between evaluations, of which the best checkpoint is kept; 0: only at the end."""
    eval_rows: int | None = None
    """Maximum number of held-out rows; 0: all of them."""
    save_every: int | None = None
    """Steps between checkpoints; 0: only at the end."""
    keep: int = 2
    """Latest checkpoints to keep, besides the best."""
    report_to: str = ""
    """Also log to wandb, tensorboard or both, comma-separated, if installed."""
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
class Rollouts(Stage):
    """The flags of a stage that learns from its own completions."""

    # data
    rows: int | None = None
    """Problems to take from the start of each source; 0: all of them."""
    curriculum: str = ""
    """Order by the rows' "difficulty": ordered (easy first), or phases START:LOW-HIGH that begin at
    a share of the run, as in 0:1-2,0.3:1-3,0.6:1-5; default: shuffled."""

    # rewards
    rewards: str | None = None
    """Weighted sum, as in format:1,answer:3, or a preset: tunix, ideae, pinocchio, grar."""
    reward_file: str | None = None
    """Your own rewards: my.py (see README), or my.py:score, a function of (completion, row)."""
    overlong_buffer: float = 0.2
    """Last share of --max-new, over which the reward "overlong" falls from 0 to -1 (DAPO)."""
    reward_threads: int = 16
    """Completions scored at once, in threads."""
    reward_timeout: float = 60.0
    """Seconds without a new score after which the pending scores count as missing."""
    max_missing: float = 0.5
    """Save and stop if more than this share of a step's completions has no reward."""

    # rollouts
    prompts: int | None = None
    """Prompts (groups) per step."""
    group: int = 8
    """Completions per prompt, G."""
    max_prompt: int | None = None
    """Longest prompt, in tokens; a row with a longer one is a bad row."""
    max_new: int | None = None
    """Longest completion, in tokens; a longer one is cut, with stop reason "length"."""
    temperature: float = 1.0
    """Temperature of the rollouts and of the trainer's log-probs."""
    top_k: int = 0
    """Sample from the k likeliest tokens, which biases the ratios; 0: from all."""
    top_p: float = 1.0
    """Sample from the likeliest tokens that add up to this probability."""
    min_p: float = 0.0
    """Sample from tokens at least this probable, relative to the likeliest token."""
    repetition: int = 0
    """Stop a completion after this many tokens of a loop (stop reason "repetition"); 0: never."""
    slots: int | None = None
    """Completions decoded at once on each device; lower it when out of memory."""
    pack_length: int | None = None
    """Tokens per packed row of the update."""
    max_drift: float = 0.5
    """Stop if sampler and trainer log-probs differ by more than this on average."""

    # what is shown
    show: int = 2
    """Completions printed every --show-every steps, with their rewards."""
    show_every: int = 10
    """Steps between printed completions."""
    log_samples: int = 8
    """Completions per step kept in samples.jsonl, besides those whose reward failed."""

    # judge (judge.py)
    judge: str | None = None
    """A Gemma by name or folder, run on the mesh; or http(s)://host/v1, OpenAI-compatible."""
    judge_model: str | None = None
    """The model's name at the endpoint."""
    judge_weights: str | None = None
    """Folder of the judge's weights; default: looked for by name."""
    judge_style: Literal["grar", "implicit", "explicit", "pinocchio"] = "grar"
    """One metric 1-5, all items at once, or item by item; pinocchio's needs an endpoint."""
    judge_calls: Literal["completion", "group"] = "completion"
    """What one request to an endpoint judges: a completion, or all completions of a question."""
    judge_threads: int = 16
    """Requests in flight at an endpoint."""
    judge_limit: int = 0
    """Requests that may be sent, counting those of earlier sessions; 0: no limit."""
    judge_missing: float = 0.2
    """Share of missing judgements, of the latest 200, above which the run stops."""
