"""Forward and backward of a scan on the CPU, beside torch's autograd through the plain forwards of peers.py.

``python -m statescan.bench.bench_<op>_training`` runs each in a process of its own, so that its peak memory is its own, compares
all gradients, and prints a table. Needs torch.

Peak memory is that of one step beyond its inputs, and is measured twice: with y held until the gradients are there, as by an op
behind this one that keeps its input, and with y given up before the backward starts.
"""

from __future__ import annotations

import argparse
import ctypes
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import statescan
from statescan import _arrays

from . import harness
from .harness import Benchmark

GRADIENTS = ("x", "dt", "A", "B", "C", "D", "z", "dt_bias")  # in the order in which the backward ops give them
OURS = "statescan"  # the row that the others are compared with
_SECONDS = ("median_s", "best_s", "kept_median_s", "kept_best_s", "cpu_s")
_PEAKS = ("peak_bytes", "peak_without_y_bytes")
AGREEMENT = 1e-4  # of float32 gradients, each rounded along its own way


@dataclass(frozen=True)
class Training:
    """What a step of an op is measured on. A peer is a forward in torch, in peers.py, and what it is called with; a form of ours
    is what the forward is asked to keep, under the name by which the backward takes it."""

    benchmark: Benchmark
    sizes: Mapping[str, int]
    peers: Mapping[str, tuple[str, tuple[Any, ...]]]
    forms: Mapping[str, Mapping[str, str]] = field(default_factory=dict)

    @property
    def ours(self) -> dict[str, Mapping[str, str]]:
        """Every form of ours, by the name of its row."""
        return {OURS: {}, **{f"{OURS}, {form}": kept for form, kept in self.forms.items()}}


def _differentiated(a: dict[str, np.ndarray]) -> list[str]:
    return [name for name in GRADIENTS if name in a]


def _ours(op: str, a: dict[str, np.ndarray], dy: np.ndarray, kept: Mapping[str, str]) -> Callable[..., tuple[Any, ...]]:
    positional = [a[name] for name in ("x", "dt", "A", "B", "C")]
    keywords = {name: a[name] for name in ("D", "z", "dt_bias") if name in a} | {"dt_softplus": True}
    forward, backward = getattr(statescan, op), getattr(statescan, f"{op}_backward")
    asked = dict.fromkeys(kept, True)

    def step(keep_y: bool = True) -> tuple[Any, ...]:
        results = forward(*positional, **keywords, **asked)
        y, *states = results if kept else (results,)
        del results
        if not keep_y:
            y = None
        gradients = backward(*positional, dy, **keywords, **dict(zip(kept.values(), states)))
        return y, *(g for name, g in zip(GRADIENTS, gradients) if name in a)

    return step


def _autograd(peer: tuple[str, tuple[Any, ...]], a: dict[str, np.ndarray], dy: np.ndarray) -> Callable[..., tuple[Any, ...]]:
    import torch

    from . import peers

    torch.set_num_threads(statescan.num_threads())
    leaves = {name: torch.from_numpy(value).requires_grad_() for name, value in a.items()}
    gradient = torch.from_numpy(dy)
    forward, arguments = getattr(peers, peer[0]), peer[1]

    def step(keep_y: bool = True) -> tuple[Any, ...]:
        y = forward(leaves, *arguments)
        if not keep_y:
            y.untyped_storage().resize_(0)  # autograd wants to know where it comes from, not what it is
        gradients = torch.autograd.grad(y, [leaves[name] for name in _differentiated(a)], gradient)
        return y.detach().numpy() if keep_y else None, *(g.numpy() for g in gradients)

    return step


def _peak_bytes() -> int:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def _keep_freed_memory() -> bool:
    """From here on glibc gives no memory back to the system: a program that holds other memory above what a step frees rarely
    does, and a step that gives back what the next one takes waits for the system to clear it. False where this cannot be said."""
    trim_threshold, mmap_max = -1, -4  # malloc.h
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    return mallopt is not None and mallopt(trim_threshold, 2**31 - 1) == 1 and mallopt(mmap_max, 0) == 1


def _times(step: Callable[[], Any], seconds: float) -> tuple[list[float], list[float]]:
    """Of repeated steps, and their processor times: on a busy machine those are what is left of a measurement."""
    times, cpu_times = [], []
    begin = time.perf_counter()
    while len(times) < 3 or time.perf_counter() - begin < seconds:
        start, cpu_start = time.perf_counter(), time.process_time()
        step()
        times.append(time.perf_counter() - start)
        cpu_times.append(time.process_time() - cpu_start)
    return times, cpu_times


def _step_of(training: Training, implementation: str, a: dict[str, np.ndarray]) -> Callable[..., tuple[Any, ...]]:
    """`a`: the inputs and dy."""
    inputs = {name: array for name, array in a.items() if name != "dy"}
    if implementation in training.ours:
        return _ours(training.benchmark.op, inputs, a["dy"], training.ours[implementation])
    return _autograd(training.peers[implementation], inputs, a["dy"])


def _on_cache_lines(array: np.ndarray) -> np.ndarray:
    """A copy that begins where torch's tensors do; NumPy's own arrays mostly lie across the lines."""
    copy = _arrays.empty(array, array.shape, array.dtype.name, False)
    copy[...] = array
    return copy


def _measure(training: Training, implementation: str, sizes: dict[str, int], seconds: float, path: str | None) -> dict[str, Any]:
    """In a process of its own: times, and memory beyond the inputs; the results go to `path`. Without a path only the memory, and
    of a step that gives up y."""
    a = training.benchmark.inputs(sizes, np.random.default_rng(20260101))
    a["dy"] = np.random.default_rng(1).standard_normal(a["x"].shape, np.float32)
    step = _step_of(training, implementation, a)
    before = _peak_bytes()
    results = step(path is not None)
    peak = _peak_bytes() - before
    outputs = sum(result.nbytes for result in results if result is not None)
    if path is None:
        return {"peak_without_y_bytes": peak, "outputs_without_y_bytes": outputs}
    np.savez(path, **dict(zip(("y", *_differentiated(a)), results)))
    del results
    step = _step_of(training, implementation, {name: _on_cache_lines(array) for name, array in a.items()})
    times, cpu_times = _times(step, seconds / 2)
    kept_times = times
    if _keep_freed_memory():
        step()
        kept_times, cpu_times = _times(step, seconds / 2)
    return {
        "median_s": statistics.median(times),
        "best_s": min(times),
        "kept_median_s": statistics.median(kept_times),
        "kept_best_s": min(kept_times),
        "cpu_s": statistics.median(cpu_times),
        "peak_bytes": peak,
        "outputs_bytes": outputs,
    }


def _in_a_process(module: str, implementation: str, arguments: list[str]) -> dict[str, Any]:
    command = [sys.executable, "-m", module, "--one", implementation, *arguments]
    return json.loads(subprocess.run(command, check=True, capture_output=True, text=True).stdout)


def main(training: Training, module: str) -> int:
    """The command of `module`, which calls this. Returns 1 when gradients disagree."""
    from tabulate import tabulate

    parser = argparse.ArgumentParser(description=__doc__)
    for name, size in training.sizes.items():
        parser.add_argument(f"--{name}", type=int, default=size)
    parser.add_argument("--seconds", type=float, default=5.0, help="for each implementation")
    parser.add_argument("--threads", type=int, default=statescan.num_threads())
    parser.add_argument("--one", choices=(*training.ours, *training.peers), help=argparse.SUPPRESS)
    parser.add_argument("--path", help=argparse.SUPPRESS)
    args = parser.parse_args()
    sizes = {name: getattr(args, name) for name in training.sizes}
    statescan.set_num_threads(args.threads)
    if args.one:
        print(json.dumps(_measure(training, args.one, sizes, args.seconds, args.path)))
        return 0

    shared = [f"--{name}={getattr(args, name)}" for name in (*sizes, "seconds", "threads")]
    lines, wrong = [], False
    with tempfile.TemporaryDirectory() as folder:
        # Nothing is read before all have run: a process starts with the peak memory of the one that starts it.
        paths = {name: os.path.join(folder, f"{place}.npz") for place, name in enumerate((*training.ours, *training.peers))}
        rows = {name: _in_a_process(module, name, [*shared, "--path", path]) for name, path in paths.items()}
        for name, row in rows.items():
            row |= _in_a_process(module, name, shared)
        expected, ours = dict(np.load(paths[OURS])), rows[OURS]
        for implementation, row in rows.items():
            mine, results = implementation == OURS, np.load(paths[implementation])
            apart = max(harness.relative_error(results[name].astype(float), expected[name].astype(float)) for name in expected)
            wrong |= apart > AGREEMENT
            lines.append((
                implementation, *(f"{row[key] * 1e3:.3g}" for key in _SECONDS), *(f"{row[key] / 1e6:.4g}" for key in _PEAKS),
                *(f"{row[key] / ours[key]:.3g}" for key in ("median_s", "kept_median_s", "kept_best_s", *_PEAKS)),
                "" if mine else f"{apart:.1e}",
            ))  # fmt: skip
    print(f"{sizes}, {args.threads} threads, {harness.cpu_name()}; {statescan.cpu_isa()}; commit {harness.commit()}")
    headers = (
        "forward and backward", "ms", "best", "memory kept: ms", "best", "CPU ms", "peak MB", "without y",
        "x ms", "x kept ms", "x kept best", "x peak", "x without y", "apart from us",
    )  # fmt: skip
    floors = (ours["outputs_bytes"] / 1e6, ours["outputs_without_y_bytes"] / 1e6)
    print("y and the gradients, which no step does without, are {:.4g} MB; the gradients alone {:.4g} MB".format(*floors))
    print(tabulate(lines, headers=headers, tablefmt="github", disable_numparse=True))
    return int(wrong)
