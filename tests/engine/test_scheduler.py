"""The scheduler on its own: nothing is held twice, first come is first served, everything finishes."""

from collections import Counter

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.engine.scheduler import Pool, Scheduler, Sequence, Step
from klquant.errors import UserError

PAGE = 4


def scheduler(slots=3, pages=12, chunk=5):
    return Scheduler(slots=slots, pages=pages, page_tokens=PAGE, chunk=chunk)


def sequence(prompt, new, keep=False):
    return Sequence(prompt=prompt, most=prompt + new - 1, keep=keep)


def check_owners(s, sequences):
    held = [page for q in sequences for page in q.pages]
    slots = [q.slot for q in sequences if q.slot is not None]
    assert len(held) == len(set(held)) and len(held) + s.pages.free == s.pages.count
    assert len(slots) == len(set(slots)) and len(slots) + s.slots.free == s.slots.count
    for q in sequences:
        assert q.computed <= len(q.pages) * PAGE, "a token without a page"


requests = st.lists(st.tuples(st.integers(1, 30), st.integers(1, 18)), min_size=1, max_size=12)


@given(requests, st.integers(1, 4), st.integers(12, 30), st.integers(1, 9), st.randoms())
def test_everything_finishes_in_order_and_nothing_is_held_twice(sizes, slots, pages, chunk, random):
    s = scheduler(slots, pages, chunk)
    todo = [sequence(prompt, new) for prompt, new in sizes]
    queue, added, admitted, done = list(todo), [], [], []
    while queue or len(done) < len(todo):
        while queue and (random.random() < 0.5 or len(added) == len(done)):
            added.append(queue.pop(0))
            s.add(added[-1])
        before = {q: q.computed for q in added}
        step = s.schedule()
        assert step is not None, "somebody waits and nobody runs"
        for c in step.prefill:
            assert c.start == before[c.sequence] < c.stop <= c.sequence.prompt
            assert c.sequence not in step.decode
            if c.start == 0:
                admitted.append(c.sequence)
        fed = sum(c.stop - c.start for c in step.prefill)
        assert fed <= chunk and all(c.last for c in step.prefill[:-1])
        assert fed == chunk or not s.waiting or s.shortage(s.waiting[0]), "room in the chunk, and the next one waits"
        for q in step.decode:
            assert before[q] >= q.prompt and q.computed == before[q] + 1
        running = {q for q in added if q.prompt <= before[q] < q.most and q not in done}
        assert set(step.decode) == running, "a sequence was left out of a step"
        check_owners(s, todo)
        for q in list(s.running):
            if q.computed == q.most or random.random() < 0.05:
                s.finish(q)
                done.append(q)
    assert admitted == added == todo
    assert s.pages.free == pages and s.slots.free == slots


def test_a_request_that_can_never_fit_is_refused_with_what_is_missing():
    with pytest.raises(UserError, match=r"51 tokens.*needs 13 cache pages.*has 12: 1 missing"):
        scheduler().add(sequence(50, 2))
    scheduler().add(sequence(47, 2))


def test_the_head_of_the_queue_is_not_overtaken():
    s = scheduler()
    first, large, small = sequence(20, 9), sequence(30, 10), sequence(1, 1)
    for q in (first, large, small):
        s.add(q)
    for _ in range(10):
        assert all(chunk.sequence is first for chunk in s.schedule().prefill)
    assert s.shortage(large) == "5 cache pages of 4 tokens are missing"
    s.finish(first)
    assert [chunk.sequence for chunk in s.schedule().prefill] == [large]


def test_short_prompts_share_a_chunk_and_a_long_one_takes_what_is_left():
    s = scheduler(slots=5, pages=40, chunk=12)
    short, longer, long, last = sequence(3, 4), sequence(5, 4), sequence(20, 4), sequence(2, 4)
    for q in (short, longer, long, last):
        s.add(q)
    chunks = [[(c.sequence, c.start, c.stop) for c in s.schedule().prefill] for _ in range(3)]
    assert chunks[0] == [(short, 0, 3), (longer, 0, 5), (long, 0, 4)]
    assert chunks[1:] == [[(long, 4, 16)], [(long, 16, 20), (last, 0, 2)]]


def test_a_sequence_that_keeps_its_state_goes_on_from_it():
    s = scheduler()
    q = sequence(7, 3, keep=True)
    s.add(q)
    while s.schedule():
        pass
    s.finish(q)
    pages = list(q.pages)
    assert q.computed == 9 and len(pages) == 3 and s.slots.free == 2
    q.prompt, q.most = 15, 20
    s.add(q)
    (chunk,) = s.schedule().prefill
    assert (chunk.start, chunk.stop) == (9, 14) and q.pages[:3] == pages and len(q.pages) == 5
    s.finish(q)
    s.release(q)
    assert s.pages.free == 12 and s.slots.free == 3


def test_a_kept_sequence_can_leave_no_room_and_says_so():
    s = scheduler()
    q = sequence(40, 1, keep=True)
    s.add(q)
    while s.schedule():
        pass
    s.finish(q)
    s.add(sequence(20, 1))
    assert s.schedule() is None and s.shortage(s.waiting[0]) == "3 cache pages of 4 tokens are missing"


def test_finishing_early_frees_everything():
    s = scheduler()
    waiting, prefilling, running = sequence(40, 1), sequence(12, 4), sequence(3, 5)
    for q in (running, prefilling, waiting):
        s.add(q)
    s.schedule()
    s.schedule()
    for q in (waiting, prefilling, running):
        s.finish(q)
    assert s.schedule() is None and s.pages.free == 12 and s.slots.free == 3


def test_nothing_is_given_back_twice():
    pool = Pool(3)
    taken = pool.take(2)
    pool.give(taken)
    with pytest.raises(AssertionError):
        pool.give(taken)


turns = st.lists(st.tuples(st.integers(0, 3), st.integers(0, 12), st.integers(1, 10)), min_size=1, max_size=14)


class Memory:
    """What slots and pages hold when steps are run as the engine runs them."""

    def __init__(self) -> None:
        self.seen, self.ends, self.latents, self.bound = {}, {}, {}, set()

    def run(self, step: Step) -> None:
        for q in step.decode:
            self.seen[q.slot] = None
            self.latents[q.pages[(q.computed - 1) // PAGE], (q.computed - 1) % PAGE] = "an answer"
        assert len({c.sequence.slot for c in step.prefill}) == len(step.prefill)
        for c in step.prefill:
            if c.sequence not in self.bound:
                self._bind(c.sequence, c.start)
        for c in step.prefill:
            q = c.sequence
            assert self.seen[q.slot] == q.tokens[: c.start] == self.held(q.pages, c.start), "another's state"
            for i in range(c.start, c.stop):
                self.latents[q.pages[i // PAGE], i % PAGE] = q.tokens[i]
            self.seen[q.slot] = q.tokens[: c.stop]
            if c.start < c.stop:
                self.ends[q.slot] = self.seen[q.slot]
            assert not c.last or self.ends[q.slot] == q.tokens[: q.prompt], "it is not known what comes next"
        for c in step.prefill:
            if c.left:
                self._copy(c.sequence.slot, c.left.slot)

    def held(self, pages: list[int], count: int) -> list:
        return [self.latents[pages[i // PAGE], i % PAGE] for i in range(count)]

    def _bind(self, q: Sequence, start: int) -> None:
        self.bound.add(q)
        if q.source:
            self._copy(q.source.slot, q.slot)
            for i in range(PAGE) if q.source.pages else ():
                self.latents[q.source.pages[1], i] = self.latents.get((q.source.pages[0], i))
        elif start == 0:
            self.seen[q.slot] = []

    def _copy(self, source: int, target: int) -> None:
        self.seen[target], self.ends[target] = self.seen[source], self.ends.get(source)


@given(turns, st.integers(1, 3), st.integers(16, 30), st.integers(0, 4), st.integers(1, 6), st.randoms())
def test_prefixes_serve_prompts_that_begin_with_them_and_stand_in_nobodys_way(
    talk, slots, pages, prefixes, least, random
):
    """Four conversations that begin alike, and grow, and are begun again in the middle: nobody goes on from a state
    that has not seen just its own tokens, and nothing is held without an owner or by too many."""
    s = Scheduler(slots=slots, pages=pages, page_tokens=PAGE, chunk=5, prefixes=prefixes, least=least)
    said, left, memory = {}, [], Memory()
    for who, more, new in talk:
        before = said.get(who, [7, 7, 7, 7, 7, 7, who])
        before = before[: random.randint(1, len(before))] if random.random() < 0.3 else before
        said[who] = tokens = [*before, *(random.randrange(9) for _ in range(more))][:50]
        left.append(Sequence(len(tokens), len(tokens) + new - 1, tokens=tokens))
    added = []
    while left or added:
        while left and (not added or random.random() < 0.5):
            added.append(left.pop(0))
            s.add(added[-1])
        step = s.schedule()
        assert step is not None, "somebody waits and nobody runs"
        memory.run(step)
        for prefix in s.prefixes:
            count = len(prefix.tokens)
            assert memory.seen[prefix.slot] == prefix.tokens == memory.held(prefix.pages, count) and count >= least
            assert len(prefix.pages) == -(-count // PAGE)
        kept = [prefix.tokens for prefix in s.prefixes]
        assert all(kept.count(tokens) == 1 for tokens in kept), "one twice"
        holders = Counter(page for x in (*added, *s.prefixes) for page in x.pages)
        assert all(s.pages.owners(page) == holders[page] for page in range(pages))
        taken = [q.slot for q in added if q.slot is not None] + [p.slot for p in s.prefixes]
        assert len(set(taken)) == len(taken) == slots + prefixes - s.slots.free
        assert sum(q.slot is not None for q in added) <= slots and len(s.prefixes) <= prefixes
        for q in [*s.running, *([s.prefilling] if s.prefilling else [])]:
            q.checked = q in s.running and random.random() < 0.95
            if q.computed == q.most or random.random() < 0.1:
                s.finish(q, sound=random.random() < 0.9)
                added.remove(q)
    for prefix in list(s.prefixes):
        s.forget(prefix)
    assert s.pages.free == pages and s.slots.free == slots + prefixes


def run_alone(s, tokens):
    """Answer a prompt with one token; returns how much of it was there."""
    q = Sequence(len(tokens), len(tokens), tokens=tokens)
    s.add(q)
    while s.schedule():
        q.checked = True
    s.finish(q)
    return q.reused


def test_the_longest_prefix_serves_and_the_least_recently_used_goes_first():
    s = Scheduler(slots=1, pages=20, page_tokens=PAGE, chunk=5, prefixes=2)
    a, b = [1, 2, 3], [4, 5, 6]
    assert [run_alone(s, x) for x in (a, [*a, 7], b)] == [0, 3, 0]
    assert run_alone(s, [*a, 7, 8]) == 4, "what the second turn of a left"
    assert run_alone(s, [*b, 9]) == 3
    assert run_alone(s, [0]) == 0  # takes the slot of a's last turn
    assert run_alone(s, [*a, 7, 8, 9]) == 0
    assert run_alone(s, [0]) == 1, "nothing has to be computed again"


def test_prefixes_make_room_for_whoever_waits():
    s = Scheduler(slots=2, pages=4, page_tokens=PAGE, chunk=50, prefixes=2)
    assert run_alone(s, [1] * 8) == 0 and run_alone(s, [2] * 4) == 0 and s.pages.free == 1
    assert run_alone(s, [*[1] * 8, *[3] * 4]) == 8, "its own prefix is not what makes room"
    assert [len(prefix.tokens) for prefix in s.prefixes] == [4, 12]
    assert run_alone(s, [9] * 16) == 0 and [len(prefix.tokens) for prefix in s.prefixes] == [16]


def test_equal_prompts_are_read_once_and_leave_one_prefix():
    s = Scheduler(slots=3, pages=20, page_tokens=PAGE, chunk=50, prefixes=2)
    run_alone(s, [1] * 8)
    both = [Sequence(10, 11, tokens=[2] * 10, checked=True) for _ in range(2)]
    for q in both:
        s.add(q)
    first, second = s.schedule(), s.schedule()
    assert [(c.sequence, c.start, c.stop) for c in first.prefill] == [(both[0], 0, 10)]
    assert [(c.sequence, c.start, c.stop) for c in second.prefill] == [(both[1], 10, 10)]
    assert both[0].pages[:2] == both[1].pages[:2] and both[0].pages[2] != both[1].pages[2]
    for q in both:
        s.finish(q)
    assert [prefix.tokens for prefix in s.prefixes] == [[1] * 8, [2] * 10]


def test_prompts_that_begin_alike_leave_a_prefix_where_they_part():
    """At the end of a page; the third goes on from there, and a prefix that many use is not pushed out by a chat."""
    s = Scheduler(slots=1, pages=60, page_tokens=PAGE, chunk=50, prefixes=3, least=4)
    system = list(range(10, 20))
    assert [run_alone(s, [*system, n, *[n] * 9]) for n in range(4)] == [0, 0, 8, 8]
    chat = [*system, 4, 4]
    for _ in range(5):
        run_alone(s, chat)
        chat += [5] * 6
    assert run_alone(s, [*system, 6, 6]) == 8


def test_what_was_read_of_a_prompt_that_is_given_up_stays():
    s = Scheduler(slots=1, pages=20, page_tokens=PAGE, chunk=5, prefixes=1)
    tokens = list(range(12))
    q = Sequence(12, 20, tokens=tokens)
    s.add(q)
    s.schedule()
    s.schedule()
    s.finish(q)
    (prefix,) = s.prefixes
    assert prefix.tokens == tokens[:10] and len(prefix.pages) == 3 and s.pages.free == 17 and s.slots.free == 1
    assert run_alone(s, tokens[:10]) == 0, "nobody knows what comes behind its last token"
    assert run_alone(s, tokens) == 10


def test_what_nobody_looked_at_is_not_kept():
    """Of an answer that is cancelled before its first token was seen, the state may hold no numbers."""
    s = Scheduler(slots=1, pages=20, page_tokens=PAGE, chunk=50, prefixes=1)
    q = Sequence(8, 9, tokens=[1] * 8)
    s.add(q)
    s.schedule()
    s.finish(q)
    assert not s.prefixes and s.slots.free == 2
    s, q = Scheduler(slots=1, pages=20, page_tokens=PAGE, chunk=50, prefixes=2), Sequence(12, 13, tokens=[2] * 12)
    run_alone(s, [2] * 8)
    s.add(q)
    s.schedule()
    s.finish(q)
    assert [prefix.tokens for prefix in s.prefixes] == [[2] * 8], "what it went on from is as good as before"


@pytest.mark.parametrize("sound", [True, False])
def test_what_an_unsound_sequence_went_on_from_is_forgotten(sound):
    """Its state may hold no numbers, and so may what it was copied from; other prefixes are not concerned."""
    s, q = Scheduler(slots=1, pages=20, page_tokens=PAGE, chunk=50, prefixes=3), Sequence(12, 13, tokens=[2] * 12)
    run_alone(s, [1] * 8)
    run_alone(s, [2] * 8)
    s.add(q)
    s.schedule()
    q.checked = True
    s.finish(q, sound=sound)
    assert q.reused == 8
    assert sorted(prefix.tokens for prefix in s.prefixes) == [[1] * 8, *([[2] * 8, [2] * 12] if sound else [])]
    assert run_alone(s, [2] * 16) == (12 if sound else 0)


def test_a_prefix_that_frees_nothing_does_not_make_room():
    s = Scheduler(slots=3, pages=6, page_tokens=PAGE, chunk=50, prefixes=3)
    running = Sequence(8, 12, tokens=[1] * 8, checked=True)
    s.add(running)
    s.schedule()
    run_alone(s, [2] * 10)
    assert [prefix.tokens[0] for prefix in s.prefixes] == [1, 2] and s.pages.free == 0
    run_alone(s, [3] * 4)
    assert [prefix.tokens[0] for prefix in s.prefixes] == [1, 3]
