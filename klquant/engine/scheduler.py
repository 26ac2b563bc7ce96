"""Who runs next: continuous batching over a fixed number of slots and latent pages. Plain data, no tensors.

A step is at most one chunk of prompts, several short ones or a part of a long one, and one token of every sequence
that has its prompt behind it. Sequences are admitted first come, first served, and a sequence gets all pages it may
ever need when it is admitted: nothing is ever preempted, and decoding cannot run out of memory. The price is that pages
for tokens that are never generated stay idle while their sequence runs.
"""

from collections import deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from klquant.errors import UserError


class Pool:
    """Numbers 0 … count − 1, each held by at most one owner."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))

    @property
    def free(self) -> int:
        return len(self._free)

    def take(self, count: int) -> list[int]:
        assert count <= self.free, "more than are free"
        return [self._free.pop() for _ in range(count)]

    def give(self, numbers: Iterable[int]) -> None:
        self._free += numbers
        assert len(self._free) <= self.count, "given back twice"


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer, as numbers of tokens. A session's sequence comes back with a longer `prompt`.

    most: tokens whose state may have to be held. computed: tokens whose state is held once what was scheduled has run.
    keep: slot and pages stay with the sequence when it finishes.
    """

    prompt: int
    most: int
    keep: bool = False
    computed: int = 0
    slot: int | None = None
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Positions [start, stop) of a sequence's prompt. `last`: its first token can be sampled after them."""

    sequence: Sequence
    start: int
    stop: int

    @property
    def last(self) -> bool:
        return self.stop == self.sequence.prompt


@dataclass(frozen=True)
class Step:
    """Of the chunks to prefill all but the last one end a prompt."""

    prefill: tuple[Chunk, ...]
    decode: tuple[Sequence, ...]


class Scheduler:
    """Holds every sequence from `add` to `finish`. `chunk`: most positions prefilled in a step."""

    def __init__(self, *, slots: int, pages: int, page_tokens: int, chunk: int) -> None:
        self.slots, self.pages = Pool(slots), Pool(pages)
        self.page_tokens, self.chunk = page_tokens, chunk
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []

    def check(self, sequence: Sequence) -> None:
        """Raises UserError when it could not run even alone."""
        needed = self._pages_for(sequence.most)
        if needed > self.pages.count:
            tokens = self.pages.count * self.page_tokens
            raise UserError(
                f"a request of {sequence.most} tokens (prompt and max_new_tokens) needs {needed} cache pages of "
                f"{self.page_tokens} tokens, the engine has {self.pages.count}: {needed - self.pages.count} missing; "
                f"shorten it to {tokens} tokens or give the engine more cache"
            )

    def add(self, sequence: Sequence) -> None:
        """Queue it. Raises UserError when it could not run even alone."""
        self.check(sequence)
        self.waiting.append(sequence)

    def schedule(self) -> Step | None:
        """The next step, counted as computed; None when nothing can run now."""
        decode = tuple(s for s in self.running if s.computed < s.most)
        for sequence in decode:
            sequence.computed += 1
        chunks, room = [], self.chunk
        while room and (sequence := self._next_to_prefill()):
            start, stop = sequence.computed, min(sequence.computed + room, sequence.prompt)
            chunks.append(Chunk(sequence, start, stop))
            sequence.computed, room = stop, room - (stop - start)
            if chunks[-1].last:
                self.prefilling = None
                self.running.append(sequence)
        return Step(tuple(chunks), decode) if chunks or decode else None

    def finish(self, sequence: Sequence) -> None:
        """Take it out, wherever it is; its slot and pages are free again unless it keeps them."""
        if sequence is self.prefilling:
            self.prefilling = None
        elif sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if not sequence.keep:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free slot and pages of a sequence that is not queued; its state is gone."""
        self.pages.give(sequence.pages)
        if sequence.slot is not None:
            self.slots.give([sequence.slot])
        sequence.pages, sequence.slot, sequence.computed = [], None, 0

    def shortage(self, sequence: Sequence) -> str | None:
        """What is missing for it to run now, in words; None when nothing is."""
        if sequence.slot is None and not self.slots.free:
            return f"all {self.slots.count} slots are taken"
        pages = self._pages_for(sequence.most) - len(sequence.pages)
        if pages > self.pages.free:
            return f"{pages - self.pages.free} cache pages of {self.page_tokens} tokens are missing"
        return None

    def _next_to_prefill(self) -> Sequence | None:
        """Whose prompt has begun, or else the first in the queue if it can run now."""
        if self.prefilling is None and self.waiting and self.shortage(self.waiting[0]) is None:
            self.prefilling = self.waiting.popleft()
            self._admit(self.prefilling)
        return self.prefilling

    def _admit(self, sequence: Sequence) -> None:
        if sequence.slot is None:
            (sequence.slot,) = self.slots.take(1)
        more = self._pages_for(sequence.most) - len(sequence.pages)
        sequence.pages = sequence.pages + self.pages.take(max(more, 0))

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
