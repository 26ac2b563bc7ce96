"""The scheduler on its own: nothing is held twice, first come is first served, everything finishes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from klquant.engine.scheduler import Pool, Scheduler, Sequence
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
