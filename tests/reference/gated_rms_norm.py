import numpy as np

from .common import dsilu, silu


def gated_rms_norm(x, z=None, weight=None, *, group_size=None, eps=1e-5, norm_before_gate=False):
    """rms(x) weight silu(z), or rms(x silu(z)) weight; rms over each group of group_size channels."""
    if z is not None and not norm_before_gate:
        x = x * silu(z)
    group_size = group_size or x.shape[-1]
    grouped = x.reshape(*x.shape[:-1], x.shape[-1] // group_size, group_size)
    y = (grouped / np.sqrt(np.mean(grouped**2, axis=-1, keepdims=True) + eps)).reshape(x.shape)
    if weight is not None:
        y = y * weight
    if z is not None and norm_before_gate:
        y = y * silu(z)
    return y


def gated_rms_norm_backward(x, dy, z=None, weight=None, *, group_size=None, eps=1e-5, norm_before_gate=False):
    """Backwards through the lines of the forward. Returns dx, dz (None without z), dweight (None without weight)."""
    group_size = group_size or x.shape[-1]
    gate = 1.0 if z is None else silu(z)
    grouped = lambda v: v.reshape(*v.shape[:-1], v.shape[-1] // group_size, group_size)
    v = x if norm_before_gate else x * gate
    scale = 1 / np.sqrt(np.mean(grouped(v) ** 2, axis=-1, keepdims=True) + eps)
    unit = (grouped(v) * scale).reshape(x.shape)
    weighted = unit if weight is None else unit * weight

    dgate = dy * weighted if norm_before_gate else 0.0
    dweighted = dy * gate if norm_before_gate else dy
    dweight = None if weight is None else np.sum((dweighted * unit).reshape(-1, x.shape[-1]), axis=0)
    dunit = dweighted if weight is None else dweighted * weight
    # unit = v scale, and the scale falls with every v of its group: d scale / dv = -scale^3 v / group_size
    slope = np.sum(grouped(dunit) * grouped(v), axis=-1, keepdims=True) * scale**3 / group_size
    dv = (grouped(dunit) * scale - grouped(v) * slope).reshape(x.shape)
    if norm_before_gate:
        dx = dv
    else:
        dx, dgate = dv * gate, dv * x
    return dx, None if z is None else dgate * dsilu(z), dweight
