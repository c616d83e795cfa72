"""How far a student's next-token distributions are from a teacher's, over the whole vocabulary.

    total, out = divergence.loss(terms, x_BTD, head_VD, y_BTE, head_VE, tokens_BT, weight_BT)

p is the student's distribution at a token and q the teacher's. The divergence is Jensen-Shannon's,
generalised as in GKD (arXiv 2306.13649), in the convention of TRL:

    beta 0        KL(q || p), forward
    beta 1        KL(p || q), reverse (MiniLLM, arXiv 2306.08543)
    in between    beta KL(q || m) + (1 - beta) KL(p || m),  m = beta q + (1 - beta) p

1. The logits [B, T, V] of neither model ever exist. A chunk of tokens gets the logits of both, the
   loss, and at once the loss's gradient by the student's hidden states (and by its head, if that is
   trained): the backward pass only scales what the forward pass has left.
2. The gradient is written by hand, so it is exactly 0 where p = q.

Letters beyond those of gemma.py: E the teacher's model width; C chunks of c tokens each.
"""

from functools import partial
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

import gemma


class Terms(NamedTuple):
    """The settings of a loss, which are compiled in."""

    student: gemma.Config
    teacher: gemma.Config
    beta: float
    temperature: float = 1.0  # of both distributions
    rewarded: bool = False  # whether the loss has a term - advantage log p(token)
    trains_head: bool = False  # whether the student's head needs a gradient


def divergence(logp_cV, logq_cV, beta: float):
    """The divergence [c] of log-probs p and q, and its gradient [c, V] by the logits of p."""
    p_cV, q_cV = jnp.exp(logp_cV), jnp.exp(logq_cV)
    if beta == 0:
        return jnp.sum(q_cV * (logq_cV - logp_cV), axis=-1), p_cV - q_cV
    if beta == 1:
        slope_cV, rest_c = logp_cV - logq_cV, 0.0
    else:
        # log p/m = -log(1 - beta + beta q/p), and log q/m alike: exactly 0 where p = q
        over_m = lambda ratio_cV, b: -jnp.log1p(b * jnp.expm1(jnp.minimum(ratio_cV, 80.0)))
        slope_cV = (1 - beta) * over_m(logq_cV - logp_cV, beta)
        rest_c = beta * jnp.sum(q_cV * over_m(logp_cV - logq_cV, 1 - beta), axis=-1)
    inner_c = jnp.sum(p_cV * slope_cV, axis=-1)
    return inner_c + rest_c, p_cV * (slope_cV - inner_c[:, None])


def log_probs(cfg: gemma.Config, x_cD, head_VD, temperature: float):
    """Log-probs [c, V] of hidden states, and the derivative of a logit by the product x W."""
    logit_cV = gemma.read_logits(cfg, head_VD, x_cD)
    slope_cV = 1.0 / temperature
    if cap := cfg.final_logit_softcapping:
        slope_cV *= 1.0 - (logit_cV / cap) ** 2
    logit_cV /= temperature
    return logit_cV - jax.nn.logsumexp(logit_cV, axis=-1, keepdims=True), slope_cV


def score(terms: Terms, x_CcD, head_VD, y_CcE, head_VE, b: dict, n, with_gradient: bool):
    """The first n of C chunks -> ({name: [C, c]}, d loss/dx, d loss/dhead or None).

    b: tokens, weight and advantage, [C, c].
    """
    dx_CcD = jnp.zeros_like(x_CcD) if with_gradient else None
    dhead_VD = None
    if with_gradient and terms.trains_head:
        dhead_VD = jnp.zeros_like(head_VD, jnp.float32)

    def one(i, carry):
        out, dx_CcD, dhead_VD = carry
        x_cD, token_c, weight_c, a_c = (z[i] for z in (
            x_CcD, b["tokens"], b["weight"], b["advantage"]))
        logp_cV, slope_cV = log_probs(terms.student, x_cD, head_VD, terms.temperature)
        logq_cV, _ = log_probs(terms.teacher, y_CcE[i], head_VE, terms.temperature)
        loss_c, d_cV = divergence(logp_cV, logq_cV, terms.beta)
        p_cV = jnp.exp(logp_cV)
        logp_c = jnp.take_along_axis(logp_cV, token_c[:, None], axis=1)[:, 0]
        new = {"divergence": loss_c, "logp": logp_c, "entropy": -jnp.sum(p_cV * logp_cV, axis=-1)}
        if terms.rewarded:
            loss_c -= a_c * logp_c
            d_cV -= a_c[:, None] * (jax.nn.one_hot(token_c, head_VD.shape[0]) - p_cV)
        new["loss"] = weight_c * loss_c
        if with_gradient:
            d_cV = (d_cV * slope_cV * weight_c[:, None]).astype(x_cD.dtype)
            dx_CcD = dx_CcD.at[i].set(gemma.matmul_back(d_cV, head_VD.T, x_cD.dtype))
        if dhead_VD is not None:
            dhead_VD += jnp.einsum("cV,cD->VD", d_cV, x_cD, preferred_element_type=jnp.float32)
        return {k: out[k].at[i].set(new[k]) for k in out}, dx_CcD, dhead_VD

    zeros = {k: jnp.zeros_like(b["weight"]) for k in ("loss", "divergence", "logp", "entropy")}
    return lax.fori_loop(0, n, one, (zeros, dx_CcD, dhead_VD))


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def chunked(terms, x_CcD, head_VD, y_CcE, head_VE, b, n):
    """`loss` of the first n chunks -> (sum, {name: [C, c]})."""
    out, _, _ = score(terms, x_CcD, head_VD, y_CcE, head_VE, b, n, False)
    return jnp.sum(out["loss"]), out


def chunked_forward(terms, x_CcD, head_VD, *rest):
    out, dx_CcD, dhead_VD = score(terms, x_CcD, head_VD, *rest, True)
    dhead_VD = None if dhead_VD is None else dhead_VD.astype(head_VD.dtype)
    return (jnp.sum(out["loss"]), out), (dx_CcD, dhead_VD)


def chunked_backward(terms, gradients, cotangents):
    gradients = jax.tree.map(lambda g: (cotangents[0] * g).astype(g.dtype), gradients)
    return *gradients, None, None, None, None


chunked.defvjp(chunked_forward, chunked_backward)


def loss(terms: Terms, x_BTD, head_VD, y_BTE, head_VE, tokens_BT, weight_BT, advantage_BT=None,
         chunk: int | None = None):
    """Sum of weight (divergence - advantage log p(token)), and per token what it is made of.

    x, y: the final hidden states of student and teacher, where position t predicts tokens_BT[t];
    the heads have the same V rows. Only x and head_VD have a gradient. Tokens of weight 0 are
    sorted to the end, and chunks of only such tokens are skipped. -> (float32, {"divergence",
    "logp", "entropy": [B, T], 0 for tokens of weight 0}).
    """
    B, T = tokens_BT.shape
    n, wanted_n = B * T, weight_BT.reshape(-1) != 0
    largest = max(gemma.CHUNK, gemma.CHUNK_ELEMENTS // head_VD.shape[0])
    chunk = chunk or min(n, largest, max(128, n // 8))  # as in gemma.token_logps
    order_n = jnp.argsort(~wanted_n)

    def chunks(z_BT):
        z_n = z_BT.reshape(n, *z_BT.shape[2:])[order_n]
        z_n = jnp.pad(z_n, ((0, -n % chunk), *[(0, 0)] * (z_n.ndim - 1)))
        return z_n.reshape(-1, chunk, *z_n.shape[1:])

    advantage_BT = jnp.zeros_like(weight_BT) if advantage_BT is None else advantage_BT
    b = {"tokens": tokens_BT, "weight": weight_BT, "advantage": advantage_BT}
    total, out = chunked(terms, chunks(x_BTD), head_VD, chunks(y_BTE), head_VE,
                         jax.tree.map(chunks, b), -(-jnp.sum(wanted_n) // chunk))
    back = lambda z_Cc: jnp.zeros_like(z_Cc, shape=n).at[order_n].set(z_Cc.reshape(-1)[:n])
    out = {k: (back(z_Cc) * wanted_n).reshape(B, T) for k, z_Cc in out.items() if k != "loss"}
    return total, lax.stop_gradient(out)
