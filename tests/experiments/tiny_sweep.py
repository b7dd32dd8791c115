"""A sweep of seconds, as a config file and as a program that is killed again and again.

    python -m tests.experiments.tiny_sweep WORKDIR COMPILED KILLS SEED

The program imports everything once and forks: each child goes on with the sweep, until it is killed
with its whole process group at a random moment or ends. COMPILED keeps the compiled programs.
Prints the number of children killed, and the work directories.
"""

import os
import random
import signal
import sys
import time
from pathlib import Path

import jax

from configs import digits
from experiments.config import grid, read
from experiments.sweep import Sweep

# CPU seconds: long enough for every stage to end now and then, short enough to hit all of them.
SHORTEST, LONGEST = 0.2, 4.0


def get_config():
    """The digits config, shrunk until it runs in seconds; everything it does is still done."""
    config = digits.get_config()
    config.dense.arguments.update({"depth": 1, "embed_dim": 16, "num_heads": 2, "patch_size": 4})
    config.dense.train.update({"epochs": 2, "checkpoint_epochs": 1, "checkpoint_steps": 8})
    config.extractor.update({"kind": "pooled", "dim": 4})
    config.gmm.components = (1, 2)
    config.prune.layers.max_batches = 1
    config.select.update({"metric_count": 32, "finetune_count": 64})
    config.recover.update({"epochs": 4, "learning_rate": 3e-3, "checkpoint_epochs": 1})
    config.data.partition.num_devices = 2
    return config


def sweep():
    """Two devices at two budgets, one of them recovered."""
    return grid({"device": (0, 1), "budget": ("macs=0.7", "macs=0.5"), "recovery": ("finetune",)})


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


def run_forked(workdir: Path, limit: float | None) -> bool:
    """Go on with the sweep in a child; whether it ended before it was killed."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            os.setsid()
            code = int(bool(Sweep(read(get_config()), sweep(), workdir, quiet=True).run()))
        finally:
            os._exit(code)
    while limit is None or cpu_seconds(child) < limit:
        done, status = os.waitpid(child, os.WNOHANG)
        if done:
            assert os.waitstatus_to_exitcode(status) == 0, status
            return True
        time.sleep(0.01)
    os.killpg(child, signal.SIGKILL)
    os.waitpid(child, 0)
    return False


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
        if run_forked(directories[-1], chance.uniform(SHORTEST, LONGEST)):
            # Too quick for all kills: on with a new one.
            directories.append(workdir.with_name(f"{workdir.name}{len(directories)}"))
        else:
            killed += 1
    assert run_forked(directories[-1], None)
    print("killed", killed, *directories, flush=True)


if __name__ == "__main__":
    main()
