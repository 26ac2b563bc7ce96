"""On a card: second moments of BF16 tokens, summed in FP32; systems of equations on two at once."""

from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from klquant.quantize.factor import solve_systems
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


@pytest.mark.skipif(torch.cuda.device_count() < 2, reason="needs two cards")
def test_systems_are_solved_on_two_cards_at_once():
    """Enough of 18 unknowns that torch takes MAGMA's batched LU."""
    cards, runs = [torch.device("cuda", i) for i in range(2)], 100

    def system(card: torch.device) -> tuple[torch.Tensor, torch.Tensor]:
        gen = torch.Generator(card).manual_seed(0)
        x = torch.randn(65536, 18, 40, device=card, generator=gen)
        return x @ x.mT, torch.randn(65536, 18, 1, device=card, generator=gen)

    systems = [system(card) for card in cards]
    want = [solve_systems(*s)[0] for s in systems]

    def solve(i: int) -> int:
        with torch.cuda.device(cards[i]):
            return sum(not torch.equal(solve_systems(*systems[i])[0], want[i]) for _ in range(runs))

    with ThreadPoolExecutor(2) as pool:
        assert list(pool.map(solve, range(2))) == [0, 0]
