"""How many requests may be under way at once, as the server bears it."""

import asyncio


class Limit:
    """How many requests may be under way at once: halves on a 429, grows back by one for each round of good replies.

    Several 429s to requests that were under way together halve it once.
    """

    def __init__(self, most: int, bound: float | None = None) -> None:
        self.most, self.bound = most, float(most) if bound is None else bound
        self.under_way, self.era = 0, 0
        self._free = asyncio.Condition()

    async def __aenter__(self) -> int:
        """Wait for a place; the era is handed to `shrink`."""
        async with self._free:
            await self._free.wait_for(lambda: self.under_way < int(self.bound))
            self.under_way += 1
            return self.era

    async def __aexit__(self, *_: object) -> None:
        async with self._free:
            self.under_way -= 1
            self._free.notify(max(0, int(self.bound) - self.under_way))

    def shrink(self, era: int) -> None:
        if era == self.era:
            self.bound, self.era = max(1.0, self.bound / 2), self.era + 1

    def grow(self) -> None:
        self.bound = min(self.most, self.bound + 1 / self.bound)
