"""``python leave_at_once.py SCRIPT ARGUMENTS``: exit without finalising the interpreter."""

from __future__ import annotations

import os
import runpy
import sys
from pathlib import Path

sys.argv = sys.argv[1:]
sys.path[0] = str(Path(sys.argv[0]).parent)
runpy.run_path(sys.argv[0], run_name="__main__")  # an exception ends the process as usual
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
