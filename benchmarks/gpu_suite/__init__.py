"""One run on a GPU machine that settles what a CPU cannot: `python -m benchmarks.gpu_suite` (docs/gpu.md).

It uses the tests' small models and the plain steps of `benchmarks/peers`, which are modules without a package.
"""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path += [str(ROOT / folder) for folder in ("tests/helpers", "benchmarks/peers", "benchmarks")]
