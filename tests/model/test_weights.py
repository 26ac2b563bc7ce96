import json

import torch

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import expected_tensors
from klquant.model.forward import EMBEDDING, FINAL_NORM, HEAD, Model
from klquant.model.weights import DictSource, KDAWeights, LayerWeights, MoEWeights
from tests.tiny import tiny_config, tiny_tensors


class Recorder:
    def __init__(self, config, tensors):
        self.config, self.tensors, self.asked = config, tensors, []

    def weight(self, name, dtype):
        self.asked.append(name)
        return self.tensors[name].to(dtype)


def source():
    raw = tiny_config()
    return DictSource(KimiLinearConfig.from_dict(raw), tiny_tensors(raw))


def test_a_model_reads_every_tensor_once():
    src = source()
    recorder = Recorder(src.config, src.tensors)
    Model.load(recorder, torch.float32, "cpu")
    assert sorted(recorder.asked) == sorted(expected_tensors(src.config))


def test_names_exist_in_the_real_checkpoint(kimi_48b):
    cfg = KimiLinearConfig.from_dict(json.loads((kimi_48b / "config.json").read_text()))
    shapes = expected_tensors(cfg)
    assert {EMBEDDING, FINAL_NORM, HEAD} <= set(shapes)
    for layer in (0, 3, 26):
        recorder = Recorder(cfg, {n: torch.empty(s, device="meta") for n, s in shapes.items()})
        w = LayerWeights.load(recorder, layer, torch.bfloat16, "meta")
        assert sorted(recorder.asked) == sorted(n for n in shapes if n.startswith(f"model.layers.{layer}."))
    assert w.mlp.w1.shape == w.mlp.w3.shape == (256, 1024, 2304)
    assert w.mlp.w2.shape == (256, 2304, 1024)


def test_layout_and_dtypes():
    src = source()
    w = LayerWeights.load(src, 1, torch.bfloat16, "cpu")
    assert isinstance(w.attn, KDAWeights) and isinstance(w.mlp, MoEWeights)
    assert {w.attn.A_log.dtype, w.attn.dt_bias.dtype, w.mlp.router.dtype, w.mlp.router_bias.dtype} == {torch.float32}
    assert {w.attn.q_proj.dtype, w.mlp.w2.dtype, w.input_norm.dtype, w.attn.o_norm.dtype} == {torch.bfloat16}
    assert w.attn.A_log.shape == (2,) and w.attn.q_conv.shape == (64, 4)
    for e in range(8):
        for role in ("w1", "w2", "w3"):
            name = f"model.layers.1.block_sparse_moe.experts.{e}.{role}.weight"
            assert torch.equal(getattr(w.mlp, role)[e], src.tensors[name])


def test_gradients_reach_every_tensor():
    src = source()
    tensors = {n: t.float().requires_grad_() for n, t in src.tensors.items()}
    model = Model.load(DictSource(src.config, tensors), torch.float32, "cpu")
    model.logits(torch.randint(0, 320, (2, 70))).logsumexp(-1).sum().backward()
    # The correction bias only chooses.
    without = {n for n, t in tensors.items() if t.grad is None or not t.grad.isfinite().all() or not t.grad.any()}
    assert without == {n for n in tensors if n.endswith("e_score_correction_bias")}
