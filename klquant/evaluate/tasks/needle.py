"""Needles in a haystack, made here from a seed: nothing to download, and an answer without sampling.

Filler text of a given length holds sentences "The access code of the red lantern is 481902."; the question asks for one
of them. The model is right where the right code is likelier than every other one offered. Like the tasks of RULER
(arXiv 2404.06654), in three kinds:

- `needle_single`: one needle; the other codes offered are nowhere in the text.
- `needle_multikey`: several needles of like names, whose codes are the ones offered.
- `needle_multivalue`: a name with several codes among other needles; the score is the share of its codes that are
  likelier than all codes of other names.

Codes are drawn alike, so a model that has not read the text is right as often as `chance` says. `exact_match`: greedy
decoding writes a right code; that the most likely token is the right one at every place of it says so without decoding.
"""

import hashlib
import json
import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

from klquant.errors import UserError
from klquant.evaluate.options import TaskOptions, Watcher
from klquant.evaluate.tasks.filler import KINDS_OF_THING, THINGS, sentence
from klquant.evaluate.tasks.model import Answer, Query, TaskModel
from klquant.evaluate.tasks.record import TaskResult
from klquant.evaluate.tasks.scores import task_value
from klquant.evaluate.tasks.text import TaskText

Encode = Callable[[str], list[int]]

VERSION = 1
LENGTHS = (1_024, 4_096, 16_384, 65_536)  # tokens, the question among them; those the model's context has room for
ITEMS = 20  # of each length, their needles spread evenly over the depths of the text
OFFERED = 8  # codes of needle_single


@dataclass(frozen=True)
class Kind:
    """Names in the text, and how many codes the one asked for has."""

    names: int
    codes: int


KINDS = {"needle_single": Kind(1, 1), "needle_multikey": Kind(8, 1), "needle_multivalue": Kind(6, 3)}
ALL = "needle"  # all of them


@dataclass(frozen=True)
class Item:
    """Token ids: the text with its question, right codes, wrong ones."""

    context: list[int]
    right: list[list[int]]
    wrong: list[list[int]]


class NeedleTask:
    """One kind at every length. Raises UserError where the model has no room for the shortest."""

    writes = False

    def __init__(self, name: str, options: TaskOptions, room: int) -> None:
        self.name, self.kind, self.options = name, KINDS[name], options
        self.lengths = [length for length in LENGTHS if length <= room]
        if not self.lengths:
            raise UserError(f"task {name}: the model's context of {room:,} tokens has no room for {LENGTHS[0]:,}")
        self.version = f"needle {VERSION}"
        self.items: list[Item] = []

    def ask(self, text: TaskText) -> str:
        count, digest = self.options.limit or ITEMS, hashlib.sha256()
        encode, bos = cache(text.tokenizer.encode), text.tokenizer.bos_id  # sentences repeat in a long text
        seeds = [f"{self.options.seed}/{self.name}/{length}" for length in self.lengths]
        self.items = [
            make_item(encode, bos, self.kind, length, (i + 0.5) / count, random.Random(f"{seed}/{i}"))
            for length, seed in zip(self.lengths, seeds, strict=True)
            for i in range(count)
        ]
        for item in self.items:
            digest.update(json.dumps([item.context, item.right, item.wrong]).encode())
        return digest.hexdigest()

    def run(self, model: TaskModel, text: TaskText, watcher: Watcher, stage: str, sha256: str) -> list[TaskResult]:
        queries = [Query(item.context, item.right + item.wrong) for item in self.items]
        batches = model.plan(queries)
        watcher.begin(stage, model.work(batches))
        answers = model.answer(queries, batches, watcher.advance)
        rated = [rate(item, given) for item, given in zip(self.items, answers, strict=True)]
        wrong = len(self.items[0].wrong)
        return [
            self._result("acc", [r[0] for r in rated], 1 / (wrong + 1), sha256),
            self._result("exact_match", [r[1] for r in rated], None, sha256),
        ]

    def _result(self, metric: str, scores: list[float], chance: float | None, sha256: str) -> TaskResult:
        count = len(scores) // len(self.lengths)
        parts = {f"{length:,} tokens": scores[i * count :][:count] for i, length in enumerate(self.lengths)}
        return TaskResult(
            **dict(task_value(parts, "items")), task=self.name, metric=metric, higher_is_better=True, chance=chance,
            weighted_by="items", items=len(scores), cut=0, few_shot=0, limit=self.options.limit, seed=self.options.seed,
            chat=False, version=self.version, sha256=sha256,
        )  # fmt: skip


def rate(item: Item, answers: list[Answer]) -> tuple[float, float]:
    """Share of the right codes that are likelier than all wrong ones; whether greedy decoding writes a right one."""
    right, wrong = answers[: len(item.right)], answers[len(item.right) :]
    best = max(a.logprob for a in wrong)
    return sum(a.logprob > best for a in right) / len(right), float(any(a.greedy for a in right))


def make_item(encode: Encode, bos: int, kind: Kind, length: int, depth: float, draw: random.Random) -> Item:
    """A text of at most `length` tokens, hardly less. `depth`, 0 to 1, is where the needle lies that is asked for; the
    others, and its name's other codes, lie anywhere."""
    names = _names(kind.names, draw)
    others = kind.names - 1 or OFFERED - 1
    codes = [str(code) for code in draw.sample(range(100_000, 1_000_000), kind.codes + others)]
    right, wrong = codes[: kind.codes], codes[kind.codes :]
    needles = [(names[0], code) for code in right] + list(zip(names[1:], wrong, strict=False))
    depths = [depth, *(draw.random() for _ in needles[1:])]
    question = encode(
        f"\n\nQuestion: What is the access code of the {names[0]}?\nAnswer: The access code of the {names[0]} is"
    )
    hay = [encode(f" The access code of the {name} is {code}.") for name, code in needles]
    answers = [encode(f" {code}") for code in codes]
    room = length - 1 - sum(map(len, hay)) - len(question) - max(map(len, answers))
    filler = list(_filler(encode, room, draw))
    places = sorted(zip((round(d * len(filler)) for d in depths), range(len(hay)), strict=True), reverse=True)
    for place, needle in places:  # from the end, so that places stay
        filler.insert(place, hay[needle])
    context = [bos, *(token for piece in filler for token in piece), *question]
    return Item(context, answers[: kind.codes], answers[kind.codes :])


def _names(count: int, draw: random.Random) -> list[str]:
    """`count` different names; half of those after the first share its first word, half its second."""
    first, *firsts = draw.sample(KINDS_OF_THING, count)
    second, *seconds = draw.sample(THINGS, count)
    alike = [f"{first} {x}" for x in seconds[: (count - 1) // 2]]
    return [f"{first} {second}", *alike, *(f"{x} {second}" for x in firsts[: count - 1 - len(alike)])]


def _filler(encode: Encode, room: int, draw: random.Random) -> Iterator[list[int]]:
    """Sentences' ids, until the next one would exceed `room` tokens."""
    while True:
        ids = encode(f" {sentence(draw)}")
        if len(ids) > room:
            return
        room -= len(ids)
        yield ids
