"""The training loop: transformers' Trainer with what a phi-mm run needs besides."""

from .checkpoints import begin_or_resume
from .trainer import PhiMMTrainer, by_modality

__all__ = ["PhiMMTrainer", "begin_or_resume", "by_modality"]
