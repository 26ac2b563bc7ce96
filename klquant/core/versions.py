"""What made a checkpoint or measured it."""

from importlib.metadata import version

import klquant

PACKAGES = ("torch", "safetensors", "compressed-tensors", "tokenizers", "tiktoken")


def versions() -> dict[str, str]:
    """klquant's version and those of the packages that a result may depend on."""
    return {"klquant": klquant.__version__, **{name: version(name) for name in PACKAGES}}
