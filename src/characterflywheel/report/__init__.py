"""The report: one page that tells a generation's story from the ledger, and recomputes nothing (DESIGN section 10)."""

from .page import write_report

__all__ = ["write_report"]
