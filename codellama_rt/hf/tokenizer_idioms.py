"""Further methods of Transformers' tokenizers; each says the same in other words."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from codellama_rt.hf.arguments import TOKENIZER, supported
from codellama_rt.hf.batch_encoding import (
    BatchEncoding,
    as_tensor,
    pad,
    padded_length,
    row_limit,
    truncate,
)
from codellama_rt.hf.extended_vocabulary import ExtendedVocabulary
from codellama_rt.text.tokenizer.tokenizer_base import as_id_list

_FILLS = {"attention_mask": 0, "token_type_ids": 0, "special_tokens_mask": 1}
_CLEAN_UPS = (" .", " ?", " !", " ,", " ' ", " n't", " 'm", " 's", " 've", " 're")


def _role_id(role: str) -> property:
    """Return a property: the id of the token with a role, by which the role can also be given."""

    def get(self: TokenizerIdioms) -> int | None:
        return self._id(getattr(self, role))

    def give(self: TokenizerIdioms, token_id: int | None) -> None:
        setattr(self, role, None if token_id is None else self.convert_ids_to_tokens(token_id))

    return property(get, give, doc=f"The id of `{role}`, or None; setting it sets the token.")


class TokenizerIdioms(ExtendedVocabulary):
    """Methods on rows of ids, and old names of calling the tokenizer.

    Attributes:
        model_max_length: the limit of truncation=True without max_length.
        is_fast: there are no offsets of characters.
    """

    model_input_names = ("input_ids", "attention_mask")
    model_max_length = 10**30
    is_fast = False
    cls_token = sep_token = mask_token = None
    cls_token_id = sep_token_id = mask_token_id = None

    bos_token_id = _role_id("bos_token")
    eos_token_id = _role_id("eos_token")
    unk_token_id = _role_id("unk_token")
    pad_token_id = _role_id("pad_token")

    @classmethod
    def from_pretrained(cls, path: Any, **options: Any) -> TokenizerIdioms:
        """Load a checkpoint's tokenizer.

        Args:
            path: a directory with tokenizer.model, or a model file.
            options: options of the class; they override a tokenizer_config.json beside the model.
                Arguments of Transformers that change nothing here are ignored with a warning.

        Raises:
            CheckpointError, ValueError: as for the class.
            TypeError: an unknown option, or one of Transformers that is not supported.
        """
        options = supported("from_pretrained()", options, TOKENIZER)
        length = options.pop("model_max_length", None)
        tokenizer = super().from_pretrained(path, **options)
        if length is not None:
            tokenizer.model_max_length = length
        return tokenizer

    def encode_plus(self, text: str, text_pair: str | None = None, **options: Any) -> BatchEncoding:
        """Call the tokenizer with one text or pair: an old name."""
        return self(text, text_pair, **options)

    def batch_encode_plus(
        self, batch_text_or_text_pairs: Sequence[Any], **options: Any
    ) -> BatchEncoding:
        """Call the tokenizer with several texts, or pairs of texts: an old name.

        Raises:
            TypeError: not a list.
        """
        batch = batch_text_or_text_pairs
        if isinstance(batch, str) or not isinstance(batch, Sequence):
            raise TypeError(f"a batch must be a list of texts or pairs, got {type(batch).__name__}")
        if batch and all(isinstance(one, (list, tuple)) and len(one) == 2 for one in batch):
            return self([one[0] for one in batch], [one[1] for one in batch], **options)
        return self(batch, **options)

    def pad(
        self,
        encoded_inputs: Any,
        padding: bool | str = True,
        max_length: int | None = None,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_attention_mask: bool | None = None,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Bring encoded texts to one length.

        Args:
            encoded_inputs: a dictionary with `input_ids`, of one text or several, or a list of such
                dictionaries; masks beside them are padded, too.
            padding, max_length, pad_to_multiple_of, padding_side, return_tensors: as for calling
                the tokenizer.
            return_attention_mask: False leaves the mask out.

        Raises:
            ValueError: no `input_ids`, an invalid option, or a mask of another length.
        """
        given = encoded_inputs
        if not isinstance(given, Mapping):
            given = {name: [one[name] for one in given] for name in (given[0] if given else ())}
        if "input_ids" not in given:
            raise ValueError(f"encoded texts have input_ids, got {sorted(given)}")
        single = not len(given["input_ids"]) or _is_id(given["input_ids"][0])
        rows = {"input_ids": _rows(given["input_ids"], single)}
        rows |= {name: _rows(given[name], single) for name in given if name in _FILLS}
        lengths = [len(row) for row in rows["input_ids"]]
        for name, part in rows.items():
            if [len(row) for row in part] != lengths:
                raise ValueError(f"{name} must have the lengths of input_ids")
        others = {name: value for name, value in given.items() if name not in rows}
        rows.setdefault("attention_mask", [[1] * length for length in lengths])
        if return_attention_mask is False:
            del rows["attention_mask"]
        longest = padded_length(rows["input_ids"], padding, max_length, pad_to_multiple_of)
        side, fills = padding_side or self.padding_side, _FILLS | {"input_ids": self.pad_token_id}
        padded = {name: pad(part, longest, fills[name], side)[0] for name, part in rows.items()}
        tensors = {name: as_tensor(part, return_tensors, single) for name, part in padded.items()}
        return BatchEncoding(**tensors, **others)

    def prepare_for_model(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        add_special_tokens: bool = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding: bool | str = False,
        return_tensors: str | None = None,
    ) -> BatchEncoding:
        """Add special tokens to ids, cut and pad them; options as for calling the tokenizer."""
        limit = row_limit(truncation, max_length, padding)
        row, _ = self._joined(ids, pair_ids, add_special_tokens, limit)
        options = {"max_length": max_length, "return_tensors": return_tensors}
        return self.pad({"input_ids": row}, padding, **options)

    def truncate_sequences(
        self,
        ids: list[int],
        pair_ids: list[int] | None = None,
        num_tokens_to_remove: int = 0,
        truncation_strategy: str = "longest_first",
    ) -> tuple[list[int], list[int] | None, list[int]]:
        """Cut ids, and those of a pair in turn; the third result, the overflow, is empty."""
        row_limit(truncation_strategy, None, False)
        texts = [ids] if pair_ids is None else [ids, pair_ids]
        cut = truncate(texts, num_tokens_to_remove, self.truncation_side)
        return cut[0], (None if pair_ids is None else cut[1]), []

    def num_special_tokens_to_add(self, pair: bool = False) -> int:
        """Return how many tokens are added to a text, or to a pair."""
        return len(self.build_inputs_with_special_tokens([], [] if pair else None))

    def convert_tokens_to_string(self, tokens: Sequence[str]) -> str:
        """Return the text of pieces."""
        return self.decode([self.convert_tokens_to_ids(token) for token in tokens])

    def get_chat_template(self, chat_template: str | None = None) -> str | None:
        """Return the template that `apply_chat_template` takes; None: Code Llama's own format."""
        return chat_template or self.chat_template

    @staticmethod
    def clean_up_tokenization(out_string: str) -> str:
        """Remove spaces before English punctuation."""
        for spaced in _CLEAN_UPS:
            out_string = out_string.replace(spaced, spaced.strip())
        return out_string

    @property
    def max_len_single_sentence(self) -> int:
        """Tokens that a text may have so that it fits with its special tokens."""
        return self.model_max_length - self.num_special_tokens_to_add()

    @property
    def max_len_sentences_pair(self) -> int:
        """Tokens that two texts may have together so that they fit."""
        return self.model_max_length - self.num_special_tokens_to_add(pair=True)

    @property
    def name_or_path(self) -> str:
        """What the tokenizer was opened from."""
        return str(self.vocab_file)

    @property
    def additional_special_tokens_ids(self) -> list[int]:
        """Ids of the control tokens without a role."""
        return self.convert_tokens_to_ids(self.additional_special_tokens)


def _is_id(value: Any) -> bool:
    shape = getattr(value, "shape", None)  # a tensor without axes has a __len__ that raises
    return not hasattr(value, "__len__") if shape is None else tuple(shape) == ()


def _rows(values: Any, single: bool) -> list[list[int]]:
    values = values.asnumpy() if hasattr(values, "asnumpy") else values
    return [as_id_list(row) for row in ([values] if single else values)]
