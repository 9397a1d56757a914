"""Text to token ids and back; text is encoded without the added tokens and so never becomes control."""

from __future__ import annotations

import codecs
import json
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, Protocol

import tokenizers

from v4sdk.errors import CheckpointError, PromptError

BOS = "<｜begin▁of▁sentence｜>"
EOS = "<｜end▁of▁sentence｜>"


class SpanLike(Protocol):
    """What `encode_spans` needs to know of a prompt piece; `v4sdk.prompts.Span` is one."""

    @property
    def text(self) -> str: ...
    @property
    def control(self) -> bool: ...


class Tokenizer:
    """A byte-level BPE tokenizer read from a `tokenizer.json`.

    The added tokens are taken out of the tokenizer itself and looked up by string, so `encode` has no way to
    produce one. Everything here is pure and may be called from several threads.
    """

    def __init__(self, definition: dict[str, Any], *, bos: str = BOS, eos: str = EOS) -> None:
        """Build from the parsed content of a `tokenizer.json`.

        Raises:
            CheckpointError: if it is not a byte-level BPE tokenizer.
        """
        model = definition.get("model") or {}
        decoder = (definition.get("decoder") or {}).get("type")
        if model.get("type") != "BPE" or not isinstance(model.get("vocab"), dict) or decoder != "ByteLevel":
            raise CheckpointError(
                f"`tokenizer.json` has model `{model.get('type')}` and decoder `{decoder}`, "
                "expected BPE and ByteLevel"
            )
        added = definition.get("added_tokens") or []
        self._control = {str(token["content"]): int(token["id"]) for token in added}
        self._spelling = {index: token for token, index in self._control.items()}
        self._text = tokenizers.Tokenizer.from_str(json.dumps(_text_only(definition, self._control)))
        ids = [*model["vocab"].values(), *self._control.values()]
        self.vocab_size: int = max(ids) + 1
        self._bos, self._eos = bos, eos

    @classmethod
    def from_folder(cls, path: str | Path) -> Tokenizer:
        """Read `tokenizer.json` of a checkpoint folder, or the file itself.

        Raises:
            CheckpointError: if it is missing, unreadable, or not a byte-level BPE tokenizer.
        """
        file = Path(path)
        if file.is_dir():
            file = file / "tokenizer.json"
        try:
            definition = json.loads(file.read_text(encoding="utf-8"))
        except FileNotFoundError:
            raise CheckpointError(
                f"`{file}` is missing", hint="copy tokenizer.json into the checkpoint folder"
            ) from None
        except (OSError, ValueError) as error:
            raise CheckpointError(f"`{file}` cannot be read: {error}") from error
        if not isinstance(definition, dict):
            raise CheckpointError(f"`{file}` holds {type(definition).__name__}, expected an object")
        settings = _settings(file.parent / "tokenizer_config.json")
        try:
            return cls(definition, bos=settings.get("bos_token", BOS), eos=settings.get("eos_token", EOS))
        except (KeyError, TypeError, ValueError) as error:
            raise CheckpointError(f"`{file}` is malformed: {error}") from error
        except CheckpointError:
            raise
        except Exception as error:  # the tokenizers library raises bare Exception
            raise CheckpointError(f"`{file}` is not accepted by the tokenizers library: {error}") from error

    @property
    def control_ids(self) -> frozenset[int]:
        """The ids of all added tokens."""
        return frozenset(self._spelling)

    @property
    def control_tokens(self) -> tuple[str, ...]:
        """The spellings of all added tokens."""
        return tuple(self._control)

    @property
    def bos_id(self) -> int:
        return self.control_id(self._bos)

    @property
    def eos_id(self) -> int:
        return self.control_id(self._eos)

    def control_id(self, token: str) -> int:
        """Return the id of an added token by its spelling.

        Raises:
            PromptError: if this tokenizer has no such added token.
        """
        found = self._control.get(token)
        if found is None:
            raise PromptError(
                f"the tokenizer has no control token `{token}`",
                hint="this tokenizer.json does not belong to the dialect of the checkpoint",
            )
        return found

    def control_spelling(self, index: int) -> str | None:
        """Return the spelling of an added token, None for an ordinary id."""
        return self._spelling.get(index)

    def encode(self, text: str) -> list[int]:
        """Return the ids of `text`, none of which is a control id whatever the text spells.

        Raises:
            PromptError: if the text holds a lone surrogate, which has no bytes.
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            raise PromptError(
                f"text has a lone surrogate U+{ord(text[error.start]):04X} at character {error.start}",
                hint="read the input as UTF-8, or replace invalid characters",
            ) from None
        ids: list[int] = self._text.encode(text, add_special_tokens=False).ids
        return ids

    def encode_spans(self, spans: Iterable[SpanLike]) -> list[int]:
        """Return the ids of a rendered prompt: control spans by spelling, the rest by `encode`."""
        ids: list[int] = []
        for span in spans:
            if span.control:
                ids.append(self.control_id(span.text))
            else:
                ids += self.encode(span.text)
        return ids

    def token_bytes(self, index: int) -> bytes:
        """Return the bytes of an id; a control token stands for its spelling, an unused id for nothing."""
        spelling = self._spelling.get(index)
        if spelling is not None:
            return spelling.encode("utf-8")
        token = self._text.id_to_token(index)
        if token is None:
            return b""
        return bytes(_BYTE_OF[letter] for letter in token)

    def decode(self, ids: Sequence[int]) -> str:
        """Return the text of `ids`, control tokens spelled out, invalid UTF-8 replaced."""
        return b"".join(map(self.token_bytes, ids)).decode("utf-8", errors="replace")

    def stream_decoder(self) -> StreamDecoder:
        """Return a decoder that gives the same text piece by piece."""
        return StreamDecoder(self)


class StreamDecoder:
    """Incremental decoder: holds back the bytes of an unfinished character."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._bytes_of = tokenizer.token_bytes
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def feed(self, ids: Sequence[int]) -> str:
        """Return the text that `ids` complete."""
        return self._decoder.decode(b"".join(map(self._bytes_of, ids)))

    def finish(self) -> str:
        """Return what is left, with unfinished characters replaced, and start anew."""
        rest = self._decoder.decode(b"", final=True)
        self._decoder.reset()
        return rest


def _text_only(definition: dict[str, Any], control: dict[str, int]) -> dict[str, Any]:
    """Return the definition without added tokens, truncation, padding and post-processing."""
    model = dict(definition["model"])
    made = {
        "".join(pair) if isinstance(pair, list) else pair.replace(" ", "") for pair in model.get("merges", ())
    }
    # a spelling in the base vocabulary could still be found whole; one that merges produce must stay
    model["vocab"] = {
        token: index
        for token, index in model["vocab"].items()
        if token not in control or token in made or len(token) == 1
    }
    kept = {**definition, "model": model, "added_tokens": []}
    return {**kept, "truncation": None, "padding": None, "post_processor": None}


def _settings(path: Path) -> dict[str, str]:
    """Return the names of the first and last token from `tokenizer_config.json`, where it states them."""
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    found: dict[str, str] = {}
    for key in ("bos_token", "eos_token"):
        value = config.get(key) if isinstance(config, dict) else None
        value = value.get("content") if isinstance(value, dict) else value
        if isinstance(value, str):
            found[key] = value
    return found


def _byte_letters() -> dict[str, int]:
    """Return the byte that each letter of a byte-level vocabulary stands for.

    Printable Latin-1 letters stand for themselves; the other bytes take the letters from U+0100 on, in order.
    """
    own = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = {chr(byte): byte for byte in own}
    others = [byte for byte in range(256) if byte not in set(own)]
    return letters | {chr(0x100 + number): byte for number, byte in enumerate(others)}


_BYTE_OF = _byte_letters()
