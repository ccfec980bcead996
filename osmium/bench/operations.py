"""Multiply-adds of a model's matrices and of attention, by the shapes of its config."""

from osmium.config import ModelConfig

__all__ = ["attention_multiply_adds", "matrix_multiply_adds", "prompt_multiply_adds"]


def matrix_multiply_adds(config: ModelConfig) -> int:
    """Multiply-adds of all matrices that a token uses, without the head.

    These are the mixers' matrices, the routers, and the shared and routed experts of all layers.
    """
    hidden = config.hidden_size
    heads = (config.num_heads + config.num_kv_heads, config.num_heads)
    attention = hidden * config.head_dim * (2 * heads[0] + heads[1])
    values = config.value_heads * config.value_dim
    delta_net = hidden * (config.channels + 2 * values + 2 * config.value_heads)
    mixers = sum(attention if mixer == "attention" else delta_net for mixer in config.layer_types)
    experts = 3 * (config.top_k * config.moe_intermediate_size + config.shared_intermediate_size)
    return mixers + config.num_layers * hidden * (config.num_experts + 1 + experts)


def attention_multiply_adds(config: ModelConfig, context: int, tokens: int) -> int:
    """Multiply-adds of scores and values of `tokens` tokens behind `context` others."""
    keys = tokens * context + tokens * (tokens + 1) // 2
    layers = config.layer_types.count("attention")
    return 2 * layers * config.num_heads * config.head_dim * keys


def prompt_multiply_adds(config: ModelConfig, context: int, tokens: int) -> int:
    """Both, for `tokens` tokens behind `context` others."""
    matrices = tokens * matrix_multiply_adds(config)
    return matrices + attention_multiply_adds(config, context, tokens)
