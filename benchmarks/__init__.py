"""Comparisons with peers, side by side in one run: python -m benchmarks, or python -m benchmarks.NAME."""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # which some of the experiments train
