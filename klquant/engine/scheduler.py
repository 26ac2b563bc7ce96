"""Who runs next: continuous batching over a fixed number of slots and latent pages. Plain data, no tensors.

A step is at most one chunk of prompts, several short ones or a part of a long one, and one token of every sequence
that has its prompt behind it. Sequences are admitted first come, first served, and a sequence gets all pages it may
ever need when it is admitted: nothing is ever preempted, and decoding cannot run out of memory. The price is that pages
for tokens that are never generated stay idle while their sequence runs.

What a prompt left behind can outlive its answer as a prefix: a longer prompt that begins with it computes only the
rest. A recurrent state cannot be taken back, so it is copied to another slot before the answer changes it. Prefixes
have slots of their own, and pages that nobody else wants: they make room, the least recently used first.
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
    keep: slot and pages stay with the sequence when it finishes. tokens: the prompt's, perhaps with others behind, if
    it may go on from a prefix and leave one. reused: tokens of the prefix that it went on from. copy: the slot that
    gets the state behind the prompt, from when the prompt's last chunk is scheduled. checked: its first token was one.
    """

    prompt: int
    most: int
    keep: bool = False
    tokens: list[int] | None = None
    computed: int = 0
    reused: int = 0
    slot: int | None = None
    copy: int | None = None
    checked: bool = False
    pages: list[int] = field(default_factory=list)


@dataclass(eq=False)
class Prefix:
    """What a prompt left: the slot whose state has seen its tokens and no others, and pages with their latents.

    whole: the slot knows the stream behind them as well, from which a first token is chosen.
    """

    tokens: list[int]
    slot: int
    pages: list[int]
    whole: bool


@dataclass(frozen=True)
class Chunk:
    """Positions [start, stop) of a sequence's prompt, none of one that is a prefix. `last`: its first token can be
    sampled after them."""

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
    """Holds every sequence from `add` to `finish`, `slots` at a time. `chunk`: most positions prefilled in a step.

    prefixes: how many are kept, of prompts of at least `least` tokens. Slots are numbered from 0 to slots + prefixes.
    """

    def __init__(
        self, *, slots: int, pages: int, page_tokens: int, chunk: int, prefixes: int = 0, least: int = 1
    ) -> None:  # fmt: skip
        self.slots, self.pages = Pool(slots + prefixes), Pool(pages)
        self.page_tokens, self.chunk = page_tokens, chunk
        self.waiting: deque[Sequence] = deque()
        self.prefilling: Sequence | None = None
        self.running: list[Sequence] = []
        self.prefixes: list[Prefix] = []  # the least recently used first
        self._most_held, self._held = slots, 0
        self._most_prefixes, self._copies, self._least = prefixes, 0, least

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
                self._begin_copy(sequence)
        return Step(tuple(chunks), decode) if chunks or decode else None

    def finish(self, sequence: Sequence, sound: bool = True) -> None:
        """Take it out, wherever it is; its slot and pages are free again unless it keeps them.

        What its prompt left becomes a prefix, or as much of it as was read, unless what it computed is not `sound`.
        """
        if sequence is self.prefilling:
            self.prefilling = None
            if sound and self._worth_keeping(sequence, sequence.computed) and self._room_for_a_prefix():
                slot, sequence.slot = sequence.slot, None
                self._held -= 1
                self._keep(sequence, sequence.computed, slot, whole=False)
        elif sequence in self.running:
            self.running.remove(sequence)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if sequence.copy is not None:
            self._end_copy(sequence, sound)
        if not sequence.keep:
            self.release(sequence)

    def release(self, sequence: Sequence) -> None:
        """Free slot and pages of a sequence that is not queued; its state is gone."""
        self.pages.give(sequence.pages)
        if sequence.slot is not None:
            self.slots.give([sequence.slot])
            self._held -= 1
        sequence.pages, sequence.slot, sequence.computed = [], None, 0

    def forget(self, prefix: Prefix) -> None:
        """Free what it holds."""
        self.prefixes.remove(prefix)
        self.slots.give([prefix.slot])
        self.pages.give(prefix.pages)

    def shortage(self, sequence: Sequence) -> str | None:
        """What is missing for it to run now, in words; None when nothing is, or prefixes can make room."""
        if sequence.slot is None and self._held == self._most_held:
            return f"all {self._most_held} slots are taken"
        pages = self._pages_for(sequence.most) - len(sequence.pages)
        pages -= self.pages.free + sum(len(prefix.pages) for prefix in self.prefixes)
        return f"{pages} cache pages of {self.page_tokens} tokens are missing" if pages > 0 else None

    def _next_to_prefill(self) -> Sequence | None:
        """Whose prompt has begun, or else the first in the queue if it can run now."""
        if self.prefilling is None and self.waiting and self.shortage(self.waiting[0]) is None:
            self.prefilling = self.waiting.popleft()
            self._admit(self.prefilling)
        return self.prefilling

    def _admit(self, sequence: Sequence) -> None:
        if sequence.slot is None:
            self._held += 1
            if prefix := self._prefix_of(sequence):
                # Its slot and pages are the sequence's now.
                self.prefixes.remove(prefix)
                sequence.slot, sequence.pages = prefix.slot, prefix.pages
                sequence.computed = sequence.reused = len(prefix.tokens)
            else:
                (sequence.slot,) = self.slots.take(1)
        more = max(self._pages_for(sequence.most) - len(sequence.pages), 0)
        while more > self.pages.free:
            self.forget(self.prefixes[0])
        sequence.pages = sequence.pages + self.pages.take(more)

    def _prefix_of(self, sequence: Sequence) -> Prefix | None:
        """The longest that the prompt begins with; it may be all of it."""
        if sequence.tokens is None:
            return None
        found = [
            prefix for prefix in self.prefixes
            if (n := len(prefix.tokens)) <= sequence.prompt - (not prefix.whole)
            and sequence.tokens[:n] == prefix.tokens
        ]  # fmt: skip
        return max(found, key=lambda prefix: len(prefix.tokens), default=None)

    def _worth_keeping(self, sequence: Sequence, count: int) -> bool:
        """Whether a prompt's first tokens are, and nobody keeps, or is about to keep, the same."""
        if sequence.tokens is None or count < max(self._least, 1):
            return False
        tokens = sequence.tokens[:count]
        about = [q.tokens[: q.prompt] for q in self.running if q.copy is not None and q.prompt == count]
        return tokens not in about and all(prefix.tokens != tokens for prefix in self.prefixes)

    def _room_for_a_prefix(self) -> bool:
        """Whether there may be one more, once the least recently used has gone."""
        if self._copies + len(self.prefixes) == self._most_prefixes:
            if not self.prefixes:
                return False
            self.forget(self.prefixes[0])
        return True

    def _begin_copy(self, sequence: Sequence) -> None:
        """Find a slot for the state behind the prompt, if it is worth one."""
        if self._most_prefixes and self._worth_keeping(sequence, sequence.prompt) and self._room_for_a_prefix():
            (sequence.copy,) = self.slots.take(1)
            self._copies += 1

    def _end_copy(self, sequence: Sequence, sound: bool) -> None:
        """Make a prefix of the copied state, if nothing is wrong with it."""
        slot, sequence.copy = sequence.copy, None
        self._copies -= 1
        if sound and sequence.checked:
            self._keep(sequence, sequence.prompt, slot, whole=True)
        else:
            self.slots.give([slot])

    def _keep(self, sequence: Sequence, count: int, slot: int, whole: bool) -> None:
        """Make a prefix of the sequence's first tokens, with its pages for them."""
        own = self._pages_for(count)
        self.prefixes.append(Prefix(sequence.tokens[:count], slot, sequence.pages[:own], whole))
        sequence.pages = sequence.pages[own:]

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)
