"""Models of Hugging Face transformers that were imported before install() or uninstall()."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Container
from types import FunctionType


def bind_again(packages: Container[str]) -> None:
    """Let the models look for the functions of `packages` once more.

    transformers looks once, when a model's module is imported: the decorator use_kernel_func_from_hub_with_fallback imports
    the package and wraps what it finds, or the model's own torch code. Here the same decorator is applied to the same torch
    code again. A release of transformers without that decorator, and functions that the package kernels has wrapped, are
    left alone: for them install() must come before the model's import.
    """
    hub = sys.modules.get("transformers.integrations.hub_kernels")
    decorator = getattr(hub, "use_kernel_func_from_hub_with_fallback", None)
    if decorator is None:
        return
    for name, module in list(sys.modules.items()):
        if not name.startswith("transformers.models.") or module is None:
            continue
        for attribute, function in list(vars(module).items()):
            if isinstance(function, FunctionType) and hasattr(function, "__wrapped__"):
                decorated = inspect.getclosurevars(function).nonlocals
                if decorated.get("package") in packages and "func_name" in decorated:
                    setattr(module, attribute, decorator(decorated["func_name"], decorated["package"])(function.__wrapped__))
