"""A sweep of seconds, as a config file and as a program that is killed again and again.

    python -m tests.experiments.tiny_sweep WORKDIR COMPILED KILLS SEED

The program imports everything once and forks: each child goes on with the sweep, until it is killed
at a random moment or ends. COMPILED keeps the compiled programs.
Prints the number of children killed, and the work directories.
"""

import os
import random
import select
import signal
import sys
from pathlib import Path

import jax

from configs import digits
from experiments.config import grid, read
from experiments.sweep import Sweep

# Writes that a child lives to see, then CPU seconds: kills fall into all stages of a sweep, since
# every child gets further, and both upon writes and far from any.
WRITES, SECONDS = 8, 0.6


def get_config():
    """The digits config, shrunk until it runs in seconds; everything it does is still done."""
    config = digits.get_config()
    config.dense.arguments.update({"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4})
    config.dense.train.update({"epochs": 2, "checkpoint_epochs": 1, "checkpoint_steps": 5})
    config.extractor.update({"kind": "pooled", "dim": 4})
    config.gmm.update({"components": (1, 2), "restarts": 1})
    config.prune.layers.max_batches = 1
    config.select.update({"metric_count": 32, "finetune_count": 64})
    config.recover.update({"epochs": 2, "learning_rate": 1e-2, "checkpoint_epochs": 1})
    config.data.partition.update({"num_devices": 2, "public_fraction": 0.15})
    return config


def sweep():
    """One device at two budgets, another at one of them."""
    units = grid({"budget": ("macs=0.5", "macs=0.7"), "device": (0, 1), "recovery": ("finetune",)})
    return units[:3]


def compile_once(directory):
    """Compile quickly, and keep every program: only the first of many processes compiles."""
    jax.config.update("jax_disable_most_optimizations", True)
    jax.config.update("jax_compilation_cache_dir", str(directory))
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
    jax.config.update("jax_persistent_cache_min_entry_size_bytes", 0)


def cpu_seconds(process: int) -> float:
    """What a child has used so far: a busy machine does not change where it is killed."""
    fields = Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def tell_writes(pipe: int) -> None:
    """Say so through a pipe whenever something has reached the disk."""
    real = os.fsync

    def told(descriptor):
        real(descriptor)
        os.write(pipe, b".")

    os.fsync = told


def run_forked(workdir: Path, limit: tuple[int, float] | None) -> bool:
    """Go on with the sweep in a child; whether it ended before it was killed.

    Args:
      limit: SIGKILL comes so many CPU seconds after so many writes, or never.
    """
    heard, told = os.pipe()
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.close(heard)
            tell_writes(told)
            code = int(bool(Sweep(read(get_config()), sweep(), workdir, quiet=True).run()))
        finally:
            os._exit(code)
    os.close(told)
    with os.fdopen(heard, "rb", buffering=0) as pipe:
        ended = limit is None or any(not pipe.read(1) for _ in range(limit[0]))
        if not ended:
            end = cpu_seconds(child) + limit[1]
            while not select.select([pipe], [], [], 0.005)[0] or pipe.read(64):
                if cpu_seconds(child) >= end:
                    os.kill(child, signal.SIGKILL)
                    break
        while limit is None and pipe.read(64):
            pass
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0 or (limit is not None and code == -signal.SIGKILL), code
    return code == 0


def main():
    """Run and kill until there were enough kills, then let the sweep end."""
    workdir, compiled, kills, seed = sys.argv[1:]
    workdir, kills, chance = Path(workdir), int(kills), random.Random(seed)
    compile_once(compiled)
    whole = workdir.with_name("whole")
    assert run_forked(whole, None)
    killed = 0
    directories = [workdir]
    while killed < kills:
        if run_forked(directories[-1], (chance.randint(0, WRITES), chance.uniform(0, SECONDS))):
            # Too quick for all kills: on with a new one.
            directories.append(workdir.with_name(f"{workdir.name}{len(directories)}"))
        else:
            killed += 1
    assert run_forked(directories[-1], None)
    print("killed", killed, *directories, flush=True)


if __name__ == "__main__":
    main()
