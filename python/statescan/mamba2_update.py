"""mamba2_update: mamba2_scan on one or a few new tokens."""

from __future__ import annotations

from typing import Any

from . import _C


def mamba2_update(
    zxbcdt: Any,
    conv_state: Any,
    state: Any,
    conv_weight: Any,
    conv_bias: Any,
    dt_bias: Any,
    A: Any,
    *,
    D: Any = None,
    norm_weight: Any = None,
    ngroups: int = 1,
    norm_group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    state_indices: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """One or a few steps of :func:`statescan.mamba2_scan`; both states are updated in place.

    Args:
        zxbcdt: [batch, m] or [batch, ntokens, m], m = d_inner + conv_dim + nheads; float32, float16 or bfloat16 (float64 on
            the CPU).
        conv_state: [slots, conv_dim, width - 1] dtype of zxbcdt or float32: the last inputs of each sequence, oldest first.
        state: [slots, nheads, headdim, dstate] float32 or narrower.
        conv_weight: [conv_dim, width] dtype of zxbcdt or float32, conv_dim = d_inner + 2 ngroups dstate.
        conv_bias: [conv_dim] dtype of conv_weight, or None.
        dt_bias: [nheads] float32, or None.
        A: [nheads] float32, negative for a decaying state.
        D: [nheads] or [nheads, headdim] float32, the skip connection.
        norm_weight: [d_inner] dtype of zxbcdt or float32; None: y is gated, y silu(z), and not normalised.
        ngroups: groups of B and C; divides nheads.
        norm_group_size: channels that are normalised together; None for d_inner / ngroups.
        eps, norm_before_gate: as in :func:`statescan.gated_rms_norm`.
        dt_softplus: take softplus of dt + dt_bias, exact for very negative values.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        state_indices: [batch] int32 or int64, the slot of each row in both states; -1 marks padding: y is zero and no state
            is touched. None: row i is slot i, and slots = batch. No slot may occur twice.
        out: array to write y to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, [batch, d_inner] or [batch, ntokens, d_inner] in the dtype of zxbcdt.

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), section 7.
    """
    return _C.mamba2_update(
        zxbcdt, conv_state, state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, norm_group_size or 0, eps,
        norm_before_gate, dt_softplus, dt_limit, state_indices, out, stream,
    )  # fmt: skip
