"""What `codellama-rt bench` and the files of `benchmarks/` run: cases, checks, timings, rows.

`op_rows` times operators, `generate_rows` a whole model. A row is a flat dict; it stands beside the
limits that were measured in the same run (`limits`).
"""
