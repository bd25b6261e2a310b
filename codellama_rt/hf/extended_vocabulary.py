"""Tokens that a caller adds to the vocabulary of `CodeLlamaTokenizer`."""

from collections.abc import Iterable, Mapping
from dataclasses import replace
from os import PathLike
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.hf.code_llama_vocabulary import CodeLlamaVocabulary
from codellama_rt.text.tokenizer.added_tokens import FLAGS, AddedToken
from codellama_rt.text.tokenizer.sentencepiece_tokenizer import SentencePieceTokenizer
from codellama_rt.text.tokenizer.tokenizer_base import check_text

_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


class ExtendedVocabulary(CodeLlamaVocabulary):
    """The vocabulary of a checkpoint and further tokens, whose ids follow those of the pieces.

    The weights are not changed: a token for whose id the model has no row is refused, by
    `add_tokens` where a config.json says how many rows there are, otherwise by the model.

    Attributes:
        num_rows: of the model; None: not known.
    """

    num_rows: int | None = None

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **options: Any) -> "ExtendedVocabulary":
        """Load a checkpoint's tokenizer, with the tokens that were added to it.

        Raises:
            CheckpointError, ValueError: as for the class.
        """
        tokenizer = super().from_pretrained(path, **options)
        file = (Path(path) if Path(path).is_dir() else Path(path).parent) / "config.json"
        rows = read_object(file).get("vocab_size") if file.is_file() else None
        tokenizer.num_rows = rows if isinstance(rows, int) else None
        return tokenizer

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary.

        Args:
            new_tokens: a str, an object with `content` and the flags of Transformers' AddedToken,
                or a list of these; a piece that the vocabulary has keeps its id.
            special_tokens: they are control tokens: `skip_special_tokens` leaves them out.

        Returns:
            How many had no id before.

        Raises:
            TypeError: not such tokens.
            ValueError: an empty name, or the model has no row for the token.
        """
        is_one = isinstance(new_tokens, str) or not isinstance(new_tokens, Iterable)
        given = [_token(one, special_tokens) for one in ([new_tokens] if is_one else new_tokens)]
        given = list({token.content: token for token in given}.values())
        new = [token for token in given if self.runtime.piece_id(token.content) is None]
        size = len(self) + len(new)
        if self.num_rows is not None and new and size > self.num_rows:
            raise ValueError(
                f"the model has rows for {self.num_rows} tokens, and {new[-1].content!r} would be "
                f"number {size}; add rows to the checkpoint first"
            )
        numbered = [replace(token, id=len(self) + i) for i, token in enumerate(new)]
        known = [replace(t, id=self.runtime.piece_id(t.content)) for t in given if t not in new]
        numbered += [t for t in known if t.special and t.id not in self.runtime.special_ids]
        self._set_added(numbered)
        return len(new)

    def add_special_tokens(
        self,
        special_tokens_dict: Mapping[str, Any],
        replace_additional_special_tokens: bool = True,
    ) -> int:
        """Add control tokens and give them roles.

        Args:
            special_tokens_dict: "bos_token", "eos_token", "unk_token" or "pad_token" -> a token;
                "additional_special_tokens" -> a list.
            replace_additional_special_tokens: the list replaces the added tokens without a role,
                which then are plain tokens.

        Returns:
            How many had no id before.

        Raises:
            ValueError: another role, or as `add_tokens`.
        """
        unknown = sorted(special_tokens_dict.keys() - {*_ROLES, "additional_special_tokens"})
        if unknown:
            raise ValueError(f"this tokenizer has no {unknown[0]}; it has {', '.join(_ROLES)}")
        further = special_tokens_dict.get("additional_special_tokens")
        if isinstance(further, str):
            raise TypeError("additional_special_tokens must be a list of tokens, got a str")
        roles = {
            role: _token(special_tokens_dict[role], True)
            for role in _ROLES
            if role in special_tokens_dict
        }
        further = [_token(one, True) for one in further or ()]
        count = self.add_tokens([*roles.values(), *further], special_tokens=True)
        for role, token in roles.items():
            setattr(self, role, token.content)
        if further and replace_additional_special_tokens:
            kept = {token.content for token in further} | {getattr(self, role) for role in _ROLES}
            own = self.runtime.own_size
            self._set_added(
                replace(token, special=False)
                for token in self.runtime.config.added
                if token.special and token.content not in kept and token.id >= own
            )
        return count

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the control tokens and of the added ones, by name."""
        named = dict(zip(self.all_special_tokens, self.all_special_ids, strict=True))
        added = {token.content: token.id for token in self.runtime.config.added}
        return dict(sorted((named | added).items(), key=lambda item: item[1]))

    added_tokens_encoder = property(get_added_vocab)

    @property
    def added_tokens_decoder(self) -> dict[int, str]:
        """The names of the control tokens and of the added ones, by id."""
        return {token_id: name for name, token_id in self.get_added_vocab().items()}

    @property
    def special_tokens_map(self) -> dict[str, Any]:
        """The control tokens by their roles; those without a role in a list."""
        roles = {role: getattr(self, role) for role in _ROLES if getattr(self, role) is not None}
        further = self.additional_special_tokens
        return roles | ({"additional_special_tokens": further} if further else {})

    @property
    def additional_special_tokens(self) -> list[str]:
        """The control tokens without a role."""
        roles = [getattr(self, role) for role in _ROLES]
        return [token for token in self.all_special_tokens if token not in roles]

    def _set_added(self, tokens: Iterable[AddedToken]) -> None:
        """Add tokens to those of the runtime, or replace them there."""
        changed = {token.id: token for token in tokens}
        if changed:
            config = self.runtime.config
            added = {token.id: token for token in config.added} | changed
            config = replace(config, added=tuple(added.values()))
            self.runtime = SentencePieceTokenizer(self.runtime.model_proto, config)


def _token(token: Any, special: bool) -> AddedToken:
    """Return a token without an id yet."""
    name = token if isinstance(token, str) else getattr(token, "content", None)
    if not isinstance(name, str):
        raise TypeError(f"a token to add must be a str, got {type(token).__name__}")
    if not name:
        raise ValueError("the name of a token to add must not be empty")
    check_text(name)
    if isinstance(token, str):  # whose methods have the names of flags
        return AddedToken(-1, name, special=special)
    flags = {flag: bool(getattr(token, flag, False)) for flag in FLAGS}
    return AddedToken(-1, name, **(flags | {"special": special or flags["special"]}))
