"""Engine weights straight from the model's own, in FP32, for tests of what runs them."""

import torch

from klquant.engine.weights import EngineLayer, EngineWeights, FusedKDA, FusedMLA
from klquant.model.forward import Model
from klquant.model.weights import KDAWeights


def engine_weights(model: Model) -> EngineWeights:
    layers = tuple(EngineLayer(w, _fused(w.attn)) for w in model.layers)
    return EngineWeights(model.cfg, model.embedding_VC, layers, model.head)


def _fused(w):
    if isinstance(w, KDAWeights):
        return FusedKDA(
            qkv=torch.cat([w.q_proj, w.k_proj, w.v_proj]),
            low=torch.cat([w.f_a_proj, w.g_a_proj, w.b_proj]),
            taps_FW=torch.cat([w.q_conv, w.k_conv, w.v_conv]),
            A_log=w.A_log, dt_bias=w.dt_bias, f_b=w.f_b_proj, g_b=w.g_b_proj, o_norm=w.o_norm, o_proj=w.o_proj,
        )  # fmt: skip
    return FusedMLA(torch.cat([w.q_proj, w.kv_a_proj]), w.kv_a_norm, w.kv_b_proj, w.o_proj)
