"""A far end in a process of its own on this machine, over a pair of sockets.

The process ends when this one does: its socket is closed then. It is in a session of its own, so that Ctrl-C reaches
the server alone, which drains first. Run as a module it is that process.
"""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from collections.abc import Callable
from multiprocessing.connection import Connection

from ensemble_core.members.base import Member
from ensemble_core.members.remote.host import Host, Spec
from ensemble_core.members.remote.link import LinkError, Method

_METHODS: dict[bytes, Method] = {b"p": "pulse", b"f": "forward", b"r": "reuse"}
_CODES = {method: code for code, method in _METHODS.items()}
_END_SECONDS = 5.0  # that a process has to end by itself


class ProcessLink:
    """See `link.Link`."""

    def __init__(self, spec: Spec) -> None:
        ours, theirs = socket.socketpair()
        environment = os.environ | {"OMP_NUM_THREADS": str(spec.num_threads)}
        with theirs:
            command = [sys.executable, "-m", __name__, str(theirs.fileno())]
            self._process = subprocess.Popen(
                command,
                pass_fds=[theirs.fileno()],
                env=environment,
                stdin=subprocess.DEVNULL,
                start_new_session=True,
            )
        self._connection = Connection(ours.detach())
        self._send(spec.encode())

    @property
    def pid(self) -> int:
        """Of the process."""
        return self._process.pid

    def send(self, method: Method, message: bytes) -> None:
        """See `Link.send`."""
        self._send(_CODES[method] + message)

    def receive(self, timeout: float | None = None) -> bytes | None:
        """See `Link.receive`."""
        try:
            if timeout is not None and not self._connection.poll(timeout):
                return None
            return self._connection.recv_bytes()
        except (OSError, EOFError) as error:
            raise LinkError(self._end()) from error

    def close(self) -> None:
        """See `Link.close`."""
        self._process.terminate()  # it holds nothing that could be lost
        try:
            self._process.wait(_END_SECONDS)
        except subprocess.TimeoutExpired:  # it is stopped
            self._process.kill()
            self._process.wait()
        self._connection.close()

    def _send(self, message: bytes) -> None:
        try:
            self._connection.send_bytes(message)
        except OSError as error:
            raise LinkError(self._end()) from error

    def _end(self) -> str:
        """How the process ended."""
        try:
            code = self._process.wait(1.0)
        except subprocess.TimeoutExpired:
            return f"process {self._process.pid} has closed its connection"
        how = f"was ended by signal {-code}" if code < 0 else f"ended with status {code}"
        return f"process {self._process.pid} {how}"


def serve(connection: Connection, load: Callable[[Spec], Member] | None = None) -> None:
    """The other side's loop, until the connection is closed."""
    try:
        host = Host(connection.recv_bytes(), load)
        while True:
            request = connection.recv_bytes()
            connection.send_bytes(host.answer(_METHODS[request[:1]], request[1:]))
    except (OSError, EOFError):
        os._exit(0)  # whoever asked is gone; a thread may still be loading


if __name__ == "__main__":
    serve(Connection(int(sys.argv[1])))
