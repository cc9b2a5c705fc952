"""The benchmarks: scripts to be run one by one, or together by ``python -m benchmarks.run``."""

import sys
from pathlib import Path

# As scripts they import each other by plain names; last on the path, so that they hide nobody else's modules.
_FOLDER = str(Path(__file__).resolve().parent)
if _FOLDER not in sys.path:
    sys.path.append(_FOLDER)
