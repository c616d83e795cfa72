"""Continuous batching: prompts are prefilled once, their rollouts decode in slots that refill.

    sampler = Sampler(cfg, mesh, slots=64, max_prompt=256, max_new=768)
    for r in sampler.sample(params, prompts, n=8, lora=adapter, seed=0, step=17):
        r.prompt, r.index, r.ids, r.logps, r.stop   # as they finish, while the devices decode on

`Sampler._run` works in rounds. In a round the host gives every device of the mesh a queue of
rollouts. The device then works by itself: `_prefill` writes the keys and values of new prompts into
its prompt cache, and `_decode` runs up to `chunk` steps. Whenever a rollout ends, `_refill` copies
the prompt of the next rollout in the queue into the free slot. Meanwhile the host yields the
rollouts that ended in the round before.

1. Log-probs are of the untruncated distribution softmax(softcap(logits) / temperature), which is
   what a trainer computes for the same tokens. Greedy decoding (temperature 0) reports those at
   temperature 1.
2. Noise is a function of (seed, step, prompt, rollout, token number), so a rollout does not depend
   on the number of devices or slots, or on the order of the queue.
3. top-k, top-p and min-p, applied in this order as in transformers, each keep the tokens whose
   logit reaches a threshold, so ties stay together. The stop token is part of a rollout, with its
   log-prob.
4. The KV cache of a slot is a ring buffer, and all slots write at the same index: see `_refill`.
5. A sharded base is gathered once in each call of `sample`. With `shard=True` it stays sharded:
   prefill gathers one layer at a time, decoding exchanges activations (gemma.sharded_matmul), and
   the devices step together.

Beyond the axes of gemma.py: W rollouts that a device holds (decoding or queued), X prompts in its
prompt cache, I words in a block of the vocabulary, J blocks, A candidate tokens, E periods that a
repetition may have.
"""

import dataclasses
import functools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.experimental import layout
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gemma
import hosts

STOPS = (None, "stop", "length", "repetition")
BLOCK = 128  # words in a block of the vocabulary: the width of a TPU register
LONGEST_PERIOD = 64  # of a repetition, in tokens: a sentence or two


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One finished completion."""

    prompt: int  # which prompt
    index: int  # which of its n rollouts
    ids: np.ndarray  # [C] int32, with the stop token
    logps: np.ndarray  # [C] float32
    stop: str | None  # "stop" (a stop token), "length" or "repetition"; None: not finished yet


class Rules(NamedTuple):
    """The settings that are compiled in; all others are arrays."""

    top_k: int = 0
    top_p: bool = False
    min_p: bool = False
    repetition: bool = False


class Job(NamedTuple):
    """One rollout in the queue of a device, as five integers."""

    row: int  # the row of ids_WC that its tokens are written to
    cached: int  # index of its prompt in the prompt cache
    prompt: int
    rollout: int
    limit: int  # most completion tokens


# ------------------------------------------------------------------------------------- one token


def blocks(x_BV: jax.Array) -> jax.Array:
    """[B, V] -> [B, J, I], padded with -inf."""
    B, V = x_BV.shape
    x_BV = jnp.pad(x_BV, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    return x_BV.reshape(B, -1, BLOCK)


def largest(x_BV: jax.Array, k: int) -> jax.Array:
    """The k largest values of each row, in order, from the k blocks with the largest maxima."""
    x_BJI = blocks(x_BV)
    B, J, _ = x_BJI.shape
    if k < J:
        j_Bk = lax.top_k(jnp.max(x_BJI, axis=-1), k)[1]
        x_BJI = jnp.take_along_axis(x_BJI, j_Bk[:, :, None], axis=1)
    return lax.top_k(x_BJI.reshape(B, -1), k)[0]


def nucleus(p_BV: jax.Array, need_B: jax.Array) -> jax.Array:
    """The largest t such that all p >= t sum to at least `need`; exact, without a sort.

    p [1 .5 .5 .2], need 1.2 -> .5 (which keeps three: ties stay together). Floats from 0 to 1 have
    the same order as their bits read as integers, so 30 halvings of [0, bits of 1] leave one.
    """
    as_float = lambda i_B: lax.bitcast_convert_type(i_B, jnp.float32)

    def halve(_, bounds):
        low_B, high_B = bounds  # the sum reaches `need` at low, and does not at high
        middle_B = (low_B + high_B) // 2
        keep_BV = p_BV >= as_float(middle_B)[:, None]
        enough_B = jnp.sum(jnp.where(keep_BV, p_BV, 0.0), axis=-1) >= need_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    low_B = jnp.zeros_like(need_B, jnp.int32)
    high_B = lax.bitcast_convert_type(jnp.ones_like(need_B), jnp.int32) + 1
    return as_float(lax.fori_loop(0, 30, halve, (low_B, high_B))[0])


def truncate(x_BV: jax.Array, rules: Rules, settings: dict) -> jax.Array:
    """Sets logits below a threshold t to -inf; top-k, top-p and min-p in turn raise t."""
    top_B = jnp.max(x_BV, axis=-1)
    t_B, candidates_BA = jnp.full_like(top_B, -jnp.inf), x_BV
    if rules.top_k:
        candidates_BA = largest(x_BV, min(rules.top_k, x_BV.shape[1]))
        t_B = jnp.min(candidates_BA, axis=-1)  # with [:, -1] XLA on a CPU would sort them all
    if rules.top_p:
        p_BA = jnp.exp(candidates_BA - top_B[:, None])  # relative to the likeliest token
        p_B = nucleus(p_BA, settings["top_p"] * jnp.sum(p_BA, axis=-1))
        t_B = jnp.min(candidates_BA, axis=-1, where=p_BA >= p_B[:, None], initial=jnp.inf)
    if rules.min_p:
        t_B = jnp.maximum(t_B, top_B + jnp.log(settings["min_p"]))
    return jnp.where(x_BV >= t_B[:, None], x_BV, -jnp.inf)


def draw(logits_BV: jax.Array, key_B: jax.Array, rules: Rules, settings: dict) -> tuple:
    """Samples one token for each row -> token_B, and its log-prob before truncation.

    argmax(x + Gumbel noise) has the distribution softmax(x). The logit of a block of words is the
    logsumexp of its words', so one Gumbel argmax samples a block and another a word inside it:
    V/128 + 128 random numbers instead of V.
    """
    greedy = settings["temperature"] == 0
    logits_BV = logits_BV / jnp.where(greedy, 1.0, settings["temperature"])
    x_BV = jnp.where(settings["forbidden_V"][None], -jnp.inf, logits_BV)
    if rules.top_k or rules.top_p or rules.min_p:
        x_BV = truncate(x_BV, rules, settings)
    x_BJI = blocks(x_BV)
    J = x_BJI.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (J + BLOCK,)))(key_B)
    noise_BJ, noise_BI = jnp.split(jnp.where(greedy, 0.0, noise), [J], axis=1)
    weight_BJ = jnp.where(greedy, jnp.max(x_BJI, axis=-1), jax.nn.logsumexp(x_BJI, axis=-1))
    j_B = jnp.argmax(weight_BJ + noise_BJ, axis=-1)
    x_BI = jnp.take_along_axis(x_BJI, j_B[:, None, None], axis=1)[:, 0]
    token_B = j_B * BLOCK + jnp.argmax(x_BI + noise_BI, axis=-1)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32), logit_B - jax.nn.logsumexp(logits_BV, axis=-1)


# --------------------------------------------------------------------------------- on each device


def _loop(more, step, carry, fsdp):
    """lax.while_loop; with fsdp, all devices go on as long as any of them has work.

    With fsdp `step` holds collectives: if one device left the loop, the others would wait for ever.
    """
    if fsdp is None:
        return lax.while_loop(more, step, carry)
    agree = lambda carry: (lax.psum(more(carry).astype(jnp.int32), fsdp) > 0, carry)
    return lax.while_loop(lambda c: c[0], lambda c: agree(step(c[1])), agree(carry))[1]


def _prefill(cfg, buckets, fsdp, params, lora, prompts, prompt_cache):
    """Writes new prompts into the prompt cache of this device, one at a time, shortest first."""

    def fits(U, carry):  # whether the next prompt belongs to the bucket of length U
        return (carry[0] < prompts["n"][0]) & (prompts["n_X"][carry[0]] <= U)

    def one(U, carry):
        i, prompt_cache = carry
        # A device without a prompt in this bucket takes part in the collectives only.
        active = True if fsdp is None else fits(U, carry)
        tokens_1U, n, x = (prompts[k][i] for k in ("tokens_X1U", "n_X", "index_X"))
        x_1UD, kv = gemma.prefill(params, cfg, tokens_1U[:, :U], n[None], lora=lora, fsdp=fsdp)
        # If the ring buffer of this bucket is shorter than the cache's, it has not wrapped yet, so
        # that tokens have the same index in both.
        new = {"x_XD": lax.dynamic_slice_in_dim(x_1UD[0], n - 1, 1), "n_X": n[None],
               "k": [k for k, _ in kv], "v": [v for _, v in kv]}

        def write(old, row):
            at = (x,) + (0,) * (old.ndim - 1)
            if fsdp is not None:
                row = jnp.where(active, row, lax.dynamic_slice(old, at, row.shape))
            return lax.dynamic_update_slice(old, row, at)

        return i + active, jax.tree.map(write, prompt_cache, new)

    carry = jnp.zeros_like(prompts["n"][0]), prompt_cache
    for U in buckets:  # prompts are sorted by length: each bucket goes on where the last stopped
        carry = _loop(functools.partial(fits, U), functools.partial(one, U), carry, fsdp)
    return carry[1]


def _write(old, new, start, axis):
    """Replaces a slice of a cache in place.

    Without the constraint XLA on a TPU may choose another layout, and copy the whole cache to it
    and back.
    """
    old = lax.dynamic_update_slice_in_dim(old, new.astype(old.dtype), start, axis)
    return layout.with_layout_constraint(old, layout.Layout(tuple(range(old.ndim))))


def _refill(prompt_cache, queue, state):
    """Starts queued rollouts in free slots, one at a time; at most steps there is nothing to start.

    All slots write their next token at the same index of their ring buffers: the number of the step
    modulo the ring's length. The write is then one slice. With an index for each slot it would be a
    scatter, for which XLA on a TPU copies the cache. The cached prompt is therefore rotated, so
    that its last token sits just before the index that all slots write next.
    """

    def possible(state):
        return (state["started"][0] < queue["n"][0]) & ~jnp.all(state["active_B"])

    def one(state):
        b, job_5 = jnp.argmin(state["active_B"]), queue["jobs_W5"][state["started"][0]]
        job = Job(*job_5)
        x, n = job.cached, prompt_cache["n_X"][job.cached]

        def position(S):  # position of the prompt token at each index of a ring; negative: none
            return n - 1 - (state["steps"][0] - 1 - jnp.arange(S)) % S

        def rotate(old_BKSH, prompt_XKSH):
            # A roll rather than a gather: for a gather XLA on a TPU would copy the whole prompt
            # cache into another layout, which takes as much memory again.
            row_1KSH = lax.dynamic_slice_in_dim(prompt_XKSH, x, 1)
            more = old_BKSH.shape[2] - row_1KSH.shape[2]
            row_1KSH = jnp.pad(row_1KSH, ((0, 0), (0, 0), (0, more), (0, 0)))
            return _write(old_BKSH, jnp.roll(row_1KSH, state["steps"][0] - n, axis=2), b, axis=0)

        old = state["cache"]
        cache = {k: jax.tree.map(rotate, old[k], prompt_cache[k]) for k in "kv"}
        cache["pos"] = [
            pos_BS.at[b].set(jnp.maximum(position(pos_BS.shape[1]), -1)) for pos_BS in old["pos"]
        ]
        new = {"job_B5": job_5, "active_B": True, "x_BD": prompt_cache["x_XD"][x],
               "position_B": n, "n_B": 0, "recent_BE": -1, "run_BE": 0}
        new = {k: state[k].at[b].set(v) for k, v in new.items()}
        new["end_W2"] = state["end_W2"].at[job.row].set(0)
        return state | new | {"cache": cache, "started": state["started"] + 1}

    return lax.while_loop(possible, one, state)


def _forward_token(cfg, fsdp, params, lora, cache, token_B, position_B, active_B, step):
    """Feeds one more token of every slot to the model -> final hidden states, updated KV cache.

    Unrolled: a scan over layers would copy weights and caches out of the stack at every step.
    """
    x_B1D, new = gemma.embed(params, cfg, token_B[:, None], fsdp), []
    for i, is_global in enumerate(cfg.is_global):
        w, lora_l = (_layer(tree, i) for tree in (params["layers"], lora))
        pos_BS = cache["pos"][is_global]
        age_BS = position_B[:, None] - pos_BS
        seen_BS = (pos_BS >= 0) & (age_BS < gemma.attention_window(cfg, is_global))
        freq_H = jnp.asarray(gemma.rope_frequencies(cfg, is_global))
        past = [(cache["k"][i], cache["v"][i], seen_BS[:, None])]
        x_B1D, kv = gemma.layer(cfg, w, lora_l, x_B1D, position_B[:, None], freq_H,
                                active_B[:, None, None], past=past, fsdp=fsdp)
        new.append(kv)
    # XLA on a CPU copies a cache if it could be written before it has been read. This minimum is
    # always `step`, but it depends on x, so the write has to wait for the reads.
    step = jnp.minimum(step, 2**30 + jnp.isnan(x_B1D[0, 0, 0]))
    append = lambda old, new, axis: _write(old, new, step % old.shape[axis], axis)
    pos_B1 = jnp.where(active_B, position_B, -1)[:, None]
    cache = {
        "k": [append(old, k_BK1H, 2) for old, (k_BK1H, _) in zip(cache["k"], new, strict=True)],
        "v": [append(old, v_BK1H, 2) for old, (_, v_BK1H) in zip(cache["v"], new, strict=True)],
        "pos": [append(old, pos_B1, 1) for old in cache["pos"]],
    }
    return gemma.rms_norm(x_B1D[:, 0], params["norm"], cfg.rms_norm_eps), cache


def _layer(tree, i):
    """Layer i of stacked arrays, or of a list of layers."""
    return tree[i] if isinstance(tree, list) else jax.tree.map(lambda a: a[i], tree)


@functools.partial(jax.jit, static_argnums=1)
def _unstack(layers, n_layers):
    return [_layer(layers, i) for i in range(n_layers)]


def _step(cfg, rules, fsdp, params, lora, settings, state):
    """Samples a token in every active slot, records it, and feeds it to the model."""
    active_B, n_B, job_B = state["active_B"], state["n_B"], Job(*state["job_B5"].T)
    fold = jax.vmap(lambda *ints: functools.reduce(jax.random.fold_in, ints, settings["key"]))
    key_B = fold(job_B.prompt, job_B.rollout, n_B)
    logits_BV = gemma.read_logits(cfg, gemma.head(params, cfg), state["x_BD"], fsdp)
    token_B, logp_B = draw(logits_BV, key_B, rules, settings)
    new = {"n_B": n_B + 1, "position_B": state["position_B"] + 1, "steps": state["steps"] + 1}
    stop_B = jnp.where(n_B + 1 >= job_B.limit, STOPS.index("length"), 0)
    if rules.repetition:
        same_BE = state["recent_BE"] == token_B[:, None]
        new["run_BE"] = jnp.where(same_BE, state["run_BE"] + 1, 0)
        new["recent_BE"] = jnp.roll(state["recent_BE"], 1, axis=1).at[:, 0].set(token_B)
        looping_B = jnp.max(new["run_BE"], axis=1) >= settings["repetition"]
        stop_B = jnp.where(looping_B, STOPS.index("repetition"), stop_B)
    stop_B = jnp.where(settings["stop_V"][token_B], STOPS.index("stop"), stop_B)
    row_B = jnp.where(active_B, job_B.row, 2 * len(n_B))  # out of range: not written
    for name, value_B in (("ids_WC", token_B), ("logp_WC", logp_B)):
        new[name] = state[name].at[row_B, n_B].set(value_B, mode="drop")
    end_B2 = jnp.stack([stop_B, n_B + 1], axis=1)
    new["end_W2"] = state["end_W2"].at[row_B].set(end_B2, mode="drop")
    new["active_B"] = active_B & (stop_B == 0)
    new["x_BD"], new["cache"] = _forward_token(
        cfg, fsdp, params, lora, state["cache"], token_B, state["position_B"], new["active_B"],
        state["steps"][0])
    return state | new


def _decode(cfg, rules, chunk, fsdp, params, lora, settings, prompt_cache, queue, state):
    """Runs `chunk` steps, or fewer.

    A device stops early if its queue is empty and either all its rollouts have ended or `return_at`
    slots are idle. With fsdp it never does: every device must reach the collectives in a step.
    """
    state |= {"started": jnp.zeros_like(state["started"])}
    end = state["steps"][0] + chunk

    def more(state):
        queued, active_B = state["started"][0] < queue["n"][0], state["active_B"]
        starved = ~queued & (jnp.sum(~active_B) >= queue["return_at"][0])
        useful = (queued | jnp.any(active_B)) & ~starved
        return (state["steps"][0] < end) & (useful if fsdp is None else True)

    def step(state):
        state = _refill(prompt_cache, queue, state)
        return _step(cfg, rules, fsdp, params, lora, settings, state)

    return lax.while_loop(more, step, state)


# ------------------------------------------------------------------------------------ on the host


@dataclasses.dataclass
class _Device:
    """What the host knows about one device. A key is the first number of a prompt."""

    free_rows: list[int]  # of ids_WC
    cached: dict = dataclasses.field(default_factory=dict)  # key -> index in the prompt cache
    queue: list = dataclasses.field(default_factory=list)  # (key, job), started in this order
    running: dict = dataclasses.field(default_factory=dict)  # row -> job in a slot


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sizes that programs are compiled for; they are per device.

    Caches exist only while `sample` runs, because training needs the memory. With several hosts,
    each samples its own prompts on its own devices of the mesh. All hosts must call `sample`, even
    one that has no prompts.
    """

    cfg: gemma.Config
    mesh: Mesh  # with an axis "data"
    slots: int = 64  # rollouts decoding at a time
    max_prompt: int = 512  # tokens
    max_new: int = 512  # tokens
    # Prompts cached at once; a prompt leaves when all its rollouts have started. With n=1 this is
    # the most rollouts that can start in a round.
    cached_prompts: int = 16
    chunk: int = 32  # decode steps in a round, at most
    dtype: Any = jnp.bfloat16  # of the caches; must be that of the parameters
    shard: bool = False  # keep the base sharded over the mesh; else each `sample` gathers it

    def __post_init__(self):
        sizes = self.slots, self.max_prompt, self.max_new, self.cached_prompts, self.chunk
        if min(sizes) < 1:  # nothing would ever start
            raise ValueError(f"slots, max_prompt, max_new, cached_prompts, chunk = {sizes}: "
                             "expected 1 or more of each")
        object.__setattr__(self, "mesh", hosts.own(self.mesh))

    # -- compiled

    @functools.partial(jax.jit, static_argnums=0)
    def empty(self) -> tuple[dict, dict]:
        """An empty prompt cache and an empty state for every device."""

        def body():
            B, W, X, cfg = self.slots, 2 * self.slots, self.cached_prompts, self.cfg
            ints = lambda *shape: jnp.zeros(shape, jnp.int32)

            def caches(n_rows, n_tokens):
                """[B, K, S, H] for each layer; local layers hold a ring of their window."""
                sizes = [min(cfg.sliding_window, n_tokens), n_tokens]
                shape = lambda g: (n_rows, cfg.num_key_value_heads, sizes[g], cfg.head_dim)
                kv = {k: [jnp.zeros(shape(g), self.dtype) for g in cfg.is_global] for k in "kv"}
                return kv, [jnp.full((n_rows, S), -1, jnp.int32) for S in sizes]

            kv, _ = caches(X, self.max_prompt)
            prompt_cache = kv | {
                "x_XD": jnp.zeros((X, cfg.hidden_size), self.dtype),  # of the last token
                "n_X": ints(X),  # tokens
            }
            kv, pos = caches(B, self.max_prompt + self.max_new)
            state = {
                "cache": kv | {"pos": pos},  # pos: the position at each index, -1 = empty
                "x_BD": jnp.zeros((B, cfg.hidden_size), self.dtype),  # gives the next token
                "active_B": jnp.zeros(B, bool),
                "position_B": ints(B),  # of the next token in its sequence
                "n_B": ints(B),  # completion tokens so far
                "job_B5": ints(B, len(Job._fields)),
                "recent_BE": ints(B, LONGEST_PERIOD),  # the last tokens, latest first
                "run_BE": ints(B, LONGEST_PERIOD),  # tokens in a row equal to the one e+1 before
                "ids_WC": ints(W, self.max_new),
                "logp_WC": jnp.zeros((W, self.max_new)),
                "end_W2": ints(W, 2),  # index into STOPS (0 = decoding), tokens
                "started": ints(1),  # jobs of this round's queue that have got a slot
                "steps": ints(1),  # since the start; gives the index that all slots write next
            }
            return prompt_cache, state

        return jax.shard_map(body, mesh=self.mesh, in_specs=(), out_specs=P("data"))()

    @property
    def fsdp(self) -> str | None:
        return "data" if self.shard else None

    def pspecs(self, params):  # PartitionSpecs of the base
        return gemma.pspecs(self.cfg, True, gemma.is_int8(params)) if self.shard else P()

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=4)
    def prefill(self, params, lora, prompts, prompt_cache) -> dict:
        buckets = [n for n in (2**i for i in range(5, 30)) if n < self.max_prompt]
        body = functools.partial(_prefill, self.cfg, (*buckets, self.max_prompt), self.fsdp)
        body = jax.shard_map(
            body, mesh=self.mesh, in_specs=(self.pspecs(params), P(), P("data"), P("data")),
            # splash attention fails the vma check
            out_specs=P("data"), check_vma=not gemma.on_tpu(self.mesh))
        return body(params, lora, prompts, prompt_cache)

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
    def decode(self, rules, params, lora, settings, prompt_cache, queue, state) -> dict:
        body = functools.partial(_decode, self.cfg, rules, self.chunk, self.fsdp)
        specs = self.pspecs(params), P(), P(), P("data"), P("data"), P("data")
        body = jax.shard_map(body, mesh=self.mesh, in_specs=specs, out_specs=P("data"))
        return body(params, lora, settings, prompt_cache, queue, state)

    def programs(self, params, lora=None) -> dict[str, tuple]:
        """{name: (jitted function, arguments)} for `function.lower(*arguments).compile()`."""

        def shapes(tree, spec):
            sharding = NamedSharding(self.mesh, spec)
            return jax.tree.map(
                lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=sharding), tree)

        inputs = self._inputs([_Device([])] * self.mesh.size, [[]] * self.mesh.size, {})
        prompts, queue, prompt_cache, state = shapes((*inputs, *jax.eval_shape(self.empty)),
                                                     P("data"))
        layered = jax.eval_shape(self._unstacked, params)
        lora, settings = shapes((lora, self._settings()), P())
        specs = self.pspecs(params)
        params, layered = (jax.tree.map(shapes, p, specs) if self.shard else shapes(p, specs)
                           for p in (params, layered))
        decode = self, Rules(), layered, lora, settings, prompt_cache, queue, state
        return {"prefill": (Sampler.prefill, (self, params, lora, prompts, prompt_cache)),
                "decode": (Sampler.decode, decode)}

    def _unstacked(self, params):
        """Unstacks layers once on a CPU, where XLA would copy each from the stack at every step."""
        if self.shard or self.mesh.devices.flat[0].platform != "cpu":
            return params
        return params | {"layers": _unstack(params["layers"], self.cfg.num_hidden_layers)}

    # -- on the host

    def sample(self, params: dict, prompts: Sequence | Mapping, n: int = 1, *,
               lora: dict | None = None, seed: int = 0, step: int = 0, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, max_new: int | None = None,
               stop: Sequence[int] | None = None, forbidden: Sequence[int] = (),
               vocab_size: int | None = None, repetition: int = 0,
               partial: bool = False, stats: dict | None = None) -> Iterator[Rollout]:
        """n rollouts of each prompt, yielded as they finish, in no particular order.

        prompts: token ids of each prompt, in a list or in a dict by number. Prompts start in this
        order; their noise depends on the number. stop: ids that end a rollout (None: those of the
        config). forbidden: ids that are never sampled; nor are ids from vocab_size on. repetition:
        a rollout ends when this many tokens in a row each equal the token p places before, for
        some p up to 64; 0 = off. partial: after each round of `chunk` steps also yield what the
        running rollouts have so far, with stop None. stats, if given, counts prefills, rounds,
        tokens and slot_steps (decode steps * slots, over all devices).
        """
        prompts = dict(prompts if isinstance(prompts, Mapping) else enumerate(prompts))
        max_new = self.max_new if max_new is None else max_new
        self._check(prompts, max_new, params["norm"].dtype)
        settings = self._settings(temperature, top_k, top_p, min_p, stop, forbidden, vocab_size,
                                  repetition, seed, step)
        rules = Rules(top_k, top_p < 1, min_p > 0, repetition > 0)
        stats = {} if stats is None else stats
        return self._run(params, lora, prompts, n, max_new, settings, rules, partial, stats)

    def _run(self, params, lora, prompts, n, max_new, settings, rules, partial, stats):
        stats.update(prefills=0, rounds=0, tokens=0, slot_steps=0)
        on_own = lambda tree, spec: hosts.on_own(tree, self.mesh, spec)
        lora, settings = on_own((lora, settings), P())
        specs = self.pspecs(params)
        params = jax.tree.map(on_own, params, specs) if self.shard else on_own(params, specs)
        if not prompts:
            return
        key_of, waiting = {}, {}  # equal prompts have one key and are prefilled once
        for p, ids in prompts.items():
            key = key_of.setdefault(tuple(ids), p)
            limit = min(max_new, self.cfg.max_position_embeddings - len(ids))
            waiting.setdefault(key, deque()).extend((p, g, limit) for g in range(n))
        devices = [_Device(list(range(2 * self.slots))) for _ in range(self.mesh.size)]
        layered, (prompt_cache, state) = self._unstacked(params), self.empty()
        finished = []
        while waiting or any(device.running for device in devices):
            new = self._assign(devices, waiting)
            inputs = self._inputs(devices, [[(prompts[k], x) for k, x in ks] for ks in new],
                                  waiting)
            arrived, queue = jax.device_put(inputs, NamedSharding(self.mesh, P("data")))
            if any(new):
                prompt_cache = self.prefill(params, lora, arrived, prompt_cache)
            state = self.decode(rules, layered, lora, settings, prompt_cache, queue, state)
            yield from finished  # of the round before, while the devices are at work
            finished = self._collect(devices, waiting, state, partial)
            stats["prefills"] += sum(map(len, new))
            stats["rounds"] += 1
            stats["tokens"] += sum(len(r.ids) for r in finished if r.stop)
        stats["slot_steps"] = self.slots * int(np.sum(state["steps"]))
        yield from finished

    def _assign(self, devices, waiting) -> list[list[tuple[int, int]]]:
        """Fills every device's queue: one rollout per free slot, then one per slot to refill from.

        A device prefers prompts in its own prompt cache, then a prompt that no device has cached.
        Only for a slot that is free now does it also prefill a prompt that another device has.
        Returns, for each device, (key, index in the prompt cache) of the prompts to prefill.
        """
        for device in devices:  # drop prompts that have no waiting rollout any more
            device.cached = {key: x for key, x in device.cached.items() if key in waiting}
        begun = set().union(*(device.cached for device in devices))
        fresh = deque(key for key in waiting if key not in begun)
        new = [[] for _ in devices]
        for n_jobs in (self.slots, 2 * self.slots):
            for d, device in list(enumerate(devices)) * n_jobs:
                if len(device.queue) + len(device.running) >= n_jobs or not waiting:
                    continue
                key = next((key for key in device.cached if key in waiting), None)
                if key is None and len(device.cached) < self.cached_prompts:
                    if fresh:
                        key = fresh.popleft()
                    elif n_jobs == self.slots:
                        key = max(waiting, key=lambda key: len(waiting[key]))
                    if key is not None:
                        free = set(range(self.cached_prompts)) - set(device.cached.values())
                        device.cached[key] = min(free)
                        new[d].append((key, min(free)))
                if key is not None:
                    job = Job(device.free_rows.pop(), device.cached[key], *waiting[key].popleft())
                    device.queue.append((key, job))
                    if not waiting[key]:
                        del waiting[key]
        return new

    def _inputs(self, devices, new, waiting) -> tuple[dict, dict]:
        """The prompts to prefill and the queue of each device, padded to one size."""
        D, X, W = len(devices), self.cached_prompts, 2 * self.slots
        tokens, n_new = np.zeros((D, X, 1, self.max_prompt), np.int32), np.zeros((D, X), np.int32)
        index, jobs = np.zeros((D, X), np.int32), np.zeros((D, W, len(Job._fields)), np.int32)
        for d, device in enumerate(devices):
            for i, (ids, x) in enumerate(sorted(new[d], key=lambda prompt: len(prompt[0]))):
                tokens[d, i, 0, : len(ids)], n_new[d, i], index[d, i] = ids, len(ids), x
            for i, (_, job) in enumerate(device.queue):
                jobs[d, i] = job
        # While rollouts wait on the host, a device returns as soon as this many slots are idle.
        return_at = max(1, self.slots // 8) if waiting else self.slots + 1
        each = lambda values: np.broadcast_to(np.int32(values), D)
        flat = lambda z: z.reshape(-1, *z.shape[2:])
        prompts = {"tokens_X1U": flat(tokens), "n_X": flat(n_new), "index_X": flat(index),
                   "n": each([len(prompts) for prompts in new])}
        queue = {"jobs_W5": flat(jobs), "n": each([len(device.queue) for device in devices]),
                 "return_at": each(return_at)}
        return prompts, queue

    def _collect(self, devices, waiting, state, partial) -> list[Rollout]:
        """Waits for the round to end. Jobs that got no slot return to `waiting`, for any device."""
        out = jax.device_get({k: state[k] for k in ("started", "end_W2", "ids_WC", "logp_WC")})
        out = {k: v.reshape(len(devices), -1, *v.shape[1:]) for k, v in out.items()}
        finished = []
        for d, device in enumerate(devices):
            n_started = out["started"][d, 0]
            device.running |= {job.row: job for _, job in device.queue[:n_started]}
            for key, job in reversed(device.queue[n_started:]):
                waiting.setdefault(key, deque()).appendleft(job[2:])
                device.free_rows.append(job.row)
            device.queue = []
            for row, job in list(device.running.items()):
                stop, n = out["end_W2"][d, row]
                if stop or partial:
                    ids_C, logp_C = (out[k][d, row, :n].copy() for k in ("ids_WC", "logp_WC"))
                    if not np.isfinite(logp_C).all():
                        raise FloatingPointError(f"prompt {job.prompt}: the logits are not finite")
                    finished.append(Rollout(job.prompt, job.rollout, ids_C, logp_C, STOPS[stop]))
                if stop:
                    device.free_rows.append(row)
                    del device.running[row]
        return finished

    def _check(self, prompts, max_new, dtype) -> None:
        """Raises ValueError for mistakes that nothing later finds: JAX clamps ids out of range."""
        if not 1 <= max_new <= self.max_new or dtype != self.dtype:
            raise ValueError(f"{max_new=}, parameters in {dtype}: expected 1 to {self.max_new} and "
                             f"{jnp.dtype(self.dtype)}, this sampler's own")
        longest = min(self.max_prompt, self.cfg.max_position_embeddings - 1)
        for p, ids in prompts.items():
            if not 1 <= len(ids) <= longest or min(ids) < 0 or max(ids) >= self.cfg.vocab_size:
                raise ValueError(f"prompt {p} has {len(ids)} tokens with ids up to "
                                 f"{max(ids, default=0)}, expected 1 to {longest} tokens below "
                                 f"{self.cfg.vocab_size} (max_prompt={self.max_prompt})")

    def _settings(self, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop=None, forbidden=(),
                  vocab_size=None, repetition=0, seed=0, step=0) -> dict:
        """The settings of one call that are passed as arrays, not compiled in."""
        V = self.cfg.vocab_size
        if not (0 <= temperature < np.inf and 0 < top_p <= 1 and 0 <= min_p <= 1):
            raise ValueError(f"{temperature=}, {top_p=}, {min_p=}: expected 0 (greedy) or more, "
                             "above 0 to 1 (off), 0 (off) to 1")
        stop_V, forbidden_V = np.zeros(V, bool), np.zeros(V, bool)
        stop_V[list(self.cfg.eos_token_id if stop is None else stop)] = True
        forbidden_V[list(forbidden)] = True
        forbidden_V[V if vocab_size is None else vocab_size :] = True
        # Not JAX's default generator, which users can change: on TPUs often to one whose numbers
        # depend on the shape of the batch.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        return {"key": key, "stop_V": stop_V, "forbidden_V": forbidden_V,
                "temperature": np.float32(temperature), "top_p": np.float32(top_p),
                "min_p": np.float32(min_p), "repetition": np.int32(repetition)}
