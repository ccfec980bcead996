"""RoPE from a config.json: its base, the rotated part of a head, and its scaling to long contexts.

The values are those of transformers for the family (modeling_rope_utils, 5.24).  `rope_scaling`
replaces `rope_parameters`; keys beside them come next, then the family's defaults.
Scaling: YaRN (Peng et al. 2023, arXiv:2309.00071), linear, dynamic NTK and Llama 3's.  All axes of
mRoPE have the same positions for text, so `mrope_section` has no effect here.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from osmium.errors import CheckpointError, shown
from osmium.hf.reading import MAX_POSITIONS, Section

__all__ = ["Rope", "read_rope"]

DEFAULT_THETA = 1e4
DEFAULT_PARTIAL = 0.25
"""The family's defaults in transformers.  Published files state theta; it is 1e7."""

TYPES = ("default", "linear", "dynamic", "yarn", "llama3")


@dataclass(frozen=True)
class Rope:
    """Which values of a head are rotated, and how far."""

    rotary_dim: int
    """R, values of a head that RoPE rotates."""
    frequencies: tuple[float, ...]
    """Radians per position of each of the R / 2 pairs."""
    max_positions: int
    """Maximum tokens of context: the model's, or the length to which YaRN extends it."""
    factor: float = 1.0
    """Factor of the rotated values of queries and keys: YaRN's attention factor, else 1."""


def read_rope(
    config: Mapping[str, Any], text: Mapping[str, Any], head_dim: int, max_positions: int
) -> Rope:
    """RoPE of a model; `text` is the text model's part of `config`.

    Raises: CheckpointError for a scaling that is not supported, or that stands where transformers
    ignores it.
    """
    outer = Section(text)
    parameters = _section(text, "rope_parameters")
    chosen = _section(text, "rope_scaling")
    if not chosen.values:
        chosen = parameters
    kind = _type(chosen)
    theta_at = chosen if "rope_theta" in chosen.values else outer
    theta = theta_at.number("rope_theta", DEFAULT_THETA, least=1.0001, most=1e30)
    partial_at = chosen if "partial_rotary_factor" in chosen.values else outer
    partial = partial_at.number("partial_rotary_factor", DEFAULT_PARTIAL, most=1.0)
    rotary = int(head_dim * partial)
    if rotary < 2 or rotary % 2:
        partial_at.refuse(
            "partial_rotary_factor",
            f"a fraction that rotates an even number of the {head_dim} values of a head",
        )
    if chosen.values != parameters.values:
        _refuse_conflict(parameters, theta, partial)
    if text is not config:
        absent = {
            "rope_theta": theta if "rope_theta" not in theta_at.values else None,
            "partial_rotary_factor": (
                partial if "partial_rotary_factor" not in partial_at.values else None
            ),
        }
        _refuse_outside(config, chosen, absent)
    plain = tuple(theta ** -(2 * j / rotary) for j in range(rotary // 2))
    if kind == "yarn":
        return _yarn(chosen, outer, rotary, theta, max_positions)
    if kind == "llama3":
        plain = _llama3(chosen, _original(chosen, outer, max_positions), plain)
    elif kind != "default":
        factor = chosen.number("factor", least=1.0, most=MAX_POSITIONS)
        if kind == "linear":
            plain = tuple(frequency / factor for frequency in plain)
        # dynamic scaling begins beyond max_positions, which no sequence exceeds
    elif chosen.values.get("factor") not in (None, 1):
        chosen.refuse(
            "factor", 'absent where rope_type is absent or "default"; name a type, as in "yarn"'
        )
    return Rope(rotary, plain, max_positions)


# -- places --------------------------------------------------------------------------------------


def _section(values: Mapping[str, Any], key: str) -> Section:
    """The RoPE parameters at a key, empty if it is absent or null."""
    section = Section.of(values.get(key), key)
    for layer_type in ("full_attention", "linear_attention"):
        if layer_type in section.values:
            raise CheckpointError(
                f"{key} in config.json has parameters per layer type, under {layer_type!r}; this "
                f"family has one set of them. Put the keys of 'full_attention' into {key} itself."
            )
    return section


def _type(section: Section) -> str:
    values = section.values
    kind = values.get("rope_type", values.get("type", "default"))
    if not isinstance(kind, str) or kind not in TYPES:
        key = "rope_type" if "rope_type" in values else "type"
        section.refuse(key, f"one of {', '.join(TYPES)}; others are not supported")
    if values.get("type") not in (None, kind):
        section.refuse("type", f"the same as rope_type, {kind!r}, or absent")
    return kind


def _refuse_conflict(parameters: Section, theta: float, partial: float) -> None:
    """Raise if rope_parameters, which rope_scaling replaces, has other values.

    transformers would drop them without a word, such as Qwen's theta for its default.
    Raises: CheckpointError.
    """
    for key, value in (("rope_theta", theta), ("partial_rotary_factor", partial)):
        if parameters.values.get(key, value) != value:
            parameters.refuse(
                key, f"{value:g}, as rope_scaling replaces rope_parameters; put all keys into one"
            )
    if _type(parameters) != "default":
        raise CheckpointError(
            "config.json has a scaling in rope_scaling and in rope_parameters; remove one of them."
        )


def _refuse_outside(
    config: Mapping[str, Any], chosen: Section, defaults: Mapping[str, float | None]
) -> None:
    """Raise if keys beside text_config, which transformers ignores, would change the result.

    `defaults` has the values in use of keys that text_config does not have, else None.
    Raises: CheckpointError.
    """
    for name in ("rope_scaling", "rope_parameters"):
        section = _section(config, name)
        values = section.values
        scaled = _type(section) != "default" or values.get("factor") not in (None, 1)
        differs = any(chosen.values.get(key) != value for key, value in values.items())
        if scaled and differs:
            raise CheckpointError(
                f"{name} is {shown(dict(values))} beside text_config in config.json, where it has "
                "no effect; move it into text_config."
            )
        _refuse_unused(section, defaults)
    _refuse_unused(Section(config), defaults)


def _refuse_unused(section: Section, defaults: Mapping[str, float | None]) -> None:
    for key, value in defaults.items():
        if value is not None and section.values.get(key) not in (None, value):
            section.refuse(
                key, f"in text_config to have an effect, which has {value:g} by default; move it"
            )


# -- scaling -------------------------------------------------------------------------------------


def _original(chosen: Section, outer: Section, max_positions: int) -> float:
    """Positions that the model was trained with; a key beside the parameters has precedence."""
    key = "original_max_position_embeddings"
    section = outer if key in outer.values else chosen
    return section.number(key, max_positions, least=1.0, most=MAX_POSITIONS)


def _yarn(chosen: Section, outer: Section, rotary: int, theta: float, max_positions: int) -> Rope:
    """f[j] = (1 - r) / theta^(2j / R) + r / (factor theta^(2j / R)), r = ramp(j) from 0 to 1.

    The ramp is between the pairs that rotate beta_fast and beta_slow times in the original context.
    """
    original = _original(chosen, outer, max_positions)
    if chosen.values.get("factor", 0) is None:
        factor = max_positions / original
        if factor < 1:
            chosen.refuse("factor", "a number of at least 1")
    else:
        factor = chosen.number("factor", least=1.0, most=MAX_POSITIONS)
    if factor * original > MAX_POSITIONS:
        chosen.refuse("factor", f"at most {MAX_POSITIONS} / {original:g}, the original context")

    def optional(key: str, default: float, most: float) -> float:
        """A number; absent, null and 0 are the default."""
        value = chosen.values.get(key)
        plain = value is None or (value == 0 and not isinstance(value, bool))
        return default if plain else chosen.number(key, most=most)

    beta_fast, beta_slow = optional("beta_fast", 32.0, 1e6), optional("beta_slow", 1.0, 1e6)
    low, high = (
        rotary * math.log(original / (beta * 2 * math.pi)) / (2 * math.log(theta))
        for beta in (beta_fast, beta_slow)
    )
    if "truncate" not in chosen.values or chosen.boolean("truncate", False):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, rotary - 1)
    if low == high:
        high += 0.001
    frequencies = []
    for j in range(rotary // 2):
        ramp = min(max((j - low) / (high - low), 0.0), 1.0)
        frequencies.append(theta ** -(2 * j / rotary) * ((1 - ramp) + ramp / factor))
    mscale, mscale_all = optional("mscale", 0.0, 100.0), optional("mscale_all_dim", 0.0, 100.0)
    attention = _mscale(factor, 1.0)
    if mscale and mscale_all:
        attention = _mscale(factor, mscale) / _mscale(factor, mscale_all)
    if chosen.values.get("attention_factor") is not None:
        attention = chosen.number("attention_factor", most=100.0)
    extended = max(max_positions, int(factor * original))
    return Rope(rotary, tuple(frequencies), extended, attention)


def _mscale(factor: float, mscale: float) -> float:
    return 0.1 * mscale * math.log(factor) + 1.0


def _llama3(chosen: Section, original: float, plain: tuple[float, ...]) -> tuple[float, ...]:
    """f / factor for long wavelengths, f for short ones, interpolated between them."""
    factor = chosen.number("factor", least=1.0, most=MAX_POSITIONS)
    low, high = (chosen.number(f"{end}_freq_factor", most=1e6) for end in ("low", "high"))
    if low >= high:
        chosen.refuse("high_freq_factor", f"above low_freq_factor, {low:g}")

    def scaled(frequency: float) -> float:
        wavelength = 2 * math.pi / frequency
        smooth = min(max((original / wavelength - low) / (high - low), 0.0), 1.0)
        return (1 - smooth) * frequency / factor + smooth * frequency

    return tuple(scaled(frequency) for frequency in plain)
