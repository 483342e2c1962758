"""List the packages that the suite needs and that are missing or too old, or collect wheels for another machine.

    python -m benchmarks.gpu_suite.requirements                     print missing and too old packages
    python -m benchmarks.gpu_suite.requirements --collect wheels    download wheels for a machine without a network

A machine image with torch may lack the other packages, or have older versions. `--collect` resolves the packages for
the machine's Python and torch, leaves out the packages that the image has (`--has numpy,scipy`), and downloads the
others. prunekit's wheel contains only its version, because the code runs from the checkout. On that machine, run
`pip install --no-index --no-deps wheels/*.whl`.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterable
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from packaging.requirements import Requirement
from packaging.utils import canonicalize_name

ROOT = Path(__file__).parents[2]
EXTRAS = ("check", "serve")  # fvcore and thop, which check our MAC counts; the server's packages
TESTS = ("pytest>=8", "setuptools")  # the small models of the tests import pytest; thop imports distutils
PURE = ("fvcore", "iopath")  # pure Python packages that are published only as source
PLATFORMS = (*(f"manylinux_2_{minor}_x86_64" for minor in range(39, 4, -1)), "manylinux2014_x86_64")
IMAGE = "image"  # local version label of the empty wheel that stands for the machine's torch


def project() -> dict[str, Any]:
    """Return the `project` table of pyproject.toml."""
    import tomllib  # needs Python 3.11 or newer

    return tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]


def requirements(extras: Iterable[str] = ()) -> list[Requirement]:
    """Return the requirements in pyproject.toml, with those of the given extras."""
    said = project()
    lines = [*said["dependencies"], *(line for name in extras for line in said["optional-dependencies"][name])]
    return [Requirement(line) for line in lines]


def faults() -> list[str]:
    """Return a sentence for each package that is missing or too old in this environment."""
    found = []
    for needed in [*requirements(), *map(Requirement, TESTS)]:
        try:
            here = version(needed.name)
        except PackageNotFoundError:
            found.append(f"{needed.name} is not installed, and {needed} is needed")
            continue
        if not needed.specifier.contains(here, prereleases=True):
            found.append(f"{needed.name} {here} is installed, and {needed} is needed")
    return found


def refuse_old() -> str | None:
    """Return one line about the first missing or too old package, or None if there is none."""
    found = faults()
    more = f" (and {len(found) - 1} more: python -m {__package__}.requirements)" if len(found) > 1 else ""
    return f"{found[0]}{more}; install it, or collect wheels as docs/gpu.md says" if found else None


def collect(folder: Path, python: str, torch: str, has: Iterable[str]) -> list[str]:
    """Download the wheels of packages that another machine lacks into a folder; return their names.

    python: that machine's Python version, such as "3.12". torch: its torch version. has: packages that it has.
    """
    folder.mkdir(parents=True, exist_ok=True)
    known = {canonicalize_name(name) for name in (*has, "torch")}
    wanted = [str(line) for line in requirements(EXTRAS)] + list(TESTS)
    target = ["--python-version", python, "--implementation", "cp", "--only-binary=:all:"]
    target += [part for name in PLATFORMS for part in ("--platform", name)]
    with tempfile.TemporaryDirectory() as temporary:
        pins, report = Path(temporary) / "constraints.txt", Path(temporary) / "report.json"
        pins.write_text(constraints(torch, known), encoding="utf-8")
        write_metadata(Path(temporary), "torch", f"{torch}+{IMAGE}")  # without it, pip resolves torch's requirements
        found = ["--find-links", temporary, "--find-links", str(folder)]
        pip("wheel", "--no-deps", "-w", str(folder), "-c", str(pins), *PURE)
        resolving = ["--dry-run", "--ignore-installed", "--target", f"{temporary}/site", "--report", str(report)]
        pip("install", *resolving, *target, "-c", str(pins), *found, *wanted)
        resolved = [item["metadata"] for item in json.loads(report.read_text(encoding="utf-8"))["install"]]
        versions = {canonicalize_name(item["name"]): item["version"] for item in resolved}
        names = [f"{name}=={number}" for name, number in versions.items() if name not in known | set(PURE)]
        pip("download", "--no-deps", *target, "-d", str(folder), *found, *names)
    write_metadata(folder, "prunekit", project()["version"])
    return sorted(path.name for path in folder.glob("*.whl"))


def constraints(torch: str, known: Iterable[str]) -> str:
    """Return constraints.txt with the machine's torch, and without the packages that the machine has."""
    lines = (ROOT / "constraints.txt").read_text(encoding="utf-8").splitlines()
    kept = [line for line in lines if "==" in line and canonicalize_name(line.partition("==")[0]) not in known]
    return "\n".join([*kept, f"torch=={torch}+{IMAGE}"]) + "\n"


def write_metadata(folder: Path, name: str, number: str) -> None:
    """Write a wheel that contains a package's name and version, and no code."""
    stem = f"{name}-{number}"
    with zipfile.ZipFile(folder / f"{stem}-py3-none-any.whl", "w") as wheel:
        metadata = f"Metadata-Version: 2.1\nName: {name}\nVersion: {number}\n"
        tags = "Wheel-Version: 1.0\nGenerator: prunekit\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        for file, content in {"METADATA": metadata, "WHEEL": tags, "RECORD": ""}.items():
            wheel.writestr(f"{stem}.dist-info/{file}", content)


def pip(*arguments: str) -> None:
    """Run this interpreter's pip."""
    subprocess.run([sys.executable, "-m", "pip", *arguments, "--quiet"], check=True, cwd=tempfile.gettempdir())


def main() -> int:
    """Print missing and too old packages, or collect wheels; return the exit status."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], prog=f"python -m {__package__}.requirements")
    parser.add_argument("--collect", type=Path, metavar="FOLDER", help="download wheels for another machine")
    parser.add_argument("--python", default="3.12", help="that machine's Python; default 3.12")
    parser.add_argument("--torch", default="2.11.0", help="that machine's torch; default 2.11.0")
    parser.add_argument("--has", default="", help="comma-separated other packages that it has, new enough")
    given = parser.parse_args()
    if given.collect is None:
        found = faults()
        print("\n".join(found) or "all packages are installed and new enough")
        return 1 if found else 0
    names = collect(given.collect.absolute(), given.python, given.torch, filter(None, given.has.split(",")))
    size = sum((given.collect / name).stat().st_size for name in names)
    print("\n".join(names), f"{len(names)} wheels, {size / 1e6:.0f} MB", sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
