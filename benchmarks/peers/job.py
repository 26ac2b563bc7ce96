"""What a peer is asked to do, and how its result gets back under the hub's names."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import click
import torch
from safetensors.torch import save_file
from torch import Tensor

from klquant.calibrate.text import open_pool
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.checkpoint.names import TensorClass, parse_name
from klquant.checkpoint.reader import CheckpointReader
from klquant.core.spec import WeightSpec
from klquant.recipe.plan import make_plan
from klquant.recipe.schema import load_recipe

WINDOW = 2048
# transformers' names of what the hub calls w1, w2 and w3.
EXPERT_PARTS = {"w1": "gate_proj", "w2": "down_proj", "w3": "up_proj"}


@dataclass(frozen=True)
class Job:
    """Quantize the modules in `specs` on the windows `ids_WS` (int64 [windows, 2048]), keep those in `kept`.

    Both name linear modules of a loaded transformers model with one `nn.Linear` for each map of each expert.
    """

    reader: CheckpointReader
    specs: dict[str, WeightSpec]
    kept: list[str]
    ids_WS: Tensor
    device: str

    @property
    def folder(self) -> str:
        return str(self.reader.folder)

    @property
    def routed(self) -> WeightSpec:
        """The grid of the routed experts: what a tool's own settings say, where others are exceptions."""
        return next(spec for name, spec in self.specs.items() if ".experts." in name)

    def write(self, out: Path, weights: Mapping[str, Tensor]) -> None:
        """A copy of the checkpoint with the dequantized `weights` [N, K] by module, in FP32, not rounded again.

        Raises ValueError when they are not those that were asked for.
        """
        if weights.keys() != self.specs.keys():
            raise ValueError(f"not the modules asked for: {sorted(weights.keys() ^ self.specs.keys())[:5]} …")
        tensors = {}
        for name in self.reader.tensors:
            key = parse_name(name, self.reader.config)
            module = module_name(key.module, key.cls) if key.is_matrix else None
            tensors[name] = weights[module].float().cpu().contiguous() if module in weights else self.reader.read(name)
            if tensors[name].shape != self.reader.info(name).shape:
                raise ValueError(f"{name}: {tuple(tensors[name].shape)} instead of {self.reader.info(name).shape}")
        out.mkdir(parents=True)
        save_file(tensors, out / "model.safetensors")
        for file in self.reader.folder.iterdir():
            if file.suffix != ".safetensors" and file.is_file() and not file.name.endswith(".index.json"):
                shutil.copy(file, out)


def module_name(hub: str, cls: TensorClass) -> str:
    """A linear module on the hub → in a transformers model whose experts are taken apart."""
    if cls is TensorClass.ROUTED_EXPERTS:
        before, part = hub.rsplit(".", 1)
        return f"{before.replace('.block_sparse_moe.', '.mlp.')}.{EXPERT_PARTS[part]}"
    return hub.replace(".block_sparse_moe.", ".mlp.")


def make_job(model: Path, recipe: str, calib: str, windows: int, device: str) -> Job:
    """The tensors and bits of `recipe`, and the text that `klquant quantize --calib` would take."""
    reader = CheckpointReader.open(model)
    tensors = {name: (info.dtype, info.shape) for name, info in reader.tensors.items()}
    plan = make_plan(load_recipe(recipe), reader.config, tensors)
    specs = {module_name(d.key.module, d.key.cls): d.spec for d in plan.decisions if d.key.is_matrix}
    pool = open_pool(calib, load_tokenizer(model), reader.config, window=WINDOW)
    return Job(
        reader, {name: spec for name, spec in specs.items() if spec is not None},
        [name for name, spec in specs.items() if spec is None], pool.take(windows), device,
    )  # fmt: skip


def peer(run: Callable[..., Mapping[str, Tensor]]) -> click.Command:
    """`run(job, **options)`, which quantizes and gives the weights by module, as a command."""

    @click.command(help=run.__doc__)
    @click.argument("model", type=click.Path(exists=True, file_okay=False, path_type=Path))
    @click.option("--recipe", default="int4", help="A recipe of klquant: its tensors, bits and groups.")
    @click.option("--calib", required=True, help="Calibration text, as for klquant quantize.")
    @click.option("--windows", default=64, help="Windows of 2,048 tokens.")
    @click.option("--device", default="cuda:0" if torch.cuda.is_available() else "cpu")
    @click.option("-o", "--out", required=True, type=click.Path(exists=False, path_type=Path))
    def command(model: Path, recipe: str, calib: str, windows: int, device: str, out: Path, **options) -> None:
        if out.exists():
            raise click.UsageError(f"{out} is there already")
        job = make_job(model, recipe, calib, windows, device)
        job.write(out, run(job, **options))
        click.echo(f"{len(job.specs)} tensors on {len(job.ids_WS)} windows: {out}")

    command.params += getattr(run, "__click_params__", [])
    return command
