"""A finished folder as one web page that needs nothing beside it: no network, no other file.

``finished`` (what a folder holds), ``captions`` (what its figures show, and where they belong), ``page`` (the HTML).
"""

from mechtransplant.report.page import write_page

__all__ = ["write_page"]
