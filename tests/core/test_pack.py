"""Packing is a bijection at every shape, and compressed-tensors agrees on the bits."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from klquant.core.pack import pack, packed_words, unpack

BITS = range(1, 9)


def random_codes(shape, bits, seed=0):
    gen = torch.Generator().manual_seed(seed)
    half = 1 << (bits - 1)
    return torch.randint(-half, half, shape, generator=gen).to(torch.int8)


@settings(max_examples=200, deadline=None)
@given(bits=st.integers(1, 8), n=st.integers(1, 5), k=st.integers(1, 100), lead=st.sampled_from([(), (1,), (3,)]))
def test_unpack_is_the_inverse_of_pack(bits, n, k, lead):
    codes = random_codes((*lead, n, k), bits, seed=n * 1000 + k)
    words = pack(codes, bits)
    assert words.dtype == torch.int32 and words.shape == (*lead, n, packed_words(k, bits))
    assert torch.equal(unpack(words, bits, k), codes)


@pytest.mark.parametrize("bits", BITS)
@pytest.mark.parametrize("k", [1, 7, 8, 31, 32, 33, 96, 100, 2304])
def test_the_words_are_those_of_compressed_tensors(bits, k):
    from compressed_tensors.compressors.pack_quantized.helpers import pack_to_int32, unpack_from_int32

    codes = random_codes((5, k), bits)
    theirs = pack_to_int32(codes, bits)
    assert torch.equal(pack(codes, bits), theirs)
    assert torch.equal(unpack(theirs, bits, k), unpack_from_int32(theirs, bits, codes.shape))


@pytest.mark.parametrize("bits", BITS)
def test_the_ends_of_the_range_survive(bits):
    half = 1 << (bits - 1)
    codes = torch.tensor([[-half, half - 1] * 9], dtype=torch.int8)
    assert torch.equal(unpack(pack(codes, bits), bits, 18), codes)


@pytest.mark.parametrize("bits", [3, 4, 8])
def test_a_single_word_in_any_layout(bits):
    """Zero points of few rows are a column of words, whose strides torch lets be anything."""
    codes = torch.arange(3 * 2).view(3, 2).to(torch.int8) % (1 << (bits - 1))
    words_NW = pack(codes.T.contiguous(), bits).T.contiguous().T
    assert torch.equal(unpack(words_NW, bits, 3), codes.T)
    column = torch.empty_strided((5, 1), (1, 5), dtype=torch.int32).copy_(pack(codes[:1, :1].expand(5, 1), bits))
    assert torch.equal(unpack(column, bits, 1), codes[:1, :1].expand(5, 1))


def test_non_contiguous_input():
    codes = random_codes((6, 40), 3).T
    assert torch.equal(unpack(pack(codes, 3), 3, 6), codes)
