"""The metric of the residual stream: what later routers read of an error."""

import torch

from klquant.calibrate.metric import StreamMetric
from klquant.checkpoint.reader import CheckpointReader
from klquant.model.weights import DictSource


def source(tiny):
    reader = CheckpointReader.open(tiny)
    return DictSource(reader.config, {n: reader.read(n) for n in reader.tensors})


def test_metrics_are_positive_and_of_mean_diagonal_one(tiny):
    metric = StreamMetric(source(tiny), 0.3, torch.device("cpu"))
    for layer in range(4):
        for m in metric.after(layer):
            torch.testing.assert_close(m, m.mT)
            assert float(torch.linalg.eigvalsh(m).min()) > 0.69  # (1 − λ) of the identity is always there
            torch.testing.assert_close(m.diagonal().mean(), torch.tensor(1.0))


def test_directions_that_a_router_reads_weigh_more(tiny):
    src = source(tiny)
    name = "model.layers.2.block_sparse_moe.gate.weight"
    router = src.tensors[name].float()
    norm = src.tensors["model.layers.2.post_attention_layernorm.weight"].float()
    read = (router[0] - router.mean(0)) * norm
    read /= read.norm()
    attention, mlp = StreamMetric(src, 0.5, torch.device("cpu")).after(2)
    other = torch.randn(64, generator=torch.Generator().manual_seed(0))
    other -= (other @ read) * read
    other /= other.norm()
    assert read @ attention @ read > 1.5 * (other @ attention @ other)
    # Layer 2's own router has been passed when its MLP writes: only layer 3's counts.
    changed = DictSource(src.config, src.tensors | {name: src.tensors[name].flip(0, 1)})
    after = StreamMetric(changed, 0.5, torch.device("cpu")).after(2)
    assert not torch.allclose(after[0], attention) and torch.equal(after[1], mlp)


def test_a_shift_of_all_experts_alike_is_not_an_error(tiny):
    src = source(tiny)
    shifted = dict(src.tensors)
    for layer in (1, 2, 3):
        name = f"model.layers.{layer}.block_sparse_moe.gate.weight"
        shifted[name] = src.tensors[name].float() + 3.0
    one, two = (StreamMetric(s, 0.5, torch.device("cpu")).after(0)[0] for s in (src, DictSource(src.config, shifted)))
    torch.testing.assert_close(one, two, rtol=1e-4, atol=1e-5)


def test_behind_the_last_router_the_head_counts(tiny):
    src = source(tiny)
    last = StreamMetric(src, 0.5, torch.device("cpu")).after(3)[1]
    changed = DictSource(src.config, src.tensors | {"lm_head.weight": src.tensors["lm_head.weight"].roll(7, 1)})
    assert not torch.allclose(StreamMetric(changed, 0.5, torch.device("cpu")).after(3)[1], last)
