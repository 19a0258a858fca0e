"""Comparisons with peers, side by side in one run: python -m benchmarks, or python -m benchmarks.NAME."""

import sys
import warnings
from pathlib import Path

warnings.filterwarnings("ignore", message="`torch.jit.script` is deprecated")  # PyG's own use of it

sys.path.insert(0, str(Path(__file__).parent.parent / "examples"))  # which some of the experiments train
