"""What whoever runs a server decides."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from codellama_rt.model.lora import LoraAdapter


@dataclass(frozen=True)
class Settings:
    """Settings of `create_app`.

    Attributes:
        names: of the model, as clients may call it; the first is the one that answers carry.
            Without any it is the folder's name.
        adapters: by name: LoRA adapters that clients may ask for as models of their own.
        api_keys: keys of which a client must send one; without any, everyone is served.
        open_metrics: whether /metrics is served without a key.
        allowed_origins: of web pages that a browser may let call the server; "*": all.
        suffix_first: the order of infilling prompts, unless a request says: SPM, else PSM.
        chat_template: as for `LLM.chat`.
        metrics_prefix: of the names of metrics.
        stream_interval_s: between two events of a stream, except the first and the last; what is
            computed meanwhile is joined. 0: an event per step.
        keep_alive_s: after so many seconds without an event a stream gets a comment.
        body_timeout_s: how long a client may take to send a body.
        max_body_bytes: of a request.
        max_prompts: of a request to /v1/completions.
        max_requests: unfinished generations; one more gets 503.
    """

    names: tuple[str, ...] = ()
    adapters: Mapping[str, LoraAdapter] = field(default_factory=dict)
    api_keys: tuple[str, ...] = ()
    open_metrics: bool = False
    allowed_origins: tuple[str, ...] = ()
    suffix_first: bool = False
    chat_template: str | None = None
    metrics_prefix: str = "codellama_rt"
    stream_interval_s: float = 0.02
    keep_alive_s: float = 10.0
    body_timeout_s: float = 60.0
    max_body_bytes: int = 4 * 2**20
    max_prompts: int = 256
    max_requests: int = 1024
