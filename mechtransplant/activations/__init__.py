"""Activations: what models read (``reading``), caches by hook names (``cache``), magnitudes (``decoding``)."""

from mechtransplant.activations.cache import ActivationCache, cache_activations, load_activations
from mechtransplant.activations.decoding import decoding_magnitudes, forced_magnitudes
from mechtransplant.activations.reading import POSITIONS, Batch, Positions, Reading, Text, plan_reading, written_texts

__all__ = [
    "POSITIONS",
    "ActivationCache",
    "Batch",
    "Positions",
    "Reading",
    "Text",
    "cache_activations",
    "decoding_magnitudes",
    "forced_magnitudes",
    "load_activations",
    "plan_reading",
    "written_texts",
]
