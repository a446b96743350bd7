"""compat: statescan's ops under the names, argument lists and layouts of mamba-ssm and causal-conv1d.

After ``statescan.compat.install()``, ``import mamba_ssm`` and ``import causal_conv1d`` find the functions that models call,
differentiable, without either package, on the CPU and on CUDA:

==================================================  ====================================================================
module                                              functions
==================================================  ====================================================================
``mamba_ssm``,                                      ``selective_scan_fn``, ``mamba_inner_fn``
``mamba_ssm.ops.selective_scan_interface``
``mamba_ssm.ops.triton.ssd_combined``               ``mamba_chunk_scan_combined``, ``mamba_split_conv1d_scan_combined``
``mamba_ssm.ops.triton.selective_state_update``     ``selective_state_update``
``mamba_ssm.ops.triton.layernorm_gated``            ``rmsnorm_fn``, ``layernorm_fn``, ``RMSNorm`` (known as RMSNormGated)
``causal_conv1d``,                                  ``causal_conv1d_fn``, ``causal_conv1d_update``
``causal_conv1d.causal_conv1d_interface``
``causal_conv1d.causal_conv1d_varlen``              ``causal_conv1d_varlen_states``
==================================================  ====================================================================

Each docstring says where the function differs from its namesake. Models of Hugging Face transformers find them by
themselves, on the CPU too. The functions need torch; this module does not import it.
"""

from __future__ import annotations

import importlib.util
import sys
from types import ModuleType

from . import _transformers
from ._finder import VERSIONS, Finder

__all__ = ["install", "uninstall"]

_server = Finder()
_shadowed: dict[str, ModuleType] = {}  # modules of real packages, put aside by install(force=True)


def _is_installed(package: str) -> bool:
    if package in sys.modules:
        return True
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name on the path is no installation


def _take_modules(package: str) -> dict[str, ModuleType]:
    names = [name for name in sys.modules if name == package or name.startswith(f"{package}.")]
    return {name: sys.modules.pop(name) for name in names}


def install(*, force: bool = False) -> tuple[str, ...]:
    """Serve `mamba_ssm` and `causal_conv1d` from this package, for the rest of the process or until uninstall().

    A package that is really installed stays what it is, unless `force` says to serve statescan's functions in its place; code
    that imported it before keeps what it has. Call it before the models are imported; models of transformers that were
    imported earlier are bound again.

    Args:
        force: shadow packages that are really installed.

    Returns:
        The names of the packages that are now served: ("mamba_ssm", "causal_conv1d"), less those that are really installed.
    """
    for package in VERSIONS:
        if package in _server.packages or (not force and _is_installed(package)):
            continue
        _shadowed.update(_take_modules(package))
        _server.packages.add(package)
    if _server not in sys.meta_path:
        sys.meta_path.insert(0, _server)
    _transformers.bind_again(VERSIONS)
    return tuple(package for package in VERSIONS if package in _server.packages)


def uninstall() -> None:
    """Undo install(): the imports find what is really installed, and the models of transformers go back to it."""
    for package in _server.packages:
        _take_modules(package)
    _server.packages.clear()
    if _server in sys.meta_path:
        sys.meta_path.remove(_server)
    sys.modules.update(_shadowed)
    _shadowed.clear()
    _transformers.bind_again(VERSIONS)
