"""The import machinery behind install(): a finder that serves the peers' modules, and the metadata of their distributions."""

from __future__ import annotations

import importlib
import importlib.abc
import importlib.machinery
import importlib.metadata
import sys
from types import ModuleType
from typing import Any

# The peers' module paths and the module of this package that fills each; None for a package that only holds others. The
# children of a package come after it.
MODULES = {
    "mamba_ssm": "selective_scan_interface",
    "mamba_ssm.ops": None,
    "mamba_ssm.ops.selective_scan_interface": "selective_scan_interface",
    "mamba_ssm.ops.triton": None,
    "mamba_ssm.ops.triton.layernorm_gated": "layernorm_gated",
    "mamba_ssm.ops.triton.selective_state_update": "selective_state_update",
    "mamba_ssm.ops.triton.ssd_combined": "ssd_combined",
    "causal_conv1d": "causal_conv1d_interface",
    "causal_conv1d.causal_conv1d_interface": "causal_conv1d_interface",
    "causal_conv1d.causal_conv1d_varlen": "causal_conv1d_varlen",
}

# The release of each peer whose functions are served; callers compare it with what they need.
VERSIONS = {"mamba_ssm": "2.3.2", "causal_conv1d": "1.6.1"}


def children(name: str) -> list[str]:
    return [module for module in MODULES if module.rpartition(".")[0] == name]


class Loader(importlib.abc.Loader):
    """Fills a served module with the public names of a module of this package."""

    def create_module(self, spec: importlib.machinery.ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        name = module.__name__
        served = sys.modules[__package__]
        if MODULES[name]:
            served = importlib.import_module(f"{__package__}.{MODULES[name]}")
            module.__all__ = list(served.__all__)
            for public in served.__all__:
                setattr(module, public, getattr(served, public))
        module.__doc__ = f"{name}, served by statescan.compat"
        module.__file__ = served.__file__
        if name in VERSIONS:
            module.__version__ = VERSIONS[name]
        for child in children(name):  # callers also reach them as attributes of the package
            importlib.import_module(child)


class Distribution(importlib.metadata.Distribution):
    """What importlib.metadata says of a served package."""

    def __init__(self, package: str) -> None:
        self._package = package

    def read_text(self, filename: str) -> str | None:
        name, version = self._package.replace("_", "-"), VERSIONS[self._package]
        return {
            "METADATA": f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\nSummary: served by statescan.compat\n",
            "top_level.txt": f"{self._package}\n",
        }.get(filename)

    def locate_file(self, path: Any) -> Any:
        raise FileNotFoundError(f"{self._package} is served by statescan.compat; there is no file {path}")


class Finder(importlib.metadata.DistributionFinder):
    """Serves the modules of the packages in `packages`."""

    def __init__(self) -> None:
        self.packages: set[str] = set()

    def find_spec(self, fullname: str, path: Any = None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] not in self.packages or fullname not in MODULES:
            return None
        return importlib.machinery.ModuleSpec(fullname, Loader(), origin="statescan.compat", is_package=bool(children(fullname)))

    def find_distributions(self, context: Any = None) -> list[Distribution]:
        wanted = None if context is None or context.name is None else context.name.lower().replace("-", "_")
        return [Distribution(package) for package in sorted(self.packages) if wanted in (None, package)]
