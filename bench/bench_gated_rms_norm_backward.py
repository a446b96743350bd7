"""gated_rms_norm_backward: the gradients of the norm that ends a Mamba-2 block."""

from __future__ import annotations

import dataclasses

import numpy as np

from . import bench_gated_rms_norm as forward
from .harness import Cost, Expected

EPS = 1e-5


def _inputs(s, rng):
    return forward._inputs(s, rng) | {"dy": rng.standard_normal((s["rows"], s["dim"]), np.float32)}


def _expected(a, s):
    x, z, weight, dy = (a[name] for name in ("x", "z", "weight", "dy"))
    sigmoid = 1 / (1 + np.exp(-z))
    gate, dgate = z * sigmoid, sigmoid * (1 + z * (1 - sigmoid))
    scale = 1 / np.sqrt(((x * gate) ** 2).mean(1, keepdims=True) + EPS)
    normed, dnormed = x * gate * scale, dy * weight
    dgated = scale * (dnormed - normed * (dnormed * normed).mean(1, keepdims=True))
    return [
        Expected("dx", lambda v: v, dgated * gate),
        Expected("dz", lambda v: v, dgated * x * dgate),
        Expected("dweight", lambda v: v, (dy * normed).sum(0)),
    ]


BENCHMARK = dataclasses.replace(
    forward.BENCHMARK,
    op="gated_rms_norm_backward",
    inputs=_inputs,
    arguments=lambda a: ((a["x"], a["dy"], a["z"], a["weight"]), {}),
    cost=lambda s, e: Cost(5 * e * s["rows"] * s["dim"], 24 * s["rows"] * s["dim"]),  # SiLU and its derivative counted as eight
    expected=_expected,
    outputs=("dx", "dz", "dweight"),
    takes_outputs=False,
)
