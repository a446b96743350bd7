"""What statescan.torch adds to the plain op's time, on tensors so small that the op itself takes next to none.

``python -m statescan.bench.torch_overhead`` calls in turns the plain op, the torch op without a gradient and with one, and the
plain op beside the least that torch asks for a gradient: an autograd.Function that saves as many tensors and does nothing else. In
each round a call's time is the least of some loops; what is shown are medians over rounds, of differences within a round.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import timeit
from collections.abc import Callable, Iterator
from typing import Any

import statescan
import statescan.torch
import torch

Inputs = dict[str, torch.Tensor]


def _ops(device: str) -> Iterator[tuple[str, Inputs, dict[str, Any]]]:
    """(op, inputs, all of which have a gradient, options)."""

    def activation(*shape: int) -> torch.Tensor:
        return torch.zeros(shape, device=device, dtype=torch.bfloat16 if device == "cuda" else torch.float32)

    def parameter(*shape: int) -> torch.Tensor:
        return torch.ones(shape, device=device)

    batch, seqlen, nheads, headdim, dstate = 1, 4, 2, 4, 8
    dim, conv_dim = nheads * headdim, nheads * headdim + 2 * dstate
    by_head, by_channel = activation(batch, seqlen, nheads, headdim), activation(batch, seqlen, dim)
    projections = {"B": activation(batch, seqlen, 1, dstate), "C": activation(batch, seqlen, 1, dstate)}
    heads = {"A": -parameter(nheads), "dt_bias": parameter(nheads), "D": parameter(nheads)}
    channels = {"A": -parameter(dim, dstate), "dt_bias": parameter(dim), "D": parameter(dim)}
    dt = activation(batch, seqlen, nheads)
    yield "ssd_scan", {"x": by_head, "dt": dt, "z": by_head, **projections, **heads}, {"dt_softplus": True}
    yield "selective_scan", {"x": by_channel, "dt": by_channel, "z": by_channel, **projections, **channels}, {"dt_softplus": True}
    yield "causal_conv1d", {"x": by_channel, "weight": parameter(dim, 4), "bias": parameter(dim)}, {"activation": "silu"}
    yield "gated_rms_norm", {"x": by_channel, "z": by_channel, "weight": parameter(dim)}, {}
    chunks = activation(batch, seqlen, nheads, headdim, dstate)
    yield "state_scan", {"log_decay": -parameter(batch, seqlen, nheads), "update": chunks}, {}
    block = {"conv_weight": parameter(conv_dim, 4), "conv_bias": parameter(conv_dim), "norm_weight": parameter(dim), **heads}
    yield "mamba2_scan", {"zxbcdt": activation(batch, seqlen, dim + conv_dim + nheads), **block}, {}


def _saving_function(count: int) -> Callable[..., torch.Tensor]:
    class Saving(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, *tensors: torch.Tensor) -> torch.Tensor:
            ctx.save_for_backward(*tensors)
            return tensors[0].detach()

        @staticmethod
        def backward(ctx: Any, *_: Any) -> tuple[None, ...]:
            return (None,) * count

    return torch._C._FunctionBase.__dict__["apply"].__get__(None, Saving)  # as statescan.torch calls its own


def _calls(op: str, inputs: Inputs, options: dict[str, Any]) -> dict[str, Callable[[], Any]]:
    plain, watched = getattr(statescan, op), getattr(statescan.torch, op)
    leaves = {name: tensor.clone().requires_grad_() for name, tensor in inputs.items()}
    saving, values = _saving_function(len(leaves)), tuple(leaves.values())
    return {
        "plain": lambda: plain(**inputs, **options),
        "without": lambda: watched(**inputs, **options),
        "with": lambda: watched(**leaves, **options),
        "least": lambda: (plain(**inputs, **options), saving(*values)),
        "detach": values[0].detach,  # which the least does beside what it is there for
    }


def measure(device: str, rounds: int, loops: int = 25, repeats: int = 8) -> list[dict[str, Any]]:
    """A row for each op, in microseconds."""
    rows = []
    for op, inputs, options in _ops(device):
        calls = _calls(op, inputs, options)
        times: dict[str, list[float]] = {name: [] for name in calls}
        for _ in range(rounds):
            for name, call in calls.items():
                times[name].append(min(timeit.repeat(call, number=loops, repeat=repeats)) / loops * 1e6)
            if device == "cuda":
                torch.cuda.synchronize()
        least = [both - detach for both, detach in zip(times["least"], times["detach"])]
        more = {"without": times["without"], "with": times["with"], "least": least}
        added = {name: statistics.median(a - b for a, b in zip(values, times["plain"])) for name, values in more.items()}
        rows.append({"op": op, "tensors": len(inputs), "plain": statistics.median(times["plain"]), **added})
    return rows


def main() -> int:
    """Print the table."""
    from tabulate import tabulate

    parser = argparse.ArgumentParser(prog="python -m statescan.bench.torch_overhead", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--rounds", type=int, default=40)
    args = parser.parse_args()
    statescan.set_num_threads(1)
    headers = {
        "op": "op", "tensors": "tensors", "plain": "plain call, us", "without": "without gradient, +us",
        "with": "with gradient, +us", "least": "a Function that saves them, +us",
    }  # fmt: skip
    print(f"{args.device} tensors; statescan {statescan.__version__}, torch {torch.__version__}, Python {sys.version.split()[0]}")
    print(tabulate(measure(args.device, args.rounds), headers=headers, floatfmt=".2f", tablefmt="github"))
    return 0


if __name__ == "__main__":
    sys.exit(main())
