"""The one table between Hugging Face tensors and decoder parameters, read both ways.

A row names the tensor, the parameter, whether the matrix is transposed (torch keeps [out, in]), and the logical axes
of the parameter, from which its sharding follows (`heal_jax.model.mesh`).
"""

import dataclasses
import functools
import math
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx
from jax import Array
from jax.sharding import Mesh, Sharding

from heal_jax.errors import InputError
from heal_jax.model import safetensors
from heal_jax.model.config import DecoderConfig, decoder_config
from heal_jax.model.decoder import Model, abstract
from heal_jax.model.mesh import sharding
from heal_jax.processes import fetch

Path_ = tuple[Any, ...]
Index = tuple[slice, ...]
PIECE_BYTES = 8 << 20  # of a tensor read at once


@dataclasses.dataclass(frozen=True)
class Row:
    """tensor: name in the file; path: parameter in the decoder; axes: logical axes of the parameter; expert: which
    entry of the parameter's first axis the tensor is, None for the whole parameter.
    """

    tensor: str
    path: Path_
    axes: tuple[str | None, ...]
    transposed: bool = False
    expert: int | None = None

    def to_file(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The tensor's shape in the file, of a parameter of this shape."""
        own = shape if self.expert is None else shape[1:]
        return own[::-1] if self.transposed else own


def table(config: DecoderConfig) -> list[Row]:
    """Every parameter of the decoder, once; of experts, every entry once."""
    rows = [
        Row("model.embed_tokens.weight", ("embed",), ("vocab", "hidden")),
        Row("model.norm.weight", ("norm", "weight"), (None,)),
    ]
    if not config.tie_embeddings:
        rows.append(Row("lm_head.weight", ("head", "kernel"), ("hidden", "vocab"), True))
    for i in range(config.num_layers):
        rows += _block_rows(config, i)
    return rows


def _block_rows(config: DecoderConfig, layer: int) -> Iterator[Row]:
    prefix, block = f"model.layers.{layer}", ("blocks", layer)
    linears: list[tuple[str, tuple[str, ...], tuple[str, str], bool]] = [
        ("self_attn.q_proj", ("q",), ("hidden", "heads"), config.qkv_bias),
        ("self_attn.k_proj", ("k",), ("hidden", "kv_heads"), config.qkv_bias),
        ("self_attn.v_proj", ("v",), ("hidden", "kv_heads"), config.qkv_bias),
        ("self_attn.o_proj", ("o",), ("heads", "hidden"), config.o_bias),
    ]
    mlp = {"gate": ("hidden", "mlp"), "up": ("hidden", "mlp"), "down": ("mlp", "hidden")}
    if config.has_experts(layer):
        yield Row(f"{prefix}.mlp.gate.weight", (*block, "experts", "router"), ("hidden", None), True)
        for name, axes in mlp.items():
            for i in range(config.experts):
                tensor = f"{prefix}.mlp.experts.{i}.{name}_proj.weight"
                yield Row(tensor, (*block, "experts", name), ("expert", *axes), True, i)
    else:
        linears += [(f"mlp.{name}_proj", ("mlp", name), axes, config.mlp_bias) for name, axes in mlp.items()]
    for name, path, axes, bias in linears:
        yield Row(f"{prefix}.{name}.weight", (*block, *path, "kernel"), axes, True)
        if bias:
            yield Row(f"{prefix}.{name}.bias", (*block, *path, "bias"), axes[1:])
    norms = {"input_layernorm": "attn_norm", "post_attention_layernorm": "mlp_norm"}
    if config.gemma:
        norms |= {"post_attention_layernorm": "post_attn_norm", "pre_feedforward_layernorm": "mlp_norm"}
        norms |= {"post_feedforward_layernorm": "post_mlp_norm"}
    if config.qk_norm:
        norms |= {"self_attn.q_norm": "q_norm", "self_attn.k_norm": "k_norm"}
    for name, module in norms.items():
        yield Row(f"{prefix}.{name}.weight", (*block, module, "weight"), (None,))


def adapter_rows(config: DecoderConfig, targets: Sequence[str]) -> list[Row]:
    """The two adapters of every kernel of a block that `targets` name (such as q_proj), in PEFT's names.

    Raises InputError for the experts of a mixture.
    """
    rows = []
    for row in table(config):
        if (name := row.tensor.split(".")[-2]) in targets:
            if row.expert is not None:
                raise InputError(
                    f"train.lora.targets: {name} is in the experts of this mixture, which take no adapters; "
                    "choose of q_proj, k_proj, v_proj, o_proj"
                )
            rows += _adapters(row) if row.path[-1] == "kernel" else []
    return rows


def _adapters(kernel: Row) -> list[Row]:
    """Of a kernel [in, out]: lora_a [in, r] and lora_b [r, out], each split as the kernel is."""
    module, of = kernel.tensor.removesuffix(".weight"), kernel.path[:-1]
    size_in, size_out = kernel.axes
    return [
        Row(f"base_model.model.{module}.lora_A.weight", (*of, "lora_a"), (size_in, None), True),
        Row(f"base_model.model.{module}.lora_B.weight", (*of, "lora_b"), (None, size_out), True),
    ]


def load(folder: str | Path, dtype: jnp.dtype = jnp.float32, mesh: Mesh | None = None) -> Model:
    """Read a Hugging Face model folder (`heal_jax.model.config.FAMILIES`; safetensors, one file or sharded).

    Every device gets its part of each tensor straight from the file, cast to `dtype`: the host holds no more
    than one tensor's part besides. Raises InputError that lists every missing, unexpected and mis-shaped tensor at
    once, or every one with values that are not finite.
    """
    config = decoder_config(Path(folder))
    graph, abstract_params = abstract(config, dtype)
    source = Source(Path(folder), config, jnp.dtype(dtype))
    leaves = [
        (path, v.replace(source.place(path, sharding(mesh, source.rows[path][0].axes, v.shape))))
        for path, v in nnx.to_flat_state(abstract_params)
    ]
    source.complain()
    return Model(graph, nnx.from_flat_state(leaves), config)


def check(folder: Path) -> None:
    """Raise InputError for whatever `load` would refuse; nothing is kept."""
    source = Source(folder, decoder_config(folder), jnp.dtype(jnp.float32))
    for path, shape in source.shapes.items():
        for row in source.rows[path]:
            source.read(row, tuple(slice(0, size) for size in shape[len(shape) - len(row.to_file(shape)) :]))
    source.complain()


class Source:
    """The parameters of a decoder in a model folder. Raises InputError where its tensors are not those of the table."""

    def __init__(self, folder: Path, config: DecoderConfig, dtype: np.dtype):
        self.folder, self.dtype = folder, dtype
        self.tensors = safetensors.Tensors(folder)
        self._check_count(config)
        _, params = abstract(config, jnp.float32)
        self.shapes: dict[Path_, tuple[int, ...]] = {path: v.shape for path, v in nnx.to_flat_state(params)}
        self.rows: dict[Path_, list[Row]] = {}
        for row in table(config):
            self.rows.setdefault(row.path, []).append(row)
        self.not_finite: dict[str, None] = {}
        self._check_names(config)

    def _check_count(self, config: DecoderConfig) -> None:
        """Every layer, and every expert of one, has several tensors: a model of more of them is not even set up."""
        parts = (config.num_layers - len(config.dense_layers)) * config.experts + config.num_layers
        if parts > (count := len(self.tensors.names())):
            experts = f" and {config.experts} experts" if config.experts else ""
            raise InputError(
                f"{self.folder}: weights do not fit config.json: {count} tensors are too few for {config.num_layers} "
                f"layers{experts}"
            )

    def _check_names(self, config: DecoderConfig) -> None:
        wanted = {row.tensor: row for rows in self.rows.values() for row in rows}
        present = self.tensors.names()
        if config.tie_embeddings and "lm_head.weight" in present:  # some files ship the tied copy
            present.discard("lm_head.weight")
            if "model.embed_tokens.weight" in present and not self._same("lm_head.weight", "model.embed_tokens.weight"):
                raise InputError(
                    f"{self.folder}: lm_head.weight differs from model.embed_tokens.weight, and config.json says that "
                    "they are one (tie_word_embeddings); set it to false or remove one"
                )
        problems = [f"missing {name}" for name in sorted(set(wanted) - present)]
        problems += [f"unexpected {name}" for name in sorted(present - set(wanted))]
        for name in sorted(present & set(wanted)):
            shape, dtype = self.tensors.described(name)
            expected = wanted[name].to_file(self.shapes[wanted[name].path])
            if shape != expected:
                problems.append(f"{name} has shape {list(shape)}, not {list(expected)}")
            if dtype not in safetensors.DTYPES:
                problems.append(f"{name} has dtype {dtype}, not one of {', '.join(safetensors.DTYPES)}")
        if problems:
            raise InputError(f"{self.folder}: weights do not fit config.json: {'; '.join(problems)}")

    def _same(self, first: str, second: str) -> bool:
        shape = self.tensors.described(first)[0]
        if len(shape) != 2 or shape != self.tensors.described(second)[0]:
            return False
        rows = shape[0]
        parts = (slice(start, min(start + 4096, rows)) for start in range(0, rows, 4096))
        return all(np.array_equal(self.tensors.read(first, (p,)), self.tensors.read(second, (p,))) for p in parts)

    def read(self, row: Row, index: Index) -> np.ndarray:
        """A part of one tensor, as the decoder has it (index and result in the parameter's order), in `dtype`.

        In pieces, so that a second copy in the file's dtype and order is never held.
        """
        out = _aligned([part.stop - part.start for part in index], self.dtype)
        first, *rest = index[::-1] if row.transposed else index
        in_file = out.T if row.transposed else out
        step = max(1, PIECE_BYTES * len(in_file) // max(out.nbytes, 1))
        for start in range(0, len(in_file), step):
            stop = min(start + step, len(in_file))
            piece = self.tensors.read(row.tensor, (slice(first.start + start, first.start + stop), *rest))
            with np.errstate(over="ignore"):
                in_file[start:stop] = piece
            if not np.isfinite(in_file[start:stop]).all():  # after the cast: float16 ends at 65,504
                self.not_finite[row.tensor] = None
        return out

    def complain(self) -> None:
        """Raise InputError where what was read held values that are not finite."""
        if self.not_finite:
            names = "; ".join(sorted(self.not_finite))
            raise InputError(
                f"{self.folder}: values that are not finite in {names} as {self.dtype}; fetch the model again"
            )

    def place(self, path: Path_, where: Sharding) -> Array:
        """A parameter on its devices; only what this process holds is read."""
        shape, rows = self.shapes[path], self.rows[path]
        parts: dict[tuple[tuple[int, int], ...], list[jax.Device]] = {}
        for device, index in where.addressable_devices_indices_map(shape).items():
            bounds = tuple(part.indices(size)[:2] for part, size in zip(index or (), shape))
            parts.setdefault(bounds, []).append(device)
        arrays = []
        for bounds, devices in parts.items():
            index = tuple(slice(*bound) for bound in bounds)
            if rows[0].expert is None:
                host = self.read(rows[0], index)
                arrays += [jax.device_put(host, device) for device in devices]
            else:
                arrays += self._stack(rows[index[0]], index[1:], devices)
            jax.block_until_ready(arrays)  # before the next is read
        return jax.make_array_from_single_device_arrays(shape, where, arrays)

    def _stack(self, rows: list[Row], index: Index, devices: list[jax.Device]) -> list[Array]:
        """The experts' matrices as one array a device, put in one by one."""
        shape = (len(rows), *(part.stop - part.start for part in index))
        stacks = [jnp.zeros(shape, self.dtype, device=device) for device in devices]
        for i, row in enumerate(rows):
            host = self.read(row, index)
            stacks = [_put(stack, jax.device_put(host, device), i) for stack, device in zip(stacks, devices)]
            jax.block_until_ready(stacks)
        return stacks


def _aligned(shape: list[int], dtype: np.dtype) -> np.ndarray:
    """An empty array whose memory a CPU device can take over as it is: XLA wants 64 bytes of alignment."""
    size = math.prod(shape) * dtype.itemsize
    memory = np.empty(size + 64, np.uint8)
    start = -memory.ctypes.data % 64
    return memory[start : start + size].view(dtype).reshape(shape)


@functools.partial(jax.jit, donate_argnums=0)
def _put(stack: Array, value: Array, at: int) -> Array:
    """stack [X, ...] with entry `at` set to value [...], in place."""
    return jax.lax.dynamic_update_index_in_dim(stack, value, at, 0)


def save_weights(model: Model, folder: Path, limit: int = safetensors.SHARD_BYTES) -> None:
    """Write the parameters under Hugging Face names, in files of at most `limit` bytes; the first process writes."""
    _save(model, table(model.config), folder, limit, "model")


def save_adapter_weights(model: Model, targets: Sequence[str], folder: Path) -> None:
    """Write the adapters under PEFT's names, in one file (it reads no shards); the first process writes."""
    _save(model, adapter_rows(model.config, targets), folder, math.inf, "adapter_model")


def _save(model: Model, rows: Sequence[Row], folder: Path, limit: float, name: str) -> None:
    flat: dict[Any, Any] = dict(nnx.to_flat_state(model.params))

    def host(row: Row) -> np.ndarray:
        array = flat[row.path][...]
        value = np.asarray(fetch(array if row.expert is None else array[row.expert]))
        return value.T if row.transposed else value

    def sized(row: Row) -> int:
        array = flat[row.path][...]
        return array.nbytes // (1 if row.expert is None else array.shape[0])

    tensors = ((row.tensor, sized(row), functools.partial(host, row)) for row in rows)
    safetensors.write(folder, tensors, limit, name)


def shardings(model: Model, mesh: Mesh) -> nnx.State:
    """A pytree like `model.params` with the sharding of each parameter, adapters included."""
    rows = table(model.config)
    adapters = [adapter for row in rows if row.path[-1] == "kernel" for adapter in _adapters(row)]
    axes: dict[Any, tuple[str | None, ...]] = {row.path: row.axes for row in (*rows, *adapters)}
    flat = nnx.to_flat_state(model.params)
    return nnx.from_flat_state([(path, v.replace(sharding(mesh, axes[path], v.shape))) for path, v in flat])
