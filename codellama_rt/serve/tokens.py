"""Texts and token ids: /tokenize, /detokenize and /tokenizer_info, of vLLM and llama.cpp."""

from __future__ import annotations

from typing import Any

from starlette.requests import Request

from codellama_rt.serve.answers import JSONAnswer
from codellama_rt.serve.chat import encode_messages
from codellama_rt.serve.errors import invalid
from codellama_rt.serve.long_work import beside_loop
from codellama_rt.serve.protocol import DetokenizeRequest, TokenizeRequest
from codellama_rt.serve.service import Service
from codellama_rt.serve.token_texts import TokenTexts


async def tokenize(request: Request) -> JSONAnswer:
    """Encode a text (`prompt`: vLLM's form, `content`: llama.cpp's) or a conversation."""
    service: Service = request.app.state.service
    wanted = await service.read(request, TokenizeRequest)
    service.find(wanted.model)
    given = [x for x in (wanted.prompt, wanted.content, wanted.messages) if x is not None]
    if len(given) != 1:
        raise invalid("give one of prompt, messages and content", "prompt")
    size = len(given[0]) if isinstance(given[0], str) else 2**20
    return JSONAnswer(await beside_loop(size, lambda: _tokenized(service, wanted)))


def _tokenized(service: Service, wanted: TokenizeRequest) -> dict[str, Any]:
    ids, texts = _encode(service, wanted), TokenTexts(service.tokenizer)
    if wanted.content is not None:
        pieces = [{"id": i, "piece": texts[i]} for i in ids] if wanted.with_pieces else ids
        return {"tokens": pieces}
    strings = [texts[i] for i in ids] if wanted.return_token_strs else None
    answer = {"count": len(ids), "max_model_len": service.max_model_len, "tokens": ids}
    return {**answer, "token_strs": strings}


def _encode(service: Service, wanted: TokenizeRequest) -> list[int]:
    tokenizer = service.prompts.require_tokenizer()
    if wanted.messages is not None:
        return encode_messages(service, wanted.messages, service.defaults)[0]
    if wanted.content is not None:
        parse = wanted.parse_special is not False
        bos = bool(wanted.add_special)
        return tokenizer.encode(wanted.content, bos=bos, parse_special=parse)
    # A client that asks for the id of </s> gets it; a prompt for completion never becomes it.
    bos = wanted.add_special_tokens is not False
    return tokenizer.encode(wanted.prompt, bos=bos, parse_special=True)


async def detokenize(request: Request) -> JSONAnswer:
    """Decode token ids."""
    service: Service = request.app.state.service
    wanted = await service.read(request, DetokenizeRequest)
    service.find(wanted.model)
    tokenizer = service.prompts.require_tokenizer()
    try:
        text = await beside_loop(
            len(wanted.tokens), lambda: tokenizer.decode(wanted.tokens, skip_special_tokens=False)
        )
    except ValueError as error:
        raise invalid(str(error), "tokens") from None
    return JSONAnswer({"prompt": text, "content": text})


async def tokenizer_info(request: Request) -> JSONAnswer:
    """Describe the tokenizer, as Transformers' configuration does."""
    service: Service = request.app.state.service
    tokenizer = service.prompts.require_tokenizer()

    def named(token_id: int | None) -> str | None:
        return None if token_id is None else tokenizer.piece(token_id)

    info: dict[str, Any] = {
        "tokenizer_class": type(tokenizer).__name__,
        "bos_token": named(tokenizer.bos_id),
        "eos_token": named(tokenizer.eos_id),
        "unk_token": named(tokenizer.unk_id),
        "pad_token": named(tokenizer.pad_id),
        "chat_template": service.chat_template,
        "model_max_length": service.max_model_len,
        "vocab_size": tokenizer.vocab_size,
        "add_bos_token": tokenizer.adds_bos,
    }
    return JSONAnswer(info)
