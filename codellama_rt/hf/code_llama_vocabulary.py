"""The vocabulary and options of `CodeLlamaTokenizer`, and their files."""

import json
from collections.abc import Iterable
from dataclasses import KW_ONLY, dataclass, field, fields
from os import PathLike
from pathlib import Path
from typing import Any

from codellama_rt.errors import CheckpointError
from codellama_rt.hf.batch_encoding import check_side
from codellama_rt.model.config_fields import ConfigFields
from codellama_rt.text.chat import read_chat_template
from codellama_rt.text.tokenizer import FILL_TOKEN, load_tokenizer
from codellama_rt.text.tokenizer.directory_config import CONFIG_FILE, read_fields
from codellama_rt.text.tokenizer.save_tokenizer import added_tokens_decoder, spacing_options
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import (
    INFILL_PIECES,
    STEP_PIECE,
    SentencePieceTokenizer,
)
from codellama_rt.text.tokenizer.tokenizer_base import as_id_list, token_text
from codellama_rt.text.tokenizer.tokenizer_config import ROLES

_FLAGS = ("suffix_first", "clean_up_tokenization_spaces")
_TEXTS = ("fill_token", "padding_side", "truncation_side")


@dataclass(eq=False, repr=False)
class CodeLlamaVocabulary:
    """Pieces, special tokens and options under Transformers' names; options can be set later too.

    Unlike in Transformers, a vocabulary cannot be extended: a model has infilling tokens or not.

    Args:
        vocab_file: a tokenizer.model, another file or directory with a SentencePiece vocabulary, or
            what `load_tokenizer` made of one.

    Attributes:
        runtime: the tokenizer with Meta's ids, used by the engine.

    Raises:
        CheckpointError: the vocabulary cannot be loaded, or is not SentencePiece.
        ValueError: a token is not in the vocabulary, or a side is not "left" or "right".
    """

    vocab_file: str | PathLike[str] | SentencePieceTokenizer
    _: KW_ONLY
    bos_token: str | None = "<s>"
    eos_token: str | None = "</s>"
    unk_token: str | None = "<unk>"
    pad_token: str | None = None  # needed for padding; `eos_token` is a usual choice
    prefix_token: str | None = INFILL_PIECES["prefix"]  # None if the vocabulary has none
    middle_token: str | None = INFILL_PIECES["middle"]
    suffix_token: str | None = INFILL_PIECES["suffix"]
    eot_token: str | None = INFILL_PIECES["eot"]
    fill_token: str | None = FILL_TOKEN  # marks the hole in a prompt
    suffix_first: bool = False  # put the text after the hole first
    add_bos_token: bool = True
    add_eos_token: bool = False
    clean_up_tokenization_spaces: bool = False  # remove spaces before English punctuation
    padding_side: str = "right"
    truncation_side: str = "right"
    chat_template: str | None = None  # Jinja; None: Code Llama's own format
    runtime: SentencePieceTokenizer = field(init=False)
    prefix_id: int | None = field(init=False)
    middle_id: int | None = field(init=False)
    suffix_id: int | None = field(init=False)
    eot_id: int | None = field(init=False)

    def __post_init__(self) -> None:
        is_loaded = isinstance(self.vocab_file, SentencePieceTokenizer)
        self.runtime = runtime = self.vocab_file if is_loaded else _load(self.vocab_file)
        for role in INFILL_PIECES:
            wanted = getattr(self, f"{role}_token") is not None
            token_id = getattr(runtime, f"{role}_id") if wanted else None
            setattr(self, f"{role}_id", token_id)
            setattr(self, f"{role}_token", None if token_id is None else runtime.piece(token_id))
        for token in (self.bos_token, self.eos_token, self.unk_token, self.pad_token):
            self._id(token)
        check_side(self.padding_side)
        check_side(self.truncation_side)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **options: Any) -> "CodeLlamaVocabulary":
        """Load a checkpoint's tokenizer.

        Args:
            path: a directory with tokenizer.model, or a model file.
            options: options of the class; they override a tokenizer_config.json beside the model.

        Raises:
            CheckpointError, ValueError: as for the class.
        """
        path = Path(path)
        runtime = _load(path)
        known = _options(read_fields((path if path.is_dir() else path.parent) / CONFIG_FILE))
        for role in ROLES:
            token_id = getattr(runtime, f"{role}_id")
            known[f"{role}_token"] = None if token_id is None else runtime.piece(token_id)
        known |= {"add_bos_token": runtime.adds_bos, "add_eos_token": runtime.adds_eos}
        known["chat_template"] = read_chat_template(path)
        tokenizer = cls(runtime, **(known | options))
        tokenizer.vocab_file = path
        return tokenizer

    def save_vocabulary(self, save_directory: str, filename_prefix: str = "") -> tuple[str]:
        """Write tokenizer.model into a directory and return its path in a tuple."""
        name = f"{filename_prefix}-tokenizer.model" if filename_prefix else "tokenizer.model"
        file = Path(save_directory) / name
        file.write_bytes(self.runtime.model_proto)
        return (str(file),)

    def save_pretrained(self, save_directory: str) -> tuple[str, ...]:
        """Write a directory for `from_pretrained`, also that of Transformers; return the paths."""
        directory = Path(save_directory)
        directory.mkdir(parents=True, exist_ok=True)
        config = {name: getattr(self, name) for name in self._option_names()}
        config |= spacing_options(self.runtime)
        config["added_tokens_decoder"] = added_tokens_decoder(self.runtime)
        file = directory / CONFIG_FILE
        file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return (str(file), *self.save_vocabulary(save_directory))

    # Ids and pieces

    @property
    def bos_token_id(self) -> int | None:
        """The id of the token that begins a text."""
        return self._id(self.bos_token)

    @property
    def eos_token_id(self) -> int | None:
        """The id of the token that ends a text."""
        return self._id(self.eos_token)

    @property
    def unk_token_id(self) -> int | None:
        """The id of the unknown token."""
        return self._id(self.unk_token)

    @property
    def pad_token_id(self) -> int | None:
        """The id of the padding token."""
        return self._id(self.pad_token)

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the control tokens, each once."""
        named = (self.bos_token_id, self.eos_token_id, self.unk_token_id, self.pad_token_id)
        infill = (self.prefix_id, self.middle_id, self.suffix_id, self.eot_id)
        added = (token.id for token in self.runtime.config.added if token.special)
        ids = (*named, *infill, self.runtime.piece_id(STEP_PIECE), *added)
        return list(dict.fromkeys(token_id for token_id in ids if token_id is not None))

    @property
    def all_special_tokens(self) -> list[str]:
        """Names of the control tokens, each once."""
        return self.convert_ids_to_tokens(self.all_special_ids)

    @property
    def vocab_size(self) -> int:
        """Number of pieces, without tokens added behind them; `len` counts those, too."""
        return self.runtime.own_size

    def __len__(self) -> int:
        return self.runtime.vocab_size

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by piece."""
        return {piece: token_id for token_id, piece in enumerate(self.runtime.pieces)}

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Return the id of a piece, or a list of ids; `unk_token_id` for an unknown piece."""
        if not isinstance(tokens, str):
            return [self.convert_tokens_to_ids(token) for token in tokens]
        token_id = self.runtime.piece_id(tokens)
        return self.unk_token_id if token_id is None else token_id

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the piece of an id, or a list of pieces."""
        if isinstance(ids, int):
            return self.runtime.piece(ids)
        skipped = self.runtime.special_ids if skip_special_tokens else ()
        return [self.runtime.piece(i) for i in as_id_list(ids) if i not in skipped]

    def _id(self, token: str | None) -> int | None:
        if token is None:
            return None
        token_id = self.runtime.piece_id(token)
        if token_id is None:
            raise ValueError(
                f"{token!r} is not in the vocabulary, and a vocabulary cannot be extended"
            )
        return token_id

    @classmethod
    def _option_names(cls) -> list[str]:
        return [option.name for option in fields(cls) if option.kw_only and option.init]


def _load(path: str | PathLike[str]) -> SentencePieceTokenizer:
    runtime = load_tokenizer(path)
    if not isinstance(runtime, SentencePieceTokenizer):
        raise CheckpointError(
            f"{path}: expected a SentencePiece vocabulary, found byte-level BPE; load_tokenizer "
            "reads it"
        )
    return runtime


def _options(config: ConfigFields) -> dict[str, Any]:
    """Return the options of the class that a tokenizer_config.json sets, checked."""
    known = {name: config.flag(name, False) for name in _FLAGS if name in config.values}
    for name in (*_TEXTS, *(f"{role}_token" for role in INFILL_PIECES)):
        if name in config.values:
            known[name] = token_text(config.values[name])
            if not isinstance(known[name], str | None):
                raise config.fault(name, "a text or null")
    return known
