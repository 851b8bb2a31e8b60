"""Random transformers models of every family, the source of truth for the decoder."""

import numpy as np
import torch
import transformers
from hypothesis import strategies as st

FAMILIES = {
    "llama": (transformers.LlamaConfig, transformers.LlamaForCausalLM),
    "mistral": (transformers.MistralConfig, transformers.MistralForCausalLM),
    "qwen2": (transformers.Qwen2Config, transformers.Qwen2ForCausalLM),
    "qwen3": (transformers.Qwen3Config, transformers.Qwen3ForCausalLM),
    "qwen3_moe": (transformers.Qwen3MoeConfig, transformers.Qwen3MoeForCausalLM),
    "gemma3_text": (transformers.Gemma3TextConfig, transformers.Gemma3ForCausalLM),
}
VOCAB = 61
LENGTH = 23  # of the sequences compared: longer than the windows

ROPES = st.one_of(
    st.builds(lambda theta: {"rope_type": "default", "rope_theta": theta}, st.sampled_from([500.0, 1e6])),
    st.builds(lambda f: {"rope_type": "linear", "rope_theta": 1e4, "factor": f}, st.sampled_from([2.0, 8.0])),
    st.builds(
        lambda factor, original, high: {
            "rope_type": "llama3", "rope_theta": 500.0, "factor": factor, "low_freq_factor": 1.0,
            "high_freq_factor": high, "original_max_position_embeddings": original,
        },
        st.sampled_from([4.0, 8.0]), st.sampled_from([16, 64]), st.sampled_from([2.0, 4.0]),
    ),
    st.builds(
        lambda factor, original, extra: {
            "rope_type": "yarn", "rope_theta": 500.0, "factor": factor,
            "original_max_position_embeddings": original, **extra,
        },
        st.sampled_from([2.0, 4.0]), st.sampled_from([16, 32]),
        st.sampled_from([{}, {"attention_factor": 1.3}, {"truncate": False}, {"mscale": 1.0, "mscale_all_dim": 0.8},
                         {"beta_fast": 8.0, "beta_slow": 2.0}]),
    ),
)  # fmt: skip


@st.composite
def settings_of(draw, family):
    """Sizes and variants of a small model of a family, as arguments of its configuration."""
    groups, kv_heads = draw(st.sampled_from([(1, 3), (2, 2), (3, 1), (1, 1), (4, 2)]))
    heads, layers = groups * kv_heads, draw(st.integers(1, 2))
    head_dim, hidden = draw(st.sampled_from([2, 6, 8])), heads * draw(st.sampled_from([3, 5, 8]))
    if family in ("qwen2",):
        hidden = heads * head_dim  # no head_dim of its own
    rope = draw(ROPES)
    settings = {
        "vocab_size": VOCAB,
        "hidden_size": hidden,
        "intermediate_size": draw(st.sampled_from([7, 32])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": head_dim,
        "max_position_embeddings": 128,
        "tie_word_embeddings": draw(st.booleans()),
        "rope_parameters": rope,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-2])),
        "initializer_range": 0.3,
    }
    if family == "qwen2":
        settings.pop("head_dim")
    if family == "llama":
        settings |= {"attention_bias": draw(st.booleans()), "mlp_bias": draw(st.booleans())}
    if family == "mistral":
        settings["sliding_window"] = draw(st.sampled_from([None, 1, 5, 64]))
    if family in ("qwen2", "qwen3"):
        settings |= {"use_sliding_window": draw(st.booleans()), "sliding_window": 5, "max_window_layers": 1}
    if family in ("qwen3", "qwen3_moe", "gemma3_text"):
        settings["attention_bias"] = draw(st.booleans())
    if family == "qwen3_moe":
        experts = draw(st.sampled_from([2, 5, 8]))
        settings |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, min(3, experts))),
            "moe_intermediate_size": 9,
            "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": draw(st.sampled_from([1, 2])),
            "mlp_only_layers": draw(st.sampled_from([[], [0]])),
        }
    if family == "gemma3_text":
        kinds = st.sampled_from(["sliding_attention", "full_attention"])
        settings |= {
            "layer_types": draw(st.lists(kinds, min_size=layers, max_size=layers)),
            "sliding_window": 5,
            "query_pre_attn_scalar": draw(st.sampled_from([head_dim, 24])),
            "rope_parameters": {
                "full_attention": draw(ROPES),
                "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
            },
        }
    return settings


def hf_folder(path, family="llama", seed=0, dtype=torch.float32, **settings):
    """A random transformers model saved to `path`; returns it (in float32)."""
    defaults = {
        "vocab_size": VOCAB, "hidden_size": 24, "intermediate_size": 37, "num_hidden_layers": 2,
        "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128,
        "tie_word_embeddings": True, "initializer_range": 0.3,
    }  # fmt: skip
    if family != "qwen2":
        defaults["head_dim"] = 8
    if family == "qwen3_moe":
        defaults |= {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 10}
    if family == "gemma3_text":
        defaults |= {"layer_types": ["sliding_attention", "full_attention"], "sliding_window": 5}
    config_class, model_class = FAMILIES[family]
    torch.manual_seed(seed)
    model = model_class(config_class(**(defaults | settings), dtype=torch.float32)).eval()
    with torch.no_grad():  # norms that are all one would hide a wrong order of operations, biases of zero a missing one
        for name, parameter in model.named_parameters():
            if "norm" in name:
                parameter.uniform_(0.5, 1.5)
            elif name.endswith("bias"):
                parameter.normal_(0, 0.5)
    model.to(dtype).save_pretrained(path, safe_serialization=True)
    model.set_experts_implementation("eager")  # the grouped one wants aligned sizes
    return model.float()


def hf_logits(model, tokens):
    with torch.no_grad():
        return model(torch.tensor(np.asarray(tokens))).logits.numpy()


def entropy64(logits):
    """Entropies of softmax(logits) in float64: [..., V] -> [...]."""
    logits = logits.astype(np.float64)
    p = np.exp(logits - logits.max(-1, keepdims=True))
    p /= p.sum(-1, keepdims=True)
    return -(p * np.log(np.maximum(p, 1e-300))).sum(-1)


def error(ours, theirs, scale):
    """Largest difference, relative to `scale`."""
    return float(np.abs(np.asarray(ours) - theirs).max() / scale)
