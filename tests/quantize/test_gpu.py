"""Second moments on a card: BF16 tokens, FP32 sums."""

import pytest
import torch

from klquant.quantize.hessian import Moments

pytestmark = pytest.mark.gpu


def test_moments_of_bf16_tokens_are_summed_in_fp32():
    gen = torch.Generator().manual_seed(0)
    x, star, r = (torch.randn(5000, n, generator=gen).bfloat16() for n in (96, 96, 40))
    star = x + 0.1 * star
    cpu, gpu = Moments.zeros(96, drift=True, n=40), Moments.zeros(96, device="cuda", drift=True, n=40)
    for part in range(0, 5000, 1300):
        piece = slice(part, part + 1300)
        cpu.add(x[piece].double(), reference_TK=star[piece].double(), missing_TN=r[piece].double())
        gpu.add(x[piece].cuda(), reference_TK=star[piece].cuda(), missing_TN=r[piece].cuda())
    for name, tolerance in (("hh", 1e-5), ("drift", 5e-3), ("missing", 1e-5)):
        want, got = getattr(cpu, name), getattr(gpu, name).cpu()
        # The drift is a difference that goes back to BF16 before the product; the rest is exact but for the sum.
        assert float((got - want).norm() / want.norm()) < tolerance, name
    assert gpu.count.item() == 5000
