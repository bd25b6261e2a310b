"""Programs built on the runtime: benchmarks, evaluation, conversion, limits of the machine."""
