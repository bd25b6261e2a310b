"""Serve a model by replicas of Ray Serve, on one machine or many; they share one prefix cache.

    pip install "ray[serve]"
    python examples/replicas/with_ray_serve.py MODEL --prefix-cache-dir DIR

Clients use http://127.0.0.1:8000. On a cluster, start it on a machine of it (`ray start --head`
there, `ray start --address` on the others), with paths that all of them have.
"""

import argparse
import signal

import ray
from ray import serve


def deployment(options: argparse.Namespace) -> serve.Application:
    """Return the replicas; each one opens the model, and makes an application of its own."""

    def application():
        from codellama_rt import LLM
        from codellama_rt.serve import Settings, create_app

        llm = LLM(
            options.model,
            num_threads=options.threads,
            max_model_len=options.max_model_len,
            kv_memory=options.kv_memory,
            prefix_cache_dir=options.prefix_cache_dir,
        )
        return create_app(llm, Settings(names=("codellama",), metrics_prefix="vllm"))

    configured = serve.deployment(
        num_replicas=options.replicas,
        max_ongoing_requests=1024,  # the engine queues them itself
        ray_actor_options={"num_cpus": options.threads or 0.1},
    )
    return configured(serve.ingress(application)()).bind()


def main() -> None:
    """Start the replicas, and wait for SIGTERM or Ctrl-C."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefix-cache-dir", required=True)
    parser.add_argument("--threads", type=int, help="of each replica; none: all CPUs")
    parser.add_argument("--max-model-len", type=int)
    parser.add_argument("--kv-memory")
    options = parser.parse_args()
    ray.init(include_dashboard=False)
    signal.signal(signal.SIGTERM, signal.default_int_handler)  # Ray's would end in an abort
    try:
        serve.start(http_options={"host": "127.0.0.1", "port": options.port})
        serve.run(deployment(options))
        print(f"serving at http://127.0.0.1:{options.port}", flush=True)
        signal.pause()
    except KeyboardInterrupt:
        pass
    finally:
        serve.shutdown()
        ray.shutdown()


if __name__ == "__main__":
    main()
