"""mamba2_update: one decode step of a whole Mamba-2 block."""

from __future__ import annotations

import numpy as np

from . import exact
from .bench_mamba2_scan import PARAMETERS, WIDTH, parameters, projected
from .harness import Benchmark, Cost, Expected
from .shapes import MAMBA2, decode


def _inputs(s, rng):
    b, inner = s["batch"], s["nheads"] * s["headdim"]
    return {
        "zxbcdt": rng.standard_normal((b, projected(s)), np.float32),
        "conv_state": rng.standard_normal((b, inner + 2 * s["dstate"], WIDTH - 1), np.float32),
        "state": rng.standard_normal((b, s["nheads"], s["headdim"], s["dstate"]), np.float32),
        **parameters(s, rng),
    }


def _arguments(a):
    names = ("zxbcdt", "conv_state", "state", "conv_weight", "conv_bias", "dt_bias", "A")
    return tuple(a[name] for name in names), {"D": a["D"], "norm_weight": a["norm_weight"]}


def _expected(a, s):
    inner = s["nheads"] * s["headdim"]
    token = a["zxbcdt"][-1:]
    y, state = exact.mamba2_block(a, token, s, a["conv_state"][-1], a["state"][-1])
    new = token[:, inner : 2 * inner + 2 * s["dstate"]].T
    return [
        Expected("y", lambda v: v[-1:], y),
        Expected("state", lambda v: v[-1], state),
        Expected("conv_state", lambda v: v[-1], np.concatenate([a["conv_state"][-1][:, 1:], new], axis=1)),
    ]


def _states(s):
    return s["batch"] * s["nheads"] * s["headdim"] * s["dstate"]


def _cost(s, e):
    b, inner = s["batch"], s["nheads"] * s["headdim"]
    conv_dim = inner + 2 * s["dstate"]
    parameters = 4 * (conv_dim * (WIDTH + 1) + inner + 3 * s["nheads"])
    moved = 8 * _states(s) + e * b * (2 * conv_dim * (WIDTH - 1) + projected(s) + inner) + parameters
    return Cost(moved, 5 * _states(s) + b * ((2 * WIDTH + 4) * conv_dim + 9 * inner))


BENCHMARK = Benchmark(
    op="mamba2_update",
    cases=decode(MAMBA2),
    inputs=_inputs,
    arguments=_arguments,
    cost=_cost,
    expected=_expected,
    wide=PARAMETERS | {"state"},
    in_place=("state", "conv_state"),
    updates=_states,
)
