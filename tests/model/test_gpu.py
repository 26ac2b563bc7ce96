"""On a CUDA GPU: fla's kernel is the plain recurrence, BF16 decode is BF16 prefill."""

import pytest
import torch

from klquant.calibrate.paths import map_tensors
from klquant.checkpoint.reader import CheckpointReader
from klquant.kernels.kda.fla import settle
from klquant.kernels.norm import reference
from klquant.model import fused
from klquant.model.delta import delta_path, kda_chunk, kda_chunk_fla
from klquant.model.forward import Model, stream_logits
from klquant.model.kda import KDAState, kda_mix
from klquant.model.mla import LatentCache, mla_mix, part_attention
from klquant.model.norm import rms_norm
from tests.model.oracle import oracle
from tests.model.test_delta import inputs

pytestmark = pytest.mark.gpu
LENGTHS = (1, 63, 64, 65, 1000)


@pytest.fixture(autouse=True)
def _inference():
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def model(tiny):
    return Model.load(CheckpointReader.open(tiny), torch.bfloat16, "cuda")


@pytest.fixture(scope="module")
def exact(tiny):
    return Model.load(CheckpointReader.open(tiny), torch.float32, "cuda")


def relative(got, want):
    return ((got.float() - want.float()).norm() / want.float().norm()).item()


@pytest.mark.parametrize("length", [2, 63, 64, 65, 1000])
@pytest.mark.parametrize("decay", [0.1, 5.0, 100.0])
def test_fla_equals_chunk(length, decay):
    pytest.importorskip("fla")
    q, k, v, g, beta, state = (x.float().cuda() for x in inputs(length, decay, dim=128))
    q, k, v = (x.bfloat16() for x in (q, k, v))
    before = state.clone()
    for start in (None, state):
        o, s = kda_chunk_fla(q, k, v, g, beta, start)
        o_ref, s_ref = kda_chunk(q, k, v, g, beta, start)
        assert o.dtype == torch.bfloat16 and s.dtype == torch.float32
        assert relative(o, o_ref) < 0.01
        assert relative(s, s_ref) < 0.01
    assert torch.equal(state, before)


def test_fp32_chunk_equals_cpu():
    x = [t.float() for t in inputs(200, 3.0, dim=64)]
    o, s = kda_chunk(*(t.cuda() for t in x))
    o_ref, s_ref = kda_chunk(*x)
    assert (o.cpu() - o_ref).abs().max() < 1e-5
    assert (s.cpu() - s_ref).abs().max() < 1e-5


@pytest.mark.parametrize("length", LENGTHS)
def test_mixers_decode_as_they_prefill(model, length):
    cfg = model.cfg
    x = torch.randn(2, length, cfg.hidden_size, device="cuda").bfloat16()
    for mix, layer, new in ((kda_mix, 0, KDAState.zeros), (mla_mix, 3, LatentCache.empty)):
        w = model.layers[layer].attn
        whole = mix(cfg, w, x)
        for part in (1, 64, 65):
            state = new(cfg, 2, torch.bfloat16, "cuda")
            got = torch.cat([mix(cfg, w, y.contiguous(), state) for y in x.split(part, 1)], 1)
            assert relative(got, whole) < 0.02, (mix.__name__, part)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("length", [1, 2, 63, 65, 333])
def test_mixers_with_kernels_are_the_plain_ones(model, length, dtype):
    """Three sequences; what records gradients is plain."""
    cfg = model.cfg
    x = torch.randn(3, length, cfg.hidden_size, device="cuda").to(dtype)
    assert fused.serves(x) and not fused.serves(x.float())
    for mix, layer, new in ((kda_mix, 0, KDAState.zeros), (mla_mix, 3, LatentCache.empty)):
        w = map_tensors(model.layers[layer].attn, lambda t: t.to(dtype) if t.dtype == torch.bfloat16 else t)
        states = [new(cfg, 3, dtype, "cuda") for _ in range(2)]
        got = [mix(cfg, w, x), mix(cfg, w, x, states[0]), mix(cfg, w, x[:, :7], states[0])]
        with torch.enable_grad():
            assert not fused.serves(x)
            want = [mix(cfg, w, x), mix(cfg, w, x, states[1]), mix(cfg, w, x[:, :7], states[1])]
        for a, b in zip(got, want, strict=True):
            assert a.dtype == b.dtype == dtype and a.shape == b.shape
            assert relative(a, b) < 0.01, mix.__name__
    norm = model.layers[0].input_norm.to(dtype)
    assert relative(rms_norm(x, norm, 1e-5), reference.rms_norm(x.double(), norm.double(), 1e-5)) < 0.005


@pytest.mark.parametrize("length", LENGTHS)
def test_model_decodes_as_it_prefills(model, exact, length):
    """Decode is as far from FP32 as prefill is. Medians of 2,000 positions: rounding can flip a random router's route,
    which moves the rest of that sequence far."""
    torch.manual_seed(length)
    rows = -(-2000 // length)
    ids = torch.randint(0, model.cfg.vocab_size, (rows, length), device="cuda")
    want = exact.logits(ids)

    def distance(logits):
        return ((logits.float() - want).norm(dim=-1) / want.norm(dim=-1)).median()

    most = 1.1 * distance(model.logits(ids))
    assert most < 0.03
    for part in (1, 64):
        state = model.new_state(rows)
        got = torch.cat([model.logits(x, state) for x in ids.split(part, 1)], 1)
        assert got.isfinite().all()
        assert distance(got) < most


def test_fp32_logits_are_those_of_transformers(tiny, exact):
    reference = oracle(tiny).cuda()
    for length in LENGTHS:
        ids = torch.randint(0, exact.cfg.vocab_size, (2, length), device="cuda")
        assert (exact.logits(ids) - reference(ids).logits).abs().max() <= 1e-3


def test_bf16_takes_fla_and_streams(model, tiny):
    pytest.importorskip("fla")
    assert settle() == (), "fla tunes kernels on this card"
    assert delta_path(torch.device("cuda"), torch.bfloat16, 64) == "chunk_fla"
    ids = torch.randint(0, model.cfg.vocab_size, (3, 100))
    options = {"dtype": torch.bfloat16, "device": "cuda", "batch": 3}
    got = torch.cat(list(stream_logits(CheckpointReader.open(tiny), ids, **options)))
    assert torch.equal(got, model.logits(ids.cuda()))


@pytest.mark.parametrize("dtype, limit", [(torch.bfloat16, 0.01), (torch.float32, 1e-5)])
@pytest.mark.parametrize("queries, keys", [(5, 130), (64, 64), (70, 1)])
def test_part_attention_knows_its_sum(dtype, limit, queries, keys):
    """Against the CPU's in FP64; head sizes of the model and of the tiny one."""
    for dim in (192, 48):
        q, k, v = (torch.randn(2, 3, n, dim, device="cuda").to(dtype) for n in (queries, keys, keys))
        for causal in {False, queries == keys}:
            got, want = part_attention(q, k, v, causal), part_attention(*(x.double().cpu() for x in (q, k, v)), causal)
            for a, b, kept in zip(got, want, (dtype, torch.float32), strict=True):
                assert a.dtype == kept and a.shape == b.shape
                assert (a.cpu().double() - b).norm() / b.norm() < limit
