"""The report of a run or of a comparison, as one self-contained HTML page."""

from prunekit.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
