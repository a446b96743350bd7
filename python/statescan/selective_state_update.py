"""selective_state_update: selective_scan or ssd_scan on one or a few new tokens."""

from __future__ import annotations

from typing import Any

from . import _C


def selective_state_update(
    state: Any,
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
    state_indices: Any = None,
    out_state_indices: Any = None,
    out: Any = None,
    stream: Any = None,
) -> Any:
    """One or a few steps of a scan: ``h = exp(dt A) h + dt B x``, ``y = C·h + D x``, then the gate; `state` is updated in place.

    The rank of `state` tells the model: Mamba-1 as :func:`statescan.selective_scan`, Mamba-2 as :func:`statescan.ssd_scan`.

    Args:
        state: [slots, dim, dstate] (Mamba-1) or [slots, nheads, headdim, dstate] (Mamba-2), float32, float16 or bfloat16
            (complex64 with a complex A; float64 with float64 inputs).
        x: [batch, dim] or [batch, nheads, headdim], with an axis of tokens after batch for several; float32, float16 or
            bfloat16 (float64 on the CPU).
        dt: [batch, dim] or [batch, nheads], with the token axis of x; any of these dtypes.
        A: [dim, dstate] float32 or complex64, or [nheads] float32.
        B, C: [batch, ngroups, dstate] with the token axis of x, dtype of x (complex64 with a complex A); for Mamba-1 also
            [dim, dstate] in the dtype of A when time-invariant.
        D: [dim], or [nheads] or [nheads, headdim], float32.
        z: as x, the gate: y is multiplied by ``silu(z)``.
        dt_bias: [dim] or [nheads] float32, added to dt first.
        dt_softplus: take softplus of dt + dt_bias, exact for very negative values.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        state_indices: [batch] int32 or int64, the slot that each row reads; -1 marks padding: y is zero and no state is
            touched. None: row i is slot i, and slots = batch.
        out_state_indices: [batch] int32 or int64, the slot that each row writes, -1 for none; None: the one it read. No slot
            may be written twice, nor written by one row and read by another.
        out: array to write y to.
        stream: the CUDA stream, as an integer or an object with ``__cuda_stream__``; the framework's current one when None.

    Returns:
        y, shaped and typed as x.

    Raises:
        ValueError: a shape, stride, size, index or device does not fit; the message names the argument.
        TypeError: a dtype is not supported.
        NotImplementedError: no kernel of this build serves the call.

    Source: Gu & Dao 2023 (arXiv:2312.00752), section 3; Dao & Gu 2024 (arXiv:2405.21060), equation 16.
    """
    return _C.selective_state_update(
        state, x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, state_indices, out_state_indices, out, stream
    )
