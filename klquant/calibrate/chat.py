"""Chat rows through the model's own chat template (Jinja), in a sandbox.

Templates come with the checkpoint, so they are untrusted: they run in jinja2's immutable sandbox, with no file or
module in reach. A template may ask for today's date; it gets a fixed one, because calibration has to be repeatable.
"""

import datetime
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from klquant.errors import UserError

Message = dict[str, Any]
"""`{"role": "user", "content": "…"}`; `content` may also be a list of `{"type": "text", "text": "…"}` parts."""

_TODAY = datetime.datetime(2025, 1, 1)


class ChatTemplate:
    """A compiled template; `where` names the file it came from in messages."""

    def __init__(self, source: str, where: str) -> None:
        """Raises UserError when the template does not parse."""
        from jinja2 import TemplateError
        from jinja2.ext import loopcontrols
        from jinja2.sandbox import ImmutableSandboxedEnvironment

        environment = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True, extensions=[loopcontrols])
        # Jinja's own filter escapes for HTML; the hub's templates expect plain JSON and its options.
        environment.filters["tojson"] = _to_json
        environment.globals["raise_exception"] = _raise_exception
        environment.globals["strftime_now"] = _TODAY.strftime
        self.where = where
        try:
            self._template = environment.from_string(source)
        except (TemplateError, RecursionError) as error:
            raise UserError(f"{where}: the chat template does not parse: {error}") from None

    def render(self, messages: Sequence[Message], *, bos_token: str, eos_token: str, generation_prompt: bool) -> str:
        """The conversation as text with special tokens spelled out. Raises UserError when the template fails on it."""
        try:
            return self._template.render(
                messages=list(messages),
                tools=None,
                add_generation_prompt=generation_prompt,
                bos_token=bos_token,
                eos_token=eos_token,
            )
        except Exception as error:  # the template is the checkpoint's program: whatever it raises is bad input
            raise UserError(f"{self.where}: the chat template fails on a conversation: {error}") from None


def find_template(folder: Path, tokenizer_config: dict) -> ChatTemplate | None:
    """`chat_template.jinja`, or `chat_template` of tokenizer_config.json (text, or the one named "default")."""
    file = folder / "chat_template.jinja"
    if file.exists():
        try:
            return ChatTemplate(file.read_text(encoding="utf-8"), str(file))
        except UnicodeDecodeError:
            raise UserError(f"{file}: not UTF-8 text") from None
        except OSError as error:
            raise UserError(f"{file}: cannot be read: {error.strerror}") from None
    where = str(folder / "tokenizer_config.json")
    source = tokenizer_config.get("chat_template")
    if isinstance(source, list):
        named = [t for t in source if isinstance(t, dict) and t.get("name") == "default"]
        source = named[-1].get("template") if named else None
    if source is None:
        return None
    if not isinstance(source, str):
        raise UserError(f"{where}: chat_template is not text")
    return ChatTemplate(source, where)


def plain(messages: Sequence[Message]) -> str:
    """What a chat becomes without a template: paragraphs of `role: text`."""
    return "\n\n".join(f"{m['role']}: {_text(m['content'])}" for m in messages)


def require_messages(value: object, where: str) -> list[Message]:
    """`value` when it is a non-empty list of messages. Raises UserError that starts with `where` otherwise."""
    if not isinstance(value, list) or not value:
        raise UserError(f"{where}: 'messages' must be a list of {{'role': …, 'content': …}} rows")
    for message in value:
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(f"{where}: a message without a 'role'")
        content = message.get("content")
        parts = content if isinstance(content, list) else [{"text": content}]
        if not all(isinstance(p, dict) and isinstance(p.get("text"), str) for p in parts):
            raise UserError(f"{where}: the 'content' of a {message['role']!r} message is not text")
    return value


def _text(content: str | list[dict]) -> str:
    return content if isinstance(content, str) else "".join(part["text"] for part in content)


def _to_json(value: object, ensure_ascii: bool = False, **options: Any) -> str:
    return json.dumps(value, ensure_ascii=ensure_ascii, **options)


def _raise_exception(message: str) -> None:
    from jinja2 import TemplateError

    raise TemplateError(message)
