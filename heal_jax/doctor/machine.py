"""This machine as JAX would find it: devices (asked in a process of their own), memory, who holds a TPU."""

import contextlib
import fcntl
import json
import os
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

SECONDS = 120.0  # for JAX to find its devices; a pod's runtime waits for its other hosts without end
TPU_LOCK = Path("/tmp/libtpu_lockfile")
TPU_FILES = ("accel", "vfio")  # of /dev, by generation

_ASK = """
import json, jax
devices = jax.devices()
stats = [d.memory_stats() or {} for d in jax.local_devices()]
print(json.dumps({"platform": devices[0].platform, "kind": devices[0].device_kind, "count": len(devices),
                  "processes": jax.process_count(), "memory": min(s.get("bytes_limit", 0) for s in stats),
                  "used": max(s.get("bytes_in_use", 0) for s in stats)}))
"""


def devices(environment: Mapping[str, str] = os.environ, seconds: float = SECONDS) -> dict[str, Any] | str:
    """platform, kind, count, processes, and bytes of a device's memory (0: not told); else what went wrong, in a line.

    A process of its own asks: a failing or waiting runtime ends nothing here, and a TPU is free again afterwards.
    """
    # A GPU's memory would be taken whole, if only for a moment.
    own = {**environment, "XLA_PYTHON_CLIENT_PREALLOCATE": "false", "TF_CPP_MIN_LOG_LEVEL": "2"}
    try:
        done = subprocess.run([sys.executable, "-c", _ASK], env=own, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"JAX has not found its devices after {seconds:.0f} s"
    try:
        return json.loads(done.stdout.strip().splitlines()[-1])
    except (IndexError, ValueError):
        last = [line for line in done.stderr.splitlines() if line.strip()]
        return (last[-1].strip() if last else f"exit status {done.returncode}")[:300]


def accelerators(dev: Path = Path("/dev")) -> str:
    """tpu or gpu, where the system has files of such devices; otherwise nothing."""
    if any(dev.glob("accel[0-9]*")) or (any(dev.glob("vfio/[0-9]*")) and "TPU_SKIP_MDS_QUERY" not in os.environ):
        return "tpu"
    return "gpu" if any(dev.glob("nvidia[0-9]*")) else ""


def tpu_holders(proc: Path = Path("/proc"), lock: Path = TPU_LOCK) -> list[tuple[int, str]]:
    """Processes that have a TPU's device files or libtpu's lock file open: number and command."""
    found = []
    for process in proc.glob("[0-9]*"):
        if process.name == str(os.getpid()):
            continue
        with contextlib.suppress(OSError):  # another user's, or gone
            names = [os.readlink(number) for number in (process / "fd").iterdir()]
            held = any(n == str(lock) or n.startswith(tuple(f"/dev/{kind}" for kind in TPU_FILES)) for n in names)
            if held:
                command = (process / "cmdline").read_bytes().replace(b"\0", b" ").decode(errors="replace").strip()
                found.append((int(process.name), command[:80]))
    return sorted(found)


def locked(lock: Path = TPU_LOCK) -> str:
    """What is wrong with libtpu's lock file: held, foreign (of another user), or nothing."""
    try:
        with open(lock, "r+b") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except FileNotFoundError:
        return ""
    except PermissionError:
        return "foreign"
    except OSError:
        return "held"
    return ""


def host_memory(proc: Path = Path("/proc"), cgroup: Path = Path("/sys/fs/cgroup")) -> tuple[int, int] | None:
    """Bytes in all and available: the machine's, or the container's where that may use less. None where it is not told
    (macOS)."""
    try:
        fields = dict(line.split(":", 1) for line in (proc / "meminfo").read_text().splitlines())
        total, free = (int(fields[name].split()[0]) << 10 for name in ("MemTotal", "MemAvailable"))
    except (OSError, KeyError, ValueError):
        return None
    with contextlib.suppress(OSError, ValueError):
        limit = int((cgroup / "memory.max").read_text())  # "max" is no number
        free = min(free, limit - int((cgroup / "memory.current").read_text()))
        total = min(total, limit)
    return total, max(0, free)
