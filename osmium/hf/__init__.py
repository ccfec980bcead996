"""Reads config.json: values with their limits and defaults, and RoPE scaling.

Values only: ModelConfig in osmium/config.py gives them their names.
"""

from osmium.hf.reading import MAX_POSITIONS, Section
from osmium.hf.rope import Rope, read_rope

__all__ = ["MAX_POSITIONS", "Rope", "Section", "read_rope"]
