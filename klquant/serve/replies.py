"""Answers as OpenAI's API has them."""

import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Literal

from klquant.engine.request import Delta, Finish, TokenLogprob

Kind = Literal["chat", "text"]
REASONS: dict[Finish, str] = {"eos": "stop", "stop": "stop", "length": "length", "context": "length"}


@dataclass
class Reply:
    """The outside of all that is said in answer to one request.

    decode: token ids to text. reused: tokens of the prompts that did not have to be computed.
    """

    kind: Kind
    model: str
    prompt_tokens: int
    decode: Callable[[Sequence[int]], str]
    id: str = field(default_factory=lambda: uuid.uuid4().hex)
    created: int = field(default_factory=lambda: int(time.time()))
    completion_tokens: int = 0
    reused: int = 0

    def chunk(self, index: int, delta: Delta, first: bool = False) -> dict | None:
        """A piece of answer `index` of a stream; None where there is nothing to say yet."""
        self.completion_tokens += len(delta.tokens)
        if not (first or delta.text or delta.logprobs or delta.finish):
            return None
        reason = REASONS[delta.finish] if delta.finish else None
        if self.kind == "text":
            return self._outside([self._text_choice(index, delta.text, delta.logprobs, reason)], stream=True)
        said = {"role": "assistant"} if first else {}
        if delta.text or first:
            said["content"] = delta.text
        choice = {"index": index, "delta": said, "logprobs": self._chat_logprobs(delta.logprobs)}
        return self._outside([choice | {"finish_reason": reason}], stream=True)

    def usage_chunk(self) -> dict:
        """The last piece of a stream, for whoever asked for it."""
        return self._outside([], stream=True) | {"usage": self.usage()}

    def whole(self, answers: Sequence[Sequence[Delta]]) -> dict:
        """Answers that have ended, each given by what it gained."""
        choices = []
        for index, deltas in enumerate(answers):
            self.completion_tokens += sum(len(delta.tokens) for delta in deltas)
            text = "".join(delta.text for delta in deltas)
            logprobs = [one for delta in deltas for one in delta.logprobs]
            reason = REASONS[deltas[-1].finish]
            if self.kind == "text":
                choices.append(self._text_choice(index, text, logprobs, reason))
            else:
                message = {"role": "assistant", "content": text}
                choice = {"index": index, "message": message, "logprobs": self._chat_logprobs(logprobs)}
                choices.append(choice | {"finish_reason": reason})
        return self._outside(choices, stream=False) | {"usage": self.usage()}

    def usage(self) -> dict:
        total = self.prompt_tokens + self.completion_tokens
        return {
            "prompt_tokens": self.prompt_tokens, "completion_tokens": self.completion_tokens, "total_tokens": total,
            "prompt_tokens_details": {"cached_tokens": self.reused},
        }  # fmt: skip

    def _outside(self, choices: list[dict], stream: bool) -> dict:
        prefix, name = ("chatcmpl", "chat.completion") if self.kind == "chat" else ("cmpl", "text_completion")
        if stream and self.kind == "chat":
            name += ".chunk"
        return {
            "id": f"{prefix}-{self.id}", "object": name, "created": self.created, "model": self.model,
            "choices": choices,
        }  # fmt: skip

    def _text_choice(self, index: int, text: str, logprobs: Sequence[TokenLogprob], reason: str | None) -> dict:
        said = {
            "tokens": [self.decode([one.token]) for one in logprobs],
            "token_logprobs": [one.logprob for one in logprobs],
            "top_logprobs": [self._by_text(one) for one in logprobs],
        }
        return {"index": index, "text": text, "logprobs": said if logprobs else None, "finish_reason": reason}

    def _by_text(self, one: TokenLogprob) -> dict[str, float]:
        """Pieces of characters all read alike: the likeliest stands for them."""
        return {self.decode([token]): logprob for token, logprob in reversed(one.top)}

    def _chat_logprobs(self, logprobs: Sequence[TokenLogprob]) -> dict | None:
        if not logprobs:
            return None
        return {
            "content": [
                self._token(one.token, one.logprob) | {"top_logprobs": [self._token(*pair) for pair in one.top]}
                for one in logprobs
            ]
        }

    def _token(self, token: int, logprob: float) -> dict:
        text = self.decode([token])
        # A token that is a piece of a character has bytes that its text does not show.
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def error_body(message: str, status: int) -> dict:
    """What clients of OpenAI's API expect of an error."""
    kind = "invalid_request_error" if status < 500 else "server_error"
    return {"error": {"message": message, "type": kind, "param": None, "code": status}}
