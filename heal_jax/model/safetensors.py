"""Tensors of a model folder, read in slices and written in shards (safetensors; never pickles)."""

import errno
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from heal_jax.errors import InputError
from heal_jax.processes import primary

INDEX = "model.safetensors.index.json"
SHARD_BYTES = 2 << 30  # of a written file: also what a writer holds at once
MAPPED_BYTES = 16 << 20  # read of a file before it is mapped anew, which gives its pages back
DTYPES = ("F32", "F16", "BF16")


class Tensors:
    """The tensors of a folder by name. Raises InputError where files are missing, damaged or outside the folder."""

    def __init__(self, folder: Path):
        self._files = _files(folder)
        self._open: tuple[Path, safe_open] | None = None
        self._mapped = 0

    def names(self) -> set[str]:
        return set(self._files)

    def described(self, name: str) -> tuple[tuple[int, ...], str]:
        """Shape and dtype of a tensor, as in the file."""
        part = self._slice(name)
        return tuple(part.get_shape()), str(part.get_dtype())

    def read(self, name: str, index: tuple[slice, ...]) -> np.ndarray:
        """A part of a tensor, in the file's dtype."""
        value = self._slice(name)[index]
        self._mapped += value.nbytes
        if self._mapped > MAPPED_BYTES:
            self._open, self._mapped = None, 0
        return value

    def _slice(self, name: str):
        path = self._files[name]
        if self._open is None or self._open[0] != path:
            self._open, self._mapped = (path, _open(path)), 0
        try:
            return self._open[1].get_slice(name)
        except SafetensorError as error:
            raise InputError(f"{path}: {name} is not in it ({error}); fetch the model again") from None


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded model or from the single file."""
    index = folder / INDEX
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise InputError(f"{folder}: no model.safetensors; only safetensors weights are read (never pickles)")
        return {name: single for name in _open(single).keys()}  # noqa: SIM118 (not a dict)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(tensor), str(name)) for tensor, name in weight_map.items()]
    except (ValueError, KeyError, AttributeError, TypeError, RecursionError):
        raise InputError(f"{index}: not a safetensors index; restore the file from its source") from None
    there = {path.name for path in folder.iterdir() if path.is_file()}
    for name in dict.fromkeys(name for _, name in items):
        if name not in there:
            raise InputError(f"{index}: {name[:200]!r} is not a file in this folder")
    return {tensor: folder / name for tensor, name in items}


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated safetensors file ({error}); fetch it again") from None


def write(
    folder: Path, tensors: Iterator[tuple[str, int, object]], limit: float = SHARD_BYTES, name: str = "model"
) -> None:
    """Write tensors as `name`.safetensors, or where they exceed `limit` bytes as shards with an index.

    tensors: name, size in bytes, and a function that gives the array; called one shard at a time, by every process;
    the first one writes. Raises OSError where it cannot.
    """
    shards: list[list[tuple[str, int, object]]] = [[]]
    room = limit
    for item in tensors:
        if item[1] > room and shards[-1]:
            shards.append([])
            room = limit
        shards[-1].append(item)
        room -= item[1]
    names = [f"{name}.safetensors"]
    if len(shards) > 1:
        names = [f"{name}-{i + 1:05d}-of-{len(shards):05d}.safetensors" for i in range(len(shards))]
    for file, shard in zip(names, shards):
        arrays = {tensor: np.ascontiguousarray(get()) for tensor, _, get in shard}  # type: ignore[operator]
        if primary():
            try:
                save_file(arrays, folder / file, metadata={"format": "pt"})
            except SafetensorError as error:  # such as a full disk
                raise OSError(errno.EIO, str(error)) from None
    if len(shards) > 1 and primary():
        weight_map = {tensor: file for file, shard in zip(names, shards) for tensor, _, _ in shard}
        total = sum(size for shard in shards for _, size, _ in shard)
        index = {"metadata": {"total_size": total}, "weight_map": dict(sorted(weight_map.items()))}
        (folder / f"{name}.safetensors.index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
