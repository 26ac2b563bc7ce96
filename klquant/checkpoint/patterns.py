"""`quantization_config` written: few patterns that hold for every engine that reads the checkpoint.

Engines spell modules differently (`spellings`), so targets are regexes over all spellings, and
`check_quantization_config` proves them with compressed-tensors' own matching.
"""

from collections.abc import Iterable, Iterator, Mapping

from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.names import TensorClass, TensorKey, parse_name
from klquant.checkpoint.scheme import FORMAT, Schemes, linear_modules
from klquant.core.spec import WHOLE_ROW, WeightSpec

HEAD = "lm_head"
# Where the modules of one kind live, as a pattern for the names of the hub, vLLM and transformers. transformers takes
# the first group whose regexes hold the letters "experts" for that of the routed experts, and, when told to dequantize
# at load, the first one without them for all else: hence the spelling of the shared experts here, and the order of the
# groups below.
_PARENTS = {
    "experts": r"block_sparse_moe\.experts\.",
    "shared": r"(?:block_sparse_moe|mlp)\.shared_expert[s]\.",
    "router": r"(?:block_sparse_moe|mlp)\.",
    "mlp": r"mlp\.",
    "self_attn": r"self_attn\.",
}
_KINDS = {
    TensorClass.ROUTED_EXPERTS: "experts",
    TensorClass.SHARED_EXPERTS: "shared",
    TensorClass.ROUTER: "router",
    TensorClass.DENSE_MLP: "mlp",
}
_EXPERT_ROLES = {"w1": "gate_proj", "w3": "up_proj", "w2": "down_proj"}
_ROLE_PATTERNS = {
    **{hub: f"(?:{hub}|{other})" for hub, other in _EXPERT_ROLES.items()},
    **{role: rf"(?:forget_gate\.)?{role}" for role in ("f_a_proj", "f_b_proj")},
}
# vLLM's fused linears are looked up by their own name; it exists when all the parts have one scheme.
_GATE_UP = {"gate_up_proj": ("gate_proj", "up_proj")}
_FUSED = {
    "shared": _GATE_UP,
    "mlp": _GATE_UP,
    "self_attn": {"in_proj_qkvgfab": ("q_proj", "k_proj", "v_proj", "b_proj", "f_a_proj")},
}
_MIXED = object()  # stands for the spec of a layer whose modules have no common one


def quantization_config(
    assignments: Mapping[str, WeightSpec], kept_linears: Iterable[str], config: KimiLinearConfig
) -> dict:
    """The `quantization_config` of config.json for module → spec and the linear modules that stay as they are.

    Built with compressed-tensors' schema, checked with its matching, and cut down to the keys that older engines know.
    Experts may differ by layer and by role (w1, w2, w3), not among each other.
    """
    from compressed_tensors.quantization import QuantizationArgs, QuantizationConfig, QuantizationScheme

    kept = list(kept_linears)
    by_spec = _patterns(dict(assignments) | dict.fromkeys(kept), config)
    ignore = by_spec.pop(None, [])
    ranked = sorted(by_spec.items(), key=lambda item: (not any("experts" in p for p in item[1]), str(item[0])))
    groups = {}
    for i, (spec, targets) in enumerate(ranked):
        group = {"strategy": "channel"} if spec.group_size == WHOLE_ROW else {"group_size": spec.group_size}
        args = QuantizationArgs(num_bits=spec.bits, type="int", symmetric=spec.symmetric, dynamic=False, **group)
        groups[f"group_{i}"] = QuantizationScheme(targets=targets, weights=args, format=FORMAT)
    whole = QuantizationConfig(
        config_groups=groups, format=FORMAT, quantization_status="compressed", ignore=ignore
    ).model_dump(mode="json")
    for group in whole["config_groups"].values():
        known = ("num_bits", "type", "symmetric", "strategy", "group_size", "dynamic")
        group["weights"] = {key: group["weights"][key] for key in known if group["weights"][key] is not None}
    keys = ("quant_method", "format", "quantization_status", "kv_cache_scheme", "ignore", "config_groups")
    result = {key: whole[key] for key in keys}
    check_quantization_config(result, assignments, kept, config)
    return result


def check_quantization_config(
    raw: dict, assignments: Mapping[str, WeightSpec], kept_linears: Iterable[str], config: KimiLinearConfig
) -> None:
    """Assert that compressed-tensors resolves every linear of the config, in every engine's spelling, as assigned.

    Also that no name matches two targets, so that an engine with another order of precedence agrees.
    """
    import torch
    from compressed_tensors.quantization import QuantizationConfig
    from compressed_tensors.utils.match import is_match, match_targets

    parsed = QuantizationConfig.model_validate(raw)
    groups = {target: name for name, scheme in parsed.config_groups.items() for target in scheme.targets}
    schemes = Schemes.from_config(raw, "quantization_config")
    linear = torch.nn.Linear(1, 1, device="meta")
    wanted: dict[str, WeightSpec | None] = dict(assignments) | dict.fromkeys(kept_linears)
    assert set(wanted) == set(linear_modules(config)), set(wanted) ^ set(linear_modules(config))
    for module, spec in wanted.items():
        for name in spellings(module, wanted, config):
            matched = match_targets(name, linear, groups)
            ignored = is_match(name, linear, parsed.ignore)
            assert len(matched) <= 1, (name, matched)
            assert ignored == (spec is None), (name, spec)
            assert (schemes.groups[groups[matched[0]]] if matched else None) == spec, (name, spec, matched)
            assert schemes.spec(name) == spec, (name, spec)


def spellings(module: str, specs: Mapping[str, WeightSpec | None], config: KimiLinearConfig) -> Iterator[str]:
    """The names under which the hub, vLLM and transformers look up the scheme of a hub module."""
    yield module
    if (key := _key(module, config)) is None:
        return
    kind, role, parent = _kind(key), key.role, module.rpartition(".")[0]
    if kind == "experts":
        yield f"{parent}.{_EXPERT_ROLES[role]}"
    if kind in ("shared", "router"):
        yield module.replace(".block_sparse_moe.", ".mlp.")
    if role in ("f_a_proj", "f_b_proj"):
        yield f"{parent}.forget_gate.{role}"
    for fused, parts in _FUSED.get(kind, {}).items():
        if role in parts and all(specs.get(f"{parent}.{part}", _MIXED) == specs[module] for part in parts):
            yield f"{parent}.{fused}"


def _key(module: str, config: KimiLinearConfig) -> TensorKey | None:
    """A linear module of a layer; None for the head."""
    key = parse_name(f"{module}.weight", config)
    return None if key is None or key.layer is None else key


def _kind(key: TensorKey) -> str:
    return _KINDS.get(key.cls, "self_attn")


def _patterns(specs: Mapping[str, WeightSpec | None], config: KimiLinearConfig) -> dict[WeightSpec | None, list[str]]:
    """spec → the fewest patterns that match its modules, and no others, in every spelling."""
    patterns: dict[WeightSpec | None, list[str]] = {}
    by_role = _by_role(specs, config)
    merged: dict[tuple, list[str]] = {}
    for (kind, role), layers in by_role.items():
        for spec in dict.fromkeys(layers.values()):
            chosen = tuple(layer for layer, value in layers.items() if value == spec)
            if spec is not _MIXED:
                merged.setdefault((spec, kind, None if len(chosen) == len(layers) else chosen), []).append(role)
    for (spec, kind, layers), roles in merged.items():
        where = "" if layers is None else rf"layers\.(?:{'|'.join(map(str, layers))})\."
        if roles == [""]:
            end = ".*"
        else:
            names = "|".join(_ROLE_PATTERNS.get(role, role) for role in roles)
            end = (r"\d+\." if kind == "experts" else "") + (f"(?:{names})$" if len(roles) > 1 else f"{names}$")
        patterns.setdefault(spec, []).append(rf"re:.*\.{where}{_PARENTS[kind]}{end}")
    if HEAD in specs:
        patterns.setdefault(specs[HEAD], []).append(HEAD)
    return patterns


def _by_role(
    specs: Mapping[str, WeightSpec | None], config: KimiLinearConfig
) -> dict[tuple[str, str], dict[int, object]]:
    """(kind, role) → layer → spec, or _MIXED where the role has no pattern of its own in that layer.

    Role "" stands for all modules of an expert, and is used in the layers where they agree.
    """
    table: dict[tuple[str, str], dict[int, object]] = {}
    for module, spec in specs.items():
        if (key := _key(module, config)) is not None:
            layers = table.setdefault((_kind(key), key.role), {})
            assert layers.setdefault(key.layer, spec) == spec, f"{module}: the experts of a layer must share one spec"
    for kind, fusions in _FUSED.items():
        for fused, parts in fusions.items():
            _join(table, kind, fused, [part for part in parts if (kind, part) in table], drop=False)
    _join(table, "experts", "", [role for role in _EXPERT_ROLES if ("experts", role) in table], drop=True)
    return table


def _join(table: dict, kind: str, whole: str, parts: list[str], *, drop: bool) -> None:
    """Add the role `whole` where `parts` have one spec; with `drop` it replaces them there."""
    roles = [table[kind, part] for part in parts]
    layers = [layer for layer in (roles[0] if roles else ()) if all(layer in role for role in roles)]
    if not layers:
        return
    joined = {layer: roles[0][layer] if len({r[layer] for r in roles}) == 1 else _MIXED for layer in layers}
    table[kind, whole] = joined
    if drop:
        for role in roles:
            role.update({layer: _MIXED for layer in layers if joined[layer] is not _MIXED})
