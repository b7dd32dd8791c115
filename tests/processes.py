"""Real processes, of one job on loopback or on their own."""

import contextlib
import os
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

from tests.flags import CHEAP

ROOT = Path(__file__).parents[1]


@contextlib.contextmanager
def free_port() -> Iterator[int]:
    """A port that nobody listens on, and that nobody else is given meanwhile."""
    with socket.socket() as found:
        # As gRPC's servers do, which may then listen there all the same.
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEPORT, 1)
        found.bind(("127.0.0.1", 0))
        yield found.getsockname()[1]


def run_together(
    commands: list[list[str]], cache: Path, *, one_job: bool
) -> list[subprocess.CompletedProcess[str]]:
    """Run several programs at the same time, on a CPU device each.

    Args:
      commands: what follows `python`.
      cache: where compiled programs are kept.
      one_job: they join as processes of one job, in this order.
    """
    with free_port() as port:
        running = []
        for rank, command in enumerate(commands):
            environment = {
                **os.environ,
                "JAX_PLATFORMS": "cpu",
                "XLA_FLAGS": CHEAP,
                "XDG_CACHE_HOME": str(cache),
            }
            if one_job:
                environment |= {
                    "JAX_COORDINATOR_ADDRESS": f"127.0.0.1:{port}",
                    "JAX_NUM_PROCESSES": str(len(commands)),
                    "JAX_PROCESS_ID": str(rank),
                }
            running.append(
                subprocess.Popen(
                    [sys.executable, *command],
                    cwd=ROOT,
                    env=environment,
                    stdout=subprocess.PIPE,
                    stderr=subprocess.STDOUT,
                    text=True,
                )
            )
        try:
            texts = [process.communicate(timeout=400)[0] for process in running]
        finally:
            for process in running:
                process.kill()
    return [
        subprocess.CompletedProcess(process.args, process.returncode, text)
        for process, text in zip(running, texts, strict=True)
    ]
