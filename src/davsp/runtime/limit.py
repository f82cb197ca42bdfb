"""How many requests may be under way at once, as the server bears it."""

import asyncio
from collections import deque
from types import TracebackType

WINDOW = 64  # replies after which a share of 429s is looked at
MANY = 0.5  # a share of 429s above this is not taken for chance before one at a time was tried
FEW = 0.2  # one below this costs less than finding out why


class Limit:
    """How many requests may be under way at once. What a 429 means is found out, not assumed: too many at once, or nothing.

    Where many are refused, half as many are tried (`_trial`). If hardly any are refused then, the server is *crowded*: the lower
    bound stays, a further 429 takes one away, and it grows by a sixteenth of a request for each round of good replies. If as
    many are refused as before, fewer requests are no help: the bound goes back, and that share is `usual`. Almost nothing but
    429s is a crowd at once. The bound and what was learnt stay from one `ask` to the next.

    Attributes:
        most: the highest bound, 1 or more.
        bound: requests under way at most, 1 to `most`; its whole part counts.
        crowded: fewer requests are refused more seldom.
        usual: the share of 429s that no lower bound saves, 0 to 1; None while it is being counted.
        under_way: requests that hold a place.
    """

    def __init__(self, most: int) -> None:
        self.most, self.bound, self.crowded, self.under_way = most, float(most), False, 0
        self.usual: float | None = 0.0
        self._trial: float | None = None  # the share of 429s at twice this bound, while half of it is tried
        self._gone = False  # an answer was given up since the last good reply
        self._waiting: deque[asyncio.Future[None]] = deque()
        self.era, self._replies, self._refused, self._excess = 0, 0, 0, 0.0

    def place(self, first: bool = False) -> "Place":
        """A place to wait for (`async with`); with `first` before all that wait already, for what is asked again."""
        return Place(self, first)

    @property
    def least(self) -> bool:
        """Even one at a time is too many: what is refused then keeps its place while it waits, or all would be refused in turn."""
        return self.crowded and self.bound < 2 and not self._gone

    def gave_up(self) -> None:
        """An answer was refused at every attempt: waiting with a place held is no help until something is good again."""
        self._gone = True

    def reply(self, refused: bool, era: int, waited: bool = False) -> None:
        """Count a reply that says something of the load: a 429, or a good one.

        Args:
            refused: it was a 429.
            era: in which it was sent, as `Place` gave it; one of an earlier bound says nothing of this one.
            waited: its place was kept while it waited before. One at a time, only such replies tell a server that refuses by
                chance from one that takes so many a second.
        """
        if not refused:
            self._gone = False
            if self._trial is None:
                self.bound = min(self.most, self.bound + (1 / 16 if self.crowded else 1) / self.bound)
            self.crowded = self.crowded and self.bound < self.most
        if era != self.era or (self.crowded and self.bound < 2 and not waited):
            return
        self._replies, self._refused = self._replies + 1, self._refused + refused
        if self.usual is not None:  # 429s beyond the usual share and a fifth, a sum that never falls below 0
            self._excess = max(0.0, self._excess + refused - self.usual - 0.2)
        if self._refused >= 8 and self._refused >= 0.85 * (self._replies + self.under_way):
            self._halve()
        elif self.crowded and refused and self.bound >= 2 and self._excess > (0.5 if self.usual == 0 else 3.0):
            self._next(self.bound - 1)
        elif self._replies >= self._window() or (
            self._replies >= WINDOW / 2 and self._refused > MANY * self._replies and self.bound >= 2
        ):
            self._look(self._refused / self._replies)

    def _window(self) -> float:
        return WINDOW / 8 if self.least else WINDOW / 2 if self.crowded else WINDOW

    def _look(self, share: float) -> None:
        """At the end of a window: what its share of 429s says."""
        trial, self._trial = self._trial, None
        if trial is not None:
            if share > MANY:
                self._halve()
            elif share < trial / 2:
                self.crowded, self.usual = True, share if share > 0.02 else 0.0
                self._next(self.bound)
            else:
                self.usual = (share + trial) / 2
                self._next(2 * self.bound)
        elif self.crowded:
            if self.bound < 2 and share > FEW:  # one at a time, and still refused
                self.crowded, self.usual = False, share
                self._next(2 * self.bound)
            elif share > MANY:
                self._halve()
            else:
                usual = share if self.usual is None else 0.7 * self.usual + 0.3 * share
                self.usual = usual if usual > 0.02 else 0.0
                self._next(self.bound)
        elif share > max(MANY, (self.usual or 0.0) + 0.25) and self.bound >= 2:
            self._halve()
        elif share > max(FEW, (self.usual or 0.0) + 0.25) and self.bound >= 2:
            self._next(self.bound / 2)
            self._trial = share
        else:
            self._next(self.bound)

    def _halve(self) -> None:
        self.crowded, self.usual, self._trial = True, 0.0 if self.bound < 4 else None, None
        self._next(self.bound / 2)

    def _next(self, bound: float) -> None:
        """Begin to count anew, at another bound or the same."""
        self.bound = max(1.0, min(self.most, bound))
        self.era += 1
        self._replies, self._refused, self._excess = 0, 0, 0.0

    def _free(self) -> None:
        """Hand free places to those that wait."""
        while self._waiting and self.under_way < int(self.bound):
            turn = self._waiting.popleft()
            if not turn.done():
                self.under_way += 1
                turn.set_result(None)


class Place:
    """One of the places under a limit."""

    def __init__(self, limit: Limit, first: bool) -> None:
        self._limit, self._first = limit, first

    async def __aenter__(self) -> int:
        """Wait for it.

        Returns:
            The era, for `Limit.reply`.
        """
        limit, turn = self._limit, asyncio.get_running_loop().create_future()
        (limit._waiting.appendleft if self._first else limit._waiting.append)(turn)
        limit._free()
        try:
            await turn
        except asyncio.CancelledError:
            if turn.done() and not turn.cancelled():
                limit.under_way -= 1
            limit._free()
            raise
        return limit.era

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._limit.under_way -= 1
        self._limit._free()
