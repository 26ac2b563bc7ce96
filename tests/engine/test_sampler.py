"""Sampling: the distribution it draws from, what it must never draw, and that a row is its own."""

from dataclasses import replace

import pytest
import torch

from klquant.engine.request import SamplingParams
from klquant.engine.sampler import SamplingState, mode_of, sample
from klquant.errors import UserError
from klquant.kernels.sample.reference import gumbel

VOCAB = 50
DRAWS = 4000


def logits(rows=1, seed=0):
    return 2 * torch.randn(rows, VOCAB, generator=torch.Generator().manual_seed(seed))


def draw(logits_BV, params, positions, slots=None, tokens=()):
    """Tokens of rows that each have their own parameters, in the mode that serves all."""
    state = SamplingState.empty(len(params) + 1, logits_BV.shape[1], "cpu")
    for slot, p in enumerate(params):
        state.set(slot, p, tokens)
    slots = torch.arange(len(params)) if slots is None else slots
    return sample(logits_BV, state, slots, torch.as_tensor(positions), mode_of(params))


def many(params, row, tokens=()):
    """Frequencies of DRAWS draws at as many positions."""
    state = SamplingState.empty(1, VOCAB, "cpu")
    state.set(0, params, tokens)
    one = torch.zeros(DRAWS, dtype=torch.int64)
    seen = state.seen.clone()
    chosen = sample(row.expand(DRAWS, -1), state, one, torch.arange(DRAWS), mode_of([params]))
    state.seen.copy_(seen)
    return torch.bincount(chosen.token, minlength=VOCAB) / DRAWS


def chi_square(frequencies, p):
    """Normal deviates that Pearson's statistic is from its mean, over tokens expected five times or more."""
    often = p * DRAWS >= 5
    groups = torch.cat([often.nonzero()[:, 0], torch.tensor([-1])])
    observed = torch.stack([frequencies[i] if i >= 0 else frequencies[~often].sum() for i in groups]) * DRAWS
    expected = torch.stack([p[i] if i >= 0 else p[~often].sum() for i in groups]) * DRAWS
    kept = expected > 0
    statistic = ((observed - expected)[kept] ** 2 / expected[kept]).sum()
    free = kept.sum() - 1
    return ((statistic - free) / (2 * free) ** 0.5).item()


@pytest.mark.parametrize("temperature", [0.5, 1.0, 1.7])
def test_draws_follow_the_softmax(temperature):
    row = logits()
    frequencies = many(SamplingParams(temperature=temperature, seed=7), row)
    assert abs(chi_square(frequencies, (row[0] / temperature).softmax(-1))) < 4


@pytest.mark.parametrize(
    "options", [{"top_k": 5}, {"top_p": 0.8}, {"min_p": 0.1}, {"top_k": 9, "top_p": 0.7, "min_p": 0.05}]
)
def test_narrowed_draws_follow_what_is_left(options):
    row, temperature = logits(seed=3), 1.3
    frequencies = many(SamplingParams(temperature=temperature, seed=11, **options), row)
    p = (row[0] / temperature).softmax(-1)
    ranked = p.argsort(descending=True).tolist()
    if k := options.get("top_k"):
        ranked = ranked[:k]
    total, kept = p[ranked].sum(), []
    for token in ranked:
        if p[kept].sum() / total >= options.get("top_p", 1) or p[token] < options.get("min_p", 0) * p.max():
            break
        kept.append(token)
    left = torch.zeros(VOCAB)
    left[kept] = p[kept] / p[kept].sum()
    assert frequencies[left == 0].sum() == 0
    assert abs(chi_square(frequencies, left)) < 4


def test_greedy_takes_the_likeliest_in_every_mode():
    rows = logits(4)
    for options in ({}, {"logprobs": 3}, {"top_p": 0.5}):
        params = [SamplingParams(seed=i, **options) for i in range(4)]
        assert torch.equal(draw(rows, params, [5] * 4).token, rows.argmax(-1))
    beside = [SamplingParams(seed=1), SamplingParams(seed=1, temperature=1.0)]
    assert draw(rows[:2], beside, [5, 5]).token[0] == rows[0].argmax()


def test_the_first_of_equal_logits_is_the_only_choice_of_top_k_1():
    row = torch.zeros(1, VOCAB)
    assert many(SamplingParams(temperature=1.0, top_k=1, seed=3), row)[0] == 1


def test_a_row_draws_the_same_token_whatever_is_beside_it():
    rows = logits(6)
    params = [SamplingParams(temperature=0.9, seed=100 + i) for i in range(6)]
    positions = [4, 9, 1, 30, 2, 77]
    together = draw(rows, params, positions).token
    for i in range(6):
        assert draw(rows[i : i + 1], params[i : i + 1], positions[i : i + 1]).token[0] == together[i]
    # A neighbour that needs the sorted path does not change what the others draw.
    mixed = [*params[:5], SamplingParams(temperature=0.9, top_p=0.5, seed=105)]
    assert torch.equal(draw(rows, mixed, positions).token[:5], together[:5])


def test_noise_depends_on_seed_position_and_token():
    tokens = torch.arange(1000)
    rows = gumbel(torch.tensor([1, 1, 2, 1 << 40]), torch.tensor([5, 6, 5, 5]), tokens)
    assert rows.isfinite().all()
    correlation = torch.corrcoef(rows) - torch.eye(4)
    assert correlation.abs().max() < 4 / 1000**0.5
    assert torch.equal(gumbel(torch.tensor([1]), torch.tensor([5]), tokens.flip(0)[None])[0], rows[0].flip(0))


def test_noise_is_gumbel():
    """Its distribution function is exp(−exp(−x)); Kolmogorov's bound at one in a thousand."""
    x = gumbel(torch.arange(20), torch.arange(20), torch.arange(1000)).flatten().sort().values.double()
    step = (torch.arange(len(x)) + 0.5) / len(x)
    assert ((-(-x).exp()).exp() - step).abs().max() < 1.95 / len(x) ** 0.5


def test_repetition_penalty_as_transformers_has_it():
    from transformers import RepetitionPenaltyLogitsProcessor

    row, seen = logits(), [3, 7, 7, 20]
    want = RepetitionPenaltyLogitsProcessor(1.8)(torch.tensor([seen]), row.clone())
    frequencies = many(SamplingParams(temperature=1.0, repetition_penalty=1.8, seed=2), row, seen)
    assert abs(chi_square(frequencies, want[0].softmax(-1))) < 4


def test_a_drawn_token_counts_as_seen():
    row = logits()
    state = SamplingState.empty(1, VOCAB, "cpu")
    state.set(0, SamplingParams(repetition_penalty=1e6, seed=0), [])
    tokens = [sample(row, state, torch.tensor([0]), torch.tensor([i]), "full").token.item() for i in range(10)]
    positive = (row > 0).sum().item()
    assert len(set(tokens[: min(10, positive)])) == min(10, positive)


def test_who_asks_for_logprobs_draws_the_same_token():
    rows, positions = logits(5), [3, 1, 4, 1, 5]
    kinds = (
        {},
        {"temperature": 1.0},
        {"temperature": 1.0, "top_p": 0.9},
        {"top_k": 7, "temperature": 2.0},
        {"min_p": 0.1},
    )
    params = [SamplingParams(seed=i, **kind) for i, kind in enumerate(kinds)]
    alone = [draw(rows[i : i + 1], [p], positions[i : i + 1]) for i, p in enumerate(params)]
    assert all(chosen.logprob is None for chosen in alone)
    told = draw(rows, [replace(p, logprobs=2) for p in params], positions)
    assert torch.equal(told.token, torch.cat([chosen.token for chosen in alone]))


def test_logprobs_are_the_models_own():
    row = logits()
    chosen = draw(row, [SamplingParams(temperature=3.0, repetition_penalty=2.0, seed=1, logprobs=4)], [0], tokens=[1])
    want = row.log_softmax(-1)
    assert torch.allclose(chosen.logprob, want[0, chosen.token])
    assert torch.equal(chosen.top_logprob[0, :4], want.sort(descending=True).values[0, :4])


@pytest.mark.parametrize("options", [{}, {"temperature": 1.0}, {"top_k": 3, "temperature": 1.0}])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_logits_that_are_no_numbers_give_no_token(options, bad):
    rows = logits(3)
    rows[1, 17] = bad
    token = draw(rows, [SamplingParams(seed=1, **options)] * 3, [0, 0, 0]).token
    assert token[1] == -1 and token[0] >= 0 and token[2] >= 0


@pytest.mark.parametrize(
    "wrong",
    [{"temperature": -1}, {"temperature": float("nan")}, {"top_p": 0}, {"top_p": 1.5}, {"min_p": 2}, {"top_k": -1},
     {"max_new_tokens": 0}, {"repetition_penalty": 0}, {"seed": -1}, {"stop": ("",)}, {"stop": "END"},
     {"logprobs": 21}],
)  # fmt: skip
def test_parameters_out_of_range_are_refused_by_name(wrong):
    with pytest.raises(UserError, match=next(iter(wrong))):
        SamplingParams(**wrong)
