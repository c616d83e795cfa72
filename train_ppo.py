"""Proximal policy optimisation with a critic that costs an adapter, not a model.

The critic is a second LoRA adapter on the same frozen base, with a linear head. From each prefix of
a completion it estimates the reward still to come, the value V. Generalised advantage estimation
(arXiv 1506.02438) compares rewards with values, and both adapters make several clipped updates
(1707.06347):

    delta_t = r_t + gamma V_t+1 - V_t
    A_t = delta_t + gamma lam A_t+1,  return_t = A_t + V_t
    policy loss = mean over tokens of
        -min(ratio A, clip(ratio, 1 - low, 1 + high) A)
    value loss = mean of
        max((V - return)^2, (clip(V, V_old - c, V_old + c) - return)^2) / 2

    python train_ppo.py                     # the tiny model, CPU, four minutes
    python train_ppo.py --model gemma3-1b --adapter runs/sft --time-limit 8h30m

Rollouts, packed rows and missing rewards are as in train_grpo.py. What PPO adds:

1. The critic starts as a copy of the policy's starting adapter, with a head of zeros. final/ holds
   only the policy's adapter; checkpoints hold the critic too.
2. Hidden states are normalised before the head, so that one learning rate suits every Gemma.
3. One pass before the updates computes the old log-probs and values. GAE then runs on the host, for
   each completion by itself, and advantages are whitened over all tokens of the step.
4. Each epoch shuffles the packed micro-batches and splits them into minibatches. The loss of a
   minibatch is the mean over its own tokens on all devices.

What to expect: reward and held-out accuracy rise; explained_variance (1: the critic predicts every
return, 0: no better than their mean) follows slowly.
"""

import dataclasses
import time
from functools import partial
from pathlib import Path
from typing import Literal, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import data
import gemma
import hosts
import rollouts
import runs
import settings
import stage
import terminal
from rollouts import Problem, Sample

# ---------------------------------------------------------------------------------------- config


@dataclasses.dataclass(frozen=True)
class Config(rollouts.Settings):
    """Fields left at None take the model's defaults from DEFAULTS; the result is printed."""

    # the run
    out: str = "runs/ppo"

    # LoRA
    lora_rank: int | None = None
    """Rank of the policy's adapter and of the critic's; by default that of --adapter."""

    # algorithm
    inner_epochs: int = 1
    """Passes over a step's completions."""
    minibatches: int = 4
    """Minibatches of each pass, one update each."""
    gamma: float = 1.0
    """Discount of later rewards, per token."""
    lam: float = 1.0
    """GAE's lambda. 1: advantage = reward still to come - value; 0: advantage = the token's reward
    + gamma times the next value - value."""
    whiten: bool = True
    """Shift and scale the step's advantages to mean 0 and standard deviation 1."""
    clip_low: float = 0.2
    """Ratios below 1 - clip_low are clipped."""
    clip_high: float = 0.2
    """Ratios above 1 + clip_high are clipped."""
    dual_clip: float = 0.0
    """Cap the ratio here where the advantage is negative, for example at 3 (arXiv 1912.09729);
    0: no cap."""
    value_clip: float = 0.2
    """Moving a value farther than this from its old one lowers the loss no more; 0: no clipping."""
    value_lr: float | None = None
    """Peak learning rate of the critic, on the policy's schedule."""
    value_warmup: int = 3
    """First steps of the run, in which only the critic learns."""
    kl_coef: float | None = None
    """Weight of the KL divergence from the starting model; 0 skips the reference pass."""
    kl_in: Literal["reward", "loss"] = "reward"
    """Where the KL term goes. reward: k1 is subtracted from each token's reward; loss: k3 is added
    to the policy's loss."""


REAL = dict(
    dtype="bfloat16", data="gsm8k", rows=0, system=data.SYSTEM, rewards="format:0.5,answer:1",
    prompts=32, max_prompt=512, max_new=768, slots=32, kl_coef=0.02, lora_rank=64,
    steps=500, pack_length=2048, micro_rows=1, learning_rate=1e-5, value_lr=5e-5, remat="auto",
    eval_every=50, eval_rows=256, save_every=25,
)
DEFAULTS = {
    "tiny": dict(
        dtype="float32", data="problems", rows=5000, system="", rewards="format:0.1,answer:1",
        prompts=16, max_prompt=88, max_new=104, slots=64, kl_coef=0.0, lora_rank=16,
        steps=75, pack_length=384, micro_rows=1, learning_rate=1e-3, value_lr=3e-3, remat="none",
        eval_every=25, eval_rows=200, save_every=25,
    ),
    "gemma2": REAL, "gemma3": REAL,
    **dict.fromkeys(gemma.LARGE, REAL | dict(lora_rank=32, slots=8)),
}
SHOWN = {  # metrics printed each step; metrics.jsonl has all of them
    "reward": "reward {:5.2f}", "accuracy": "right {:4.0%}",
    "explained_variance": "explained {:5.2f}", "step_s": "{:5.1f} s",
}


def resolve(config: Config) -> Config:
    """Fills the fields left at None from the model's defaults, and checks the rest."""
    config = settings.resolve(config, DEFAULTS)
    if config.lora_rank < 1:
        raise ValueError(f"--lora-rank {config.lora_rank}: expected 1 or more, because policy and "
                         "critic are adapters on one frozen base")
    if config.dual_clip and config.dual_clip <= 1 + config.clip_high:
        raise ValueError(f"--dual-clip {config.dual_clip:g}: expected more than 1 + --clip-high = "
                         f"{1 + config.clip_high:g}")
    if config.kl_in != Config.kl_in and not config.kl_coef:
        raise ValueError(f"--kl-in {config.kl_in} has no effect without --kl-coef")
    rollouts.check_settings(config)
    rollouts.check_rewards(config)
    return config


class State(NamedTuple):
    """Everything that a step changes and a checkpoint holds."""

    arrays: dict  # {"trained", "opt"}, each {"policy", "critic"}
    step: int = 0
    drawn: int = 0  # problems taken so far
    num_tokens: int = 0  # of prompts and completions so far


def start_of(policy: dict, cfg: gemma.Config, config: Config) -> dict:
    """State.arrays at the start: the critic is a copy of the policy's adapter, with a head."""
    critic = {"adapter": stage.reference_copy(policy, config), "bias": jnp.zeros(()),
              "head": jnp.zeros(cfg.hidden_size)}
    trained, tx = {"policy": policy, "critic": critic}, stage.optimizer(config)
    return {"trained": trained, "opt": {part: tx.init(x) for part, x in trained.items()}}


# ------------------------------------------------------------------------------------ advantages


def gae(rewards_BT, values_BT, mask_BT, gamma: float, lam: float) -> tuple[np.ndarray, np.ndarray]:
    """Advantages and returns [B, T], float64, of one completion per row; 0 where the mask is 0.

    Tokens with mask 0 are skipped, as if the row did not hold them. With gamma = lam = 1, rewards
    0 0 1, values .2 .5 .6 -> advantages .8 .5 .4, returns 1 1 1.
    """
    rewards_BT, values_BT, mask_BT = (
        np.asarray(x, np.float64) for x in (rewards_BT, values_BT, mask_BT))
    advantages_BT, next_B, value_B = np.zeros_like(values_BT), 0.0, 0.0
    for t in reversed(range(values_BT.shape[1])):
        delta_B = rewards_BT[:, t] + gamma * value_B - values_BT[:, t]
        here_B = mask_BT[:, t] > 0
        next_B = np.where(here_B, delta_B + gamma * lam * next_B, next_B)
        value_B = np.where(here_B, values_BT[:, t], value_B)
        advantages_BT[:, t] = np.where(here_B, next_B, 0.0)
    return advantages_BT, np.where(mask_BT > 0, advantages_BT + values_BT, 0.0)


def whiten(x_BT: np.ndarray, mask_BT: np.ndarray) -> np.ndarray:
    """Shifts and scales x to mean 0 and variance 1 (ddof 1) over the mask; 0 elsewhere."""
    x = x_BT[mask_BT > 0]
    variance = x.var(ddof=1) if len(x) > 1 else 0.0
    return np.where(mask_BT > 0, (x_BT - x.mean()) / np.sqrt(variance + 1e-8), 0.0)


def set_advantages(samples: list[Sample], spans: list, before: dict, config: Config) -> tuple:
    """Runs GAE -> ({"advantage", "return"} of packed rows [R, T], metrics).

    Also sets each sample's advantage, to the mean over its tokens. before: {"old", "value", "ref"}
    of the same rows; spans: from rollouts.pack.
    """
    lengths = np.array([span.stop - span.start for _, _, span in spans])
    mask_BC = np.arange(lengths.max()) < lengths[:, None]  # one completion per row
    rows = np.repeat([r for _, r, _ in spans], lengths)
    columns = np.concatenate([np.arange(span.start, span.stop) for _, _, span in spans])
    at = {k: np.zeros(mask_BC.shape) for k in (*before, "reward")}
    for k, x_RT in before.items():
        at[k][mask_BC] = x_RT[rows, columns]
    at["reward"][np.arange(len(spans)), lengths - 1] = [samples[i].scored.total for i, *_ in spans]
    metrics = {"value_mean": at["value"][mask_BC].mean()}
    if config.kl_coef:
        d_BC = at["ref"] - at["old"]
        metrics |= {"kl": (np.exp(d_BC) - d_BC - 1)[mask_BC].mean(), "kl_k1": -d_BC[mask_BC].mean()}
        if config.kl_in == "reward":
            at["reward"] += config.kl_coef * d_BC
    advantage_BC, return_BC = gae(at["reward"], at["value"], mask_BC, config.gamma, config.lam)
    unexplained, spread = advantage_BC[mask_BC].var(), return_BC[mask_BC].var()
    metrics["explained_variance"] = 1 - unexplained / spread if spread else 0.0
    if config.whiten:
        advantage_BC = whiten(advantage_BC, mask_BC)
    targets = {k: np.zeros_like(before["value"]) for k in ("advantage", "return")}
    targets["advantage"][rows, columns] = advantage_BC[mask_BC]
    targets["return"][rows, columns] = return_BC[mask_BC]
    for (i, *_), total, length in zip(spans, advantage_BC.sum(axis=1), lengths, strict=True):
        samples[i].advantage = float(total / length)
    return targets, {k: float(v) for k, v in metrics.items()}


# ------------------------------------------------------------------------------------------ loss


def policy_loss(logp_BT, old_BT, advantage_BT, mask_BT, clip_low: float = 0.2,
                clip_high: float = 0.2, dual_clip: float = 0.0) -> tuple:
    """The clipped loss -> (sum over the mask, count, sums of metrics).

    old_BT: log-probs of the same tokens before the updates.
    """
    log_ratio_BT = jnp.where(mask_BT > 0, logp_BT - old_BT, 0.0)
    ratio_BT, low, high = jnp.exp(log_ratio_BT), 1 - clip_low, 1 + clip_high
    gain_BT = jnp.minimum(ratio_BT * advantage_BT, jnp.clip(ratio_BT, low, high) * advantage_BT)
    metrics = {"clip_ratio/region_mean": gain_BT < ratio_BT * advantage_BT}
    if dual_clip:
        floor_BT = jnp.where(advantage_BT < 0, dual_clip * advantage_BT, -jnp.inf)
        metrics["clip_ratio/dual_mean"] = gain_BT < floor_BT
        gain_BT = jnp.maximum(gain_BT, floor_BT)
    metrics["approx_kl"] = ratio_BT - 1 - log_ratio_BT  # k3, from the policy before the updates
    metrics = {k: jnp.sum(mask_BT * lax.stop_gradient(v)) for k, v in metrics.items()}
    total = jnp.sum(jnp.where(mask_BT > 0, -gain_BT, 0.0))
    return total, jnp.sum(mask_BT), metrics


def value_loss(value_BT, old_BT, return_BT, mask_BT, clip: float = 0.2) -> tuple:
    """The clipped squared error -> (sum over the mask, count, sums of metrics); clip 0: off."""
    near_BT = jnp.clip(value_BT, old_BT - clip, old_BT + clip) if clip else value_BT
    error_BT, clipped_BT = (value_BT - return_BT) ** 2, (near_BT - return_BT) ** 2
    total = jnp.sum(jnp.where(mask_BT > 0, 0.5 * jnp.maximum(error_BT, clipped_BT), 0.0))
    return total, jnp.sum(mask_BT), {"value_clip_ratio": jnp.sum(mask_BT * (clipped_BT > error_BT))}


def states(adapter, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """Hidden states [B, T, D], under an adapter, of the token before each completion token.

    Before a completion's first token comes the prompt's last, wherever in the row that is.
    """
    x_BTD = gemma.hidden(fixed["base"], cfg, b["tokens"], b["positions"], b["segments"],
                         b["parents"], lora=adapter | {"scale": fixed["scale"]},
                         remat=config.remat, fsdp=fsdp)
    return jnp.take_along_axis(x_BTD, b["source"][:, :, None], axis=1)


def token_logps(policy, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """Log-probs and entropies [B, T] of the completion tokens of B packed rows; 0 elsewhere."""
    x_BTD = states(policy, fixed, b, cfg, config, fsdp)
    return gemma.token_logps(x_BTD, gemma.head(fixed["base"], cfg, fsdp), b["tokens"],
                             temperature=config.temperature, wanted_BT=b["mask"],
                             softcap=cfg.final_logit_softcapping)


def token_values(critic, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """Values [B, T] of the prefixes that end before each completion token; 0 elsewhere."""
    x_BTD = states(critic["adapter"], fixed, b, cfg, config, fsdp).astype(jnp.float32)
    x_BTD = gemma.rms_norm(x_BTD, jnp.zeros(cfg.hidden_size), cfg.rms_norm_eps)
    value_BT = jnp.einsum("BTD,D->BT", x_BTD, critic["head"], precision="highest")
    return jnp.where(b["mask"] > 0, value_BT + critic["bias"], 0.0)


def policy_part(policy, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """The policy's loss of one micro-batch -> (sum, (count, sums of metrics)); per-device sizes."""
    logp_BT, entropy_BT = token_logps(policy, fixed, b, cfg, config, fsdp)
    total, count, metrics = policy_loss(logp_BT, b["old"], b["advantage"], b["mask"],
                                        config.clip_low, config.clip_high, config.dual_clip)
    if config.kl_coef and config.kl_in == "loss":
        d_BT = b["mask"] * (b["ref"] - logp_BT)
        total += config.kl_coef * jnp.sum(jnp.exp(d_BT) - d_BT - 1)
    entropy = jnp.sum(b["mask"] * lax.stop_gradient(entropy_BT))
    return total, (count, metrics | {"entropy": entropy, "policy_loss": total})


def critic_part(critic, fixed, b: dict, cfg: gemma.Config, config: Config, fsdp: str | None):
    """The critic's loss of one micro-batch -> (sum, (count, sums of metrics)); per-device sizes."""
    value_BT = token_values(critic, fixed, b, cfg, config, fsdp)
    total, count, metrics = value_loss(value_BT, b["value"], b["return"], b["mask"],
                                       config.value_clip)
    return total, (count, metrics | {"value_loss": total})


# ----------------------------------------------------------------------------------- train steps


def grads(trained, fixed, batch, minibatch, *, loss, cfg, config, fsdp):
    """Gradient of a loss over one minibatch; runs on each device (per-device sizes).

    batch: arrays [max. micro-batches, B, T]. minibatch: (chosen, n) are traced, so new values do
    not recompile; the micro-batches chosen[:n] are computed. -> (gradient, metrics), each the mean
    over the minibatch's tokens.
    """
    chosen, n = minibatch
    # Make replicated leaves varying; otherwise their gradients arrive summed over devices.
    trained = jax.tree.map(stage.vary, trained)
    f = jax.value_and_grad(partial(loss, cfg=cfg, config=config, fsdp=fsdp), has_aux=True)

    def one(i):
        (_, (count, metrics)), g = f(trained, fixed, jax.tree.map(lambda x: x[chosen[i]], batch))
        return g, count, metrics

    zeros = jax.tree.map(lambda x: stage.vary(jnp.zeros(x.shape)), jax.eval_shape(one, 0))
    sums = lax.fori_loop(0, n, lambda i, sums: jax.tree.map(jnp.add, sums, one(i)), zeros)
    g, count, metrics = lax.psum(sums, "data")  # sums{unreduced} -> all-reduce
    return jax.tree.map(lambda x: x / jnp.maximum(count, 1.0), (g, metrics))


def estimates(arrays, fixed, batch, n_micro, *, cfg, config, fsdp):
    """Old and reference log-probs, and values, before the updates; runs on each device.

    Each is [max. micro-batches, B, T].
    """
    adapters = {"old": "policy"} | ({"ref": "reference"} if config.kl_coef else {})

    def micro(i, out):
        b = jax.tree.map(lambda x: x[i], batch)
        new = {k: token_logps(arrays[part], fixed, b, cfg, config, fsdp)[0]
               for k, part in adapters.items()}
        new["value"] = token_values(arrays["critic"], fixed, b, cfg, config, fsdp)
        return {k: out[k].at[i].set(x) for k, x in new.items()}

    zeros = dict.fromkeys((*adapters, "value"), jnp.zeros_like(batch["mask"]))
    return lax.fori_loop(0, n_micro, micro, zeros)


def on_mesh(f, out_specs, cfg, config, mesh, sharded: bool, check_vma: bool = True):
    """grads or estimates under shard_map: (arrays, fixed, batch, which) -> its results."""
    fixed, fsdp = stage.partition_specs(cfg, config, sharded)[1], "data" if sharded else None
    return jax.shard_map(
        partial(f, cfg=cfg, config=config, fsdp=fsdp), mesh=mesh, out_specs=out_specs,
        in_specs=(P(), fixed, P(None, "data"), P()), check_vma=check_vma)


def make_steps(cfg: gemma.Config, config: Config, mesh: Mesh, sharded: bool):
    """Jitted (estimate, policy's step, critic's step): estimate(arrays, fixed, batch, n_micro),
    step(trained, opt, fixed, batch, minibatch, lr) -> (trained, opt, metrics)."""
    tx = stage.optimizer(config)
    here = cfg, config, mesh, sharded, not gemma.on_tpu(mesh)  # splash attention raises under True

    def make_step(part: str, loss, norm: str):
        mesh_grads = on_mesh(partial(grads, loss=loss), P(), *here)

        @partial(jax.jit, donate_argnums=(0, 1))
        def step(trained, opt, fixed, batch, minibatch, lr):
            g, metrics = mesh_grads(trained[part], fixed, batch, minibatch)
            metrics[norm] = optax.global_norm(g)
            updates, moments = tx.update(g, opt[part], trained[part])
            moved = jax.tree.map(lambda x, u: x - lr * u, trained[part], updates)
            return trained | {part: moved}, opt | {part: moments}, metrics

        return step

    estimate = jax.jit(on_mesh(estimates, P(None, "data"), *here))
    return (estimate, make_step("policy", policy_part, "grad_norm"),
            make_step("critic", critic_part, "value_grad_norm"))


def programs(config: Config, mesh: Mesh) -> dict:
    """Each jitted function of a run with its argument shapes: name -> (function, arguments)."""
    config = resolve(config)
    cfg = stage.shape_of(config.model, config.weights)
    sharded = stage.base_is_sharded(cfg, config, mesh)
    estimate, policy_step, critic_step = make_steps(cfg, config, mesh, sharded)
    policy, _, fixed = stage.state_shapes(config, mesh, partial(stage.random_weights, cfg, config),
                                          stage.partition_specs(cfg, config, sharded))
    shape = partial(jax.ShapeDtypeStruct, sharding=NamedSharding(mesh, P()))
    start = jax.eval_shape(partial(start_of, cfg=cfg, config=config), policy)
    trained, opt = jax.tree.map(lambda x: shape(x.shape, x.dtype), (start["trained"], start["opt"]))
    batch = rollouts.packed_shapes(config, mesh)
    every = batch | dict.fromkeys(("value", "return"), batch["old"])
    before = trained | {"reference": policy if config.kl_coef else None}
    n, lr = (jax.ShapeDtypeStruct((), t) for t in (jnp.int32, jnp.float32))
    minibatch = jax.ShapeDtypeStruct(batch["old"].shape[:1], jnp.int32), n
    out = rollouts.programs(cfg, config, mesh, policy, fixed)
    out["estimate"] = estimate, (before, fixed, batch, n)
    out["train_step"] = policy_step, (trained, opt, fixed, every, minibatch, lr)
    out["critic_step"] = critic_step, (trained, opt, fixed, every, minibatch, lr)
    return out


# ------------------------------------------------------------------------------------ one update


def update(config: Config, mesh: Mesh, fixed: dict, steps: tuple, reference: dict | None,
           state: State, samples: list[Sample], p: float) -> tuple[State, dict[str, float], dict]:
    """Makes --inner-epochs times --minibatches updates -> (state, mean metrics, the batch).

    reference: the policy's starting adapter; None without --kl-coef.
    """
    began, rows, (estimate, policy_step, critic_step) = time.perf_counter(), P(None, "data"), steps
    trained, opt, logged = state.arrays["trained"], state.arrays["opt"], []
    lr = stage.schedule(p, config)
    value_lr = stage.schedule(p, dataclasses.replace(config, learning_rate=config.value_lr))
    there = [float(s.scored.total is not None) for s in samples]  # weight 0: reward is missing
    host, n_micro, spans = rollouts.pack(samples, there, config, mesh.size, all_advantages=True)
    if not n_micro:  # every reward is missing
        return state._replace(step=state.step + 1), {"update_s": 0.0}, host
    batch = stage.put(host, mesh, rows)
    before = estimate(trained | {"reference": reference}, fixed, batch, np.int32(n_micro))
    known_RT = {k: np.asarray(hosts.whole(x)).reshape(-1, config.pack_length)
                for k, x in before.items()}
    targets, metrics = set_advantages(samples, spans, known_RT, config)
    host |= {k: x.reshape(host["mask"].shape) for k, x in (known_RT | targets).items()}
    batch |= before | stage.put({k: host[k] for k in targets}, mesh, rows)
    estimate_s = time.perf_counter() - began
    for epoch in range(config.inner_epochs):
        order = np.random.default_rng((config.seed, state.step, epoch)).permutation(n_micro)
        for part in np.array_split(order, min(config.minibatches, n_micro)):
            chosen = np.pad(part, (0, len(host["mask"]) - len(part))).astype(np.int32)
            args = fixed, batch, (chosen, np.int32(len(part)))
            trained, opt, last = critic_step(trained, opt, *args, np.float32(value_lr))
            if state.step >= config.value_warmup:
                trained, opt, more = policy_step(trained, opt, *args, np.float32(lr))
                last |= more
            logged.append(last)
    logged = jax.device_get(logged)
    metrics |= {k: float(np.mean([m[k] for m in logged])) for k in logged[0]}
    metrics |= rollouts.drift(samples, spans, known_RT["old"]) | {
        "loss": metrics["value_loss"] + metrics.get("policy_loss", 0.0),
        "learning_rate": lr, "value_lr": value_lr, "estimate_s": estimate_s,
        "padding": 1 - (host["segments"] > 0).sum() / (n_micro * host["segments"][0].size),
        "update_s": time.perf_counter() - began - estimate_s,
    }
    arrays = {"trained": trained, "opt": opt}
    return state._replace(arrays=arrays, step=state.step + 1), metrics, host


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

        return bench.plan("ppo", config)
    config = resolve(config)
    mesh = stage.begin(config)

    # load
    model = stage.load_model(config, mesh)
    problems, held_out = load_rows(config, model.tok)
    reference = stage.reference_copy(model.trained, config) if config.kl_coef else None
    state = State(stage.put(start_of(model.trained, model.cfg, config), mesh, P()))
    model = model._replace(trained=None)  # so a resumed run does not hold the starting weights too

    # compile
    steps = make_steps(model.cfg, config, mesh, model.sharded)
    sampler = rollouts.make_sampler(model.cfg, config, mesh)

    # loop: rollout -> reward -> advantage -> update -> log -> save
    facts = stage.facts(config, model, [problems], held_out)
    with (runs.Run(config, SHOWN, every_s=0.0, facts=facts) as run,
          rollouts.Scorer(config, problems, mesh) as scorer):
        order = rollouts.Order(problems, config.curriculum, config.seed)
        stage.keep_held_out(config, held_out)

        def weights() -> tuple:
            policy = state.arrays["trained"]["policy"]
            return stage.forward_weights(policy, model.fixed, jnp.dtype(config.dtype))

        def evaluate() -> float:
            return rollouts.evaluate(sampler, weights(), model.tok, held_out, state.step, run)

        def write(folder: Path | None) -> None:
            stage.write_model(folder, config, model, state.arrays["trained"]["policy"])

        def save(score: float | None = None) -> None:
            run.save(state.step, state.arrays,
                     {"drawn": state.drawn, "num_tokens": state.num_tokens}, write, score)

        saved = run.restore(state.arrays)
        if saved is not None:
            arrays = stage.put_like(saved.arrays, state.arrays)
            state, saved = State(arrays, saved.step, **saved.state), None
        elif config.eval_every:
            evaluate()
        while (p := run.progress(state.step)) < 1 and not run.stopping:
            began = time.perf_counter()
            drawn = [problems[i] for i in order.take(state.drawn, config.prompts, p)]
            groups, times = rollouts.sample_groups(sampler, weights(), model.tok, drawn, scorer,
                                                   config, step=state.step, first=0, p=p)
            samples = [s for group in groups for s in group]
            state, metrics, batch = update(config, mesh, model.fixed, steps, reference,
                                           state, samples, p)
            n_tokens = sum(len(s.rollout.ids) + len(s.problem.prompt) for s in samples)
            state = state._replace(drawn=state.drawn + len(groups),
                                   num_tokens=state.num_tokens + n_tokens)
            step_s = time.perf_counter() - began
            run.check_finite(state.step, metrics, batch)
            rollouts.log_step(run, scorer, state.step, groups, metrics | times | {
                "p": p, "num_tokens": state.num_tokens, "step_s": step_s,
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
