"""The one table between Hugging Face tensors and decoder parameters, read both ways.

A row names the tensor, the parameter, whether the matrix is transposed (torch keeps [out, in]), and the logical axes
of the parameter, from which its sharding follows (`heal_jax.model.mesh`).
"""

import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax.sharding import Mesh
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file

from heal_jax.errors import InputError
from heal_jax.model.config import DecoderConfig, decoder_config
from heal_jax.model.decoder import Model, abstract
from heal_jax.model.mesh import sharding
from heal_jax.processes import fetch, primary

Path_ = tuple[str | int, ...]


@dataclasses.dataclass(frozen=True)
class Row:
    """tensor: name in the file; path: parameter in the decoder; axes: logical axes of the parameter."""

    tensor: str
    path: Path_
    axes: tuple[str | None, ...]
    transposed: bool = False


def table(config: DecoderConfig) -> list[Row]:
    """Every parameter of the decoder, once."""
    rows = [
        Row("model.embed_tokens.weight", ("embed",), ("vocab", "hidden")),
        Row("model.norm.weight", ("norm", "weight"), (None,)),
    ]
    if not config.tie_embeddings:
        rows.append(Row("lm_head.weight", ("head", "kernel"), ("hidden", "vocab"), True))
    linears = {
        "self_attn.q_proj": ("q", ("hidden", "heads")),
        "self_attn.k_proj": ("k", ("hidden", "kv_heads")),
        "self_attn.v_proj": ("v", ("hidden", "kv_heads")),
        "self_attn.o_proj": ("o", ("heads", "hidden")),
        "mlp.gate_proj": ("gate", ("hidden", "mlp")),
        "mlp.up_proj": ("up", ("hidden", "mlp")),
        "mlp.down_proj": ("down", ("mlp", "hidden")),
    }
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    for i in range(config.num_layers):
        prefix = f"model.layers.{i}"
        for name, (module, axes) in linears.items():
            rows.append(Row(f"{prefix}.{name}.weight", ("blocks", i, module, "kernel"), axes, True))
        for name, module in norms.items():
            rows.append(Row(f"{prefix}.{name}.weight", ("blocks", i, module, "weight"), (None,)))
    return rows


def _files(folder: Path) -> dict[str, Path]:
    """Tensor name -> file, from the index of a sharded model or from the single file."""
    index = folder / "model.safetensors.index.json"
    if not index.is_file():
        single = folder / "model.safetensors"
        if not single.is_file():
            raise InputError(f"{folder}: no model.safetensors; only safetensors weights are read (never pickles)")
        with _open(single) as file:
            return {name: single for name in file.keys()}  # noqa: SIM118 (not a dict)
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        items = [(str(tensor), str(name)) for tensor, name in weight_map.items()]
    except (ValueError, KeyError, AttributeError, TypeError):
        raise InputError(f"{index}: not a safetensors index; restore the file from its source") from None
    files = {}
    for tensor, name in items:
        path = folder / name
        if Path(name).name != name or not path.is_file():
            raise InputError(f"{index}: {name!r} is not a file in this folder")
        files[tensor] = path
    return files


def _open(path: Path) -> safe_open:
    try:
        return safe_open(path, framework="numpy")
    except (SafetensorError, OSError) as error:
        raise InputError(f"{path}: damaged or truncated safetensors file ({error}); fetch it again") from None


def _arrays(files: dict[str, Path], names: list[str]) -> Iterator[tuple[str, np.ndarray]]:
    """The named tensors one at a time."""
    by_file: dict[Path, list[str]] = {}
    for name in names:
        by_file.setdefault(files[name], []).append(name)
    for path, members in by_file.items():
        with _open(path) as file:
            for name in members:
                yield name, file.get_tensor(name)


def load(folder: str | Path, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None) -> Model:
    """Read a Hugging Face model folder (Llama or Qwen3, safetensors).

    Tensors go one at a time to the devices, cast to `dtype`, sharded over `mesh` where one is given.
    Raises InputError that lists every missing, unexpected and mis-shaped tensor at once.
    """
    config = decoder_config(Path(folder))
    graph, shapes = abstract(config, dtype)
    loaded: dict[Any, Any] = {}
    for row, value in _tensors(Path(folder), config):
        host = np.ascontiguousarray(value.astype(jnp.dtype(dtype)))
        where = sharding(mesh, row.axes, host.shape)
        loaded[row.path] = jax.make_array_from_callback(host.shape, where, host.__getitem__)
    leaves = {path: v.replace(loaded[path]) for path, v in nnx.to_flat_state(shapes)}
    return Model(graph, nnx.from_flat_state(leaves), config)


def check(folder: Path) -> None:
    """Raise InputError for whatever `load` would refuse; nothing is kept."""
    for _ in _tensors(folder, decoder_config(folder)):
        pass


def _tensors(folder: Path, config: DecoderConfig) -> Iterator[tuple[Row, np.ndarray]]:
    """Each row of the table with its parameter, as the decoder has it, one at a time.

    Raises InputError at the end, with all that is wrong.
    """
    _, shapes = abstract(config, jnp.float32)
    flat: dict[Any, Any] = dict(nnx.to_flat_state(shapes))
    rows = {row.tensor: row for row in table(config)}
    files = _files(folder)
    present = set(files)
    if config.tie_embeddings:
        present.discard("lm_head.weight")  # some files ship the tied copy
    problems = [f"missing {name}" for name in sorted(set(rows) - present)]
    problems += [f"unexpected {name}" for name in sorted(present - set(rows))]
    for name, array in _arrays(files, sorted(present & set(rows))):
        row = rows[name]
        value = array.T if row.transposed else array
        if value.shape != flat[row.path].shape:
            wanted = flat[row.path].shape[::-1] if row.transposed else flat[row.path].shape
            problems.append(f"{name} has shape {list(array.shape)}, not {list(wanted)}")
        elif not np.isfinite(value.astype(np.float32)).all():
            problems.append(f"{name} has values that are not finite")
        else:
            yield row, value
    if problems:
        raise InputError(f"{folder}: weights do not fit config.json: {'; '.join(problems)}")


def save_weights(model: Model, path: Path) -> None:
    """Write the parameters as one safetensors file under Hugging Face names."""
    flat = dict(nnx.to_flat_state(model.params))
    tensors = {}
    for row in table(model.config):
        value = np.asarray(fetch(flat[row.path][...]))
        tensors[row.tensor] = np.ascontiguousarray(value.T if row.transposed else value)
    if primary():
        save_file(tensors, path, metadata={"format": "pt"})


def shardings(model: Model, mesh: Mesh) -> nnx.State:
    """A pytree like `model.params` with the sharding of each parameter."""
    axes: dict[Any, tuple[str | None, ...]] = {row.path: row.axes for row in table(model.config)}
    flat = nnx.to_flat_state(model.params)
    return nnx.from_flat_state([(path, v.replace(sharding(mesh, axes[path], v.shape))) for path, v in flat])
