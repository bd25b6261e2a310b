"""The HTTP server: OpenAI's, vLLM's and llama.cpp's endpoints over an `AsyncEngine`.

The way of a request:

    guard.py        its id, its key, the limits; the last resort for errors
    app.py          the route
    body.py         its JSON, as a type of protocol.py; a 400 names the field
    completions.py, chat.py, infilling.py, llama_cpp.py
                    what the endpoint makes of it: token ids, and with fields.py SamplingParams
    generation.py   the engine's outputs, until they end or the client leaves
    event_stream.py or one answer in JSON

`create_app` makes an ASGI application for any server; `codellama-rt serve` runs it with uvicorn
(`server.py`).
"""

from codellama_rt.serve.app import create_app
from codellama_rt.serve.settings import Settings

__all__ = ["Settings", "create_app"]
