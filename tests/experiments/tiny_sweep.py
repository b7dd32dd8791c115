"""A sweep of seconds, as a config file and as a program that is killed again and again.

    python -m tests.experiments.tiny_sweep WORKDIR COMPILED KILLS SEED

The program imports everything once and forks: each child goes on with the sweep, until it is killed
at a random moment or ends. COMPILED keeps the compiled programs.
Prints the number of children killed, and the work directories.
"""

import itertools
import os
import random
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


def die_after(writes: int, seconds: float) -> None:
    """Kill this process some CPU seconds after so many writes: a busy machine changes nothing."""
    done, real = itertools.count(1), os.fsync

    def counted(descriptor):
        real(descriptor)
        if next(done) == writes:
            signal.setitimer(signal.ITIMER_PROF, seconds)

    # Nothing catches the timer's signal: it ends a process as SIGKILL does.
    os.fsync = counted
    if writes == 0:
        signal.setitimer(signal.ITIMER_PROF, seconds)


def run_forked(workdir: Path, limit: tuple[int, float] | None) -> bool:
    """Go on with the sweep in a child; whether it ended before it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            if limit is not None:
                die_after(*limit)
            code = int(bool(Sweep(read(get_config()), sweep(), workdir, quiet=True).run()))
        finally:
            os._exit(code)
    code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
    assert code == 0 or (limit is not None and code == -signal.SIGPROF), code
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
