"""The processors of this process. Without jax: a process may be given its share before it is loaded."""

import os
import platform
from pathlib import Path


def usable() -> list[int]:
    """Those this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def threads() -> int:
    """XLA's on a CPU: NPROC, or one a usable processor. Rounding differs by their number."""
    return int(os.environ.get("NPROC") or len(usable()))


def processor() -> str:
    """The processor's model name: rounding may differ between types."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
