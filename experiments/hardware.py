"""What computes: times belong to it, and reports name it."""

import contextlib
import os
import platform
from pathlib import Path
from typing import Any

import jax


def hardware() -> dict[str, Any]:
    """Processor, cores and devices of this machine, as JSON values."""
    processor = platform.processor() or platform.machine()
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines():
            if line.startswith("model name"):
                processor = line.partition(":")[2].strip()
                break
    devices = jax.devices()
    return {
        "processor": processor,
        "cores": os.cpu_count(),
        "backend": jax.default_backend(),
        "devices": f"{len(devices)} x {devices[0].device_kind}",
    }
