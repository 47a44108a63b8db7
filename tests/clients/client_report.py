"""What another project's client can do with a server: tried task by task, told as one line of JSON.

Runs in the client's own venv, so it knows nothing but the standard library. Scripts import it before the client: from
then on this process may look up and connect to this machine alone, and other hosts are refused and told.
"""

from __future__ import annotations

import json
import os
import sys
import traceback
from collections.abc import Callable, Mapping
from importlib.metadata import version

TASKS = ("completion", "chat", "stream", "tool_call", "structured")  # each script can do them, or names why not
HERE = ("127.0.0.1", "localhost", "::1", None)

Task = Callable[[str, str], object]  # the address of /v1 and a model -> something to show

_strangers: set[str] = set()


def _stay_here(event: str, args: tuple[object, ...]) -> None:
    """An audit hook: refuses hosts that are not this machine."""
    if event == "socket.getaddrinfo":
        host = args[0]
    elif event == "socket.connect" and isinstance(args[1], tuple):
        host = args[1][0]
    else:
        return
    name = host.decode() if isinstance(host, bytes) else host
    if name not in HERE:
        _strangers.add(str(name))
        raise OSError(f"this client may not leave the machine, and wanted {name}")


sys.addaudithook(_stay_here)


def run(package: str, tasks: Mapping[str, Task], cannot: Mapping[str, str]) -> None:
    """Try each task; exits with 1 if one failed, or if the client wanted another host."""
    unknown = set(TASKS) - set(tasks) - set(cannot)
    assert not unknown, f"neither tried nor named: {unknown}"
    url, model = sys.argv[1:]
    can: dict[str, str] = {}
    failed: dict[str, str] = {}
    for name, task in tasks.items():
        try:
            can[name] = str(task(url, model))[:80]
        except Exception:
            failed[name] = traceback.format_exc(limit=-2, chain=False)
    told = {"client": package, "version": version(package), "can": can, "cannot": dict(cannot), "failed": failed}
    sys.stdout.write(json.dumps(told | {"other_hosts": sorted(_strangers)}) + "\n")
    sys.stdout.flush()
    os._exit(bool(failed or _strangers))  # threads that clients leave behind do not keep the process
