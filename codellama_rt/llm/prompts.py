"""What a caller asks, as token ids and the tokens that end the answer."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.llm.arguments import Prompt
from codellama_rt.llm.variants import Variant, require_chat, require_infilling
from codellama_rt.text.chat import checked_messages, find_format
from codellama_rt.text.tokenizer import Tokenizer, split_fill

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

        Raises:
            ValueError: a str without a tokenizer, two gaps, or a model that cannot fill in.
        """
        if not isinstance(prompt, str):
            return prompt, params
        parts = split_fill(prompt)
        if parts is None:
            return self.require_tokenizer().encode(prompt), params
        return self.infilling(*parts, params)

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
        return token_ids, _ending_at(params, [tokenizer.eot_id])

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
        token_ids = style.encode(tokenizer, checked_messages(messages))
        return token_ids, _ending_at(params, style.end_ids(tokenizer))

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
