"""Measure on a GPU machine what a CPU cannot measure: `python -m benchmarks.gpu_suite` (docs/gpu.md).

The suite uses the small models of the tests and the plain training steps of `benchmarks/peers`. Their folders are not
packages, so this module adds them to `sys.path`.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / folder) for folder in ("tests/helpers", "benchmarks/peers", "benchmarks")]
