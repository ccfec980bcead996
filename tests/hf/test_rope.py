"""RoPE of a config.json: what is computed, and what is refused by name.

tests/models/test_variants.py compares the values with transformers'.
"""

from typing import Any

import pytest

from osmium.config import ModelConfig
from osmium.errors import CheckpointError
from tests.models.build import hf_config
from tests.models.variants import BASE, MROPE, YARN

THETA = {"rope_theta": 1e7}


def read(top: dict[str, Any] | None = None, **text: Any) -> ModelConfig:
    """The base case with these keys in text_config, and `top` beside it."""
    config = hf_config(BASE)
    config["text_config"] |= text
    return ModelConfig.from_hf(config | (top or {}))


PLAIN = read()


@pytest.mark.parametrize(
    "kind", ["longrope", "proportional", "mrope", "ntk", "su", "axial", "Yarn"]
)
@pytest.mark.parametrize("name", ["rope_type", "type"])
@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_an_unsupported_type_is_refused_by_name(kind: str, name: str, place: str) -> None:
    values = {"rope_parameters": None, place: {name: kind, **THETA, **YARN}}
    with pytest.raises(CheckpointError, match=rf"{name} is '{kind}' in {place}.*yarn"):
        read(**values)


@pytest.mark.parametrize("kind", [None, 4, [], ["yarn"], {}, True])
def test_a_type_that_is_no_name_is_refused(kind: object) -> None:
    with pytest.raises(CheckpointError, match="rope_type"):
        read(rope_parameters={"rope_type": kind, **THETA})


def test_two_different_types_in_one_place_are_refused() -> None:
    with pytest.raises(CheckpointError, match="type is 'yarn' in rope_parameters"):
        read(rope_parameters={"rope_type": "default", "type": "yarn", **THETA, **YARN})


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_a_factor_without_a_type_is_refused(place: str) -> None:
    with pytest.raises(CheckpointError, match=rf"factor is 4.0 in {place}"):
        read(**{"rope_parameters": None, place: {**YARN, **THETA}})


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_parameters_per_layer_type_are_refused(place: str) -> None:
    values = {"full_attention": {"rope_type": "default", **THETA}, "linear_attention": None}
    with pytest.raises(CheckpointError, match=f"{place}.*full_attention"):
        read(**{"rope_parameters": None, place: values})


@pytest.mark.parametrize("place", ["rope_scaling", "rope_parameters"])
def test_a_scaling_beside_text_config_is_refused(place: str) -> None:
    scaling = {"type": "yarn", **YARN, **THETA}
    with pytest.raises(CheckpointError, match=f"{place}.*move it into text_config"):
        read({place: scaling})
    with pytest.raises(CheckpointError, match=f"{place}.*move it into text_config"):
        read({place: {"factor": 4.0}})
    both = read({place: scaling}, rope_scaling=scaling, rope_parameters=None)
    assert both == read(rope_scaling=scaling, rope_parameters=None)


@pytest.mark.parametrize(
    "top", [{"rope_theta": 1e7}, {"rope_parameters": {"rope_theta": 1e7}},
            {"partial_rotary_factor": 0.5}, {"rope_parameters": {"partial_rotary_factor": 0.5}}],
)  # fmt: skip
def test_a_value_beside_text_config_that_text_config_lacks_is_refused(top: dict[str, Any]) -> None:
    with pytest.raises(CheckpointError, match="in text_config"):
        read(top, rope_parameters=None)
    assert read(top) == PLAIN, "text_config has its own values"


def test_harmless_values_beside_text_config_are_ignored() -> None:
    top = {"rope_scaling": None, "rope_parameters": {"rope_type": "default", "factor": 1.0}}
    assert read(top) == PLAIN


@pytest.mark.parametrize("lost", [THETA, {"partial_rotary_factor": 0.5}])
def test_a_rope_scaling_that_drops_values_of_rope_parameters_is_refused(
    lost: dict[str, float],
) -> None:
    (key,) = lost
    with pytest.raises(CheckpointError, match=f"{key}.*put all keys into one"):
        read(rope_parameters=lost, rope_scaling={"type": "yarn", **YARN})
    kept = read(rope_parameters=lost, rope_scaling={"type": "yarn", **YARN, **lost})
    assert kept == read(rope_parameters={"rope_type": "yarn", **YARN, **lost})


def test_two_scalings_are_refused_unless_they_are_equal() -> None:
    yarn = {"rope_type": "yarn", **YARN, **THETA}
    with pytest.raises(CheckpointError, match="rope_scaling and in rope_parameters"):
        read(rope_parameters={**yarn, "factor": 2.0}, rope_scaling=yarn)
    assert read(rope_parameters=yarn, rope_scaling=yarn) == read(rope_parameters=yarn)


def test_the_position_sections_of_mrope_change_nothing_for_text() -> None:
    yarn = {"rope_type": "yarn", **YARN, **THETA}
    assert read(rope_parameters=yarn | MROPE) == read(rope_parameters=yarn)


@pytest.mark.parametrize(
    ("values", "context"),
    [
        ({"factor": 4.0, "original_max_position_embeddings": 1024}, 4096),
        ({"factor": 2.0}, 4096),
        ({"factor": 4.0, "original_max_position_embeddings": 32}, 2048),
        ({"factor": None, "original_max_position_embeddings": 512}, 2048),
        ({"factor": 2.5, "original_max_position_embeddings": 1000}, 2500),
    ],
)
def test_yarn_extends_the_context_to_factor_times_the_original(
    values: dict[str, Any], context: int
) -> None:
    yarn = read(rope_parameters={"rope_type": "yarn", **THETA, **values})
    assert (PLAIN.max_context, yarn.max_context) == (2048, context)


@pytest.mark.parametrize("kind", ["linear", "dynamic"])
def test_other_scalings_keep_the_context_of_the_config(kind: str) -> None:
    assert read(rope_parameters={"rope_type": kind, "factor": 4.0, **THETA}).max_context == 2048


def test_dynamic_scaling_changes_nothing_within_the_context() -> None:
    scaled = {"rope_type": "dynamic", "factor": 4.0, **THETA, "partial_rotary_factor": 0.25}
    assert read(rope_parameters=scaled) == PLAIN


@pytest.mark.parametrize(
    ("values", "name"),
    [
        ({"rope_type": "yarn"}, "factor"),
        ({"rope_type": "linear"}, "factor"),
        ({"rope_type": "dynamic"}, "factor"),
        ({"rope_type": "linear", "factor": None}, "factor"),
        ({"rope_type": "yarn", "factor": 0.5}, "factor"),
        ({"rope_type": "yarn", "factor": "4"}, "factor"),
        ({"rope_type": "yarn", "factor": True}, "factor"),
        ({"rope_type": "yarn", "factor": 1e5}, "factor"),
        ({"rope_type": "yarn", "factor": None, "original_max_position_embeddings": 4096}, "factor"),
        ({"rope_type": "yarn", **YARN, "original_max_position_embeddings": 0}, "original_max"),
        ({"rope_type": "yarn", **YARN, "original_max_position_embeddings": None}, "original_max"),
        ({"rope_type": "yarn", **YARN, "attention_factor": 0}, "attention_factor"),
        ({"rope_type": "yarn", **YARN, "attention_factor": -1.0}, "attention_factor"),
        ({"rope_type": "yarn", **YARN, "beta_fast": -1}, "beta_fast"),
        ({"rope_type": "yarn", **YARN, "beta_slow": False}, "beta_slow"),
        ({"rope_type": "yarn", **YARN, "mscale": float("nan")}, "mscale"),
        ({"rope_type": "yarn", **YARN, "mscale_all_dim": 10**400}, "mscale_all_dim"),
        ({"rope_type": "yarn", **YARN, "truncate": "no"}, "truncate"),
        ({"rope_type": "llama3", **YARN, "low_freq_factor": 1}, "high_freq_factor"),
        ({"rope_type": "llama3", **YARN, "low_freq_factor": 4, "high_freq_factor": 4},
         "high_freq_factor"),
        ({"rope_theta": 1.0}, "rope_theta"),
        ({"rope_theta": None}, "rope_theta"),
        ({"rope_theta": -1e7}, "rope_theta"),
        ({"partial_rotary_factor": None}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 1.5}, "partial_rotary_factor"),
        ({"partial_rotary_factor": 0.05}, "partial_rotary_factor"),  # three values
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_by_its_key(values: dict[str, Any], name: str) -> None:
    with pytest.raises(CheckpointError, match=name):
        read(rope_parameters={**THETA, **values})
