"""Who runs next: continuous batching over a fixed number of slots and latent pages. Plain data, no tensors.

A step is at most one chunk of prompts, several short ones or a part of a long one, and one token of every sequence
that has its prompt behind it. Sequences are admitted first come, first served, and a sequence gets all pages it may
ever need when it is admitted: nothing is ever preempted, and decoding cannot run out of memory. The price is that pages
for tokens that are never generated stay idle while their sequence runs.

What a prompt left behind can outlive its answer as a prefix, for prompts that begin with it: they compute only the
rest. A recurrent state cannot be taken back, so a prefix has a slot with a copy of it, made before anything changes it,
and whoever goes on from there copies it again. Pages of latents are shared; only the one that a prefix ends within has
to be copied. A prompt leaves a prefix where it ends, and where it parts from another that began alike. Prefixes hold
slots of their own and pages that nobody else wants: they make room, the least recently used first.
"""

from collections import Counter, deque
from collections.abc import Iterable
from dataclasses import dataclass, field

from klquant.errors import UserError


class Pool:
    """Numbers 0 … count − 1, each held by those who took or share it."""

    def __init__(self, count: int) -> None:
        self.count = count
        self._free = list(range(count - 1, -1, -1))
        self._owners = [0] * count

    @property
    def free(self) -> int:
        return len(self._free)

    def owners(self, number: int) -> int:
        return self._owners[number]

    def take(self, count: int) -> list[int]:
        assert count <= self.free, "more than are free"
        taken = [self._free.pop() for _ in range(count)]
        self.share(taken)
        return taken

    def share(self, numbers: Iterable[int]) -> None:
        """Hold numbers that are held once more."""
        for number in numbers:
            self._owners[number] += 1

    def give(self, numbers: Iterable[int]) -> None:
        """Hold them no longer; those that nobody holds are free."""
        for number in numbers:
            assert self._owners[number], "given back twice"
            self._owners[number] -= 1
            if not self._owners[number]:
                self._free.append(number)


@dataclass(eq=False)
class Prefix:
    """What a prompt left: the slot whose state has seen its tokens and no others, and the pages with their latents.

    whole: the slot knows the stream behind them as well, from which a first token is chosen.
    """

    tokens: list[int]
    slot: int
    pages: list[int]
    whole: bool


@dataclass(frozen=True)
class Source:
    """What to copy before a sequence goes on from a prefix: the state of a slot, and a page to a page of its own."""

    slot: int
    pages: tuple[int, int] | None


@dataclass(eq=False)
class Sequence:
    """A prompt and its answer, as numbers of tokens. A session's sequence comes back with a longer `prompt`.

    most: tokens whose state may have to be held. computed: tokens whose state is held once what was scheduled has run.
    keep: slot and pages stay with the sequence when it finishes. tokens: the prompt's, perhaps with others behind, if
    it may go on from a prefix and leave some. reused: tokens of the prefix that it went on from, which is `origin`.
    branch: where it parts from another, or 0. left: its prefixes. checked: its first token was one.
    """

    prompt: int
    most: int
    keep: bool = False
    tokens: list[int] | None = None
    computed: int = 0
    reused: int = 0
    origin: Prefix | None = None
    source: Source | None = None
    branch: int = 0
    left: list[Prefix] = field(default_factory=list)
    checked: bool = False
    slot: int | None = None
    pages: list[int] = field(default_factory=list)


@dataclass(frozen=True)
class Chunk:
    """Positions [start, stop) of a sequence's prompt, none of one that is a prefix. `last`: its first token can be
    sampled after them. `left`: what the state behind them is to be copied to the slot of."""

    sequence: Sequence
    start: int
    stop: int
    left: Prefix | None = None

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

    prefixes: how many are kept, each of at least `least` tokens. Slots are numbered from 0 to slots + prefixes − 1.
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
        self._most_prefixes, self._least = prefixes, least
        self._made: list[Prefix] = []  # by the step that is being scheduled, and usable from the next on

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
            chunk = self._chunk(sequence, room)
            chunks.append(chunk)
            sequence.computed, room = chunk.stop, room - (chunk.stop - chunk.start)
            if chunk.last:
                self.prefilling = None
                self.running.append(sequence)
            else:
                break  # it goes on in the next step, perhaps because the state behind the chunk is copied first
        self.prefixes += self._made
        self._made = []
        return Step(tuple(chunks), decode) if chunks or decode else None

    def finish(self, sequence: Sequence, sound: bool = True) -> None:
        """Take it out, wherever it is; its slot and pages are free again unless it keeps them.

        Its prefixes stay if its first token was one, and as much of a prompt as was read becomes one, unless what it
        computed is not `sound`: then what it went on from may have been wrong already, and is forgotten as well.
        """
        if sequence is self.prefilling:
            self.prefilling = None
            if sound:
                self._keep_what_was_read(sequence)
        elif sequence in self.running:
            self.running.remove(sequence)
            if sound and not sequence.checked:
                self._forget_any(sequence.left)
        elif sequence in self.waiting:
            self.waiting.remove(sequence)
        if not sound:
            self._forget_any([*sequence.left, sequence.origin])
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
        (self._made if prefix in self._made else self.prefixes).remove(prefix)
        self.slots.give([prefix.slot])
        self.pages.give(prefix.pages)

    def seclude(self, sequence: Sequence) -> bool:
        """Let it have its pages for itself, so that they can be written to again: its prefixes are forgotten, and pages
        that others hold give way to free ones. False where there are too few."""
        self._forget_any([*sequence.left, sequence.origin])
        shared = [i for i, page in enumerate(sequence.pages) if self.pages.owners(page) > 1]
        if len(shared) > self.pages.free:
            return False
        own = self.pages.take(len(shared))
        self.pages.give(sequence.pages[i] for i in shared)
        for i, page in zip(shared, own, strict=True):
            sequence.pages[i] = page
        return True

    def shortage(self, sequence: Sequence) -> str | None:
        """What is missing for it to run now, in words; None when nothing is, or prefixes can make room."""
        if sequence.slot is None and self._held == self._most_held:
            return f"all {self._most_held} slots are taken"
        pages = self._pages_for(sequence.most) - len(sequence.pages) - self.pages.free
        if pages > 0 and self.prefixes:
            origin = self._origin_of(sequence)
            shared = set(self._shared(origin)) if origin else set()
            holders = Counter(page for prefix in self.prefixes for page in prefix.pages)
            idle = {page for page, count in holders.items() if count == self.pages.owners(page)}
            pages -= len(shared) + len(idle - shared)
        return f"{pages} cache pages of {self.page_tokens} tokens are missing" if pages > 0 else None

    def _next_to_prefill(self) -> Sequence | None:
        """Whose prompt has begun, or else the first in the queue if it can run now."""
        if self.prefilling or not self.waiting:
            return self.prefilling
        first = self.waiting[0]
        # What this step reads for another it need not read as well.
        if self.shortage(first) is None and not any(_begins(first, prefix) for prefix in self._made):
            self.prefilling = self.waiting.popleft()
            self._admit(self.prefilling)
        return self.prefilling

    def _admit(self, sequence: Sequence) -> None:
        if sequence.slot is None:
            self._held += 1
            (sequence.slot,) = self.slots.take(1)
            if origin := self._origin_of(sequence):
                sequence.pages = self._shared(origin)
                self.pages.share(sequence.pages)
                sequence.origin, sequence.computed = origin, len(origin.tokens)
                sequence.reused = sequence.computed
                self.prefixes.remove(origin)
                self.prefixes.append(origin)
            sequence.branch = self._branch_of(sequence)
        more = max(self._pages_for(sequence.most) - len(sequence.pages), 0)
        while more > self.pages.free:
            self.forget(next((prefix for prefix in self.prefixes if self._frees(prefix)), self.prefixes[0]))
        whole = len(sequence.pages)
        sequence.pages = sequence.pages + self.pages.take(more)
        if origin := sequence.origin:
            # Even if it has just been forgotten: copies are made before anything else is.
            ends_within = len(origin.pages) > whole
            sequence.source = Source(origin.slot, (origin.pages[-1], sequence.pages[whole]) if ends_within else None)

    def _chunk(self, sequence: Sequence, room: int) -> Chunk:
        """The next of its prompt, and what it leaves."""
        start, stop = sequence.computed, min(sequence.computed + room, sequence.prompt)
        if start < sequence.branch:
            stop = min(stop, sequence.branch)
        left, whole = None, stop == sequence.prompt
        if (whole or stop == sequence.branch) and self._worth_keeping(sequence, stop):
            if whole and sequence.origin in self.prefixes and sequence.origin.whole:
                # The next turn goes on from here: to go back one is rarer than another conversation.
                self.prefixes.remove(sequence.origin)
                self.prefixes.insert(0, sequence.origin)
            if self._prefix_slot():
                left = self._leave(sequence, stop, self.slots.take(1)[0], whole)
                self._made.append(left)
        return Chunk(sequence, start, stop, left)

    def _leave(self, sequence: Sequence, count: int, slot: int, whole: bool) -> Prefix:
        """A prefix of its first `count` tokens."""
        pages = sequence.pages[: self._pages_for(count)]
        self.pages.share(pages)
        sequence.left.append(Prefix(sequence.tokens[:count], slot, pages, whole))
        return sequence.left[-1]

    def _keep_what_was_read(self, sequence: Sequence) -> None:
        """Make a prefix of a prompt that is given up, with its slot."""
        if self._worth_keeping(sequence, sequence.computed) and self._prefix_slot():
            self.prefixes.append(self._leave(sequence, sequence.computed, sequence.slot, whole=False))
            sequence.slot = None
            self._held -= 1

    def _forget_any(self, prefixes: Iterable[Prefix | None]) -> None:
        """Forget those of them that are still there."""
        for prefix in prefixes:
            if prefix in self.prefixes or prefix in self._made:
                self.forget(prefix)

    def _frees(self, prefix: Prefix) -> bool:
        """Whether a page is free when it is forgotten: a sequence may hold them all."""
        return any(self.pages.owners(page) == 1 for page in prefix.pages)

    def _prefix_slot(self) -> bool:
        """Whether there may be one prefix more, once the least recently used has gone."""
        if len(self.prefixes) + len(self._made) == self._most_prefixes:
            if not self.prefixes:
                return False
            self.forget(self.prefixes[0])
        return True

    def _worth_keeping(self, sequence: Sequence, count: int) -> bool:
        """Whether a prompt's first tokens are, and nobody keeps the same."""
        if not self._most_prefixes or sequence.tokens is None or count < max(self._least, 1):
            return False
        kept = [prefix.tokens for prefix in (*self.prefixes, *self._made) if len(prefix.tokens) == count]
        return sequence.tokens[:count] not in kept

    def _origin_of(self, sequence: Sequence) -> Prefix | None:
        """The longest prefix that the prompt begins with; it may be all of it."""
        found = [prefix for prefix in self.prefixes if _begins(sequence, prefix)]
        return max(found, key=lambda prefix: len(prefix.tokens), default=None)

    def _branch_of(self, sequence: Sequence) -> int:
        """Where the prompt parts from another that is known, at the end of a page; 0 where that is not worth a prefix:
        others may part there as well."""
        if not self._most_prefixes or sequence.tokens is None:
            return 0
        known = [prefix.tokens for prefix in self.prefixes]
        known += [other.tokens[: other.prompt] for other in self.running if other.tokens is not None]
        alike = max((_alike(sequence.tokens[: sequence.prompt - 1], tokens) for tokens in known), default=0)
        branch = alike // self.page_tokens * self.page_tokens
        return branch if branch >= sequence.reused + max(self._least, 1) else 0

    def _shared(self, prefix: Prefix) -> list[int]:
        """The pages that whoever goes on from it does not write to."""
        return prefix.pages[: len(prefix.tokens) // self.page_tokens]

    def _pages_for(self, tokens: int) -> int:
        return -(-tokens // self.page_tokens)


def _begins(sequence: Sequence, prefix: Prefix) -> bool:
    """Whether the prompt begins with the prefix and can go on from it."""
    count = len(prefix.tokens)
    fits = sequence.tokens is not None and count <= sequence.prompt - (not prefix.whole)
    return fits and sequence.tokens[:count] == prefix.tokens


def _alike(a: list[int], b: list[int]) -> int:
    """How many tokens both begin with."""
    low, high = 0, min(len(a), len(b))
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if a[low:middle] == b[low:middle] else (low, middle - 1)
    return low
