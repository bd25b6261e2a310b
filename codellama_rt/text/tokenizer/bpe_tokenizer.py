"""GPT-2-style byte-level BPE of GGUF files and tokenizer.json, using the `tokenizers` package."""

import codecs
import itertools
import json
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from typing import Any

from codellama_rt.errors import CheckpointError
from codellama_rt.text.tokenizer.added_tokens import AddedToken
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer
from codellama_rt.text.tokenizer.tokenizer_config import TokenizerConfig

_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_LLAMA3 = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before the merges: by each pattern in turn, into matches and the rest."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is taken whole
    adds_bos: bool = False  # unless the file says otherwise


# By the value of `tokenizer.ggml.pre`; the patterns are those of llama.cpp's src/llama-vocab.cpp.
PRE_TOKENIZERS = {
    "gpt-2": PreTokenizer((_GPT2,)),
    "smollm": PreTokenizer((r"\p{N}", _GPT2)),
    "llama-bpe": PreTokenizer((_LLAMA3,), ignore_merges=True, adds_bos=True),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}


class BpeTokenizer(Tokenizer):
    """Text to ids and back by byte-level BPE; Llama models of this kind have no infilling format.

    Args:
        backend: a `tokenizers.Tokenizer` without added tokens.
        pieces: the vocabulary by id, without added tokens behind it.
        special_ids: ids of control tokens, besides the special ones of `config`.
        config: what the checkpoint says beside the vocabulary.
        source: the file's name, for messages.
    """

    def __init__(
        self,
        backend: Any,
        pieces: Sequence[str],
        special_ids: Iterable[int],
        config: TokenizerConfig,
        source: str,
    ) -> None:
        self._backend, self._source = backend, source
        special_ids = frozenset(special_ids)
        pieces = config.pieces(pieces)
        literal = special_ids.union(token.id for token in config.added)
        bytes_of = [p.encode() if i in literal else _bytes_of(p) for i, p in enumerate(pieces)]
        super().__init__(pieces, bytes_of, special_ids, config)

    def as_json(self) -> dict[str, Any]:
        """Return the contents of a tokenizer.json."""
        contents = json.loads(self._backend.to_str())
        added = {token.id: token for token in self.config.added}
        for i in self.special_ids:
            if i not in added and i < self.vocab_size and self.pieces[i]:
                added[i] = AddedToken(i, self.pieces[i], special=True)
        contents["added_tokens"] = [asdict(added[i]) for i in sorted(added)]
        contents["decoder"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        contents["post_processor"] = self._post_processor()
        return contents

    def _post_processor(self) -> dict[str, Any] | None:
        """Return the step of a tokenizer.json that puts bos and eos around a text."""
        head = [self.bos_id] if self.adds_bos else []
        tail = [self.eos_id] if self.adds_eos else []
        names = {self.pieces[token_id]: token_id for token_id in (*head, *tail)}
        if not names:
            return None

        def text(name: str, type_id: int) -> list[dict[str, Any]]:
            around = [
                [{"SpecialToken": {"id": self.pieces[i], "type_id": type_id}} for i in ids]
                for ids in (head, tail)
            ]
            return [*around[0], {"Sequence": {"id": name, "type_id": type_id}}, *around[1]]

        return {
            "type": "TemplateProcessing",
            "single": text("A", 0),
            "pair": [*text("A", 0), *text("B", 1)],
            "special_tokens": {n: {"id": n, "ids": [i], "tokens": [n]} for n, i in names.items()},
        }

    def _encode_stretch(self, text: str, is_first: bool) -> list[int]:
        with panics_refused(self._source):
            return self._backend.encode(text, add_special_tokens=False).ids


@contextmanager
def panics_refused(source: str) -> Iterator[None]:
    """Turn a panic of `tokenizers`, which is no Exception, into a CheckpointError.

    A pattern of a tokenizer.json can make it panic, when it is read or while a text is split.
    """
    try:
        yield
    except BaseException as error:
        if type(error).__name__ != "PanicException":
            raise
        raise CheckpointError(f"{source}: its patterns cannot be used: {error!s:.200}") from None


def build_bpe(pieces: Sequence[str], merges: Iterable[str], pre: PreTokenizer) -> Any:
    """Build a byte-level BPE `tokenizers.Tokenizer`.

    Args:
        pieces: the vocabulary by id.
        merges: pairs "left right", best first.
        pre: how text is split before the merges.
    """
    from tokenizers import Regex, Tokenizer, models, pre_tokenizers

    vocabulary = {piece: token_id for token_id, piece in enumerate(pieces)}
    pairs = [tuple(merge.split(" ")) for merge in merges]
    backend = Tokenizer(models.BPE(vocabulary, pairs, ignore_merges=pre.ignore_merges))
    steps = [pre_tokenizers.Split(Regex(pattern), "isolated") for pattern in pre.patterns]
    steps.append(pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False))
    backend.pre_tokenizer = pre_tokenizers.Sequence(steps)
    return backend


def find_pre_tokenizer(name: object, source: str) -> PreTokenizer:
    """Return the pre-tokenizer that GGUF files call `name`; CheckpointError if it is unknown."""
    if not isinstance(name, str) or name not in PRE_TOKENIZERS:
        raise CheckpointError(
            f"{source}: tokenizer.ggml.pre: expected {', '.join(PRE_TOKENIZERS)}, found {name!r}"
        )
    return PRE_TOKENIZERS[name]


def _letters() -> Any:
    """Return GPT-2's alphabet: printable Latin-1 as itself, other bytes from U+0100 on.

    Returns:
        An 8-bit encoding, which Python applies as fast as any other.
    """
    printable = {*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)}
    beyond = itertools.count(0x100)
    letters = (chr(byte if byte in printable else next(beyond)) for byte in range(256))
    return codecs.charmap_build("".join(letters))


_LETTERS = _letters()


def _bytes_of(piece: str) -> bytes:
    try:
        return codecs.charmap_encode(piece, "strict", _LETTERS)[0]
    except UnicodeEncodeError:  # an added token, which is plain text
        return piece.encode()
