"""What `pip install --report` says it would do to an environment: `python check.py REPORT WHEEL`.

Exit status 1 where it would change anything that is installed, or bring in more than NEW, or where the wheel is too
large to be downloaded for every notebook.
"""

import json
import re
import sys
from collections.abc import Mapping
from importlib.metadata import distributions
from pathlib import Path
from typing import Any

NEW = {"jaxgen", "jaxtyping", "wadler-lindig"}  # jaxtyping's own dependency; both are pure Python and small
LARGEST_WHEEL = 8_000_000  # bytes; the demo model is most of it


def main() -> int:
    report, wheel = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    installed = {canonical(found.metadata["Name"]): found.version for found in distributions()}
    wrong = problems(report, installed, wheel.stat().st_size)
    for item in report["install"]:
        print(f"would install {item['metadata']['name']} {item['metadata']['version']}")
    print(f"{len(installed)} packages are installed; jaxgen's wheel has {wheel.stat().st_size / 1e6:.1f} MB")
    print(*wrong, sep="\n", end="\n" if wrong else "")
    return int(bool(wrong))


def problems(report: Mapping[str, Any], installed: Mapping[str, str], wheel_bytes: int) -> list[str]:
    """What is wrong with a report of pip's, one line each; `installed` maps canonical names to versions."""
    wanted = {canonical(item["metadata"]["name"]): item["metadata"]["version"] for item in report["install"]}
    found = [f"{name} {installed[name]} would become {wanted[name]}" for name in sorted(wanted.keys() & installed)]
    found += [f"{name} {wanted[name]} would be new" for name in sorted(wanted.keys() - NEW - installed.keys())]
    if "jaxgen" not in wanted:
        found.append("jaxgen itself would not be installed")
    if wheel_bytes > LARGEST_WHEEL:
        found.append(f"the wheel has {wheel_bytes} bytes, more than {LARGEST_WHEEL}")
    return found


def canonical(name: str) -> str:
    """A package's name in the one spelling that PEP 503 gives it."""
    return re.sub(r"[-_.]+", "-", name).lower()


if __name__ == "__main__":
    sys.exit(main())
