"""Setup of all tests: the same precision on every processor, rare garbage collection, and no silent skips.

Garbage collection ignores the imported libraries' objects, which stay in memory.
"""

import gc
import os

import pytest
from allowed_skips import ALLOWED_SKIPS

os.environ.setdefault("PRUNEKIT_PRECISION", "float32")  # meaning of `auto`: same results on every machine
gc.set_threshold(50_000)
import prunekit.jobs.compare.call_ratios  # noqa: E402 - this import loads the libraries
from prunekit.measuring.interleaved import WarmUp  # noqa: E402

gc.freeze()
# Comparisons in tests time only a few calls; benchmarks check times.
prunekit.jobs.compare.call_ratios.PAIRS, prunekit.jobs.compare.call_ratios.WARM_UP = 3, WarmUp(max_rounds=2)


@pytest.fixture(scope="module", autouse=True)
def reports(request):
    """Write reports of runs and comparisons only in test files that set WRITES_REPORTS."""
    with pytest.MonkeyPatch.context() as patches:
        if not getattr(request.module, "WRITES_REPORTS", False):
            for module in ("run", "compare.comparing"):
                patches.setattr(f"prunekit.jobs.{module}.finish", lambda *given: None)
        yield


STRICT = "PRUNEKIT_STRICT_SKIPS"  # set by continuous integration: a skip that is not allowed is a failure
skipped: dict[str, str] = {}


def pytest_runtest_logreport(report):
    """Collect skipped tests; with several workers, this runs in the main process, which gets their reports."""
    if report.skipped and not hasattr(report, "wasxfail"):
        skipped[report.nodeid] = str(report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr)


def _unexpected() -> dict[str, str]:
    names = {nodeid.rpartition("tests/")[2]: reason for nodeid, reason in skipped.items()}
    return {name: reason for name, reason in names.items() if name not in ALLOWED_SKIPS}


@pytest.hookimpl(trylast=True)
def pytest_sessionfinish(session):
    """Fail a strict session that skipped a test which tests/helpers/allowed_skips.py does not list."""
    if os.environ.get(STRICT) and _unexpected() and session.exitstatus == 0:
        session.exitstatus = pytest.ExitCode.TESTS_FAILED


def pytest_terminal_summary(terminalreporter):
    """Print the skips that are not on the list."""
    for name, reason in sorted(_unexpected().items()):
        terminalreporter.write_line(f"skipped, and not in tests/helpers/allowed_skips.py: {name}: {reason}")
