"""Whether a prompt leaves the reasoning open."""

from osmium.text.reasoning import starts_in_reasoning


def test_a_prompt_with_an_open_think_tag_starts_in_reasoning() -> None:
    assert starts_in_reasoning("<|im_start|>assistant\n<think>\n")
    assert not starts_in_reasoning("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    assert not starts_in_reasoning("<|im_start|>assistant\n")
