"""What a decoder is, and how a Hugging Face `config.json` says it.

Every field of a `config.json` that changes numerics is either represented here or refused: a model that loads is the
model that was saved.
"""

import dataclasses
import json
from pathlib import Path
from typing import Any

from heal_jax.errors import InputError


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a pre-norm decoder with rotary positions and a gated SiLU MLP."""

    family: str  # "llama" or "qwen3": names the architecture in config.json
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope_theta: float
    rms_norm_eps: float
    tie_embeddings: bool
    max_positions: int

    @property
    def qk_norm(self) -> bool:
        """Qwen3 normalises queries and keys per head before rotating them; Llama does not."""
        return self.family == "qwen3"


_ARCHITECTURES = {"llama": "LlamaForCausalLM", "qwen3": "Qwen3ForCausalLM"}

# Fields that would change the numbers, with the only values that this decoder computes.
_REQUIRED_VALUES: dict[str, tuple[Any, ...]] = {
    "hidden_act": ("silu",),
    "attention_bias": (False, None),
    "mlp_bias": (False, None),
    "use_sliding_window": (False, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "partial_rotary_factor": (1.0, None),
}

# Fields that are read below, or that do not change the numbers of a forward pass in evaluation mode.
_KNOWN_FIELDS = set(_REQUIRED_VALUES) | {
    *("architectures", "model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers"),
    *("num_attention_heads", "num_key_value_heads", "head_dim", "rope_theta", "rope_parameters", "rope_scaling"),
    *("rms_norm_eps", "tie_word_embeddings", "max_position_embeddings", "layer_types", "max_window_layers"),
    *("attention_dropout", "bos_token_id", "eos_token_id", "pad_token_id", "dtype", "torch_dtype", "use_cache"),
    *("initializer_range", "transformers_version", "_name_or_path", "is_llama_config", "rope_interleaved"),
    *("output_attentions", "output_hidden_states", "return_dict", "chunk_size_feed_forward", "id2label", "label2id"),
    *(
        "sliding_window",
        "is_encoder_decoder",
        "is_decoder",
        "add_cross_attention",
        "cross_attention_hidden_size",
        "problem_type",
    ),
    "transformers.js_config",
}


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder. Raises InputError where it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (no config.json); give a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore the file from its source") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object is expected; restore the file from its source")
    return raw


def decoder_config(folder: Path) -> DecoderConfig:
    """Read `config.json`. Raises InputError for an architecture or a variant that is not computed exactly."""
    raw = read_config_json(folder)
    where = folder / "config.json"
    family = raw.get("model_type")
    if family not in _ARCHITECTURES:
        raise InputError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(_ARCHITECTURES)}")
    unknown = sorted(set(raw) - _KNOWN_FIELDS)
    if unknown:
        raise InputError(f"{where}: fields that this decoder does not know and might compute wrongly: {unknown}")
    for name, allowed in _REQUIRED_VALUES.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise InputError(f"{where}: {name}={raw[name]!r} is not supported; supported: {list(allowed)}")
    kinds = raw.get("layer_types") or []
    if not isinstance(kinds, list) or any(kind != "full_attention" for kind in kinds):
        raise InputError(f"{where}: layer_types other than full_attention are not supported")
    if raw.get("sliding_window") is not None and raw.get("use_sliding_window") is not False:
        raise InputError(f"{where}: sliding_window={raw['sliding_window']!r} is not supported; supported: none")
    if raw.get("rope_interleaved"):
        raise InputError(f"{where}: rope_interleaved is not supported")

    def integer(name: str, default: int | None = None) -> int:
        value = raw.get(name) if raw.get(name) is not None else default
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{where}: {name} must be a positive integer, not {value!r}")
        return value

    hidden, heads = integer("hidden_size"), integer("num_attention_heads")

    def number(name: str, default: float) -> float:
        return _number(raw.get(name, default), name, where)

    config = DecoderConfig(
        family=family,
        vocab_size=integer("vocab_size"),
        hidden_size=hidden,
        intermediate_size=integer("intermediate_size"),
        num_layers=integer("num_hidden_layers"),
        num_heads=heads,
        num_kv_heads=integer("num_key_value_heads", heads),
        head_dim=integer("head_dim", 128 if family == "qwen3" else hidden // heads),
        rope_theta=_rope_theta(raw, where),
        rms_norm_eps=number("rms_norm_eps", 1e-6),
        tie_embeddings=bool(raw.get("tie_word_embeddings", False)),
        max_positions=integer("max_position_embeddings", 2048 if family == "llama" else 32768),
    )
    if config.num_heads % config.num_kv_heads or config.head_dim % 2:
        raise InputError(f"{where}: heads must be a multiple of key-value heads, and head_dim even")
    return config


def _rope_theta(raw: dict[str, Any], where: Path) -> float:
    """The rotary base, from the old spelling (`rope_theta`) or the new (`rope_parameters`)."""
    parameters, scaling = raw.get("rope_parameters") or {}, raw.get("rope_scaling") or {}
    for name, value in (("rope_parameters", parameters), ("rope_scaling", scaling)):
        if not isinstance(value, dict) or set(value) - {"rope_type", "type", "rope_theta"}:
            raise InputError(
                f"{where}: {name}={value!r} is not supported; supported: rope_type default with rope_theta"
            )
    kind = {"rope_type": parameters.get("rope_type", "default"), **scaling}
    if kind.get("type", kind["rope_type"]) != "default":
        raise InputError(f"{where}: RoPE scaling {kind!r} is not supported; supported: default (none)")
    theta = parameters.get("rope_theta", scaling.get("rope_theta", raw.get("rope_theta", 10000.0)))
    return _number(theta, "rope_theta", where)


def _number(value: Any, name: str, where: Path) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not value > 0:
        raise InputError(f"{where}: {name} must be a positive number, not {value!r}")
    return float(value)


def config_json(config: DecoderConfig, dtype: str, eos_ids: tuple[int, ...], pad_id: int | None) -> dict[str, Any]:
    """The `config.json` of a decoder, in both spellings of the rotary base and of the dtype (transformers 4 and 5)."""
    return {
        "architectures": [_ARCHITECTURES[config.family]],
        "model_type": config.family,
        "vocab_size": config.vocab_size,
        "hidden_size": config.hidden_size,
        "intermediate_size": config.intermediate_size,
        "num_hidden_layers": config.num_layers,
        "num_attention_heads": config.num_heads,
        "num_key_value_heads": config.num_kv_heads,
        "head_dim": config.head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": config.max_positions,
        "rms_norm_eps": config.rms_norm_eps,
        "rope_theta": config.rope_theta,
        "rope_parameters": {"rope_type": "default", "rope_theta": config.rope_theta},
        "tie_word_embeddings": config.tie_embeddings,
        "attention_bias": False,
        "bos_token_id": None,
        "eos_token_id": eos_ids[0] if len(eos_ids) == 1 else list(eos_ids),
        "pad_token_id": pad_id,
        "dtype": dtype,
        "torch_dtype": dtype,
    }
