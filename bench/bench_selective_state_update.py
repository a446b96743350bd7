"""selective_state_update: one decode step of either model."""

from __future__ import annotations

import numpy as np

from . import exact
from .harness import Benchmark, Cost, Expected
from .shapes import MAMBA1, MAMBA2, decode


def _mamba2(s):
    return "nheads" in s


def _channels(s):
    return (s["nheads"], s["headdim"]) if _mamba2(s) else (s["dim"],)


def _inputs(s, rng):
    b, n, channels = s["batch"], s["dstate"], _channels(s)
    normal = lambda *shape: rng.standard_normal(shape, np.float32)
    A = -1 - 15 * rng.random(channels[0], np.float32)
    if not _mamba2(s):
        A = -np.tile(np.arange(1, n + 1, dtype=np.float32), (channels[0], 1))
    return {
        "state": normal(b, *channels, n), "x": normal(b, *channels), "dt": normal(b, channels[0]), "A": A,
        "B": normal(b, 1, n), "C": normal(b, 1, n), "D": np.ones(channels[0], np.float32), "z": normal(b, *channels),
        "dt_bias": normal(channels[0]) - 4,
    }  # fmt: skip


def _arguments(a):
    keywords = {"D": a["D"], "z": a["z"], "dt_bias": a["dt_bias"], "dt_softplus": True}
    return (a["state"], a["x"], a["dt"], a["A"], a["B"], a["C"]), keywords


def _expected(a, s):
    n, channels = s["dstate"], _channels(s)
    rows = int(np.prod(channels))
    each = lambda v: np.repeat(v, rows // channels[0], axis=0)
    x, z, state = a["x"][-1].reshape(rows), a["z"][-1].reshape(rows), a["state"][-1].reshape(rows, n)
    dt = each(exact.softplus(a["dt"][-1] + a["dt_bias"]))
    B, C = (np.broadcast_to(a[k][-1], (rows, n))[None] for k in "BC")
    y, state = exact.scan(x[None], dt[None], each(a["A"]).reshape(rows, -1), B, C, state)
    y = (y[0] + each(a["D"]) * x) * exact.silu(z)
    return [
        Expected("y", lambda v: v[-1], y.reshape(channels)),
        Expected("state", lambda v: v[-1], state.reshape(*channels, n)),
    ]


def _cost(s, e):
    channels, states = int(np.prod(_channels(s))), _states(s)
    parameters = 4 * (channels * s["dstate"] if not _mamba2(s) else s["nheads"])
    return Cost(8 * states + e * s["batch"] * (3 * channels + _channels(s)[0] + 2 * s["dstate"]) + parameters, 5 * states)


def _states(s):
    return s["batch"] * int(np.prod(_channels(s))) * s["dstate"]


BENCHMARK = Benchmark(
    op="selective_state_update",
    cases=decode(MAMBA2) + tuple(case for case in decode(MAMBA1) if not case.quick),
    inputs=_inputs,
    arguments=_arguments,
    cost=_cost,
    expected=_expected,
    wide=frozenset({"state", "A", "D", "dt_bias"}),
    in_place=("state",),
    updates=_states,
)
