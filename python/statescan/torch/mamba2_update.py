"""mamba2_update for torch: a Mamba-2 block on one or a few new tokens."""

from __future__ import annotations

from types import SimpleNamespace

from torch import Tensor

from ._op import Results, Update


def _results(a: SimpleNamespace) -> Results:
    d_inner = a.zxbcdt.shape[-1] - a.conv_weight.shape[0] - a.A.shape[0]
    return {"y": ((*a.zxbcdt.shape[:-1], d_inner), a.zxbcdt.dtype)}


_OP = Update(
    "mamba2_update",
    "Tensor zxbcdt, Tensor(a!) conv_state, Tensor(b!) state, Tensor conv_weight, Tensor? conv_bias, Tensor? dt_bias, Tensor A, "
    "Tensor? D, Tensor? norm_weight, int ngroups, int norm_group_size, float eps, bool norm_before_gate, bool dt_softplus, "
    "float[]? dt_limit, Tensor? state_indices",
    results=_results,
    narrow="zxbcdt",
    wide="conv_weight conv_bias dt_bias A D norm_weight",
)


def mamba2_update(
    zxbcdt: Tensor,
    conv_state: Tensor,
    state: Tensor,
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
    state_indices: Tensor | None = None,
) -> Tensor:
    """One or a few steps of :func:`statescan.torch.mamba2_scan`; both states are updated in place.

    :func:`statescan.mamba2_update`, also under torch.compile and torch.export. No gradient.

    Args:
        zxbcdt: [batch, m] or [batch, ntokens, m], m = d_inner + conv_dim + nheads; float32, float16 or bfloat16 (float64 on
            the CPU).
        conv_state: [slots, conv_dim, width - 1] dtype of zxbcdt or float32: the last inputs of each sequence, oldest first.
        state: [slots, nheads, headdim, dstate] float32 or narrower.
        conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, norm_group_size, eps, norm_before_gate, dt_softplus,
        dt_limit: as in :func:`statescan.torch.mamba2_scan`.
        state_indices: [batch] int32 or int64, the slot of each row in both states, -1 for padding; None: row i is slot i.

    Returns:
        y, [batch, d_inner] or [batch, ntokens, d_inner] in the dtype of zxbcdt.

    Raises:
        ValueError, TypeError, NotImplementedError: as :func:`statescan.mamba2_update`; TypeError for a tensor that requires
            grad while gradients are enabled.

    Source: Dao & Gu 2024, Transformers are SSMs (arXiv:2405.21060), section 7.
    """
    return _OP.call((
        zxbcdt, conv_state, state, conv_weight, conv_bias, dt_bias, A, D, norm_weight, ngroups, norm_group_size or 0, eps,
        norm_before_gate, dt_softplus, dt_limit, state_indices,
    ))  # fmt: skip
