"""A server with the scripted model on a socket, and what the tests of client packages share."""

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

from pydantic import BaseModel

from osmium.server.limits import Limits
from tests.agents.script import answer_prompt
from tests.agents.scripted_model import scripted_engine
from tests.server.running import run_limited

__all__ = ["CONTEXT", "FILE_TOOLS", "PARIS", "WORD", "City", "live_client", "user"]

WORD = "osmium-0123456789ab"

CONTEXT = 2048

FILE_TOOLS: dict[str, dict[str, Any]] = {
    name: {
        "type": "object", "properties": {key: {"type": "string"} for key in keys},
        "required": keys,
    }
    for name, keys in (("read_file", ["path"]), ("write_file", ["path", "content"]))
}  # fmt: skip
"""Names of the tools, and the schemas of their arguments."""


class City(BaseModel):
    city: str
    population: int


PARIS = 'Describe Paris. As JSON: {"city": "Paris", "population": 2100000}'


def user(content: Any) -> list[Any]:
    return [{"role": "user", "content": content}]


@contextmanager
def live_client(connected: Callable[[int], AbstractContextManager[Any]]) -> Iterator[Any]:
    """The client that `connected` makes for the port of a server with the scripted model."""
    engine = scripted_engine(answer_prompt, context=CONTEXT)
    with run_limited(engine, Limits()) as server, connected(server.port) as client:
        yield client
