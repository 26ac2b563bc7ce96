"""A request on its way: tokens come in one by one, final text goes out, until something ends it."""

import time
from collections import deque
from collections.abc import Callable, Sequence

from klquant.engine.request import Answer, Delta, Finish, SamplingParams, TokenLogprob
from klquant.engine.scheduler import Sequence as Scheduled
from klquant.engine.text import Detokenizer, StopText


class Job:
    """One answer in the making. `tokens`: prompt and answer; `limit`: why it ends when its sequence has `most`."""

    def __init__(
        self, scheduled: Scheduled, tokens: Sequence[int], params: SamplingParams, limit: Finish,
        decode: Callable[[Sequence[int]], str], end_tokens: frozenset[int],
    ) -> None:  # fmt: skip
        self.scheduled, self.tokens, self.params = scheduled, list(tokens), params
        # The sequence of a session has other numbers at its next turn.
        self._prompt, self._most = scheduled.prompt, scheduled.most
        self.bound = False  # its slot knows its pages and parameters
        self.stopping = False  # whoever asked for it has had enough
        self.finish: Finish | None = None
        self.deltas: deque[Delta] = deque()
        self._limit, self._error = limit, None
        self._end_tokens = frozenset() if params.ignore_eos else end_tokens
        self._detokenizer, self._stop = Detokenizer(decode), StopText(params.stop)
        self._texts: list[str] = []
        self._logprobs: list[TokenLogprob] = []
        self._began, self._first, self._last = time.perf_counter(), None, None

    def push(self, token: int, logprob: TokenLogprob | None) -> None:
        """Take the next token. Afterwards `finish` may be set; tokens behind the end are dropped."""
        if self.finish:
            return
        self._last = time.perf_counter()
        self._first = self._first or self._last
        self.tokens.append(token)
        text = "" if token in self._end_tokens else self._stop.push(self._detokenizer.push(token))
        if token in self._end_tokens:
            self.finish = "eos"
        elif self._stop.stopped:
            self.finish = "stop"
        elif len(self.tokens) > self._most:
            self.finish = self._limit
        if self.finish:
            text += self._flush()
        self._give(Delta(text, (token,), (logprob,) if logprob else (), self.finish))

    def end(self, finish: Finish, error: str | None = None) -> None:
        """End it where it is: cancelled, or by an error in one line."""
        if not self.finish:
            self.finish, self._error, self._last = finish, error, time.perf_counter()
            self._give(Delta(self._flush(), finish=finish, error=error))

    def answer(self) -> Answer:
        """All of it, once it has finished."""
        return Answer(
            text="".join(self._texts),
            tokens=tuple(self.tokens[self._prompt :]),
            logprobs=tuple(self._logprobs),
            finish=self.finish,
            error=self._error,
            prompt_tokens=self._prompt,
            seed=self.params.seed,
            seconds_to_first=(self._first or self._last) - self._began,
            seconds=self._last - self._began,
        )

    def _flush(self) -> str:
        return self._stop.push(self._detokenizer.flush()) + self._stop.flush()

    def _give(self, delta: Delta) -> None:
        self._texts.append(delta.text)
        self._logprobs += delta.logprobs
        self.deltas.append(delta)
