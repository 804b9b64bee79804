"""LLaVA json and HF rows -> messages; weighted mixtures; validation of a data set."""

from phi_mm.datasets.mixture import mixture
from phi_mm.datasets.rows import load_rows
from phi_mm.datasets.validation import check, validate

__all__ = ["check", "load_rows", "mixture", "validate"]
