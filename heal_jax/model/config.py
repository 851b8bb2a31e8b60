"""What a decoder is, and how a Hugging Face `config.json` says it.

Every field of a `config.json` that changes numerics is either represented here or refused: a model that loads is the
model that was saved. Old spellings and each family's defaults are folded in by the family's own configuration class in
transformers.
"""

import copy
import dataclasses
import json
import math
from pathlib import Path
from typing import Any

from heal_jax.errors import InputError
from heal_jax.model.rope import Rope


@dataclasses.dataclass(frozen=True)
class DecoderConfig:
    """Sizes and variants of a pre-norm decoder with rotary positions and gated MLPs."""

    family: str  # model_type in config.json
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    rope: Rope
    rms_norm_eps: float
    tie_embeddings: bool
    max_positions: int
    query_scale: float  # scores are divided by its square root: head_dim, or what Gemma gives
    activation: str = "silu"  # or "gelu_pytorch_tanh"
    qk_norm: bool = False  # queries and keys normalised per head before rotation
    qkv_bias: bool = False
    o_bias: bool = False
    mlp_bias: bool = False
    window: int = 0  # of the sliding layers
    sliding: tuple[bool, ...] = ()  # by layer; empty: none
    local_rope: Rope | None = None  # of the sliding layers, where it differs
    gemma: bool = False  # sandwich norms, (1 + w) RMSNorm, embeddings times sqrt(hidden_size)
    experts: int = 0
    experts_per_token: int = 0
    expert_size: int = 0  # intermediate size of an expert
    normalise_experts: bool = False
    dense_layers: tuple[int, ...] = ()  # layers with a plain MLP in a model with experts

    def layer_window(self, layer: int) -> int:
        """Tokens that a layer looks back on, itself included; 0: all."""
        return self.window if self.sliding and self.sliding[layer] else 0

    def layer_rope(self, layer: int) -> Rope:
        sliding = bool(self.sliding) and self.sliding[layer]
        return self.local_rope if sliding and self.local_rope is not None else self.rope

    def has_experts(self, layer: int) -> bool:
        return self.experts > 0 and layer not in self.dense_layers


FAMILIES = ("llama", "mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text")

# Fields that would change the numbers, with the only values that this decoder computes (absent: the first).
FIXED: dict[str, tuple[Any, ...]] = {
    "add_cross_attention": (False, None),
    "attn_logit_softcapping": (None,),
    "final_logit_softcapping": (None,),
    "is_encoder_decoder": (False, None),
    "partial_rotary_factor": (1, None),
    "pretraining_tp": (1, None),
    "quantization_config": (None,),
    "rope_interleaved": (False, None),
    "use_mrope": (False, None),
    "use_bidirectional_attention": (False, None),
}

# Fields that are read below, by `parse` or by transformers on its behalf.
READ = {
    *("model_type", "vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"),
    *("num_key_value_heads", "head_dim", "hidden_act", "hidden_activation", "rms_norm_eps", "tie_word_embeddings"),
    *("attention_bias", "mlp_bias", "query_pre_attn_scalar", "max_position_embeddings"),
    *("rope_parameters", "rope_theta", "rope_scaling", "rope_local_base_freq"),
    *("layer_types", "sliding_window", "use_sliding_window", "max_window_layers"),
    *("sliding_window_pattern", "_sliding_window_pattern"),
    *("num_experts", "num_local_experts", "num_experts_per_tok", "moe_intermediate_size", "norm_topk_prob"),
    *("decoder_sparse_step", "mlp_only_layers"),
}

LARGEST = 2**53
MOST = {"num_hidden_layers": 1000, "num_experts": 4096, "num_local_experts": 4096}

# Of those, what only some families read: where another has it, who wrote it meant something that is not computed.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "attention_bias": ("llama", "qwen3", "qwen3_moe", "gemma3_text"),
    "mlp_bias": ("llama",),
    "layer_types": ("qwen2", "qwen3", "gemma3_text"),
    "sliding_window": ("mistral", "qwen2", "qwen3", "qwen3_moe", "gemma3_text"),
    "use_sliding_window": ("qwen2", "qwen3", "qwen3_moe"),
}

# Fields that do not change a forward pass in evaluation mode.
NEUTRAL = {
    *("architectures", "dtype", "torch_dtype", "transformers_version", "_name_or_path", "transformers.js_config"),
    *("bos_token_id", "eos_token_id", "pad_token_id", "id2label", "label2id", "problem_type", "use_cache"),
    *("cache_implementation", "chunk_size_feed_forward", "initializer_range", "attention_dropout", "is_decoder"),
    *("cross_attention_hidden_size", "output_attentions", "output_hidden_states", "output_router_logits"),
    *("return_dict", "router_aux_loss_coef", "is_llama_config", "unsloth_fixed", "unsloth_version"),
    "_attn_implementation_autoset",
}

ROPE_FIELDS = {
    "default": set(),
    "linear": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"},
    "yarn": {"factor", "original_max_position_embeddings", "attention_factor", "beta_fast", "beta_slow", "mscale",
             "mscale_all_dim", "truncate"},
}  # fmt: skip


def read_config_json(folder: Path) -> dict[str, Any]:
    """The parsed `config.json` of a model folder. Raises InputError where it is missing or not a JSON object."""
    path = folder / "config.json"
    if not path.is_file():
        raise InputError(f"{folder}: not a model folder (no config.json); give a Hugging Face model directory")
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, UnicodeDecodeError, RecursionError) as error:
        raise InputError(f"{path}: not valid JSON ({error}); restore the file from its source") from None
    if not isinstance(raw, dict):
        raise InputError(f"{path}: a JSON object is expected; restore the file from its source")
    return raw


def decoder_config(folder: Path) -> DecoderConfig:
    """Read `config.json`. Raises InputError for an architecture or a variant that is not computed exactly."""
    return parse(read_config_json(folder), str(folder / "config.json"))


def parse(raw: dict[str, Any], where: str = "config.json") -> DecoderConfig:
    """A parsed `config.json` as a DecoderConfig. Raises InputError naming what is not supported."""
    family = raw.get("model_type")
    if family not in FAMILIES:
        raise InputError(f"{where}: model_type {family!r} is not supported; supported: {', '.join(FAMILIES)}")
    known = READ | NEUTRAL | set(FIXED)
    if unknown := sorted(set(raw) - known):
        raise InputError(f"{where}: fields that this decoder does not know and might compute wrongly: {unknown}")
    for name, allowed in FIXED.items():
        if raw.get(name, allowed[0]) not in allowed:
            raise InputError(f"{where}: {name}={raw[name]!r} is not supported; supported: {list(allowed)}")
    for name, families in ONLY_IN.items():
        if raw.get(name) and family not in families:
            raise InputError(
                f"{where}: {name}={raw[name]!r} is not supported for {family}, whose models do not read it"
            )
    for name in sorted(READ & set(raw)):
        _not_huge(raw[name], name, where)
    hf = _normalised(raw, family, where)

    def integer(name: str, value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise InputError(f"{where}: {name} must be a positive integer, not {value!r}")
        return value

    def field(name: str) -> int:
        return integer(name, getattr(hf, name, None))

    layers, heads, hidden = field("num_hidden_layers"), field("num_attention_heads"), field("hidden_size")
    kv_heads = field("num_key_value_heads")
    head_dim = integer("head_dim", getattr(hf, "head_dim", None) or hidden // heads)
    if heads % kv_heads or head_dim % 2:
        raise InputError(f"{where}: heads must be a multiple of key-value heads, and head_dim even")
    gemma = family == "gemma3_text"
    activation = hf.hidden_activation if gemma else hf.hidden_act
    if activation not in ("silu", "gelu_pytorch_tanh"):
        raise InputError(f"{where}: activation {activation!r} is not supported; supported: silu, gelu_pytorch_tanh")
    sliding, window = _sliding(hf, family, layers, where)
    bias = bool(getattr(hf, "attention_bias", False))
    ropes = hf.rope_parameters if gemma else {"full_attention": hf.rope_parameters}
    read_rope = {kind: _rope(values, hf.max_position_embeddings, where) for kind, values in ropes.items()}
    experts: dict[str, Any] = {}
    if family == "qwen3_moe":
        step = integer("decoder_sparse_step", hf.decoder_sparse_step)
        only = set(hf.mlp_only_layers or [])
        dense = {i for i in range(layers) if (i + 1) % step or i in only}
        experts = {
            "experts": field("num_experts"),
            "experts_per_token": field("num_experts_per_tok"),
            "expert_size": field("moe_intermediate_size"),
            "normalise_experts": bool(hf.norm_topk_prob),
            "dense_layers": tuple(sorted(dense)),
        }
        if experts["experts_per_token"] > experts["experts"]:
            raise InputError(f"{where}: num_experts_per_tok is larger than the number of experts")
    return DecoderConfig(
        family=family,
        vocab_size=field("vocab_size"),
        hidden_size=hidden,
        intermediate_size=field("intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        rope=read_rope["full_attention"],
        rms_norm_eps=_number(hf.rms_norm_eps, "rms_norm_eps", where),
        tie_embeddings=bool(hf.tie_word_embeddings),
        max_positions=field("max_position_embeddings"),
        query_scale=_number(hf.query_pre_attn_scalar if gemma else head_dim, "query_pre_attn_scalar", where),
        activation=activation,
        qk_norm=family in ("qwen3", "qwen3_moe", "gemma3_text"),
        qkv_bias=bias or family == "qwen2",
        o_bias=bias,
        mlp_bias=bool(getattr(hf, "mlp_bias", False)),
        window=window,
        sliding=sliding,
        local_rope=read_rope.get("sliding_attention"),
        gemma=gemma,
        **experts,
    )


def _not_huge(value: Any, name: str, where: str) -> None:
    """Raise InputError for numbers that no model has, before anything is as long as they say."""
    for inner in value.values() if isinstance(value, dict) else value if isinstance(value, list) else ():
        _not_huge(inner, name, where)
    if isinstance(value, int) and abs(value) > (most := MOST.get(name, LARGEST)):
        raise InputError(f"{where}: {name} is out of range, allowed: at most {most}")


def _normalised(raw: dict[str, Any], family: str, where: str) -> Any:
    """The family's configuration object of transformers, for its defaults and its reading of old spellings."""
    import transformers  # two seconds: only where a model is read

    level = transformers.logging.get_verbosity()
    transformers.logging.set_verbosity_error()  # it warns of what is refused below
    try:
        fields = {k: copy.deepcopy(v) for k, v in raw.items() if k in READ}
        return transformers.CONFIG_MAPPING[family].from_dict(fields)
    except Exception as error:  # the library raises many kinds for values of a wrong type
        raise InputError(f"{where}: not a configuration of {family} ({' '.join(str(error).split())[:300]})") from None
    finally:
        transformers.logging.set_verbosity(level)


def _sliding(hf: Any, family: str, layers: int, where: str) -> tuple[tuple[bool, ...], int]:
    """Which layers have a sliding window, and its size."""
    window = getattr(hf, "sliding_window", None)
    kinds = getattr(hf, "layer_types", None)
    if kinds is None:  # one kind for all layers
        kinds = ["full_attention" if window is None else "sliding_attention"] * layers
    if not isinstance(kinds, list) or len(kinds) != layers or set(kinds) - {"full_attention", "sliding_attention"}:
        raise InputError(f"{where}: layer_types must name full_attention or sliding_attention for each of the layers")
    if "sliding_attention" not in kinds:
        return (), 0
    if isinstance(window, bool) or not isinstance(window, int) or window < 1:
        raise InputError(f"{where}: sliding_window must be a positive integer, not {window!r}")
    return tuple(kind == "sliding_attention" for kind in kinds), window


def _rope(values: Any, max_positions: int, where: str) -> Rope:
    """Rotary base and scaling (`rope_parameters`, old spellings folded in)."""
    if not isinstance(values, dict):
        raise InputError(f"{where}: rope_parameters must be a JSON object, not {values!r}")
    kind = values.get("rope_type", values.get("type", "default"))
    if kind not in ROPE_FIELDS:
        raise InputError(f"{where}: RoPE scaling {kind!r} is not supported; supported: {', '.join(ROPE_FIELDS)}")
    unknown = set(values) - ROPE_FIELDS[kind] - {"rope_type", "type", "rope_theta"}
    if unknown - {"partial_rotary_factor"} or values.get("partial_rotary_factor") not in (None, 1):
        raise InputError(f"{where}: {sorted(unknown)} of RoPE scaling {kind!r} is not supported")

    def number(name: str, default: float | None = None) -> float:
        value = values.get(name)
        return _number(default if value is None else value, name, where)

    theta = number("rope_theta")
    if kind == "default":
        return Rope(theta)
    if kind == "linear":
        return Rope(theta, kind, number("factor"))
    original = int(number("original_max_position_embeddings", max_positions))
    if original < 1 or theta <= 1:
        raise InputError(
            f"{where}: RoPE scaling {kind} needs a whole original_max_position_embeddings and rope_theta > 1"
        )
    if kind == "llama3":
        rope = Rope(theta, kind, number("factor"), original, number("low_freq_factor"), number("high_freq_factor"))
        if rope.low >= rope.high:
            raise InputError(f"{where}: low_freq_factor must be less than high_freq_factor")
        return rope
    factor = number("factor", max_positions / original)
    beta_fast, beta_slow = number("beta_fast", 32.0), number("beta_slow", 1.0)
    attention, truncate = _yarn_attention(values, factor, number), bool(values.get("truncate", True))
    return Rope(theta, kind, factor, original, 1.0, 4.0, beta_fast, beta_slow, truncate, attention)


def _yarn_attention(values: dict[str, Any], factor: float, number: Any) -> float:
    """Factor on cosine and sine: given, or from the scaling (arXiv 2309.00071, section 3.4; DeepSeek's mscale)."""

    def of(scale: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * scale * math.log(factor) + 1.0

    if values.get("attention_factor") is not None:
        return number("attention_factor")
    if values.get("mscale") and values.get("mscale_all_dim"):
        return of(number("mscale")) / of(number("mscale_all_dim"))
    return of(1.0)


def _number(value: Any, name: str, where: str) -> float:
    if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
        raise InputError(f"{where}: {name} must be a positive number, not {value!r}")
    return float(value)


def both_spellings(raw: dict[str, Any], dtype: str) -> dict[str, Any]:
    """A `config.json` that versions 4 and 5 of transformers, and engines that follow either, read alike.

    Rotary parameters, dtype and the number of experts under the old names and the new; all other fields as they are.
    """
    out = {**raw, "dtype": dtype, "torch_dtype": dtype}
    hf = _normalised(raw, raw["model_type"], "config.json")
    nested = raw["model_type"] == "gemma3_text"
    out["rope_parameters"] = hf.rope_parameters
    full = dict(hf.rope_parameters["full_attention"] if nested else hf.rope_parameters)
    out["rope_theta"] = full.pop("rope_theta")
    if full["rope_type"] != "default":
        out["rope_scaling"] = full
    if nested:
        out["rope_local_base_freq"] = hf.rope_parameters["sliding_attention"]["rope_theta"]
    if raw["model_type"] == "qwen3_moe":
        out["num_experts"] = out["num_local_experts"] = hf.num_experts
    return out
