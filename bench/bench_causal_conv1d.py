"""causal_conv1d: the convolution of a Mamba-2 block over x, B and C, in both layouts."""

from __future__ import annotations

import numpy as np

from . import exact
from .harness import Benchmark, Case, Cost, Expected

WIDTH = 4
MODELS = {"mamba2-130m": 1792, "mamba2-2.7b": 5376}


def _cases():
    for layout, first in (("channels last", 0), ("channels first", 1)):
        for name, dim in MODELS.items():
            yield Case(f"{name} b1 l2048 {layout}", {"batch": 1, "seqlen": 2048, "dim": dim, "channels_first": first})
            yield Case(f"{name} b8 l2048 {layout}", {"batch": 8, "seqlen": 2048, "dim": dim, "channels_first": first},
                       devices=("cuda",))  # fmt: skip
        sizes = {"batch": 1, "seqlen": 128, "dim": 1792, "channels_first": first}
        yield Case(f"mamba2-130m b1 l128 {layout}", sizes, quick=True)


def _inputs(s, rng):
    b, l, d = s["batch"], s["seqlen"], s["dim"]
    x = rng.standard_normal((b, d, l) if s["channels_first"] else (b, l, d), np.float32)
    x = np.swapaxes(x, 1, 2) if s["channels_first"] else x
    weight, bias = rng.standard_normal((d, WIDTH), np.float32), rng.standard_normal(d, np.float32)
    return {"x": x, "weight": weight, "bias": bias, "out": np.zeros_like(x)}


def _expected(a, s):
    return [Expected("y", lambda v: v[-1], exact.conv(a["x"][-1], a["weight"], a["bias"]))]


def _cost(s, e):
    outputs = s["batch"] * s["seqlen"] * s["dim"]
    return Cost(2 * e * outputs, (2 * WIDTH + 4) * outputs)  # SiLU counted as four


BENCHMARK = Benchmark(
    op="causal_conv1d",
    cases=tuple(_cases()),
    inputs=_inputs,
    arguments=lambda a: ((a["x"], a["weight"], a["bias"]), {"activation": "silu", "out": a["out"]}),
    cost=_cost,
    expected=_expected,
    wide=frozenset({"weight", "bias"}),
)
