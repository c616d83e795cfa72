"""Rollouts: every prompt is prefilled once, its G rollouts decode in slots that refill themselves.

    sampler = Sampler(cfg, mesh, slots=64, max_prompt=256, max_new=768)
    for r in sampler.sample(params, prompts, n=8, lora=adapter, seed=0, step=17):
        r.prompt, r.index, r.ids, r.logps, r.stop   # as they finish, while the device decodes on

One round of the loop in `_run`, on each device of the mesh by itself:

1. the host shares out what is waiting: enough for the free slots, and as much again to refill from;
2. `prefill` reads prompts that are new to a device into its *shelf*, a small cache of prompts;
3. `decode` runs up to `chunk` steps in one loop on the device. A slot whose rollout ends takes the
   next waiting one in the same step: its prompt's keys and values are copied from the shelf;
4. the host hands out what has ended while the next round is on its way.

What to know when comparing with other implementations:

1. Log-probs are of the untruncated distribution softmax(softcap(logits) / temperature): what a
   trainer computes for the same tokens. Greedy decoding (temperature 0) reports temperature 1.
2. Noise is a function of (seed, step, prompt, rollout, token number), so neither devices, slots nor
   the order of the queue change a rollout. Gumbel's argmax is taken in two levels, over blocks and
   inside the winner: the same distribution from V/128 + 128 random numbers instead of V.
3. top-k, top-p and min-p each keep the tokens above a threshold; it is found by bisection over the
   bits of a float32, exact and without a sort. They apply in this order, as in transformers.
4. The stop token is part of a rollout, with its log-prob: it is what teaches a model to stop.

Beyond the axes of gemma.py: W rollouts in hand of a device (decoding or waiting), X prompts on its
shelf, I words in a block of the vocabulary, J blocks, E periods that a repetition may have.
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
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

import gemma

STOPS = (None, "stop", "length", "repetition")
BLOCK = 128  # words in a block of the vocabulary: the width of a TPU register
LONGEST_PERIOD = 64  # of a repetition, in tokens: a sentence or two
PREFILL_TOKENS = 512  # one pass of prefill: 1 prompt of 512 tokens, 2 of 256, 4 of 128, ...
SHORTEST_BUCKET = 32


@dataclasses.dataclass(frozen=True)
class Rollout:
    """One finished completion. Its log-probs are those of the distribution before truncation."""

    prompt: int  # which prompt
    index: int  # which of its n rollouts
    ids: np.ndarray  # [C] int32, with the stop token
    logps: np.ndarray  # [C] float32
    stop: str  # "stop" (a stop token), "length" or "repetition"


class Rules(NamedTuple):
    """What is compiled in; the values themselves may change from call to call."""

    top_k: bool = False
    top_p: bool = False
    min_p: bool = False
    repetition: bool = False


# ------------------------------------------------------------------------------------- one token


def threshold(x_BV: jax.Array, weight_BV: jax.Array | int, need_B: jax.Array) -> jax.Array:
    """The largest t for which the weights of {x >= t} add up to `need` or more, exactly.

    x [5 3 3 1], weights 1, need 2 -> 3 (which keeps three: ties are kept). Bisection over the
    float32 numbers in their order, 32 passes; a need that all of x cannot meet gives -inf.
    """

    def to_float(i_B):  # int32 -> float32, increasing: negative floats order backwards
        return lax.bitcast_convert_type(i_B ^ ((i_B >> 31) & 0x7FFFFFFF), jnp.float32)

    def to_int(x_B):
        i_B = lax.bitcast_convert_type(x_B, jnp.int32)
        return i_B ^ ((i_B >> 31) & 0x7FFFFFFF)

    def halve(_, bounds):
        low_B, high_B = bounds  # enough at low, not enough at high
        middle_B = (low_B & high_B) + ((low_B ^ high_B) >> 1)  # the mean, without overflow
        above_BV = x_BV >= to_float(middle_B)[:, None]
        enough_B = jnp.sum(jnp.where(above_BV, weight_BV, 0), axis=-1) >= need_B
        return jnp.where(enough_B, middle_B, low_B), jnp.where(enough_B, high_B, middle_B)

    top_B = to_int(jnp.max(x_BV, axis=-1))
    low_B = jnp.full_like(top_B, to_int(jnp.float32(-jnp.inf)))
    return to_float(lax.fori_loop(0, 32, halve, (low_B, top_B + 1))[0])


def truncate(x_BV: jax.Array, rules: Rules, how: dict) -> jax.Array:
    """Logits with -inf where top-k, then top-p, then min-p rule a token out."""
    drop = lambda x_BV, keep_BV: jnp.where(keep_BV, x_BV, -jnp.inf)
    if rules.top_k:
        t_B = threshold(x_BV, 1, how["top_k"])
        x_BV = drop(x_BV, x_BV >= t_B[:, None])
    if rules.top_p or rules.min_p:
        p_BV = jnp.exp(x_BV - jnp.max(x_BV, axis=-1, keepdims=True))  # 1 = the likeliest
        keep_BV = p_BV > 0
        if rules.top_p:
            t_B = threshold(p_BV, p_BV, how["top_p"] * jnp.sum(p_BV, axis=-1))
            keep_BV &= p_BV >= t_B[:, None]
        if rules.min_p:
            keep_BV &= p_BV >= how["min_p"]
        x_BV = drop(x_BV, keep_BV)
    return x_BV


def draw(logits_BV: jax.Array, key_B: jax.Array, rules: Rules, how: dict) -> tuple:
    """One token a row -> token_B, and its log-prob before truncation.

    argmax(x + Gumbel noise) has the distribution softmax(x). A block of words has the weight
    logsumexp(x in the block), so: draw a block by Gumbel's argmax, then a word in it by another.
    """
    B, V = logits_BV.shape
    greedy = how["temperature"] == 0
    logits_BV = logits_BV / jnp.where(greedy, 1.0, how["temperature"])
    x_BV = jnp.where(how["forbidden_V"][None], -jnp.inf, logits_BV)
    x_BV = truncate(x_BV, rules, how)
    x_BV = jnp.pad(x_BV, ((0, 0), (0, -V % BLOCK)), constant_values=-jnp.inf)
    x_BJI = x_BV.reshape(B, -1, BLOCK)
    J = x_BJI.shape[1]
    noise = jax.vmap(lambda key: jax.random.gumbel(key, (J + BLOCK,)))(key_B)
    noise_BJ, noise_BI = jnp.split(jnp.where(greedy, 0.0, noise), [J], axis=1)
    weight_BJ = jnp.where(greedy, jnp.max(x_BJI, axis=-1), jax.nn.logsumexp(x_BJI, axis=-1))
    j_B = jnp.argmax(weight_BJ + noise_BJ, axis=-1)
    x_BI = jnp.take_along_axis(x_BJI, j_B[:, None, None], axis=1)[:, 0]
    token_B = j_B * BLOCK + jnp.argmax(x_BI + noise_BI, axis=-1)
    logit_B = jnp.take_along_axis(logits_BV, token_B[:, None], axis=1)[:, 0]
    return token_B.astype(jnp.int32), logit_B - jax.nn.logsumexp(logits_BV, axis=-1)


# --------------------------------------------------------------------------- what a device does


def _copy_rows(caches: dict, row_R: jax.Array, source: dict) -> dict:
    """Puts R rows of (shorter) caches into rows `row_R`; a row out of range is dropped.

    Short and long rings agree on where a token lies: one that is shorter than the window is only
    as short as all its tokens, and holds position p in slot p.
    """

    def one(old, new):
        put = lambda k: old[k].at[:, row_R, :, : new[k].shape[3]].set(new[k], mode="drop")
        spare = old["pos"].shape[1] - new["pos"].shape[1]
        pos_RS = jnp.pad(new["pos"], ((0, 0), (0, spare)), constant_values=-1)
        pos_BS = old["pos"].at[row_R].set(pos_RS, mode="drop")
        return {"k": put("k"), "v": put("v"), "pos": pos_BS}

    return {kind: one(caches[kind], source[kind]) for kind in caches}


def _fill_shelf(cfg, params, lora, shelf, prompts):
    """Prefills this device's share of prompts; the buckets differ in the length of their rows."""
    for bucket in prompts.values():

        def one_pass(carry, bucket=bucket):
            i, shelf = carry
            tokens_RU, length_R, row_R = (bucket[k][i] for k in ("tokens", "length", "row"))
            R, U = tokens_RU.shape
            cache = gemma.init_cache(cfg, R, U, shelf["cache"]["local"]["k"].dtype)
            positions_RU = jnp.broadcast_to(jnp.arange(U)[None], (R, U))
            x_RUD, cache = gemma.extend(params, cfg, cache, tokens_RU, positions_RU,
                                        positions_RU < length_R[:, None], lora=lora,
                                        empty=True)  # fmt: skip
            x_RD = jnp.take_along_axis(x_RUD, length_R[:, None, None] - 1, axis=1)[:, 0]
            return i + 1, {
                "cache": _copy_rows(shelf["cache"], row_R, cache),
                "x_XD": shelf["x_XD"].at[row_R].set(x_RD, mode="drop"),
                "length_X": shelf["length_X"].at[row_R].set(length_R, mode="drop"),
            }

        n = bucket["n"][0]  # differs between devices: no collective may be in this loop
        _, shelf = lax.while_loop(lambda carry, n=n: carry[0] < n, one_pass, (n * 0, shelf))
    return shelf


def _admit(shelf, todo, state):
    """Gives free slots what is waiting, one at a time; most steps have nothing to give."""

    def possible(state):
        return (state["next"][0] < todo["n"][0]) & ~jnp.all(state["active_B"])

    def one(state):
        b, (row, x, prompt, rollout, limit) = (
            jnp.argmin(state["active_B"]),
            todo["what"][state["next"][0]],
        )
        prompt_cache = {
            kind: {"k": lax.dynamic_slice_in_dim(c["k"], x, 1, 1),
                   "v": lax.dynamic_slice_in_dim(c["v"], x, 1, 1), "pos": c["pos"][x][None]}
            for kind, c in shelf["cache"].items()
        }  # fmt: skip
        new = {"active_B": True, "x_BD": shelf["x_XD"][x], "start_B": shelf["length_X"][x], "n_B": 0,
               "limit_B": limit, "row_B": row, "prompt_B": prompt, "rollout_B": rollout,
               "recent_BE": -1, "run_BE": 0}  # fmt: skip
        return state | {k: state[k].at[b].set(v) for k, v in new.items()} | {
            "cache": _copy_rows(state["cache"], b[None], prompt_cache),
            "stop_W": state["stop_W"].at[row].set(0),
            "next": state["next"] + 1,
        }  # fmt: skip

    return lax.while_loop(possible, one, state)


def _step(cfg, rules, params, lora, how, state):
    """Draws a token in every active slot, notes it, and feeds it to the model."""
    active_B, n_B, row_B = state["active_B"], state["n_B"], state["row_B"]
    fold = jax.vmap(lambda *ints: functools.reduce(jax.random.fold_in, ints, how["key"]))
    key_B = fold(state["prompt_B"], state["rollout_B"], n_B)
    logits_BV = gemma.read_logits(cfg, gemma.head(params, cfg), state["x_BD"])
    token_B, logp_B = draw(logits_BV, key_B, rules, how)
    n_out = state["stop_W"].shape[0]
    here_B = jnp.where(active_B, row_B, n_out)  # out of range: dropped
    put = lambda name, value_B: state[name].at[here_B, n_B].set(value_B, mode="drop")
    new = {"ids_WC": put("ids_WC", token_B), "logp_WC": put("logp_WC", logp_B)}
    stop_B = jnp.where(n_B + 1 >= state["limit_B"], STOPS.index("length"), 0)
    if rules.repetition:
        same_BE = state["recent_BE"] == token_B[:, None]
        new["run_BE"] = jnp.where(same_BE, state["run_BE"] + 1, 0)
        new["recent_BE"] = jnp.roll(state["recent_BE"], 1, axis=1).at[:, 0].set(token_B)
        looping_B = jnp.max(new["run_BE"], axis=1) >= how["repetition"]
        stop_B = jnp.where(looping_B, STOPS.index("repetition"), stop_B)
    stop_B = jnp.where(how["stop_V"][token_B], STOPS.index("stop"), stop_B)
    ended_B = jnp.where(active_B & (stop_B > 0), row_B, n_out)
    new["stop_W"] = state["stop_W"].at[ended_B].set(stop_B, mode="drop")
    new["length_W"] = state["length_W"].at[ended_B].set(n_B + 1, mode="drop")
    active_B = active_B & (stop_B == 0)
    position_B = state["start_B"] + n_B
    x_B1D, cache = gemma.extend(params, cfg, state["cache"], token_B[:, None], position_B[:, None],
                                active_B[:, None], lora=lora)  # fmt: skip
    return state | new | {"cache": cache, "x_BD": x_B1D[:, 0], "active_B": active_B,
                          "n_B": n_B + 1, "steps": state["steps"] + 1}  # fmt: skip


def _decode_chunk(cfg, rules, params, lora, how, shelf, todo, state):
    """Up to todo["steps"] steps; fewer when all is done or too many slots wait for the host."""
    admit = functools.partial(_admit, shelf, todo)
    state = admit(state | {"next": jnp.zeros_like(state["next"])})
    end = state["steps"][0] + todo["steps"][0]

    def more(state):
        n_idle = jnp.sum(~state["active_B"])
        starved = (state["next"][0] >= todo["n"][0]) & (n_idle >= todo["leave_at"][0])
        return (state["steps"][0] < end) & jnp.any(state["active_B"]) & ~starved

    return lax.while_loop(more, lambda s: admit(_step(cfg, rules, params, lora, how, s)), state)


def _spec(path, _) -> P:
    """Caches are [layers, rows, ...], everything else has its rows first."""
    return P(None, "data") if path[-1].key in ("k", "v") else P("data")


_specs = functools.partial(jax.tree_util.tree_map_with_path, _spec)


def one_device() -> Mesh:
    axis_types = (jax.sharding.AxisType.Auto,)
    return jax.make_mesh((1,), ("data",), axis_types=axis_types, devices=jax.devices()[:1])


# ---------------------------------------------------------------------------- what the host does


@dataclasses.dataclass
class _Desk:
    """What the host knows of one device."""

    rows: list[int]  # of ids_WC, that are free
    shelf: dict[int, int]  # text -> its place
    live: dict[int, tuple]  # row -> (prompt, rollout), decoding
    given: list[tuple]  # (row, place, text, prompt, rollout, limit), in the order of admission


@dataclasses.dataclass(frozen=True)
class Sampler:
    """The sizes that are compiled. Caches live only while `sample` runs: training has the memory.

    All sizes are per device. A smaller `shelf` saves memory; with n=1 it limits how many rollouts
    may start at a time. A shorter `chunk` hands rollouts out sooner and talks more to the host.
    """

    cfg: gemma.Config
    mesh: Mesh = dataclasses.field(default_factory=one_device)
    slots: int = 64  # rollouts decoding at a time
    max_prompt: int = 512  # tokens
    max_new: int = 512  # tokens
    shelf: int = 16  # prompts whose caches are kept while their rollouts wait
    chunk: int = 32  # decode steps
    dtype: Any = jnp.bfloat16  # of the caches: the parameters' own

    def __post_init__(self):
        for name in ("slots", "max_prompt", "max_new", "shelf", "chunk"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)}: expected 1 or more")

    # -- compiled

    @property
    def buckets(self) -> list[int]:
        """Row lengths of prefill: powers of two below max_prompt, and max_prompt."""
        lengths = [SHORTEST_BUCKET]
        while lengths[-1] < self.max_prompt:
            lengths.append(2 * lengths[-1])
        return lengths[:-1] + [self.max_prompt]

    @functools.partial(jax.jit, static_argnums=0)
    def empty(self) -> tuple[dict, dict]:
        """The shelf and the state of all devices, with nothing in them."""

        def body():
            B, W, X, D = self.slots, 2 * self.slots, self.shelf, self.cfg.hidden_size
            cache = functools.partial(gemma.init_cache, self.cfg, dtype=self.dtype)
            ints = lambda *shape: jnp.zeros(shape, jnp.int32)
            shelf = {"cache": cache(X, self.max_prompt), "x_XD": jnp.zeros((X, D), self.dtype),
                     "length_X": ints(X)}  # fmt: skip
            state = {
                "cache": cache(B, self.max_prompt + self.max_new),
                "x_BD": jnp.zeros((B, D), self.dtype),  # from which the next token is drawn
                "active_B": jnp.zeros(B, bool),
                "start_B": ints(B),  # prompt tokens
                "n_B": ints(B),  # completion tokens so far
                "limit_B": ints(B),
                "row_B": ints(B),  # of ids_WC
                "prompt_B": ints(B),
                "rollout_B": ints(B),
                "recent_BE": ints(B, LONGEST_PERIOD),  # the last tokens, latest first
                "run_BE": ints(B, LONGEST_PERIOD),  # tokens in a row equal to the one E+1 before
                "ids_WC": ints(W, self.max_new),
                "logp_WC": jnp.zeros((W, self.max_new)),
                "length_W": ints(W),
                "stop_W": ints(W),  # index into STOPS, 0 while decoding
                "next": ints(1),  # how many of todo have been given a slot
                "steps": ints(1),
            }
            return shelf, state

        shapes = jax.eval_shape(body)
        everywhere = jax.shard_map(body, mesh=self.mesh, in_specs=(), out_specs=_specs(shapes),
                                   check_vma=False)  # nothing is reduced  # fmt: skip
        return everywhere()

    @functools.partial(jax.jit, static_argnums=0, donate_argnums=3)
    def prefill(self, params, lora, shelf, prompts):
        body = functools.partial(_fill_shelf, self.cfg)
        return jax.shard_map(body, mesh=self.mesh, out_specs=_specs(shelf),
                             in_specs=(P(), P(), _specs(shelf), P("data")))(
            params, lora, shelf, prompts)  # fmt: skip

    @functools.partial(jax.jit, static_argnums=(0, 1), donate_argnums=7)
    def decode(self, rules, params, lora, how, shelf, todo, state):
        body = functools.partial(_decode_chunk, self.cfg, rules)
        specs = P(), P(), P(), _specs(shelf), P("data"), _specs(state)
        return jax.shard_map(body, mesh=self.mesh, in_specs=specs, out_specs=specs[-1])(
            params, lora, how, shelf, todo, state)  # fmt: skip

    def programs(self, params, lora=None, rules: Rules = Rules()) -> dict[str, tuple]:
        """The jitted functions, each with arguments to compile it for: {name: (function, args)}.

        params, lora: arrays or `ShapeDtypeStruct`s. Then `function.lower(*args).compile()`.
        """
        same = lambda tree: jax.tree.map(lambda _: P(), tree)
        rows = lambda tree: jax.tree.map(lambda _: P("data"), tree)

        def shapes(tree, specs):
            one = lambda x, spec: jax.ShapeDtypeStruct(
                x.shape, x.dtype, sharding=NamedSharding(self.mesh, spec)
            )
            return jax.tree.map(one, tree, specs(tree))

        shelf, state = (shapes(tree, _specs) for tree in jax.eval_shape(self.empty))
        desks = [_Desk(list(range(2 * self.slots)), {}, {}, []) for _ in range(self.mesh.size)]
        prompts, todo = self._pack_prompts([[]] * len(desks), {}), self._pack_todo(desks, {})
        prompts, todo = shapes(prompts, rows), shapes(todo, rows)
        params, lora, how = shapes(params, same), shapes(lora, same), shapes(self._how(), same)
        return {
            "prefill": (Sampler.prefill, (self, params, lora, shelf, prompts)),
            "decode": (Sampler.decode, (self, rules, params, lora, how, shelf, todo, state)),
        }

    # -- on the host

    def sample(self, params: dict, prompts: Sequence | Mapping, n: int = 1, *,
               lora: dict | None = None, seed: int = 0, step: int = 0, temperature: float = 1.0,
               top_k: int = 0, top_p: float = 1.0, min_p: float = 0.0, max_new: int | None = None,
               stop: Sequence[int] | None = None, forbidden: Sequence[int] = (),
               vocab_size: int | None = None, repetition: int = 0,
               stats: dict | None = None) -> Iterator[Rollout]:  # fmt: skip
        """n rollouts of each prompt, yielded as they finish: in no order to rely on.

        prompts: token ids of each, or a dict from a number to token ids; they start in this order,
        and the number is what the noise depends on. stop: ids that end a rollout (None: those of
        the config). forbidden, vocab_size: ids, and all ids from vocab_size on, never drawn.
        repetition: ends a rollout once so many tokens in a row each equal the one p before, for
        any one p up to 64; 0 = off. Temperature 0 is greedy. stats, if given, counts prefills,
        rounds, tokens and slot_steps (decode steps * slots, over all devices).
        params may be sharded: they are gathered once, as devices decode each at its own pace.
        """
        prompts = dict(prompts if isinstance(prompts, Mapping) else enumerate(prompts))
        max_new = self.max_new if max_new is None else max_new
        self._check(prompts, n, max_new, params["norm"].dtype)
        how = self._how(temperature, top_k, top_p, min_p, stop, forbidden, vocab_size, repetition,
                        seed, step)  # fmt: skip
        rules = Rules(top_k > 0, top_p < 1, min_p > 0, repetition > 0)
        stats = {} if stats is None else stats
        return self._run(params, lora, prompts, n, max_new, how, rules, stats)

    def _run(self, params, lora, prompts, n, max_new, how, rules, stats):
        stats.update(prefills=0, rounds=0, tokens=0, slot_steps=0)
        everywhere = NamedSharding(self.mesh, P())
        params, lora, how = jax.device_put((params, lora, how), everywhere)
        texts, waiting = {}, {}  # equal prompts are one text, prefilled once
        for p, ids in prompts.items():
            text = texts.setdefault(tuple(ids), len(texts))
            limit = min(max_new, self.cfg.max_position_embeddings - len(ids))
            waiting.setdefault(text, deque()).extend((p, g, limit) for g in range(n))
        texts = list(texts)
        desks = [_Desk(list(range(2 * self.slots)), {}, {}, []) for _ in range(self.mesh.size)]
        shelf, state = self.empty()
        finished = []
        while waiting or any(desk.live for desk in desks):
            new = self._share_out(desks, waiting)
            if any(new):
                stats["prefills"] += sum(map(len, new))
                prompts = self._to_devices(self._pack_prompts(new, texts))
                shelf = self.prefill(params, lora, shelf, prompts)
            todo = self._to_devices(self._pack_todo(desks, waiting))
            state = self.decode(rules, params, lora, how, shelf, todo, state)
            yield from finished  # of the round before, while the devices are at work
            finished = self._collect(desks, waiting, state)
            stats["rounds"] += 1
            stats["tokens"] += sum(len(r.ids) for r in finished)
        stats["slot_steps"] = self.slots * int(np.sum(state["steps"]))
        yield from finished

    def _share_out(self, desks, waiting) -> list[list[tuple[int, int]]]:
        """Gives every device what its free slots need, then as much again in case more get free.

        A device goes on with prompts on its shelf, else starts one that no device has, else (only
        for a slot that is free now) helps with one of another device. Returns, for each device,
        the (text, place on the shelf) that it must prefill.
        """
        for desk in desks:  # a prompt leaves the shelf when none of its rollouts waits any more
            desk.shelf = {text: x for text, x in desk.shelf.items() if text in waiting}
        begun = set().union(*(desk.shelf for desk in desks))
        fresh = deque(text for text in waiting if text not in begun)
        new = [[] for _ in desks]
        for ahead in (0, self.slots):
            need = lambda d, n=self.slots + ahead: n - len(desks[d].live) - len(desks[d].given)
            can = list(range(len(desks)))
            while can and need(d := max(can, key=need)) > 0:
                desk = desks[d]
                text = next((text for text in desk.shelf if text in waiting), None)
                if text is None and len(desk.shelf) < self.shelf:
                    if fresh:
                        text = fresh.popleft()
                    elif waiting and not ahead:
                        text = max(waiting, key=lambda text: len(waiting[text]))
                if text is None:
                    can.remove(d)
                    continue
                if text not in desk.shelf:
                    desk.shelf[text] = min(set(range(self.shelf)) - set(desk.shelf.values()))
                    new[d].append((text, desk.shelf[text]))
                desk.given.append(
                    (desk.rows.pop(), desk.shelf[text], text, *waiting[text].popleft())
                )
                if not waiting[text]:
                    del waiting[text]
        return new

    def _collect(self, desks, waiting, state) -> list[Rollout]:
        """Waits for the round to end; what got no slot goes back to the queue for any device."""
        names = "next", "stop_W", "length_W", "ids_WC", "logp_WC"
        out = jax.device_get({name: state[name] for name in names})
        out = {k: v.reshape(len(desks), -1, *v.shape[1:]) for k, v in out.items()}
        finished = []
        for d, desk in enumerate(desks):
            n_begun = out["next"][d, 0]
            for row, _, text, *ticket in reversed(desk.given[n_begun:]):
                waiting.setdefault(text, deque()).appendleft(tuple(ticket))
                desk.rows.append(row)
            desk.live |= {row: (p, g) for row, _, _, p, g, _ in desk.given[:n_begun]}
            desk.given = []
            for row in [row for row in desk.live if out["stop_W"][d, row]]:
                C, stop = out["length_W"][d, row], STOPS[out["stop_W"][d, row]]
                ids_C, logp_C = (out[k][d, row, :C].copy() for k in ("ids_WC", "logp_WC"))
                finished.append(Rollout(*desk.live.pop(row), ids_C, logp_C, stop))
                desk.rows.append(row)
        return finished

    def _pack_prompts(self, new, texts) -> dict:
        """{bucket: passes of R prompts of up to U tokens}, for all devices, padded to a fixed size."""
        packed = {}
        for U in self.buckets:
            R = min(self.shelf, max(1, PREFILL_TOKENS // U))
            shape = len(new), -(-self.shelf // R), R
            tokens, length = np.zeros((*shape, U), np.int32), np.ones(shape, np.int32)
            row = np.full(shape, self.shelf, np.int32)  # out of range: dropped
            n_passes = np.zeros(len(new), np.int32)
            for d, prompts in enumerate(new):
                mine = [(t, x) for t, x in prompts if self._bucket(len(texts[t])) == U]
                n_passes[d] = -(-len(mine) // R)
                for i, (text, x) in enumerate(mine):
                    at = d, *divmod(i, R)
                    length[at], row[at] = len(texts[text]), x
                    tokens[at][: length[at]] = texts[text]
            flat = [z.reshape(-1, *z.shape[2:]) for z in (tokens, length, row)]
            packed[U] = dict(zip(("tokens", "length", "row", "n"), (*flat, n_passes), strict=True))
        return packed

    def _bucket(self, n_tokens: int) -> int:
        return next(U for U in self.buckets if n_tokens <= U)

    def _pack_todo(self, desks, waiting) -> dict:
        """What each device is given, padded to a fixed size, and when to come back."""
        W, D = 2 * self.slots, len(desks)
        what, n = np.zeros((D, W, 5), np.int32), np.zeros(D, np.int32)
        for d, desk in enumerate(desks):
            n[d] = len(desk.given)
            what[d, : n[d]] = np.reshape(
                [(row, *rest) for row, x, _, *t in desk.given for rest in [(x, *t)]], (-1, 5)
            )
        # A free slot that got nothing though there is a queue: its shelf is full of prompts that
        # have yet to be admitted. So only admit, and come back with more at once.
        unfilled = any(len(desk.live) + len(desk.given) < self.slots for desk in desks)
        steps = 0 if waiting and unfilled else self.chunk
        # One device comes back early for more. Of several, the others would have to wait.
        leave_at = max(1, self.slots // 8) if waiting and D == 1 else self.slots + 1
        return {"what": what.reshape(D * W, 5), "n": n, "steps": np.full(D, steps, np.int32),
                "leave_at": np.full(D, leave_at, np.int32)}  # fmt: skip

    def _to_devices(self, tree):
        return jax.device_put(tree, NamedSharding(self.mesh, P("data")))

    def _check(self, prompts, n, max_new, dtype) -> None:
        """Raises ValueError for what cannot be sampled."""
        if n < 1:
            raise ValueError(f"n={n}: expected 1 or more rollouts of each prompt")
        if not 1 <= max_new <= self.max_new:
            raise ValueError(f"max_new={max_new}: expected 1 to {self.max_new}, this sampler's own")
        if dtype != self.dtype:
            raise ValueError(f"the parameters are {dtype}, this sampler's dtype is {self.dtype}")
        longest = min(self.max_prompt, self.cfg.max_position_embeddings - 1)
        for p, ids in prompts.items():
            if not 1 <= len(ids) <= longest:
                raise ValueError(f"prompt {p} has {len(ids)} tokens, expected 1 to {longest} "
                                 f"(max_prompt={self.max_prompt})")  # fmt: skip
            if min(ids) < 0 or max(ids) >= self.cfg.vocab_size:
                raise ValueError(f"prompt {p} has ids from {min(ids)} to {max(ids)}, expected 0 to "
                                 f"{self.cfg.vocab_size - 1}")  # fmt: skip

    def _how(self, temperature=1.0, top_k=0, top_p=1.0, min_p=0.0, stop=None, forbidden=(),
             vocab_size=None, repetition=0, seed=0, step=0) -> dict:  # fmt: skip
        """The values of one call that are data, not compiled in."""
        V = self.cfg.vocab_size
        for name, value, ok, expected in (
            ("temperature", temperature, 0 <= temperature < np.inf, "0 (greedy) or more"),
            ("top_k", top_k, top_k >= 0, "0 (off) or more"),
            ("top_p", top_p, 0 < top_p <= 1, "above 0, up to 1 (off)"),
            ("min_p", min_p, 0 <= min_p <= 1, "0 (off) to 1"),
            ("repetition", repetition, repetition >= 0, "0 (off) or more"),
        ):
            if not ok:
                raise ValueError(f"{name}={value}: expected {expected}")
        masks = {"stop_V": np.zeros(V, bool), "forbidden_V": np.zeros(V, bool)}
        stop = self.cfg.eos_token_id if stop is None else stop
        for name, ids in (("stop_V", stop), ("forbidden_V", forbidden)):
            if wrong := [i for i in ids if not 0 <= i < V]:
                raise ValueError(f"{name[:-2]}: id {wrong[0]} is not in the vocabulary of {V}")
            masks[name][list(ids)] = True
        masks["forbidden_V"][V if vocab_size is None else vocab_size :] = True
        if masks["forbidden_V"].all():
            raise ValueError("forbidden, vocab_size: no token is left to draw")
        # The default generator is a user's setting (on a TPU often one whose numbers depend on
        # the shape of the batch): this one gives a key the same numbers everywhere.
        key = jax.random.fold_in(jax.random.key(seed, impl="threefry2x32"), step)
        numbers = {"temperature": np.float32(temperature), "top_k": np.int32(top_k),
                   "top_p": np.float32(top_p), "min_p": np.float32(min_p),
                   "repetition": np.int32(repetition)}  # fmt: skip
        return masks | numbers | {"key": key}
