"""On a CUDA GPU: graphs give what eager steps give, and BF16 answers hold to the same rules as FP32 ones on a CPU."""

from collections import Counter
from dataclasses import replace
from itertools import product

import pytest
import torch

from klquant.calibrate.tokenizer import load_tokenizer
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CheckpointReader
from klquant.engine.build import OneDevice
from klquant.engine.engine import Engine
from klquant.engine.limits import Limits
from klquant.engine.load import load_weights
from klquant.engine.prefill import Span
from klquant.engine.request import SamplingParams
from klquant.engine.runner import BEFORE_GRAPH, GRAPHED
from klquant.engine.session import Session
from klquant.engine.usage import count_offloaded
from klquant.model.forward import Model
from tests.model.oracle import oracle

pytestmark = pytest.mark.gpu
LIMITS = Limits(max_context=512, max_batch=5, cache_tokens=2048, chunk=64)
GREEDY = SamplingParams(max_new_tokens=24, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=24, temperature=0.8, seed=3, ignore_eos=True)


@pytest.fixture(scope="module")
def trained(demo_model):
    """A model whose routers have made up their minds, so that rounding moves few routes."""
    reader = QuantizedReader.open(demo_model)
    places = OneDevice(torch.device("cuda", 0), reader.config.num_layers)
    return load_weights(reader, places, torch.bfloat16), load_tokenizer(demo_model)


def prompts(tokenizer, count=7):
    text = "def test_open(self):\n    with open(path) as file:\n        self.assertEqual(file.read(), text)\n\n"
    ids = tokenizer.encode(text * 4)
    return [[tokenizer.bos_id, *ids[: 9 * n + 1]] for n in range(count)]


def met(times):
    """As if prompts of every size had come so often."""
    return Counter(dict.fromkeys(product(GRAPHED, (False, True)), times))


def eager(engine):
    """The same engine without graphs and without padding."""
    engine.runner._graphs = {}
    return engine


@pytest.mark.parametrize(
    "params",
    [GREEDY, DRAWN, replace(DRAWN, top_p=0.9), replace(DRAWN, top_p=0.9, logprobs=2)],
    ids=["greedy", "plain", "narrow", "full"],
)
def test_graphs_give_what_eager_steps_give(trained, params):
    """Four rows need no padding, so the steps are the same but for how they are launched."""
    texts = prompts(trained[1])[:4]
    want = eager(Engine(*trained, LIMITS, ahead=False)).generate(texts, params)
    for ahead in (False, True):
        got = Engine(*trained, LIMITS, ahead=ahead).generate(texts, params)
        assert [a.tokens for a in got] == [a.tokens for a in want]
        assert all(a.error is None for a in got)


def test_a_prompt_in_a_graph_is_the_prompt(trained):
    """Padded to the graph's rows, with another sequence in slot 0 while it is captured, and replayed; alone and behind
    other tokens."""
    runner = Engine(*trained, LIMITS).runner
    texts, seed = prompts(trained[1]), GREEDY.with_seed()

    def prefill(ids, slot, times, before=()):
        runner.bind(slot, range(8 * slot, 8 * slot + 8), seed, ids, fresh=True)
        if before:
            runner._met = met(0)
            runner.prefill([Span(before, slot, 0)])
        runner._met = met(times)
        h = runner.prefill([Span(ids, slot, len(before))]).clone()
        kda = [pool for stage in runner.stages for pool in stage.state.kda.values()]
        return h, *(t[slot].clone() for pool in kda for t in (pool.s, pool.conv))

    others = prefill(texts[6], 0, 0)
    alone = [(ids, ()) for ids in (texts[5], texts[1], texts[4], texts[5])]
    for ids, before in (*alone, (texts[4], texts[5]), (texts[5], texts[6]), (texts[4], texts[1])):
        want, got = (prefill(ids, 1, times, before) for times in (0, BEFORE_GRAPH))
        assert all(
            ((a.double() - b.double()).norm() / b.double().norm()).item() < 2**-5
            for a, b in zip(got, want, strict=True)
        )
    captured = [key for graphs in runner._graphs.values() for key in graphs._captured if key[0] == "prompt"]
    assert {key[-1] for key in captured} == {False, True}
    kda = [pool for stage in runner.stages for pool in stage.state.kda.values()]
    assert all(
        torch.equal(t[0], other) for t, other in zip((t for p in kda for t in (p.s, p.conv)), others[1:], strict=True)
    )


@pytest.mark.parametrize("leaving", [1, 4, 6])
def test_answers_do_not_depend_on_where_experts_lie(trained, demo_model, leaving):
    """Alone, together, and in prompts of all sizes; most experts come and go."""
    reader = QuantizedReader.open(demo_model)
    places = OneDevice(torch.device("cuda", 0), reader.config.num_layers, leaving=leaving)
    weights = load_weights(reader, places, torch.bfloat16)
    layers = [layer.model.mlp.experts.offload for layer in weights.layers[1:]]
    # Too few layers to do so on their own.
    layers[0].staging.open(layers, max(sum(w.nbytes for w in layer.far) for layer in layers))
    here, there = Engine(*trained, LIMITS), Engine(weights, trained[1], LIMITS)
    texts = prompts(trained[1])
    for params in (GREEDY, DRAWN):
        # The longest often enough to become a graph, and sequences that decode between two chunks of prompts.
        for asked in (texts[:1], texts[3:4], texts, *[texts[6:]] * (BEFORE_GRAPH + 2), texts):
            want, got = (engine.generate(asked, params) for engine in (here, there))
            assert [a.tokens for a in got] == [a.tokens for a in want]
    found = count_offloaded(weights)
    assert 0 < found.missing < found.chosen and count_offloaded(trained[0]) is None
    assert any(key[0] == "prompt" for graphs in there.runner._graphs.values() for key in graphs._captured)
    assert len({id(layer.staging) for layer in layers}) == 1


def test_most_tokens_are_the_fp32_models(trained, demo_model):
    """Given the same text before it, the likeliest token in BF16 is that of FP32 but where two are nearly equal."""
    model = Model.load(CheckpointReader.open(demo_model), torch.float32, "cuda")
    texts = prompts(trained[1])
    same = total = 0
    for ids, answer in zip(texts, Engine(*trained, LIMITS).generate(texts, GREEDY), strict=True):
        with torch.no_grad():
            logits = model.logits(torch.tensor([[*ids, *answer.tokens]], device="cuda"))[0]
        want = logits[len(ids) - 1 : -1].argmax(-1).cpu()
        same += (want == torch.tensor(answer.tokens)).sum().item()
        total += len(want)
    assert same / total > 0.95


@pytest.mark.parametrize("cache_bits", [16, 8])
def test_a_second_turn_is_one_prompt_of_everything(trained, cache_bits):
    """Up to rounding: decode kernels and prefill kernels differ in their last bits, so a few tokens may."""
    limits = replace(LIMITS, cache_bits=cache_bits)
    engine, ids = Engine(*trained, limits), prompts(trained[1])[3]
    with Session(engine) as session:
        list(session.stream(ids, GREEDY))
        ids = [*session.tokens, *prompts(trained[1])[1]]
        list(session.stream(ids, GREEDY))
        got = session.answer().tokens
    want = Engine(*trained, limits).generate([ids], GREEDY)[0].tokens
    assert got[:4] == want[:4]


@pytest.mark.parametrize("cache_bits", [16, 8])
def test_a_prompt_goes_on_from_an_earlier_one(trained, cache_bits):
    """Up to rounding, and only where that is faster than to compute it again."""
    limits = replace(LIMITS, cache_bits=cache_bits, max_context=2048, cache_tokens=4096)
    engine, text = Engine(*trained, replace(limits, prefixes=1)), prompts(trained[1])[6]
    for length, reused in ((engine.runner.least_prefix - 1, 0), (1300, 1300)):
        first = (text * 40)[:length]
        engine.generate([first, text], GREEDY)
        job = engine.submit([*first, *text], GREEDY)
        list(engine.follow(job))
        want = Engine(*trained, limits).generate([[*first, *text]], GREEDY)[0].tokens
        assert job.answer().tokens[:4] == want[:4] and job.scheduled.reused == reused
        again = engine.submit([*first, *text], GREEDY)
        list(engine.follow(again))
        assert again.answer().tokens == job.answer().tokens, "the same state, and the same kernels"
        assert again.scheduled.reused == again.scheduled.prompt


def test_logits_that_are_no_numbers_end_only_their_own_answer(demo_model):
    reader = QuantizedReader.open(demo_model)
    weights = load_weights(reader, OneDevice(torch.device("cuda", 0), reader.config.num_layers), torch.bfloat16)
    tokenizer = load_tokenizer(demo_model)
    texts = prompts(tokenizer)[:3]
    want = Engine(weights, tokenizer, LIMITS).generate(texts, GREEDY)
    weights.embedding_VC[700] = float("nan")
    texts[1] = [5, 700, 6]
    got = Engine(weights, tokenizer, LIMITS).generate(texts, GREEDY)
    assert got[1].finish == "error" and "model.embed_tokens is the first" in got[1].error
    assert [got[0].tokens[:4], got[2].tokens[:4]] == [want[0].tokens[:4], want[2].tokens[:4]]


def test_an_embedding_on_the_cpu(trained, demo_model):
    weights, tokenizer = trained
    aside = replace(weights, embedding_VC=weights.embedding_VC.cpu())
    texts = prompts(tokenizer)[:4]
    want = Engine(weights, tokenizer, LIMITS).generate(texts, GREEDY)
    assert [a.tokens for a in Engine(aside, tokenizer, LIMITS).generate(texts, GREEDY)] == [a.tokens for a in want]


def test_layers_on_two_gpus(trained, demo_model):
    if torch.cuda.device_count() < 2:
        pytest.skip("needs two GPUs")
    limits = {"max_context": 512, "max_batch": 5, "cache_tokens": 2048, "chunk": 64}
    one = Engine.from_pretrained(demo_model, devices="cuda:0", **limits)
    both = Engine.from_pretrained(demo_model, devices="cuda:0,cuda:1", **limits)
    assert len(both.runner.stages) == 2
    texts = prompts(trained[1])
    assert [a.tokens for a in both.generate(texts, GREEDY)] == [a.tokens for a in one.generate(texts, GREEDY)]
    # Each alone, in graphs: one a stage.
    for engine in (one, both):
        engine.runner._met = met(BEFORE_GRAPH)
    for text in texts[1:]:
        assert both.generate([text], GREEDY)[0].tokens == one.generate([text], GREEDY)[0].tokens
    assert all(any(key[0] == "prompt" for key in g._captured) for g in both.runner._graphs.values())


@pytest.mark.slow
def test_the_testbed_agrees_with_transformers(testbed):
    """Top-1 agreement of BF16 engine steps with transformers in FP32, along the engine's own greedy text."""
    engine = Engine.from_pretrained(testbed, devices="cuda:0", max_context=1024, max_batch=8, cache_tokens=8192)
    reference = oracle(testbed).cuda()
    texts = [engine.tokenizer.decode(torch.randint(10, 2000, (20,)).tolist()) for _ in range(32)]
    same = total = 0
    for text, answer in zip(texts, engine.generate(texts, replace(GREEDY, max_new_tokens=256)), strict=True):
        ids = engine.encode(text)
        with torch.no_grad():
            logits = reference(torch.tensor([[*ids, *answer.tokens]], device="cuda")).logits[0]
        want = logits[len(ids) - 1 : -1].argmax(-1).cpu()
        same += (want == torch.tensor(answer.tokens)).sum().item()
        total += len(want)
    assert same / total >= 0.995, f"{same / total:.4f}"
