"""The sizes of the demo model, as stored in its weight file."""

from __future__ import annotations

import dataclasses


@dataclasses.dataclass(frozen=True)
class Config:
    """Sizes of the model; stored as JSON in the weight file."""

    vocab_size: int = 256
    d_model: int = 256
    n_layer: int = 8
    expand: int = 2
    headdim: int = 64
    ngroups: int = 1
    dstate: int = 128
    conv_width: int = 4
    eps: float = 1e-5

    def __post_init__(self) -> None:
        if self.d_inner % self.headdim or self.nheads % self.ngroups:
            raise ValueError(
                f"config: headdim={self.headdim} must divide expand*d_model={self.d_inner}, and ngroups={self.ngroups} "
                "must divide the number of heads"
            )

    @property
    def d_inner(self) -> int:
        """Channels of x and z."""
        return self.expand * self.d_model

    @property
    def nheads(self) -> int:
        return self.d_inner // self.headdim

    @property
    def conv_dim(self) -> int:
        """Channels of the convolution: x, B and C."""
        return self.d_inner + 2 * self.ngroups * self.dstate
