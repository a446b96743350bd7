"""mamba2_scan for torch: a whole Mamba-2 block between its two projections, and its gradient."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from .._options import batch_invariant as _batch_invariant
from ._op import Op, Results, state_dtype


def _results(a: SimpleNamespace) -> Results:
    batch, seqlen, width = a.zxbcdt.shape
    conv_dim, conv_width = a.conv_weight.shape
    nheads = a.A.shape[0]
    d_inner = width - conv_dim - nheads
    dstate = (conv_dim - d_inner) // (2 * a.ngroups)
    sequences = batch if a.cu_seqlens is None else a.cu_seqlens.shape[0] - 1
    return {
        "y": ((batch, seqlen, d_inner), a.zxbcdt.dtype),
        "final_conv_state": ((sequences, conv_dim, conv_width - 1), a.zxbcdt.dtype),
        "final_state": ((sequences, nheads, d_inner // nheads, dstate), state_dtype(a.zxbcdt)),
    }


_OP = Op(
    "mamba2_scan",
    "Tensor zxbcdt, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A, Tensor? D, Tensor? norm_weight, "
    "int ngroups, int norm_group_size, float eps, bool norm_before_gate, bool dt_softplus, float[]? dt_limit, "
    "Tensor? initial_conv_state, Tensor? initial_state, bool return_final_states, Tensor? cu_seqlens, bool reverse, "
    "int chunk_size, bool batch_invariant",
    results=_results,
    asked={"y": None, "final_conv_state": "return_final_states", "final_state": "return_final_states"},
    backward="zxbcdt conv_weight conv_bias dt_bias A dy D norm_weight ngroups norm_group_size eps norm_before_gate dt_softplus "
    "dt_limit initial_conv_state initial_state cu_seqlens reverse chunk_size batch_invariant dfinal_conv_state dfinal_state",
    gradients="zxbcdt conv_weight conv_bias dt_bias A D norm_weight initial_conv_state initial_state",
    narrow="zxbcdt",
    wide="conv_weight conv_bias dt_bias A D norm_weight initial_conv_state",
)


def mamba2_scan(
    zxbcdt: Tensor,
    conv_weight: Tensor,
    conv_bias: Tensor | None,
    dt_bias: Tensor | None,
    A: Tensor,
    *,
    D: Tensor | None = None,
    norm_weight: Tensor | None = None,
    ngroups: int = 1,
    norm_group_size: int | None = None,
    eps: float = 1e-5,
    norm_before_gate: bool = False,
    dt_softplus: bool = True,
    dt_limit: tuple[float, float] | None = None,
    initial_conv_state: Tensor | None = None,
    initial_state: Tensor | None = None,
    return_final_states: bool = False,
    cu_seqlens: Tensor | None = None,
    reverse: bool = False,
    chunk_size: int | None = None,
    batch_invariant: bool | None = None,
) -> Tensor | tuple[Tensor, Tensor, Tensor]:
    """Mamba-2 block from the output of in_proj to the input of out_proj: split, convolution, SiLU, scan, gate, norm.

    ``z, xBC, dt = split(zxbcdt)``; ``x, B, C = split(silu(causal_conv1d(xBC)))``; ``y = ssd_scan(x, dt, A, B, C, D)``;
    ``y = gated_rms_norm(y, z, norm_weight)``. :func:`statescan.mamba2_scan` with a gradient for every tensor but cu_seqlens,
    through all results.

    Args:
        zxbcdt: [batch, seqlen, d_inner + conv_dim + nheads] float32, float16 or bfloat16 (float64 on the CPU).
        conv_weight: [conv_dim, width] dtype of zxbcdt or float32, conv_dim = d_inner + 2 ngroups dstate.
        conv_bias: [conv_dim] dtype of conv_weight, or None.
        dt_bias: [nheads] float32, or None.
        A: [nheads] float32.
        D: [nheads] or [nheads, headdim] float32, the skip connection.
        norm_weight: [d_inner] dtype of zxbcdt or float32; None: y is gated, y silu(z), and not normalised.
        ngroups: groups of B and C; divides nheads.
        norm_group_size: channels that are normalised together; None for d_inner / ngroups.
        eps, norm_before_gate: as in :func:`statescan.torch.gated_rms_norm`.
        dt_softplus: take softplus of dt + dt_bias.
        dt_limit: (low, high) that dt is limited to after bias and softplus; None for no limit.
        initial_conv_state: [batch or num_sequences, conv_dim, width - 1] dtype of zxbcdt or float32; zero when None.
        initial_state: [batch or num_sequences, nheads, headdim, dstate] float32 or narrower; zero when None.
        return_final_states: also return both states after the last token.
        cu_seqlens: [num_sequences + 1] int32 or int64, packed sequences in a batch of one.
        reverse: run the convolution and the scan from the last token to the first.
        chunk_size: tokens that are worked on at a time; None lets the library pick.
        batch_invariant: same bits for a row at any batch size and packing; None: as set_batch_invariant() says.

    Returns:
        y, [batch, seqlen, d_inner] in the dtype of zxbcdt; with return_final_states (y, final_conv_state, final_state).

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.mamba2_scan`; a second derivative is not implemented.

    Under autocast zxbcdt takes its dtype; parameters and initial_conv_state are float32.

    With 16-bit inputs a GPU rounds x, B, C and, before a norm, y to 16 bits on their way from one part to the next, as separate
    calls would; the CPU does not.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), section 7.
    """
    return _OP.call((
        zxbcdt, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, norm_group_size or 0, eps, norm_before_gate,
        dt_softplus, dt_limit, initial_conv_state, initial_state, return_final_states, cu_seqlens, reverse, chunk_size or 0,
        _batch_invariant(batch_invariant),
    ))  # fmt: skip
