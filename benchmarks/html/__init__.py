"""``neuroada report``: results files as one self-contained page.

Nothing here measures: the page shows only what the JSON files contain.
"""

from neuroada_kernels.benchmarks.html.page import write_html
from neuroada_kernels.benchmarks.html.source import ReportError

__all__ = ["ReportError", "write_html"]
