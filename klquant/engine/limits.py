"""What an engine has room for."""

from dataclasses import asdict, dataclass, replace

from klquant.checkpoint.config import KimiLinearConfig
from klquant.engine.state import CACHE_BITS
from klquant.errors import UserError
from klquant.kernels.mla.pages import pages_for
from klquant.recipe.memory import PREFILL_CHUNK

DEFAULT_CONTEXT = 8192


@dataclass(frozen=True)
class Limits:
    """Sizes that memory is taken for.

    max_context: tokens of one prompt and its answer (None: DEFAULT_CONTEXT, or the model's limit if that is less).
    max_batch: sequences at a time; each has a slot of KDA state. cache_tokens: tokens in the latent cache, over all
    sequences (None: max_context). cache_bits: 16, or 8 for INT8. chunk: positions of prompts that run at once, between
    two steps of the running answers. prefixes: beginnings of prompts whose state stays, for prompts that begin so as
    well: each has a slot too, and a part of the latent cache as long as nobody else needs it.
    """

    max_context: int | None = None
    max_batch: int = 8
    cache_tokens: int | None = None
    cache_bits: int = 16
    chunk: int = PREFILL_CHUNK
    prefixes: int = 0

    def of(self, cfg: KimiLinearConfig) -> "Limits":
        """With every number set. Raises UserError when one is below 1, or max_context is beyond the model's own."""
        context = min(DEFAULT_CONTEXT, cfg.max_context) if self.max_context is None else self.max_context
        cache = context if self.cache_tokens is None else self.cache_tokens
        full = replace(self, max_context=context, cache_tokens=cache)
        for name, value in asdict(full).items():
            least = 0 if name == "prefixes" else 1
            if value < least:
                raise UserError(f"{name} is {value}, expected at least {least}")
        if context > cfg.max_context:
            raise UserError(f"max_context {context:,} is beyond the model's own limit of {cfg.max_context:,} tokens")
        if self.cache_bits not in CACHE_BITS:
            raise UserError(f"cache_bits is {self.cache_bits}, expected {' or '.join(map(str, CACHE_BITS))}")
        return full

    def room(self, prompt: int, cfg: KimiLinearConfig) -> int:
        """How many tokens an answer to a prompt of so many may have. Raises UserError when there is none to answer,
        or none left."""
        if not prompt:
            raise UserError("the prompt is empty")
        if prompt >= self.max_context:
            more = f", or raise max_context (the model's limit is {cfg.max_context:,})"
            raise UserError(
                f"the prompt has {prompt:,} tokens, which fills the context of {self.max_context:,}; shorten it"
                f"{more if self.max_context < cfg.max_context else ''}"
            )
        return self.max_context - prompt

    @property
    def pages(self) -> int:
        return pages_for(self.cache_tokens)
