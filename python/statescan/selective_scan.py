"""selective_scan: the Mamba-1 scan (S6)."""

from __future__ import annotations

from typing import Any

from . import _C
from ._options import batch_invariant as _batch_invariant


def selective_scan(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    *,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    initial_state: Any = None,
    return_final_state: bool = False,
    cu_seqlens: Any = None,
    reverse: bool = False,
    batch_invariant: bool | None = None,
    state_positions: Any = None,
    out: Any = None,
    final_state_out: Any = None,
    position_states_out: Any = None,
    stream: Any = None,
) -> Any:
    """Mamba-1 scan: ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = C[t]·h[t] + D x[t]``, then the gate.

    With a complex A the state is complex and ``y[t] = 2 Re(C[t]·h[t]) + D x[t]``.

    Args:
        x: [batch, seqlen, dim] float32, float16 or bfloat16 (float64 on the CPU).
        dt: [batch, seqlen, dim] any of these dtypes, the step of each channel.
        A: [dim, dstate] float32 or complex64.
        B, C: [batch, seqlen, ngroups, dstate] dtype of x (complex64 with a complex A); ngroups divides dim, a group serves
            consecutive channels. Or [dim, dstate] in the dtype of A when time-invariant, as in S4.
        D: [dim] float32, the skip connection.
        z: as x, the gate: y is multiplied by ``silu(z)``.
        dt_bias: [dim] float32, added to dt first.
        dt_softplus: take softplus of dt + dt_bias, exact for very negative values.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        initial_state: [batch, dim, dstate] float32 or narrower (complex64 with a complex A), the state before the first token;
            zero when None. With cu_seqlens its first axis counts sequences.
        return_final_state: also return the state after the last token.
        cu_seqlens: [num_sequences + 1] int32 or int64: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1] of a batch of
            one, scanned from its own initial state. An empty sequence returns its initial state; rows past the last entry
            are zero.
        reverse: scan from the last token to the first, without a copy.
        batch_invariant: same bits for a row at any batch size and packing; None: as set_batch_invariant() says.
        state_positions: [num_sequences, npositions] int32 or int64 on the device of x (without cu_seqlens the sequences are the
            rows of the batch): after how many tokens of the sequence, counted as the scan meets them, the state is wanted.
            Ascending; 0 gives the initial state. What lies outside of 0..length gives zeros and may stand anywhere, so that
            -1 pads rows of unequal length.
        out, final_state_out, position_states_out: arrays to write the results to; states may have a narrower dtype.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, shaped and typed as x; with return_final_state (or final_state_out) the pair (y, final_state). With state_positions
        the states at them, [num_sequences, npositions, dim, dstate], come last: (y, states) or
        (y, final_state, states). The other results do not depend on them.

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Strides are honoured: transposed views and slices cost no copy. float32 inputs keep float32 accuracy.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3; S4D (arXiv:2206.11893) for complex A.
    """
    return _C.selective_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, return_final_state, cu_seqlens, reverse,
        _batch_invariant(batch_invariant), state_positions, out, final_state_out, position_states_out, stream,
    )  # fmt: skip


def selective_scan_backward(
    x: Any,
    dt: Any,
    A: Any,
    B: Any,
    C: Any,
    dy: Any,
    *,
    D: Any = None,
    z: Any = None,
    dt_bias: Any = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    reverse: bool = False,
    batch_invariant: bool | None = None,
    dfinal_state: Any = None,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Gradients of :func:`selective_scan`, given dy (shaped as y) and, if the final state was used, dfinal_state.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, cu_seqlens, reverse,
        batch_invariant, stream: as in the forward.
        dy: gradient of y, shaped and typed as x.
        dfinal_state: gradient of final_state, or None for zero.

    Returns:
        (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state), each shaped and typed as what it differentiates, None for
        what was not given. The gradient of dt goes through bias, softplus and limit.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`selective_scan`.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3; S4D (arXiv:2206.11893) for complex A.
    """
    return _C.selective_scan_backward(
        x, dt, A, B, C, dy, D, z, dt_bias, dt_softplus, dt_limit, initial_state, cu_seqlens, reverse,
        _batch_invariant(batch_invariant), dfinal_state, stream,
    )  # fmt: skip
