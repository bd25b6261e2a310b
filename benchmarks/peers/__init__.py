"""This runtime beside others: `peer_rows` compares, `pairs` alternates between the two.

`peer_*.py` drive the other runtimes; `pairs.Peer` starts each as a script, with an interpreter that
has the runtime. They import only each other, as plain files of one folder.
"""
