"""Read a directory's tokenizer configuration, with the precedence of Transformers 4.57.

It is in tokenizer_config.json, special_tokens_map.json, added_tokens.json and tokenizer.json.
"""

from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from codellama_rt.checkpoint.formats.strict_json import read_object
from codellama_rt.model.config import MAX_VOCAB_SIZE
from codellama_rt.model.config_fields import ConfigFields
from codellama_rt.text.tokenizer.added_tokens import FLAGS, AddedToken
from codellama_rt.text.tokenizer.tokenizer_config import ROLES, Spacing, TokenizerConfig

CONFIG_FILE = "tokenizer_config.json"
MAX_ADDED_TOKENS = 20_000
MAX_NAME = 1000  # characters
_LLAMA_CLASSES = (
    "LlamaTokenizer",
    "LlamaTokenizerFast",
    "CodeLlamaTokenizer",
    "CodeLlamaTokenizerFast",
)


def read_config(
    folder: Path,
    pieces: Sequence[str],
    contents: Mapping[str, Any] | None,
    *,
    model_control: Collection[str] | None = None,
) -> TokenizerConfig:
    """Read the configuration of a directory's tokenizer.

    Args:
        folder: the directory.
        pieces: the vocabulary by id, without added tokens.
        contents: of tokenizer.json, if it describes this vocabulary.
        model_control: the control tokens of a tokenizer.model; None: there is none.

    Raises:
        CheckpointError: a value cannot be used; the message names the file and the key.
    """
    has_model = model_control is not None
    fields = read_fields(folder / CONFIG_FILE)
    source = ConfigFields(contents or {}, str(folder / "tokenizer.json"))
    has_decoder = fields.values.get("added_tokens_decoder") is not None
    # Files from before added_tokens_decoder, which it replaces.
    older = () if has_decoder else (read_fields(folder / "special_tokens_map.json"),)
    roles, special = _special(fields, *older)
    listed = [*_listed(source), *_decoder(fields)]
    if not has_decoder:
        names = {token.content for token in special}
        listed += _by_name(read_fields(folder / "added_tokens.json"), names)
    if len(listed) + len(special) > MAX_ADDED_TOKENS:
        raise fields.fault("added_tokens_decoder", f"at most {MAX_ADDED_TOKENS} tokens to add")
    listed = [*(_Declared(name, {"special": True}) for name in model_control or ()), *listed]
    added = _placed(listed, special, pieces)
    ids = {piece: i for i, piece in enumerate(pieces)} | {t.content: t.id for t in added}
    role_ids = {role: None if name is None else ids[name] for role, name in roles.items()}
    kind = _class(fields, source, pieces, has_model)
    is_extended = any(token.id >= len(pieces) for token in added)
    adds_bos, adds_eos = _surroundings(fields, source, role_ids, kind)
    return TokenizerConfig(
        added=tuple(added),
        role_ids=role_ids,
        adds_bos=adds_bos,
        adds_eos=adds_eos,
        spacing=_spacing(fields, source, kind, has_model, is_extended),
    )


def read_fields(file: Path) -> ConfigFields:
    """Return the values of a JSON file, none where it does not exist."""
    return ConfigFields(read_object(file) if file.is_file() else {}, str(file))


class _Declared(NamedTuple):
    """A token as a file describes it; without an id, one is found for it."""

    content: str
    flags: dict[str, bool]
    id: int | None = None


def _declared(source: ConfigFields, key: str, token: Any, token_id: Any = None) -> _Declared:
    token = {"content": token} if isinstance(token, str) else token
    content = token.get("content") if isinstance(token, Mapping) else None
    if not isinstance(content, str) or not 0 < len(content) <= MAX_NAME:
        raise source.fault(key, f"tokens of 1 to {MAX_NAME} characters")
    try:
        content.encode()
    except UnicodeEncodeError:
        raise source.fault(key, "tokens in UTF-8") from None
    if token_id is not None and (type(token_id) is not int or not 0 <= token_id < MAX_VOCAB_SIZE):
        raise source.fault(key, f"token ids from 0 to {MAX_VOCAB_SIZE - 1}")
    values = ConfigFields(token, f"{source.source}: {key}: {content!r:.80}")
    flags = {flag: values.flag(flag, False) for flag in FLAGS if token.get(flag) is not None}
    return _Declared(content, flags, token_id)


def _listed(source: ConfigFields) -> Iterator[_Declared]:
    """Yield the added tokens of tokenizer.json."""
    tokens = source.values.get("added_tokens") or []
    if not isinstance(tokens, list) or not all(isinstance(t, Mapping) for t in tokens):
        raise source.fault("added_tokens", "a list of tokens")
    for token in tokens:
        yield _declared(source, "added_tokens", token, token.get("id", -1))


def _decoder(fields: ConfigFields) -> Iterator[_Declared]:
    """Yield the added tokens of tokenizer_config.json, in the order of their ids."""
    key = "added_tokens_decoder"
    tokens = fields.values.get(key) or {}
    if not isinstance(tokens, Mapping) or not all(i.isdecimal() and len(i) < 10 for i in tokens):
        raise fields.fault(key, "an object of tokens by id")
    for token_id in sorted(tokens, key=int):
        yield _declared(fields, key, tokens[token_id], int(token_id))


def _by_name(fields: ConfigFields, special: Collection[str]) -> Iterator[_Declared]:
    """Yield the tokens of added_tokens.json, which gives ids and no flags."""
    for name, token_id in fields.values.items():
        token = {"content": name, "normalized": name not in special}
        yield _declared(fields, name, token, -1 if token_id is None else token_id)


def _special(*sources: ConfigFields) -> tuple[dict[str, str | None], list[_Declared]]:
    """Return the names of the roles, the last file's if several state one, and special tokens."""
    roles: dict[str, _Declared | None] = {}
    additional: list[_Declared] = []
    for source in sources:
        for role in ROLES:
            key = f"{role}_token"
            if key in source.values:
                token = source.values[key]
                roles[role] = None if token in (None, "") else _declared(source, key, token)
        key = "additional_special_tokens"
        further = source.values.get(key) or []
        if not isinstance(further, list):
            raise source.fault(key, "a list of tokens")
        additional += [_declared(source, key, token) for token in further]
    names = {role: None if token is None else token.content for role, token in roles.items()}
    return names, [*filter(None, roles.values()), *additional]


def _placed(
    listed: Iterable[_Declared], special: Iterable[_Declared], pieces: Sequence[str]
) -> list[AddedToken]:
    """Give every token its id: that of its piece, the stated one behind the pieces, or a free one.

    Args:
        listed: tokens that files list; of two with one name the first one's flags count.
        special: control tokens by name: listed, in the vocabulary, or to be added.
        pieces: the vocabulary without them.
    """
    known = {piece: i for i, piece in enumerate(pieces)}
    control = {token.content for token in special}
    declared: dict[str, _Declared] = {}
    for token in (*listed, *special):
        declared.setdefault(token.content, token)
    tokens: list[AddedToken] = []
    taken, free = set(), len(pieces)
    for content, flags, stated in declared.values():
        token_id = known.get(content)
        if token_id is None:
            is_free = stated is not None and stated >= len(pieces) and stated not in taken
            token_id = stated if is_free else free
        taken.add(token_id)
        free = max(free, token_id + 1)
        is_control = flags.get("special", False) or content in control
        values = {"normalized": not is_control} | flags | {"special": is_control}
        tokens.append(AddedToken(token_id, content, **values))
    return tokens


def _class(
    fields: ConfigFields, source: ConfigFields, pieces: Sequence[str], has_model: bool
) -> str:
    """Return the class of Transformers that these files describe.

    Without a name it is that of Llama for a SentencePiece model, as AutoTokenizer finds, and Code
    Llama's for its vocabulary where no configuration of Hugging Face's lies beside it.
    """
    name = fields.values.get("tokenizer_class")
    if name is not None:
        if not isinstance(name, str):
            raise fields.fault("tokenizer_class", "the name of a class")
        return name
    if not has_model and not source.values.get("model", {}).get("byte_fallback"):
        return "PreTrainedTokenizerFast"
    is_bare = not source.values and not Path(fields.source).with_name("config.json").exists()
    is_code_llama = "▁<PRE>" in pieces
    return "CodeLlamaTokenizer" if is_bare and is_code_llama else "LlamaTokenizer"


def _surroundings(
    fields: ConfigFields, source: ConfigFields, roles: dict[str, int | None], kind: str
) -> tuple[bool, bool]:
    """Return whether a text begins with bos and ends with eos.

    The classes of Llama follow their options; other fast ones follow tokenizer.json, whose tokens
    become the roles that no file states.
    """
    stated = fields.flag("add_bos_token", True), fields.flag("add_eos_token", False)
    if not source.values or kind in _LLAMA_CLASSES:
        return stated
    adds = {"bos": False, "eos": False}
    post_processor = source.values.get("post_processor") or {}
    for step in post_processor.get("processors", [post_processor]):
        single = step.get("single") or [{}]
        for role, part in (("bos", single[0]), ("eos", single[-1])):
            token_id = _special_id(step, part)
            if token_id is not None:
                adds[role] = roles.setdefault(role, token_id) == token_id
    return adds["bos"], adds["eos"]


def _special_id(step: Mapping[str, Any], part: Mapping[str, Any]) -> int | None:
    """Return the id of a part of a template that is one special token."""
    name = part.get("SpecialToken", {}).get("id")
    ids = step.get("special_tokens", {}).get(name, {}).get("ids", [])
    return ids[0] if len(ids) == 1 else None


def _spacing(
    fields: ConfigFields, source: ConfigFields, kind: str, has_model: bool, is_extended: bool
) -> Spacing:
    """Return where the extra space goes.

    Code Llama's own vocabulary follows its slow class, whose ids are Meta's for a text; with tokens
    added to it, as in fine-tunes, it follows AutoTokenizer.
    """
    is_code = kind.startswith("CodeLlama")  # these classes do not know add_prefix_space
    legacy, has_space = _option(fields, "legacy"), _option(fields, "add_prefix_space")
    if source.values and not (has_model and has_space is not None and not is_code):
        return _spacing_of_json(source.values)
    if not has_space and "add_prefix_space" in fields.values and not is_code:
        # A null, too, which LlamaTokenizerFast writes, is false to LlamaTokenizer.
        return "never" if legacy is False else "none"
    is_slow = not is_extended or fields.values.get("spacing") == "start"  # the second: we wrote it
    if kind == "CodeLlamaTokenizer" and not legacy and is_slow:
        return "start"
    return "first" if legacy is False and not is_code else "each"


def _option(fields: ConfigFields, key: str) -> bool | None:
    return None if fields.values.get(key) is None else fields.flag(key, False)


def _spacing_of_json(contents: Mapping[str, Any]) -> Spacing:
    spacing: Spacing = "never"
    for stage, parts in (("normalizer", "normalizers"), ("pre_tokenizer", "pretokenizers")):
        step = contents.get(stage) or {}
        for part in step.get(parts, [step]):
            kind, scheme = part.get("type"), part.get("prepend_scheme")
            if kind == "Prepend":
                spacing = "each"
            elif kind == "Replace" and spacing == "never":
                spacing = "none"
            elif kind == "Metaspace":
                old = "always" if part.get("add_prefix_space", True) else "never"
                spacing = {"always": "each", "first": "first"}.get(scheme or old, "never")
    return spacing
