"""Variants of one model side by side: their names, who is on the front, what lies inside the noise, which to take."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path

from klquant.errors import UserError
from klquant.evaluate.result import Floor, Kld, MemoryAt, Quality, Reference, Result, check_comparable, load
from klquant.evaluate.sensitivity_result import Sensitivity
from klquant.recipe.memory import CARDS

PLOT_CONTEXT = 131_072  # tokens of context at which memory is compared


@dataclass(frozen=True)
class Variant:
    """One evaluated model. `name` is unique in a comparison."""

    name: str
    result: Result

    @property
    def is_baseline(self) -> bool:
        """Whether it is there for comparison only: no checkpoint that could be taken."""
        return self.result.model.baseline is not None

    @property
    def kld(self) -> Kld:
        return self.result.overall.kld

    @property
    def disk(self) -> int:
        return self.result.model.size.tensors

    @property
    def contexts(self) -> set[int]:
        """Those for which memory was predicted."""
        return {m.context for m in self.result.model.size.memory if m.cache_bits == 16}

    def memory(self, context: int, cache_bits: int = 16) -> MemoryAt | None:
        rows = self.result.model.size.memory
        return next((m for m in rows if (m.context, m.cache_bits) == (context, cache_bits)), None)

    def memory_on(self, card: str, context: int) -> MemoryAt | None:
        """The first way to run that `card` has room for: all on the card with a 16-bit cache, or the frugal one."""
        return next((m for m in self.result.model.size.memory if m.context == context and card in m.fits), None)


@dataclass(frozen=True)
class Choice:
    """What to take for a card at a context; both None where nothing fits."""

    context: int
    variant: Variant | None
    memory: MemoryAt | None


@dataclass(frozen=True)
class Comparison:
    """Variants from the largest to the smallest, all against `reference` over the same windows, and what is known of
    the parts of the model, over those windows too."""

    variants: tuple[Variant, ...]
    sensitivities: tuple[Sensitivity, ...] = ()

    @classmethod
    def load(cls, files: Sequence[Path]) -> "Comparison":
        """Raises UserError naming the file that cannot be read or cannot stand in one table with the others."""
        loaded = [(str(file), load(file, Result, Sensitivity)) for file in files]
        return cls.of([(name, x) for name, x in loaded if isinstance(x, Result)],
                      [(name, x) for name, x in loaded if isinstance(x, Sensitivity)])  # fmt: skip

    @classmethod
    def of(
        cls, results: Sequence[tuple[str, Result]], sensitivities: Sequence[tuple[str, Sensitivity]] = ()
    ) -> "Comparison":
        """Of results, and sensitivities of the same reference and text, each with the name of its file.

        Raises UserError, naming files, where there is no result, one lacks a reference, they cannot be compared
        (`check_comparable`), or memory was predicted for no context that all have.
        """
        if not results:
            raise UserError("a report needs a result of klquant eval; klquant sensitivity alone is none")
        for file, result in results:
            if result.reference is None:
                raise UserError(f"{file}: evaluated without a reference; run klquant eval again with --against")
        check_comparable([*results, *sensitivities])
        named = zip(_names(results), (result for _, result in results), strict=True)
        variants = sorted((Variant(name, result) for name, result in named), key=lambda v: (-v.disk, v.name))
        comparison = cls(tuple(variants), tuple(sensitivity for _, sensitivity in sensitivities))
        if not comparison.contexts:
            files = ", ".join(file for file, _ in results)
            raise UserError(f"{files}: memory is predicted for no context that all have; run klquant eval again")
        return comparison

    @property
    def first(self) -> Result:
        """What all variants have in common can be read from it."""
        return self.variants[0].result

    @property
    def reference(self) -> Reference:
        return self.first.reference

    @property
    def floor(self) -> Floor | None:
        """Equal in all results that have one: it depends on the reference and the windows only."""
        results = (*(v.result for v in self.variants), *self.sensitivities)
        return next((result.floor for result in results if result.floor is not None), None)

    @property
    def takable(self) -> tuple[Variant, ...]:
        return tuple(v for v in self.variants if not v.is_baseline)

    @property
    def contexts(self) -> list[int]:
        """Those that every variant has."""
        return sorted(set.intersection(*(v.contexts for v in self.variants)))

    @property
    def plot_context(self) -> int:
        """PLOT_CONTEXT, or the longest that a model of shorter context has."""
        return PLOT_CONTEXT if PLOT_CONTEXT in self.contexts else self.contexts[-1]

    def front(self, size: Callable[[Variant], float]) -> list[Variant]:
        """Takable variants that no other one beats in both size and mean KLD, by size."""
        front: list[Variant] = []
        for variant in sorted(self.takable, key=lambda v: (size(v), v.kld.mean)):
            if not front or variant.kld.mean < front[-1].kld.mean:
                front.append(variant)
        return front

    def choices(self, card: str) -> tuple[Choice, ...]:
        return tuple(self._choose(card, context) for context in self.contexts)

    def choices_by_cards(self) -> list[tuple[list[str], tuple[Choice, ...]]]:
        """Neighbouring cards with the same choices, together."""
        groups: list[tuple[list[str], tuple[Choice, ...]]] = []
        for card in CARDS:
            choices = self.choices(card)
            if groups and groups[-1][1] == choices:
                groups[-1][0].append(card)
            else:
                groups.append(([card], choices))
        return groups

    def _choose(self, card: str, context: int) -> Choice:
        """The least mean KLD of what fits; among those within the noise of it, the smallest."""
        fitting = [v for v in self.takable if v.memory_on(card, context) is not None]
        if not fitting:
            return Choice(context, None, None)
        least = min(v.kld.mean for v in fitting)
        chosen = min((v for v in fitting if v.kld.mean - least <= self.noise), key=lambda v: (v.disk, v.kld.mean))
        return Choice(context, chosen, chosen.memory_on(card, context))

    def beaten(self) -> list[tuple[Variant, Variant]]:
        """(baseline, takable variant) where the baseline takes no more disk and is nearer by more than the noise."""
        return [
            (b, v)
            for b in self.variants
            for v in self.takable
            if b.is_baseline and b.disk <= v.disk and v.kld.mean - b.kld.mean > self.noise
        ]

    @property
    def noise(self) -> float:
        """The floor's mean KLD: a difference of two means within it is one that arithmetic alone makes."""
        return 0.0 if self.floor is None else max(0.0, self.floor.overall.kld.mean)  # an estimate may be below 0

    def times_floor(self, quality: Quality, domain: str | None = None) -> float | None:
        floor = self.floor_quality(domain)
        return quality.kld.mean / floor.kld.mean if floor is not None and floor.kld.mean > 0 else None

    def inside_floor(self, quality: Quality, domain: str | None = None) -> bool:
        """Whether a mean KLD is no larger than the floor's can be."""
        floor = self.floor_quality(domain)
        if floor is None:
            return False
        return quality.kld.mean <= (floor.kld.mean if floor.kld.high is None else floor.kld.high)

    def floor_quality(self, domain: str | None) -> Quality | None:
        if self.floor is None:
            return None
        return self.floor.overall if domain is None else self.floor.domains.get(domain)

    def too_close(self) -> list[tuple[Variant, Variant, bool]]:
        """Neighbours by mean KLD that differ by no more than the noise (True), or whose ranges overlap (False)."""
        ranked = sorted(self.variants, key=lambda v: v.kld.mean)
        pairs = []
        for better, worse in pairwise(ranked):
            if self.floor is not None and worse.kld.mean - better.kld.mean <= self.noise:
                pairs.append((better, worse, True))
            elif better.kld.high is not None and worse.kld.low is not None and better.kld.high >= worse.kld.low:
                pairs.append((better, worse, False))
        return pairs


def _names(results: Sequence[tuple[str, Result]]) -> list[str]:
    """The first way of naming that tells all apart: recipe (a baseline's title), folder (with its recipe), path, result
    file; numbered if none does."""
    short, folders = zip(*(_short_names(result) for _, result in results), strict=True)
    ways = [short, folders, [r.model.name for _, r in results], [file for file, _ in results]]
    for names in ways:
        if len(set(names)) == len(names):
            return list(names)
    return [f"{name} ({number})" for number, name in enumerate(ways[-1], 1)]


def _short_names(result: Result) -> tuple[str, str]:
    model, made = result.model, result.quantization
    if model.baseline is not None:
        title, recipe = model.baseline.title, model.baseline.recipe
        return title, title if model.baseline.method == "rtn" else f"{title}, {recipe}"  # RTN's has the recipe in it
    folder = Path(model.name).name or model.name
    return (folder if made is None else made.recipe), folder
