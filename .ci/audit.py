"""Known vulnerabilities of the locked packages: pip-audit on constraints.txt, asked of PyPI's advisory service.

Exit code 0: none known. 1: some, or an error. UNREACHABLE: the service does not know a package that it must know, so
nothing was audited; one line says so. Does not know which packages are used how: every pin counts.
"""

from __future__ import annotations

import subprocess
import sys
import urllib.request
from pathlib import Path

ROOT = Path(__file__).parents[1]
SERVICE = "https://pypi.org"
UNREACHABLE = 75  # EX_TEMPFAIL


def answers(service: str) -> bool:
    """Whether the service speaks of `pip`; a mirror of the packages alone answers 404, or not at all."""
    try:
        with urllib.request.urlopen(f"{service}/pypi/pip/json", timeout=15) as reply:
            return b'"vulnerabilities"' in reply.read()
    except OSError:  # URLError and HTTPError, too
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
