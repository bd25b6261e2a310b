"""Scripts that drive other runtimes, run by an interpreter that has them: `pairs.Peer` starts them.

They import nothing of this package but each other, as plain files of one folder.
"""
