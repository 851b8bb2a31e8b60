"""The processors of this process. Without jax: a process may be given its share before it is loaded."""

import os
import platform
import re
from pathlib import Path

from heal_jax.errors import InputError


def usable() -> list[int]:
    """Those this process may run on."""
    return sorted(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else list(range(os.cpu_count() or 1))


def threads() -> int:
    """XLA's on a CPU: PJRT_NPROC or NPROC, or one a usable processor. Rounding differs by their number. Raises
    InputError where a variable is no number above zero."""
    for name in ("PJRT_NPROC", "NPROC"):
        if given := os.environ.get(name):
            if not re.fullmatch("[1-9][0-9]{0,5}", given):
                raise InputError(f"{name}={given}: a number of threads is expected, 1 or more")
            return int(given)
    return len(usable())


def processor() -> str:
    """The processor's model name: rounding may differ between types."""
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.is_file():
        for line in cpuinfo.read_text(errors="replace").splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
