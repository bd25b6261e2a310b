"""This runtime beside others: `peer_rows` compares, `pairs` takes turns.

`peer_*.py` drive the others; `pairs.Peer` starts each as a script, by an interpreter that has the
runtime. They import nothing but each other, as plain files of one folder.
"""
