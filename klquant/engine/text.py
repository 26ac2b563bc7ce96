"""Token ids → text as it becomes final: never half a character, never the beginning of a stop text."""

from collections.abc import Callable, Sequence

# What an incomplete character can decode to: three bytes of four, each on its own.
MOST_PENDING = 3
REPLACEMENT = "\ufffd"


class Detokenizer:
    """Text of a growing list of ids, by decoding a short window of it again and again.

    The window starts at a token whose text is complete, so that decoders that look at their left neighbour (a space
    before a word, say) see it.
    """

    def __init__(self, decode: Callable[[Sequence[int]], str]) -> None:
        self._decode = decode
        self._window: list[int] = []
        self._given = 0  # characters of the window's text that were returned

    def push(self, token: int) -> str:
        """Text that the token completes."""
        self._window.append(token)
        text = self._decode(self._window)
        whole = text
        for _ in range(MOST_PENDING):
            whole = whole.removesuffix(REPLACEMENT)
        new = whole[self._given :]
        self._given = max(self._given, len(whole))
        if whole == text:
            self._window = self._window[-1:]
            self._given = len(self._decode(self._window))
        return new

    def flush(self) -> str:
        """What is left at the end: bytes that never became a character, as U+FFFD."""
        rest = self._decode(self._window)[self._given :]
        self._given += len(rest)
        return rest


class StopText:
    """Holds back text while it may become one of `stops`, and ends before the first that appears."""

    def __init__(self, stops: Sequence[str]) -> None:
        self._stops = tuple(stops)
        self._held = ""
        self.stopped = False

    def push(self, text: str) -> str:
        """Text that is final. After a stop text `stopped` is set and nothing follows."""
        if self.stopped:
            return ""
        self._held += text
        found = [at for stop in self._stops if (at := self._held.find(stop)) >= 0]
        if found:
            self.stopped = True
            return self._take(min(found))
        keep = max((overlap(self._held, stop) for stop in self._stops), default=0)
        return self._take(len(self._held) - keep)

    def flush(self) -> str:
        """What was held back and did not become a stop text."""
        return "" if self.stopped else self._take(len(self._held))

    def _take(self, count: int) -> str:
        final, self._held = self._held[:count], self._held[count:]
        return final


def overlap(text: str, stop: str) -> int:
    """Length of the longest end of `text` that is a beginning of `stop`, but not all of it."""
    return next((n for n in range(min(len(text), len(stop) - 1), 0, -1) if text.endswith(stop[:n])), 0)
