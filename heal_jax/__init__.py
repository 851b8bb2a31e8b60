"""heal_jax: hindsight entropy-assisted learning for reasoning distillation, in JAX.

The interface for programs: `load`, `LanguageModel.logits`, `LanguageModel.generate` and `save` for models; `configure`,
`distill` and `read` for runs, as the notebooks use them. `heal` is the command.
"""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from jax.sharding import Mesh

    from heal_jax.config import Config
    from heal_jax.model.lm import LanguageModel
    from heal_jax.report.data import RunData

__version__ = "0.1.0"
__all__ = ["configure", "distill", "load", "read", "save"]


def load(
    path: str | os.PathLike, dtype: str = "float32", mesh: "Mesh | Mapping[str, int] | None" = None
) -> "LanguageModel":
    """Open a Hugging Face model folder (or builtin:teacher, builtin:student).

    dtype: float32, bfloat16 or float16, of weights and computation. mesh: None (the first device), sizes of the axes
    data, fsdp, tensor and expert such as {"tensor": 8} (one may be -1: what is left), or a mesh with those axes.
    Raises heal_jax.errors.InputError, in one line, for whatever is wrong with the folder.
    """
    from heal_jax.config import ModelSpec
    from heal_jax.divide import model_sizes, require
    from heal_jax.errors import InputError
    from heal_jax.model.config import decoder_config
    from heal_jax.model.lm import open_model, resolve
    from heal_jax.model.mesh import adopt, make_mesh

    if dtype not in ("float32", "bfloat16", "float16"):
        raise InputError(f"dtype: {dtype!r} is not one of float32, bfloat16, float16")
    spec = ModelSpec(str(path), dtype)  # type: ignore[arg-type]
    if isinstance(mesh, Mapping):
        mesh = make_mesh(mesh)
    elif mesh is not None:
        mesh = adopt(mesh)
    if mesh is not None:
        require(mesh.shape, model_sizes(decoder_config(resolve(spec)), "model"))
    return open_model(spec, mesh)


def save(lm: "LanguageModel", path: str | os.PathLike) -> None:
    """Write a model as a Hugging Face folder: safetensors, config.json, and its tokenizer's files byte for byte.

    Written beside it and renamed: the folder is whole, or what it was. Raises InputError where it cannot be written.
    """
    from heal_jax.export import save

    save(lm, Path(path))


def configure(*sources: "str | os.PathLike | Mapping[str, Any]") -> "Config":
    """The config of a run: the defaults, with what each source gives over what the ones before it gave.

    A source is a YAML file, or fields as YAML has them or by path: configure("configs/tiny.yaml", {"sample.n": 8}).
    Raises heal_jax.errors.InputError, in one line, for a field that there is none of and a value that cannot be.
    """
    from heal_jax.config import Config, validate
    from heal_jax.strict import override
    from heal_jax.strict import read as read_yaml

    config = Config()
    for source in sources:
        config = override(config, source) if isinstance(source, Mapping) else read_yaml(Path(source), config)
    validate(config)
    return config


def distill(config: "Config", out: "str | os.PathLike", *stages: str, quiet: bool = False) -> Path:
    """`heal run` (no stages named) or single stages of it, such as distill(config, "runs/mine", "sample", "hindsight").

    Goes on where the directory stopped, and returns its path. Stages: sample, hindsight, repair, curate, train,
    evaluate, export. Raises InputError (nothing is written) and RunError (call it again: it goes on).
    """
    hush()
    from heal_jax import cache
    from heal_jax.cell import cell_console
    from heal_jax.errors import InputError
    from heal_jax.pipeline import NEEDS, STAGES, run_stages
    from heal_jax.progress import Progress
    from heal_jax.run import open_run

    if unknown := [name for name in stages if name not in STAGES]:
        raise InputError(f"{unknown[0]}: no such stage; there are: {', '.join(STAGES)}")
    names = [name for name in STAGES if name in stages or not stages]
    with Progress(cell_console(quiet), quiet) as progress:
        cache.enable(progress.say)
        with open_run(config, Path(out), progress, NEEDS.get(names[0], ()), "heal_jax.distill") as run:
            run_stages(run, names)
    return Path(out)


def read(out: "str | os.PathLike") -> "RunData":
    """What a run directory, finished or not, holds so far. Raises InputError where it is none.

    `problems` by id, `rollouts` and `evaluation` as Arrow tables, `decisions` by rollout_id,
    `training` with one dict a logged step, `summary` and `config`. heal_jax.notebook draws from it.
    """
    from heal_jax import storage
    from heal_jax.report.data import load

    with storage.opened(Path(out), write=False) as folder:
        return load(folder)


def hush() -> None:
    """Keep libraries from saying what a user need not know. To be called before they are imported."""
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")  # jax
    os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")  # that there is no torch is as it should be
