"""Grafts as files: ``folder`` (a model others can load), ``verify`` (read again), ``adapter`` (as a LoRA)."""

from mechtransplant.export.adapter import AdapterExport, export_adapter
from mechtransplant.export.finished import FinishedRun, finished_run
from mechtransplant.export.folder import Export, export_graft
from mechtransplant.export.verify import Verification, verify_export

__all__ = [
    "AdapterExport",
    "Export",
    "FinishedRun",
    "Verification",
    "export_adapter",
    "export_graft",
    "finished_run",
    "verify_export",
]
