"""selective_scan for torch: the Mamba-1 scan (S6) and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from .._options import batch_invariant as _batch_invariant
from ._op import Op, Results, state_dtype


def _results(a: SimpleNamespace) -> Results:
    sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    dtype = a.A.dtype if a.A.dtype.is_complex else state_dtype(a.x)
    positions = 0 if a.state_positions is None else a.state_positions.shape[1]
    return {
        "y": (a.x.shape, a.x.dtype),
        "final_state": ((sequences, *a.A.shape), dtype),
        "position_states": ((sequences, positions, *a.A.shape), dtype),
    }


_OP = Op(
    "selective_scan",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float[]? dt_limit, Tensor? initial_state, bool return_final_state, Tensor? cu_seqlens, bool reverse, "
    "bool batch_invariant, Tensor? state_positions",
    results=_results,
    asked={"y": None, "final_state": "return_final_state", "position_states": "state_positions"},
    backward="x dt A B C dy D z dt_bias dt_softplus dt_limit initial_state cu_seqlens reverse batch_invariant dfinal_state",
    gradients="x dt A B C D z dt_bias initial_state",
    narrow="x B C z",
    wide="A D dt_bias",
    constant="B C",
    laid_out="x dt z",
)


def selective_scan(
    x: Tensor,
    dt: Tensor,
    A: Tensor,
    B: Tensor,
    C: Tensor,
    *,
    D: Tensor | None = None,
    z: Tensor | None = None,
    dt_bias: Tensor | None = None,
    dt_softplus: bool = False,
    dt_limit: tuple[float, float] | None = None,
    initial_state: Tensor | None = None,
    return_final_state: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    batch_invariant: bool | None = None,
    state_positions: Tensor | None = None,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-1 scan: ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = C[t]·h[t] + D x[t]``, then the gate.

    :func:`statescan.selective_scan` with a gradient for every tensor but cu_seqlens, through y and the final state. With a
    complex A the state is complex and ``y[t] = 2 Re(C[t]·h[t]) + D x[t]``; gradients of complex tensors follow torch.

    Args:
        x: [batch, seqlen, dim] float32, float16 or bfloat16 (float64 on the CPU).
        dt: [batch, seqlen, dim] any of these dtypes.
        A: [dim, dstate] float32 or complex64.
        B, C: [batch, seqlen, ngroups, dstate] dtype of x (complex64 with a complex A), or [dim, dstate] in the dtype of A
            when time-invariant. Autocast leaves complex and time-invariant ones as they are.
        D: [dim] float32, the skip connection.
        z: as x, the gate: y is multiplied by ``silu(z)``.
        dt_bias: [dim] float32, added to dt first.
        dt_softplus: take softplus of dt + dt_bias.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        initial_state: [batch or num_sequences, dim, dstate] float32 or narrower (complex64 with a complex A); zero when None.
        return_final_state: also return the state after the last token.
        cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences in a batch of one.
        reverse: scan from the last token to the first.
        batch_invariant: same bits for a row at any batch size and packing; None: as set_batch_invariant() says.
        state_positions: [batch or num_sequences, npositions] int32 or int64: after how many tokens the state is wanted as well.

    Returns:
        y, shaped and typed as x; with return_final_state the pair (y, final_state), the state in float32 or complex64.
        With state_positions the states there, [.., npositions, dim, dstate], come last, without a
        gradient: where one is wanted they are refused.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.selective_scan`; a second derivative is not implemented.

    Under autocast x, B, C and z take its dtype; A, D and dt_bias are float32, dt stays as it is.

    Source: Gu & Dao 2023, Mamba (arXiv:2312.00752), section 3; S4D (arXiv:2206.11893) for complex A.
    """
    return _OP.call((
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, return_final_state, cu_seqlens, reverse,
        _batch_invariant(batch_invariant), state_positions,
    ))  # fmt: skip
