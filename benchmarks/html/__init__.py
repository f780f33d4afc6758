"""``neuroada report``: results files as one self-contained page.

JSON goes in and HTML comes out: nothing here measures, or knows more than the files say.
"""

from neuroada_kernels.benchmarks.html.page import write_html
from neuroada_kernels.benchmarks.html.source import ReportError

__all__ = ["ReportError", "write_html"]
