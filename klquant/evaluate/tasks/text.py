"""Text of a task ↔ token ids, one way for all of them.

Every context begins with BOS, as the documents of calibration and evaluation do, unless a chat template wrote it.
"""

import json
from pathlib import Path

from klquant.calibrate.tokenizer import Tokenizer
from klquant.errors import UserError


class TaskText:
    """`chat`: contexts come out of the chat template, and special tokens in them are recognised. `room`: the longest
    sequence. `cut` counts contexts that lost their beginning to it since it was last set to 0."""

    def __init__(self, tokenizer: Tokenizer, folder: Path, room: int, chat: bool) -> None:
        if chat and tokenizer.template is None:
            raise UserError(f"{folder}: no chat template, but --chat asks for it; leave --chat out")
        self.tokenizer, self.chat, self.room, self.cut = tokenizer, chat, room, 0
        self.ends = {tokenizer.eos_id, *_end_ids(folder / "generation_config.json")}

    def encode(self, text: str) -> list[int]:
        return self.tokenizer.backend.encode_special(text) if self.chat else self.tokenizer.encode(text)

    def context(self, text: str) -> list[int]:
        bos, ids = self.tokenizer.bos_id, self.encode(text)
        return ids if ids[:1] == [bos] else [bos, *ids]

    def pair(self, context: str, continuation: str) -> tuple[list[int], list[int]]:
        """Ids of both, cut where the whole text's tokens are: spaces that end the context belong to what follows."""
        bare = context.rstrip()
        continuation = context[len(bare) :] + continuation
        head, whole = self.context(bare), self.context(bare + continuation)
        # Where the seam falls into a token, the parts are encoded apart.
        apart = whole[: len(head)] != head or len(whole) == len(head)
        tail = self.encode(continuation) if apart else whole[len(head) :]
        return self.fitted(head, len(tail)), tail

    def fitted(self, context: list[int], more: int) -> list[int]:
        """The context's end, behind its first token, that leaves room for `more` tokens."""
        room = self.room - more
        if len(context) <= room:
            return context
        self.cut += 1
        return [context[0], *context[len(context) - max(0, room - 1) :]]

    def render(self, messages: list[dict[str, str]], generation_prompt: bool) -> str:
        bos, eos = (self.tokenizer.decode([i]) for i in (self.tokenizer.bos_id, self.tokenizer.eos_id))
        return self.tokenizer.template.render(
            messages, bos_token=bos, eos_token=eos, generation_prompt=generation_prompt
        )


def _end_ids(file: Path) -> set[int]:
    """Tokens that end an answer beside EOS, such as a chat's end of turn."""
    try:
        ids = json.loads(file.read_text(encoding="utf-8")).get("eos_token_id", [])
    except (OSError, ValueError, AttributeError):
        return set()
    return {i for i in (ids if isinstance(ids, list) else [ids]) if isinstance(i, int)}
