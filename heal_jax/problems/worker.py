"""Child processes that compute the same in every run.

Python is started afresh rather than with `multiprocessing.Process`: that imports the parent's main module again, and
with it jax, and it inherits a hash seed that differs from run to run, on which several reasoning-gym families depend.
"""

import multiprocessing
import os
import subprocess
import sys
from collections.abc import Mapping
from multiprocessing.connection import Connection

FIXED = {"PYTHONHASHSEED": "0", "OPENBLAS_NUM_THREADS": "1", "OMP_NUM_THREADS": "1"}


def start(
    module: str, function: str, defaults: Mapping[str, str] | None = None
) -> tuple["subprocess.Popen[bytes]", Connection]:
    """Call module.function(connection) in a new process; returns the process and our end of the connection.

    defaults: environment variables, each where ours has none of the name. The child finds its end closed when we are
    gone, so it ends with us when it next reads. What it prints is dropped.
    """
    ours, theirs = multiprocessing.Pipe()
    code = (
        f"import sys; sys.path[:] = {sys.path!r}\n"
        "from multiprocessing.connection import Connection\n"
        f"from {module} import {function}\n"
        f"{function}(Connection({theirs.fileno()}))"
    )
    with theirs:
        process = subprocess.Popen(
            [sys.executable, "-c", code],
            pass_fds=[theirs.fileno()],
            env={**(defaults or {}), **os.environ, **FIXED},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
        )
    return process, ours
