"""GPT-2-style byte-level BPE of GGUF files and tokenizer.json, using the `tokenizers` package."""

import codecs
import itertools
import json
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from codellama_rt.errors import CheckpointError
from codellama_rt.text.tokenizer.tokenizer_base import Tokenizer

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
        backend: a `tokenizers.Tokenizer` that does not know special tokens, or ignores them.
        pieces: the vocabulary by id.
        special_ids: ids of control tokens.
        literal_ids: ids of other pieces that are plain text, not byte letters.
        bos_id, eos_id, adds_bos: as for `Tokenizer`.
    """

    def __init__(
        self,
        backend: Any,
        pieces: Sequence[str],
        *,
        special_ids: Iterable[int],
        literal_ids: Iterable[int] = (),
        bos_id: int | None,
        eos_id: int | None,
        adds_bos: bool,
    ) -> None:
        self._backend = backend
        special_ids = frozenset(special_ids)
        literal = special_ids.union(literal_ids)
        super().__init__(
            pieces,
            [p.encode() if i in literal else _bytes_of(p) for i, p in enumerate(pieces)],
            special_ids,
            bos_id=bos_id,
            eos_id=eos_id,
            adds_bos=adds_bos,
        )

        self._literal_ids = literal

    def as_json(self) -> dict[str, Any]:
        """Return the contents of a tokenizer.json."""
        contents = json.loads(self._backend.to_str())
        flags = dict.fromkeys(("single_word", "lstrip", "rstrip", "normalized"), False)
        contents["added_tokens"] = [
            {"id": i, "content": self.pieces[i], **flags, "special": i in self.special_ids}
            for i in sorted(self._literal_ids)
        ]
        contents["decoder"] = {
            "type": "ByteLevel",
            "add_prefix_space": False,
            "trim_offsets": True,
            "use_regex": True,
        }
        if self.adds_bos:
            bos = {"SpecialToken": {"id": self.pieces[self.bos_id], "type_id": 0}}
            text = [{"Sequence": {"id": name, "type_id": i}} for i, name in enumerate("AB")]
            named = {"id": bos["SpecialToken"]["id"], "ids": [self.bos_id]}
            contents["post_processor"] = {
                "type": "TemplateProcessing",
                "single": [bos, text[0]],
                "pair": [bos, *text],
                "special_tokens": {named["id"]: named | {"tokens": [named["id"]]}},
            }
        return contents

    def _encode_text(self, text: str) -> list[int]:
        return self._backend.encode(text, add_special_tokens=False).ids


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
