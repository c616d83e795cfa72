"""Attention of whole rows on a TPU, by JAX's splash kernels. gemma.forward imports it there."""

import functools

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental.pallas.ops.tpu import splash_attention as kernels


def attend(cfg, q_BTNH, parts, *, segments_BT, window, interpret=False) -> jax.Array:
    """`attend` for whole rows by JAX's splash kernels, which keep no [T, T] scores in memory.

    The kernels' masks are static, so `lax.cond` picks the local or the causal one for a layer. They
    compare indices in the row, which inside a segment is the same as comparing positions. Scaled
    queries are rounded to their dtype, which is exact where the scale is 1/16 (all up to 12B).
    """
    ((k_BKTH, v_BKTH, _),) = parts
    _, T, N, _ = q_BTNH.shape
    block = 512 if T > 256 else 256 if T > 128 else 128
    pad = -T % block
    q_BNTH = q_BTNH.swapaxes(1, 2).astype(jnp.float32) * cfg.query_pre_attn_scalar**-0.5
    q_BNTH, k_BKTH, v_BKTH = (
        jnp.pad(z.astype(k_BKTH.dtype), ((0, 0), (0, 0), (0, pad), (0, 0)))
        for z in (q_BNTH, k_BKTH, v_BKTH)
    )
    segments_BT = jnp.pad(segments_BT, ((0, 0), (0, pad)))

    def run(mask):
        kernel = kernels.make_splash_mha_single_device(
            kernels.MultiHeadMask([mask] * N), block_sizes=kernels.BlockSizes(*[block] * 8),
            attn_logits_soft_cap=cfg.attn_logit_softcapping, interpret=interpret)
        segments = kernels.SegmentIds(segments_BT, segments_BT)
        o_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
        return o_BNTH[:, :, :T].swapaxes(1, 2)

    square = T + pad, T + pad
    causal = functools.partial(run, kernels.CausalMask(square))
    if cfg.sliding_window >= T:
        return causal()
    local = functools.partial(run, kernels.LocalMask(square, (cfg.sliding_window - 1, 0), 0))
    return lax.cond(window < T, local, causal)
