"""Whether several threads are ever inside a function at once."""

import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from threading import Lock


class Alone:
    """Stands in for a function: returns `result`, and `most` is how many threads were inside at once."""

    def __init__(self, result: object) -> None:
        self.result, self.most = result, 0
        self._inside, self._count = 0, Lock()

    def __call__(self, *args: object, **options: object) -> object:
        with self._count:
            self._inside += 1
            self.most = max(self.most, self._inside)
        time.sleep(0.005)
        with self._count:
            self._inside -= 1
        return self.result


def in_threads(run: Callable[[], object], threads: int = 4) -> None:
    with ThreadPoolExecutor(threads) as pool:
        for job in [pool.submit(run) for _ in range(2 * threads)]:
            job.result()
