"""What a user asks for and what comes back: plain data, and the checks of it."""

import secrets
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

from klquant.checkpoint.index import read_json
from klquant.errors import UserError

MAX_LOGPROBS = 20
MAX_SEED = (1 << 63) - 1
# Far beyond both ends logits over temperature are no FP32 numbers; below 0.0001 none but the likeliest is ever drawn.
TEMPERATURES = "0 (the likeliest token), or from 0.0001 to 1,000,000"

# length: max_new_tokens; context: the engine's max_context; error: the model's logits were not numbers.
Finish = Literal["eos", "stop", "length", "context", "error", "cancelled"]


@dataclass(frozen=True)
class SamplingParams:
    """How tokens are chosen and when to stop.

    temperature: 0 takes the likeliest token, others are at least 0.0001. top_k (0: all), top_p (1: all) and
    min_p (0: all) narrow the choice, in this order: the k likeliest tokens, the fewest whose probability reaches top_p,
    those at least min_p times as likely as the first. repetition_penalty: logits of tokens seen in prompt or answer are
    divided by it where positive and multiplied where negative. seed: equal seeds give equal answers, whatever else runs
    beside; None draws one. stop: texts that end the answer and are not part of it. logprobs: that many likeliest tokens
    beside each chosen one, before temperature and penalty; None reports none. ignore_eos: the model's end token does
    not stop.
    """

    max_new_tokens: int = 512
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: tuple[str, ...] = ()
    logprobs: int | None = None
    ignore_eos: bool = False

    def __post_init__(self) -> None:
        """Raises UserError naming the first parameter out of its range."""
        for name, ok, want in (
            ("max_new_tokens", self.max_new_tokens >= 1, "at least 1"),
            ("temperature", self.temperature == 0 or 1e-4 <= self.temperature <= 1e6, TEMPERATURES),
            (
                "top_k",
                isinstance(self.top_k, int) and 0 <= self.top_k < 1 << 31,
                "a whole number, 0 (all tokens) or more",
            ),
            ("top_p", 0 < self.top_p <= 1, "above 0 and at most 1"),
            ("min_p", 0 <= self.min_p <= 1, "from 0 to 1"),
            ("repetition_penalty", 1e-6 <= self.repetition_penalty <= 1e6, "from 0.000001 to 1,000,000"),
            ("seed", self.seed is None or 0 <= self.seed <= MAX_SEED, f"from 0 to {MAX_SEED}"),
            ("stop", not isinstance(self.stop, str), "a list of texts"),
            ("logprobs", self.logprobs is None or 0 <= self.logprobs <= MAX_LOGPROBS, f"from 0 to {MAX_LOGPROBS}"),
        ):
            if not ok:
                raise UserError(f"{name} is {getattr(self, name)!r}, expected {want}")
        if not all(self.stop):
            raise UserError("stop has an empty text, which would end any answer at once; leave it out")

    @property
    def greedy(self) -> bool:
        return self.temperature == 0

    def with_seed(self) -> "SamplingParams":
        """The same, with a seed."""
        return self if self.seed is not None else replace(self, seed=secrets.randbits(62))


@dataclass(frozen=True)
class TokenLogprob:
    """A chosen token, the natural logarithm of its probability, and the likeliest (token, logprob), best first."""

    token: int
    logprob: float
    top: tuple[tuple[int, float], ...]


@dataclass(frozen=True)
class Delta:
    """What an answer gained: text that is final, the tokens behind it, and at the end why it ended.

    The text of a token can come later than the token: half a character, or what may become a stop text, is held back.
    """

    text: str
    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprob, ...] = ()
    finish: Finish | None = None
    error: str | None = None


@dataclass(frozen=True)
class Answer:
    """A finished answer. Tokens are those of the text and the one or those that ended it.

    seconds: to the first token, and in all, from the moment the request was made.
    """

    text: str
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprob, ...]
    finish: Finish
    error: str | None
    prompt_tokens: int
    seed: int
    seconds_to_first: float
    seconds: float


def default_params(folder: Path) -> SamplingParams:
    """What the checkpoint's generation_config.json recommends, read as transformers does: greedy unless it samples.

    Raises UserError naming the file when a value cannot be used.
    """
    file = folder / "generation_config.json"
    if not file.exists():
        return SamplingParams()
    raw = read_json(file)
    keys = ("temperature", "top_k", "top_p", "min_p", "repetition_penalty")
    found = {key: raw[key] for key in keys if raw.get(key) is not None}
    for key, value in found.items():
        if type(value) not in (int, float):
            raise UserError(f"{file}: {key} is {value!r}, expected a number")
    sampled = raw.get("do_sample", "temperature" in found)
    found["temperature"] = found.get("temperature", 1.0) if sampled else 0.0
    try:
        return SamplingParams(**found)
    except UserError as error:
        raise UserError(f"{file}: {error}") from None


def end_tokens(folder: Path, config_ids: tuple[int, ...]) -> frozenset[int]:
    """The tokens that end an answer: those of config.json and of generation_config.json.

    Raises UserError naming the file when what it says cannot be used.
    """
    file = folder / "generation_config.json"
    ids = read_json(file).get("eos_token_id") if file.exists() else None
    more = ids if isinstance(ids, list) else [] if ids is None else [ids]
    if not all(type(i) is int and i >= 0 for i in more):
        raise UserError(f"{file}: eos_token_id is {ids!r}, expected a token id or a list of them")
    return frozenset(config_ids) | frozenset(more)
