"""causal_conv1d_update: one token through the convolution of a Mamba-2 block."""

from __future__ import annotations

import numpy as np

from . import exact
from .bench_causal_conv1d import MODELS, WIDTH
from .harness import Benchmark, Cost, Expected
from .shapes import decode


def _inputs(s, rng):
    b, d = s["batch"], s["dim"]
    return {
        "x": rng.standard_normal((b, d), np.float32),
        "state": rng.standard_normal((b, d, WIDTH - 1), np.float32),
        "weight": rng.standard_normal((d, WIDTH), np.float32),
        "bias": rng.standard_normal(d, np.float32),
    }


def _expected(a, s):
    x, state = a["x"][-1:], a["state"][-1]
    return [
        Expected("y", lambda v: v[-1:], exact.conv(x, a["weight"], a["bias"], state)),
        Expected("state", lambda v: v[-1], np.concatenate([state[:, 1:], x.T], axis=1)),
    ]


def _cost(s, e):
    outputs = s["batch"] * s["dim"]
    return Cost(e * outputs * 2 * WIDTH + 4 * s["dim"] * (WIDTH + 1), (2 * WIDTH + 4) * outputs)


BENCHMARK = Benchmark(
    op="causal_conv1d_update",
    cases=decode({name: {"dim": dim} for name, dim in MODELS.items()}),
    inputs=_inputs,
    arguments=lambda a: ((a["x"], a["state"], a["weight"], a["bias"]), {"activation": "silu"}),
    cost=_cost,
    expected=_expected,
    wide=frozenset({"weight", "bias"}),
    in_place=("state",),
)
