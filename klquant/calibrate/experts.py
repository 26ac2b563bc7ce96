"""The routed experts of a layer: each is quantized on the tokens the router really sends to it.

An expert's moments are its own, shrunk toward a layer-wide prior, so that a rarely routed expert neither loses its
routing nor starves. For w1 and w3 the prior is the moments of all tokens; for w2, whose inputs are the expert's own
hidden units, it is a sample of the layer's tokens pushed through that expert.

Experts are fitted in blocks of fixed size and their moments are each their own, so the result depends neither on how
many blocks' moments memory holds at once nor on how many devices share the blocks.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from klquant.calibrate import folding
from klquant.calibrate.fit import with_prior
from klquant.calibrate.footprint import Footprint
from klquant.calibrate.paths import get, put
from klquant.calibrate.rescale import rescale
from klquant.calibrate.routes import Routes, add_moments, hidden
from klquant.calibrate.sharing import current, over_batches
from klquant.core.memory import free_memory, resident_memory
from klquant.model.moe import route
from klquant.quantize.hessian import Moments

if TYPE_CHECKING:
    from klquant.calibrate.walk import LayerWalk

PRIOR_TOKENS = 2048
# Experts fitted as one batch, by kind of device. Fixed, because a batched product's last bits may depend on the size of
# the batch. A GPU has launches to fill: of w2 few rows are worked on at a time.
BLOCK = {"cpu": 16, "cuda": 32}
# Share of the free memory to count on: an allocator leaves gaps.
USED = 0.9
STACKS = ("mlp.w1", "mlp.w3", "mlp.w2")


@dataclass(frozen=True)
class Inputs:
    """What the experts of a layer see: routes of every batch, an even sample [P, C] of the MLP's inputs (undisturbed
    ones beside it), and the mean moments of all inputs."""

    routes: list[Routes]
    sample: Tensor
    sample_star: Tensor | None
    layer_wide: Moments | None

    def to(self, device: torch.device) -> Inputs:
        star = None if self.sample_star is None else self.sample_star.to(device)
        wide = None if self.layer_wide is None else self.layer_wide.to(device)
        return Inputs([r.to(device) for r in self.routes], self.sample.to(device), star, wide)


def quantize_experts(walk: LayerWalk, layer_wide: Moments | None) -> None:
    """Quantize every routed expert of the layer; `layer_wide` are the mean moments of the MLP's inputs."""
    total = walk.config.num_experts
    inputs = _route_all(walk, layer_wide)
    counts = torch.tensor([r.bounds for r in inputs.routes]).diff(dim=-1).sum(0)
    walk.result.expert_tokens = counts.tolist()
    if all(walk.decision(path).spec is None for path in STACKS):
        return
    for path in STACKS:  # from here on `now` is filled block by block, in place
        walk.now = put(walk.now, path, get(walk.exact, path).clone())
    size = BLOCK[walk.settings.device.type]
    blocks = [slice(first, min(first + size, total)) for first in range(0, total, size)]
    _share(walk, blocks, inputs)
    for path in STACKS:  # a tensor of its own again, for what was changed in place is not what other devices hold
        walk.exact = put(walk.exact, path, get(walk.exact, path)[:]) if _folds(walk) else walk.exact
        walk.now = put(walk.now, path, get(walk.now, path)[:])


def _share(walk: LayerWalk, blocks: list[slice], inputs: Inputs) -> None:
    """Divide the blocks among the devices, a thread each, and bring the results together in `walk`."""
    devices = walk.settings.devices[: len(blocks)]
    each = -(-len(blocks) // len(devices))
    shares = [blocks[i : i + each] for i in range(0, len(blocks), each)]
    if len(shares) == 1:
        return _quantize_blocks(walk, blocks, inputs)

    @torch.no_grad()
    def work(device: torch.device, share: list[slice]) -> LayerWalk:
        with current(device):
            other = walk.on(device)
            _quantize_blocks(other, share, inputs.to(device))
            return other

    with ThreadPoolExecutor(len(shares) - 1) as pool:
        jobs = [pool.submit(work, d, share) for d, share in zip(devices[1:], shares[1:], strict=False)]
        _quantize_blocks(walk, shares[0], inputs)
        for job, share in zip(jobs, shares[1:], strict=True):
            _merge(walk, job.result(), slice(share[0].start, share[-1].stop))


def _folds(walk: LayerWalk) -> bool:
    """Whether quantizing the experts changes their unquantized weights."""
    return walk.decision("mlp.w2").algorithm == "awq"


def _merge(walk: LayerWalk, other: LayerWalk, experts: slice) -> None:
    """Take over what another device's walk has made of some experts."""
    for path in STACKS:
        for mine, theirs in ((walk.now, other.now), (walk.exact, other.exact))[: 1 + _folds(walk)]:
            get(mine, path)[experts] = get(theirs, path)[experts].to(walk.settings.device)
    walk.result.quantized |= other.result.quantized
    walk.result.records |= other.result.records
    walk.result.changed |= other.result.changed
    walk.result.fallbacks += other.result.fallbacks


def _quantize_blocks(walk: LayerWalk, blocks: list[slice], inputs: Inputs) -> None:
    """Quantize blocks of experts in turn, the moments of as many at once as memory allows."""
    todo, size = deque(blocks), _blocks_that_fit(walk, len(blocks))
    while todo:
        try:
            _quantize_chunk(walk, todo, min(size, len(todo)), inputs)
            continue
        except torch.OutOfMemoryError:
            if size == 1:
                raise
        # Only here, behind the handler, has the exception let go of what it held.
        size = min(size, len(todo)) // 2 or 1
        count = sum(block.stop - block.start for block in list(todo)[:size])
        walk.result.fallbacks.append(f"{walk.settings.device}: out of memory: moments of {count} experts at once")
        if walk.settings.device.type == "cuda":
            torch.cuda.empty_cache()


def _blocks_that_fit(walk: LayerWalk, blocks: int) -> int:
    """Of how many of the `blocks` the moments fit, in chunks of about equal size."""
    tokens = walk.settings.batch * walk.streams.quantized.shape[1]
    need = Footprint.of(
        walk.config, tokens, walk.settings.dtype.itemsize, BLOCK[walk.settings.device.type],
        corrects=walk.streams.reference is not None,
    )  # fmt: skip
    free = free_memory(walk.settings.device)
    if walk.settings.device.type == "cpu" and walk.settings.host_limit is not None:
        free = min(free, walk.settings.host_limit - resident_memory())
    free = int(USED * free) - need.codes - need.working
    fit = max(1, free // need.block)
    chunks = -(-blocks // fit)
    return -(-blocks // chunks)


def _quantize_chunk(walk: LayerWalk, todo: deque[slice], size: int, inputs: Inputs) -> None:
    """Quantize the first `size` blocks of `todo` and remove each from it when it is done."""
    chunk, tau = [todo[i] for i in range(size)], walk.recipe.gptq.shrink_tokens
    first = chunk[0].start
    experts = slice(first, chunk[-1].stop)
    inside = [slice(block.start - first, block.stop - first) for block in chunk]

    if any(walk.decision(path).spec is not None for path in ("mlp.w1", "mlp.w3")):
        own = _input_moments(walk, inputs, experts)
        for block, at in zip(chunk, inside, strict=True):
            walk.fit(("mlp.w1", "mlp.w3"), with_prior(own.part(at), inputs.layer_wide, tau), block)
        del own
    if walk.decision("mlp.w2").spec is None:
        for _ in chunk:
            todo.popleft()
        return
    own, prior = _hidden_moments(walk, inputs, experts)
    for block, at in zip(chunk, inside, strict=True):
        undo = _before_folding(walk, block)
        try:
            moments = with_prior(own.part(at), prior.part(at).mean(), tau)
            moments, _ = rescale(walk, folding.EXPERT_OUTPUT, moments, block)
            walk.fit(("mlp.w2",), moments, block, walk.metrics[1])
        except torch.OutOfMemoryError:
            # The block is begun again from w1: a scale must not be folded twice.
            undo()
            raise
        todo.popleft()


def _before_folding(walk: LayerWalk, block: slice) -> Callable[[], None]:
    """Takes the layer's experts of a block, and what was chosen and noted of them, back to what they are now."""
    quantized, changed = dict(walk.result.quantized), dict(walk.result.changed)
    seam = folding.EXPERT_OUTPUT
    stacks = [get(w, path)[block] for w in (walk.exact, walk.now) for path in (seam.producer, *seam.consumers)]
    held = [(stack, stack.clone()) for stack in stacks] if _folds(walk) else []

    def undo() -> None:
        walk.result.quantized, walk.result.changed = quantized, changed
        for stack, before in held:
            stack.copy_(before)

    return undo


def _route_all(walk: LayerWalk, layer_wide: Moments | None) -> Inputs:
    """Route every token; also an even sample of the MLP's inputs."""
    windows, length, _ = walk.streams.quantized.shape
    stride = max(1, windows * length // PRIOR_TOKENS)
    home = walk.settings.device

    def visit(other: LayerWalk, start: int, h: Tensor, reference: Tensor | None, _: None):
        x = other.norm(h, other.now.post_norm).flatten(0, 1)
        routes = Routes.sort(*route(other.config, other.now.mlp, x), other.config.num_experts)
        pick = slice(-(start * length) % stride, None, stride)
        star = None
        if reference is not None:
            star = other.norm(reference, other.exact.post_norm).flatten(0, 1)[pick].contiguous().to(home)
        # A view would keep all of the batch.
        return routes.to(home), x[pick].contiguous().to(home), star

    routes, sample, stars = zip(*over_batches(walk, "routing", visit), strict=True)
    star = None if stars[0] is None else torch.cat(stars)
    return Inputs(list(routes), torch.cat(sample), star, layer_wide)


def _routed(walk: LayerWalk, inputs: Inputs, experts: slice, phase: str):
    """Yield inputs [T, C], undisturbed inputs or None, and routes to `experts`, batch by batch."""
    phase = f"experts {experts.start}–{experts.stop - 1}: {phase}"
    for (_, h, reference), routes in zip(walk.batches(phase), inputs.routes, strict=True):
        x = walk.norm(h, walk.now.post_norm).flatten(0, 1)
        star = None if reference is None else walk.norm(reference, walk.exact.post_norm).flatten(0, 1)
        yield x, star, routes.part(experts)


def _input_moments(walk: LayerWalk, inputs: Inputs, experts: slice) -> Moments:
    moments = walk.moments(walk.config.hidden_size, experts.stop - experts.start)
    weighted = walk.recipe.gptq.weighting == "gate"
    for x, star, routes in _routed(walk, inputs, experts, "w1, w3"):
        add_moments(moments, x, routes, star, gathered=False, weighted=weighted)
    return moments


def _hidden_moments(walk: LayerWalk, inputs: Inputs, experts: slice) -> tuple[Moments, Moments]:
    """Moments of w2's inputs: of the routed tokens, and of the layer's sample."""
    count = experts.stop - experts.start
    own, prior = (walk.moments(walk.config.moe_intermediate_size, count) for _ in range(2))

    def add(moments: Moments, x: Tensor, star: Tensor | None, routes: Routes, weighted: bool) -> None:
        now = hidden(walk.now.mlp, experts, x, routes)
        exact = None if star is None else hidden(walk.exact.mlp, experts, star, routes)
        add_moments(moments, now, routes, exact, gathered=True, weighted=weighted)

    each = Routes.all_to_each(len(inputs.sample), count, walk.settings.device)
    add(prior, inputs.sample, inputs.sample_star, each, False)
    weighted = walk.recipe.gptq.weighting == "gate"
    for x, star, routes in _routed(walk, inputs, experts, "w2"):
        add(own, x, star, routes, weighted)
    return own, prior
