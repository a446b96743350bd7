"""PEP 517 backend: scikit-build-core, plus the build requirements of CUDA when CUDA is built.

STATESCAN_CUDA=auto (default)  CUDA kernels when nvcc is on the machine, else the CPU backend alone
STATESCAN_CUDA=on              the same, but fail without nvcc
STATESCAN_CUDA=wheels          compile with the CUDA compiler from the package index (104 MB)
STATESCAN_CUDA=off             the CPU backend alone
STATESCAN_CUDA_ARCHITECTURES   e.g. "90a" or "80;90a;100;120"; default: this machine's GPUs
STATESCAN_CUTLASS_INCLUDE_DIR  folder that holds cute/tensor.hpp, instead of the nvidia-cutlass package
"""

import os
import shutil

from scikit_build_core import build as _build
from scikit_build_core.build import (  # noqa: F401
    build_editable,
    build_sdist,
    build_wheel,
    get_requires_for_build_sdist,
    prepare_metadata_for_build_editable,
    prepare_metadata_for_build_wheel,
)

NVCC = "cuda-toolkit[nvcc,cccl]==13.0.*"
CUTLASS = "nvidia-cutlass==4.2.0.0"


def _has_nvcc():
    roots = (os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH"), "/usr/local/cuda")
    found = (os.path.exists(os.path.join(root, "bin", "nvcc")) for root in roots if root)
    return bool(os.environ.get("CUDACXX") or shutil.which("nvcc") or any(found))


def _cuda_requirements():
    mode = os.environ.get("STATESCAN_CUDA", "").lower() or "auto"
    if mode in ("off", "0", "no", "false") or (mode == "auto" and not _has_nvcc()):
        return []
    cutlass = [] if os.environ.get("STATESCAN_CUTLASS_INCLUDE_DIR") else [CUTLASS]
    return cutlass + ([NVCC] if mode == "wheels" else [])


def get_requires_for_build_wheel(config_settings=None):
    return _build.get_requires_for_build_wheel(config_settings) + _cuda_requirements()


def get_requires_for_build_editable(config_settings=None):
    return _build.get_requires_for_build_editable(config_settings) + _cuda_requirements()
