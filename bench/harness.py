"""Verify, then time: what every benchmark shares.

A benchmark (``bench_<op>.py``) declares an op's shapes, how to make its inputs, the bytes and operations of a call, and a
float64 recurrence for a sample of its outputs. :func:`measure` checks the op against that sample and times it; a
:class:`Machine` knows the copy bandwidth and the matmul rate that the floor of a call is made of.
"""

from __future__ import annotations

import datetime
import functools
import os
import platform
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
import statescan

Arrays = dict[str, Any]
Sizes = Mapping[str, int]


@dataclass(frozen=True)
class Case:
    """One shape of an op. `quick` cases are small: `--quick` runs these alone, a full run leaves them out."""

    name: str
    sizes: Sizes
    quick: bool = False
    devices: tuple[str, ...] = ("cpu", "cuda")


@dataclass(frozen=True)
class Cost:
    """What a call must move and compute, each input and output counted once."""

    bytes: int
    flops: int


@dataclass(frozen=True)
class Expected:
    """Exact values of a sample of an output: pick(output) == value."""

    output: str
    pick: Callable[[np.ndarray], np.ndarray]
    value: np.ndarray


@dataclass(frozen=True)
class Benchmark:
    op: str
    cases: tuple[Case, ...]
    inputs: Callable[[Sizes, np.random.Generator], dict[str, np.ndarray]]  # all in float32
    arguments: Callable[[Arrays], tuple[tuple[Any, ...], dict[str, Any]]]  # of the op's call
    cost: Callable[[Sizes, int], Cost]  # given the bytes of an element of x
    expected: Callable[[dict[str, np.ndarray], Sizes], list[Expected]]  # of inputs in float64
    outputs: tuple[str, ...] = ("y",)
    wide: frozenset[str] = frozenset()  # inputs that are float32 whatever the dtype
    in_place: tuple[str, ...] = ()  # inputs that the call updates
    updates: Callable[[Sizes], int] | None = None  # state elements that a call advances, for ops with a recurrence
    takes_outputs: bool = True  # a backward makes its outputs itself
    stored: float = 1.0  # on a GPU: the error of rounding all that it stores in 16 bits, over that of rounding its outputs


# ---- devices -----------------------------------------------------------------------------------------------------------
class Cpu:
    """NumPy arrays, timed call by call with whatever the caches hold."""

    name = "cpu"

    def __init__(self, threads: int | None = None):
        if threads is not None:
            statescan.set_num_threads(threads)
        self.threads = statescan.num_threads()

    def label(self) -> str:
        return f"{cpu_name()}, {self.threads} thread{'s' if self.threads != 1 else ''}"

    def dtypes(self) -> tuple[str, ...]:
        return ("float32",)

    def put(self, a: np.ndarray, dtype: str) -> np.ndarray:
        return a.astype(dtype, order="K")

    def get(self, a: np.ndarray) -> np.ndarray:
        return a.astype(np.float64)

    def time(self, make_call: Callable[[], Callable[[], Any]], nbytes: int, seconds: float) -> list[float]:
        """Seconds a call, one entry for each repeat; a repeat of a short call is a loop of about a millisecond."""
        call = make_call()
        call()
        begin = time.perf_counter()
        call()
        once = time.perf_counter() - begin
        loops = max(1, min(1000, int(1e-3 / max(once, 1e-7))))
        repeats = int(min(1000, max(7 if seconds >= 0.5 else 3, seconds / max(once * loops, 1e-6))))
        times = []
        for _ in range(repeats):
            begin = time.perf_counter()
            for _ in range(loops):
                call()
            times.append((time.perf_counter() - begin) / loops)
        return times

    def copy_bandwidth(self) -> float:
        """Bytes a second, read and written, of a copy by as many threads as the ops use; buffers far larger than caches."""
        count = 1 << 25
        source, target = np.ones(count, np.float32), np.zeros(count, np.float32)
        parts = [slice(i * count // self.threads, (i + 1) * count // self.threads) for i in range(self.threads)]
        with ThreadPoolExecutor(self.threads) as pool:
            best = _best(lambda: list(pool.map(lambda part: np.copyto(target[part], source[part]), parts)), 9)
        return 2 * source.nbytes / best

    def matmul_rate(self, dtype: str) -> float:
        """Operations a second of NumPy's 1024 x 1024 matrix product (its BLAS picks its own threads)."""
        a = np.ones((1024, 1024), dtype)
        return 2 * 1024**3 / _best(lambda: a @ a, 15)


class Cuda:
    """torch tensors on the current GPU, timed as replays of a CUDA graph that walks enough copies of the arrays to leave
    nothing of one call in the L2 cache for the next."""

    name = "cuda"

    def __init__(self) -> None:
        import torch

        self.torch = torch
        self.properties = torch.cuda.get_device_properties(torch.cuda.current_device())

    def label(self) -> str:
        return self.properties.name

    def dtypes(self) -> tuple[str, ...]:
        return ("bfloat16", "float32")

    def put(self, a: np.ndarray, dtype: str) -> Any:
        return self.torch.from_numpy(a).to("cuda", getattr(self.torch, dtype))

    def get(self, a: Any) -> np.ndarray:
        return a.double().cpu().numpy()

    def time(self, make_call: Callable[[], Callable[[], Any]], nbytes: int, seconds: float) -> list[float]:
        torch = self.torch
        copies = max(2, min(64, -(-3 * self.properties.L2_cache_size // max(nbytes, 1))))
        copies = max(1, min(copies, int(torch.cuda.mem_get_info()[0] // (4 * max(nbytes, 1)))))
        calls = [make_call() for _ in range(copies)]
        side = torch.cuda.Stream()
        with torch.cuda.stream(side):  # warm-up outside the capture: lazy kernels and workspaces
            for call in calls:
                call()
        torch.cuda.synchronize()
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            for call in calls:
                call()
        times: list[float] = []
        begin = time.perf_counter()
        while len(times) < 5 or (len(times) < 100 and time.perf_counter() - begin < seconds):
            first, last = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            first.record()
            graph.replay()
            last.record()
            last.synchronize()
            times.append(first.elapsed_time(last) * 1e-3 / copies)
        return times[1:]

    def copy_bandwidth(self) -> float:
        torch = self.torch
        source = torch.ones(1 << 28, dtype=torch.float32, device="cuda")
        target = torch.empty_like(source)
        return 2 * source.nbytes / min(self.time(lambda: lambda: target.copy_(source), source.nbytes, 0.2))

    def matmul_rate(self, dtype: str) -> float:
        a = self.torch.ones((8192, 8192), dtype=getattr(self.torch, dtype), device="cuda")
        return 2 * 8192**3 / min(self.time(lambda: lambda: a @ a, a.nbytes, 0.2))


def _best(call: Callable[[], Any], repeats: int) -> float:
    call()
    best = float("inf")
    for _ in range(repeats):
        begin = time.perf_counter()
        call()
        best = min(best, time.perf_counter() - begin)
    return best


# ---- the machine -------------------------------------------------------------------------------------------------------
class Machine:
    """A device and its two rates, measured when first asked for."""

    def __init__(self, device: Cpu | Cuda):
        self.device = device
        self._matmul: dict[str, float] = {}

    @functools.cached_property
    def copy_bandwidth(self) -> float:
        return self.device.copy_bandwidth()

    def matmul_rate(self, dtype: str) -> float:
        if dtype not in self._matmul:
            self._matmul[dtype] = self.device.matmul_rate(dtype)
        return self._matmul[dtype]

    def floor(self, cost: Cost, dtype: str) -> float:
        """Seconds that a call takes at the least. Data that fits a cache can move faster than this."""
        return max(cost.bytes / self.copy_bandwidth, cost.flops / self.matmul_rate(dtype))

    def facts(self) -> dict[str, Any]:
        return {
            "device": self.device.name,
            "name": self.device.label(),
            "copy_gbps": self.copy_bandwidth / 1e9,
            "matmul_gflops": {dtype: self.matmul_rate(dtype) / 1e9 for dtype in self.device.dtypes()},
        }


def cpu_name() -> str:
    try:
        with open("/proc/cpuinfo", encoding="utf-8") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.split(":", 1)[1].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def commit() -> str | None:
    """The commit of the checkout that this package lies in, with "+" when files differ from it; None outside of one."""

    def git(*arguments: str) -> str:
        here = os.path.dirname(os.path.abspath(__file__))
        return subprocess.run(["git", "-C", here, *arguments], check=True, capture_output=True, text=True).stdout.strip()

    try:
        if not os.path.isdir(os.path.join(git("rev-parse", "--show-toplevel"), "cpp", "include", "statescan")):
            return None  # somebody else's repository around an installed package
        return git("rev-parse", "--short=12", "HEAD") + ("+" if git("status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.CalledProcessError):
        return None


def environment() -> dict[str, Any]:
    """Versions, commit and date, and the variables that change what is measured."""
    versions = {"statescan": statescan.__version__, "numpy": np.__version__, "python": platform.python_version()}
    variables = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE", "OPENBLAS_NUM_THREADS", "OMP_NUM_THREADS", "STATESCAN_ISA")
    return {
        "versions": versions,
        "isa": statescan.cpu_isa(),
        "platform": platform.platform(),
        "commit": commit(),
        "date": datetime.datetime.now().astimezone().isoformat(timespec="seconds"),
        "variables": {name: os.environ[name] for name in variables if name in os.environ},
    }


# ---- one measurement ---------------------------------------------------------------------------------------------------
# The largest relative RMS error of an output: for the 16-bit types 1.5 times what rounding the exact result costs.
GATES = {"float32": 1e-5, "bfloat16": 2.5e-3, "float16": 4e-4}


class Disagreement(Exception):
    """A result failed its check; nothing was timed."""


def prepare(benchmark: Benchmark, case: Case, dtype: str, device: Cpu | Cuda) -> Arrays:
    """The inputs of a case on the device; the same for the same case, whatever ran before."""
    made = benchmark.inputs(case.sizes, np.random.default_rng(20260101))
    return {name: device.put(a, "float32" if name in benchmark.wide else dtype) for name, a in made.items()}


def copy_of(arrays: Arrays) -> Arrays:
    """Arrays of their own memory, in the same layout."""
    return {name: a.copy(order="K") if isinstance(a, np.ndarray) else a.clone() for name, a in arrays.items()}


def run_op(benchmark: Benchmark, arrays: Arrays, **more: Any) -> dict[str, Any]:
    """One call; its outputs, updated inputs among them, by name."""
    positional, keywords = benchmark.arguments(arrays)
    result = getattr(statescan, benchmark.op)(*positional, **keywords, **more)
    named = dict(zip(benchmark.outputs, result if isinstance(result, tuple) else (result,)))
    return named | {name: arrays[name] for name in benchmark.in_place}


def relative_error(got: np.ndarray, exact: np.ndarray) -> float:
    """Root mean square of the error in units of that of the exact result; NaN counts as infinite."""
    error = float(np.linalg.norm((got - exact).ravel()) / max(float(np.linalg.norm(exact.ravel())), 1e-300))
    return error if error == error else float("inf")


def verify(benchmark: Benchmark, case: Case, dtype: str, device: Cpu | Cuda, arrays: Arrays) -> float:
    """The largest relative error over the sample of `expected`; raises Disagreement past the gate. Keeps `arrays` as is."""
    limit = GATES[dtype] * (benchmark.stored if device.name == "cuda" and dtype != "float32" else 1)
    exact_inputs = {name: device.get(a) for name, a in arrays.items()}
    outputs = run_op(benchmark, copy_of(arrays))
    worst = 0.0
    for check in benchmark.expected(exact_inputs, case.sizes):
        error = relative_error(check.pick(device.get(outputs[check.output])), check.value)
        if error > limit:
            raise Disagreement(f"{check.output} is off by {error:.2g}, more than {limit:.2g}")
        worst = max(worst, error)
    return worst


def timed(device: Cpu | Cuda, make_call: Callable[[], Callable[[], Any]], nbytes: int, seconds: float) -> dict[str, float]:
    times = sorted(device.time(make_call, nbytes, seconds))
    low, high = times[len(times) // 10], times[(len(times) * 9) // 10]
    return {
        "median_us": statistics.median(times) * 1e6,
        "best_us": times[0] * 1e6,
        "spread_us": (high - low) * 1e6,  # between the 10th and the 90th percentile
        "repeats": len(times),
    }


def rates(row: dict[str, Any], cost: Cost, floor: float) -> dict[str, Any]:
    seconds = row["median_us"] * 1e-6
    return {
        "bytes": cost.bytes,
        "flops": cost.flops,
        "gbps": cost.bytes / seconds / 1e9,
        "gflops": cost.flops / seconds / 1e9,
        "floor_us": floor * 1e6,
        "share_of_floor": floor / seconds,
    }


def blank_row(benchmark: Benchmark, case: Case, dtype: str, machine: Machine, implementation: str) -> dict[str, Any]:
    return {
        "op": benchmark.op,
        "case": case.name,
        "sizes": dict(case.sizes),
        "dtype": dtype,
        "device": machine.device.name,
        "implementation": implementation,
        "status": "ok",
    }


def measure(benchmark: Benchmark, case: Case, dtype: str, machine: Machine, seconds: float = 0.5) -> dict[str, Any]:
    """One row of the table: the op checked, then timed. Its status says "ok", or why there are no times."""
    device = machine.device
    row = blank_row(benchmark, case, dtype, machine, "statescan")
    arrays = prepare(benchmark, case, dtype, device)
    positional, keywords = benchmark.arguments(arrays)
    try:
        row["kernel"] = statescan.plan(benchmark.op, *positional, **keywords).kernel
        row["error"] = verify(benchmark, case, dtype, device, arrays)
    except NotImplementedError as missing:
        return row | {"status": f"not implemented: {missing}"}
    except Disagreement as wrong:
        return row | {"status": f"wrong: {wrong}"}

    def make_call() -> Callable[[], Any]:
        own = copy_of(arrays)
        positional, keywords = benchmark.arguments(own)
        op = getattr(statescan, benchmark.op)
        if not benchmark.takes_outputs:
            kept: list[Any] = []  # they stay alive, so that each captured call writes memory of its own
            return lambda: kept.append(op(*positional, **keywords))
        result = op(*positional, **keywords)
        outputs = result if isinstance(result, tuple) else (result,)
        given = dict(zip(("out", "final_state_out"), outputs)) | keywords
        return lambda: op(*positional, **given)

    cost = benchmark.cost(case.sizes, 4 if dtype == "float32" else 2)
    row |= timed(device, make_call, cost.bytes, seconds)
    row |= rates(row, cost, machine.floor(cost, dtype))
    if benchmark.updates is not None:
        row["updates_per_s"] = benchmark.updates(case.sizes) / (row["median_us"] * 1e-6)
    return row
