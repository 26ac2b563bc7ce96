"""Needles: texts of the right length that hold what is asked for, and a score that chance explains exactly."""

import random
import re
from math import sqrt

import pytest

from klquant.errors import UserError
from klquant.evaluate.options import TaskOptions
from klquant.evaluate.tasks import needle
from klquant.evaluate.tasks.filler import sentence
from klquant.evaluate.tasks.model import Answer
from klquant.evaluate.tasks.needle import KINDS, Item, NeedleTask, make_item, rate

STATED = re.compile(r"The access code of the (\w+ \w+) is (\d{6})\.")
ASKED = re.compile(r"Answer: The access code of the (\w+ \w+) is$")


def made(tokenizer, name, length=1500, depth=0.5, seed=0) -> Item:
    return make_item(tokenizer.encode, tokenizer.bos_id, KINDS[name], length, depth, random.Random(seed))


@pytest.mark.parametrize("length", [900, 1501, 4000])
@pytest.mark.parametrize("name", KINDS)
def test_a_text_holds_what_is_asked_for_and_nothing_else_with_a_number(tokenizer, name, length):
    item, kind = made(tokenizer, name, length), KINDS[name]
    assert length - 130 < len(item.context) + max(map(len, item.right + item.wrong)) <= length
    assert item.context[0] == tokenizer.bos_id
    text = tokenizer.decode(item.context[1:])
    stated, asked = STATED.findall(text), ASKED.search(text)[1]
    right, wrong = ([tokenizer.decode(ids).strip() for ids in codes] for codes in (item.right, item.wrong))
    assert sorted(code for key, code in stated if key == asked) == sorted(right) and len(right) == kind.codes
    others = {code for key, code in stated if key != asked}
    assert others == (set(wrong) if kind.names > 1 else set())
    assert len({key for key, _ in stated}) == kind.names and len(set(right + wrong)) == len(right + wrong)
    assert re.findall(r"\d+", text) == [code for _, code in stated]


def test_names_of_several_needles_are_alike(tokenizer):
    stated = STATED.findall(tokenizer.decode(made(tokenizer, "needle_multikey").context))
    asked = ASKED.search(tokenizer.decode(made(tokenizer, "needle_multikey").context))[1].split()
    others = [key.split() for key, _ in stated if key.split() != asked]
    assert all((a == asked[0]) != (b == asked[1]) for a, b in others) and len(others) == 7


@pytest.mark.parametrize("depth", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_the_needle_lies_as_deep_as_it_should(tokenizer, depth):
    text = tokenizer.decode(made(tokenizer, "needle_single", 8000, depth).context)
    hay = text[: text.index("\n\nQuestion")]
    assert STATED.search(hay).start() / len(hay) == pytest.approx(depth, abs=0.03)


def test_a_seed_gives_the_same_text_and_another_another(tokenizer):
    first, again, other = (made(tokenizer, "needle_multikey", seed=s) for s in (0, 0, 1))
    assert first == again and first.context != other.context


def test_filler_has_whole_sentences_without_numbers():
    for seed in range(300):
        text = sentence(random.Random(seed))
        assert re.fullmatch(r"[A-Z][^{}\d]*\.", text)


def test_right_is_what_is_likelier_than_everything_wrong():
    item = Item([0], [[1], [2]], [[3], [4]])

    def rated(*logprobs: float, greedy: int | None = None):
        return rate(item, [Answer(x, i == greedy) for i, x in enumerate(logprobs)])

    assert rated(-1, -2, -3, -4, greedy=0) == (1, 1)
    assert rated(-1, -3, -2, -4, greedy=1) == (0.5, 1)
    assert rated(-3, -4, -1, -2, greedy=2) == (0, 0)
    assert rated(-1, -1, -1, -4) == (0, 0)


@pytest.mark.parametrize("name", KINDS)
def test_who_has_not_read_the_text_is_right_as_often_as_chance_says(tokenizer, name):
    """A fixed liking for certain codes, whatever was read: 4 standard errors around the chance that is reported."""
    scores = []
    for seed in range(400):
        item = made(tokenizer, name, 900, 0.5, seed)
        liked = [Answer(random.Random(str(ids)).random(), False) for ids in item.right + item.wrong]
        scores.append(rate(item, liked)[0])
        chance = 1 / (len(item.wrong) + 1)
    mean = sum(scores) / len(scores)
    spread = sqrt(sum((s - mean) ** 2 for s in scores)) / len(scores)
    assert abs(mean - chance) < 4 * spread and spread < 0.03


def test_lengths_are_those_that_the_context_has_room_for():
    options = TaskOptions(("needle",))
    assert NeedleTask("needle_single", options, 4096).lengths == [1024, 4096]
    assert NeedleTask("needle_single", options, 1 << 20).lengths == list(needle.LENGTHS)
    with pytest.raises(UserError, match="needle_single: the model's context of 500 tokens has no room for 1,024"):
        NeedleTask("needle_single", options, 500)
