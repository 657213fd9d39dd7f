"""Grafts as files: ``folder`` (a model others can load), ``verify`` (read again), ``adapter`` (as a LoRA)."""

from mechtransplant.export.folder import Export, export_graft
from mechtransplant.export.verify import Verification, verify_export

__all__ = ["Export", "Verification", "export_graft", "verify_export"]
