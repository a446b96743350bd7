import numpy as np

from .common import silu


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
