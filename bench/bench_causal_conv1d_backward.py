"""causal_conv1d_backward: the gradients of the convolution of a Mamba-2 block, in both layouts."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import bench_causal_conv1d as forward
from .harness import Cost, Expected

SAMPLE = 64  # channels


def _inputs(s, rng):
    a = forward._inputs(s, rng)
    dy = rng.standard_normal(a["out"].shape, np.float32)
    if s["channels_first"]:
        dy = np.swapaxes(np.ascontiguousarray(np.swapaxes(dy, 1, 2)), 1, 2)
    del a["out"]
    return a | {"dy": dy}


def _expected(a, s):
    """dx of the last row and dweight, dbias of all, in a few channels."""
    some = np.unique(np.linspace(0, s["dim"] - 1, SAMPLE).astype(int))
    weight, taps = a["weight"][some], forward.WIDTH - 1
    inputs = np.pad(a["x"][:, :, some], ((0, 0), (taps, 0), (0, 0)))
    windows = [inputs[:, k : k + s["seqlen"]] for k in range(forward.WIDTH)]
    sums = a["bias"][some] + sum(weight[:, k] * window for k, window in enumerate(windows))
    sigmoid = 1 / (1 + np.exp(-sums))
    dsums = a["dy"][:, :, some] * sigmoid * (1 + sums * (1 - sigmoid))
    later = np.pad(dsums[-1], ((0, taps), (0, 0)))
    dx = sum(weight[:, k] * later[taps - k : taps - k + s["seqlen"]] for k in range(forward.WIDTH))
    dweight = np.stack([(dsums * window).sum((0, 1)) for window in windows], 1)
    return [
        Expected("dx", lambda v: v[-1][:, some], dx),
        Expected("dweight", lambda v: v[some], dweight),
        Expected("dbias", lambda v: v[some], dsums.sum((0, 1))),
    ]


def _cost(s, e):
    outputs = s["batch"] * s["seqlen"] * s["dim"]
    return Cost(3 * e * outputs, (6 * forward.WIDTH + 8) * outputs)  # what SiLU and its derivative take counted as eight


BENCHMARK = dataclasses.replace(
    forward.BENCHMARK,
    op="causal_conv1d_backward",
    inputs=_inputs,
    arguments=lambda a: ((a["x"], a["weight"], a["dy"], a["bias"]), {"activation": "silu"}),
    cost=_cost,
    expected=_expected,
    outputs=("dx", "dweight", "dbias", "dinitial_state"),
    takes_outputs=False,
)
