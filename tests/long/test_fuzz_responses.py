"""Random responses for the response parser: equal results at every split, valid arguments."""

import random

from tests.text.responses import (
    HERMES,
    XML,
    fuzz,
    parse,
    random_calls,
    splits,
    write_hermes,
    write_xml,
)

RESPONSES = 300_000
CALLS = 30_000


def test_random_responses_give_the_same_result_at_every_split(seed: int) -> None:
    fuzz(seed, RESPONSES)


def test_calls_come_back_as_they_were_written(seed: int) -> None:
    for case in range(CALLS):
        random_ = random.Random(f"{seed} {case}")
        calls = random_calls(random_)
        for form, write in ((XML, write_xml), (HERMES, write_hermes)):
            text = write(calls)
            for pieces in (text, *splits(text, random_, 1)):
                result = parse(pieces, form=form)
                assert result.calls == calls and not result.content, f"case {case}: {text!r}"
