"""Cases, checks, timings and rows for `codellama-rt bench` and the files of `benchmarks/`.

`op_rows` times operators, `generate_rows` a whole model. A row is a flat dict, reported beside the
limits measured in the same run (`limits`).
"""
