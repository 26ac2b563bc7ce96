"""What a chunk of the 48B launches on a card, counted without one, as in test_launches.

Attention and the delta rule are stand-ins that launch nothing here: one launch, and flash-linear-attention's own.
"""

from collections import Counter

import pytest
import torch

from klquant.engine import prefill
from klquant.engine.build import OneDevice
from klquant.engine.prefill import Span
from klquant.engine.runner import Runner
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline
from tests.engine.test_launches import META, NO_LAUNCH, Operations, card
from tests.kernels.launches import record
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
__all__ = ["card"]
PRODUCTS = {
    "linear_kernel", "unpack_kernel", "silu_mul_kernel", "group_kernel", "grouped_kernel", "combine_kernel",
}  # fmt: skip
VIEWS = NO_LAUNCH | {"transpose", "unbind", "alias"}


def chunk(layers, tokens, start, card):
    """(kernels of klquant, operations of torch) of a chunk through the first `layers` layers."""

    def attend(q, k, v, causal=False, is_causal=True):
        return torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype, device=META).transpose(1, 2)

    def part(q, k, v, causal):
        return attend(q, k, v), torch.empty(q.shape[:-1], dtype=torch.float32, device=META)

    card.setattr(prefill.F, "scaled_dot_product_attention", attend)
    card.setattr(prefill.model_mla, "part_attention", part)
    card.setattr(prefill, "gated_delta_rule", lambda q, k, v, raw, A_log, dt_bias, beta, state, borders: (v, state))
    config, layers = parse_synthetic(f"kimi-linear-48b:layers={layers}")
    weights = random_weights(synthetic_outline(config, "int4", layers), OneDevice(META, layers), torch.bfloat16)
    runner = Runner(weights, slots=2, pages=64, max_context=4096, cache_bits=8)
    with Operations() as operations:
        kernels = list(record(lambda: runner.prefill([Span([0] * tokens, 0, start)]), card))
    names = Counter(launch.kernel.__name__ for launch in kernels)
    return names, Counter({name: n for name, n in operations.count.items() if name not in VIEWS})


@pytest.mark.parametrize("start, parts", [(0, 1), (2048, 2)])
def test_launches_of_a_layer(start, parts, card):
    """Beside products, whose kernels depend on their sizes, and the experts'."""
    found = [chunk(n, 2048, start, card) for n in (2, 3, 4)]
    (two, some), (three, more), (four, most) = ((without(k, PRODUCTS), without(o, {"mm"})) for k, o in found)
    both = Counter(add_rms_norm_kernel=2, choose_kernel=1)
    assert three - two == both + Counter(prefill_inputs_kernel=1, gated_rms_norm_kernel=1)
    # The router reads FP32; the delta rule leaves a state.
    assert more - some == Counter(_to_copy=1, copy_=1)
    # Each part's latents are read and made keys and values; parts are joined, one alone has to be copied.
    own = Counter(write_latent_kernel=1, read_latent_kernel=parts, keys_values_kernel=parts, join_kernel=parts - 1)
    assert four - three == both + +own
    assert most - more == Counter(_to_copy=1) + Counter(clone=2 - parts)


def without(count, names):
    return Counter({name: n for name, n in count.items() if name not in names})
