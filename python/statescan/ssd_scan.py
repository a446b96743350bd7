"""ssd_scan: the Mamba-2 scan (state space duality)."""

from __future__ import annotations

from typing import Any

from . import _C
from ._options import batch_invariant as _batch_invariant


def ssd_scan(
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
    chunk_size: int | None = None,
    batch_invariant: bool | None = None,
    state_positions: Any = None,
    ssd_mode: str | None = None,
    save_states: bool = False,
    out: Any = None,
    final_state_out: Any = None,
    position_states_out: Any = None,
    chunk_states_out: Any = None,
    stream: Any = None,
) -> Any:
    """Mamba-2 scan: ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = C[t]·h[t] + D x[t]``, then the gate.

    Args:
        x: [batch, seqlen, nheads, headdim] float32, float16 or bfloat16 (float64 on the CPU).
        dt: [batch, seqlen, nheads] any of these dtypes, the step of each head.
        A: [nheads] float32, negative for a decaying state.
        B, C: [batch, seqlen, ngroups, dstate] dtype of x; ngroups divides nheads, a group serves consecutive heads.
        D: [nheads] or [nheads, headdim] float32, the skip connection.
        z: as x, the gate: y is multiplied by ``silu(z)``.
        dt_bias: [nheads] float32, added to dt first.
        dt_softplus: take softplus of dt + dt_bias, exact for very negative values.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        initial_state: [batch, nheads, headdim, dstate] float32 or narrower, the state before the first token; zero when None. With
            cu_seqlens its first axis counts sequences.
        return_final_state: also return the state after the last token.
        cu_seqlens: [num_sequences + 1] int32 or int64: sequence i is tokens cu_seqlens[i] to cu_seqlens[i+1] of a batch of
            one, scanned from its own initial state. An empty sequence returns its initial state; rows past the last entry
            are zero.
        reverse: scan from the last token to the first, without a copy.
        chunk_size: tokens that are worked on at a time; None lets the library pick. The result does not depend on it.
        batch_invariant: same bits for a row at any batch size and packing; None: as set_batch_invariant() says.
        state_positions: [num_sequences, npositions] int32 or int64 on the device of x (without cu_seqlens the sequences are the
            rows of the batch): after how many tokens of the sequence, counted as the scan meets them, the state is wanted.
            Ascending; 0 gives the initial state. What lies outside of 0..length gives zeros and may stand anywhere, so that
            -1 pads rows of unequal length.
        ssd_mode: "chunked" (matrix products inside chunks, a state between them), "recurrent" (token by token), "quadratic"
            (one chunk, the masked attention form, whose work grows with the square of seqlen), or None: what is fastest.
        save_states: also return the state that enters each stretch of 128 tokens, 256 on the CPU, for ssd_scan_backward, which
            then need not make them again: dstate/128 of the memory of x, or half. In reverse a GPU's fused backward does all the
            same (``plan("ssd_scan_backward", ...).reads_kept_states``).
        out, final_state_out, position_states_out, chunk_states_out: arrays to write the results to; states may have a narrower
            dtype, those of chunk_states_out that of x or float32.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, shaped and typed as x; with return_final_state (or final_state_out) the pair (y, final_state). With state_positions
        the states at them, [num_sequences, npositions, nheads, headdim, dstate], come next: (y, states) or
        (y, final_state, states). With save_states (or chunk_states_out) chunk_states comes last, in the dtype of x:
        [batch, ceil(seqlen/t), nheads, headdim, dstate] for stretches of t; with cu_seqlens [1, seqlen//t + num_sequences, ...],
        where sequence i has its stretch k in row cu_seqlens[i]//t + i + k, and other rows hold nothing. The other results
        agree to rounding with those of a call that asks for less, which another kernel may serve (see plan): so without states
        (short sequences) and with save_states.

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Strides are honoured: transposed views and slices cost no copy. float32 inputs keep float32 accuracy.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), equation 16 and section 6.
    """
    return _C.ssd_scan(
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, return_final_state, cu_seqlens, reverse,
        chunk_size or 0, _batch_invariant(batch_invariant), state_positions, ssd_mode, save_states, out, final_state_out,
        position_states_out, chunk_states_out, stream,
    )  # fmt: skip


def ssd_scan_backward(
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
    chunk_size: int | None = None,
    batch_invariant: bool | None = None,
    dfinal_state: Any = None,
    chunk_states: Any = None,
    stream: Any = None,
) -> tuple[Any, ...]:
    """Gradients of :func:`ssd_scan`, given dy (shaped as y) and, if the final state was used, dfinal_state.

    Args:
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, cu_seqlens, reverse, chunk_size,
        batch_invariant, stream: as in the forward.
        dy: gradient of y, shaped and typed as x.
        dfinal_state: gradient of final_state, or None for zero.
        chunk_states: what the forward, called with the same arguments and save_states, returned last; None: they are made again.

    Returns:
        (dx, ddt, dA, dB, dC, dD, dz, ddt_bias, dinitial_state), each shaped and typed as what it differentiates, None for
        what was not given. The gradient of dt goes through bias, softplus and limit; it is zero where the limit holds dt.

    The states inside the scan are made again: on the CPU those that enter chunks of 64 tokens (chunk_size, if that is more, up to
    256) are kept, for the heads that are worked on at the time.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`ssd_scan`.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), equation 16 and section 6.
    """
    return _C.ssd_scan_backward(
        x, dt, A, B, C, dy, D, z, dt_bias, dt_softplus, dt_limit, initial_state, cu_seqlens, reverse,
        chunk_size or 0, _batch_invariant(batch_invariant), dfinal_state, chunk_states, stream,
    )  # fmt: skip
