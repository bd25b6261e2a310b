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
_SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_LLAMA3 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}" + _REST
_QWEN2 = _SUFFIX + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}" + _REST
# A word begins anew where a capital follows a small letter.
_UPPER, _LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
_CASED = (
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "*" + _LOWER + "+",
    r"[^\r\n\p{L}\p{N}]?" + _UPPER + "+" + _LOWER + "*",
)
_CASED_REST = r"| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
_TEKKEN = "|".join(_CASED) + r"|\p{N}" + _CASED_REST
_GPT4O = "|".join(word + _SUFFIX + "?" for word in _CASED) + r"|\p{N}{1,3}" + _CASED_REST
_SEED = _QWEN2.replace(r"[^\s\p{L}\p{N}]+[\r\n]*", r"[^\s\p{L}\p{N}\r\n]+")
_CJK = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
# DeepSeek's own list of letters that have a case, in hexadecimal.
_DEEPSEEK_LETTERS = (
    "41-5a 61-7a b5 c0-d6 d8-f6 f8-1ba 1bc-1bf 1c4-293 295-2af 370-373 376 377 37b-37d 37f "
    "386 388-38a 38c 38e-3a1 3a3-3f5 3f7-481 48a-52f 531-556 10a0-10c5 13a0-13f5 13f8-13fd "
    "1c90-1cba 1cbd-1cbf 1d00-1d2b 1d6b-1d77 1d79-1d9a 1e00-1f15 1f18-1f1d 1f20-1f45 "
    "1f48-1f4d 1f50-1f57 1f59 1f5b 1f5d 1f5f-1f7d 1f80-1fb4 1fb6-1fbc 1fbe 1fc2-1fc4 "
    "1fc6-1fcc 1fd0-1fd3 1fd6-1fdb 1fe0-1fec 1ff2-1ff4 1ff6-1ffc 2102 2107 210a-2113 2115 "
    "2119-211d 2124 2126 2128 212a-212d 212f-2134 2139 213c-213f 2145-2149 214e 2183 2184 "
    "2c00-2c7b 2c7e-2ce4 2ceb-2cee 2cf2 2cf3 a640-a66d a680-a69b a722-a76f a771-a787 "
    "a78b-a78e ab70-abbf fb00-fb06 fb13-fb17 ff21-ff3a ff41-ff5a 10400-1044f 104b0-104d3 "
    "104d8-104fb 10c80-10cb2 10cc0-10cf2 118a0-118df 1e900-1e943"
)
_DEEPSEEK_MARKS = "!-/:-~！-／：-～‘-‟\u3000-。"
_DEEPSEEK_V3 = (
    r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"
    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)


def _ranges(codes: str) -> str:
    """Return "41-5a b5" as the inside of a class of characters: "A-Zµ"."""
    ranges = (code.split("-") for code in codes.split())
    return "".join("-".join(chr(int(end, 16)) for end in ends) for ends in ranges)


@dataclass(frozen=True)
class PreTokenizer:
    """How text is split before the merges: by each pattern in turn, into matches and the rest."""

    patterns: tuple[str, ...]
    ignore_merges: bool = False  # a word that is in the vocabulary is taken whole
    adds_bos: bool = False  # unless the file says otherwise


# By the values of `tokenizer.ggml.pre`; the patterns are those of llama.cpp's src/llama-vocab.cpp,
# where that says it approximates one, the tokenizer's own.
_BY_NAMES = {
    "gpt-2 mpt olmo jais trillion phi-2 granite-docling": PreTokenizer((_GPT2,)),
    "smollm starcoder refact command-r codeshell exaone minerva-7b": PreTokenizer(
        (r"\p{N}", _GPT2)
    ),
    "llama-bpe llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2": PreTokenizer(
        (_LLAMA3,), ignore_merges=True, adds_bos=True
    ),
    "dbrx smaug-bpe chatglm-bpe": PreTokenizer((_LLAMA3,)),
    "qwen2 stablelm2 hunyuan deepseek-r1-qwen megrez": PreTokenizer((_QWEN2,)),
    "tekken": PreTokenizer((_TEKKEN,), ignore_merges=True, adds_bos=True),
    "gpt-4o llama4": PreTokenizer((_GPT4O,)),
    "seed-coder": PreTokenizer((_SEED,)),
    "deepseek-coder": PreTokenizer((r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", _CJK, r"\p{N}")),
    "deepseek-llm": PreTokenizer(
        (
            r"[\r\n]",
            rf"\s?[{_ranges(_DEEPSEEK_LETTERS)}]+",
            rf"\s?[{_DEEPSEEK_MARKS}]+",
            r"\s+$",
            _CJK,
            r"\p{N}+",
        )
    ),
    "deepseek-v3": PreTokenizer(
        (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", _DEEPSEEK_V3)
    ),
    "default": PreTokenizer((r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]")),
}
PRE_TOKENIZERS = {name: pre for names, pre in _BY_NAMES.items() for name in names.split()}


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
