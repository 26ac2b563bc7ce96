"""Generate text: many requests at once over one model. Start with `Engine.from_pretrained`.

An engine belongs to one thread. Whoever iterates over an answer drives all requests a step further; a step schedules,
launches, and takes in the tokens of the launches before.
"""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path

import torch

from klquant.calibrate.chat import Message
from klquant.calibrate.tokenizer import Tokenizer, load_tokenizer
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.quantized import QuantizedReader
from klquant.engine.job import Job
from klquant.engine.limits import Limits
from klquant.engine.load import Progress, default_dtype, load_weights, place
from klquant.engine.loop import Loop
from klquant.engine.placement import Placement, find_devices, host_room
from klquant.engine.request import Answer, Delta, SamplingParams, default_params, end_tokens
from klquant.engine.runner import Runner
from klquant.engine.scheduler import Scheduler
from klquant.engine.scheduler import Sequence as Scheduled
from klquant.engine.sizes import Outline
from klquant.engine.usage import Usage, measured_usage
from klquant.engine.weights import EngineWeights
from klquant.errors import UserError
from klquant.kernels.mla.pages import PAGE_SIZE

# Text, token ids, or a conversation.
Prompt = str | Sequence[int] | Sequence[Message]


class Engine:
    """A loaded model that answers requests. Also a context manager that frees its memory in the end."""

    def __init__(
        self, weights: EngineWeights, tokenizer: Tokenizer, limits: Limits, *,
        defaults: SamplingParams | None = None, ends: frozenset[int] | None = None, placement: Placement | None = None,
        ahead: bool | None = None,
    ) -> None:  # fmt: skip
        """From weights in memory. `ends`: tokens that end an answer (None: the config's). `ahead`: launch a step before
        the last one's tokens were looked at (None: where it pays, on GPUs)."""
        self.cfg, self.tokenizer, self.placement = weights.cfg, tokenizer, placement
        self.limits = limits = limits.of(weights.cfg)
        self.defaults = defaults or SamplingParams()
        self.runner = Runner(
            weights, slots=limits.max_batch + limits.prefixes, pages=limits.pages, max_context=limits.max_context,
            cache_bits=limits.cache_bits,
        )  # fmt: skip
        self._ends = frozenset(weights.cfg.eos_ids) if ends is None else ends
        scheduler = Scheduler(
            slots=limits.max_batch, pages=limits.pages, page_tokens=PAGE_SIZE, chunk=limits.chunk,
            prefixes=limits.prefixes, least=self.runner.least_prefix,
        )  # fmt: skip
        self.loop = Loop(self.runner, scheduler, weights.embedding_VC.is_cuda if ahead is None else ahead)

    @classmethod
    def from_pretrained(
        cls, folder: Path | str, *, devices: str | None = None, max_memory: Mapping[str, int] | None = None,
        progress: Progress | None = None, **limits: int,
    ) -> "Engine":  # fmt: skip
        """Load a checkpoint folder, in 16 bits or quantized.

        devices: "cuda:0,cuda:1", "cpu", … (None: all GPUs, or the CPU without one). max_memory: bytes by device name,
        at most what is free; beside GPUs `cpu` is what experts may take of the host's memory where the GPUs have no
        room for them (without it four fifths of what is free). progress: called with (bytes read, bytes in all).
        limits: fields of Limits, such as `max_context=32768, max_batch=4`.
        Raises UserError for a damaged or unsupported checkpoint, an unknown device, and when it does not fit: with what
        is missing and what would fit.
        """
        found = find_devices(default_devices() if devices is None else devices, max_memory)
        reader = QuantizedReader.open(Path(folder))
        room = Limits(**limits).of(reader.config)
        tokenizer = load_tokenizer(folder)
        tokenizer.require_fits(reader.config)
        defaults = default_params(Path(folder))
        ends = end_tokens(Path(folder), reader.config.eos_ids)
        dtype = default_dtype(found)
        placement = place(
            Outline.of(reader), found, dtype, context=room.pages * PAGE_SIZE, sequences=room.max_batch,
            prefixes=room.prefixes, cache_bits=room.cache_bits, host=host_room(max_memory),
        )  # fmt: skip
        weights = load_weights(reader, placement, dtype, progress)
        return cls(weights, tokenizer, room, defaults=defaults, ends=ends, placement=placement)

    def __enter__(self) -> "Engine":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Free the memory; requests that are not answered are cancelled. The engine cannot be used afterwards."""
        for job in [*self.loop.jobs.values()] if self.loop else ():
            self.loop.cancel(job)
        self.runner = self.loop = None
        if torch.cuda.is_available():
            torch.cuda.empty_cache()

    @property
    def on_cpu(self) -> bool:
        """Whether it runs the plain torch reference, which is slow, instead of kernels."""
        return self.runner.stages[0].device.type == "cpu"

    def usage(self) -> list[Usage]:
        """Memory by device and part, predicted and held. Only of an engine that was placed (`from_pretrained`)."""
        assert self.placement is not None, "there is no prediction of it"
        return measured_usage(self.placement, self.runner.weights, [stage.state for stage in self.runner.stages])

    def generate(
        self, prompts: Sequence[Prompt], params: SamplingParams | Sequence[SamplingParams] | None = None
    ) -> list[Answer]:
        """Answer all prompts, as many at a time as there is room for; answers in the order of prompts.

        params: for all, or one each (None: the checkpoint's defaults). Raises UserError when a prompt can never run
        (`submit`), before any runs. What goes wrong later ends that answer with finish "error" and no other.
        """
        each = [params] * len(prompts) if params is None or isinstance(params, SamplingParams) else params
        jobs = [self._job(self.encode(p), p_params) for p, p_params in zip(prompts, each, strict=True)]
        for job in jobs:
            self.loop.scheduler.check(job.scheduled)
        try:
            for job in jobs:
                self.loop.add(job)
            while not all(job.finish for job in jobs):
                ran = self.loop.step()
                assert ran, "nothing runs, and an answer has not finished"
        finally:
            for job in jobs:
                self.cancel(job)
        return [job.answer() for job in jobs]

    def stream(self, prompt: Prompt, params: SamplingParams | None = None) -> Iterator[Delta]:
        """The answer as it comes; its last piece has `finish`. Closing the iterator cancels the request.

        Raises UserError at once when the prompt can never run (`submit`).
        """
        return self.follow(self.submit(prompt, params))

    def submit(
        self, prompt: Prompt, params: SamplingParams | None = None, scheduled: Scheduled | None = None
    ) -> Job:  # fmt: skip
        """Queue a request; `scheduled`: a sequence whose state holds the first tokens of the prompt (`Session`).

        Raises UserError when its prompt is empty, fills the context, or can never fit.
        """
        job = self._job(self.encode(prompt), params, scheduled)
        self.loop.add(job)
        return job

    def release(self, scheduled: Scheduled) -> None:
        """Free slot and pages that a sequence kept."""
        if self.loop:
            self.loop.scheduler.release(scheduled)

    def follow(self, job: Job) -> Iterator[Delta]:
        """Step until the job has finished, and yield what it gains. Whoever stops early cancels it."""
        deltas = self._follow(job)
        next(deltas)  # closing a generator that has not begun would cancel nothing
        return deltas

    def _follow(self, job: Job) -> Iterator[Delta | None]:
        try:
            yield None
            while True:
                while job.deltas:
                    yield (delta := job.deltas.popleft())
                    if delta.finish:
                        return
                if job.stopping:
                    self.cancel(job)
                    continue
                ran = self.loop.step()
                assert ran or job.deltas, "nothing runs, and the answer has not finished"
        finally:
            self.cancel(job)

    def cancel(self, job: Job) -> None:
        """End a request where it is, unless it has ended; its slot and pages are free."""
        if self.loop:
            self.loop.cancel(job)

    def encode(self, prompt: Prompt) -> list[int]:
        """Token ids of a prompt: text behind a BOS, a conversation through the chat template, ids as they are.

        Raises UserError when it is empty, or an id is outside the vocabulary.
        """
        return encode(prompt, self.tokenizer, self.cfg)

    def _job(
        self, tokens: Sequence[int], params: SamplingParams | None, scheduled: Scheduled | None = None
    ) -> Job:  # fmt: skip
        assert self.loop, "the engine is closed"
        params = (params or self.defaults).with_seed()
        room = self.limits.room(len(tokens), self.cfg)
        new = min(room, params.max_new_tokens)
        own = scheduled or Scheduled(0, 0)
        own.prompt, own.most = len(tokens), len(tokens) + new - 1
        limit = "length" if new == params.max_new_tokens else "context"
        job = Job(own, tokens, params, limit, self.tokenizer.decode, self._ends)
        if scheduled is None:  # a session goes on from its own
            own.tokens = job.tokens
        return job


def encode(prompt: Prompt, tokenizer: Tokenizer, cfg: KimiLinearConfig) -> list[int]:
    """`Engine.encode`, before there is an engine."""
    if isinstance(prompt, str):
        return [tokenizer.bos_id, *tokenizer.encode(prompt)] if prompt else []
    if prompt and isinstance(prompt[0], dict):
        ids = tokenizer.apply_chat(prompt, generation_prompt=True)
        return ids if tokenizer.template else [tokenizer.bos_id, *ids]
    wrong = [i for i in prompt if not 0 <= i < cfg.vocab_size]
    if wrong:
        raise UserError(f"token id {wrong[0]} is outside the model's vocabulary of {cfg.vocab_size}")
    return list(prompt)


def default_devices() -> str:
    """All GPUs, or the CPU where there is none."""
    return ",".join(f"cuda:{i}" for i in range(torch.cuda.device_count())) or "cpu"
