"""Models by folder or hub id. On the hub they are large: what can be refused is refused before their weights come."""

from collections.abc import Callable, Sequence
from pathlib import Path

from klquant.checkpoint.hub import is_hub_id, read_hub_index, resolve_model
from klquant.checkpoint.reader import CheckpointReader
from klquant.pipeline.run import check_model
from klquant.recipe.plan import Plan, make_plan
from klquant.recipe.schema import Recipe

Check = Callable[[Sequence[Plan], Path], None]
"""`check(plans, folder)` raises what there is against them; the folder has the model's small files."""


def fetch(models: Sequence[str | None], check: Callable[[], None]) -> list[Path | None]:
    """The folders of `models`, None for None. `check` raises what there is to say before weights come from the hub; of
    folders alone the work itself says it."""
    given = [model for model in models if model is not None]
    if any(map(is_hub_id, given)):
        for model in given:
            resolve_model(model, weights=False)
        check()
    return [None if model is None else resolve_model(model, weights=True) for model in models]


def open_model(model: str, recipes: Sequence[Recipe], target: str, check: Check) -> tuple[CheckpointReader, list[Plan]]:
    """The checkpoint `model`, whole and in 16 bits, and what each recipe does to it. Raises UserError, as `check`."""
    if is_hub_id(model):
        folder, (config, tensors) = resolve_model(model, weights=False), read_hub_index(model)
        check([make_plan(recipe, config, tensors, target) for recipe in recipes], folder)
    reader = CheckpointReader.open(resolve_model(model, weights=True))
    check_model(reader)
    shapes = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    plans = [make_plan(recipe, reader.config, shapes, target) for recipe in recipes]
    check(plans, reader.folder)
    return reader, plans
