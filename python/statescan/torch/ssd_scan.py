"""ssd_scan for torch: the Mamba-2 scan (state space duality) and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from .._options import batch_invariant as _batch_invariant
from ._op import Op, Results, state_dtype, wants_gradient


def _results(a: SimpleNamespace) -> Results:
    sequences = a.x.shape[0] if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    state = (*a.x.shape[2:], a.B.shape[3])
    stretch = 256 if a.x.device.type == "cpu" else 128
    stretches = -(-a.x.shape[1] // stretch) if a.cu_seqlens is None else a.x.shape[1] // stretch + sequences
    positions = 0 if a.state_positions is None else a.state_positions.shape[1]
    return {
        "y": (a.x.shape, a.x.dtype),
        "final_state": ((sequences, *state), state_dtype(a.x)),
        "position_states": ((sequences, positions, *state), state_dtype(a.x)),
        "chunk_states": ((a.x.shape[0], stretches, *state), a.x.dtype),
    }


_OP = Op(
    "ssd_scan",
    "Tensor x, Tensor dt, Tensor A, Tensor B, Tensor C, Tensor? D, Tensor? z, Tensor? dt_bias, bool dt_softplus, "
    "float[]? dt_limit, Tensor? initial_state, bool return_final_state, Tensor? cu_seqlens, bool reverse, int chunk_size, "
    "bool batch_invariant, Tensor? state_positions, str? ssd_mode, bool save_states",
    results=_results,
    asked={
        "y": None,
        "final_state": "return_final_state",
        "position_states": "state_positions",
        "chunk_states": "save_states",
    },
    backward="x dt A B C dy D z dt_bias dt_softplus dt_limit initial_state cu_seqlens reverse chunk_size batch_invariant "
    "dfinal_state chunk_states",
    gradients="x dt A B C D z dt_bias initial_state",
    narrow="x B C z",
    wide="A D dt_bias",
)


def ssd_scan(
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
    chunk_size: int | None = None,
    batch_invariant: bool | None = None,
    state_positions: Tensor | None = None,
    ssd_mode: str | None = None,
    save_states: bool = False,
) -> Tensor | tuple[Tensor, ...]:
    """Mamba-2 scan: ``h[t] = exp(dt[t] A) h[t-1] + dt[t] B[t] x[t]``, ``y[t] = C[t]·h[t] + D x[t]``, then the gate.

    :func:`statescan.ssd_scan` with a gradient for every tensor but cu_seqlens, through y and the final state.

    Args:
        x: [batch, seqlen, nheads, headdim] float32, float16 or bfloat16 (float64 on the CPU).
        dt: [batch, seqlen, nheads] any of these dtypes.
        A: [nheads] float32.
        B, C: [batch, seqlen, ngroups, dstate] dtype of x.
        D: [nheads] or [nheads, headdim] float32, the skip connection.
        z: as x, the gate: y is multiplied by ``silu(z)``.
        dt_bias: [nheads] float32, added to dt first.
        dt_softplus: take softplus of dt + dt_bias.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        initial_state: [batch or num_sequences, nheads, headdim, dstate] float32 or narrower; zero when None.
        return_final_state: also return the state after the last token.
        cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences in a batch of one.
        reverse: scan from the last token to the first.
        chunk_size: tokens that are worked on at a time; None lets the library pick.
        batch_invariant: same bits for a row at any batch size and packing; None: as set_batch_invariant() says.
        state_positions: [batch or num_sequences, npositions] int32 or int64: after how many tokens the state is wanted as well.
        ssd_mode: "chunked", "recurrent" or "quadratic", the form of the computation; None lets the library pick.
        save_states: keep the state that enters each stretch of 128 tokens, 256 on the CPU, for the backward, which then need not
            make them again: dstate/128 of the memory of x, or half, until the backward. Nothing is kept without a gradient, nor
            for a backward that would not read it, as a GPU's fused one in reverse (the plan of ssd_scan_backward:
            reads_kept_states); under torch.compile, which does not know the kernel, always.

    Returns:
        y, shaped and typed as x; with return_final_state the pair (y, final_state), the state in float32.
        With state_positions the states there, [.., npositions, nheads, headdim, dstate], come last, without a
        gradient: where one is wanted they are refused.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.ssd_scan`; a second derivative is not implemented.

    Under autocast x, B, C and z take its dtype; A, D and dt_bias are float32, dt stays as it is.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), equation 16 and section 6.
    """
    args = (
        x, dt, A, B, C, D, z, dt_bias, dt_softplus, dt_limit, initial_state, return_final_state, cu_seqlens, reverse,
        chunk_size or 0, _batch_invariant(batch_invariant), state_positions, ssd_mode,
        save_states and wants_gradient(x, dt, A, B, C, D, z, dt_bias, initial_state),
    )  # fmt: skip
    if args[-1] and not _OP.reads_kept(args):
        args = (*args[:-1], False)
    return _OP.call(args)
