"""What the bindings ask of array frameworks, in Python. A framework is only ever taken from sys.modules: the caller has it."""

from __future__ import annotations

import sys
from typing import Any

import numpy as np


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
    return np.empty(shape, _numpy_dtype(dtype))


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
