"""Eight fake CPU devices for every test; `NPROC` keeps their collectives from waiting for each other."""

import os

os.environ.setdefault("NPROC", "16")
os.environ["XLA_FLAGS"] = f"{os.environ.get('XLA_FLAGS', '')} --xla_force_host_platform_device_count=8".strip()
os.environ.setdefault("JAX_PLATFORMS", "cpu")
os.environ["HF_HUB_OFFLINE"] = "1"

import pytest  # noqa: E402 (the environment comes first)
from hypothesis import settings  # noqa: E402

settings.register_profile("heal", deadline=None, max_examples=25, derandomize=True)
settings.load_profile("heal")


@pytest.fixture(scope="session")
def teacher():
    """The built-in teacher on one device."""
    from heal_jax.config import ModelSpec
    from heal_jax.model.lm import open_model

    return open_model(ModelSpec("builtin:teacher"))
