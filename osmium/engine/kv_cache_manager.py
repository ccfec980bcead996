"""Who owns which KV pages and which recurrent-state slot.

Knows numbers; the arrays they number are models.state's.
"""

from osmium.engine.request import Request

__all__ = ["KVCacheManager"]


class KVCacheManager:
    """Pages and slots, given out and taken back."""

    def __init__(self, pages: int, page: int, slots: int) -> None:
        self.page = page
        self.pages, self.slots = pages, slots
        self._pages = list(range(pages - 1, -1, -1))
        self._slots = list(range(slots - 1, -1, -1))

    @property
    def free_pages(self) -> int:
        return len(self._pages)

    @property
    def free_slots(self) -> int:
        return len(self._slots)

    def allocate_slot(self, request: Request) -> bool:
        """Give a request a slot; False if there is none."""
        if not self._slots:
            return False
        request.state_slot = self._slots.pop()
        return True

    def allocate_pages(self, request: Request, tokens: int) -> bool:
        """Give a request pages for its first `tokens` tokens; False if too few are free."""
        missing = -(-tokens // self.page) - len(request.pages)
        if missing > len(self._pages):
            return False
        request.pages.extend(self._pages.pop() for _ in range(missing))
        return True

    def free(self, request: Request) -> None:
        """Take back everything; what the model knew of the request is gone."""
        self._pages.extend(reversed(request.pages))
        request.pages = []
        if request.state_slot >= 0:
            self._slots.append(request.state_slot)
        request.state_slot = -1
        request.num_computed_tokens = 0
