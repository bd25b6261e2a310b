"""Tokens that a caller adds to the vocabulary of `CodeLlamaTokenizer`."""

import json
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import KW_ONLY, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.errors import CheckpointError
from codellama_rt.hf.code_llama_vocabulary import CodeLlamaVocabulary
from codellama_rt.text.tokenizer.tokenizer_base import as_id_list, check_text, token_text

_TOKENIZER_CONFIG = "tokenizer_config.json"
_KEY = "added_tokens_decoder"
_ROLES = ("bos_token", "eos_token", "unk_token", "pad_token")


@dataclass(eq=False, repr=False)
class ExtendedVocabulary(CodeLlamaVocabulary):
    """The vocabulary of a checkpoint and further tokens, whose ids follow those of the pieces.

    The weights are not changed: a token beside whose id the model has no row is refused, by
    `add_tokens` where a config.json says how many rows there are, otherwise by the model.

    Args:
        added_tokens: name -> whether it is a control token, in the order of their ids.
    """

    _: KW_ONLY
    added_tokens: Mapping[str, bool] = field(default_factory=dict)
    num_rows: int | None = field(init=False, default=None)  # of the model; None: not known

    def __post_init__(self) -> None:
        self._added: dict[str, int] = {}
        self._added_control: list[str] = []
        given = dict(self.added_tokens)
        self._pending = list(given)  # named by options before they have an id
        super().__post_init__()
        self._pending = []
        for name, is_control in given.items():
            self.add_tokens([name], special_tokens=is_control)

    @classmethod
    def from_pretrained(cls, path: str | PathLike[str], **options: Any) -> "ExtendedVocabulary":
        """Load a checkpoint's tokenizer, with the tokens that `save_pretrained` has written.

        Raises:
            CheckpointError, ValueError: as for the class.
        """
        folder = Path(path) if Path(path).is_dir() else Path(path).parent
        saved = _saved_tokens(folder)
        options.setdefault("added_tokens", {name: control for name, (_, control) in saved.items()})
        tokenizer = super().from_pretrained(path, **options)
        for name, (token_id, _) in saved.items():
            if tokenizer._added.get(name, token_id) != token_id:
                raise CheckpointError(
                    f"{folder / _TOKENIZER_CONFIG}: {_KEY} gives {name!r} the id {token_id}, "
                    f"expected {tokenizer._added[name]}, which follows the vocabulary"
                )
        config = read_object(folder / "config.json") if (folder / "config.json").is_file() else {}
        if isinstance(config.get("vocab_size"), int):
            tokenizer.num_rows = config["vocab_size"]
        return tokenizer

    def add_tokens(self, new_tokens: Any, special_tokens: bool = False) -> int:
        """Add tokens to the vocabulary.

        Args:
            new_tokens: a str, an object with `content`, or a list of these; a piece that the
                vocabulary has stays as it is.
            special_tokens: they are control tokens: `skip_special_tokens` leaves them out.

        Returns:
            How many had no id before.

        Raises:
            TypeError: not such tokens.
            ValueError: an empty name, or the model has no row for the token.
        """
        is_one = isinstance(new_tokens, str) or not isinstance(new_tokens, Iterable)
        names = [_name(token) for token in ([new_tokens] if is_one else new_tokens)]
        new = [n for n in dict.fromkeys(names) if self._known_id(n) is None]
        size = len(self) + len(new)
        if self.num_rows is not None and new and size > self.num_rows:
            raise ValueError(
                f"the model has rows for {self.num_rows} tokens, and {new[-1]!r} would be number "
                f"{size}; add rows to the checkpoint first"
            )
        for name in new:
            self._added[name] = len(self)
        if special_tokens:
            known = self.all_special_tokens
            self._added_control += [n for n in dict.fromkeys(names) if n not in known]
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
            replace_additional_special_tokens: the list replaces what was added before, which then
                are plain tokens.

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
        count = 0
        for role in special_tokens_dict.keys() - {"additional_special_tokens"}:
            count += self.add_tokens([special_tokens_dict[role]], special_tokens=True)
            setattr(self, role, _name(special_tokens_dict[role]))
        if further is not None:
            count += self.add_tokens(further, special_tokens=True)
            if replace_additional_special_tokens:
                roles = [getattr(self, role) for role in _ROLES]
                kept = {*map(_name, further), *roles}
                self._added_control = [n for n in self._added_control if n in kept]
        return count

    def get_added_vocab(self) -> dict[str, int]:
        """Return the ids of the control tokens and of the added ones, by name."""
        named = dict(zip(self.all_special_tokens, self.all_special_ids, strict=True))
        return dict(sorted((named | self._added).items(), key=lambda item: item[1]))

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

    @property
    def all_special_ids(self) -> list[int]:
        """Ids of the control tokens, each once."""
        added = [self._known_id(name) for name in self._added_control]
        return list(dict.fromkeys([*super().all_special_ids, *added]))

    def __len__(self) -> int:
        return self.runtime.vocab_size + len(self._added)

    def get_vocab(self) -> dict[str, int]:
        """Return the ids by piece or name."""
        return super().get_vocab() | self._added

    def convert_tokens_to_ids(self, tokens: str | Iterable[str]) -> Any:
        """Return the id of a piece, or a list of ids; `unk_token_id` for an unknown piece."""
        if isinstance(tokens, str) and tokens in self._added:
            return self._added[tokens]
        return super().convert_tokens_to_ids(tokens)

    def convert_ids_to_tokens(self, ids: Any, skip_special_tokens: bool = False) -> Any:
        """Return the piece of an id, or a list of pieces."""
        names = {token_id: name for name, token_id in self._added.items()}
        if isinstance(ids, int):
            return names[ids] if ids in names else self.runtime.piece(ids)
        tokens: list[str] = []
        for part, is_added in self._runs(ids):
            if not is_added:
                tokens += super().convert_ids_to_tokens(part, skip_special_tokens)
            elif not (skip_special_tokens and names[part[0]] in self._added_control):
                tokens.append(names[part[0]])
        return tokens

    def save_pretrained(self, save_directory: str) -> tuple[str, ...]:
        """Write a directory for `from_pretrained`, also that of Transformers; return the paths."""
        paths = super().save_pretrained(save_directory)
        file = Path(save_directory) / _TOKENIZER_CONFIG
        config = json.loads(file.read_text("utf-8"))
        entries = {
            str(token_id): {"content": name, "special": name in self._added_control}
            | dict.fromkeys(("lstrip", "normalized", "rstrip", "single_word"), False)
            for name, token_id in self._added.items()
        }
        if entries:
            config[_KEY] = config.get(_KEY, {}) | entries
            file.write_text(json.dumps(config, indent=2, ensure_ascii=False) + "\n", "utf-8")
        return paths

    def _split_added(self, text: str) -> list[str]:
        """Split text at the names of added tokens, longest first; names have odd indices."""
        names = sorted(self._added, key=len, reverse=True)
        return re.split(f"({'|'.join(map(re.escape, names))})", text) if names else [text]

    def _added_text_ids(self, text: str) -> list[int]:
        """Encode text in which the names of control and added tokens are tokens.

        As in the slow tokenizer of Transformers, only the start gets a space in front.
        """
        check_text(text)
        first, *parts = self._split_added(text)
        ids = self.runtime.encode(first, bos=False, parse_special=True)
        encode = self.runtime.encode_continuation
        if not first and parts and parts[0] not in self._added_control:
            has_lead = self.runtime.encode_plain("a") != encode("a")
            ids = encode(" ") if has_lead else []
        for i, part in enumerate(parts):
            if i % 2 == 0:
                ids.append(self._added[part])
                continue
            for piece in self.runtime.split_special(part):
                is_text = isinstance(piece, str)
                ids += encode(piece) if is_text else [piece]
        return ids

    def _runs(self, ids: Any) -> list[tuple[list[int], bool]]:
        """Split ids into runs without added tokens, and one run for each of those."""
        runs: list[tuple[list[int], bool]] = [([], False)]
        added = set(self._added.values())
        for token_id in as_id_list(ids):
            if token_id in added:
                runs += [([token_id], True), ([], False)]
            else:
                runs[-1][0].append(token_id)
        return runs

    def _decode_added(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        """Decode ids with added tokens; nothing is put around their names."""
        (first, _), *runs = self._runs(ids)
        names = {token_id: name for name, token_id in self._added.items()}
        text = self.runtime.decode(first, skip_special_tokens=skip_special_tokens)
        for part, is_added in runs:
            if is_added:
                is_left_out = skip_special_tokens and names[part[0]] in self._added_control
                text += "" if is_left_out else names[part[0]]
            else:  # after a token that is no begin token, a leading space stays
                inner = self.runtime.detokenizer([0], skip_special_tokens=skip_special_tokens)
                text += "".join(map(inner.push, part)) + inner.flush()
        return text

    def _known_id(self, name: str) -> int | None:
        found = self.runtime.piece_id(name)
        return self._added.get(name) if found is None else found

    def _id(self, token: str | None) -> int | None:
        if token in self._pending:
            return None
        return self._added[token] if token in self._added else super()._id(token)

    @classmethod
    def _option_names(cls) -> list[str]:
        return [name for name in super()._option_names() if name != "added_tokens"]


def _name(token: Any) -> str:
    name = token if isinstance(token, str) else getattr(token, "content", None)
    if not isinstance(name, str):
        raise TypeError(f"a token to add must be a str, got {type(token).__name__}")
    if not name:
        raise ValueError("the name of a token to add must not be empty")
    check_text(name)
    return name


def _saved_tokens(folder: Path) -> dict[str, tuple[int, bool]]:
    """Return id and kind of the added tokens of a tokenizer_config.json, in order of the ids."""
    file = folder / _TOKENIZER_CONFIG
    entries = (read_object(file) if file.is_file() else {}).get(_KEY) or {}
    try:
        ordered = sorted((int(token_id), entry) for token_id, entry in entries.items())
        return {_name(token_text(e)): (i, bool(e.get("special"))) for i, e in ordered}
    except (AttributeError, TypeError, ValueError) as error:
        raise CheckpointError(f"{file}: {_KEY} must map ids to tokens: {error}") from None
