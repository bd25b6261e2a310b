"""The model behind the endpoints: names, prompts, and generations of the engine."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from time import time
from typing import Any, TypeVar

import msgspec
from starlette.requests import Request

from codellama_rt.engine.async_engine import AsyncEngine
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.errors import QueueFullError
from codellama_rt.llm.llm import LLM
from codellama_rt.llm.prompts import PromptEncoder
from codellama_rt.model.lora import LoraAdapter
from codellama_rt.serve.body import read_body
from codellama_rt.serve.errors import ApiError, invalid, unavailable
from codellama_rt.serve.fields import cache_salt
from codellama_rt.serve.generation import Generation
from codellama_rt.serve.observed import Observed
from codellama_rt.serve.protocol import Sampling
from codellama_rt.serve.settings import Settings

T = TypeVar("T", bound=msgspec.Struct)
_MAX_REQUEST_ID = 128


class Service:
    """What all endpoints share.

    Attributes:
        engine: runs the requests.
        names: of the model; the first one stands in answers.
        defaults: parameters of requests that give none.
        observed: what is counted of requests.
    """

    def __init__(self, model: LLM | Engine, settings: Settings) -> None:
        """Serve an LLM, or an engine whose tokenizer is used."""
        is_llm = isinstance(model, LLM)
        self.settings = settings
        engine, interval_s = model.engine if is_llm else model, settings.stream_interval_s
        self.engine = AsyncEngine(engine, stream_interval_s=interval_s)
        self.tokenizer = self.engine.engine.tokenizer
        self.prompts = model.prompt_encoder if is_llm else PromptEncoder(self.tokenizer)
        self.chat_template = settings.chat_template or (model.chat_template if is_llm else None)
        folder = Path(model.name_or_path).name if is_llm else "model"
        self.names = settings.names or (folder,)
        self.defaults = replace(_defaults(model) if is_llm else SamplingParams(temperature=1.0))
        self.observed = Observed()
        self.created = int(time())
        self._numbers = itertools.count()

    @property
    def max_model_len(self) -> int:
        """Tokens of prompt and output together."""
        return self.engine.engine.admission.max_model_len

    @property
    def can_infill(self) -> bool:
        """Whether the model knows the infilling format."""
        return self.tokenizer is not None and self.tokenizer.can_infill

    async def read(self, request: Request, kind: type[T]) -> T:
        """Return a request's body; raises as `read_body`."""
        request.state.known = frozenset(kind.__struct_fields__)
        settings = self.settings
        return await read_body(
            request, kind, most=settings.max_body_bytes, timeout_s=settings.body_timeout_s
        )

    def find(self, name: str | None) -> tuple[str, LoraAdapter | None]:
        """Return a model's name, as answers have it, and its adapter.

        Raises:
            ApiError: 404.
        """
        if not name or name in self.names:
            return name or self.names[0], None
        if name in self.settings.adapters:
            return name, self.settings.adapters[name]
        known = ", ".join((*self.names, *self.settings.adapters))
        raise ApiError(
            404,
            f"the model {name!r:.100} is not served here; use {known}",
            param="model",
            code="model_not_found",
        )

    def check_length(self, token_ids: Sequence[int], *, generates: bool) -> None:
        """Raise ApiError 400 if a prompt leaves no room for a token that it is to have."""
        most = self.max_model_len - generates
        if len(token_ids) > most:
            raise invalid(
                f"the prompt has {len(token_ids)} tokens; this model reads at most {most}"
                f"{' and one to generate' if generates else ''}",
                "prompt",
                code="context_length_exceeded",
                n_prompt_tokens=len(token_ids),
                n_ctx=self.max_model_len,
            )

    async def start(
        self,
        prompts: Sequence[tuple[Sequence[int], SamplingParams]],
        *,
        adapter: LoraAdapter | None = None,
        wanted: Sampling | None = None,
    ) -> Generation:
        """Queue the prompts of a request.

        Args:
            prompts: (token ids, parameters) each.
            adapter: applied to all.
            wanted: has the priority and the salt of the prefix cache; None: neither.

        Raises:
            ApiError: 400: too long; 503: too many requests.
            ValueError, TypeError, QueueFullError, RuntimeError: of the engine; nothing is queued.
        """
        if self.engine.num_unfinished + len(prompts) > self.settings.max_requests:
            self.observed.rejections["requests"] += 1
            waiting = self.engine.engine.scheduler.backlog_seconds()
            raise unavailable(f"{self.engine.num_unfinished} requests are under way", waiting)
        for token_ids, params in prompts:
            self.check_length(token_ids, generates=params.max_tokens != 0)
        options: dict[str, Any] = {"adapter": adapter}
        if wanted is not None:
            options["priority"] = wanted.priority or 0
            options["cache_salt"] = cache_salt(wanted.cache_salt)
        generation = Generation(self.engine, self.observed)
        try:
            for token_ids, params in prompts:
                await generation.add(f"serve-{next(self._numbers)}", token_ids, params, options)
        except BaseException as error:
            generation.abort()
            if isinstance(error, QueueFullError):
                self.observed.rejections["tokens"] += 1
            raise
        return generation

    def abort(self) -> None:
        """End what is unfinished: answers and streams end with what they have."""
        self.engine.abort_all()

    async def close(self) -> None:
        """End what is unfinished."""
        await self.engine.close()


def _defaults(llm: LLM) -> SamplingParams:
    """Return what requests without parameters get: the checkpoint's, or OpenAI's temperature 1."""
    params = llm.default_params()
    return replace(params, temperature=1.0) if params.is_greedy else params


def answer_id(prefix: str, request: Request, given: str | None) -> str:
    """Return the id of an answer: the request's own, else that of its header.

    Raises:
        ApiError: 400: too long.
    """
    if given is not None and len(given) > _MAX_REQUEST_ID:
        raise invalid(f"request_id has at most {_MAX_REQUEST_ID} characters", "request_id")
    return f"{prefix}-{given or request.scope.get('request_id') or secrets.token_hex(16)}"
