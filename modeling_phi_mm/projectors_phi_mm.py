"""The two projectors: what a tower sees or hears becomes tokens of the language model.

Shapes: N images, P patches, W audio windows, F encoder frames, S frames a token, C tower width, D
    language model width.
"""

import torch
from torch import nn
from transformers.activations import ACT2FN

from .configuration_phi_mm import PhiMMConfig


class ImageProjector(nn.Module):
    """Patch features to image tokens: merge k x k neighbours, then Linear - activation - Linear.

    With `image_pool=1` and no positions this is the projector of LLaVA-1.5 (Liu et al. 2023,
    arXiv:2310.03744).
    """

    def __init__(self, config: PhiMMConfig):
        super().__init__()
        self.grid, self.pool = config.image_grid, config.image_pool
        self.tokens_per_cell = config.image_tokens_per_cell
        self.text_width = config.text_config.hidden_size
        cell_width = config.vision_config.hidden_size * self.pool**2
        hidden = config.projector_hidden_size or self.text_width
        self.norm = nn.LayerNorm(cell_width) if config.projector_norm else nn.Identity()
        self.linear_1 = nn.Linear(cell_width, hidden)
        num_cells = (self.grid // self.pool) ** 2
        self.position = nn.Embedding(num_cells, hidden) if config.projector_positions else None
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, self.text_width * self.tokens_per_cell)

    def merge(self, features: torch.Tensor) -> torch.Tensor:
        """Concatenates each k x k square of neighbouring patches, (N, P, C) to (N, P/k², k²·C),
        rows first.
        """
        n, _, width = features.shape
        side = self.grid // self.pool
        cells = features.view(n, side, self.pool, side, self.pool, width)
        return cells.transpose(2, 3).reshape(n, side * side, self.pool**2 * width)

    def forward(self, features: torch.Tensor) -> torch.Tensor:
        """Projects patch features (N, P, C) to image tokens (N, P/k²·tokens_per_cell, D)."""
        hidden = self.linear_1(self.norm(self.merge(features)))
        if self.position is not None:
            hidden = hidden + self.position.weight
        return self.linear_2(self.act(hidden)).view(len(features), -1, self.text_width)


class AudioProjector(nn.Module):
    """Encoder frames to audio tokens: stack S frames, then Linear - activation - Linear.

    Frame stacking as in SLAM-ASR (Ma et al. 2024, arXiv:2402.08846) and transformers' Voxtral.
    """

    def __init__(self, config: PhiMMConfig):
        super().__init__()
        self.stack = config.audio_stack
        text_width = config.text_config.hidden_size
        hidden = config.projector_hidden_size or text_width
        self.linear_1 = nn.Linear(config.audio_config.d_model * self.stack, hidden)
        self.act = ACT2FN[config.projector_hidden_act]
        self.linear_2 = nn.Linear(hidden, text_width)

    def forward(self, features: torch.Tensor, mask: torch.Tensor) -> torch.Tensor:
        """Projects the frames that hold sound.

        Args:
            features: encoder frames (W, F, C).
            mask: (W, F), 1 where a frame holds sound; the ones of a window stand before its zeros.

        Returns:
            (T, D): the tokens of all windows one after another, ceil(sounding frames / S) for each
            window.
        """
        mask = mask.to(features.device)
        # Frames after the sound are zeroed, so that the last stack is the same whatever pads it.
        features = features * mask.unsqueeze(-1).to(features.dtype)
        windows, frames, width = features.shape
        padding = -frames % self.stack
        features = nn.functional.pad(features, (0, 0, 0, padding))
        stacks = features.view(windows, -1, self.stack * width)  # (W, ceil(F/S), S·C)
        has_sound = (
            nn.functional.pad(mask, (0, padding)).view(windows, -1, self.stack)[..., 0].bool()
        )
        return self.linear_2(self.act(self.linear_1(stacks[has_sound])))


__all__ = ["AudioProjector", "ImageProjector"]
