"""Model folders: one is loaded, or it is named; nothing in it is run, nothing outside it is read."""

import json
import os
import shutil
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax import nnx
from hypothesis import strategies as st
from safetensors.numpy import save_file

from heal_jax.bench.fuzz.mutate import KEYS, NUMBERS, VALUES, WORDS, as_json, broken, edited, json_files
from heal_jax.bench.fuzz.watch import Failure, Kind
from heal_jax.config import ModelSpec
from heal_jax.model.config import decoder_config, parse
from heal_jax.model.decoder import abstract
from heal_jax.model.lm import open_tokenizer, resolve
from heal_jax.model.safetensors import INDEX
from heal_jax.model.weights import check, load, table
from heal_jax.store import folder_sha256
from heal_jax.world import model_folder

WEIGHTS = "model.safetensors"
TEMPLATE = "chat_template.jinja"
SMALL = {"hidden_size": 16, "intermediate_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "head_dim": 8}
EXPERTS = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 4, "norm_topk_prob": True}
FAMILIES = {"llama": {"num_key_value_heads": 2}, "qwen3_moe": {"num_key_value_heads": 1, **EXPERTS}}
ROPES = ({"rope_type": "yarn", "factor": 4.0}, {"type": "linear", "factor": 0}, {"rope_type": "llama3", "factor": 8.0})
FIELDS = (
    "num_hidden_layers", "vocab_size", "hidden_size", "head_dim", "num_experts", "layer_types", "sliding_window",
    "max_position_embeddings", "rope_theta", "mlp_only_layers", "decoder_sparse_step", "rms_norm_eps", "model_type",
    "quantization_config", "eos_token_id", "attention_bias", "dtype", "num_key_value_heads",
)  # fmt: skip
BIG = "{% set n = namespace(x='abcdefgh') %}{% for i in range(40) %}{% set n.x = n.x ~ n.x %}{% endfor %}{{ n.x }}"
TEMPLATES = (
    "", "{{", "{% for m in messages %}{{ m.content }}{% endfor %}", "{{ raise_exception('no') }}", "{{ 1 / 0 }}", BIG,
    "{% for i in range(10**9) %}{% endfor %}", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}",
    "{{ messages[9].x.y }}",
    "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}",
    "{{ 'x' * 10**7 }}",
    "{% include 'a' %}",
    "{{ 'x' * 10**12 }}", "{{ ''.__class__.__mro__[1].__subclasses__() }}", "{{ '\ud800' }}",
    "{{ strftime_now('%Y') }}",
    "{{ cycler.__init__.__globals__.os.system('true') }}", "{% generation %}", "{{ '\x00<|end|>\u202e' }}",
    "{" * 5000,
    "{{ " + "(" * 500 + ")" * 500 + " }}", "{% if a %}" * 500, "{{ messages }}", "a" * 100_000, "{{ 10**(10**9) }}",
)  # fmt: skip
PICKLE = b"cos\nsystem\n(S'true'\ntR."
BESIDE = (
    "generation_config.json", "special_tokens_map.json", "added_tokens.json", "preprocessor_config.json", "vocab.json",
    "adapter_config.json", "tokenizer.model", "modeling_llama.py", "configuration.py", "processor_config.json",
)  # fmt: skip


@dataclass(frozen=True)
class Folder:
    """What differs from a small valid folder of this family: a file's bytes, where a link points to, None for gone."""

    family: str
    files: dict[str, bytes | str | None] = field(default_factory=dict)


class Reader:
    """Reads a case. base: where the valid folders are."""

    def __init__(self, base: Path):
        self.base = base

    def __call__(self, case: Folder, folder: Path) -> None:
        model = folder / "model"
        model.mkdir()
        os.link(self.base / case.family / WEIGHTS, folder / "outside.safetensors")
        for path in (self.base / case.family).iterdir():
            if path.name not in case.files:
                os.link(path, model / path.name)
        for name, what in case.files.items():
            if isinstance(what, str):
                (model / name).symlink_to(what)
            elif what is not None:
                (model / name).write_bytes(what)
        # In the order of a run.
        path = resolve(ModelSpec(str(model)))
        config = decoder_config(path)
        tokenizer = open_tokenizer(path)
        tokenizer.prompt("What is 1 + 2?")
        check(path)
        folder_sha256(path)
        load(path)
        ids = [*tokenizer.encode("a: 1\n\nThe answer is \\boxed{3}."), *tokenizer.turn("1 + 2 = 3")]
        tokenizer.text(ids)
        if any(i >= config.vocab_size for i in ids) or len(tokenizer.newlines.lead) != config.vocab_size:
            raise Failure("ids beyond the vocabulary")
        if INDEX in case.files and any(
            "/" in name for name in json.loads((model / INDEX).read_text())["weight_map"].values()
        ):
            raise Failure("a file outside the folder was read")

    def culprits(self, case: Folder, folder: Path) -> tuple[str, ...]:
        return (str(folder / "model"),)


def write(folder: Path, family: str) -> None:
    """A valid folder of a few kilobytes with the tokenizer of the built-in world."""
    folder.mkdir(parents=True)
    student = model_folder("student")
    for name in ("tokenizer.json", "tokenizer_config.json", "generation_config.json"):
        shutil.copy(student / name, folder / name)
    raw = json.loads((student / "config.json").read_text(encoding="utf-8"))
    raw |= {**SMALL, **FAMILIES[family], "model_type": family, "architectures": []}
    (folder / "config.json").write_bytes(as_json(raw))
    config = parse(raw)
    shapes: dict[Any, Any] = {path: v.shape for path, v in nnx.to_flat_state(abstract(config, jnp.float32)[1])}
    rng = np.random.default_rng(0)
    tensors = {row.tensor: rng.normal(size=row.to_file(shapes[row.path])).astype(np.float32) for row in table(config)}
    save_file(tensors, folder / WEIGHTS)


@st.composite
def _weights(draw: st.DrawFn, valid: bytes) -> bytes:
    """A safetensors file: its header says other things, its length lies, or its bytes are broken."""
    if draw(st.integers(0, 3)) == 0:
        return draw(broken(valid[:200] if draw(st.booleans()) else valid))
    size = int.from_bytes(valid[:8], "little")
    header, data = json.loads(valid[8 : 8 + size]), valid[8 + size :]
    lies = st.sampled_from(("F64", "BF16", "I64", "BOOL", "F8_E4M3", "C64", "")) | st.sampled_from(NUMBERS) | VALUES
    lies |= st.sampled_from(([0, 2**62], [8, 4], [0, 0], [2**40], [2**31, 2**31], [0, len(data)], [1] * 70, [4, 8, 4]))
    header = draw(edited(header, lies, 2))
    text = as_json(header) + b" " * draw(st.integers(0, 3))
    length = draw(st.just(len(text)) | st.sampled_from((0, 1, 2**31, 2**62, 2**64 - 1, len(text) + 8, len(text) - 1)))
    noise = draw(st.sampled_from((b"", b"\x00" * 8, b"\xff" * 64)))
    return length.to_bytes(8, "little") + text + noise + data[len(noise) :]


def _index(names: list[str]) -> st.SearchStrategy[bytes]:
    valid = {"metadata": {"total_size": 1}, "weight_map": {name: WEIGHTS for name in names}}
    files = (
        "../outside.safetensors",
        "/etc/passwd",
        "x/y.safetensors",
        "gone.safetensors",
        "..",
        "",
        ".",
        "\x00",
        WEIGHTS,
    )
    everywhere = st.sampled_from(files).map(lambda name: {**valid, "weight_map": {tensor: name for tensor in names}})
    return everywhere.map(as_json) | edited(valid, st.sampled_from(files) | VALUES).map(as_json) | json_files(valid)


def _cases(family: str, folder: Path) -> st.SearchStrategy[Folder]:
    files = {path.name: path.read_bytes() for path in folder.iterdir()}
    raw = {name: json.loads(data) for name, data in files.items() if name.endswith(".json")}
    header = json.loads(files[WEIGHTS][8 : 8 + int.from_bytes(files[WEIGHTS][:8], "little")])
    settings, config = raw["tokenizer_config.json"], raw["config.json"]
    odd = st.sampled_from(NUMBERS) | st.sampled_from(ROPES) | VALUES
    told = st.dictionaries(st.sampled_from(FIELDS), odd, min_size=1, max_size=2).map(lambda new: as_json(config | new))
    hostile = st.sampled_from(
        ("auto_map", "fast_tokenizer_files", "tokenizer_class", "backend", "extra_special_tokens")
    )
    asked = st.dictionaries(hostile | KEYS, VALUES | st.sampled_from(WORDS), min_size=1, max_size=2).map(
        lambda new: as_json(settings | new)
    )
    templates = st.sampled_from(TEMPLATES)
    one = st.one_of(
        *[st.tuples(st.just("config.json"), told | json_files(config))] * 2,
        st.tuples(st.just("tokenizer.json"), json_files(raw["tokenizer.json"])),
        st.tuples(st.just("tokenizer_config.json"), asked | json_files(settings)),
        st.tuples(
            st.just("tokenizer_config.json"), templates.map(lambda text: as_json(settings | {"chat_template": text}))
        ),
        st.tuples(
            st.just(TEMPLATE), templates.map(lambda text: text.encode(errors="replace")) | broken(b"{{ messages }}")
        ),
        *[st.tuples(st.just(WEIGHTS), _weights(files[WEIGHTS]))] * 2,
        st.tuples(st.just(INDEX), _index(sorted(header))),
        st.tuples(st.sampled_from(sorted(files)), st.sampled_from((None, b"", ".", "gone", "/dev/null", "../model"))),
        st.tuples(st.just(WEIGHTS), st.sampled_from(("../outside.safetensors", "/dev/null"))),
        st.tuples(st.sampled_from(BESIDE), json_files({"eos_token_id": 2}) | st.just(PICKLE)),
        st.tuples(st.sampled_from(("pytorch_model.bin", "weights.pkl")), st.just(PICKLE)),
    )
    return st.lists(one, min_size=1, max_size=2).map(lambda pairs: Folder(family, dict(pairs)))


def make(base: Path, run: Path) -> Kind:
    for family in FAMILIES:
        if not (base / family).is_dir():
            write(base / family, family)
    reader = Reader(base)
    cases = [_cases(family, base / family) for family in FAMILIES]
    return Kind("model", Folder("llama"), st.one_of(*cases, cases[0]), reader, reader.culprits)
