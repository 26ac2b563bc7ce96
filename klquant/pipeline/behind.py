"""What is written while the next unit is worked on."""

import time
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor


class Behind:
    """A thread that does one job after the other; use it in a `with` block.

    At most one job is under way, so that no more than one unit's output waits to be written. What a job raises is
    raised by the next `submit` or `wait`. A block that is left by an exception lets the job under way end: what was
    finished before is safe. `waited` seconds were spent waiting for jobs.
    """

    def __init__(self) -> None:
        self.waited = 0.0
        self._pool = ThreadPoolExecutor(1, "behind")
        self._job: Future[None] | None = None

    def __enter__(self) -> "Behind":
        return self

    def __exit__(self, failure: type | None, *_) -> None:
        try:
            if failure is None:
                self.wait()
        finally:
            self._pool.shutdown()

    def submit(self, job: Callable[[], None]) -> None:
        self.wait()
        self._job = self._pool.submit(job)

    def wait(self) -> None:
        """Until nothing is under way."""
        job, self._job = self._job, None
        if job is not None:
            began = time.perf_counter()
            try:
                job.result()
            finally:
                self.waited += time.perf_counter() - began
