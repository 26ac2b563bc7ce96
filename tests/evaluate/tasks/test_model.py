"""Log-likelihoods and greedy text are transformers', however the questions are batched and the model is held."""

import random

import pytest
import torch

from klquant.errors import UserError
from klquant.evaluate import trace
from klquant.evaluate.tasks import generate as generate_module
from klquant.evaluate.tasks import model as model_module
from klquant.evaluate.tasks.generate import Prompt, generate
from klquant.evaluate.tasks.model import Query, require_resident
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint

LENGTHS = (1, 2, 63, 64, 65, 150)


def ids(draw: random.Random, count: int) -> list[int]:
    return [0, *(draw.randrange(3, 259) for _ in range(count - 1))]


@pytest.fixture(scope="module")
def queries():
    """Continuations of one token, of several, some that share a beginning."""
    draw = random.Random(0)
    found = []
    for length in LENGTHS:
        stem = ids(draw, 6)[1:]
        more = [[5], [6], stem, [*stem, 7], [*stem, 8], ids(draw, 31)[1:]]
        found.append(Query(ids(draw, length), draw.sample(more, 4)))
    return found


@pytest.fixture(scope="module")
def expected(queries, truth):
    def one(context, continuation):
        logp_NV = truth([*context, *continuation])[len(context) - 1 : -1]
        wanted = torch.tensor(continuation)
        return float(logp_NV.gather(-1, wanted[:, None]).sum()), bool((logp_NV.argmax(-1) == wanted).all())

    return [[one(q.context, c) for c in q.continuations] for q in queries]


@pytest.mark.parametrize("chunk", [2048, 100, 40], ids=["rows", "both", "trunks"])
@pytest.mark.parametrize("resident", [True, False], ids=["resident", "streamed"])
def test_answers_are_those_of_transformers(
    tiny, queries, expected, open_model, resident, chunk, request, monkeypatch
):  # fmt: skip
    monkeypatch.setitem(trace.BATCH_TOKENS, "cpu", chunk)
    monkeypatch.setattr(model_module, "ROUND_TOKENS", 300)
    if not resident:
        request.getfixturevalue("streamed")
    model = open_model(tiny)
    assert model.runner.resident == resident
    batches, steps = model.plan(queries), []
    assert any(b.trunk for b in batches) == (chunk < 2048) and any(not b.trunk for b in batches)
    answers = model.answer(queries, batches, steps.append)
    assert sum(steps) == model.work(batches)
    for ours, theirs in zip(answers, expected, strict=True):
        assert [a.logprob for a in ours] == pytest.approx([logprob for logprob, _ in theirs], rel=1e-5)
        assert [a.greedy for a in ours] == [greedy for _, greedy in theirs]


def test_a_long_continuation_passes_bit_by_bit_too(tiny, truth, open_model, monkeypatch):
    monkeypatch.setitem(trace.BATCH_TOKENS, "cpu", 40)
    written = ids(random.Random(1), 130)[1:]
    model = open_model(tiny)
    queries = [Query([0], [written])]
    ((answer,),) = model.answer(queries, model.plan(queries))
    logp_NV = truth([0, *written])[:-1]
    assert answer.logprob == pytest.approx(float(logp_NV.gather(-1, torch.tensor(written)[:, None]).sum()), rel=1e-5)


def greedily(truth, start: list[int], count: int) -> list[int]:
    written = []
    for _ in range(count):
        written.append(int(truth([*start, *written])[-1].argmax()))
    return written


def test_sequences_of_any_length_write_together_what_each_writes_alone(tiny, truth, open_model, monkeypatch):
    monkeypatch.setattr(generate_module, "SEQUENCES", 3)
    monkeypatch.setitem(trace.BATCH_TOKENS, "cpu", 40)
    draw = random.Random(2)
    starts = [ids(draw, length) for length in (1, 5, 64, 90, 3)]
    most = [4, 1, 9, 6, 12]
    done = []
    prompts = [Prompt(start, n, lambda written: False) for start, n in zip(starts, most, strict=True)]
    assert generate(open_model(tiny), prompts, done.append) == [
        greedily(truth, start, n) for start, n in zip(starts, most, strict=True)
    ]
    assert sum(done) == len(prompts)


def test_a_sequence_ends_where_it_is_said_to(tiny, truth, open_model):
    start = ids(random.Random(3), 9)
    whole = greedily(truth, start, 8)
    (written,) = generate(open_model(tiny), [Prompt(start, 8, lambda written: written[-1] == whole[4])])
    assert written == whole[: whole.index(whole[4]) + 1]


def test_greedy_means_that_greedy_decoding_writes_just_that(tiny, open_model):
    """What needles rely on for their exact match."""
    model, start = open_model(tiny), ids(random.Random(4), 40)
    (written,) = generate(model, [Prompt(start, 6, lambda written: False)])
    others = [[*written[:at], written[at] ^ 1, *written[at + 1 :]] for at in range(6)]
    queries = [Query(start, [written, *others])]
    (answers,) = model.answer(queries, model.plan(queries))
    assert [a.greedy for a in answers] == [True, *[False] * 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("model.layers.2.block_sparse_moe.shared_experts.down_proj.weight", "first in the output of layer 2"),
        ("lm_head.weight", "NaN or infinite logits in a task"),
    ],
)
def test_infinite_values_are_refused(open_model, tmp_path, name, message):
    raw = tiny_config()
    tensors = tiny_tensors(raw)
    tensors[name].fill_(3e38)
    model, queries = open_model(write_checkpoint(tmp_path / "broken", raw, tensors)), [Query([0, 5], [[6]])]
    with pytest.raises(UserError, match=f"broken: .*{message}"):
        model.answer(queries, model.plan(queries))


def test_a_model_that_does_not_fit_is_said_so_with_figures(tiny, open_model, streamed):
    with pytest.raises(UserError, match=r"task gsm8k has the model write text, .* [\d.]+ MB, .* are free; leave"):
        require_resident(open_model(tiny).runner, "gsm8k")
