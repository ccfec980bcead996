"""Responses that are kept in memory, for previous_response_id and GET /v1/responses/{id}."""

import threading
from collections import Counter, OrderedDict
from dataclasses import dataclass
from typing import Any

from osmium.errors import RequestError
from osmium.server.limits import shown
from osmium.server.responses_input import Item

__all__ = ["KeptResponse", "ResponseStore"]

MAX_RESPONSES = 1024
MAX_BYTES = 64 << 20
"""Bytes of all kept responses; the items that conversations share count in each of them."""


@dataclass(frozen=True)
class KeptResponse:
    """A response and all items before it."""

    body: dict[str, Any]
    inputs: tuple[Item, ...]
    """The items of its prompt, those of the responses before it included."""
    context_bytes: int
    """About the bytes of all items."""
    body_bytes: int
    """About the bytes of the request's other fields, which the response repeats."""

    @property
    def num_bytes(self) -> int:
        return self.context_bytes + self.body_bytes

    @property
    def items(self) -> tuple[Item, ...]:
        """The conversation so far."""
        return (*self.inputs, *self.body["output"])


class ResponseStore:
    """The most recently used responses.  Safe to use on any thread."""

    def __init__(self, max_responses: int = MAX_RESPONSES, max_bytes: int = MAX_BYTES) -> None:
        self._max_responses, self._max_bytes = max_responses, max_bytes
        self._kept: OrderedDict[str, KeptResponse] = OrderedDict()
        self._items: dict[str, Item] = {}
        """Items of the kept responses, by id."""
        self._uses: Counter[str] = Counter()
        """Kept responses that have an item, by its id."""
        self._num_bytes = 0
        self._lock = threading.Lock()

    def keep(self, kept: KeptResponse) -> None:
        """Keep a response; the least recently used ones are dropped, or it itself if too large."""
        with self._lock:
            self._kept[kept.body["id"]] = kept
            self._num_bytes += kept.num_bytes
            for item in kept.items:
                self._items[item["id"]] = item
                self._uses[item["id"]] += 1
            while len(self._kept) > self._max_responses or self._num_bytes > self._max_bytes:
                self._drop(next(iter(self._kept)))

    def previous(self, response_id: str) -> KeptResponse:
        """The response that a request continues.  Raises: RequestError, with status 400."""
        kept = self._find(response_id)
        if kept is None:
            raise RequestError(
                f"previous_response_id is {shown(response_id)}; no such response is kept. Those "
                f"with `store` false are not, nor older ones than the last {self._max_responses}, "
                "and none after a restart. Send the whole conversation in input.",
                param="previous_response_id",
                code="previous_response_not_found",
            )
        return kept

    def get(self, response_id: str) -> KeptResponse:
        """A response by its id.  Raises: RequestError with status 404."""
        kept = self._find(response_id)
        if kept is None:
            raise _missing(response_id)
        return kept

    def delete(self, response_id: str) -> None:
        """Delete a response.  Raises: RequestError with status 404."""
        with self._lock:
            if response_id not in self._kept:
                raise _missing(response_id)
            self._drop(response_id)

    def item(self, item_id: str) -> Item | None:
        """An item of a kept response, or None."""
        with self._lock:
            return self._items.get(item_id)

    def _find(self, response_id: str) -> KeptResponse | None:
        with self._lock:
            kept = self._kept.get(response_id)
            if kept is not None:
                self._kept.move_to_end(response_id)
            return kept

    def _drop(self, response_id: str) -> None:
        kept = self._kept.pop(response_id)
        self._num_bytes -= kept.num_bytes
        for item in kept.items:
            self._uses[item["id"]] -= 1
            if not self._uses[item["id"]]:
                del self._uses[item["id"]], self._items[item["id"]]


def _missing(response_id: str) -> RequestError:
    return RequestError(
        f"No response with the id {shown(response_id)} is kept: it has `store` false, still runs, "
        "was deleted, or is one of the oldest. Responses are lost at a restart.",
        param="response_id",
        code="response_not_found",
        status=404,
    )
