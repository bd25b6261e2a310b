"""The loop of every peer: orders on stdin, answers on stdout, one line of JSON each."""

from __future__ import annotations

import json
import os
import sys


def serve(peer: object) -> None:
    """Run one order {"do": method, ...arguments} after another; exceptions become error answers.

    Whatever a library prints goes to stderr, so that it cannot mix with the answers.
    """
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    for line in sys.stdin:
        order = json.loads(line)
        try:
            answer = getattr(peer, order.pop("do"))(**order)
        except Exception as error:  # any error of the peer is reported by the other side
            answer = {"error": f"{type(error).__name__}: {error}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()
