"""What working on a layer takes on a device: estimates, by which a run chooses its steps. Bytes.

They decide how much is done at once and never what comes out. Counted for the widest layer, one with experts.
"""

from dataclasses import dataclass
from math import prod

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors, place_of


@dataclass(frozen=True)
class Footprint:
    """`weights`: of the layer, BF16 model and quantized model; `codes`: its grids; `working`: a block of experts being
    fitted, or a batch of tokens on its way, whichever is more; `block`: the moments of one block of experts."""

    weights: int
    codes: int
    working: int
    block: int

    @property
    def least(self) -> int:
        """With the moments of one block at a time."""
        return self.weights + self.codes + self.working + self.block

    @classmethod
    def of(cls, config: KimiLinearConfig, tokens: int, itemsize: int, block: int, corrects: bool) -> "Footprint":
        """For batches of `tokens`, `itemsize` bytes a value, blocks of `block` experts, target corrections or not."""
        c, i = config.hidden_size, config.moe_intermediate_size
        experts = 3 * config.num_experts * c * i
        # Weights, targets, residuals and products of w1 and w3 stacked; Hessian, its ordered copy and factor.
        fitting = 4 * block * (6 * 2 * c * i + 4 * c * c)
        # Streams, norms and sums [T, C]; hidden units of the routed rows; the mixers' inputs and outputs.
        batch = tokens * itemsize * (6 * c + 2 * config.top_k * i + 4 * config.kda_width)
        sums = 4 * (2 if corrects else 1)
        return cls(
            weights=itemsize * (widest_layer(config) + experts),
            codes=experts,
            working=max(fitting, batch),
            block=block * sums * max(c * c, 2 * i * i),
        )


def widest_layer(config: KimiLinearConfig) -> int:
    """Weights of the largest layer."""
    sizes = [0] * config.num_layers
    for name, shape in expected_tensors(config).items():
        layer = place_of(name).layer
        if layer is not None:
            sizes[layer] += prod(shape)
    return max(sizes)
