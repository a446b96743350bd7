"""state_scan: the scan over chunk states that links the chunks of an SSD."""

from __future__ import annotations

from typing import Any

from . import _C


def state_scan(
    log_decay: Any,
    update: Any,
    *,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    reverse: bool = False,
    out: Any = None,
    final_state_out: Any = None,
    stream: Any = None,
) -> tuple[Any, Any]:
    """Scan chunk states: ``S[c] = exp(log_decay[c]) S[c-1] + update[c]``.

    Args:
        log_decay: [batch, nchunks, nheads] float32 (float64 with a float64 update): the sum of dt·A over each chunk.
        update: [batch, nchunks, nheads, headdim, dstate] float32, float16 or bfloat16 (float64 on the CPU).
        initial_state: [batch, nheads, headdim, dstate] float32 or narrower, S before the first chunk; zero when None.
            With cu_seqlens its first axis counts sequences.
        cu_seqlens: [num_sequences + 1] int32 or int64: sequence i is chunks cu_seqlens[i] to cu_seqlens[i+1] of a batch of
            one. Chunks past the last entry give zero.
        reverse: scan from the last chunk to the first.
        out, final_state_out: arrays to write the results to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        (states, final_state): the state before each chunk, shaped and typed as update, and the state after the last chunk,
        [batch or num_sequences, nheads, headdim, dstate] in float32.

    Raises:
        ValueError: a shape, stride, size or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Source: Dao & Gu 2024, Transformers are SSMs, section 6 (arXiv:2405.21060).
    """
    return _C.state_scan(log_decay, update, initial_state, cu_seqlens, reverse, out, final_state_out, stream)


def state_scan_backward(
    log_decay: Any,
    states: Any,
    dstates: Any,
    *,
    dfinal_state: Any = None,
    initial_state: Any = None,
    cu_seqlens: Any = None,
    reverse: bool = False,
    stream: Any = None,
) -> tuple[Any, Any, Any]:
    """Gradients of :func:`state_scan`.

    With G[c] the adjoint of S[c]: ``G[last] = dfinal_state``, ``G[c-1] = dstates[c] + exp(log_decay[c]) G[c]``;
    ``dupdate[c] = G[c]`` and ``dlog_decay[c] = exp(log_decay[c]) <G[c], states[c]>``.

    Args:
        log_decay, initial_state, cu_seqlens, reverse, stream: as in the forward.
        states: [batch, nchunks, nheads, headdim, dstate], what the forward returned.
        dstates: gradient of states, same shape and dtype.
        dfinal_state: gradient of final_state, or None for zero.

    Returns:
        (dlog_decay, dupdate, dinitial_state); the last is float32 and given whether or not there was an initial_state.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`state_scan`.

    Source: Dao & Gu 2024, Transformers are SSMs, section 6 (arXiv:2405.21060).
    """
    return _C.state_scan_backward(log_decay, states, dstates, dfinal_state, initial_state, cu_seqlens, reverse, stream)
