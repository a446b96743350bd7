"""selective_scan forward and backward on the CPU, beside torch's autograd through the plain loops of peers.py.

``python -m statescan.bench.bench_selective_scan_training`` runs each in a process of its own, so that its peak memory is its own,
compares all gradients, and prints a table. Needs torch.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from typing import Any

import numpy as np
import statescan

from . import harness
from .bench_selective_scan import BENCHMARK

GRADIENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")
LOOPS = {"torch, the published loop": "selective_scan_discretised", "torch, a leaner loop": "selective_scan_loop"}
OURS = "statescan"
AGREEMENT = 1e-4  # of float32 gradients, each rounded along its own way


def _ours(a: dict[str, np.ndarray], dy: np.ndarray) -> Callable[[], tuple[Any, ...]]:
    keywords = {"D": a["D"], "z": a["z"], "dt_bias": a["dt_bias"], "dt_softplus": True}
    positional = [a[name] for name in ("x", "dt", "A", "B", "C")]

    def step() -> tuple[Any, ...]:
        y = statescan.selective_scan(*positional, **keywords)
        return y, *statescan.selective_scan_backward(*positional, dy, **keywords)[: len(GRADIENTS)]

    return step


def _autograd(loop: str, a: dict[str, np.ndarray], dy: np.ndarray, threads: int) -> Callable[[], tuple[Any, ...]]:
    import torch

    from . import peers

    torch.set_num_threads(threads)
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in a.items()}
    gradient = torch.from_numpy(dy)

    def step() -> tuple[Any, ...]:
        y = getattr(peers, loop)(leaves)
        return y.detach().numpy(), *(g.numpy() for g in torch.autograd.grad(y, [leaves[name] for name in GRADIENTS], gradient))

    return step


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _measure(implementation: str, sizes: dict[str, int], seconds: float, threads: int, path: str) -> dict[str, Any]:
    """In a process of its own: times, memory beyond the inputs; the results go to `path`."""
    a = BENCHMARK.inputs(sizes, np.random.default_rng(20260101))
    dy = np.random.default_rng(1).standard_normal(a["x"].shape, np.float32)
    statescan.set_num_threads(threads)
    step = _ours(a, dy) if implementation == OURS else _autograd(LOOPS[implementation], a, dy, threads)
    before = _peak_bytes()
    results = step()
    peak = _peak_bytes() - before
    np.savez(path, **dict(zip(("y", *GRADIENTS), results)))
    del results
    times, cpu_times = [], []  # CPU time as well: on a busy machine it is what is left of a measurement
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    return {
        "median_s": statistics.median(times),
        "best_s": min(times),
        "cpu_s": statistics.median(cpu_times),
        "peak_bytes": peak,
    }


def _in_a_process(implementation: str, arguments: list[str], folder: str) -> tuple[dict[str, Any], dict[str, np.ndarray]]:
    path = os.path.join(folder, "results.npz")
    command = [sys.executable, "-m", __spec__.name, "--one", implementation, "--path", path, *arguments]
    row = json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)
    with np.load(path) as results:
        return row, dict(results)


def main() -> int:
    from tabulate import tabulate

    parser = argparse.ArgumentParser(description=__doc__)
    sizes = {"batch": 1, "seqlen": 2048, "dim": 1536, "dstate": 16}
    for name, size in sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each implementation")
    parser.add_argument("--threads", type=int, default=statescan.num_threads())
    parser.add_argument("--one", choices=(OURS, *LOOPS), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in sizes}
    if args.one:
        print(json.dumps(_measure(args.one, sizes, args.seconds, args.threads, args.path)))
        return 0

    shared = [f"--{name}={getattr(args, name)}" for name in (*sizes, "seconds", "threads")]
    lines, wrong = [], False
    with tempfile.TemporaryDirectory() as folder:
        ours, expected = _in_a_process(OURS, shared, folder)
        for implementation in (OURS, *LOOPS):
            row, results = (ours, expected) if implementation == OURS else _in_a_process(implementation, shared, folder)
            apart = max(harness.relative_error(results[name].astype(float), expected[name].astype(float)) for name in expected)
            wrong |= apart > AGREEMENT
            lines.append((
                implementation, *(f"{row[key] * 1e3:.3g}" for key in ("median_s", "best_s", "cpu_s")),
                f"{row['peak_bytes'] / 1e6:.4g}", *(f"{row[key] / ours[key]:.3g}" for key in ("median_s", "cpu_s", "peak_bytes")),
                "" if implementation == OURS else f"{apart:.1e}",
            ))  # fmt: skip
    print(f"{sizes}, {args.threads} threads, {harness.cpu_name()}; {statescan.cpu_isa()}; commit {harness.commit()}")
    headers = ("forward and backward", "ms", "best", "CPU ms", "peak MB", "x time", "x CPU time", "x memory", "apart from us")
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    return int(wrong)


if __name__ == "__main__":
    sys.exit(main())
