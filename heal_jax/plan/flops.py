"""FLOPs of matrix products by formula: what a decoder needs, whatever the compiler makes of it.

2 a multiply-add. Attention counts every query with every slot, as it is computed (the mask comes after), and queries in
whole blocks; `fused`, in a TPU's kernel, without the blocks that it skips.
"""

from heal_jax.model.attention import QUERY_BLOCK
from heal_jax.model.config import DecoderConfig
from heal_jax.model.kernels import scores
from heal_jax.model.layers import Remat


def linear(config: DecoderConfig, layer: int) -> float:
    """FLOPs a token of one layer's projections, and of its MLP or the experts it is routed to."""
    c = config
    wide = 2 * (c.num_heads + c.num_kv_heads) * c.head_dim  # q and o, k and v
    if c.has_experts(layer):
        wide += c.experts + 3 * c.experts_per_token * c.expert_size
    else:
        wide += 3 * c.intermediate_size
    return 2.0 * c.hidden_size * wide


def attention(config: DecoderConfig, queries: int, slots: int) -> float:
    """FLOPs of one layer's scores and weighted sums."""
    if queries > QUERY_BLOCK:
        queries += -queries % QUERY_BLOCK
    return 4.0 * config.num_heads * config.head_dim * queries * slots


def to_itself(config: DecoderConfig, tokens: int, layers: int, fused: bool) -> float:
    """FLOPs of the scores and weighted sums of a row with itself, in the first `layers` layers."""
    if not fused:
        return layers * attention(config, tokens, tokens)
    computed = sum(scores(tokens, config.layer_window(layer)) for layer in range(layers))
    return 4.0 * config.num_heads * config.head_dim * computed


def head(config: DecoderConfig) -> float:
    """FLOPs of the logits of one token."""
    return 2.0 * config.hidden_size * config.vocab_size


def blocks(config: DecoderConfig, tokens: int, slots: int, fused: bool = False) -> float:
    """FLOPs of all layers for a row of `tokens` that attend to `slots`."""
    products = tokens * sum(linear(config, layer) for layer in range(config.num_layers))
    if slots == tokens:
        return products + to_itself(config, tokens, config.num_layers, fused)
    return products + config.num_layers * attention(config, tokens, slots)


def keys_and_values(config: DecoderConfig, tokens: int, fused: bool = False) -> float:
    """FLOPs of the keys and values of a row of `tokens`: no more of the last layer than these need."""
    last = config.num_layers - 1
    products = sum(linear(config, layer) for layer in range(last))
    products += 4.0 * config.hidden_size * config.num_kv_heads * config.head_dim
    return tokens * products + to_itself(config, tokens, last, fused)


def training(config: DecoderConfig, tokens: int, remat: Remat, fused: bool = False, adapters: int = 0) -> float:
    """FLOPs of an update on a row: forward, twice that backward, and forward again where that is rematerialised.

    Logits and the blocks of queries of long rows always are; with `remat` so are the scores, and with "block" the
    products with weights. The kernel makes seven products backward for two forward: two of its own compute the scores
    again. With `adapters`, the number of LoRA's weights, these alone learn: the others' products have one backward.
    """
    products = tokens * sum(linear(config, layer) for layer in range(config.num_layers))
    long, again = tokens > QUERY_BLOCK, remat != "none"
    times = 4.5 + again if fused else 3 + again + long
    mixed = times * to_itself(config, tokens, config.num_layers, fused)
    frozen, block = adapters > 0, remat == "block"
    beside = (3 + block) * 2.0 * tokens * adapters
    return (3 - frozen + block) * products + mixed + (3 - frozen + long) * tokens * head(config) + beside
