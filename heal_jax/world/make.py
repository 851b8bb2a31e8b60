"""Makes the built-in models from nothing: `heal make-world`.

Deterministic for fixed versions, processor type and `NPROC`.
"""

import dataclasses
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax

from heal_jax.errors import InputError
from heal_jax.model.config import both_spellings, parse
from heal_jax.model.decoder import Model, initialise
from heal_jax.model.weights import save_weights
from heal_jax.train.data import Batch
from heal_jax.train.step import train_step
from heal_jax.world import problems, tokenizer, traces
from heal_jax.world.base import Skill, World
from heal_jax.world.traces import Aid
from heal_jax.world.worlds import WORLDS


@dataclasses.dataclass(frozen=True)
class Recipe:
    """How one model is made. `plain`: the share of problems without the hard weakness (easy and medium); `short`: the
    share of the steps, the first ones, that are on short questions.
    """

    world: World
    config: dict[str, Any]  # config.json
    skill: Skill
    steps: int
    aid: Aid
    seed: int
    batch: int = 16
    learning_rate: float = 3e-3
    std: float = 0.1  # of the initial weights, near fan-in ** -0.5: 0.02 is for wide models and learns late here
    plain: float = 0.35
    short: float = 0.0


TEACHER = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 128,
    "intermediate_size": 384,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}
STUDENT = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 96,
    "intermediate_size": 256,
    "num_hidden_layers": 3,
    "num_attention_heads": 3,
    "num_key_value_heads": 3,
}
# Of each world: what its teacher and its student do right unaided, and how many steps they are trained.
MADE = {
    "sums": ((Skill(hard=0.15, medium=0.85), 3000), (Skill(hard=0.05, medium=0.5), 2400)),
    "rewriting": ((Skill(hard=0.15, medium=0.85), 2000), (Skill(hard=0.05, medium=0.5), 1600)),
    "legs": ((Skill(hard=0.1, medium=0.85), 1500), (Skill(hard=0.05, medium=0.5), 1300)),
}


def recipes(name: str = "sums") -> dict[str, Recipe]:
    """A world's teacher (0.8 M parameters and its vocabulary, Qwen3) and student (0.3 M, Llama)."""
    world = WORLDS[name]
    shared = {
        "vocab_size": world.tokenizer().get_vocab_size(),
        "head_dim": 32,
        "hidden_act": "silu",
        "max_position_embeddings": 512,
        "rms_norm_eps": 1e-6,
        "rope_theta": 10000.0,
        "tie_word_embeddings": True,
        "attention_bias": False,
        "bos_token_id": None,
    }
    teacher, student = MADE[name]
    short = 0.35 if world.short_tokens else 0.0
    return {
        "teacher": Recipe(world, TEACHER | shared, *teacher, Aid(hints=0.45), seed=1, short=short),
        "student": Recipe(world, STUDENT | shared, *student, Aid(hints=0.0), seed=2, short=short),
    }


def varied(name: str, only: str = "both", steps: int = 0, large: bool = False) -> dict[str, Recipe]:
    """A world's recipes, or one of them (`only`); trained for `steps` where there are any; `large`: the student has the
    teacher's shape.
    """
    found = recipes(name)
    if large:
        found["student"] = dataclasses.replace(found["student"], config=found["teacher"].config)
    return {
        role: dataclasses.replace(recipe, steps=steps or recipe.steps)
        for role, recipe in found.items()
        if only in ("both", role)
    }


def question(world: World, rng: np.random.Generator, plain: bool, short: bool = False) -> str:
    """A question of the pretraining split."""
    while problems.split_of(drawn := world.draw(rng, plain, short)) != "pretrain":
        pass
    return drawn


def batches(recipe: Recipe) -> Iterator[tuple[np.ndarray, np.ndarray]]:
    """Endless tokens [batch, length] int32 and loss mask of the same shape, bool: what is learned. length: the world's
    `tokens`, or of short questions `short_tokens`.
    """
    rng, world, encoder = np.random.default_rng(recipe.seed), recipe.world, recipe.world.tokenizer()
    pad = encoder.token_to_id(tokenizer.PAD)
    for step in itertools.count():
        short = step < recipe.short * recipe.steps
        width = world.short_tokens if short else world.tokens
        heads, tails = [], []
        for _ in range(recipe.batch):
            asked = question(world, rng, rng.random() < recipe.plain, short)
            template, prefix, target = traces.example(world, asked, recipe.skill, recipe.aid, rng)
            user = template.format(question=asked, answer=world.answer(asked))
            heads.append(f"{tokenizer.USER}{user}{tokenizer.ASSISTANT}{prefix}")
            tails.append(target + tokenizer.END)
        tokens = np.full((recipe.batch, width), pad, np.int32)
        mask = np.zeros((recipe.batch, width), bool)
        for row, (head, tail) in enumerate(zip(encoder.encode_batch(heads), encoder.encode_batch(tails))):
            ids = (head.ids + tail.ids)[:width]
            tokens[row, : len(ids)] = ids
            mask[row, len(head.ids) : len(ids)] = True
        yield tokens, mask


def pretrain(recipe: Recipe, report: Callable[[int, float], None]) -> Model:
    """Train from random weights; `report(step, loss)` every 50 steps."""
    model = initialise(parse(recipe.config), recipe.seed, std=recipe.std)
    warmup = min(200, recipe.steps // 2)
    schedule = optax.warmup_cosine_decay_schedule(0.0, recipe.learning_rate, warmup, recipe.steps, 1e-5)
    optimizer = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(schedule, b2=0.98, weight_decay=0.01))
    params, state = model.params, optimizer.init(model.params)
    stream = batches(recipe)
    for step in range(1, recipe.steps + 1):
        tokens, mask = next(stream)
        batch = Batch(jnp.asarray(tokens), None, None, jnp.asarray(mask))
        params, state, metrics = train_step(model.graph, optimizer, params, state, batch)
        if step % 50 == 0:
            report(step, float(metrics["loss"]))
    return dataclasses.replace(model, params=params)


def save(model: Model, recipe: Recipe, folder: Path) -> None:
    """Write a Hugging Face folder: config.json, model.safetensors, tokenizer files, generation_config.json."""
    folder.mkdir(parents=True, exist_ok=True)
    encoder = recipe.world.tokenizer()
    vocabulary = encoder.get_vocab()
    eos, pad = vocabulary[tokenizer.END], vocabulary[tokenizer.PAD]
    config = both_spellings(recipe.config, "float32") | {"eos_token_id": eos, "pad_token_id": pad}
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    settings = {"eos_token_id": eos, "pad_token_id": pad}
    (folder / "generation_config.json").write_text(json.dumps(settings, indent=2) + "\n", encoding="utf-8")
    save_weights(model, folder)
    tokenizer.save(encoder, folder)


def make(out: Path, models: Mapping[str, Recipe]) -> None:
    """Make models under `out`, each in a folder of its name. Raises InputError, before training, where that cannot be
    written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); give another --out") from None
    for name, recipe in models.items():
        start = time.perf_counter()

        def report(step: int, loss: float, name: str = name, start: float = start) -> None:
            print(f"{name}: step {step}, loss {loss:.4f}, {time.perf_counter() - start:.0f} s", flush=True)

        save(pretrain(recipe, report), recipe, out / name)
