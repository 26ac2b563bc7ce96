"""Checkpoints of every kind that is read: the same values packed, unpacked and in the plain model."""

import gc
import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file, save_file

from klquant.checkpoint.names import expected_tensors
from klquant.checkpoint.quantized import QuantizedReader
from klquant.engine import build
from klquant.engine.build import OneDevice
from klquant.engine.load import load_weights, place
from klquant.engine.prefill import Span
from klquant.engine.request import SamplingParams
from klquant.engine.runner import Runner
from klquant.engine.sizes import Outline, held_sizes
from klquant.engine.weights import EngineWeights, FusedKDA, Stacked, storage_bytes
from klquant.errors import UserError
from klquant.kernels.linear.dispatch import QuantLinear
from klquant.kernels.linear.layout import split_rows, unpack, values
from klquant.kernels.mla.pages import PAGE_SIZE
from klquant.model.forward import Model
from klquant.model.weights import MoEWeights, PackedMoE, linear
from klquant.recipe.memory import expert_table_bytes
from tests.engine.build import CPU, RULES, checkpoint, exact_model, general_path, load

DEMO = Path(__file__).parents[2] / "demo" / "model"


@pytest.fixture(scope="module", params=[(rule, shape) for shape in ("narrow", "wide") for rule in RULES], ids=" ".join)
def folder(request, tmp_path_factory) -> Path:
    return checkpoint(tmp_path_factory.mktemp("models") / " ".join(request.param), *request.param)


def ids(model: Model | EngineWeights) -> torch.Tensor:
    return torch.randint(0, model.cfg.vocab_size, (2, 9), generator=torch.Generator().manual_seed(0))


@torch.no_grad()
def test_the_packed_model_is_the_plain_one(folder):
    y, want = (m.logits(ids(m)) for m in (general_path(load(folder)), exact_model(folder)))
    assert ((y - want).norm() / want.norm()).item() < 1e-5


@torch.no_grad()
@pytest.mark.parametrize("packed", [True, False])
def test_single_steps_go_the_way_of_the_whole_sequence(folder, packed):
    """Greedy tokens of decode steps, through the fused maps, are the likeliest of one pass through `model`."""
    weights = load(folder, packed)
    runner = Runner(weights, slots=1, pages=1, max_context=PAGE_SIZE)
    tokens = ids(weights)[0].tolist()
    runner.bind(0, [0], SamplingParams(seed=0), tokens, fresh=True)
    span = Span(tuple(tokens), 0, 0)
    tokens.append(runner.first_tokens(runner.prefill([span]), [span], "greedy").token.item())
    for _ in range(4):
        tokens.append(runner.decode([0], "greedy").token.item())
    likeliest = general_path(weights).logits(torch.tensor([tokens]))[0].argmax(-1).tolist()
    assert tokens[-5:] == likeliest[-6:-1]


def test_unpacked_weights_are_the_readers_values(folder):
    weights, reader = load(folder, packed=False), QuantizedReader.open(folder)
    want = Model.load(reader, torch.float32, CPU)
    for layer, plain in zip(weights.layers, want.layers, strict=True):
        for field in ("attn", "mlp"):
            a, b = getattr(layer.model, field), getattr(plain, field)
            for name, tensor in vars(b).items():
                if isinstance(tensor, torch.Tensor):
                    assert torch.equal(getattr(a, name), tensor), name
        if isinstance(plain.mlp, MoEWeights):
            assert torch.equal(layer.model.mlp.shared.up_proj, plain.mlp.shared.up_proj)
    assert torch.equal(weights.head.proj, want.head.proj)
    assert not weights.notes


def test_codes_and_scales_are_the_checkpoints(folder):
    weights, reader = load(folder), QuantizedReader.open(folder)
    cfg = weights.cfg
    for i, layer in enumerate(weights.layers):
        if not isinstance(layer.model.mlp, PackedMoE):
            continue
        experts = layer.model.mlp.experts
        names = [f"model.layers.{i}.block_sparse_moe.experts.{e}" for e in range(cfg.num_experts)]
        gates, ups = split_rows(values(experts.gate_up, torch.float32), cfg.moe_intermediate_size)
        for e, name in enumerate(names):
            for role, found in (("w1", gates), ("w3", ups), ("w2", values(experts.down, torch.float32))):
                module = f"{name}.{role}"
                stored = reader.spec(module)
                want = reader.weight(f"{module}.weight", torch.float32)
                if stored is not None:
                    want = reader.quantized(module).decode()
                assert torch.equal(found[e], want), module


@pytest.mark.parametrize("staged", [True, False])
def test_experts_that_leave_are_the_last_of_each_layer(staged, folder, monkeypatch):
    """Nothing is locked on a CPU; all else is as it would be for a GPU. With the weights their memory goes."""
    locked = {}
    cuda = SimpleNamespace(
        cudaHostRegister=lambda address, nbytes, flags: locked.update({address: nbytes}) or 0,
        cudaHostUnregister=locked.pop,
    )
    monkeypatch.setattr("torch.cuda.cudart", lambda: cuda)
    if staged:  # these are too few layers to do so on their own
        monkeypatch.setattr(build, "staging_bytes", lambda largest, layers: 2 * largest)
    reader, leave = QuantizedReader.open(folder), 3
    whole, split = (
        load_weights(reader, OneDevice(CPU, reader.config.num_layers, leaving=n), torch.float32) for n in (0, leave)
    )  # fmt: skip
    assert whole.notes == split.notes
    most = 0
    for a, b in zip(whole.layers, split.layers, strict=True):
        if not isinstance(a.model.mlp, PackedMoE):
            assert storage_bytes(a) == storage_bytes(b)
            continue
        one, two = a.model.mlp.experts, b.model.mlp.experts
        assert one.offload is None and two.count == one.count and two.offload.near == one.count - leave
        for want, here, far in zip((one.gate_up, one.down), (two.gate_up, two.down), two.offload.far, strict=True):
            assert far.experts == leave and (far.spec, far.n, far.k) == (want.spec, want.n, want.k)
            for t, near_t, far_t in zip(want.tensors, here.tensors, far.tensors, strict=True):
                assert t is None or torch.equal(t, torch.cat([near_t, far_t]))
        rooms, moved = two.offload.staging.rooms, sum(w.nbytes for w in two.offload.far)
        assert len(rooms) == (2 if staged else 0) and all(room.nbytes >= moved for room in rooms)
        more = storage_bytes(b)[CPU] - storage_bytes(a)[CPU]
        assert more == expert_table_bytes(reader.config) + sum(room.nbytes for room in rooms)
        most = max(most, moved)
    assert {room.nbytes for room in rooms} == ({most} if staged else set()) and sum(locked.values()) >= most
    gc.disable()
    try:
        del split, b, two, here, far, t, near_t, far_t, rooms
        assert not locked
    finally:
        gc.enable()


def test_planned_bytes_are_held_bytes(folder):
    reader = QuantizedReader.open(folder)
    for packed in (True, False):
        for dtype in (torch.float32, torch.bfloat16):
            weights = load(folder, packed, dtype)
            sizes = held_sizes(Outline.of(reader), dtype, packed)
            assert sizes.layers == tuple(storage_bytes(layer)[CPU] for layer in weights.layers)
            assert sizes.final == storage_bytes(weights.head)[CPU]
            assert sizes.total == weights.nbytes()[CPU]
            mlp = weights.layers[1].model.mlp
            routed = (mlp.experts.gate_up, mlp.experts.down) if packed else (mlp.w1, mlp.w3, mlp.w2)
            assert sizes.routed[1] == storage_bytes(*routed)[CPU]


def test_fused_maps_hold_nothing_twice_and_give_what_their_parts_give(folder):
    weights = load(folder)
    fused_whole = 0
    for layer in weights.layers:
        assert storage_bytes(layer) == storage_bytes(layer.model)
        attn, fused = layer.model.attn, layer.fused
        if isinstance(fused, FusedKDA):
            pairs = [(fused.qkv, (attn.q_proj, attn.k_proj, attn.v_proj)),
                     (fused.low, (attn.f_a_proj, attn.g_a_proj, attn.b_proj))]  # fmt: skip
            assert torch.equal(fused.taps_FW, torch.cat([attn.q_conv, attn.k_conv, attn.v_conv]))
        else:
            pairs = [(fused.q_kv_a, (attn.q_proj, attn.kv_a_proj))]
            assert fused.kv_b is attn.kv_b_proj
        for whole, parts in pairs:
            x = torch.randn(3, whole.shape[1])
            y = linear(x, whole)
            assert whole.shape[0] == y.shape[1]
            assert torch.allclose(y, torch.cat([linear(x, p) for p in parts], -1), rtol=1e-5, atol=1e-6)
            fused_whole += not isinstance(whole, Stacked)
    if "wide" in folder.name and "mixed" not in folder.name:
        assert fused_whole == 7
    if folder.name == "int4 wide":
        assert isinstance(weights.layers[0].fused.qkv, QuantLinear)


def test_what_is_held_otherwise_is_said(folder):
    notes = load(folder).notes
    if "everything" in folder.name:
        assert all(any(f"layers.{i}.self_attn.f_b_proj.weight is INT4 g32" in note for note in notes) for i in range(3))
    if "mixed" not in folder.name:
        assert bool(notes) == ("everything" in folder.name)
        return
    assert any(
        "layers.1.block_sparse_moe.shared_experts" in note and "all are held in 16 bits" in note for note in notes
    )
    assert any("layers.0.mlp.gate_proj" in note and "INT8 g32 asym" in note for note in notes)
    assert any("layers.3.block_sparse_moe.experts." in note for note in notes)


def test_experts_a_few_at_a_time_are_the_same(tmp_path, monkeypatch):
    checkpoint(tmp_path / "m", "everything")
    whole = load(tmp_path / "m")
    monkeypatch.setattr("klquant.engine.build.CODES_AT_ONCE", 3 * 32 * 64)
    some = load(tmp_path / "m")
    for a, b in zip(whole.layers[1:], some.layers[1:], strict=True):
        for name in ("gate_up", "down"):
            x, y = (unpack(getattr(layer.model.mlp.experts, name)) for layer in (a, b))
            assert torch.equal(x.codes, y.codes) and torch.equal(x.scale, y.scale)


def test_progress_ends_at_all_bytes(tmp_path):
    checkpoint(tmp_path / "m", "int4")
    seen = []
    load(tmp_path / "m", progress=lambda done, total: seen.append((done, total)))
    reader = QuantizedReader.open(tmp_path / "m")
    total = sum(info.nbytes for info in reader.files.tensors.values())
    assert [done for done, _ in seen] == sorted(done for done, _ in seen)
    assert seen[-1] == (total, total)


def test_the_demo_model_loads_unpacked_on_a_cpu():
    reader = QuantizedReader.open(DEMO)
    placement = place(Outline.of(reader), {CPU: 1 << 32}, torch.float32, context=256)
    assert not placement.packed
    model = general_path(load_weights(reader, placement, torch.float32))
    want = Model.load(reader, torch.float32, CPU)
    with torch.no_grad():
        assert torch.allclose(model.logits(ids(model)), want.logits(ids(want)), rtol=1e-4, atol=1e-4)


def test_too_little_memory_for_unpacked_weights_keeps_them_packed(tmp_path):
    checkpoint(tmp_path / "m", "int4", "wide")
    outline = Outline.of(QuantizedReader.open(tmp_path / "m"))
    most, least = (
        place(outline, {CPU: 1 << 40}, torch.float32, context=64, cache_bits=16),
        held_sizes(outline, torch.float32).total,
    )
    share = most.shares[0]
    room = share.total - share.weights + (share.weights + least) // 2
    assert place(outline, {CPU: room}, torch.float32, context=64).packed


@pytest.mark.parametrize(
    ("field", "size", "key"),
    [
        ("kda_dim", 48, "linear_attn_config.head_dim"),
        ("kv_rank", 96, "kv_lora_rank"),
        ("qk_rope_dim", 8, "qk_rope_head_dim"),
        ("qk_nope_dim", 96, "qk_nope_head_dim"),
        ("v_dim", 80, "v_head_dim"),
    ],
)
def test_sizes_that_no_kernel_serves_are_refused_on_a_gpu_and_run_on_a_cpu(field, size, key):
    card = {torch.device("cuda", 0): 1 << 40}
    config = QuantizedReader.open(DEMO).config
    assert place(Outline(config, _plain(config)), card, torch.bfloat16, context=64).layers
    odd = replace(config, **{field: size})
    with pytest.raises(UserError, match=rf"{key} is {size}; .* use --devices cpu"):
        place(Outline(odd, _plain(odd)), card, torch.bfloat16, context=64)
    assert place(Outline(odd, _plain(odd)), {CPU: 1 << 40}, torch.float32, context=64).layers


def _plain(config) -> dict[str, None]:
    """Everything in 16 bits."""
    return {name.removesuffix(".weight"): None for name in expected_tensors(config)}


def damage(folder: Path, part: str, change) -> str:
    """Change the first tensor of layer 2 whose name ends in `part`; returns its name."""
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        for name in tensors:
            if name.startswith("model.layers.2.") and name.endswith(part):
                tensors[name] = change(tensors[name])
                tensors = {n: t for n, t in tensors.items() if t is not None}
                save_file(tensors, path, {"format": "pt"})
                index = folder / "model.safetensors.index.json"
                table = json.loads(index.read_text())
                table["weight_map"] = {n: f for n, f in table["weight_map"].items() if f != path.name or n in tensors}
                index.write_text(json.dumps(table))
                return name
    raise AssertionError(part)


@pytest.mark.parametrize(("part", "change", "says"), [
    ("experts.5.w3.weight_scale", lambda t: t.fill_(float("nan")), "NaN"),
    ("experts.5.w1.weight_scale", lambda t: t.neg(), "not positive"),
    ("experts.5.w1.weight_shape", lambda t: t.flip(0), "says"),
    ("experts.5.w2.weight_packed", lambda t: None, "is missing"),
    ("self_attn.o_proj.weight_packed", lambda t: t[:-1].clone(), "has shape"),
    ("self_attn.f_a_proj.weight", lambda t: t.index_fill(0, torch.tensor([1]), float("inf")), "infinite"),
])  # fmt: skip
def test_a_damaged_tensor_is_named(tmp_path, part, change, says):
    checkpoint(tmp_path / "m", "int4")
    name = damage(tmp_path / "m", part, change)
    with pytest.raises(UserError, match=says) as error:
        load(tmp_path / "m")
    assert name in str(error.value)
