"""Group-relative policy optimisation: the model learns from the scores of its own completions.

G completions are sampled per prompt; each one's advantage is how far it beats its group:

    A = (reward - mean of the group) / std of the group     (arXiv 2402.03300)
    ratio = p(token) / p_old(token)
    loss = mean over tokens of
           -min(ratio A, clip(ratio, 1 - low, 1 + high) A) + kl_coef k3

    python train_grpo.py                   # the tiny model, CPU, three minutes
    python train_grpo.py --model gemma3-1b --adapter runs/sft --time-limit 8h
    python train_grpo.py --data mine.jsonl --reward-file my.py:score

GRPO, Dr.GRPO, DAPO, GSPO, CISPO, RLOO (see README), GMPO, SAPO (docs/algorithms.md) are settings.
Deviations from common practice, and why:

1. No forward pass runs twice. With one inner epoch the old log-probs are the current ones; with
   more, the first epoch's forward pass keeps them for the later ones. kl_coef 0 runs no reference;
   an adapter's reference is the starting adapter on the same base.
2. Without a KL term or an entropy bonus, a completion with advantage 0 has no gradient, so the
   update skips it. It still counts in every mean.
3. A packed row holds a prompt once, followed by its completions, each of which attends to the
   prompt and itself: fewer tokens, the same gradient (tested). The host computes each token's
   weight in the mean beforehand. The loss is then a weighted sum, which packing, micro-batches and
   devices do not change (tested).
4. The KL term is k3, because k1's gradient would not depend on the reference at all.
5. A reward that could not be computed is missing, not 0: its completion leaves the group's mean and
   has no gradient. With --mask-truncated a completion cut at --max-new has no gradient either, but
   counts in its group's mean and in the number of completions.
6. The sampled token ids are trained on as they are; text is never tokenised again.

What to expect: reward and held-out accuracy rise. With one inner epoch the loss stays near zero,
whatever is learned, so watch reward, grad_norm and the evaluations instead.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh
from jax.sharding import PartitionSpec as P

import data
import gemma
import hosts
import rewards
import rollouts
import runs
import settings
import stage
import terminal
from rollouts import Problem, Sample
from sampler import Sampler

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config(rollouts.Settings):
    """Fields left at None take the model's defaults from DEFAULTS; the result is printed."""

    # the run
    out: str = "runs/grpo"

    # algorithm
    inner_epochs: int = 1
    """Updates per batch of completions, mu; the first is on-policy."""
    baseline: Literal["mean", "loo"] = "mean"
    """Baseline of a reward: its group's mean, or the mean of the others in its group (RLOO)."""
    scale: Literal["group", "batch", "none"] = "group"
    """Standard deviation that divides the advantages; none in Dr.GRPO and RLOO."""
    per_reward: bool = False
    """Normalise each reward within its group, sum, then normalise over the batch (GDPO)."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.28
    """Ratios above 1 + clip_high are clipped; 0.2 in GRPO, 0.28 in DAPO (clip-higher)."""
    dual_clip: float = 0.0
    """Cap the ratio here where the advantage is negative, for example at 3 (TRL's delta, two-sided
    GRPO); 0: no cap."""
    cispo_cap: float = 0.0
    """CISPO: weight each token's log-prob by its ratio, capped here and without a gradient, instead
    of clipping the ratio; 0: off."""
    sapo: bool = False
    """Bound the ratio smoothly, by a sigmoid, instead of clipping it (SAPO)."""
    sapo_pos: float = 1.0
    """Temperature of SAPO's sigmoid where the advantage is positive."""
    sapo_neg: float = 1.05
    """Temperature of SAPO's sigmoid where the advantage is negative. A higher temperature makes the
    gradient vanish sooner as the ratio leaves 1."""
    ratio_level: Literal["token", "sequence", "sequence-token", "geometric"] = "token"
    """token: one ratio per token. sequence: one per completion, the geometric mean of its tokens'
    (GSPO). sequence-token: that value, but per-token gradients. geometric: as sequence, but each
    token's log-ratio is first clipped, at -clip_low or clip_high (GMPO)."""
    loss_norm: Literal["sequence", "token", "constant"] = "token"
    """Mean over each completion's tokens, then over completions (GRPO); mean over all tokens of the
    update (DAPO); or the sum divided by completions times --max-new (Dr.GRPO)."""
    kl_coef: float | None = None
    """Weight beta of the KL divergence from the starting model; 0 skips the reference pass."""
    kl_unbiased: bool = False
    """Weight the KL term by the ratio, which makes its gradient that of the reverse KL divergence
    (DeepSeek-V3.2; TRL's default)."""
    entropy_coef: float = 0.0
    """Weight of a bonus for the mean entropy of a token."""
    mask_truncated: bool = False
    """Completions cut at --max-new get no gradient but still count in their group's mean."""
    resample: int = 0
    """Rounds of new prompts to replace groups with equal rewards (DAPO's dynamic sampling)."""
    is_cap: float | None = None
    """Importance correction: weight each token by p_trainer / p_sampler, at most this; 0: off. Off
    for the tiny model, because in float32 the two agree to 1e-7 (in bfloat16 to 1e-3; LOG.md)."""
    is_level: Literal["token", "sequence"] = "token"
    """token: each token has its own weight; sequence: all tokens of a completion share the product
    of theirs."""
    is_mode: Literal["truncate", "mask"] = "truncate"
    """truncate: clip the weight to [--is-floor, --is-cap]; mask: set a weight outside to 0."""
    is_floor: float = 0.0
    """Lower bound of the importance weight."""
    off_policy_mask: float = 0.0
    """Drop a completion with a negative advantage if its tokens' mean log-prob has fallen by more
    than this since it was sampled (DeepSeek-V3.2); 0: never."""


REAL = dict(
    dtype="bfloat16", data="gsm8k", rows=0, system=data.SYSTEM, rewards="format:0.5,answer:1",
    prompts=32, max_prompt=512, max_new=768, slots=32, kl_coef=0.02, is_cap=2.0, lora_rank=64,
    steps=500, pack_length=2048, micro_rows=1, learning_rate=1e-5, remat="auto",
    eval_every=50, eval_rows=256, save_every=25,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", data="problems", rows=5000, system="", rewards="format:0.1,answer:1",
        prompts=16, max_prompt=88, max_new=104, slots=64, kl_coef=0.0, is_cap=0.0, lora_rank=16,
        steps=80, pack_length=384, micro_rows=1, learning_rate=1e-3, remat="none", eval_every=20,
        eval_rows=200, save_every=20,
    ),
    "gemma2": REAL,
    "gemma3": REAL,
    "gemma3-270m": REAL | dict(learning_rate=1e-4),  # of its own runs, LOG.md
    **dict.fromkeys(gemma.LARGE, REAL | dict(lora_rank=32, slots=8)),
}
SHOWN = {  # metrics printed each step; metrics.jsonl has all of them
    "reward": "reward {:5.2f}", "accuracy": "right {:4.0%}",
    "completions/mean_length": "length {:4.0f}", "step_s": "{:5.1f} s",
}


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    config = settings.resolve(config, DEFAULTS)
    check_algorithm(config)
    if config.group < 2:
        raise ValueError(f"--group {config.group}: expected 2 or more, to compare")
    rollouts.check_settings(config)
    rollouts.check_rewards(config, trains=True)
    return config


def check_algorithm(config: Config) -> None:
    """Raises ValueError if two settings exclude each other, one needs another that is off, or two
    limits are the wrong way round."""
    flag, given = terminal.flag, lambda name: getattr(config, name) != getattr(Config, name)
    for name, is_on, excluded in (
        ("cispo_cap", config.cispo_cap, "clip_low clip_high dual_clip sapo"),
        ("sapo", config.sapo, "clip_low clip_high dual_clip"),
        ("ratio_level", config.ratio_level == "geometric", "cispo_cap sapo dual_clip"),
        ("per_reward", config.per_reward, "scale baseline"),
    ):
        for other in filter(given, excluded.split() if is_on else ()):
            raise ValueError(f"{flag(other)} {getattr(config, other)} has no effect beside "
                             f"{flag(name)} {getattr(config, name)}: leave one of the two out")
    for needed, names in (("is_cap", "is_level is_mode is_floor"), ("kl_coef", "kl_unbiased"),
                          ("sapo", "sapo_pos sapo_neg")):
        for name in filter(given, () if getattr(config, needed) else names.split()):
            raise ValueError(f"{flag(name)} {getattr(config, name)} has no effect without "
                             f"{flag(needed)}")
    if config.dual_clip and config.dual_clip <= 1 + config.clip_high:
        raise ValueError(f"--dual-clip {config.dual_clip:g}: expected more than 1 + --clip-high = "
                         f"{1 + config.clip_high:g}")
    if config.is_floor > config.is_cap:
        raise ValueError(f"--is-floor {config.is_floor:g}: expected less than --is-cap "
                         f"{config.is_cap:g}")
    if config.group == 2 and config.scale == "group":
        terminal.say_wrapped(
            "--group 2 with --scale group: every advantage is 0.71 or -0.71, however far apart the "
            "rewards are; --scale none keeps the distance", 2)
    limits = [*filter(given, ("clip_low", "clip_high", "dual_clip", "cispo_cap", "sapo"))]
    if limits and config.inner_epochs == 1:
        terminal.say_wrapped(
            f"--inner-epochs 1 leaves {' and '.join(map(flag, limits))} without effect: a batch is "
            "used once, by the weights that sampled it, so every ratio is 1", 2)


# -------------------------------------------------------------------------------------- rollouts


class Setup(NamedTuple):
    """Everything that stays the same during a run."""

    config: Config
    mesh: Mesh
    model: stage.Model
    problems: list[Problem]
    order: rollouts.Order
    sampler: Sampler
    scorer: rollouts.Scorer
    steps: tuple  # (train_step, reference_step) of make_steps
    reference: Any  # a copy of the starting `trained`; None without --kl-coef


class State(NamedTuple):
    """Everything that a step changes and a checkpoint holds."""

    trained: dict
    opt: Any
    step: int = 0
    drawn: int = 0  # problems taken so far
    num_tokens: int = 0  # of prompts and completions so far

    @property
    def arrays(self) -> dict:
        return {"trained": self.trained, "opt": self.opt}


def rollout(setup: Setup, state: State, p: float) -> tuple[list, list, dict[str, float]]:
    """Samples one step's completions -> (groups to learn from, all groups, seconds).

    p is the share of the run that is done. With --resample, groups of new problems replace groups
    whose rewards are all equal, for at most that many rounds.
    """
    config, used, seen = setup.config, [], []
    times = {"rollout_s": 0.0, "reward_s": 0.0}
    weights = stage.forward_weights(state.trained, setup.model.fixed, jnp.dtype(config.dtype))
    logps = lambda batch, n: setup.steps[1](state.trained, setup.model.fixed, batch, n)
    for _ in range(1 + config.resample):
        chosen = setup.order.take(state.drawn + len(seen), config.prompts - len(used), p, len(seen))
        groups, took = rollouts.sample_groups(
            setup.sampler, weights, setup.model.tok, [setup.problems[i] for i in chosen],
            setup.scorer, config, step=state.step, first=len(seen), p=p, logps=logps)
        times = {k: times[k] + took[k] for k in times}
        seen += groups
        a_QG = set_advantages(groups, setup.scorer.mix, config)
        used += [group for group, a_G in zip(groups, a_QG, strict=True)
                 if a_G.any() or not config.resample]
        if len(used) == config.prompts:
            break
    if used:
        # --scale batch and --per-reward need the standard deviation over the groups kept.
        set_advantages(used, setup.scorer.mix, config)
    return used, seen, times


# ------------------------------------------------------------------------------------ advantages


def advantages(totals_QG: np.ndarray, config: Config, parts_QGC: np.ndarray | None = None,
               weights_C: np.ndarray | None = None) -> np.ndarray:
    """Rewards -> advantages [Q, G]. A missing reward (NaN) is in no mean and gets advantage 0.

    parts_QGC, weights_C: the components, for --per-reward. Standard deviations have ddof 1, as in
    torch. With scale none, [1 2 3] -> [-1 0 1], or [-1.5 0 1.5] with baseline loo.
    """

    def normalise(x, axis, divide):
        with np.errstate(invalid="ignore", divide="ignore"):
            n = np.sum(~np.isnan(x), axis=axis, keepdims=True)
            mean = np.nansum(x, axis=axis, keepdims=True) / n
            std = np.sqrt(np.nansum((x - mean) ** 2, axis=axis, keepdims=True) / (n - 1))
            d = x - mean
            if config.baseline == "loo" and axis == 1:  # r - mean of others = (r - mean) n/(n-1)
                d = d * n / (n - 1)
            # Values that are equal up to rounding become 0, and NaN stays NaN.
            d = np.where(std > 1e-9 * (1 + np.abs(mean)), d, 0 * d)
            return np.where(n > 1, d / (std + 1e-4) if divide else d, 0.0)

    if config.per_reward:  # arXiv 2601.05242
        parts = [normalise(parts_QGC[..., c], 1, True) for c in range(len(weights_C))]
        a_QG = sum(w * part for w, part in zip(weights_C, parts, strict=True))
        a_QG[np.isnan(totals_QG)] = np.nan
        # Subtracting the batch mean, which is 0 up to rounding, must not make an advantage of
        # exactly 0 nonzero.
        return np.nan_to_num(np.where(a_QG == 0, 0.0, normalise(a_QG, (0, 1), True)))
    a_QG = normalise(totals_QG, 1, config.scale == "group")
    if config.scale == "batch":
        seen = totals_QG[~np.isnan(totals_QG)]
        a_QG = a_QG / ((seen.std(ddof=1) if len(seen) > 1 else 0.0) + 1e-4)
    return np.nan_to_num(a_QG)


def token_weights(samples: list[Sample], config: Config) -> list[float]:
    """Loss weight of each completion's tokens, so that the loss is one weighted sum.

    lengths 2 and 4: sequence -> 1/4, 1/8; token -> 1/6, 1/6; constant -> 1/(2 max_new) each.
    """
    scored = lambda s: s.scored.total is not None
    kept = lambda s: scored(s) and not (config.mask_truncated and s.rollout.stop == "length")
    n_rows = sum(map(scored, samples))  # counts those that --mask-truncated leaves out
    n_tokens = sum(len(s.rollout.ids) for s in samples if kept(s))
    weight = {
        "sequence": lambda n: 1 / (n * n_rows),
        "token": lambda n: 1 / n_tokens,
        "constant": lambda n: 1 / (config.max_new * n_rows),
    }[config.loss_norm]
    return [weight(len(s.rollout.ids)) if kept(s) else 0.0 for s in samples]


def set_advantages(groups: list[list[Sample]], mix: rewards.Mix, config: Config) -> np.ndarray:
    """Sets the advantage of each sample and returns them all [Q, G]."""
    names = [name for name, weight in mix.weights.items() if weight]
    totals_QG = np.array([[s.scored.total for s in g] for g in groups], float)  # None -> NaN
    # a reward that does not apply to a row is not part of its sum
    parts_QGC = np.array([[[s.scored.parts.get(n, 0.0) for n in names] for s in g]
                          for g in groups], float)
    parts_QGC[np.isnan(totals_QG)] = np.nan
    a_QG = advantages(totals_QG, config, parts_QGC, np.array([mix.weights[n] for n in names]))
    for group, a_G in zip(groups, a_QG, strict=True):
        for sample, a in zip(group, a_G, strict=True):
            sample.advantage = float(a)
    return a_QG


# ------------------------------------------------------------------------------------------ loss


def policy_loss(logp_BT, b: dict, config: Config):
    """Weighted sum of the tokens' losses -> (sum, sums of metrics over completion tokens).

    b holds arrays [B, T] aligned with logp_BT: weight, advantage, mask, segments, and log-probs of
    three policies: sampler (as sampled), old (the same weights by the trainer; unused if
    on_policy), ref (the starting model).
    --entropy-coef reads entropy [B, T] and n_tokens, the completion tokens of the whole update.
    """
    now_BT, mask_BT = lax.stop_gradient(logp_BT), b["mask"]
    old_BT = jnp.where(b["on_policy"], now_BT, b["old"])

    # 1. how much likelier a token, or its completion, is than when it was sampled
    log_ratio_BT = jnp.where(mask_BT > 0, logp_BT - old_BT, 0.0)
    if config.ratio_level in ("sequence", "sequence-token"):  # arXiv 2507.18071
        mean_BT = sequence_mean(log_ratio_BT, b)
        each_BT = lax.stop_gradient(mean_BT) + logp_BT - now_BT
        log_ratio_BT = mean_BT if config.ratio_level == "sequence" else each_BT
    ratio_BT = jnp.exp(log_ratio_BT)

    # 2. the objective, which limits how much a large ratio can gain
    objective_BT, too_low_BT, too_high_BT = limited(log_ratio_BT, logp_BT, b, config)
    metrics = {"clip_ratio/low_mean": too_low_BT, "clip_ratio/high_mean": too_high_BT,
               "clip_ratio/region_mean": too_low_BT | too_high_BT}

    # 3. factors without a gradient: the importance correction, then the off-policy mask
    if config.is_cap:
        trust_BT = importance(old_BT - b["sampler"], b, config)
        objective_BT *= trust_BT
        metrics["sampling/importance_sampling_ratio/mean"] = trust_BT
    if config.off_policy_mask:  # arXiv 2512.02556, equation 9
        stale_BT = sequence_mean(b["sampler"] - now_BT, b) > config.off_policy_mask
        dropped_BT = stale_BT & (b["advantage"] < 0)
        objective_BT = jnp.where(dropped_BT, 0.0, objective_BT)
        metrics["off_policy_masked"] = dropped_BT
    loss_BT = -objective_BT

    # 4. the distance from the starting model
    if config.kl_coef:
        d_BT = mask_BT * (b["ref"] - logp_BT)
        kl_BT = jnp.exp(d_BT) - d_BT - 1  # k3
        if config.kl_unbiased:
            kl_BT *= ratio_BT
        loss_BT += config.kl_coef * kl_BT
        metrics |= {"kl": kl_BT, "kl_k1": -d_BT, "kl_k2": d_BT**2 / 2}

    # 5. the weighted sum; the weights make it the mean that --loss-norm names
    total = jnp.sum(jnp.where(mask_BT > 0, b["weight"] * loss_BT, 0.0))
    if config.entropy_coef:  # the mean over tokens, whatever --loss-norm is
        total -= config.entropy_coef * jnp.sum(mask_BT * b["entropy"]) / b["n_tokens"]
    return total, {k: jnp.sum(mask_BT * lax.stop_gradient(v)) for k, v in metrics.items()}


def limited(log_ratio_BT, logp_BT, b: dict, config: Config):
    """The objective of each token, and whether its ratio was too low or too high, all [B, T]."""
    a_BT, low, high = b["advantage"], 1 - config.clip_low, 1 + config.clip_high
    ratio_BT, never_BT = jnp.exp(log_ratio_BT), jnp.zeros_like(logp_BT, bool)
    if config.ratio_level == "geometric":  # GMPO, arXiv 2507.20673: clip in log space, then average
        low, high = -config.clip_low, config.clip_high
        clipped_BT = jnp.where(a_BT > 0, jnp.minimum(log_ratio_BT, high),
                               jnp.maximum(log_ratio_BT, low))
        objective_BT = jnp.exp(sequence_mean(clipped_BT, b)) * a_BT
        return objective_BT, (log_ratio_BT < low) & (a_BT < 0), (log_ratio_BT > high) & (a_BT > 0)
    if config.cispo_cap:  # arXiv 2506.13585, equation 4
        capped_BT = lax.stop_gradient(jnp.minimum(ratio_BT, config.cispo_cap))
        return capped_BT * a_BT * logp_BT, never_BT, ratio_BT > config.cispo_cap
    if config.sapo:  # arXiv 2511.20347
        t_BT = jnp.where(a_BT > 0, config.sapo_pos, config.sapo_neg)
        return 4 / t_BT * jax.nn.sigmoid(t_BT * (ratio_BT - 1)) * a_BT, never_BT, never_BT
    clipped_BT = jnp.clip(ratio_BT, low, high)  # PPO, arXiv 1707.06347
    if config.dual_clip:  # arXiv 1912.09729, equation 5
        ratio_BT = jnp.minimum(ratio_BT, config.dual_clip)
    objective_BT = jnp.minimum(ratio_BT * a_BT, clipped_BT * a_BT)
    return objective_BT, (ratio_BT < low) & (a_BT < 0), (ratio_BT > high) & (a_BT > 0)


def importance(difference_BT, b: dict, config: Config):
    """Importance weight [B, T] of each token.

    difference_BT: the trainer's log-prob minus the sampler's.
    """
    difference_BT = jnp.where(b["mask"] > 0, difference_BT, 0.0)
    if config.is_level == "sequence":
        difference_BT = sequence_sum(difference_BT, b)
    ratio_BT = jnp.exp(difference_BT)
    inside_BT = jnp.clip(ratio_BT, config.is_floor, config.is_cap)
    if config.is_mode == "truncate":
        return inside_BT
    return jnp.where(inside_BT == ratio_BT, ratio_BT, 0.0)


def sequence_sum(x_BT, b: dict):
    """The sum over each token's own completion, [B, T]: tokens 1 2 | 3 of two -> 3 3 | 3."""
    same_BTT = (b["segments"][:, :, None] == b["segments"][:, None, :]).astype(jnp.float32)
    counted_BT = jnp.where(b["mask"] > 0, x_BT, 0.0)
    return jnp.einsum("BTS,BS->BT", same_BTT, counted_BT, precision="highest")


def sequence_mean(x_BT, b: dict):
    return sequence_sum(x_BT, b) / jnp.maximum(sequence_sum(jnp.ones_like(x_BT), b), 1.0)


def token_logps(trained, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """Log-probs and entropies [B, T] of the completion tokens of B packed rows; 0 elsewhere."""
    params, adapter = stage.forward_weights(trained, fixed, jnp.dtype(config.dtype))
    x_BTD = gemma.hidden(params, cfg, b["tokens"], b["positions"], b["segments"], b["parents"],
                         lora=adapter, remat=config.remat, fsdp=fsdp)
    # The prompt's last token, wherever in the row it is, predicts a completion's first token.
    x_BTD = jnp.take_along_axis(x_BTD, b["source"][:, :, None], axis=1)
    return gemma.token_logps(
        x_BTD, gemma.head(params, cfg, fsdp), b["tokens"], temperature=config.temperature,
        softcap=cfg.final_logit_softcapping, wanted_BT=b["mask"],
    )


def loss(trained, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """The loss of one micro-batch -> (sum, (sums of metrics, logp_BT)). Per-device sizes."""
    logp_BT, entropy_BT = token_logps(trained, fixed, b, cfg, config, fsdp)
    total, metrics = policy_loss(logp_BT, b | {"entropy": entropy_BT}, config)
    metrics["entropy"] = jnp.sum(b["mask"] * lax.stop_gradient(entropy_BT))
    return total, (metrics, lax.stop_gradient(logp_BT))


# ------------------------------------------------------------------------------------ train_step


def grads(trained, fixed, batch, n_micro, on_policy, *, specs, cfg, config, fsdp):
    """Gradient of the loss over one update; runs on each device (per-device sizes).

    batch: arrays [max. micro-batches, B, T], of which the first n_micro are computed; n_micro is
    traced, so a new value does not recompile. -> (gradient, metrics, logp).
    """
    replicated = jax.tree.map(lambda s: "data" not in s, specs)
    # Make replicated leaves varying; otherwise their gradients arrive summed over devices.
    trained = jax.tree.map(lambda r, x: stage.vary(x) if r else x, replicated, trained)
    f = jax.value_and_grad(partial(loss, cfg=cfg, config=config, fsdp=fsdp), has_aux=True)

    n_tokens = lax.psum(jnp.sum(batch["mask"]), "data")

    def one(i):
        b = jax.tree.map(lambda x: x[i], batch) | {"on_policy": on_policy, "n_tokens": n_tokens}
        (total, (metrics, logp_BT)), g = f(trained, fixed, b)
        return (g, metrics | {"loss": total}), logp_BT

    def micro(i, carry):
        sums, logp_nBT = carry
        new, logp_BT = one(i)
        return jax.tree.map(jnp.add, sums, new), logp_nBT.at[i].set(logp_BT)

    sums, _ = jax.eval_shape(one, 0)
    zeros = jax.tree.map(lambda x: stage.vary(jnp.zeros(x.shape)), sums)
    (g, metrics), logp_nBT = lax.fori_loop(
        0, n_micro, micro, (zeros, jnp.zeros_like(batch["sampler"]))
    )
    metrics = lax.psum(metrics, "data")
    metrics = {k: v if k == "loss" else v / jnp.maximum(n_tokens, 1.0) for k, v in metrics.items()}
    # Replicated: g{unreduced} -> all-reduce. Sharded: the transpose of all-gather has already
    # summed it over the devices.
    g = jax.tree.map(lambda r, x: lax.psum(x, "data") if r else x, replicated, g)
    return g, metrics, logp_nBT


def reference_logps(reference, fixed, batch, n_micro, *, cfg, config, fsdp):
    """Log-probs [max. micro-batches, B, T] under the starting weights; runs on each device."""

    def micro(i, logp_nBT):
        b = jax.tree.map(lambda x: x[i], batch)
        return logp_nBT.at[i].set(token_logps(reference, fixed, b, cfg, config, fsdp)[0])

    return lax.fori_loop(0, n_micro, micro, jnp.zeros_like(batch["sampler"]))


def grads_on_mesh(cfg, config, mesh, sharded: bool, check_vma: bool = True):
    """grads() under shard_map: (trained, fixed, batch, n_micro, on_policy) -> its results."""
    specs, fixed = stage.partition_specs(cfg, config, sharded)
    fsdp, rows = "data" if sharded else None, P(None, "data")
    return jax.shard_map(
        partial(grads, specs=specs, cfg=cfg, config=config, fsdp=fsdp), mesh=mesh,
        in_specs=(specs, fixed, rows, P(), P()), out_specs=(specs, P(), rows), check_vma=check_vma,
    )


def make_steps(cfg: gemma.Config, config: Config, mesh: Mesh, sharded: bool):
    """Jitted train_step(trained, opt, fixed, batch, n_micro, on_policy, lr), reference(...)."""
    check_vma = not gemma.on_tpu(mesh)  # JAX's splash attention raises under True
    mesh_grads = grads_on_mesh(cfg, config, mesh, sharded, check_vma)
    tx = stage.optimizer(config)

    @partial(jax.jit, donate_argnums=(0, 1))
    def train_step(trained, opt, fixed, batch, n_micro, on_policy, lr):
        g, metrics, logp_nBT = mesh_grads(trained, fixed, batch, n_micro, on_policy)
        metrics["grad_norm"] = optax.global_norm(g)
        updates, opt = tx.update(g, opt, trained)  # outside shard_map: clipping needs global norms
        trained = jax.tree.map(lambda x, u: x - lr * u, trained, updates)
        return trained, opt, metrics, logp_nBT

    specs, fixed = stage.partition_specs(cfg, config, sharded)
    fsdp, rows = "data" if sharded else None, P(None, "data")
    reference = jax.jit(jax.shard_map(
        partial(reference_logps, cfg=cfg, config=config, fsdp=fsdp), mesh=mesh,
        in_specs=(specs, fixed, rows, P()), out_specs=rows, check_vma=check_vma,
    ))
    return train_step, reference


def programs(config: Config, mesh: Mesh) -> dict:
    """Each jitted function of a run with its argument shapes: name -> (function, arguments)."""
    config = resolve(config)
    cfg = stage.shape_of(config.model, config.weights)
    sharded = stage.base_is_sharded(cfg, config, mesh)
    train_step, reference = make_steps(cfg, config, mesh, sharded)
    specs = stage.partition_specs(cfg, config, sharded)
    weights = partial(stage.random_weights, cfg, config)
    trained, opt, fixed = stage.state_shapes(config, mesh, weights, specs)
    batch = rollouts.packed_shapes(config, mesh)
    n_micro, flag, lr = (jax.ShapeDtypeStruct((), t) for t in (jnp.int32, jnp.bool, jnp.float32))
    out = rollouts.programs(cfg, config, mesh, trained, fixed)
    out["train_step"] = train_step, (trained, opt, fixed, batch, n_micro, flag, lr)
    if config.kl_coef or "prob" in rewards.read_mix(config.rewards, config.reward_file).weights:
        out["reference"] = reference, (trained, fixed, batch, n_micro)
    return out


# ------------------------------------------------------------------------------------ one update


def update(setup: Setup, state: State, samples: list[Sample],
           lr: float) -> tuple[State, dict[str, float], dict]:
    """Makes --inner-epochs updates on one set of samples -> (state, last metrics, the batch)."""
    began, (config, mesh, model) = time.perf_counter(), setup[:3]
    train_step, reference_step = setup.steps
    trained, opt = state.trained, state.opt
    host, n_micro, spans = rollouts.pack(samples, token_weights(samples, config), config, mesh.size,
                                         all_advantages=bool(config.entropy_coef))
    # No completion has a gradient. Skip the update, because Adam's momentum alone would move the
    # weights.
    if not n_micro:
        return state._replace(step=state.step + 1), {"update_s": 0.0}, host
    batch, n = stage.put(host, mesh, P(None, "data")), np.int32(n_micro)
    if config.kl_coef:
        ref = reference_step(setup.reference, model.fixed, batch, n)
        batch["ref"] = jax.block_until_ready(ref)
    reference_s = time.perf_counter() - began
    for epoch in range(config.inner_epochs):
        trained, opt, metrics, logp = train_step(
            trained, opt, model.fixed, batch, n, np.bool(epoch == 0), np.float32(lr))
        if epoch == 0:
            batch["old"] = logp
    metrics = {k: float(v) for k, v in jax.device_get(metrics).items()}
    logp_RT = np.asarray(hosts.whole(batch["old"])).reshape(-1, config.pack_length)
    metrics |= rollouts.drift(samples, spans, logp_RT) | {
        "padding": 1 - (host["segments"] > 0).sum() / (n_micro * host["segments"][0].size),
        "reference_s": reference_s,
        "update_s": time.perf_counter() - began - reference_s,
    }
    return state._replace(trained=trained, opt=opt, step=state.step + 1), metrics, host


# ------------------------------------------------------------------------------------------ main


def load_rows(config: Config, tok: data.Tokenizer) -> tuple[list[Problem], list[Problem]]:
    """(problems to learn from, held-out ones) of a resolved Config."""
    return rollouts.load_split(config, rollouts.problem_reader(config, tok))


@terminal.one_line
def main(config: Config) -> Path | dict:
    """Trains, and returns the folder that the next stage takes as --adapter."""
    terminal.check_versions()
    if config.plan:
        import bench  # here: bench imports this file

        return bench.plan("grpo", config)
    config = resolve(config)
    mesh = stage.begin(config)

    # load
    model = stage.load_model(config, mesh)
    problems, held_out = load_rows(config, model.tok)
    reference = stage.reference_copy(model.trained, config) if config.kl_coef else None
    state = State(model.trained, stage.init_optimizer(config, model.trained, mesh, model.specs))
    model = model._replace(trained=None)  # so a resumed run does not hold the starting weights too

    # compile
    steps = make_steps(model.cfg, config, mesh, model.sharded)
    sampler = rollouts.make_sampler(model.cfg, config, mesh)

    # loop: rollout -> reward -> advantage -> update -> log -> save
    facts = stage.facts(config, model, [problems], held_out)
    with (runs.Run(config, SHOWN, every_s=0.0, facts=facts) as run,
          rollouts.Scorer(config, problems, mesh) as scorer):
        setup = Setup(config, mesh, model, problems,
                      rollouts.Order(problems, config.curriculum, config.seed), sampler, scorer,
                      steps, reference)
        stage.keep_held_out(config, held_out)

        def evaluate() -> float:
            weights = stage.forward_weights(state.trained, model.fixed, jnp.dtype(config.dtype))
            return rollouts.evaluate(sampler, weights, model.tok, held_out, state.step, run)

        def write(folder: Path | None) -> None:
            stage.write_model(folder, config, model, state.trained)

        def save(score: float | None = None) -> None:
            counters = {"drawn": state.drawn, "num_tokens": state.num_tokens}
            run.save(state.step, state.arrays, counters, write, score)

        saved = run.restore(state.arrays)
        if saved is not None:
            arrays = stage.put_like(saved.arrays, state.arrays)
            state, saved = State(**arrays, step=saved.step, **saved.state), None
        elif config.eval_every:
            evaluate()

        while (p := run.progress(state.step)) < 1 and not run.stopping:
            began, lr = time.perf_counter(), stage.schedule(p, config)
            used, seen, times = rollout(setup, state, p)
            state, metrics, batch = update(setup, state, [s for group in used for s in group], lr)
            samples = [s for group in seen for s in group]
            n_tokens = sum(len(s.rollout.ids) + len(s.problem.prompt) for s in samples)
            state = state._replace(drawn=state.drawn + len(seen),
                                   num_tokens=state.num_tokens + n_tokens)
            step_s = time.perf_counter() - began
            run.check_finite(state.step, metrics, batch)
            rollouts.log_step(run, scorer, state.step, seen, metrics | times | {
                "learning_rate": lr, "p": p, "num_tokens": state.num_tokens, "step_s": step_s,
                "tokens_per_s": n_tokens / step_s})
            if trouble := scorer.trouble([s.scored for s in samples]):
                save()
                raise SystemExit(f"step {state.step}: {trouble}")
            if run.due(config.eval_every, state.step):
                save(evaluate())
            elif run.due(config.save_every, state.step):
                save()
        return run.end(state.step, save, evaluate, write)


if __name__ == "__main__":
    import commandline

    terminal.command(lambda: main(commandline.cli(Config, description=__doc__)))
