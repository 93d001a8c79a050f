"""Floating-point operations of a decoder, counted from its shape: what a compiler's own figure misses in its loops."""

from jaxkd.models.transformer import Config


def body(config: Config, length: int) -> int:
    """Of the layers' forward pass, per token: 2 per weight, and attention over the tokens before.

        2 (q + k + v + o + gate + up + down) layers + 4 heads head_dim (length + 1) / 2 layers

    Args:
        config: the decoder's shape.
        length: tokens of a row; a token sees half of them on average.
    """
    c = config
    attention = c.embed * c.head_dim * (2 * c.heads + 2 * c.kv_heads)
    weights = attention + 3 * c.embed * c.mlp
    return c.layers * (2 * weights + 2 * c.heads * c.head_dim * (length + 1))


def head(config: Config) -> int:
    """Of the head's forward product, per token: 2 embed V, without padding."""
    return 2 * config.embed * config.vocab
