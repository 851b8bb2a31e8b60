"""Eight fake CPU devices for every test; `NPROC` keeps their collectives from waiting for each other."""

import os
import subprocess
import sys
from pathlib import Path

from heal_jax.ablate.jobs import MALLOC

os.environ.setdefault("JAX_PLATFORMS", "cpu")  # libtpu, there for heal plan, complains where there is no TPU
os.environ.update(MALLOC | os.environ)  # workers and commands are started with it
# As a user has it, for tests that start the command: one device.
ENVIRONMENT = {k: v for k, v in os.environ.items() if k not in ("XLA_FLAGS", "NPROC")}
# Transformers imports PyTorch wherever it finds it; most users have none, and each command takes three seconds less.
HIDE = "import importlib.util as u; find = u.find_spec; u.find_spec = lambda *a: None if a[0] == 'torch' else find(*a)"
CALL = "from heal_jax.cli import main; main()"
COMMAND = [sys.executable, "-c", f"{HIDE}; {CALL}"]
WITH_TORCH = [sys.executable, "-c", CALL]
TINY = Path(__file__).parents[1] / "configs" / "tiny.yaml"

os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402 (the environment comes first)
from filelock import FileLock  # noqa: E402
from hypothesis import settings  # noqa: E402

settings.register_profile("heal", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("heal")


def common(tmp_path_factory) -> Path:
    """A folder that the suite's workers share."""
    own = tmp_path_factory.getbasetemp()
    return own.parent if "PYTEST_XDIST_WORKER" in os.environ else own


@pytest.fixture(scope="session", autouse=True)
def caches(tmp_path_factory):
    """A cache directory of the suite's own: what one of its many runs compiles the others find, on all its workers."""
    folder = common(tmp_path_factory) / "caches"
    folder.mkdir(mode=0o700, exist_ok=True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("XDG_CACHE_HOME", str(folder))
        patch.setitem(ENVIRONMENT, "XDG_CACHE_HOME", str(folder))
        yield folder


@pytest.fixture(scope="session")
def teacher():
    """The built-in teacher on one device."""
    from heal_jax.config import ModelSpec
    from heal_jax.model.lm import open_model

    return open_model(ModelSpec("builtin:teacher"))


def start(*arguments: object, environment: dict[str, str] = ENVIRONMENT, command=COMMAND) -> subprocess.Popen:
    return subprocess.Popen(
        [*command, *map(str, arguments)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """A finished run of configs/tiny.yaml and what it printed."""
    out = tmp_path_factory.mktemp("run") / "tiny"
    process = start("run", TINY, "--out", out)
    stdout, stderr = process.communicate()
    assert process.returncode == 0, stderr
    return out, stdout, stderr


@pytest.fixture(scope="session")
def on_eight(tmp_path_factory):
    """A run of configs/tiny.yaml by one process with eight devices, rows split over them; all workers read it."""
    from compare import EIGHT, finished

    out = common(tmp_path_factory) / "eight"
    with FileLock(out.with_suffix(".lock")):
        return out if (out / "summary.json").is_file() else finished(out, **EIGHT)


def refused(capsys, *arguments: object, status: int = 2) -> str:
    """The one line that a refused command prints."""
    from heal_jax.cli import run

    capsys.readouterr()
    assert run([str(a) for a in arguments]) == status
    said = capsys.readouterr().err.strip()
    assert said.startswith("heal: ") and "\n" not in said
    return said
