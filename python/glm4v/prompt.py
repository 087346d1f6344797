"""Messages to a prompt: the chat template, which parts are pictures, what of earlier answers stays.

A conversation is a list of ``{"role": "system" | "user" | "assistant", "content": ...}``. Content is text or a list of
``{"type": "text", "text": ...}``, ``{"type": "image", "image": ...}`` and ``{"type": "video", "video": ...}``; the
spellings ``url``, ``path``, ``base64`` and ``image_url`` / ``video_url`` of other toolkits are read too. Roles such as
``tool`` and keys such as ``tool_calls`` are for a checkpoint's template that has words for them.
"""

from __future__ import annotations

import itertools
import json
import re
import reprlib
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from functools import lru_cache
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import jinja2.nodes
import jinja2.parser
import jinja2.sandbox

from .answer import CLOSE_ANSWER, CLOSE_BOX, CLOSE_THINK, OPEN_ANSWER, OPEN_BOX, OPEN_THINK
from .errors import InputError
from .files import read_json
from .kinds import is_list, is_number
from .source import SPELLINGS, source_of
from .tokenizer import TextCodec

# GLM-4.1V's chat template, used when a checkpoint brings none.
CHAT_TEMPLATE = """\
[gMASK]<sop>
{%- for message in messages %}
    {{- '<|' ~ message.role ~ '|>\\n' }}
    {%- if message.content is string %}
        {{- message.content }}
    {%- else %}
        {%- for part in message.content %}
            {%- if part.type == 'image' %}
                {{- '<|begin_of_image|><|image|><|end_of_image|>' }}
            {%- elif part.type == 'video' %}
                {{- '<|begin_of_video|><|video|><|end_of_video|>' }}
            {%- else %}
                {{- part.text }}
            {%- endif %}
        {%- endfor %}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|assistant|>\\n' }}
{%- endif %}
"""

ROLES = ("system", "user", "assistant")
CALLS = ("tool_calls", "function_call")  # what an assistant said in place of content
BESIDE = ("image", "images", "video", "videos")  # where some clients put pictures
THOUGHTS = ("reasoning_content", "thinking", "reasoning")  # as servers call them; they are no part of the history
NAMED_TOKENS = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")
ANSWER_MARKS = (OPEN_ANSWER, CLOSE_ANSWER, OPEN_BOX, CLOSE_BOX)


@dataclass(frozen=True)
class Media:
    """A picture in a message: ``kind`` is image or video, ``fps`` the rate of a video given as frames."""

    kind: str
    source: Any
    fps: float | None = None


class Conversation:
    """Checked messages: ``messages`` as ``template`` reads them, ``media`` in prompt order. Keys beside role and
    content stay where the template has a word for them."""

    def __init__(self, messages: Sequence[Mapping[str, Any]], template: str = CHAT_TEMPLATE) -> None:
        if not is_list(messages):
            raise InputError(f"prompt: a conversation must be a list of messages, got {_outline(messages)}")
        if len(messages) == 0:
            raise InputError("prompt: messages must not be empty")
        self.media: list[Media] = []
        self.template = template
        self.messages = [self._read(message, f"message {i + 1}") for i, message in enumerate(messages)]

    def _read(self, message: Any, where: str) -> dict[str, Any]:
        if not isinstance(message, Mapping):
            expectation = '{"role": …, "content": …}'
            raise InputError(f"prompt: {where}: a message must be {expectation}, got {_outline(message)}")
        role, content = message.get("role"), message.get("content")
        if not isinstance(role, str) or (role not in ROLES and not self._has_case(role)):
            raise InputError(f"prompt: {where}: role must be one of {', '.join(ROLES)}, got {role!r}")
        said = [key for key, value in message.items() if value is not None and not (is_list(value) and len(value) == 0)]
        calls = [key for key in CALLS if key in said]
        for key in calls:
            if key not in self.template:  # and so would be lost
                raise InputError(f"prompt: {where}: {key} must be left out, the chat template has no word for it")
        for key in BESIDE:
            if key in said:
                raise InputError(f"prompt: {where}: pictures must be parts of the content, got {key} beside it")
        content = "" if content is None and calls else content
        if not isinstance(content, str | list | tuple):
            raise InputError(f"prompt: {where}: content must be text or a list of parts, got {type(content).__name__}")
        parts: list[dict[str, str]] = []
        for part in [{"type": "text", "text": content}] if isinstance(content, str) else content:
            kind = self._read_part(part, where)
            if kind != "text":
                parts.append({"type": kind})
            elif parts and parts[-1]["type"] == "text":  # one stretch, so that no special token hides in the seam
                parts[-1]["text"] += part["text"]
            else:
                parts.append({"type": "text", "text": part["text"]})
        text_only = all(part["type"] == "text" for part in parts)
        if role != "user" and not text_only:
            raise InputError(f"prompt: {where}: only user messages may hold pictures, the role is {role}")
        text = "".join(part["text"] for part in parts) if text_only else ""
        if role == "assistant":
            text = answer_text(text)
        return {"role": role, "content": text if text_only else parts, **self._others(message, where)}

    def _others(self, message: Mapping[str, Any], where: str) -> dict[str, Any]:
        """What else of a message the template reads, as JSON has it."""
        others: dict[str, Any] = {}
        for key, value in message.items():
            if value is None or key in ("role", "content", *THOUGHTS) or str(key) not in self.template:
                continue
            try:
                text = json.dumps(value, ensure_ascii=False)
                text.encode()
            except (TypeError, ValueError, RecursionError) as error:
                raise InputError(f"prompt: {where}: {key} must be what JSON can hold: {error}") from None
            others[key] = json.loads(text)
        return others

    def _has_case(self, role: str) -> bool:
        """Whether the template asks if a message is of this role."""
        case = rf"""role\W*==\s*['"]{re.escape(role)}['"]"""  # message.role == 'tool', message['role'] == "tool"
        return re.search(case, self.template) is not None

    def _read_part(self, part: Any, where: str) -> str:
        found = _outline(part)
        part = part if isinstance(part, Mapping) else {}
        kind = part.get("type")
        kind = kind if isinstance(kind, str) else ""
        if kind == "text" and isinstance(part.get("text"), str):
            try:
                part["text"].encode()
            except UnicodeEncodeError as error:
                raise InputError(f"prompt: {where}: text must be Unicode: {error.reason}") from None
            return "text"
        medium, fps, source = kind.removesuffix("_url"), part.get("fps"), source_of(kind, part)
        if medium not in ("image", "video") or source is None:
            example = '{"type": "text", "text": …}, {"type": "image", "image": …} or {"type": "video", "video": …}'
            raise InputError(f"prompt: {where}: a part must be {example}, got {found}")
        if fps is not None and not is_number(fps):
            raise InputError(f"prompt: {where}: fps must be a number, got {fps!r}")
        known = ("type", "fps", kind, *SPELLINGS)
        if lost := [str(key) for key in part if part[key] is not None and key not in known]:
            warnings.warn(f"prompt: has no effect on a picture: {', '.join(lost)}", stacklevel=2)
        self.media.append(Media(medium, source, None if fps is None else float(fps)))
        return medium


def _outline(part: Any) -> str:
    if not isinstance(part, Mapping):
        return reprlib.repr(part)
    return str({key: value if key == "type" else "…" for key, value in part.items()})


def answer_text(text: str) -> str:
    """What of an earlier answer stays in the history: no thinking, no marks around the answer and its box."""
    if CLOSE_THINK not in text and text.lstrip().startswith(OPEN_THINK):  # cut off while thinking
        return ""
    kept = text.rpartition(CLOSE_THINK)[2]
    for mark in ANSWER_MARKS:
        kept = kept.replace(mark, "")
    return text if kept == text else kept.strip()


def read_settings(path: Path) -> dict[str, Any]:
    """The object in a JSON file; a missing file is an empty one."""
    return read_json(path, "processor") if path.exists() else {}


def load_chat_template(folder: Path) -> str:
    """The checkpoint's chat template, or GLM-4.1V's when it brings none."""
    name, source = _find_chat_template(folder)
    if not isinstance(source, str):
        raise InputError(f"prompt: {folder / name}: chat_template must be text, got {reprlib.repr(source)}")
    try:
        _compiled(source)
    except jinja2.TemplateError as error:
        raise InputError(f"prompt: {folder / name}: {error}") from None
    return source


def load_named_tokens(folder: Path) -> dict[str, str]:
    """Texts of the checkpoint's special tokens by the names that templates call them, such as ``eos_token``."""
    path = folder / "tokenizer_config.json"
    settings, tokens = read_settings(path), {}
    for name in NAMED_TOKENS:
        token = settings.get(name)
        token = token.get("content") if isinstance(token, dict) else token
        if not isinstance(token, str | None):
            raise InputError(f"prompt: {path}: {name} must be text, got {reprlib.repr(token)}")
        if token is not None:
            tokens[name] = token
    return tokens


@lru_cache(maxsize=16)
def _compiled(source: str) -> jinja2.Template:
    """Kept here, since it can be neither copied nor pickled. It runs in a sandbox: it is foreign code."""
    # transformers' settings and names, which templates are written for.
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols", _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}
    return environment.from_string(source)


class _GenerationBlock(jinja2.ext.Extension):
    """``{% generation %}`` marks what an assistant said, for trainers; here it is what stands inside."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: jinja2.parser.Parser) -> list[jinja2.nodes.Node]:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _find_chat_template(folder: Path) -> tuple[str, Any]:
    path = folder / "chat_template.jinja"
    if path.exists():
        try:
            return path.name, path.read_text(encoding="utf-8")
        except (OSError, ValueError) as error:
            raise InputError(f"prompt: {path}: cannot be read: {error}") from None
    for name in ("chat_template.json", "tokenizer_config.json"):
        template = read_settings(folder / name).get("chat_template")
        if isinstance(template, list) and all(isinstance(entry, dict) for entry in template):
            template = next((entry.get("template") for entry in template if entry.get("name") == "default"), template)
        if template:
            return name, template
    return "built-in chat template", CHAT_TEMPLATE


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.now().strftime(format)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    """JSON as it is; Jinja's own filter writes it for HTML."""
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def render(template: str, conversation: Conversation, codec: TextCodec) -> list[int | str]:
    """The prompt in pieces: ids of the special tokens that the template wrote, and the text between them.

    Special tokens in the messages stay text: a character that occurs nowhere breaks them while the template runs.
    """
    texts = json.dumps(conversation.messages, ensure_ascii=False)
    mark = next(mark for mark in map(chr, itertools.count(0xE000)) if mark not in texts)

    def guarded(value: Any) -> Any:
        if isinstance(value, str):
            return codec.guard(value, mark)
        if isinstance(value, list):
            return [guarded(one) for one in value]
        return {guarded(key): guarded(one) for key, one in value.items()} if isinstance(value, dict) else value

    try:
        messages = guarded(conversation.messages)
        text = _compiled(template).render(
            messages=messages, tools=None, documents=None, add_generation_prompt=True, **codec.named
        )
    except Exception as error:  # it is foreign code: division by zero, endless recursion, ...
        raise InputError(f"prompt: the chat template fails: {error}") from None
    return [piece if isinstance(piece, int) else piece.replace(mark, "") for piece in codec.split(text)]
