"""The whole model: as transformers computes it, and the same however it is cut into calls."""

import pytest
import torch

from klquant.checkpoint.reader import CheckpointReader
from klquant.model.block import block
from klquant.model.forward import Model, stream_hidden, stream_logits
from klquant.model.kda import KDAState
from klquant.model.weights import LinearOp, linear
from tests.model.oracle import oracle
from tests.tiny import tiny_config, tiny_tensors, write_checkpoint

LENGTHS = (1, 63, 64, 65, 1000)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(tiny):
    return Model.load(CheckpointReader.open(tiny), torch.float32, "cpu")


def random_ids(model, batch, length, seed=0):
    return torch.randint(0, model.cfg.vocab_size, (batch, length), generator=torch.Generator().manual_seed(seed))


def decode(model, ids, cuts, state=None):
    """Logits of `ids` fed in calls that end at `cuts`."""
    state = model.new_state(ids.shape[0]) if state is None else state
    return torch.cat([model.logits(part, state) for part in ids.tensor_split(cuts, 1)], 1)


@pytest.fixture(scope="module")
def tiny_oracle(tiny):
    return oracle(tiny)


@pytest.mark.parametrize("length", LENGTHS)
def test_tiny_logits_are_those_of_transformers(model, tiny_oracle, length):
    ids = random_ids(model, 2, length)
    assert (model.logits(ids) - tiny_oracle(ids).logits).abs().max() <= 1e-4


def test_small_activations_meet_the_right_epsilons(tmp_path):
    """Where a norm's input is small its epsilon is the result: each norm's own, and the L2 norm's of q and k."""
    raw = tiny_config()
    tensors = tiny_tensors(raw)
    small = ("embed_tokens", "q_proj", "k_proj", "kv_a_proj_with_mqa", "v_proj")
    tensors = {n: t * 3e-3 if any(s in n for s in small) else t for n, t in tensors.items()}
    folder = write_checkpoint(tmp_path / "small", raw, tensors)
    model = Model.load(CheckpointReader.open(folder), torch.float32, "cpu")
    ids = random_ids(model, 2, 100)
    assert (model.logits(ids) - oracle(folder)(ids).logits).abs().max() <= 1e-4


@pytest.mark.slow
def test_testbed_logits_are_those_of_transformers(testbed):
    reference = oracle(testbed)
    model = Model.load(CheckpointReader.open(testbed), torch.float32, "cpu")
    for length in LENGTHS:
        ids = random_ids(model, 1, length)
        assert (model.logits(ids) - reference(ids).logits).abs().max() <= 1e-3


@pytest.mark.parametrize("length", LENGTHS)
def test_decode_equals_prefill(model, length):
    ids = random_ids(model, 2, length)
    steps = decode(model, ids, list(range(1, length)))
    assert (steps - model.logits(ids)).abs().max() < 1e-4


@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("part", [7, 63, 64, 65, 600])
def test_chunked_prefill_equals_prefill(model, length, part):
    ids = random_ids(model, 2, length)
    parts = decode(model, ids, list(range(part, length, part)))
    assert (parts - model.logits(ids)).abs().max() < 1e-4


def test_latents_in_blocks_are_seen_the_same(model, monkeypatch):
    ids = random_ids(model, 2, 300)
    whole = model.logits(ids)
    monkeypatch.setattr("klquant.model.mla.LATENT_BLOCK", 70)
    assert (decode(model, ids, [90, 250]) - whole).abs().max() < 1e-4


def test_prefill_then_decode_then_prefill(model):
    ids = random_ids(model, 1, 200)
    mixed = decode(model, ids, [97, 98, 99, 100, 165])
    assert (mixed - model.logits(ids)).abs().max() < 1e-4


def test_states_agree_after_the_same_tokens(model):
    ids = random_ids(model, 1, 130)
    one, other = model.new_state(1), model.new_state(1)
    decode(model, ids, [], one)
    decode(model, ids, [1, 2, 65], other)
    for a, b in zip(one, other, strict=True):
        if isinstance(a, KDAState):
            assert torch.allclose(a.conv, b.conv, atol=1e-5) and torch.allclose(a.s, b.s, atol=1e-5)
            assert a.s.dtype == torch.float32
        else:
            assert a.length == b.length == 130
            assert torch.allclose(a.buffer_BSL[:, :130], b.buffer_BSL[:, :130], atol=1e-5)


@pytest.mark.parametrize("length", [1, 65, 300])
def test_batch_equals_singles(model, length):
    ids = random_ids(model, 5, length)
    alone = torch.cat([model.logits(row[None]) for row in ids])
    assert (model.logits(ids) - alone).abs().max() < 1e-4


def test_a_position_sees_neither_the_future_nor_its_neighbours(model):
    ids = random_ids(model, 3, 150)
    other = ids.clone()
    other[0, 100:] = 5
    other[2] = 7
    a, b = model.logits(ids), model.logits(other)
    assert (a[0, :100] - b[0, :100]).abs().max() < 1e-4
    assert (a[1] - b[1]).abs().max() < 1e-4
    assert (a[0, 100:] - b[0, 100:]).abs().max() > 1e-2


def test_streaming_equals_in_memory(model, tiny):
    reader = CheckpointReader.open(tiny)
    ids = random_ids(model, 5, 70)
    options = {"dtype": torch.float32, "device": "cpu", "batch": 2}
    whole = model.logits(ids)
    streamed = list(stream_logits(reader, ids, **options))
    assert [len(part) for part in streamed] == [2, 2, 1]
    assert (torch.cat(streamed) - whole).abs().max() < 1e-4
    h = torch.nn.functional.embedding(ids, model.embedding_VC)
    for layer, streamed_h in stream_hidden(reader, ids, **options):
        h = block(model.cfg, model.layers[layer], h)
        assert (h - streamed_h).abs().max() < 1e-4
    assert layer == model.cfg.num_layers - 1


def test_bf16_is_near_fp32(model, tiny):
    """Rounding only: most positions stay close; a route that flips moves a few."""
    ids = random_ids(model, 2, 100)
    low = Model.load(CheckpointReader.open(tiny), torch.bfloat16, "cpu").logits(ids)
    assert low.dtype == torch.bfloat16
    reference = model.logits(ids)
    error = (low.float() - reference).norm(dim=-1) / reference.norm(dim=-1)
    assert error.median() < 0.03


def test_a_linear_can_be_an_object():
    class Doubled:
        shape = (3, 4)

        def __call__(self, x):
            return 2 * x[..., :3]

    op: LinearOp = Doubled()
    x = torch.randn(2, 4)
    assert torch.equal(linear(x, op), 2 * x[:, :3])
