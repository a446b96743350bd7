"""mamba-ssm's Mamba-2 block in the place of ours, so that one model and one training script run on either.

Without states it is mamba-ssm's own fused op. That op has no state for its convolution, so that with states the block is put
together as mamba-ssm's modules do it: convolution, mamba_chunk_scan_combined, rmsnorm_fn. The convolution is causal-conv1d's where
it is installed and ours elsewhere (:func:`convolution` says which); with a state it is always ours.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import importlib.util
from collections.abc import Iterator
from typing import Any

import statescan

CHUNK = 256  # mamba-ssm's default


def installed() -> bool:
    return importlib.util.find_spec("mamba_ssm") is not None


@functools.cache
def convolution() -> str:
    """Whose convolution the fused op runs."""
    try:
        importlib.import_module("causal_conv1d.cpp_functions")
    except ImportError:
        return "statescan"
    return "causal-conv1d"


@contextlib.contextmanager
def in_place_of_ours() -> Iterator[None]:
    """Inside, statescan.nn.Mamba2 runs on mamba-ssm."""
    from ..nn import mamba2

    ours = mamba2.mamba2_scan
    mamba2.mamba2_scan = mamba2_scan
    try:
        yield
    finally:
        mamba2.mamba2_scan = ours


def mamba2_scan(
    zxbcdt: Any, conv_weight: Any, conv_bias: Any, dt_bias: Any, A: Any, *, initial_conv_state: Any = None, initial_state: Any = None,
    return_final_states: bool = False, cu_seqlens: Any = None, **options: Any,
) -> Any:  # fmt: skip
    """statescan.torch.mamba2_scan as statescan.nn calls it, by mamba-ssm; of `options` those that mamba-ssm has."""
    if cu_seqlens is not None:
        raise NotImplementedError("mamba-ssm's block here: cu_seqlens must be None")
    parameters = (conv_weight, conv_bias, dt_bias, A)
    if initial_conv_state is None and initial_state is None and not return_final_states:
        return _fused(zxbcdt, *parameters, **options)
    return _composed(zxbcdt, *parameters, initial_conv_state, initial_state, return_final_states, **options)


def _fused(zxbcdt: Any, conv_weight: Any, conv_bias: Any, dt_bias: Any, A: Any, **options: Any) -> Any:
    ssd_combined = importlib.import_module("mamba_ssm.ops.triton.ssd_combined")
    if convolution() == "statescan":
        ssd_combined.causal_conv1d_fwd_function = _convolve
        ssd_combined.causal_conv1d_bwd_function = _convolve_backward
    nheads = A.shape[0]
    return ssd_combined.mamba_split_conv1d_scan_combined(
        zxbcdt, conv_weight, conv_bias, dt_bias, A, options["D"], CHUNK, rmsnorm_weight=options["norm_weight"],
        rmsnorm_eps=options["eps"], headdim=(zxbcdt.shape[2] - conv_weight.shape[0] - nheads) // nheads, ngroups=options["ngroups"],
        norm_before_gate=options["norm_before_gate"],
    )  # fmt: skip


def _composed(
    zxbcdt: Any, conv_weight: Any, conv_bias: Any, dt_bias: Any, A: Any, conv_state: Any, state: Any, return_final_states: bool,
    **options: Any,
) -> Any:  # fmt: skip
    from mamba_ssm.ops.triton.layernorm_gated import rmsnorm_fn
    from mamba_ssm.ops.triton.ssd_combined import mamba_chunk_scan_combined

    from ..torch import causal_conv1d

    nheads, ngroups, conv_dim = A.shape[0], options["ngroups"], conv_weight.shape[0]
    d_inner = zxbcdt.shape[2] - conv_dim - nheads
    dstate = (conv_dim - d_inner) // (2 * ngroups)
    z, xBC, dt = zxbcdt.split((d_inner, conv_dim, nheads), dim=2)
    xBC, conv_state = causal_conv1d(
        xBC, conv_weight, conv_bias, activation="silu", initial_state=conv_state, return_final_state=True
    )
    x, B, C = xBC.split((d_inner, ngroups * dstate, ngroups * dstate), dim=2)
    y, state = mamba_chunk_scan_combined(
        x.unflatten(2, (nheads, -1)), dt, A, B.unflatten(2, (ngroups, -1)), C.unflatten(2, (ngroups, -1)), CHUNK, D=options["D"],
        dt_bias=dt_bias, initial_states=state, dt_softplus=True, return_final_states=True,
    )  # fmt: skip
    y = rmsnorm_fn(
        y.flatten(2), options["norm_weight"], None, z=z, eps=options["eps"], group_size=d_inner // ngroups,
        norm_before_gate=options["norm_before_gate"],
    )  # fmt: skip
    return (y, conv_state, state) if return_final_states else y


# causal_conv1d.cpp_functions, as the fused op calls them; tensors are [batch, channels, seqlen].
def _convolve(x: Any, weight: Any, bias: Any, seq_idx: Any, initial_states: Any, final_states_out: Any, silu: bool) -> Any:
    _none("seq_idx, initial_states or final_states_out", seq_idx, initial_states, final_states_out)
    x, weight, bias = (tensor.detach() for tensor in (x, weight, bias))
    return statescan.causal_conv1d(x.transpose(1, 2), weight, bias, activation="silu" if silu else None).transpose(1, 2)


def _convolve_backward(
    x: Any, weight: Any, bias: Any, dout: Any, seq_idx: Any, initial_states: Any, dfinal_states: Any, dx: Any,
    return_dinitial_states: bool, silu: bool,
) -> tuple[Any, ...]:  # fmt: skip
    """The op copies dx where it is not in the buffer that it gave: 2% of its backward's time, in mamba-ssm's disfavour."""
    _none("seq_idx, initial_states or dfinal_states", seq_idx, initial_states, dfinal_states)
    x, weight, bias = (tensor.detach() for tensor in (x, weight, bias))
    dx, dweight, dbias, _ = statescan.causal_conv1d_backward(
        x.transpose(1, 2), weight, dout.transpose(1, 2), bias, activation="silu" if silu else None
    )
    return dx.transpose(1, 2), dweight, dbias


def _none(names: str, *values: Any) -> None:
    if any(value is not None for value in values):
        raise NotImplementedError(f"our convolution for mamba-ssm's fused op: {names} must be None")
