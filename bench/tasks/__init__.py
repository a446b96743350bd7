"""Small tasks that tell recurrent models apart, installed as the command ``statescan tasks``.

Each is a few minutes of training on a CPU: Mamba against Mamba-2, equal in size, data and optimiser. Importing this package
imports no torch.
"""

from .cli import add_arguments, main

__all__ = ["add_arguments", "main"]
