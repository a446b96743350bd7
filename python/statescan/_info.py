"""info(): what this installation can do, and where native programs find it."""

from __future__ import annotations

import os
import platform
import sys
from typing import Any

from . import _C


def info() -> dict[str, Any]:
    """Version, backends and environment.

    Returns:
        A dict with
        version: the version of statescan;
        backends: {"cpu": "avx512, 2 threads", "cuda": "on, 1 device" or "off: why"};
        cuda_architectures: the GPU architectures in the build ("" in a CPU-only build);
        cuda_devices: how many CUDA devices can be used now;
        library: the path of libstatescan;
        python, platform: of the machine.
    """
    reason = _C.cuda_unavailable_reason()
    devices = _C.cuda_device_count() if not reason else 0
    cuda = f"off: {reason}" if reason else f"on, {devices} device{'s' if devices != 1 else ''}"
    threads = _C.num_threads()
    return {
        "version": _C.version(),
        "backends": {"cpu": f"{_C.cpu_isa()}, {threads} thread{'s' if threads != 1 else ''}", "cuda": cuda},
        "cuda_architectures": _C.cuda_architectures(),
        "cuda_devices": devices,
        "library": library(),
        "python": sys.version.split()[0],
        "platform": platform.platform(),
    }


def _installed(*parts: str) -> str:
    return os.path.join(os.path.dirname(os.path.abspath(__file__)), *parts)


def library() -> str:
    """Path of the shared library that Python uses and native programs link."""
    return _installed("lib", "libstatescan.dylib" if sys.platform == "darwin" else "libstatescan.so")


def cmake_dir() -> str:
    """Folder for CMake: ``cmake -Dstatescan_DIR=$(python -m statescan --cmake-dir)``."""
    return _installed("lib", "cmake", "statescan")


def include_dir() -> str:
    """Folder of the C++ headers."""
    return _installed("include")
