"""Outputs of the frozen towers, computed once and read at every step."""

from .cache import FeatureCache, fill_cache, open_cache

__all__ = ["FeatureCache", "fill_cache", "open_cache"]
