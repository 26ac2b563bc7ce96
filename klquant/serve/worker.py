"""The one thread that an engine belongs to, and the way of requests from the event loop to it and of answers back."""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Sequence
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Thread
from weakref import WeakSet

from klquant.engine.engine import Engine
from klquant.engine.job import Job
from klquant.engine.request import Delta, SamplingParams

# Python runs one thread at a time, and each piece of a stream takes it a fraction of a millisecond: so many a second,
# over all streams, leave the engine's thread enough. One stream gets each token by itself, 32 get some at a time.
PIECES_A_SECOND = 1000

GOING = "the server is going down"

# Token ids of a prompt, and how to answer it.
Order = tuple[Sequence[int], SamplingParams]


class WorkerStopped(Exception):
    """The engine has failed, or the server is going down: nothing is answered any more."""


@dataclass(frozen=True)
class Said:
    """Answer `index` of a request gained `delta`."""

    index: int
    delta: Delta


class Request:
    """Prompts that were asked together. What happens to them comes out of `events`, on the event loop."""

    def __init__(self, orders: Sequence[Order]) -> None:
        self.orders, self.jobs = orders, []
        self.dropped = False
        self.told = 0.0
        self._loop = asyncio.get_running_loop()
        self._events: asyncio.Queue[list[Said] | Exception | None] = asyncio.Queue()

    @property
    def reused(self) -> int:
        """Tokens of its prompts that no answer had to compute; known at the end."""
        least: dict[int, int] = {}
        for (ids, _), job in zip(self.orders, self.jobs, strict=True):
            least[id(ids)] = min(least.get(id(ids), len(ids)), job.scheduled.reused)
        return sum(least.values())

    def tell(self, event: list[Said] | Exception | None) -> None:
        """Called by the worker's thread. None: the engine has taken the request."""
        try:
            self._loop.call_soon_threadsafe(self._events.put_nowait, event)
        except RuntimeError:  # the event loop has ended, and whoever waited with it
            self.drop()

    async def begin(self) -> None:
        """Wait until the engine has taken it. Raises UserError when it never can, WorkerStopped when it is gone, and
        whatever else kept the engine from taking it."""
        try:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
        except BaseException:
            self.drop()
            raise

    async def events(self) -> AsyncIterator[Said]:
        """What the answers gain, each until its `finish`; `begin` comes first. Whoever stops early calls `drop`."""
        running = len(self.orders)
        while running:
            event = await self._events.get()
            if isinstance(event, Exception):
                raise event
            for said in event:
                yield said
                running -= said.delta.finish is not None

    def drop(self) -> None:
        """Nobody waits for it any more: the engine ends what has not ended."""
        self.dropped = True


class Worker:
    """Runs an engine in a thread of its own until `stop`. `on_failure` is called, in that thread, when a step raises:
    what a device does after an error cannot be trusted, so nothing is answered any more."""

    def __init__(self, engine: Engine, on_failure: Callable[[BaseException], None]) -> None:
        self._engine, self._on_failure = engine, on_failure
        self._inbox: SimpleQueue[Request | None] = SimpleQueue()
        self._running: list[Request] = []
        self._open: WeakSet[Request] = WeakSet()
        self._stopped = False
        self._thread = Thread(target=self._run, name="engine", daemon=True)
        self._thread.start()

    @property
    def alive(self) -> bool:
        return not self._stopped

    def submit(self, orders: Sequence[Order]) -> Request:
        """Queue prompts, all or none of which are answered. Call it on an event loop, then await `Request.begin`."""
        request = Request(orders)
        self._open.add(request)
        self._inbox.put(request)
        if self._stopped:  # it may have missed the thread's last look
            request.tell(WorkerStopped("the engine has stopped"))
        return request

    def stop(self) -> None:
        """Tell all that wait, and end the thread after the step that it is at: this does not wait for that."""
        for request in [*self._open]:
            request.tell(WorkerStopped(GOING))
        self._inbox.put(None)

    def join(self) -> None:
        """Wait for the thread to end. The engine can be closed afterwards."""
        self._thread.join()

    def _run(self) -> None:
        try:
            while self._take_in():
                self._drop()
                if self._running:
                    ran = self._engine.loop.step()
                    assert ran, "nothing runs, and an answer has not finished"
                    self._deliver()
        except BaseException as error:
            self._stopped = True
            self._on_failure(error)
            self._deliver()
        self._stopped = True
        self._end_all()

    def _take_in(self) -> bool:
        """Give the engine what has come; wait for something when it has nothing to do. False: `stop` was called."""
        while not self._running or not self._inbox.empty():
            request = self._inbox.get()
            if request is None:
                return False
            if not request.dropped:
                self._begin(request)
        return True

    def _begin(self, request: Request) -> None:
        try:
            for ids, params in request.orders:
                request.jobs.append(self._engine.submit(ids, params))
        except Exception as error:  # no device has done anything yet: only this request has to do without
            self._cancel(request.jobs)
            request.tell(error)
        else:
            self._running.append(request)
            request.tell(None)

    def _drop(self) -> None:
        for request in [r for r in self._running if r.dropped]:
            self._cancel(request.jobs)
            self._running.remove(request)

    def _deliver(self) -> None:
        now, pause = time.perf_counter(), sum(len(r.jobs) for r in self._running) / PIECES_A_SECOND
        for request in self._running.copy():
            ended = all(job.finish for job in request.jobs)
            if not ended and now - request.told < pause:
                continue
            if said := [Said(i, delta) for i, job in enumerate(request.jobs) for delta in _taken(job)]:
                request.tell(said)
                request.told = now
            if ended:
                self._running.remove(request)

    def _end_all(self) -> None:
        gone = WorkerStopped(GOING)
        for request in self._running:
            self._cancel(request.jobs)
            request.tell(gone)
        while not self._inbox.empty():
            if request := self._inbox.get():
                request.tell(gone)

    def _cancel(self, jobs: Sequence[Job]) -> None:
        for job in jobs:
            self._engine.cancel(job)


def _taken(job: Job) -> list[Delta]:
    """What a job has gained, as one piece; an error is one of its own."""
    deltas = [job.deltas.popleft() for _ in range(len(job.deltas))]
    parts = [deltas[:-1], deltas[-1:]] if deltas and deltas[-1].finish == "error" else [deltas]
    return [_joined(part) for part in parts if part]


def _joined(deltas: Sequence[Delta]) -> Delta:
    return Delta(
        "".join(delta.text for delta in deltas),
        tuple(token for delta in deltas for token in delta.tokens),
        tuple(one for delta in deltas for one in delta.logprobs),
        deltas[-1].finish, deltas[-1].error,
    )  # fmt: skip
