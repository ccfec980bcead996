"""Allocation of KV pages and state slots to requests.

Only page and slot numbers; models.state holds the arrays.
"""

from osmium.engine.request import Request

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """The free KV pages and state slots."""

    def __init__(self, num_pages: int, page_size: int, num_slots: int) -> None:
        """`page_size` is tokens per page."""
        self.page_size = page_size
        self.num_pages, self.num_slots = num_pages, num_slots
        self._free_pages = list(range(num_pages - 1, -1, -1))
        self._free_slots = list(range(num_slots - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._free_pages)

    @property
    def usage(self) -> float:
        """Allocated pages / all pages, 0 to 1."""
        return 1 - len(self._free_pages) / self.num_pages if self.num_pages else 0.0

    @property
    def free_slots(self) -> int:
        return len(self._free_slots)

    def allocate_slot(self, request: Request) -> bool:
        """Allocate a state slot to a request; False if none is free."""
        if not self._free_slots:
            return False
        request.state_slot = self._free_slots.pop()
        return True

    def allocate_pages(self, request: Request, tokens: int) -> bool:
        """Allocate pages for a request's first `tokens` tokens; False if too few are free."""
        missing = -(-tokens // self.page_size) - len(request.pages)
        if missing > len(self._free_pages):
            return False
        request.pages.extend(self._free_pages.pop() for _ in range(missing))
        return True

    def free(self, request: Request) -> None:
        """Free a request's pages and state slot; none of its tokens counts as computed any more."""
        self._free_pages.extend(reversed(request.pages))
        request.pages = []
        if request.state_slot >= 0:
            self._free_slots.append(request.state_slot)
        request.state_slot = -1
        request.num_computed_tokens = 0
