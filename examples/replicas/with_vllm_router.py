"""Serve a model by several processes behind vllm-router; they share one prefix cache on disk.

    pip install vllm-router
    python examples/replicas/with_vllm_router.py MODEL --prefix-cache-dir DIR

Clients use http://127.0.0.1:8000. A process that ends is started again, and finds the prefixes that
it, or another one, has computed. Options that are not known here go to `codellama-rt serve`.
"""

import argparse
import signal
import subprocess
import sys
import time

ROUTER = (
    "vllm-router --policy cache_aware --health-check-interval-secs 2 "
    "--health-failure-threshold 1 --health-success-threshold 1 --cb-failure-threshold 1 "
    "--cb-timeout-duration-secs 5 --worker-startup-timeout-secs 3600"
)


def keep_running(commands: dict[str, list[str]]) -> None:
    """Run commands until SIGTERM or Ctrl-C, and start each one again that ends.

    Args:
        commands: by a name for people.
    """
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    processes: dict[str, subprocess.Popen] = {}
    try:
        while True:
            for name, command in commands.items():
                if name not in processes or processes[name].poll() is not None:
                    processes[name] = subprocess.Popen(command)
                    print(f"{name}: process {processes[name].pid}", flush=True)
            time.sleep(1)
    except KeyboardInterrupt:
        pass
    finally:
        for process in processes.values():
            process.terminate()  # each answers what it has begun
        for process in processes.values():
            process.wait()


def main() -> None:
    """Start the servers, and a router at the port before theirs."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("model")
    parser.add_argument("--replicas", type=int, default=2)
    parser.add_argument("--port", type=int, default=8000)
    parser.add_argument("--prefix-cache-dir", required=True)
    options, others = parser.parse_known_args()
    commands = {}
    for port in range(options.port + 1, options.port + 1 + options.replicas):
        command = [sys.executable, "-m", "codellama_rt", "serve", options.model]
        command += ["--port", str(port), "--metrics-prefix", "vllm"]
        command += ["--prefix-cache-dir", options.prefix_cache_dir, *others]
        commands[f"http://127.0.0.1:{port}"] = command
    router = [*ROUTER.split(), "--host", "127.0.0.1", "--port", str(options.port)]
    keep_running({**commands, "router": [*router, "--worker-urls", *commands]})


if __name__ == "__main__":
    main()
