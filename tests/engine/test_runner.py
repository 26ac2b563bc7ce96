"""The runner: a text has the same logits however it is cut into chunks and single steps, and whoever runs beside it."""

from itertools import product

import pytest
import torch

from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CheckpointReader
from klquant.engine import runner as module
from klquant.engine.build import OneDevice
from klquant.engine.load import load_weights
from klquant.engine.prefill import Span
from klquant.engine.request import SamplingParams
from klquant.engine.runner import Runner, bucket
from klquant.kernels.mla.pages import PAGE_SIZE
from klquant.model.forward import Model
from tests.model.oracle import oracle

LENGTHS = (1, 63, 64, 65, 130)
GREEDY = SamplingParams(seed=0)


@pytest.fixture(scope="module")
def model(tiny):
    return Model.load(CheckpointReader.open(tiny), torch.float32, "cpu")


def load(folder):
    reader = CheckpointReader.open(folder)
    places = OneDevice(torch.device("cpu"), reader.config.num_layers, packed=False)
    return load_weights(QuantizedReader(reader, None), places, torch.float32)


@pytest.fixture(scope="module")
def weights(tiny):
    return load(tiny)


@pytest.fixture
def runner(weights):
    return make_runner(weights)


def make_runner(weights, **changes):
    sizes = {"slots": 4, "pages": 16, "max_context": 256}
    return Runner(weights, **sizes | changes)


def random_ids(length, seed=0, vocab=320):
    return torch.randint(0, vocab, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


def begin(runner, slot, pages, params=GREEDY, tokens=()):
    runner.bind(slot, pages, params, tokens, fresh=True)


def prefill_logits(runner, ids, slot, chunk, start=0):
    """Logits [S, V] of ids fed in chunks."""
    parts = []
    for at in range(0, len(ids), chunk):
        h = runner.prefill([Span(ids[at : at + chunk], slot, start + at)])
        parts.append(runner.weights.head(runner.cfg, h))
    return torch.cat(parts)


class Forced:
    """Decode steps whose next token is given instead of chosen; records the logits that were sampled from."""

    def __init__(self, runner, monkeypatch):
        self.runner, self.logits = runner, []
        real = module.sample

        def spy(logits, *rest):
            self.logits.append(logits)
            return real(logits, *rest)

        monkeypatch.setattr(module, "sample", spy)

    def step(self, tokens_by_slot: dict[int, int], rows=None):
        """Logits [B, V] after one more token for each slot."""
        for slot, token in tokens_by_slot.items():
            self.runner.next_token[slot] = token
        self.runner.decode(rows or list(tokens_by_slot), "greedy")
        return self.logits[-1]


@pytest.mark.parametrize("length", LENGTHS)
def test_decode_is_prefill_is_chunked_prefill_is_the_model(model, weights, monkeypatch, length):
    ids = random_ids(length)
    with torch.no_grad():
        want = model.logits(torch.tensor([ids]))[0]
    for chunk in (2, 17, 64, 200):
        runner = make_runner(weights)
        begin(runner, 1, [3, 9, 4])
        assert (prefill_logits(runner, ids, 1, chunk) - want).abs().max() < 1e-4
    for first in {1, length // 2, length - 1} - {0, length}:
        runner = make_runner(weights)
        begin(runner, 2, [5, 0, 7])
        parts = [prefill_logits(runner, ids[:first], 2, 1000)]
        forced = Forced(runner, monkeypatch)
        parts += [forced.step({2: token}) for token in ids[first:]]
        got = torch.cat(parts)
        assert (got - want).abs().max() < 1e-4
        assert torch.equal(got.argmax(-1), want.argmax(-1))


def test_logits_are_those_of_transformers(tiny, runner, monkeypatch):
    ids = random_ids(100, seed=4)
    with torch.no_grad():
        want = oracle(tiny)(torch.tensor([ids])).logits[0]
    begin(runner, 0, [2, 1])
    forced = Forced(runner, monkeypatch)
    got = [prefill_logits(runner, ids[:70], 0, 33), *(forced.step({0: token}) for token in ids[70:])]
    assert (torch.cat(got) - want).abs().max() < 1e-4


def test_rows_of_a_batch_are_singles_with_padding_between(weights, monkeypatch):
    """Three sequences of different lengths, in odd slots and with padding rows, against each on its own."""
    texts = {0: random_ids(70, 1), 2: random_ids(3, 2), 3: random_ids(130, 3)}
    pages = {0: [1, 8, 3], 2: [0], 3: [15, 2, 9]}
    together, feed = make_runner(weights), {slot: random_ids(5, 10 + slot) for slot in texts}
    for slot, ids in texts.items():
        begin(together, slot, pages[slot])
        together.prefill([Span(ids, slot, 0)])
    forced = Forced(together, monkeypatch)
    rows = [3, -1, 0, 2, -1]
    steps = [forced.step({slot: feed[slot][i] for slot in texts}, rows) for i in range(5)]
    monkeypatch.undo()
    for slot, ids in texts.items():
        alone = make_runner(weights)
        begin(alone, 1, [4, 5, 6])
        alone.prefill([Span(ids, 1, 0)])
        forced = Forced(alone, monkeypatch)
        for i, step in enumerate(steps):
            want = forced.step({1: feed[slot][i]})[0]
            assert (step[rows.index(slot)] - want).abs().max() < 1e-5
        monkeypatch.undo()


def test_prompts_side_by_side_are_prompts_alone(weights, monkeypatch):
    """Of one position and more, in pieces that go on from other lengths, in odd slots and pages: the logits of each
    position, and of the steps behind them."""
    texts = {3: random_ids(130, 1), 0: random_ids(66, 2), 2: random_ids(3, 3), 1: random_ids(70, 4)}
    pages = {3: [15, 2, 9], 0: [8, 3], 2: [0], 1: [4, 11]}
    together = make_runner(weights)
    for slot in texts:
        begin(together, slot, pages[slot])
    got = {slot: [] for slot in texts}
    cuts = [
        {3: (0, 1), 0: (0, 64), 2: (0, 2)},
        {0: (64, 65), 3: (1, 2)},
        {1: (0, 70), 3: (2, 130), 2: (2, 3), 0: (65, 66)},
    ]
    for cut in cuts:
        spans = [Span(texts[slot][a:b], slot, a) for slot, (a, b) in cut.items()]
        logits = weights.head(weights.cfg, together.prefill(spans)).split([len(span.ids) for span in spans])
        for span, part in zip(spans, logits, strict=True):
            got[span.slot].append(part)
    forced = Forced(together, monkeypatch)
    steps = [forced.step({slot: 7 + i for slot in texts}).clone() for i in range(2)]
    monkeypatch.undo()
    for row, (slot, ids) in enumerate(texts.items()):
        alone = make_runner(weights)
        begin(alone, 1, [4, 5, 6])
        assert (torch.cat(got[slot]) - prefill_logits(alone, ids, 1, 200)).abs().max() < 1e-4
        forced = Forced(alone, monkeypatch)
        for i, step in enumerate(steps):
            assert (step[row] - forced.step({1: 7 + i})[0]).abs().max() < 1e-4
        monkeypatch.undo()


def test_a_prompt_in_a_graph_is_the_prompt(weights, monkeypatch):
    """Padded to a graph's rows and, before it is captured, run as nothing but padding; beside a sequence in slot 0."""

    class Direct:
        def run(self, key, function, inputs, harmless):
            function(*harmless())
            keys.append(key[2:])
            return function(*inputs)

    cpu, other = torch.device("cpu"), random_ids(40, 9)
    for used, start in product((2, 31, 32, 33, 96, 100), (0, 1, 70)):
        keys = []
        padded, plain = make_runner(weights), make_runner(weights)
        ids, before, logits = random_ids(used, used), random_ids(start, 1), []
        for runner in (padded, plain):
            begin(runner, 0, [0])
            begin(runner, 2, [7, 3, 5])
            runner.prefill([Span(other, 0, 0)])
            if start:
                runner.prefill([Span(before, 2, 0)])
            if runner is padded:
                runner._graphs, runner._graphed = {cpu: Direct()}, [32, 64, 96, 128]
                monkeypatch.setattr(module, "BEFORE_GRAPH", 0)
            logits.append([weights.head(weights.cfg, runner.prefill([Span(ids, 2, start)]))])
            runner._graphs = {}
            forced = Forced(runner, monkeypatch)
            logits[-1] += [forced.step({2: token, 0: token}).clone() for token in (5, 6)]
            monkeypatch.undo()
        assert keys == [(32 * -(-used // 32), start > 0)]
        for a, b in zip(*logits, strict=True):
            assert a.shape == b.shape and (a - b).abs().max() < 1e-4


def test_a_graph_is_made_for_what_comes_again(weights):
    runner = make_runner(weights)
    runner._graphs, runner._graphed = {torch.device("cpu"): None}, [32, 64, 1024]
    short, longer = Span(range(20), 0, 0), Span(range(40), 0, 0)
    assert [runner._graphed_rows([short]) for _ in range(module.BEFORE_GRAPH + 2)] == [0] * module.BEFORE_GRAPH + [
        32
    ] * 2
    assert not runner._graphed_rows([longer])
    assert not runner._graphed_rows([Span(range(20), 0, 1)]), "another graph: it begins no sequence"
    most = runner._graphed[-1]
    far = Span(range(20), 0, module.ROWS_TIMES_LATENTS // 32 - 19)
    for spans in ([short, longer], [far], [Span([1], 0, 0)], [Span(range(most + 1), 0, 0)]):
        assert not any(runner._graphed_rows(spans) for _ in range(module.BEFORE_GRAPH + 2))
    for span in (Span(range(20), 0, far.start - 1), Span(range(most), 0, 0)):
        assert any(runner._graphed_rows([span]) for _ in range(module.BEFORE_GRAPH + 2))


def test_first_tokens_are_each_prompts_own(weights):
    """Drawn together, with parameters of their own, behind a prompt that goes on."""
    params = [SamplingParams(temperature=1.0, seed=5), SamplingParams(seed=0), SamplingParams(temperature=2.0, seed=6)]
    spans = [Span(random_ids(n, n), slot, 0) for n, slot in ((70, 2), (1, 0), (9, 3))]
    alone, together = [], make_runner(weights)
    for span, each in zip(spans, params, strict=True):
        runner = make_runner(weights)
        for r, pages in ((runner, [0, 1]), (together, [2 * span.slot, 2 * span.slot + 1])):
            begin(r, span.slot, pages, each, span.ids)
        alone.append(runner.first_tokens(runner.prefill([span]), [span], "plain").token.item())
    begin(together, 1, [2, 3])
    h_SC = together.prefill([*spans, Span(random_ids(5), 1, 0)])
    assert together.first_tokens(h_SC, spans, "plain").token.tolist() == alone
    assert together.next_token[[2, 0, 3]].tolist() == alone and not together.next_token[1]


def test_a_sequence_does_not_see_its_neighbours(weights, monkeypatch):
    """Its logits stay when what runs beside it changes, but for the rounding of products with other batch sizes."""
    results = []
    for seed in (1, 2):
        runner = make_runner(weights)
        begin(runner, 0, [1, 2])
        begin(runner, 1, [3, 4])
        runner.prefill([Span(random_ids(65, 0), 0, 0), Span(random_ids(65, seed), 1, 0)])
        forced = Forced(runner, monkeypatch)
        results.append([forced.step({0: 7, 1: seed})[0].clone() for _ in range(3)])
        monkeypatch.undo()
    assert all((a - b).abs().max() < 1e-5 for a, b in zip(*results, strict=True))


def test_pages_and_slots_are_used_again_without_leaking(weights, monkeypatch):
    """NaN in everything that was given back: a new sequence must not read any of it."""
    runner, fresh = make_runner(weights), make_runner(weights)
    begin(runner, 1, [3, 9, 4])
    runner.prefill([Span(random_ids(190, 5), 1, 0)])
    for stage in runner.stages:
        for pages in stage.state.latent.values():
            pages.data.fill_(float("nan"))
        for kda in stage.state.kda.values():
            kda.s[1], kda.conv[1] = float("nan"), float("nan")
    logits = []
    for r in (runner, fresh):
        begin(r, 1, [9, 3, 4])
        logits.append([prefill_logits(r, random_ids(60, 6), 1, 25)])
        forced = Forced(r, monkeypatch)
        logits[-1] += [forced.step({1: token}).clone() for token in random_ids(10, 7)]
        monkeypatch.undo()
    for a, b in zip(*logits, strict=True):
        assert torch.equal(a, b)


def test_an_8_bit_cache_gives_the_same_however_the_text_is_cut(model, weights, monkeypatch):
    """A latent is rounded once, when it is written, so that all paths read the same."""
    ids = random_ids(130)
    with torch.no_grad():
        exact = model.logits(torch.tensor([ids]))[0]
    got = []
    for first, chunk in ((130, 1000), (130, 31), (1, 1)):
        runner = make_runner(weights, cache_bits=8)
        begin(runner, 0, [3, 1, 2])
        parts = [prefill_logits(runner, ids[:first], 0, chunk)]
        forced = Forced(runner, monkeypatch)
        parts += [forced.step({0: token}) for token in ids[first:]]
        monkeypatch.undo()
        got.append(torch.cat(parts))
    error = (got[0] - exact).norm() / exact.norm()
    assert 0 < error < 0.02
    for other in got[1:]:
        assert (other - got[0]).norm() / got[0].norm() < error / 10


def test_long_contexts_are_read_in_blocks(weights, monkeypatch):
    ids = random_ids(200)
    logits = []
    for block in (8192, 70):
        monkeypatch.setattr("klquant.model.mla.LATENT_BLOCK", block)
        runner = make_runner(weights)
        begin(runner, 0, [9, 3, 1, 8])
        logits.append(prefill_logits(runner, ids, 0, 45))
    assert (logits[0] - logits[1]).abs().max() < 1e-5


def test_sampled_tokens_do_not_depend_on_where_the_prompt_ends(weights):
    """Noise belongs to positions: 70 tokens and then decoding, or 40 and the rest forced, draw the same token."""
    ids, params = random_ids(70), SamplingParams(temperature=1.0, seed=5)
    tokens = []
    for first in (70, 69):
        runner = make_runner(weights)
        begin(runner, 0, [0, 1], params, ids)
        h = runner.prefill([span := Span(ids[:first], 0, 0)])
        if first < 70:
            runner.next_token[0] = ids[69]
            tokens.append(runner.decode([0], "plain").token.item())
        else:
            tokens.append(runner.first_tokens(h, [span], "plain").token.item())
    assert tokens[0] == tokens[1]


@pytest.mark.parametrize("where", ["model.embed_tokens", "model.layers.2", "lm_head"])
def test_what_makes_nan_is_named(tiny, where):
    broken = load(tiny)
    if where == "model.embed_tokens":
        broken.embedding_VC[9] = float("nan")
    elif where == "lm_head":
        broken.head.proj[9] = float("nan")
    else:
        broken.layers[2].fused.o_proj[0] = float("inf")
    runner = make_runner(broken)
    begin(runner, 0, [0])
    ids = [5, 9, 7]
    span = Span(ids, 0, 0)
    chosen = runner.first_tokens(runner.prefill([span]), [span], "greedy")
    assert chosen.token.tolist() == [-1]
    assert runner.decode([0], "greedy").token.tolist() == [-1]
    assert runner.find_bad_layer(ids, 0, [0], 2) == where


def test_nothing_is_blamed_when_all_is_well(runner):
    begin(runner, 0, [0, 1])
    assert runner.find_bad_layer(random_ids(70), 0, [0, 1], 33) is None


@pytest.mark.parametrize("embedded_outside", [False, True])
def test_stages_hand_the_stream_on(weights, monkeypatch, embedded_outside):
    """Layers in three runs, as if on three devices, and the embedding aside of the first, as on a CPU beside GPUs."""
    ids, params = random_ids(70), SamplingParams(temperature=1.0, seed=5)

    def answer(runner):
        begin(runner, 2, [0, 1], params, ids)
        span = Span(ids, 2, 0)
        tokens = [runner.first_tokens(runner.prefill([span]), [span], "plain").token[0].item()]
        for _ in range(6):
            tokens.append(runner.decode([-1, 2], "plain").token[1].item())
        return tokens

    want = answer(make_runner(weights))
    cpu = torch.device("cpu")
    monkeypatch.setattr(
        "klquant.engine.runner._stages", lambda _: [(cpu, range(1)), (cpu, range(1, 3)), (cpu, range(3, 4))]
    )
    monkeypatch.setattr(Runner, "_embeds_in_stage", not embedded_outside)
    split = make_runner(weights)
    assert [len(s.state.kda) + len(s.state.latent) for s in split.stages] == [1, 2, 1]
    assert answer(split) == want


def test_buckets():
    assert [bucket(n) for n in (1, 2, 3, 9, 17, 33, 64, 65, 200)] == [1, 2, 4, 16, 24, 48, 64, 128, 256]
    assert PAGE_SIZE == 64
