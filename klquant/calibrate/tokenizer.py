"""One tokenizer for calibration, evaluation and generation, from `tokenizer.json` or the hub's `tiktoken.model`.

Neither runs code from the checkpoint. `tokenizer.json` wins where a folder has both: it is complete in itself.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from klquant.calibrate.chat import ChatTemplate, Message, find_template, plain
from klquant.calibrate.tiktoken_bpe import TiktokenBPE
from klquant.checkpoint.config import KimiLinearConfig
from klquant.checkpoint.index import read_json
from klquant.errors import UserError


class Backend(Protocol):
    """What `tokenizer.json` and `tiktoken.model` have in common."""

    vocab_size: int

    def encode(self, text: str) -> list[int]: ...
    def encode_special(self, text: str) -> list[int]: ...
    def decode(self, ids: Sequence[int]) -> str: ...
    def token_id(self, text: str) -> int | None: ...


@dataclass(frozen=True)
class Tokenizer:
    """Text ↔ token ids of one checkpoint. `file` is where the vocabulary was read, for messages."""

    file: Path
    backend: Backend
    bos_id: int
    eos_id: int
    template: ChatTemplate | None

    @property
    def vocab_size(self) -> int:
        """One more than the largest id this tokenizer can produce."""
        return max(self.backend.vocab_size, self.bos_id + 1, self.eos_id + 1)

    def encode(self, text: str) -> list[int]:
        """Ids of a document, without BOS and EOS. Text that spells a special token stays text.

        Raises UserError for text that is no Unicode: a surrogate without its other half.
        """
        return self.backend.encode(_unicode(text))

    def decode(self, ids: Sequence[int]) -> str:
        """Text of `ids`, special tokens spelled out; bytes that are no UTF-8 become U+FFFD."""
        return self.backend.decode(ids)

    def apply_chat(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> list[int]:
        """Ids of a conversation through the model's chat template, special tokens recognised in what it renders.

        Without a template (`self.template is None`) the conversation becomes paragraphs of `role: text`; whoever
        calls records that. Raises UserError when the template refuses the conversation.
        """
        return self.encode_chat(self.render_chat(messages, generation_prompt=generation_prompt))

    def render_chat(self, messages: Sequence[Message], *, generation_prompt: bool = False) -> str:
        """The text that `apply_chat` encodes. Raises UserError when the template refuses the conversation."""
        if self.template is None:
            return plain(messages) + ("\n\nassistant: " if generation_prompt else "")
        bos, eos = self.decode([self.bos_id]), self.decode([self.eos_id])
        return self.template.render(messages, bos_token=bos, eos_token=eos, generation_prompt=generation_prompt)

    def encode_chat(self, text: str) -> list[int]:
        """Ids of rendered text: what a template spells out as a special token is one."""
        return self.encode(text) if self.template is None else self.backend.encode_special(_unicode(text))

    def require_fits(self, cfg: KimiLinearConfig) -> None:
        """Raises UserError when the tokenizer can produce ids that the model has no embedding for."""
        if self.vocab_size > cfg.vocab_size:
            raise UserError(
                f"{self.file}: token ids up to {self.vocab_size - 1} lie beyond the model's vocabulary of "
                f"{cfg.vocab_size} (config.json); use the tokenizer that came with the checkpoint"
            )


def _unicode(text: str) -> str:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        bad = f"\\u{ord(text[error.start]):04x}"
        raise UserError(f"character {error.start + 1:,} of the text, {bad}, is only half of one") from None
    return text


def load_tokenizer(folder: Path | str) -> Tokenizer:
    """The tokenizer of a checkpoint folder.

    Raises UserError, naming the file, when there is none, when it is corrupt, or when BOS and EOS cannot be found.
    """
    folder = Path(folder)
    fast, ranks = folder / "tokenizer.json", folder / "tiktoken.model"
    settings_file = folder / "tokenizer_config.json"
    settings = read_json(settings_file) if settings_file.exists() else {}
    if fast.exists():
        file, backend = fast, _FastTokenizer(fast)
    elif ranks.exists():
        file, backend = ranks, TiktokenBPE(ranks, _added_tokens(settings, settings_file))
    else:
        raise UserError(f"{folder}: no tokenizer.json and no tiktoken.model; copy the tokenizer next to the weights")
    return Tokenizer(
        file=file,
        backend=backend,
        bos_id=_special_id("bos_token", backend, settings, folder),
        eos_id=_special_id("eos_token", backend, settings, folder),
        template=find_template(folder, settings),
    )


class _FastTokenizer:
    """`tokenizer.json` through the `tokenizers` library."""

    def __init__(self, file: Path) -> None:
        import tokenizers

        try:
            self._tokenizer = tokenizers.Tokenizer.from_file(str(file))
        except Exception as error:  # the library raises bare Exception
            raise UserError(f"{file}: not a readable tokenizer.json: {error}") from None
        # A file may ask for a maximum length or padding; documents are neither cut nor filled here.
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self.vocab_size = max(self._tokenizer.get_vocab(with_added_tokens=True).values(), default=-1) + 1

    def encode(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = True
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def encode_special(self, text: str) -> list[int]:
        self._tokenizer.encode_special_tokens = False
        return self._tokenizer.encode(text, add_special_tokens=False).ids

    def decode(self, ids: Sequence[int]) -> str:
        return self._tokenizer.decode(list(ids), skip_special_tokens=False)

    def token_id(self, text: str) -> int | None:
        return self._tokenizer.token_to_id(text)


def _added_tokens(settings: dict, where: Path) -> dict[str, int]:
    """`added_tokens_decoder`: {"163584": {"content": "[BOS]", …}, …} → {"[BOS]": 163584, …}."""
    table = settings.get("added_tokens_decoder", {})
    special: dict[str, int] = {}
    for key, token in table.items() if isinstance(table, dict) else [("", table)]:
        content = token.get("content") if isinstance(token, dict) else None
        if not str(key).isdecimal() or not isinstance(content, str) or not content:
            raise UserError(f"{where}: added_tokens_decoder entry {key!r} is not 'id: {{content: text}}'")
        special[content] = int(key)
    return special


def _special_id(name: str, backend: Backend, settings: dict, folder: Path) -> int:
    """Id of `bos_token` or `eos_token`: by its text in tokenizer_config.json, else by `…_id` in config.json."""
    text = settings.get(name)
    text = text.get("content") if isinstance(text, dict) else text
    if text is not None:
        token_id = backend.token_id(text) if isinstance(text, str) else None
        if token_id is None:
            raise UserError(f"{folder / 'tokenizer_config.json'}: {name} {text!r} is not a token of this tokenizer")
        return token_id
    config = folder / "config.json"
    token_id = read_json(config).get(f"{name}_id") if config.exists() else None
    if isinstance(token_id, list) and token_id:
        token_id = token_id[0]
    if type(token_id) is not int:
        raise UserError(f"{folder}: neither tokenizer_config.json nor config.json says what {name} is")
    return token_id
