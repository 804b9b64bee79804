"""LLaVA json and HF rows -> messages; weighted mixtures; a check of all of it."""

from phi_mm.datasets.mixture import mixture
from phi_mm.datasets.page import write_page
from phi_mm.datasets.report import Report, check
from phi_mm.datasets.rows import load_rows
from phi_mm.datasets.streaming import Stream

__all__ = ["Report", "Stream", "check", "load_rows", "mixture", "write_page"]
