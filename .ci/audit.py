"""Known vulnerabilities of the locked packages: pip-audit on constraints.txt, asked of PyPI's advisory service.

Exit code 0: none known. 1: some, or an error. UNREACHABLE: the service does not know what it must know, so nothing
was audited; one line says so. Does not know which packages are used how: every pin counts.
"""

from __future__ import annotations

import json
import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICE = "https://pypi.org"
KNOWN_BAD = "pip/20.0.2"  # has advisories since 2021
UNREACHABLE = 75  # EX_TEMPFAIL


def answers(service: str) -> bool:
    """Whether the service has advisories of single versions; a mirror may have the packages alone."""
    try:
        with urllib.request.urlopen(f"{service}/pypi/{KNOWN_BAD}/json", timeout=15) as reply:
            return bool(json.load(reply).get("vulnerabilities"))
    except (OSError, ValueError):  # URLError and HTTPError are OSErrors
        return False


def main() -> int:
    """Run pip-audit where its service answers."""
    if not answers(SERVICE):
        print(f"audit: NOT DONE, {SERVICE} has no advisories for this machine", file=sys.stderr)  # noqa: T201
        return UNREACHABLE
    command = [sys.executable, "-m", "pip_audit", "--strict", "--no-deps", "-r", str(ROOT / "constraints.txt")]
    return int(subprocess.run(command, check=False).returncode != 0)


if __name__ == "__main__":
    sys.exit(main())
