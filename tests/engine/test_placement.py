"""Layers over devices: in order, once each, within every budget, and split as well as any split is."""

from itertools import combinations_with_replacement

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klquant.engine import placement as module
from klquant.engine.placement import CPU, PARTS, find_devices, host_room, plan_placement
from klquant.engine.sizes import held_sizes
from klquant.engine.synthetic import parse_synthetic, synthetic_outline, synthetic_plan
from klquant.errors import UserError
from klquant.model.mla import LATENT_BLOCK
from klquant.recipe.memory import (
    GIB,
    PAST_BLOCK,
    WeightSizes,
    best_split,
    expert_table_bytes,
    predict_memory,
    staging_bytes,
)
from tests.recipe.build import index

CONFIG = index()[0]
CARDS = [torch.device("cuda", i) for i in range(3)]


@settings(max_examples=200, deadline=None)
@given(
    stages=st.lists(st.tuples(st.integers(0, 9), st.integers(0, 9)), min_size=1, max_size=6),
    rooms=st.lists(st.integers(-3, 20), min_size=1, max_size=3),
)
def test_no_split_is_better_than_the_best(stages, rooms):
    sizes, costs = zip(*stages, strict=True)

    def judge(ends: tuple[int, ...]) -> tuple[int, int]:
        runs = [slice(a, b) for a, b in zip((0, *ends), ends, strict=False)]
        over = [max(0, sum(sizes[r]) - room) if r.stop > r.start else 0 for r, room in zip(runs, rooms, strict=True)]
        return sum(over), max(sum(costs[r]) for r in runs)

    count = len(stages)
    every = [(*cuts, count) for cuts in combinations_with_replacement(range(count + 1), len(rooms) - 1)]
    split = best_split(sizes, costs, rooms)
    assert (split.missing, split.cost) == judge(split.ends) == min(judge(ends) for ends in every)


@st.composite
def models(draw):
    size = st.integers(1, 1000).map(lambda x: x << 20)
    layers = draw(st.lists(size, min_size=4, max_size=4))
    routed = (0, *(layer // 2 for layer in layers[1:]))
    return WeightSizes(draw(size), tuple(layers), draw(size), routed)


@settings(max_examples=100, deadline=None)
@given(
    models(), st.lists(st.integers(100, 4000).map(lambda x: x << 20), min_size=1, max_size=3), st.sampled_from([8, 16])
)
def test_a_placement_keeps_every_promise_or_says_what_is_missing(sizes, rooms, cache_bytes):
    devices = dict(zip(CARDS, rooms, strict=False))
    options = {"context": 4096, "sequences": 3, "cache_bits": 8 * cache_bytes}
    try:
        found = plan_placement(CONFIG, sizes, devices, **options)
    except UserError as error:
        assert "GiB are missing" in str(error) and "\n" not in str(error)
        return
    assert [i for share in found.shares for i in share.layers] == list(range(CONFIG.num_layers))
    order = [list(devices).index(share.device) for share in found.shares]
    assert order == sorted(set(order))
    assert len(found.layers) == CONFIG.num_layers
    for share in found.shares:
        assert share.layers and share.total <= share.room == devices[share.device]
    assert found.head == found.layers[-1]
    on_cpu = found.memory.embedding_on_cpu
    assert found.embedding == (CPU if on_cpu else found.layers[0])
    for part in PARTS[:3]:
        assert sum(getattr(share, part) for share in found.shares) == getattr(found.memory, part)
    if on_cpu:
        memory = predict_memory(CONFIG, sizes, **options)
        rooms = [room - memory.workspace - memory.runtime for room in rooms]
        assert best_split(memory.stages, memory.reads, rooms).missing


def splits_that_fit(sizes, rooms, context):
    """The layer after each card's last, of every split in which some number of experts can leave the layers of each."""
    memory = predict_memory(CONFIG, sizes, context, embedding_on_cpu=True)
    count, most = CONFIG.num_layers, CONFIG.num_experts - CONFIG.top_k

    def fits(start, end, room):
        each = [sizes.routed[i] // CONFIG.num_experts for i in range(start, end) if sizes.routed[i]]
        held = sum(memory.stages[start:end]) + memory.workspace + memory.runtime
        more = len(each) * expert_table_bytes(CONFIG)
        return start == end or held <= room or any(
            held + more + staging_bytes(n * max(each), len(each)) - n * sum(each) <= room for n in range(1, most + 1)
            if each
        )  # fmt: skip

    every = [(0, *cuts, count) for cuts in combinations_with_replacement(range(count + 1), len(rooms) - 1)]
    return [ends for ends in every if all(map(fits, ends, ends[1:], rooms))]


@settings(max_examples=300, deadline=None)
@given(
    models(), st.lists(st.integers(100, 4000).map(lambda x: x << 20), min_size=1, max_size=3),
    st.integers(0, 3000).map(lambda x: x << 20) | st.just(1 << 60),
)  # fmt: skip
def test_experts_leave_cards_only_where_they_must_and_no_more_than_may(sizes, rooms, host):
    devices, options = dict(zip(CARDS, rooms, strict=False)), {"context": 4096}
    count, moe = CONFIG.num_experts, [CONFIG.is_moe(i) for i in range(CONFIG.num_layers)]
    try:
        without = plan_placement(CONFIG, sizes, devices, **options)
    except UserError:
        without = None
    try:
        found = plan_placement(CONFIG, sizes, devices, host=host, **options)
    except UserError as error:
        assert without is None and "GiB are missing" in str(error) and "\n" not in str(error)
        if host >= 1 << 60:
            assert not splits_that_fit(sizes, rooms, options["context"])
        return
    if without:
        assert found == without and not any(found.far) and found.offloaded == 0 and found.note is None
        return
    assert 0 < found.offloaded <= host and found.memory.embedding_on_cpu and "\n" not in found.note
    assert found.on_host == found.offloaded + sizes.embedding
    extra = 0
    for share in found.shares:
        assert share.total <= share.room
        leave = {found.far[i] for i in share.layers if moe[i]}
        assert all(found.far[i] == 0 for i in share.layers if not moe[i])
        if share.offloaded:
            (leave,) = leave
            assert 0 < leave <= count - CONFIG.top_k
            each = [sizes.routed[i] // count for i in share.layers if moe[i]]
            tables = len(each) * expert_table_bytes(CONFIG)
            staging, less = (staging_bytes(n * max(each), len(each)) for n in (leave, leave - 1))
            assert share.offloaded == leave * sum(each)
            whole = share.total + share.offloaded - tables - staging
            # One less a layer would not have been enough.
            assert whole - (leave - 1) * sum(each) + tables + less > share.room
            extra += tables + staging
    assert sum(share.weights + share.offloaded for share in found.shares) == found.memory.weights + extra


def test_int4_runs_on_one_24_gb_card_with_experts_on_the_host(big):
    config, sizes = big
    found = plan_placement(config, sizes, {CARDS[0]: int(23.5 * GIB)}, context=8192, host=8 * GIB)
    assert max(found.far) < 40 and found.offloaded < 3.25 * GIB
    # A prompt's experts come while the layer before is at work: room for two layers' of them.
    assert found.shares[0].weights + found.offloaded > found.memory.weights + 2 * max(found.far) * (3 << 20)
    assert found.instead == ("the recipe int3",) and "3.0 GiB of experts" in found.note
    with pytest.raises(UserError, match=r"3\.0 GiB of experts in the host's memory, of which they may take 1\.0$"):
        plan_placement(config, sizes, {CARDS[0]: int(23.5 * GIB)}, context=8192, host=GIB)
    with pytest.raises(UserError, match=r"nothing klquant makes, at any context$"):
        plan_placement(config, sizes, {CARDS[0]: 2 * GIB}, context=8192, host=1 << 50)
    with pytest.raises(UserError, match=r"what would fit: an 8-bit latent cache; a context of [\d,]+ tokens") as error:
        plan_placement(config, sizes, {CARDS[0]: int(10.5 * GIB)}, context=1 << 20, host=1 << 40)
    assert "nothing" not in str(error.value)


def test_a_small_second_card_is_no_harm(big):
    config, sizes = big
    alone = plan_placement(config, sizes, {CARDS[0]: 20 * GIB}, context=8192, host=1 << 40)
    for gib in (1.7, 2.0, 2.4, 6):
        for cards in ((CARDS[0], CARDS[1]), (CARDS[1], CARDS[0])):
            rooms = {card: int((20 if card == CARDS[0] else gib) * GIB) for card in cards}
            both = plan_placement(config, sizes, rooms, context=8192, host=1 << 40)
            assert both.offloaded <= alone.offloaded
            assert sum(n * n for n in both.far) <= sum(n * n for n in alone.far)


def test_equal_cards_read_alike_and_unequal_ones_as_far_as_they_have_room():
    sizes = WeightSizes(0, (GIB,) * 4, 0, (0,) * 4)
    room = predict_memory(CONFIG, sizes, 1024).workspace + predict_memory(CONFIG, sizes, 1024).runtime

    def layers(*gib: float) -> list[int]:
        devices = {card: int(g * GIB) + room for card, g in zip(CARDS, gib, strict=False)}
        shares = plan_placement(CONFIG, sizes, devices, context=1024).shares
        return [len(share.layers) for share in shares]

    assert layers(9) == [4]
    assert layers(9, 9) == [2, 2]
    assert layers(1.5, 9) == [1, 3]
    assert layers(0.5, 9) == [4]


@pytest.fixture(scope="module")
def big():
    config, _ = parse_synthetic("kimi-linear-48b")
    return config, held_sizes(synthetic_outline(config, "int4"), torch.bfloat16)


def test_the_48b_with_a_million_tokens_is_on_two_24_gb_cards(big):
    config, sizes = big
    cards = dict.fromkeys(CARDS[:2], int(23.5 * GIB))
    assert not plan_placement(config, sizes, cards, context=1 << 20, cache_bits=8).memory.embedding_on_cpu
    found = plan_placement(config, sizes, cards, context=8192)
    reads = [sum(found.memory.reads[i] for i in share.layers) for share in found.shares]
    assert max(reads) < 1.1 * min(reads)


def test_what_would_fit_does(big):
    config, sizes = big
    card = {CARDS[0]: int(23.5 * GIB)}
    with pytest.raises(UserError, match=r"what would fit: the recipe int3$"):
        plan_placement(config, sizes, card, context=131_072)
    int3 = synthetic_plan(config, "int3").weight_sizes
    plan_placement(config, int3, card, context=131_072)
    least = predict_memory(config, int3, 8192, sequences=2, embedding_on_cpu=True).total
    tight = {CARDS[0]: least + (50 << 20)}
    with pytest.raises(UserError, match=r"what would fit: prefixes 0; a context of [\d,]+ tokens$"):
        plan_placement(config, int3, tight, context=8192, sequences=2, prefixes=4)
    plan_placement(config, int3, tight, context=8192, sequences=2)
    with pytest.raises(UserError, match=r"what would fit: the recipe int3 and prefixes 0$"):
        plan_placement(config, sizes, tight, context=8192, sequences=2, prefixes=1000)
    two = dict.fromkeys(CARDS[:2], 17 * GIB)
    with pytest.raises(UserError, match=r"an 8-bit latent cache; a context of ([\d,]+) tokens") as error:
        plan_placement(config, sizes, two, context=1 << 20)
    plan_placement(config, sizes, two, context=1 << 20, cache_bits=8)
    shorter = int(str(error.value).split("a context of ")[1].split(" ")[0].replace(",", ""))
    plan_placement(config, sizes, two, context=shorter)
    with pytest.raises(UserError):
        plan_placement(config, sizes, two, context=shorter + 1024)


def test_a_limit_is_not_called_free(big):
    config, sizes = big
    with pytest.raises(UserError, match=r"does not fit cuda:0 \(1\.0 GiB free\), cuda:1 \(2\.0 GiB allowed by max_mem"):
        plan_placement(config, sizes, {CARDS[0]: GIB, CARDS[1]: module.Allowed(2 * GIB)}, context=8192)


def test_the_reported_shortage_is_what_was_missing(big):
    config, sizes = big
    room = 20 * GIB
    with pytest.raises(UserError) as error:
        plan_placement(config, sizes, {CARDS[0]: room}, context=8192)
    missing = float(str(error.value).split(" GiB are missing")[0].rpartition(" ")[2])
    plan_placement(config, sizes, {CARDS[0]: room + int((missing + 0.01) * GIB)}, context=8192)
    with pytest.raises(UserError):
        plan_placement(config, sizes, {CARDS[0]: room + int((missing - 0.01) * GIB)}, context=8192)


def test_devices_by_name(monkeypatch):
    assert find_devices("cpu") == {CPU: pytest.approx(module.free_memory(CPU), rel=0.1)}
    assert find_devices("cpu", {"cpu": 12345}) == {CPU: 12345}
    with pytest.raises(UserError, match="twice"):
        find_devices("cpu,cpu")
    with pytest.raises(UserError, match="unknown device 'gpu'"):
        find_devices("gpu")
    with pytest.raises(UserError, match="found here"):
        find_devices("cuda:77")
    monkeypatch.setattr(module.torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(module.torch.cuda, "get_device_capability", lambda device: (8 - device.index, 9))
    monkeypatch.setattr(module.torch.cuda, "get_device_name", lambda device: "An Old Card")
    monkeypatch.setattr(module, "free_memory", lambda device: 100)
    held = {}
    monkeypatch.setattr(module, "limit_memory", held.__setitem__)
    assert find_devices("cuda") == {CARDS[0]: 100} and not held
    assert find_devices("cuda", {"cuda:0": 70}) == {CARDS[0]: 70}
    assert find_devices("cuda", {"cpu": 0}) == {CARDS[0]: 100}
    monkeypatch.setattr(module, "free_memory", lambda device=None: 100)
    assert [host_room(asked) for asked in (None, {"cpu": 0}, {"cpu": 70}, {"cpu": 200})] == [80, 0, 70, 100]
    assert find_devices("cuda", {"cuda:0": 1 << 30}) == {CARDS[0]: 100}
    assert held == {CARDS[0]: (1 << 30) - module.CUDA_CONTEXT}
    with pytest.raises(UserError, match=r"An Old Card has compute capability 7\.9"):
        find_devices("cuda:0,cuda:1")
    with pytest.raises(UserError, match="of several kinds"):
        find_devices("cuda:0,cpu")
    with pytest.raises(UserError, match="memory is limited on cuda:1"):
        find_devices("cuda:0", {"cuda:1": 1})


def test_the_workspace_counts_a_block_of_the_size_that_attention_takes():
    assert PAST_BLOCK == LATENT_BLOCK
