"""A server in a process of its own, on a port that is free."""

from __future__ import annotations

import os
import socket
import subprocess
import time
from collections.abc import Sequence
from pathlib import Path

import httpx


class Serving:
    """What a command serves, once it is started.

    Args:
        command: without the port, which is added as `--port`.
        log: the file that its output is added to.
    """

    def __init__(self, command: Sequence[str], log: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            self.port = free.getsockname()[1]
        self._command = [*command, "--port", str(self.port)]
        self.log = log
        self.url = f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Returns when it answers. Raises SystemExit where it ended instead."""
        with self.log.open("ab") as log:
            self.process = subprocess.Popen(self._command, stdout=log, stderr=log)
        while True:
            try:
                httpx.get(f"{self.url}/health").raise_for_status()
                return
            except httpx.HTTPError:
                if self.process.poll() is not None:
                    raise SystemExit(f"the server ended:\n{self.log.read_text()}") from None
                time.sleep(0.1)

    def stop(self) -> None:
        """Ask it to end, and end it where it does not (transformers 5.24 with continuous batching)."""
        self.process.terminate()
        try:
            self.process.wait(10)
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()

    def cpu_seconds(self) -> float:
        """That all threads of its process have had so far (Linux): what others on the machine take does not count."""
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")
