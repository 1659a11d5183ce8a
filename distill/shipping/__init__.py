"""The stages that ship: export, bundle, bench, report. What they report is measured on the files they made."""

from __future__ import annotations

from distill.shipping.bundling import bundle, verify_with_data
from distill.shipping.exporting import export, learner, try_export
from distill.shipping.reporting import bench, report

__all__ = ["bench", "bundle", "export", "learner", "report", "try_export", "verify_with_data"]
