"""How the numbers of a tower become bytes: in their own dtype, in float16, or in int8."""

from dataclasses import dataclass

import numpy as np
import torch

STORAGES = ("tower", "float16", "int8")
SCALE_BYTES = 4  # float32
LARGEST = 127


@dataclass(frozen=True)
class Storage:
    """Features (rows, width) to bytes and back.

    `tower` keeps them bit by bit. `int8` rounds each row to whole multiples of its own scale, which
    is its largest number by 127 (the absmax quantisation of LLM.int8(), arXiv:2208.07339, by
    vectors); the scales stand before the rows.

    Args:
        name: one of `STORAGES`.
        tower_dtype: what the tower computes in.
    """

    name: str
    tower_dtype: torch.dtype

    @property
    def dtype(self) -> torch.dtype:
        """The dtype that is read."""
        return torch.float16 if self.name == "float16" else self.tower_dtype

    def size(self, rows: int, width: int) -> int:
        """Bytes of so many rows."""
        if self.name == "int8":
            return rows * (SCALE_BYTES + width)
        return rows * width * self.dtype.itemsize

    def encode(self, features: torch.Tensor) -> np.ndarray:
        """The bytes, as uint8.

        Raises:
            ValueError: features of another dtype than the tower's, or too large for float16.
        """
        if features.dtype != self.tower_dtype:
            raise ValueError(f"got features of {features.dtype}, expected {self.tower_dtype}")
        features = features.detach().cpu().contiguous()
        if self.name == "int8":
            scales = features.float().abs().amax(-1, keepdim=True) / LARGEST
            steps = (features.float() / scales.clamp(min=torch.finfo(torch.float32).tiny)).round()
            return np.concatenate([_raw(scales), _raw(steps.to(torch.int8))])
        stored = features.to(self.dtype)
        if self.name == "float16" and not stored.isfinite().all():
            raise ValueError(
                f"got features up to {features.abs().max():.3g}, which float16 cannot hold: set "
                "features_dtype to tower or int8"
            )
        return _raw(stored)

    def decode(self, raw: np.ndarray, rows: int, width: int) -> torch.Tensor:
        """Features (rows, width) of `dtype`, from the bytes."""
        data = torch.from_numpy(raw)
        if self.name != "int8":
            return data.view(self.dtype).view(rows, width)
        scales = data[: rows * SCALE_BYTES].view(torch.float32).view(rows, 1)
        steps = data[rows * SCALE_BYTES :].view(torch.int8).view(rows, width)
        return steps.float().mul_(scales).to(self.dtype)


def _raw(tensor: torch.Tensor) -> np.ndarray:
    return tensor.flatten().view(torch.uint8).numpy()
