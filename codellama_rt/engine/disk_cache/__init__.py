"""The prefix cache on disk: a folder of blocks, written behind the steps and read beside them."""
