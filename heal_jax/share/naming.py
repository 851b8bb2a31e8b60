"""What models and problems are called where others read it: never where they lie on this machine."""

import dataclasses
import re
from collections.abc import Mapping
from pathlib import Path, PurePosixPath
from typing import Any

from heal_jax.config import Config
from heal_jax.errors import InputError

HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
CACHED = re.compile(r"models--([^/]+?)--([^/]+)/snapshots/[0-9a-f]+/?")  # the layout of huggingface_hub's cache
OF_A_MACHINE = re.compile(r"(\w+:)?(/|~|\.\.(/|$))")
FIELDS = ("path", "source")  # of the config: those that name what lies somewhere


def model(path: str) -> str:
    """The name of a model: that on the hub where its folder says so, otherwise the folder's."""
    return on_hub(path) or (path if path.startswith("builtin:") else PurePosixPath(path).name or "model")


def on_hub(path: str) -> str | None:
    """OWNER/NAME of a model that huggingface_hub's cache holds. Other folders do not say whose they are."""
    found = CACHED.search(path)
    name = f"{found[1]}/{found[2]}" if found else ""
    return name if HUB_NAME.fullmatch(name) else None


def require(repository: str, option: str) -> None:
    """Raises InputError where this cannot be the name of a repository on the hub."""
    if not HUB_NAME.fullmatch(repository) or "--" in repository or ".." in repository:
        raise InputError(f"{option}: {repository[:100]!r} is not OWNER/NAME, such as me/my-student")


def data_on_hub(source: str) -> str | None:
    """OWNER/NAME of problems that come from the hub."""
    kind, _, name = source.partition(":")
    return name if kind == "hf" and HUB_NAME.fullmatch(name) and not Path(name).exists() else None


def shared(config: Config) -> Config:
    """The config with the bare names of what it names by a place on this machine."""
    return _shared(config, "")


def _shared(value: Any, field: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        fields = {f.name: _shared(getattr(value, f.name), f.name) for f in dataclasses.fields(value)}
        return dataclasses.replace(value, **fields)
    if isinstance(value, dict):
        inner = "path" if field == "options" else ""  # anything there may be one
        return {name: _shared(item, inner or str(name)) for name, item in value.items()}
    if isinstance(value, str) and field in FIELDS and (found := OF_A_MACHINE.match(value)):
        return (found[1] or "") + model(value)
    return value


def source(text: str) -> str:
    """Where problems come from."""
    return _shared(text, "source")


def origin(config: Config, manifest: Mapping[str, Any]) -> dict[str, str]:
    """What training examples were made from."""
    teacher = manifest["models"]["teacher"]["sha256"]
    return {"problems": source(config.problems.source), "teacher": f"{model(config.teacher.path)}, sha256 {teacher}"}
