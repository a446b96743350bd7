"""What the bindings ask of array frameworks, in Python. A framework is only ever taken from sys.modules: the caller has it."""

from __future__ import annotations

import math
import sys
from typing import Any

import numpy as np

_LINE = 64  # bytes
_LARGE = 2**18  # bytes from which the microsecond that it takes to place an array is nothing beside writing it


def _framework(array: Any) -> str:
    return type(array).__module__.partition(".")[0]


def _numpy_dtype(name: str) -> np.dtype:
    if name != "bfloat16":
        return np.dtype(name)
    try:
        import ml_dtypes
    except ImportError as error:
        raise TypeError("bfloat16 NumPy arrays need the package ml_dtypes: pip install ml_dtypes") from error
    return np.dtype(ml_dtypes.bfloat16)


def _empty_on_lines(shape: tuple[int, ...], dtype: np.dtype) -> np.ndarray:
    """np.empty, but a large array begins with a line of the caches: NumPy's own begin 16 bytes behind one, or 32 or 48, and then
    every vector that a kernel stores touches two."""
    size = math.prod(shape) * dtype.itemsize
    if size < _LARGE:
        return np.empty(shape, dtype)
    memory = np.empty(size + _LINE, np.uint8)
    start = -memory.__array_interface__["data"][0] % _LINE
    return memory[start : start + size].view(dtype).reshape(shape)


def empty(like: Any, shape: tuple[int, ...], dtype: str, on_cuda: bool) -> Any:
    """A new array for an output: of the framework of `like`, or NumPy's, which `finish` then hands over."""
    framework = _framework(like)
    if framework == "cupy":
        return sys.modules["cupy"].empty(shape, dtype)
    if framework == "torch":  # a torch without the DLPack exchange API
        torch = sys.modules["torch"]
        return torch.empty(shape, dtype=getattr(torch, dtype), device=like.device)
    if on_cuda:
        raise TypeError(f"outputs on a GPU cannot be allocated for {type(like).__name__}; pass out=, or use torch or CuPy")
    return _empty_on_lines(shape, _numpy_dtype(dtype))


def finish(like: Any, array: Any) -> Any:
    """The output `array` as the caller's kind of array, without a copy where the framework allows it."""
    if not isinstance(array, np.ndarray) or isinstance(like, np.ndarray):
        return array
    namespace = getattr(like, "__array_namespace__", None)
    return array if namespace is None else namespace().from_dlpack(array)


def stream_handle(stream: Any) -> int:
    """A CUDA stream as an integer: one itself, or an object with __cuda_stream__, cuda_stream (torch) or ptr (CuPy)."""
    if isinstance(stream, int):
        return stream
    if hasattr(stream, "__cuda_stream__"):
        return int(stream.__cuda_stream__()[1])
    for attribute in ("cuda_stream", "ptr"):
        if hasattr(stream, attribute):
            return int(getattr(stream, attribute))
    raise TypeError(f"stream is {type(stream).__name__}; expected an integer or an object with __cuda_stream__")


def current_stream(array: Any) -> int:
    """The stream on which the framework of `array` works now; the legacy default stream where it does not say."""
    framework = _framework(array)
    if framework == "cupy":
        return int(sys.modules["cupy"].cuda.get_current_stream().ptr)
    if framework == "torch":
        return int(sys.modules["torch"].cuda.current_stream(array.device).cuda_stream)
    return 0
