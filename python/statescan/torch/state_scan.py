"""state_scan for torch: the scan over chunk states, and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from ._op import Op, Results, state_dtype


def _results(a: SimpleNamespace) -> Results:
    sequences = a.update.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    return {
        "states": (a.update.shape, a.update.dtype),
        "final_state": ((sequences, *a.update.shape[2:]), state_dtype(a.update)),
    }


_OP = Op(
    "state_scan",
    "Tensor log_decay, Tensor update, Tensor? initial_state, Tensor? cu_seqlens, bool reverse",
    results=_results,
    asked={"states": None, "final_state": None},
    backward="log_decay states dstates dfinal_state initial_state cu_seqlens reverse",
    gradients="log_decay update initial_state",
    like={"update": "states"},
    narrow="update",
    wide="log_decay",
)


def state_scan(
    log_decay: Tensor,
    update: Tensor,
    *,
    initial_state: Tensor | None = None,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
) -> tuple[Tensor, Tensor]:
    """Scan chunk states: ``S[c] = exp(log_decay[c]) S[c-1] + update[c]``.

    :func:`statescan.state_scan` with a gradient for log_decay, update and initial_state, through both results.

    Args:
        log_decay: [batch, nchunks, nheads] float32 (float64 with a float64 update): the sum of dt·A over each chunk.
        update: [batch, nchunks, nheads, headdim, dstate] float32, float16 or bfloat16 (float64 on the CPU).
        initial_state: [batch or num_sequences, nheads, headdim, dstate] float32 or narrower; zero when None.
        cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences of chunks in a batch of one.
        reverse: scan from the last chunk to the first.

    Returns:
        (states, final_state): the state before each chunk, shaped and typed as update, and the state after the last chunk in
        float32.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.state_scan`; a second derivative is not implemented.

    Under autocast update takes its dtype; log_decay is float32.

    Source: Dao & Gu 2024, Transformers are SSMs, section 6 (arXiv:2405.21060).
    """
    return _OP.call((log_decay, update, initial_state, cu_seqlens, reverse))
