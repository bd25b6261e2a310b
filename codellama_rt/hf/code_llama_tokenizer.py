"""`CodeLlamaTokenizer` with the interface and ids of the slow tokenizer of Transformers 4.

It differs from the runtime's tokenizer in one way: names of special tokens and <FILL_ME> in a text
are parsed.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np

from codellama_rt.hf.batch_encoding import (
    BatchEncoding,
    as_tensor,
    row_limit,
    truncate,
)
from codellama_rt.hf.tokenizer_idioms import TokenizerIdioms
from codellama_rt.text.chat import JinjaFormat, Message, checked_messages, find_format
from codellama_rt.text.tokenizer import split_fill
from codellama_rt.text.tokenizer.tokenizer_base import cannot_infill

_NO_LIMIT = 10**20  # a model_max_length above it means none


class CodeLlamaTokenizer(TokenizerIdioms):
    """Code Llama's tokenizer with the interface of Transformers.

    Example:
        >>> tok = CodeLlamaTokenizer.from_pretrained("CodeLlama-7b-hf")  # doctest: +SKIP
        >>> tok("def f(<FILL_ME>):", return_tensors="np").input_ids  # doctest: +SKIP
        array([[    1, 32007,   822,   285, 29898, 32008,  1125, 32009]])
    """

    # Text to ids

    def tokenize(
        self, text: str, suffix: str | None = None, suffix_first: bool | None = None
    ) -> list[str]:
        """Split text into pieces, without adding special tokens."""
        return self.convert_ids_to_tokens(self._text_ids(text, suffix, suffix_first))

    def encode(self, text: str, text_pair: str | None = None, **options: Any) -> list[int]:
        """Return the `input_ids` of calling the tokenizer with these arguments."""
        return self(text, text_pair, **options).input_ids

    def __call__(
        self,
        text: str | Sequence[str],
        text_pair: str | Sequence[str] | None = None,
        *,
        add_special_tokens: bool = True,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        padding: bool | str = False,
        pad_to_multiple_of: int | None = None,
        padding_side: str | None = None,
        return_tensors: str | None = None,
        return_attention_mask: bool | None = None,
        return_token_type_ids: bool = False,
        return_special_tokens_mask: bool = False,
        return_length: bool = False,
        verbose: bool = True,
        suffix: str | None = None,
        suffix_first: bool | None = None,
    ) -> BatchEncoding:
        """Encode a text or a batch of texts; options have the meaning of Transformers.

        Args:
            text, text_pair: one or several; a pair's text follows with its own special tokens.
            truncation, max_length: True or "longest_first", and the maximum tokens per row.
            padding, pad_to_multiple_of, padding_side: True or "longest", or "max_length".
            return_tensors: None for lists, "np" for int64 arrays, "ms" for int32 tensors.
            return_attention_mask: False leaves the mask out.
            return_token_type_ids, return_special_tokens_mask, return_length: add 0 for the first
                text and 1 for the second; 1 for special tokens and padding; tokens per row.
            verbose: accepted but ignored: there is nothing to tell.
            suffix: the text after a hole that follows `text`.
            suffix_first: the order of such a prompt; None: that of the tokenizer.

        Returns:
            `input_ids`, `attention_mask` and what else was asked for: lists (of lists), or
            (batch, length) tensors.

        Raises:
            TypeError, ValueError: a text is not a str, or an invalid option or hole.
        """
        single = isinstance(text, str)
        pairs = [text_pair] if single else text_pair or [None] * len(text)
        if truncation and max_length is None and self.model_max_length < _NO_LIMIT:
            max_length = self.model_max_length
        limit = row_limit(truncation, max_length, padding)
        rows, kinds = [], []
        for first, second in zip([text] if single else text, pairs, strict=True):
            ids = self._text_ids(first, suffix, suffix_first)
            second_ids = None if second is None else self._text_ids(second)
            row, kind = self._joined(ids, second_ids, add_special_tokens, limit)
            rows.append(row)
            kinds.append(kind)
        encoding: dict[str, Any] = {"input_ids": rows}
        if return_token_type_ids:
            encoding["token_type_ids"] = kinds
        if return_special_tokens_mask:
            encoding["special_tokens_mask"] = [
                self.get_special_tokens_mask(row, already_has_special_tokens=True) for row in rows
            ]
        padded = self.pad(
            encoding, padding, max_length, pad_to_multiple_of, padding_side, return_attention_mask
        )
        result = {name: as_tensor(part, return_tensors, single) for name, part in padded.items()}
        if return_length:
            lengths = [len(row) for row in padded.input_ids]
            result["length"] = lengths if return_tensors is None else np.array(lengths)
        return BatchEncoding(**result)

    def build_inputs_with_special_tokens(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Add bos and eos, as the options say, around one text or each of two."""
        head = [self.bos_token_id] * self.add_bos_token
        tail = [self.eos_token_id] * self.add_eos_token
        texts = [token_ids_0] if token_ids_1 is None else [token_ids_0, token_ids_1]
        return [token_id for ids in texts for token_id in (*head, *ids, *tail)]

    def get_special_tokens_mask(
        self,
        token_ids_0: list[int],
        token_ids_1: list[int] | None = None,
        already_has_special_tokens: bool = False,
    ) -> list[int]:
        """Return 1 for each special token of an input, 0 for every other token.

        Args:
            token_ids_0, token_ids_1: one text or two, to which special tokens would be added.
            already_has_special_tokens: `token_ids_0` contains them; find them there.
        """
        if already_has_special_tokens:
            special = set(self.all_special_ids)
            return [int(token_id in special) for token_id in token_ids_0]
        texts = [None if ids is None else [None] * len(ids) for ids in (token_ids_0, token_ids_1)]
        return [int(i is not None) for i in self.build_inputs_with_special_tokens(*texts)]

    def create_token_type_ids_from_sequences(
        self, token_ids_0: list[int], token_ids_1: list[int] | None = None
    ) -> list[int]:
        """Return 0 for each token of the first text's input, 1 for each of the second's."""
        first = len(self.build_inputs_with_special_tokens(token_ids_0))
        both = len(self.build_inputs_with_special_tokens(token_ids_0, token_ids_1))
        return [0] * first + [1] * (both - first)

    def apply_chat_template(
        self,
        conversation: Any,
        *,
        tokenize: bool = True,
        add_generation_prompt: bool = False,
        chat_template: str | None = None,
        padding: bool | str = False,
        truncation: bool | str | None = None,
        max_length: int | None = None,
        return_tensors: str | None = None,
        return_dict: bool = False,
    ) -> Any:
        """Turn a conversation, or each of several, into a prompt.

        Code Llama's own format, or a template that renders the same, gives the ids of Meta's code
        (unlike Transformers); Meta's prompts always end where the model's answer begins. Names of
        control tokens inside messages stay plain text.

        Args:
            conversation: a list of {"role": ..., "content": ...}, or a list of such lists.
            tokenize: return ids instead of the rendered text.
            add_generation_prompt: end templates of other formats where the assistant begins.
            chat_template: Jinja, "code-llama" or "code-llama-70b"; None: the tokenizer's own.
            padding, truncation, max_length, return_tensors: as for calling the tokenizer.
            return_dict: return `input_ids` and `attention_mask`, as calling the tokenizer does.

        Raises:
            TypeError, ValueError: an invalid message or order of roles.
            ChatTemplateError: the template is faulty, forbidden, or rejects the conversation.
        """
        single = not _is_batch(conversation)
        conversations = [checked_messages(c) for c in ([conversation] if single else conversation)]
        style = find_format(chat_template or self.chat_template, self.runtime)
        is_template = isinstance(style, JinjaFormat)
        prompt = {"add_generation_prompt": add_generation_prompt} if is_template else {}
        if not tokenize:
            texts = [style.render(self.runtime, messages, **prompt) for messages in conversations]
            return texts[0] if single else texts
        rows = [style.encode(self.runtime, messages, **prompt) for messages in conversations]
        limit = row_limit(truncation, max_length, padding)
        rows = [self._joined(row, None, False, limit)[0] for row in rows]
        padded = self.pad({"input_ids": rows}, padding, max_length)
        result = {name: as_tensor(part, return_tensors, single) for name, part in padded.items()}
        return BatchEncoding(**result) if return_dict else result["input_ids"]

    # Ids to text

    def decode(
        self,
        token_ids: Any,
        skip_special_tokens: bool = False,
        clean_up_tokenization_spaces: bool | None = None,
    ) -> str:
        """Decode ids (an int, a list, an array or tensor of one axis) to text."""
        text = self.runtime.decode(token_ids, skip_special_tokens=skip_special_tokens)
        if clean_up_tokenization_spaces is None:
            clean_up_tokenization_spaces = self.clean_up_tokenization_spaces
        return self.clean_up_tokenization(text) if clean_up_tokenization_spaces else text

    def batch_decode(self, sequences: Any, *args: Any, **options: Any) -> list[str]:
        """Decode rows of ids (lists, or an array or tensor of two axes) to texts, as `decode`."""
        rows = sequences.asnumpy() if hasattr(sequences, "asnumpy") else sequences
        return [self.decode(row, *args, **options) for row in rows]

    def _text_ids(
        self, text: str, suffix: str | None = None, suffix_first: bool | None = None
    ) -> list[int]:
        if suffix is None and self.fill_token is not None:
            text, suffix = split_fill(text, self.fill_token) or (text, None)
        if not suffix:  # as in Transformers, a hole at the end is a completion
            return self.runtime.encode(text, bos=False, parse_special=True)
        if None in (self.prefix_id, self.middle_id, self.suffix_id):
            raise cannot_infill(self.vocab_size)
        first = self.suffix_first if suffix_first is None else suffix_first
        return self.runtime.encode_infill(text, suffix, suffix_first=first)[1:]

    def _joined(
        self,
        ids: list[int],
        pair_ids: list[int] | None,
        add_special_tokens: bool,
        limit: int | None,
    ) -> tuple[list[int], list[int]]:
        """Return one row of a text or a pair, at most `limit` tokens, and which text each is of."""
        texts = [ids] if pair_ids is None else [ids, pair_ids]
        build = self.build_inputs_with_special_tokens if add_special_tokens else _join
        if limit is not None:
            texts = truncate(texts, len(build(*texts)) - limit, self.truncation_side)
        row, first = build(*texts), len(build(texts[0]))
        return row, [0] * first + [1] * (len(row) - first)


def _is_batch(conversation: Any) -> bool:
    """Return whether these are several conversations; a message is a mapping or a Message."""
    if not isinstance(conversation, Sequence) or isinstance(conversation, str):
        return False
    first = conversation[0] if conversation else None
    return isinstance(first, Sequence) and not isinstance(first, (str, Message))


def _join(*texts: list[int]) -> list[int]:
    return [token_id for ids in texts for token_id in ids]
