"""Programs around the runtime: benchmarks, evaluation, conversion, limits of the machine."""
