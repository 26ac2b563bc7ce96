"""`klquant plan MODEL`: every decision and its cost, from config and tensor index alone."""

import json
from pathlib import Path

import click

import klquant
from klquant.checkpoint.names import TensorClass
from klquant.cli.calibration import require_text
from klquant.cli.options import recipe_option, target_option
from klquant.recipe.memory import Memory, contexts, offloaded, predict_memory
from klquant.recipe.plan import Plan, make_plan
from klquant.recipe.rows import Row, plan_rows
from klquant.recipe.schema import load_recipe

JSON_SCHEMA = 1


@click.command("plan")
@click.argument("model")
@recipe_option
@target_option
@click.option("--json", "as_json", is_flag=True, help="Print one JSON object instead of tables.")
def command(model: str, recipe: str, target: str, as_json: bool) -> None:
    """Show what a recipe does to each tensor of MODEL, what it costs and what it needs to run.

    MODEL is a checkpoint folder, a folder with config.json and tensors.json, or a hub id (owner/name). No weights are
    read.
    """
    chosen = load_recipe(recipe)
    from klquant.checkpoint.hub import is_hub_id, read_hub_index
    from klquant.checkpoint.index import read_tensor_index

    config, tensors = read_hub_index(model) if is_hub_id(model) else read_tensor_index(Path(model))
    plan = make_plan(chosen, config, tensors, target)
    require_text(plan, reads=False)
    if as_json:
        click.echo(json.dumps(plan_json(plan, model), indent=1))
    else:
        from klquant.cli.render import console, print_plan

        print_plan(console(), plan, memory_table(plan), model)


def plan_json(plan: Plan, model: str) -> dict:
    """The plan for machines. Bytes are exact integers; a change of a key's meaning raises `schema`."""
    whole = plan.part()
    return {
        "schema": JSON_SCHEMA,
        "klquant": klquant.__version__,
        "model": model,
        "recipe": plan.recipe.name,
        "target": plan.target,
        "digest": plan.digest(),
        "needs_calibration": plan.needs_calibration,
        "tensors": [_row_json(row) for row in plan_rows(plan)],
        "totals": {"tensors": len(plan.decisions), "weights": whole.weights, "bytes_before": whole.bytes_before,
                   "bytes_after": whole.bytes_after, "bytes_read_per_token": plan.read_per_token.bytes_after},
        "bits_per_weight": {"routed_experts": plan.part(TensorClass.ROUTED_EXPERTS).bits,
                            "always_active": plan.always_active.bits, "whole": whole.bits},
        "memory": [_memory_json(plan, memory) for memory in memory_table(plan)],
        "changes": [
            {"class": c.cls, "roles": list(c.roles), "tensors": c.count, "wanted": c.wanted.model_dump(), "why": c.why,
             "extra_bytes": c.extra_bytes}
            for c in plan.changes
        ],
    }  # fmt: skip


def memory_table(plan: Plan) -> list[Memory]:
    """At each context: everything on the card with a 16-bit cache, then the least: embedding off, cache at 8 bits."""
    sizes = plan.weight_sizes
    return [
        predict_memory(plan.config, sizes, context, cache_bits=bits, embedding_on_cpu=bits == 8)
        for bits in (16, 8)
        for context in contexts(plan.config)
    ]


def _row_json(row: Row) -> dict:
    return {
        "class": row.cls,
        "roles": list(row.roles),
        "layers": list(row.layers),
        "tensors": row.count,
        "weights": row.part.weights,
        "kept": row.spec is None,
        "dtypes": list(row.dtypes),
        "scheme": row.spec and row.spec.model_dump(),
        "algorithm": row.algorithm,
        "bytes_before": row.part.bytes_before,
        "bytes_after": row.part.bytes_after,
        "why": row.why,
    }


def _memory_json(plan: Plan, m: Memory) -> dict:
    return {
        "context": m.context,
        "sequences": m.sequences,
        "cache_bits": m.cache_bits,
        "embedding_on_cpu": m.embedding_on_cpu,
        "weights": m.weights,
        "latent_cache": m.latent_cache,
        "kda_state": m.kda_state,
        "workspace_estimate": m.workspace,
        "runtime_estimate": m.runtime,
        "total": m.total,
        "fits": m.fits(),
        "fits_with_experts_on_host": offloaded(plan.config, plan.weight_sizes, m),
    }
