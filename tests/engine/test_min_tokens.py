"""The mask of min_tokens, alone and over another mask."""

import numpy as np
import numpy.typing as npt
import pytest

from osmium.engine.min_tokens import EndMask, drop_spent_mask, end_mask, has_spent_mask
from osmium.engine.request import Request, SamplingParams
from osmium.errors import RequestError

VOCAB = 70


class Only:
    """A mask that allows the same tokens each time."""

    def __init__(self, *tokens: int) -> None:
        self.tokens, self.pushed = tokens, list[int]()

    def fill(self, words: npt.NDArray[np.int32]) -> None:
        words[:] = 0
        for token in self.tokens:
            words.view(np.uint32)[token // 32] |= np.uint32(1 << token % 32)

    def push(self, token: int) -> None:
        self.pushed.append(token)

    def completion(self) -> tuple[int, ...]:
        return ()


def allowed(mask: EndMask) -> set[int]:
    words = np.full(-(-VOCAB // 32), 12345, np.int32)
    mask.fill(words)
    return {t for t in range(VOCAB) if words[t // 32] >> t % 32 & 1}


@pytest.mark.parametrize("ends", [{0}, {31, 32, 63, 64, 69}, {5, 6, 7}])
def test_ends_are_forbidden_for_min_tokens_tokens(ends: set[int]) -> None:
    mask = EndMask(ends, 2)
    for token in (1, 2):
        assert allowed(mask) == set(range(VOCAB)) - ends
        assert not mask.spent
        mask.push(token)
    assert mask.spent
    assert allowed(mask) == set(range(VOCAB))


def test_another_mask_holds_too_and_wins_where_it_allows_only_ends() -> None:
    inner = Only(3, 40, 69)
    mask = EndMask({69}, 2, inner)
    assert allowed(mask) == {3, 40}
    mask.push(3)
    inner.tokens = (69,)
    assert allowed(mask) == {69}
    mask.push(69)
    assert (allowed(mask), inner.pushed) == ({69}, [3, 69])


def test_a_spent_mask_leaves_the_other_one() -> None:
    inner = Only(3)
    mask = EndMask({1}, 1, inner)
    request = Request([0], SamplingParams(), lambda event: None, None, 0, token_mask=mask)
    for spent in (False, True):
        assert has_spent_mask(request) is spent
        drop_spent_mask(request)
        assert request.token_mask is (inner if spent else mask)
        mask.push(3)


def test_a_mask_is_made_only_for_tokens_that_can_end_a_response() -> None:
    params = SamplingParams(min_tokens=2)
    made = end_mask(params, None, (4, 5), (6,), VOCAB)
    assert isinstance(made, EndMask) and allowed(made) == set(range(VOCAB)) - {4, 5, 6}
    assert end_mask(params, None, (), (), VOCAB) is None
    assert end_mask(SamplingParams(), None, (4,), (), VOCAB) is None
    ignoring = SamplingParams(min_tokens=2, ignore_eos=True, stop_token_ids=(9,))
    made = end_mask(ignoring, None, (4,), (), VOCAB)
    assert isinstance(made, EndMask) and allowed(made) == set(range(VOCAB)) - {9}
    with pytest.raises(RequestError) as caught:
        end_mask(params, None, range(VOCAB), (), VOCAB)
    assert caught.value.param == "min_tokens"
