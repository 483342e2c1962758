"""What a person looks at after a run: one self-contained HTML page of a run or of a comparison."""

from prunekit.report.page import REPORT, write_report

__all__ = ["REPORT", "write_report"]
