"""Requests as OpenAI's API has them → prompts and sampling parameters."""

import difflib
from abc import ABC, abstractmethod
from dataclasses import replace
from typing import Annotated, Any, Literal

from pydantic import BaseModel, Field, StrictInt, field_validator, model_validator

from klquant.engine.engine import Prompt
from klquant.engine.request import MAX_LOGPROBS, MAX_SEED, SamplingParams
from klquant.errors import UserError

MAX_CHOICES = 64
# Each is looked for in each answer at each token.
MAX_STOPS = 16
# What would change an answer and is not built: field → the values that ask for nothing. Null does so for all.
NOT_BUILT: dict[str, tuple[Any, ...]] = {
    "tools": ([],), "functions": ([],), "tool_choice": ("none", "auto"), "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},), "logit_bias": ({},), "presence_penalty": (0,), "frequency_penalty": (0,),
    "best_of": (1,), "suffix": ("",), "echo": (False,), "modalities": (["text"],), "reasoning_effort": ("none",),
    "verbosity": ("medium",),
    # vLLM's
    "min_tokens": (0,), "stop_token_ids": ([],), "bad_words": ([],), "length_penalty": (1,),
    "use_beam_search": (False,), "skip_special_tokens": (True,), "spaces_between_special_tokens": (True,),
    "include_stop_str_in_output": (False,), "add_generation_prompt": (True,), "continue_final_message": (False,),
    "chat_template_kwargs": ({},), "return_token_ids": (False,), "return_tokens_as_token_ids": (False,),
}  # fmt: skip
# Who asks, how soon it is answered and what is kept of it. Fields that are in neither table are refused as well: any
# may be meant to change the answer.
HARMLESS = {
    "user", "safety_identifier", "metadata", "store", "service_tier", "parallel_tool_calls", "prediction",
    "prompt_cache_key", "prompt_cache_retention", "include_reasoning", "request_id", "priority", "cache_salt",
}  # fmt: skip
# The same of a message. Others, such as `name` and `refusal`, are passed over.
NOT_SAID: dict[str, tuple[Any, ...]] = {
    "tool_calls": ([],), "function_call": (), "partial": (False,), "prefix": (False,),
}  # fmt: skip


def _asks_nothing(name: str, value: Any, neutral: dict[str, tuple[Any, ...]]) -> bool:
    return value is None or value in neutral.get(name, ())


class StreamOptions(BaseModel):
    include_usage: bool | None = None


class Asked(BaseModel, ABC):
    """What both kinds of request have. Raises UserError for a field that would change an answer and is not built."""

    model: str | None = None
    n: int = Field(1, ge=1, le=MAX_CHOICES)
    temperature: float | None = None
    top_p: float | None = None
    top_k: int | None = None
    min_p: float | None = None
    repetition_penalty: float | None = None
    seed: int | None = None
    stop: str | Annotated[list[str], Field(max_length=MAX_STOPS)] | None = None
    ignore_eos: bool | None = None
    stream: bool = False
    stream_options: StreamOptions | None = None

    @model_validator(mode="before")
    @classmethod
    def _all_built(cls, fields: Any) -> Any:
        if not isinstance(fields, dict):
            return fields
        for name, value in fields.items():
            if not _asks_nothing(name, value, NOT_BUILT) and name not in cls.model_fields.keys() | HARMLESS:
                near = difflib.get_close_matches(name, cls.model_fields, n=1, cutoff=0.85)
                raise UserError(f"{name:.60} is not supported" + (f"; did you mean {near[0]}?" if near else ""))
        # null asks for nothing, except that it asks for no limit.
        return {name: value for name, value in fields.items() if value is not None or name == "max_tokens"}

    @property
    def wants_usage(self) -> bool:
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    def params(self, defaults: SamplingParams, room: int) -> list[SamplingParams]:
        """One for each of the `n` answers to a prompt; seeds follow one another from the one that was given. `room`:
        tokens of an answer when the request does not say. Raises UserError naming what is out of range."""
        names = "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "seed", "ignore_eos"
        given = {name: value for name in names if (value := getattr(self, name)) is not None}
        if given.get("top_k") == -1:  # as vLLM's clients say "all"
            given["top_k"] = 0
        most = self.most_tokens()
        given |= {"max_new_tokens": room if most is None else most, "logprobs": self.asked_logprobs()}
        if self.stop is not None:
            given["stop"] = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)
        params = replace(defaults, **given)
        if params.seed is None:
            return [params] * self.n
        return [replace(params, seed=(params.seed + i) % (MAX_SEED + 1)) for i in range(self.n)]

    @abstractmethod
    def most_tokens(self) -> int | None:
        """Tokens of an answer; None: as many as the context holds."""

    @abstractmethod
    def asked_logprobs(self) -> int | None:
        """As `SamplingParams.logprobs`."""

    @abstractmethod
    def prompts(self) -> list[Prompt]:
        """What is to be answered, each `n` times."""


class Part(BaseModel):
    """A piece of a message."""

    type: Literal["text"]
    text: str


class Message(BaseModel):
    role: Literal["system", "developer", "user", "assistant"]
    content: str | list[Part]

    @model_validator(mode="before")
    @classmethod
    def _all_built(cls, fields: Any) -> Any:
        for name in NOT_SAID if isinstance(fields, dict) else ():
            if not _asks_nothing(name, fields.get(name), NOT_SAID):
                raise UserError(f"{name} in a message is not supported")
        return fields

    @property
    def plain(self) -> dict[str, str]:
        text = self.content if isinstance(self.content, str) else "".join(part.text for part in self.content)
        return {"role": "system" if self.role == "developer" else self.role, "content": text}


class ChatAsked(Asked):
    """POST /v1/chat/completions. Without a number of tokens an answer may fill the context."""

    messages: list[Message] = Field(min_length=1)
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    def most_tokens(self) -> int | None:
        return self.max_tokens if self.max_completion_tokens is None else self.max_completion_tokens

    def asked_logprobs(self) -> int | None:
        return (self.top_logprobs or 0) if self.logprobs else None

    def prompts(self) -> list[Prompt]:
        return [[message.plain for message in self.messages]]


class TextAsked(Asked):
    """POST /v1/completions: texts, or token ids, that are continued as they are."""

    prompt: str | list[StrictInt] | list[str] | list[list[StrictInt]]
    max_tokens: int | None = 16
    logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)

    @field_validator("logprobs", mode="before")
    @classmethod
    def _number(cls, value: Any) -> Any:
        if isinstance(value, bool):
            raise ValueError("a number of alternatives is expected")
        return value

    def most_tokens(self) -> int | None:
        return self.max_tokens

    def asked_logprobs(self) -> int | None:
        return self.logprobs

    def prompts(self) -> list[Prompt]:
        single = isinstance(self.prompt, str) or (self.prompt and isinstance(self.prompt[0], int))
        return [self.prompt] if single or not self.prompt else list(self.prompt)


# Of the path to a wrong value: pydantic puts names of types between them.
FIELDS = frozenset(name for kind in (ChatAsked, TextAsked, Message, Part, StreamOptions) for name in kind.model_fields)
