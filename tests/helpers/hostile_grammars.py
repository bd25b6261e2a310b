"""Specifications made to exhaust time or memory; run as a script, with a tokenizer.model.

Each must be refused, or compiled and followed for a while, in MAX_MB of memory and MAX_SECONDS of
this process's own time, for the grammar and for any one token.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator

import numpy as np

from codellama_rt.engine.grammar import Grammar, Vocabulary
from codellama_rt.engine.structured_outputs import StructuredOutputs
from codellama_rt.text.tokenizer import load_tokenizer

MAX_MB, MAX_SECONDS = 500, 60.0
INTEGER = {"type": "integer"}


def _ends_in(count: int) -> str:
    """A pattern whose automaton has 2 ** count states."""
    return f"(a|b)*a(a|b){{{count}}}"


def schemas() -> Iterator[dict | str]:
    """JSON schemas."""
    yield '{"properties":{"a":' * 90 + "{}" + "}}" * 90
    yield {"enum": [f"v{i}" for i in range(20_000)]}
    yield {"const": "x" * 200_000}
    yield {"type": "array", "minItems": 10**9, "maxItems": 10**9, "items": INTEGER}
    nested = INTEGER
    for _ in range(5):
        nested = {"type": "array", "maxItems": 1000, "items": nested}
    yield nested
    yield {"type": "string", "minLength": 10**9}
    yield {"type": "string", "minLength": 10**5, "maxLength": 10**5}
    yield {"type": "object", "minProperties": 10**9}
    yield {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(5000)}}
    yield {"type": "array", "prefixItems": [INTEGER] * 10_000}
    yield {
        "allOf": [
            {"anyOf": [{"properties": {f"p{i}_{j}": INTEGER}} for j in range(6)]} for i in range(12)
        ]
    }
    twice = {"allOf": [{"$ref": "#/$defs/d{}"}, {"$ref": "#/$defs/d{}"}]}
    steps = {f"d{i}": json.loads(json.dumps(twice).replace("{}", f"{i + 1}")) for i in range(30)}
    yield {"$ref": "#/$defs/d0", "$defs": steps | {"d30": {"properties": {"a": INTEGER}}}}
    yield {"type": "integer", "multipleOf": 999_983, "minimum": 0, "maximum": 10**18}
    yield {"allOf": [{"multipleOf": 999_983, **INTEGER}, {"multipleOf": 999_979, **INTEGER}]}
    yield {"type": "string", "allOf": [{"pattern": f"^{_ends_in(i)}$"} for i in range(10, 30)]}
    conflicts = [{"pattern": f"^{_ends_in(i)}$"} for i in (10, 11, 12, 13)]
    yield {"properties": {f"q{i}": {"type": "string", "allOf": conflicts} for i in range(100)}}


def regexes() -> Iterator[str]:
    """Regular expressions."""
    yield "a{1,100000}"
    yield "((a{1,1000}){1,1000}){1,1000}"
    yield _ends_in(25)
    yield "(a?){5000}a{5000}"
    yield "(.*a.*b.*c.*d.*){20}"
    yield r"(\p{L}|\p{N}|[^a]){1,100000}"
    yield "(" * 5000 + "a" + ")" * 5000
    yield "|".join(f"(x*{i}.*y{i})" for i in range(2000))


def grammars() -> Iterator[str]:
    """Grammars of both notations."""
    yield 'start: "a"~1..1000000000'
    yield 'start: a\na: a a | a a a | "x" | '
    twice = "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(60))
    yield f'start: A0\n{twice}\nA60: "x"'
    yield f'{twice.lower().replace("a0:", "start:")}\na60: "x"'
    yield "start: " + "(" * 5000 + '"a"' + ")" * 5000
    yield "start: A\nA: " + " & ".join(f"/{_ends_in(i)}/" for i in range(8, 28))
    yield f"start: A\nA: ~/{_ends_in(22)}/"
    yield "start: " + " ".join(f'("x{i}")?' for i in range(1000))
    yield f'start: /a/ %regex {{"substring_chars": "{"ab" * 50_000}"}}'
    yield "root ::= " + "(" * 20_000 + '"a"' + ")" * 20_000
    yield "root ::= " + " | ".join(f'"a{i}"' for i in range(20_000))
    yield 'root ::= "a"{1000000000}'
    yield "root ::= [" + "a-z" * 50_000


def follow(vocabulary: Vocabulary, wanted: StructuredOutputs) -> Iterator[str]:
    """Compile, and take 200 tokens; a message after each call."""
    try:
        state = Grammar(vocabulary, wanted).start([2], drops_lead=False)
    except ValueError as error:
        yield f"refused: {error}"
        return
    yield "compiled"
    rng = np.random.default_rng(0)
    for _ in range(200):
        try:
            mask = state.mask()
            ids = np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little"))
            yield "a mask"
            if not len(ids[ids != 2]):
                return
            state.accept(int(rng.choice(ids[ids != 2])))
            yield "a token"
        except RuntimeError as error:
            yield f"ended: {error}"
            return


def main() -> None:
    """Try all of them, and tell how each one went."""
    tokenizer = load_tokenizer(sys.argv[1])
    vocabulary = Vocabulary(tokenizer, tokenizer.vocab_size)
    tried = [StructuredOutputs(json=schema) for schema in schemas()]
    tried += [StructuredOutputs(regex=regex) for regex in regexes()]
    tried += [StructuredOutputs(grammar=grammar) for grammar in grammars()]
    tried.append(StructuredOutputs(choice=[f"the choice {i}" for i in range(4096)]))
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    for wanted in tried:
        slowest, first, last = 0.0, "", ""
        began = time.process_time()
        for last in follow(vocabulary, wanted):
            first = first or last
            slowest = max(slowest, time.process_time() - began)
            began = time.process_time()
        megabytes = (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) // 1024
        name = getattr(wanted, wanted.kind)
        print(f"{name!s:.40} | {slowest:.2f} s, {megabytes} MB | {first:.80} | {last:.80}")
        assert slowest < MAX_SECONDS, "took too long"
        assert megabytes < MAX_MB, "took too much memory"


if __name__ == "__main__":
    main()
