"""What a caller asks, as token ids and the tokens that end the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.arguments import Prompt
from codellama_rt.llm.variants import Variant, require_chat, require_infilling
from codellama_rt.text.chat import checked_messages, find_format
from codellama_rt.text.tokenizer import Tokenizer, split_fill
from codellama_rt.text.tokenizer.infill_template import parse_infill_template

Request = tuple[list[int], SamplingParams]


class PromptEncoder:
    """Texts to complete, gaps to fill and conversations to answer, for one model.

    Args:
        tokenizer: None for a checkpoint that brings none.
        chat_template: Jinja that the checkpoint brings, or None.
        variant: which of Code Llama's models it is, if it is one.
    """

    def __init__(
        self,
        tokenizer: Tokenizer | None,
        chat_template: str | None = None,
        variant: Variant | None = None,
    ) -> None:
        self._tokenizer, self._chat_template = tokenizer, chat_template
        self._variant = variant

    def completion(self, prompt: Prompt, params: SamplingParams) -> Request:
        """Encode a str, with infilling where it has <FILL_ME>, or take token ids as they are.

        A str that is Code Llama's whole infilling template, as editors send it, is filled in, too.

        Raises:
            ValueError: a str without a tokenizer, two gaps, a model that cannot fill in, or a token
                that the model has no row for.
        """
        if not isinstance(prompt, str):
            return prompt, params
        tokenizer = self.require_tokenizer()
        is_able = tokenizer.can_infill and (self._variant is None or self._variant.can_infill)
        template = parse_infill_template(prompt) if is_able else None
        if template is not None:
            prefix, suffix, suffix_first = template
            return self.infilling(prefix, suffix, params, suffix_first=suffix_first)
        parts = split_fill(prompt)
        if parts is not None:
            return self.infilling(*parts, params)
        return self._checked(tokenizer.encode_plain(prompt, bos=True)), params

    def tokens(self, prompt: Prompt) -> Sequence[int]:
        """Return the token ids of a str, or token ids as they are.

        Raises:
            ValueError: a str without a tokenizer.
        """
        return self.require_tokenizer().encode(prompt) if isinstance(prompt, str) else prompt

    def infilling(
        self, prefix: str, suffix: str, params: SamplingParams, *, suffix_first: bool = False
    ) -> Request:
        """Encode the gap between two texts.

        Raises:
            ValueError: the model cannot fill in.
        """
        tokenizer = self.require_tokenizer()
        require_infilling(self._variant)
        token_ids = tokenizer.encode_infill(prefix, suffix, suffix_first=suffix_first)
        return self._checked(token_ids), params

    def conversation(
        self,
        messages: Sequence[Mapping[str, str]],
        params: SamplingParams,
        chat_template: str | None = None,
    ) -> Request:
        """Encode a conversation whose next message is the assistant's.

        Raises:
            ValueError, TypeError: a message, the order of the roles, or a template that cannot be;
                or the checkpoint has no chat format.
        """
        tokenizer = self.require_tokenizer()
        chat_template = chat_template or self._chat_template
        if chat_template is None:
            require_chat(self._variant)
        style = find_format(chat_template, tokenizer)
        token_ids = self._checked(style.encode(tokenizer, checked_messages(messages)))
        return token_ids, _ending_at(params, style.end_ids(tokenizer))

    def _checked(self, token_ids: list[int]) -> list[int]:
        """Return a prompt; refuse a token that the tokenizer has and the model does not."""
        rows = self._tokenizer.num_rows
        beyond = next((i for i in token_ids if i >= rows), None)
        if beyond is not None:
            raise ValueError(
                f"the prompt holds {self._tokenizer.piece(beyond)!r}, token {beyond} of the "
                f"tokenizer, and the model has rows for {rows} tokens only"
            )
        return token_ids

    def require_tokenizer(self) -> Tokenizer:
        """Return the tokenizer.

        Raises:
            ValueError: the model has no tokenizer.
        """
        if self._tokenizer is None:
            raise ValueError("this checkpoint brings no tokenizer; give prompts as token ids")
        return self._tokenizer


def _ending_at(params: SamplingParams, token_ids: Sequence[int]) -> SamplingParams:
    if params.ignore_eos:
        return params
    return replace(params, stop_token_ids=(*params.stop_token_ids, *token_ids))
