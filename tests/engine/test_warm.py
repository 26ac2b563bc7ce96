"""What a warm-up meets, and that it leaves nothing behind."""

import pytest

from klquant.engine.engine import Engine
from klquant.engine.request import SamplingParams
from klquant.engine.runner import BUCKETS
from klquant.engine.warm import warm_up
from klquant.kernels.mla.pages import PAGE_SIZE


@pytest.mark.parametrize(("batch", "prefixes"), [(1, 0), (5, 2), (8, 0)])
@pytest.mark.parametrize(("context", "chunk"), [(8, 100), (200, 50), (90, 300)])
def test_every_size_is_met_and_nothing_stays(tiny, monkeypatch, batch, prefixes, context, chunk):
    cache = batch * -(-context // PAGE_SIZE) * PAGE_SIZE
    limits = {"max_context": context, "max_batch": batch, "cache_tokens": cache, "chunk": chunk, "prefixes": prefixes}
    with Engine.from_pretrained(tiny, devices="cpu", **limits) as warmed:
        rows, prompts, behind, runner = set(), set(), set(), warmed.runner
        decode, prefill = runner.decode, runner.prefill

        def seen_decode(slots, mode):
            rows.add(len(slots))
            return decode(slots, mode)

        def seen_prefill(spans):
            prompts.add(tuple(len(span.ids) for span in spans))
            behind.update(span.start for span in spans)
            return prefill(spans)

        monkeypatch.setattr(runner, "decode", seen_decode)
        monkeypatch.setattr(runner, "prefill", seen_prefill)
        warm_up(warmed)
        assert {n for n in BUCKETS if n <= batch} | {batch} <= rows
        longest = min(chunk, context - 3)
        assert (longest,) in prompts and max(map(sum, prompts)) <= chunk
        assert (batch > 1) == any(len(lengths) > 1 for lengths in prompts)
        assert (behind > {0}) == (chunk < context or prefixes > 0), (
            "what lies behind other tokens has kernels of its own"
        )
        assert not warmed.loop.jobs and not warmed.loop.scheduler.waiting and not warmed.loop.scheduler.prefixes
        params = SamplingParams(max_new_tokens=4, ignore_eos=True)
        (after,) = warmed.generate([[5, 6, 7]], params)
    with Engine.from_pretrained(tiny, devices="cpu", **limits) as cold:
        assert cold.generate([[5, 6, 7]], params)[0].tokens == after.tokens


@pytest.mark.parametrize("cache", [64, 128, 192])
def test_a_cache_smaller_than_the_context_is_no_trouble(tiny, cache):
    with Engine.from_pretrained(
        tiny, devices="cpu", max_context=400, max_batch=2, cache_tokens=cache, chunk=100
    ) as engine:
        warm_up(engine)
        assert not engine.loop.jobs


@pytest.mark.parametrize("context", [2, 3, 4])
def test_tight_limits_are_no_trouble(tiny, context):
    limits = {"max_context": context, "max_batch": 2, "cache_tokens": context, "chunk": 1}
    with Engine.from_pretrained(tiny, devices="cpu", **limits) as engine:
        warm_up(engine)
        assert not engine.loop.jobs
