"""Modules of a model: ``addresses`` (names), ``layout`` (where they are), ``regions`` (parts of parameters)."""

from mechtransplant.modules.addresses import (
    KINDS,
    Address,
    Kind,
    heads_in_words,
    module_frame,
    parse_address,
    share_no_weights,
)
from mechtransplant.modules.layout import Layout, is_linear, layout_of
from mechtransplant.modules.regions import Region

__all__ = [
    "KINDS",
    "Address",
    "Kind",
    "Layout",
    "Region",
    "heads_in_words",
    "is_linear",
    "layout_of",
    "module_frame",
    "parse_address",
    "share_no_weights",
]
