"""mamba2_scan: a whole Mamba-2 block between its two projections."""

from __future__ import annotations

from typing import Any

from . import _C
from ._options import batch_invariant as _batch_invariant


def mamba2_scan(
    zxbcdt: Any,
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
    initial_conv_state: Any = None,
    initial_state: Any = None,
    return_final_states: bool = False,
    cu_seqlens: Any = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    batch_invariant: bool | None = None,
    out: Any = None,
    final_conv_state_out: Any = None,
    final_state_out: Any = None,
    stream: Any = None,
) -> Any:
    """Mamba-2 block from the output of in_proj to the input of out_proj: split, convolution, SiLU, scan, gate, norm.

    ``z, xBC, dt = split(zxbcdt)``; ``x, B, C = split(silu(causal_conv1d(xBC)))``; ``y = ssd_scan(x, dt, A, B, C, D)``;
    ``y = gated_rms_norm(y, z, norm_weight)``.

    Args:
        zxbcdt: [batch, seqlen, d_inner + conv_dim + nheads] float32, float16 or bfloat16 (float64 on the CPU).
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
        initial_conv_state: [batch, conv_dim, width - 1] dtype of zxbcdt or float32; zero when None.
        initial_state: [batch, nheads, headdim, dstate] float32 or narrower; zero when None. With cu_seqlens the first axis
            of both counts sequences.
        return_final_states: also return both states after the last token.
        cu_seqlens: [num_sequences + 1] int32 or int64: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1] of a batch of
            one. Rows past the last entry are zero.
        reverse: run the convolution and the scan from the last token to the first.
        chunk_size: tokens that are worked on at a time; None lets the library pick. The result does not depend on it.
        batch_invariant: same bits for a row at any batch size and packing; None: as set_batch_invariant() says.
        out, final_conv_state_out, final_state_out: arrays to write the results to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, [batch, seqlen, d_inner] in the dtype of zxbcdt; with return_final_states (or an array for one of them)
        (y, final_conv_state, final_state).

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    With 16-bit inputs a GPU rounds x, B, C and, before a norm, y to 16 bits on their way from one part to the next, as separate
    calls would, so that gradients are off by two to three times what rounding them costs. The CPU does not, nor a GPU where
    zxbcdt is float32.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), section 7.
    """
    return _C.mamba2_scan(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, norm_group_size or 0, eps, norm_before_gate,
        dt_softplus, dt_limit, initial_conv_state, initial_state, return_final_states, cu_seqlens, reverse,
        chunk_size or 0, _batch_invariant(batch_invariant), out, final_conv_state_out, final_state_out, stream,
    )  # fmt: skip


def mamba2_scan_backward(
    zxbcdt: Any,
    conv_weight: Any,
    conv_bias: Any,
    dt_bias: Any,
    A: Any,
    dy: Any,
    *,
    D: Any = None,
    norm_weight: Any = None,
    ngroups: int = 1,
    norm_group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    initial_conv_state: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    batch_invariant: bool | None = None,
    dfinal_conv_state: Any = None,
    dfinal_state: Any = None,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Gradients of :func:`mamba2_scan`, given dy (shaped as y) and, if they were used, those of the final states.

    Args:
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, norm_group_size, eps, norm_before_gate,
        dt_softplus, dt_limit, initial_conv_state, initial_state, cu_seqlens, reverse, chunk_size, batch_invariant, stream:
        as in the forward.
        dy: gradient of y, [batch, seqlen, d_inner] in the dtype of zxbcdt.
        dfinal_conv_state, dfinal_state: gradients of the final states, or None for zero.

    Returns:
        (dzxbcdt, dconv_weight, dconv_bias, ddt_bias, dA, dD, dnorm_weight, dinitial_conv_state, dinitial_state), each
        shaped and typed as what it differentiates, None for what was not given.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`mamba2_scan`.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), section 7.
    """
    return _C.mamba2_scan_backward(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, dy, D, norm_weight, ngroups, norm_group_size or 0, eps,
        norm_before_gate, dt_softplus, dt_limit, initial_conv_state, initial_state, cu_seqlens, reverse, chunk_size or 0,
        _batch_invariant(batch_invariant), dfinal_conv_state, dfinal_state, stream,
    )  # fmt: skip
