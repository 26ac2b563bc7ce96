"""The loop that turns scheduled steps into launches, and tokens into answers."""

from threading import Lock

from klquant.engine.job import Job
from klquant.engine.prefill import Span
from klquant.engine.reply import Reply
from klquant.engine.runner import Runner
from klquant.engine.sampler import mode_of
from klquant.engine.scheduler import Chunk, Scheduler, Sequence


class Loop:
    """All requests of an engine. `ahead`: a step is launched before the tokens of the one before were looked at."""

    def __init__(self, runner: Runner, scheduler: Scheduler, ahead: bool) -> None:
        self.runner, self.scheduler = runner, scheduler
        self.jobs: dict[Sequence, Job] = {}
        self._ahead = ahead
        self._launched: list[tuple[list[Job], Reply]] = []
        self._stepping = Lock()

    def add(self, job: Job) -> None:
        """Queue a request. Raises UserError when it can never fit."""
        self.scheduler.add(job.scheduled)
        self.jobs[job.scheduled] = job

    def cancel(self, job: Job) -> None:
        """End a request where it is, unless it has ended; its slot and pages are free."""
        job.end("cancelled")
        # The turns of a session share a sequence: it may be a later one's by now.
        if self.jobs.get(job.scheduled) is job:
            self._retire(job)

    def step(self) -> bool:
        """Launch at most a chunk of prompts and a token of every running answer. False when there is nothing to do.

        Whatever is raised, Ctrl-C included, ends the requests that had begun: what their slots hold is unknown.
        Raises RuntimeError when another thread is at a step.
        """
        if not self._stepping.acquire(blocking=False):
            raise RuntimeError("another thread is at a step of this engine; guard it with a lock, or make one for each")
        try:
            return self._step()
        except BaseException:
            self._abandon()
            raise
        finally:
            self._stepping.release()

    def _step(self) -> bool:
        step = self.scheduler.schedule()
        before, self._launched = self._launched, []
        if step and step.decode:
            self._decode([self.jobs[s] for s in step.decode])
        if step and step.prefill:
            self._prefill(step.prefill)
        if not self._ahead:
            before, self._launched = self._launched, []
        for jobs, reply in before:
            self._take(jobs, reply)
        if step is None and not before and self.scheduler.waiting:
            self._refuse(self.jobs[self.scheduler.waiting[0]])
            return True
        return bool(step or before)

    def _decode(self, jobs: list[Job]) -> None:
        mode = mode_of([job.params for job in jobs])
        chosen = self.runner.decode([job.scheduled.slot for job in jobs], mode)
        self._launched.append((jobs, Reply.begin(chosen, len(jobs))))

    def _prefill(self, chunks: tuple[Chunk, ...]) -> None:
        """Read chunks, and choose what comes behind those that end a prompt. Where a prefix was all, one is empty."""
        for chunk in chunks:
            job = self.jobs[chunk.sequence]
            if not job.bound:
                slot, pages, source = chunk.sequence.slot, chunk.sequence.pages, chunk.sequence.source
                if source:
                    self.runner.copy(source.slot, slot, source.pages)
                self.runner.bind(slot, pages, job.params, job.tokens, fresh=chunk.start == 0)
                job.bound = True
        for known in (False, True):
            some = [chunk for chunk in chunks if (chunk.start == chunk.stop) == known]
            if not some:
                continue
            spans = [self._span(chunk) for chunk in some]
            h_SC = None if known else self.runner.prefill(spans)
            if done := [self.jobs[chunk.sequence] for chunk in some if chunk.last]:
                chosen = self.runner.first_tokens(h_SC, spans[: len(done)], mode_of([job.params for job in done]))
                self._launched.append((done, Reply.begin(chosen, len(done))))
            for chunk in some:
                if chunk.left:
                    self.runner.copy(chunk.sequence.slot, chunk.left.slot)

    def _span(self, chunk: Chunk) -> Span:
        tokens = self.jobs[chunk.sequence].tokens[chunk.start : chunk.stop]
        return Span(tokens, chunk.sequence.slot, chunk.start)

    def _take(self, jobs: list[Job], reply: Reply) -> None:
        """Hand tokens to their answers; those of answers that have ended are dropped."""
        for row, (job, token) in enumerate(zip(jobs, reply.tokens(), strict=True)):
            if job.finish:
                continue
            if token < 0:
                self._fail(job)
                continue
            job.scheduled.checked = True
            top = job.params.logprobs
            job.push(token, None if top is None else reply.logprob(row, top))
            if job.stopping:
                job.end("cancelled")
            if job.finish:
                self._retire(job)

    def _fail(self, job: Job) -> None:
        """The model's logits were not numbers: say where it began. The sequence's state is worth nothing now."""
        sequence = job.scheduled
        if not self.scheduler.seclude(sequence):
            blame = "there is no room to look for where they begin"
        elif where := self.runner.find_bad_layer(job.tokens, sequence.slot, sequence.pages, self.scheduler.chunk):
            blame = f"{where} is the first to make them"
        elif sequence.reused:
            blame = "they do not come again when all is read anew"
        else:
            blame = "only the decode step makes them, not the prefill"
        job.end("error", f"the model's logits are NaN or infinite after {len(job.tokens)} tokens: {blame}")
        self._retire(job, sound=False)
        if sequence.keep:
            self.scheduler.release(sequence)

    def _abandon(self) -> None:
        self._launched = []
        for job in [job for sequence, job in self.jobs.items() if sequence not in self.scheduler.waiting]:
            job.end("error", "a step of the engine did not come to its end; what it had computed is lost")
            self._retire(job, sound=False)
            if job.scheduled.keep:
                self.scheduler.release(job.scheduled)

    def _refuse(self, job: Job) -> None:
        """Nothing runs, and still the first in the queue does not fit: sessions hold what it needs."""
        missing = self.scheduler.shortage(job.scheduled)
        job.end("error", f"{missing}: open sessions hold them; close one or give the engine more room")
        self._retire(job)

    def _retire(self, job: Job, sound: bool = True) -> None:
        self.scheduler.finish(job.scheduled, sound)
        del self.jobs[job.scheduled]
