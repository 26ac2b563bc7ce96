"""Conversations that keep their state: a turn computes only what is new."""

from collections.abc import Iterator, Sequence

from klquant.calibrate.chat import Message
from klquant.engine.engine import Engine
from klquant.engine.job import Job
from klquant.engine.request import Answer, Delta, SamplingParams
from klquant.engine.scheduler import Sequence as Scheduled
from klquant.errors import UserError


class Session:
    """A slot and pages that stay from one answer to the next; `reset` gives them back. Also a context manager.

    A recurrent state cannot be taken back: it serves prompts that begin with exactly the tokens it has seen.
    """

    def __init__(self, engine: Engine) -> None:
        self._engine = engine
        self._scheduled = Scheduled(0, 0, keep=True)
        self._job: Job | None = None

    @property
    def tokens(self) -> list[int]:
        """The last prompt and its answer."""
        return self._job.tokens if self._job else []

    @property
    def computed(self) -> int:
        """How many of `tokens`, from the first, the state has seen."""
        return self._scheduled.computed

    def stream(self, ids: Sequence[int], params: SamplingParams | None = None) -> Iterator[Delta]:
        """Answer a prompt of token ids, given whole. Where it begins with what the state has seen, and goes on, only
        the rest is computed; otherwise the session starts over. An answer that is still running is cancelled.

        Raises UserError as `Engine.submit` does; the session then is as it was.
        """
        if self._job:
            self._engine.cancel(self._job)
        goes_on = len(ids) > self.computed and list(ids[: self.computed]) == self.tokens[: self.computed]
        scheduled = self._scheduled if goes_on else Scheduled(0, 0, keep=True)
        self._job = self._engine.submit(ids, params, scheduled)
        if not goes_on:
            self._engine.release(self._scheduled)
            self._scheduled = scheduled
        return self._engine.follow(self._job)

    def answer(self) -> Answer:
        """The last answer, once it has finished; a prompt that was refused leaves the one before. There is none before
        the first."""
        assert self._job, "there is no answer"
        return self._job.answer()

    def stop(self) -> None:
        """End the answer that is running. May be called from a signal handler: whoever follows it ends it."""
        if self._job:
            self._job.stopping = True

    def reset(self) -> None:
        """Forget everything; slot and pages are free."""
        if self._job:
            self._engine.cancel(self._job)
        self._engine.release(self._scheduled)
        self._job = None

    def __enter__(self) -> "Session":
        return self

    def __exit__(self, *_: object) -> None:
        self.reset()


class ConversationFull(UserError):
    """What was said does not fit behind the conversation so far."""


class Chat:
    """A conversation through the model's chat template, on a session. `messages` are what was said so far."""

    def __init__(self, engine: Engine) -> None:
        self._engine, self.session = engine, Session(engine)
        self.messages: list[Message] = []
        self._said = ""  # the text behind the session's tokens, a final end token excepted
        self._answering: Iterator[Delta] | None = None

    def ask(self, text: str, params: SamplingParams | None = None) -> Iterator[Delta]:
        """Say `text` and stream the answer, which becomes part of the conversation however it ends; an answer still
        running ends here.

        Where the template writes the conversation so far as it was, only what is new is computed. Raises UserError
        when there is no room for an answer, ConversationFull where it is not for `text` alone, and forgets `text`.
        """
        self._end()
        messages = [*self.messages, {"role": "user", "content": text}]
        whole = self._engine.tokenizer.render_chat(messages, generation_prompt=True)
        ids = self._ids(messages, whole)
        self._require_room(len(ids))
        deltas = self.session.stream(ids, params)
        self.messages = messages
        self._answering = self._listen(whole, deltas)
        next(self._answering)  # closing a generator that has not begun would not end the turn
        return self._answering

    def reset(self) -> None:
        """Begin a new conversation."""
        self._end()
        self.session.reset()
        self.messages, self._said = [], ""

    def _end(self) -> None:
        if self._answering:
            self._answering.close()

    def _require_room(self, needed: int) -> None:
        context, has = self._engine.limits.max_context, len(self.session.tokens)
        if not self.messages or needed < context:
            return
        if has >= context:
            raise ConversationFull(f"the conversation fills the context of {context:,} tokens")
        raise ConversationFull(f"the conversation has {has:,} of the context's {context:,} tokens: no room for this")

    def _listen(self, whole: str, deltas: Iterator[Delta]) -> Iterator[Delta | None]:
        try:
            yield None
            yield from deltas
        finally:
            deltas.close()
            said = self.session.answer().text
            self.messages.append({"role": "assistant", "content": said})
            self._said = whole + said

    def _ids(self, messages: list[Message], whole: str) -> list[int]:
        """The conversation's ids: those the session has, then what the template adds. Encoding an answer's text anew
        could cut it into other tokens than the model chose."""
        tokens = self.session.tokens
        finish = self.session.answer().finish if tokens else None
        if finish in (None, "stop") or not whole.startswith(self._said):
            return self._engine.encode(messages)  # a stop text is among the tokens, and was not said
        said = tokens[:-1] if finish == "eos" else tokens
        return said + self._engine.tokenizer.encode_chat(whole.removeprefix(self._said))
