"""FLOPs of matrix products by formula: what a decoder needs, whatever the compiler makes of it.

2 a multiply-add. Attention counts every query with every slot, as it is computed (the mask comes after).
"""

from heal_jax.model.config import DecoderConfig


def linear(config: DecoderConfig) -> float:
    """FLOPs a token of one layer's projections and MLP."""
    c = config
    heads = c.num_heads + 2 * c.num_kv_heads + c.num_heads  # q, k and v, o
    return 2.0 * c.hidden_size * (heads * c.head_dim + 3 * c.intermediate_size)


def attention(config: DecoderConfig, queries: int, slots: int) -> float:
    """FLOPs of one layer's scores and weighted sums."""
    return 4.0 * config.num_heads * config.head_dim * queries * slots


def head(config: DecoderConfig) -> float:
    """FLOPs of the logits of one token."""
    return 2.0 * config.hidden_size * config.vocab_size


def blocks(config: DecoderConfig, tokens: int, slots: int) -> float:
    """FLOPs of all layers for a row of `tokens` that attend to `slots`."""
    return config.num_layers * (tokens * linear(config) + attention(config, tokens, slots))


def training(config: DecoderConfig, tokens: int, remat: bool) -> float:
    """FLOPs of an update on a row: forward, twice that backward."""
    return 3 * (blocks(config, tokens, tokens) + tokens * head(config))
