"""Outputs of the frozen towers, computed once and read at every step."""

from .cache import FeatureCache, open_cache
from .filling import fill_cache, fill_for_recipe

__all__ = ["FeatureCache", "fill_cache", "fill_for_recipe", "open_cache"]
