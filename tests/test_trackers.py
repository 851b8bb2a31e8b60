"""Training metrics to TensorBoard, and to tools with the interface of wandb and trackio."""

import importlib.machinery
import struct
import sys
import types
from pathlib import Path
from unittest import mock

import pytest
from tensorboardX.proto.event_pb2 import Event

from heal_jax import trackers
from heal_jax.config import LogSpec
from heal_jax.errors import InputError, RunError


def events(folder: Path) -> list[Event]:
    """What TensorBoard reads: records of length, its checksum, data, its checksum."""
    (file,) = folder.iterdir()
    data, found = file.read_bytes(), []
    while data:
        (length,) = struct.unpack("<Q", data[:8])
        found.append(Event.FromString(data[12 : 12 + length]))
        data = data[16 + length :]
    return found


def test_tensorboard(tmp_path):
    with trackers.tracking(LogSpec(to=("tensorboard",)), tmp_path, "heal", {}) as track:
        assert not list(tmp_path.iterdir())  # a run begins with its first figures
        track(10, {"loss": 0.5})
        track(20, {"loss": 0.25, "grad_norm": 2.0})
    found = [
        (e.step, v.tag, v.simple_value) for e in events(tmp_path / "tensorboard" / "heal") for v in e.summary.value
    ]
    assert found == [(10, "loss", 0.5), (20, "loss", 0.25), (20, "grad_norm", 2.0)]


@pytest.mark.parametrize("name", ["wandb", "trackio"])
def test_services(tmp_path, monkeypatch, name):
    said = []
    run = types.SimpleNamespace(
        log=lambda figures, step: said.append(("log", step, figures)), finish=lambda: said.append(("finish",))
    )
    package = types.ModuleType(name)
    package.__spec__ = importlib.machinery.ModuleSpec(name, None)
    package.init = lambda **settings: said.append(("init", settings)) or run
    monkeypatch.setitem(sys.modules, name, package)
    spec = LogSpec(to=(name,), project="p")
    trackers.require(spec)
    with trackers.tracking(spec, tmp_path, "heal", {"seed": 3}) as track:
        track(10, {"loss": 0.5})
    (begun, settings), *rest = said
    assert begun == "init" and rest == [("log", 10, {"loss": 0.5}), ("finish",)]
    assert (
        settings["project"] == "p" and settings["name"] == f"{tmp_path.name}-heal" and settings["config"] == {"seed": 3}
    )


def test_a_service_that_cannot_begin_is_said_in_a_line(tmp_path, monkeypatch):
    package = types.ModuleType("wandb")
    package.init = mock.Mock(side_effect=ValueError("no API key\nconfigured"))
    monkeypatch.setitem(sys.modules, "wandb", package)
    with (
        pytest.raises(RunError, match=r"log\.to: wandb cannot begin \(no API key configured\)"),
        trackers.tracking(LogSpec(to=("wandb",)), tmp_path, "heal", {}) as track,
    ):
        track(10, {"loss": 0.5})


def test_a_package_that_is_not_there_is_said_first(monkeypatch):
    monkeypatch.setattr(trackers, "PACKAGES", {"trackio": "no_such_package"})
    with pytest.raises(InputError, match=r"log\.to: trackio needs .*: pip install no_such_package"):
        trackers.require(LogSpec(to=("trackio",)))
