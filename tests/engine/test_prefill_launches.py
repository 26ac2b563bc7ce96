"""What a chunk of the 48B launches on a card, counted without one, as in test_launches.

Attention and the delta rule are stand-ins that launch nothing here: one launch, and flash-linear-attention's own.
"""

from collections import Counter

import pytest
import torch

from klquant.engine import prefill
from klquant.engine.build import OneDevice
from klquant.engine.runner import Runner
from klquant.engine.synthetic import parse_synthetic, random_weights, synthetic_outline
from tests.engine.test_launches import META, NO_LAUNCH, Operations, card
from tests.kernels.launches import record
from tests.triton_interpreter import interpreting, needs_triton

pytestmark = [needs_triton, pytest.mark.skipif(interpreting, reason="this process interprets kernels")]
__all__ = ["card"]
VIEWS = NO_LAUNCH | {"transpose", "unbind", "alias"}


def chunk(layers, tokens, start, card):
    """(kernels of klquant, operations of torch) of a chunk through the first `layers` layers."""

    def attend(q, k, v, causal=False, is_causal=True):
        return torch.empty(q.shape[0], q.shape[2], q.shape[1], v.shape[-1], dtype=q.dtype, device=META).transpose(1, 2)

    def part(q, k, v, causal):
        return attend(q, k, v), torch.empty(q.shape[:-1], dtype=torch.float32, device=META)

    card.setattr(prefill.F, "scaled_dot_product_attention", attend)
    card.setattr(prefill.model_mla, "part_attention", part)
    card.setattr(prefill, "gated_delta_rule", lambda q, k, v, raw, A_log, dt_bias, beta, state: (v, state))
    config, layers = parse_synthetic(f"kimi-linear-48b:layers={layers}")
    weights = random_weights(synthetic_outline(config, "int4", layers), OneDevice(META, layers), torch.bfloat16)
    runner = Runner(weights, slots=2, pages=64, max_context=4096, cache_bits=8)
    with Operations() as operations:
        kernels = list(record(lambda: runner.prefill([0] * tokens, 0, start), card))
    names = Counter(launch.kernel.__name__ for launch in kernels)
    return names, Counter({name: n for name, n in operations.count.items() if name not in VIEWS})


@pytest.mark.parametrize("start, parts", [(0, 1), (2048, 2)])
def test_launches_of_a_layer(start, parts, card):
    """The norms, two packed projections, the router's two, the experts' four and the shared expert's two, of which
    torch's part is the router's input in FP32 and its product; and what is the mixer's own."""
    (two, some), (three, more), (four, most) = (chunk(n, 2048, start, card) for n in (2, 3, 4))
    kernels, products = 2 + 2 + 1 + 4 + 2, Counter(_to_copy=1, mm=1)
    kda, mla = three - two, four - three
    assert kda.total() == kernels + 2, kda
    # Three products for the gates, and the state that the delta rule leaves.
    assert more - some == products + Counter(mm=3, copy_=1)
    # The latent is written; of every part it is read and made keys and values, and two parts are joined.
    assert mla.total() == kernels + 1 + 2 * parts + (parts - 1), mla
    # Joining leaves heads side by side, what one attention gives has to be copied.
    assert most - more == products + Counter(mm=parts, clone=2 - parts)
