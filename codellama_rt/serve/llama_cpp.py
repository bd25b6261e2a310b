"""llama.cpp's forms: POST /completion, GET /props, and the answers that /infill shares."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from starlette.requests import Request

from codellama_rt.engine.output import Output
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.serve.answers import JSONAnswer
from codellama_rt.serve.completions import Encoded, checked_prompts
from codellama_rt.serve.errors import ApiError
from codellama_rt.serve.event_stream import EventStream
from codellama_rt.serve.fields import llama_cpp_params
from codellama_rt.serve.generation import Gained, Generation
from codellama_rt.serve.line_rules import LineRules
from codellama_rt.serve.long_work import beside_loop
from codellama_rt.serve.protocol import LlamaCppCompletionRequest, LlamaCppSampling
from codellama_rt.serve.service import Service
from codellama_rt.serve.token_texts import TokenTexts, likelihood


async def completion(request: Request) -> Any:
    """Continue a text, or fill in where it is an infilling template."""
    service: Service = request.app.state.service
    wanted = await service.read(request, LlamaCppCompletionRequest)
    _, adapter = service.find(wanted.model)
    defaults = replace(service.defaults, max_tokens=None)
    params = llama_cpp_params(wanted, defaults, logprobs=wanted.n_probs or None)
    [prompt] = checked_prompts(wanted.prompt, 1)
    encoded = await beside_loop(len(prompt), lambda: _encode(service, prompt, params))
    generation = await service.start([encoded], adapter=adapter)
    return await answer_llama_cpp(request, service, wanted, generation, encoded)


def _encode(service: Service, prompt: str | list[int], params: SamplingParams) -> Encoded:
    return service.prompts.completion(prompt, params)


async def answer_llama_cpp(
    request: Request,
    service: Service,
    wanted: LlamaCppSampling,
    generation: Generation,
    prompt: Encoded,
) -> Any:
    """Return the answer to a request in llama.cpp's form, streamed or whole."""
    form = LlamaCppForm(service, wanted, generation, prompt)
    if wanted.stream:
        return EventStream(
            generation,
            form,
            service.settings.keep_alive_s,
            ending=b"",
            with_progress=bool(wanted.return_progress),
            on_error=_error,
        )
    async with generation.watching(request.receive):
        while gained := await generation.take():
            form.add(gained)
    return JSONAnswer(form.selected())


def _error(error: ApiError) -> Any:
    return {"error": {**error.body["error"], "code": error.status}}


class LlamaCppForm:
    """Make the answers to one request; `n_indent` and `t_max_predict_ms` end it here."""

    def __init__(
        self, service: Service, wanted: LlamaCppSampling, generation: Generation, prompt: Encoded
    ) -> None:
        """Start before the first output."""
        self._service, self._wanted, self._generation = service, wanted, generation
        self._prompt_ids, self._params = prompt
        self._texts = TokenTexts(service.tokenizer)
        self._rules = LineRules(wanted.n_indent or 0, wanted.t_max_predict_ms or 0)
        self._output: Output | None = None  # the last one
        self._content: list[str] = []
        self._token_ids: list[int] = []
        self._probabilities: list[Any] = []
        self._num_sent = 0  # tokens of the events so far
        self._is_over = False

    def add(self, gained: Gained) -> str:
        """Take what has come, and return the text that counts."""
        if self._is_over or not gained:
            return ""
        [output] = gained.values()
        self._output = output
        text, ends = self._rules.take(output.text)
        if output.finished and not ends:
            text += self._rules.flush()
        if ends:
            self._is_over = True
            self._generation.abort()
        self._content.append(text)
        self._token_ids += output.token_ids
        self._probabilities += self._probabilities_of(output)
        return text

    def chunks(self, gained: Gained) -> list[Any]:
        """Return the event of a text, with all tokens since the event before."""
        text = self.add(gained)
        return [{"index": 0, "content": text, **self._unsent(), "stop": False}] if text else []

    def last(self) -> list[Any]:
        """Return the last event: the counts, the times, no text, and tokens that gave none."""
        return [{**self.whole(), "content": "", **self._unsent()}]

    def _unsent(self) -> dict[str, Any]:
        first, self._num_sent = self._num_sent, len(self._token_ids)
        found: dict[str, Any] = {"tokens": self._token_ids[first:]}
        if self._wanted.n_probs:
            found["completion_probabilities"] = self._probabilities[first:]
        return found

    def progress(self) -> Any:
        """Return how far the prompt is, or None once it is computed."""
        progress = self._generation.progress()
        if progress is None:
            return None
        event = {"index": 0, "content": "", "tokens": [], "stop": False}
        return {**event, "prompt_progress": progress}

    def whole(self) -> dict[str, Any]:
        """Return the answer as of now."""
        output, params = self._output, self._params
        answer = {
            "index": 0,
            "content": "".join(self._content),
            "tokens": self._token_ids if self._wanted.return_tokens else [],
            "id_slot": -1,
            "stop": True,
            "model": self._service.names[0],
            "tokens_predicted": len(self._token_ids),
            "tokens_evaluated": len(self._prompt_ids),
            "generation_settings": generation_settings(self._service, params),
            "prompt": "",
            "has_new_line": "\n" in "".join(self._content),
            "truncated": False,
            "stop_type": self._stop_type(),
            "stopping_word": output.stop_reason
            if output and isinstance(output.stop_reason, str)
            else "",
            "tokens_cached": self._generation.num_cached_tokens + len(self._token_ids),
            "timings": self._timings(),
        }
        if self._wanted.n_probs:
            answer["completion_probabilities"] = self._probabilities
        return answer

    def selected(self) -> dict[str, Any]:
        """Return the answer, or of it the fields that are asked for; slashes lead inside."""
        answer, fields = self.whole(), self._wanted.response_fields
        if not fields:
            return answer
        found = {}
        for field in fields:
            value: Any = answer
            for name in field.split("/"):
                value = value.get(name) if isinstance(value, dict) else None
            if value is not None:
                found[field] = value
        return found

    def _stop_type(self) -> str:
        output = self._output
        if self._is_over or output is None or output.finish_reason == "length":
            return "limit"
        if output.finish_reason == "stop":
            return "word" if isinstance(output.stop_reason, str) else "eos"
        return "none"

    def _timings(self) -> dict[str, float]:
        output = self._output
        times = None if output is None else output.metrics
        prompt_n = 0 if times is None else times.prompt_tokens - times.cached_tokens
        prompt_ms = 0.0 if times is None else 1e3 * times.prefill_seconds
        computing = 0.0 if times is None else times.total_seconds - times.queue_seconds
        predicted_ms = 1e3 * computing - prompt_ms
        num_predicted = len(self._token_ids)
        return {
            "prompt_n": prompt_n,
            "prompt_ms": prompt_ms,
            "prompt_per_token_ms": prompt_ms / max(1, prompt_n),
            "prompt_per_second": 1e3 * prompt_n / prompt_ms if prompt_ms > 0 else 0.0,
            "predicted_n": num_predicted,
            "predicted_ms": predicted_ms,
            "predicted_per_token_ms": predicted_ms / max(1, num_predicted),
            "predicted_per_second": 1e3 * num_predicted / predicted_ms if predicted_ms > 0 else 0.0,
        }

    def _probabilities_of(self, output: Output) -> list[Any]:
        rows = zip(output.token_ids, output.logprobs or [], strict=False)
        return [
            {
                **self._named(token_id, likelihood(row[token_id])),
                "top_logprobs": [self._named(i, likelihood(one)) for i, one in row.items()],
            }
            for token_id, row in rows
        ]

    def _named(self, token_id: int, logprob: float) -> dict[str, Any]:
        piece = self._texts.bytes(token_id)
        text = piece.decode("utf-8", "replace")
        return {"id": token_id, "token": text, "bytes": list(piece), "logprob": logprob}


def generation_settings(service: Service, params: SamplingParams) -> dict[str, Any]:
    """Return parameters by llama.cpp's names."""
    return {
        "n_ctx": service.max_model_len,
        "n_predict": -1 if params.max_tokens is None else params.max_tokens,
        "model": service.names[0],
        "seed": params.seed if params.seed is not None else 2**32 - 1,
        "temperature": params.temperature,
        "top_k": params.top_k,
        "top_p": params.top_p,
        "min_p": params.min_p,
        "repeat_penalty": params.repetition_penalty,
        "presence_penalty": params.presence_penalty,
        "frequency_penalty": params.frequency_penalty,
        "stop": list(params.stop),
        "ignore_eos": params.ignore_eos,
    }


async def props(request: Request) -> JSONAnswer:
    """Describe the server."""
    service: Service = request.app.state.service
    defaults = generation_settings(service, service.defaults)
    return JSONAnswer(
        {
            "default_generation_settings": {"n_ctx": service.max_model_len, "params": defaults},
            "total_slots": service.engine.engine.scheduler.max_num_running,
            "model_alias": service.names[0],
            "model_path": service.names[0],
            "chat_template": service.chat_template or "",
            "modalities": {"vision": False, "audio": False},
        }
    )
