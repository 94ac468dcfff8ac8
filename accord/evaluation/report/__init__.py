"""The report of a run: one HTML file that needs nothing else, and a table for the terminal.

    html = build_report(summary, gallery, run_info)
    console.print(results_table(summary))

The page holds its pictures, plots and styles, asks the network for nothing and runs no script; its content
security policy says so to the browser. The same input gives the same bytes.
"""

from accord.evaluation.report.gallery import BestOfCard, Gallery, PairCard, RankedImage, Served
from accord.evaluation.report.page import build_report, replace_served
from accord.evaluation.report.terminal import results_table

__all__ = [
    "BestOfCard",
    "Gallery",
    "PairCard",
    "RankedImage",
    "Served",
    "build_report",
    "replace_served",
    "results_table",
]
