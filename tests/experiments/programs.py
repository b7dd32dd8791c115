"""Programs of `experiments`, each in a process of its own that need not import everything again.

As a program it imports what they all need and forks for every line that it reads: a list of a
module and its arguments. It answers with the exit code and what was written.
"""

import contextlib
import json
import os
import runpy
import subprocess
import sys
import tempfile
from pathlib import Path

# All that takes long, but none of the programs: as `python -m`, runpy imports them as __main__.
import experiments.job
import experiments.joined
import experiments.report  # noqa: F401

ROOT = Path(__file__).parents[2]


class Programs:
    """Starts programs, and tells how they ended as `subprocess.run` does."""

    def __init__(self):
        self._parent = subprocess.Popen(
            [sys.executable, "-m", "tests.experiments.programs"],
            cwd=ROOT,
            env={**os.environ, "JAX_PLATFORMS": "cpu"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
        )

    def run(self, *command: str) -> subprocess.CompletedProcess[str]:
        """Run a module with arguments."""
        self._parent.stdin.write(json.dumps(command) + "\n")
        self._parent.stdin.flush()
        code, out, err = json.loads(self._parent.stdout.readline())
        return subprocess.CompletedProcess(command, code, out, err)

    def close(self) -> None:
        """End the process that forks."""
        self._parent.stdin.close()
        self._parent.stdout.close()
        self._parent.wait()


def run_as_main(module: str, arguments: list[str], out: int, err: int) -> int:
    """What `python -m` does; the exit code."""
    child = os.fork()
    if child == 0:
        code = 1
        os.dup2(out, 1)
        os.dup2(err, 2)
        sys.argv = [module, *arguments]
        try:
            runpy.run_module(module, run_name="__main__", alter_sys=True)
            code = 0
        except SystemExit as end:
            code = end.code if isinstance(end.code, int) else int(end.code is not None)
        except BaseException:
            sys.excepthook(*sys.exc_info())
        finally:
            with contextlib.suppress(OSError):
                sys.stdout.flush()
                sys.stderr.flush()
            os._exit(code)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main() -> None:
    """Answer until there is nothing more to read."""
    # readline: what iterating reads ahead, a fork would have too.
    while line := sys.stdin.readline():
        module, *arguments = json.loads(line)
        with tempfile.TemporaryFile("w+") as out, tempfile.TemporaryFile("w+") as err:
            code = run_as_main(module, arguments, out.fileno(), err.fileno())
            out.seek(0)
            err.seek(0)
            print(json.dumps([code, out.read(), err.read()]), flush=True)


if __name__ == "__main__":
    main()
