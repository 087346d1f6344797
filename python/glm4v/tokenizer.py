"""Text to token ids and back, with a wall between what the prompt means and what a person typed.

`tokenizer.json` names special tokens such as ``<|image|>`` by their text. A person who types that text must get its
characters, not the token, so special tokens are found here and the tokenizer itself knows none of them. Words that a
checkpoint has added to its vocabulary are no such tokens: they are words wherever they stand.
"""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import tokenizers

from .answer import TAGS
from .errors import InputError
from .files import unfetched


def load_tokenizer(folder: Path) -> tokenizers.Tokenizer:
    """The tokenizer of a checkpoint folder, without the padding and truncation that a file may bring: transformers
    writes down those of its last call, and ignores them when it reads the file."""
    path = folder / "tokenizer.json"
    try:
        tokenizer = tokenizers.Tokenizer.from_file(str(path))
    except Exception as error:  # the library raises bare Exceptions
        raise InputError(f"tokenizer: {path}: {unfetched(path) or f'cannot be read: {error}'}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


class TextCodec:
    """Encodes and decodes with a ``tokenizer``; ``specials`` maps the texts of its special tokens to their ids,
    ``named`` the names that a chat template has for some, such as ``eos_token``, to their texts."""

    def __init__(self, tokenizer: tokenizers.Tokenizer, named: Mapping[str, str]) -> None:
        self.named = named
        self._full = tokenizer
        self._plain = tokenizers.Tokenizer(self._full.model)  # shares the vocabulary
        for part in ("normalizer", "pre_tokenizer", "decoder"):
            if getattr(self._full, part) is not None:
                setattr(self._plain, part, getattr(self._full, part))
        added = self._full.get_added_tokens_decoder()
        self.specials = {token.content: index for index, token in added.items() if _is_special(token)}
        if short := [token for token in self.specials if len(token) < 2]:  # `guard` has no place in it for its mark
            raise InputError(f"tokenizer: special tokens must have two characters or more, got {json.dumps(short)}")
        words = {index: token for index, token in added.items() if not _is_special(token)}
        self._plain.add_tokens(list(words.values()))
        # It numbers words behind the model's vocabulary, without a place for special tokens.
        self._words = {self._plain.token_to_id(token.content): index for index, token in words.items()}
        longest_first = sorted(self.specials, key=len, reverse=True)
        self._special = re.compile("|".join(map(re.escape, longest_first)) or "(?!)")

    def id(self, token: str) -> int:
        """The id of a special token."""
        if token not in self.specials:
            raise InputError(f"tokenizer: special tokens must include {token}, got {json.dumps(list(self.specials))}")
        return self.specials[token]

    def split(self, text: str) -> list[int | str]:
        """Ids of the special tokens in ``text`` and the stretches of text between them."""
        pieces: list[int | str] = []
        end = 0
        for match in self._special.finditer(text):
            pieces += [text[end : match.start()]] if match.start() > end else []
            pieces.append(self.specials[match[0]])
            end = match.end()
        return pieces + ([text[end:]] if end < len(text) else [])

    def text(self, pieces: Iterable[int | str]) -> str:
        """What pieces as `split` makes them were made of."""
        names = {index: token for token, index in self.specials.items()}
        return "".join(piece if isinstance(piece, str) else names[piece] for piece in pieces)

    def guard(self, text: str, mark: str) -> str:
        """``text`` with ``mark`` put into every special token, so that `split` no longer finds it."""
        while self._special.search(text):
            text = self._special.sub(lambda match: match[0][0] + mark + match[0][1:], text)
        return text

    def encode(self, text: str, specials: bool = True) -> list[int]:
        """Token ids; with ``specials=False`` the texts of special tokens are plain characters."""
        return self.join(self.split(text) if specials else [text])

    def join(self, pieces: Iterable[int | str]) -> list[int]:
        """Ids of pieces as `split` makes them. Neighbouring stretches of text are encoded as one."""
        ids: list[int] = []
        text = ""
        for piece in [*pieces, None]:
            if isinstance(piece, str):
                text += piece
                continue
            if text:
                # Of several texts: `encode` of one also notes where each token stands, in twice the time and more.
                encoded = self._plain.encode_batch_fast([text], add_special_tokens=False)[0].ids
                ids += [self._words.get(index, index) for index in encoded] if self._words else encoded
                text = ""
            if piece is not None:
                ids.append(piece)
        return ids

    def decode(self, ids: Iterable[int], skip_special_tokens: bool = True) -> str:
        """Text of token ids. Ids beyond the vocabulary, which a padded head can give, have no text."""
        return self._full.decode([int(index) for index in ids], skip_special_tokens=skip_special_tokens)


def _is_special(token: tokenizers.AddedToken) -> bool:
    """Whether an added token means something: by its flag, which the tags of an answer and some files' marks lack."""
    return token.special or token.content in TAGS or re.fullmatch(r"<\|.*\|>", token.content) is not None
