"""Grids: decoding what was encoded gives the nearest value there is."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klquant.core.grid import Quantized, common_grid, decode, encode
from klquant.core.spec import WHOLE_ROW, WeightSpec
from klquant.errors import UserError

SPECS = st.builds(
    WeightSpec,
    bits=st.sampled_from([3, 4, 8]),
    group_size=st.sampled_from([32, 64, 128, WHOLE_ROW]),
    symmetric=st.booleans(),
)


def grid(spec, n, k, seed):
    """Random positive BF16 scales and, when asymmetric, zero points."""
    gen = torch.Generator().manual_seed(seed)
    shape = (n, spec.groups(k))
    scale = (torch.rand(shape, generator=gen) + 0.01).bfloat16()
    if spec.symmetric:
        return scale, None
    return scale, torch.randint(spec.qmin, spec.qmax + 1, shape, generator=gen).to(torch.int8)


@settings(max_examples=100, deadline=None)
@given(spec=SPECS, n=st.integers(1, 4), groups=st.integers(1, 3), seed=st.integers(0, 99))
def test_encode_is_the_inverse_of_decode(spec, n, groups, seed):
    k = 40 if spec.group_size == WHOLE_ROW else spec.group_size * groups
    scale, zero = grid(spec, n, k, seed)
    codes = torch.randint(spec.qmin, spec.qmax + 1, (n, k), generator=torch.Generator().manual_seed(seed))
    codes = codes.to(torch.int8)
    assert torch.equal(encode(decode(codes, scale, zero, spec), scale, zero, spec), codes)


@settings(max_examples=50, deadline=None)
@given(spec=SPECS, seed=st.integers(0, 99))
def test_no_other_code_is_nearer(spec, seed):
    k = 128
    scale, zero = grid(spec, 3, k, seed)
    w = torch.randn(3, k, generator=torch.Generator().manual_seed(seed)) * 4
    codes = encode(w, scale, zero, spec)
    error = (decode(codes, scale, zero, spec) - w).abs()
    for step in (-1, 1):
        other = (codes.to(torch.int16) + step).clamp(spec.qmin, spec.qmax).to(torch.int8)
        assert (error <= (decode(other, scale, zero, spec) - w).abs() + 1e-5).all()


def test_decoding_rounds_once():
    spec = WeightSpec(bits=8, group_size=WHOLE_ROW)
    codes = torch.tensor([[127, -128, 1, 0]], dtype=torch.int8)
    scale = torch.tensor([[0.0123]]).bfloat16()
    exact = codes.double() * scale.double()
    assert torch.equal(decode(codes, scale, None, spec).double(), exact)
    assert torch.equal(decode(codes, scale, None, spec, torch.bfloat16), exact.bfloat16())


def test_a_batch_of_experts_decodes_as_each_alone():
    spec = WeightSpec(bits=4, group_size=32, symmetric=False)
    scale, zero = grid(spec, 6, 64, 0)
    codes = encode(torch.randn(6, 64), scale, zero, spec)
    stack = Quantized(spec, codes.view(2, 3, 64), scale.view(2, 3, 2), zero.view(2, 3, 2))
    alone = Quantized(spec, codes, scale, zero).decode()
    assert torch.equal(stack.decode().flatten(0, 1), alone)
    assert torch.equal(stack[1].decode(), alone[3:])


def test_a_group_that_does_not_divide_k_is_refused_by_name():
    with pytest.raises(UserError, match=r"model\.x: 100 input features .* group size 32"):
        WeightSpec(bits=4, group_size=32).groups(100, "model.x")


@settings(max_examples=100, deadline=None)
@given(specs=st.lists(SPECS, min_size=1, max_size=3), seed=st.integers(0, 99))
def test_a_common_grid_holds_the_same_values(specs, seed):
    joint, k = common_grid(specs), 256
    for spec in specs:
        codes = torch.randint(spec.qmin, spec.qmax + 1, (3, k), generator=torch.Generator().manual_seed(seed))
        w = Quantized(spec, codes.to(torch.int8), *grid(spec, 3, k, seed))
        there = w.on(joint)
        assert there.spec == joint
        assert there.scale.shape == (3, joint.groups(k))
        assert (there.zero is None) == joint.symmetric
        assert torch.equal(there.decode(), w.decode())
