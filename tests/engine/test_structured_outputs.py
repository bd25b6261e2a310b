"""Structured outputs: what is accepted, what is allowed next, and that outputs have their form."""

import codecs
import json
import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import jsonschema
import numpy as np
import pytest
from helpers.faults import Faults
from helpers.paged_fakes import PROMPT, FakeKVCache, HashModel, drain, drain_interrupted, engine_of
from helpers.random_schemas import random_schema
from helpers.speculating import propose_right_and_wrong
from helpers.tokenizer_files import bpe_fields, gguf_file, model_file

from codellama_rt.engine import grammar as grammars
from codellama_rt.engine.engine import Engine
from codellama_rt.engine.grammar import MAX_GRAMMARS, Grammar, Grammars, Vocabulary
from codellama_rt.engine.sampling_params import SamplingParams
from codellama_rt.engine.structured_outputs import MAX_CHARACTERS, StructuredOutputs
from codellama_rt.text.tokenizer import load_tokenizer

ROWS = 512  # of the model: more than either vocabulary has tokens
ANYTHING = StructuredOutputs(regex="(.|\n)*")
SHORT = {"type": "object", "properties": {"n": {"type": "integer", "minimum": 0, "maximum": 99}},
         "required": ["n"], "additionalProperties": False}  # fmt: skip


@pytest.fixture(scope="module", params=["sentencepiece", "bpe"])
def tokenizer(request, tmp_path_factory):
    folder = tmp_path_factory.mktemp(request.param)
    file = gguf_file(folder, bpe_fields()) if request.param == "bpe" else model_file(folder)
    return load_tokenizer(file, ROWS)


@pytest.fixture(scope="module")
def vocabulary(tokenizer):
    return Vocabulary(tokenizer, ROWS)


def ids_of(mask):
    return np.flatnonzero(np.unpackbits(mask.view(np.uint8), bitorder="little")).tolist()


def walk(tokenizer, grammar, seed, end_id, max_tokens=200):
    """Tokens drawn at random among those allowed, up to the end; None: it did not come."""
    rng, state, ids = np.random.default_rng(seed), grammar.start([end_id], drops_lead=False), []
    while len(ids) < max_tokens:
        token_id = int(rng.choice(ids_of(state.mask())))
        if token_id == end_id:
            return ids
        state.accept(token_id)
        ids.append(token_id)
    return None


def text_of(tokenizer, ids):
    return b"".join(map(tokenizer.token_bytes, ids)).decode()


def make_engine(tokenizer, **options):
    model = HashModel(vocab_size=ROWS, eos_token_ids=(tokenizer.eos_id,))
    return Engine(model, FakeKVCache(256, 16), tokenizer, max_model_len=700, **options)


def params_of(wanted, **options):
    return SamplingParams(
        **{"max_tokens": 600, "temperature": 1.0, "seed": 1, "structured_outputs": wanted} | options
    )


def finish(tokenizer, params, prompt=PROMPT):
    engine = make_engine(tokenizer)
    engine.add_request("r", prompt, params)
    return drain(engine)["r", 0]


# What is accepted


@pytest.mark.parametrize(
    ("given", "error", "words"),
    [
        ({}, ValueError, "give exactly one of json, regex, choice, grammar, json_object, got none"),
        ({"json_object": False}, ValueError, "got none"),
        ({"regex": "a", "choice": ["a"]}, ValueError, "got regex and choice"),
        ({"json": 3}, TypeError, "json must be a JSON schema as a mapping or a str, got int"),
        ({"json": "{"}, ValueError, "json must be a JSON schema: Expecting property name"),
        ({"json": "[1]"}, ValueError, r"json must hold an object \(a schema\), got list"),
        ({"json": "true"}, ValueError, "got bool"),
        ({"json": {"minimum": float("nan")}}, ValueError, "json must be a JSON schema"),
        ({"json": {"enum": [{1}]}}, TypeError, "not JSON serializable"),
        ({"json": '{"items":' * 10**4 + "1" + "}" * 10**4}, ValueError, "nested so deeply"),
        ({"json": "[" * 10**5}, ValueError, "nested so deeply"),
        ({"json": {"title": "x" * MAX_CHARACTERS}}, ValueError, f"at most {MAX_CHARACTERS}"),
        ({"regex": 1}, TypeError, "regex must be a str, got int"),
        ({"regex": ""}, ValueError, "regex must not be empty"),
        ({"regex": "\ud800"}, ValueError, "half of a surrogate pair"),
        ({"regex": "a" * (MAX_CHARACTERS + 1)}, ValueError, f"at most {MAX_CHARACTERS}"),
        ({"choice": "ab"}, TypeError, "choice must be a list of str, got str"),
        ({"choice": ["a", 1]}, TypeError, r"choice\[1\] must be a str, got int"),
        ({"choice": []}, ValueError, "choice must hold 1 to 4096 strings, got 0"),
        ({"choice": ["a"] * 5000}, ValueError, "choice must hold 1 to 4096 strings"),
        ({"choice": [""]}, ValueError, "a string that is not empty"),
        ({"choice": ["x" * 10**6]}, ValueError, f"at most {MAX_CHARACTERS}"),
        ({"grammar": b"a"}, TypeError, "grammar must be a str, got bytes"),
        ({"json_object": 1}, TypeError, "json_object must be a bool or None, got int"),
    ],
)
def test_what_is_refused(given, error, words):
    with pytest.raises(error, match=words):
        StructuredOutputs(**given)


def test_equal_specifications_are_one():
    schema = {"type": "object", "properties": {"b": {}, "a": {}}}
    wanted = StructuredOutputs(json=schema)
    assert wanted == StructuredOutputs(json=json.dumps(schema, indent=2))
    assert len({wanted, StructuredOutputs(json=dict(schema))}) == 1
    assert list(json.loads(wanted.json)["properties"]) == ["b", "a"]
    assert (wanted.kind, StructuredOutputs(json={}).kind) == ("json", "json")
    assert StructuredOutputs(choice=["a"]).choice == ("a",)
    with pytest.raises(TypeError, match="structured_outputs must be StructuredOutputs or None"):
        SamplingParams(structured_outputs={"regex": "a"})


@pytest.mark.parametrize(
    ("given", "words"),
    [
        ({"regex": "a("}, "regex cannot be used"),
        ({"regex": "a(?=b)"}, "look-ahead"),
        ({"json": {"type": "nope"}}, "json cannot be used: Invalid type: nope"),
        ({"json": {"not": {}}}, "Unimplemented keys"),
        ({"json": {"$ref": "http://127.0.0.1:9/x"}}, "does not fetch"),
        ({"json": {"$ref": "file:///etc/passwd"}}, "does not fetch"),
        ({"json": {"$ref": "#"}}, "json cannot be used: NoExtension"),
        ({"json": {"type": "string", "minLength": 3, "maxLength": 2}}, "Unsatisfiable"),
        ({"grammar": "start: other"}, "grammar cannot be used"),
        ({"grammar": 'root ::= ("a"'}, "grammar cannot be"),
        ({"grammar": '{"grammars": [{"regex": "a"}]}'}, "grammar cannot be"),
    ],
)
def test_what_cannot_be_compiled(vocabulary, given, words):
    with pytest.raises(ValueError, match=words) as caught:
        Grammar(vocabulary, StructuredOutputs(**given))
    assert len(str(caught.value)) < 500
    assert "\n" not in str(caught.value)


# What is allowed next


def test_every_token_with_a_text_is_allowed_and_no_other(tokenizer, vocabulary):
    def begins_utf8(piece):
        try:
            codecs.getincrementaldecoder("utf-8")().decode(piece)
        except UnicodeDecodeError:
            return False
        return bool(piece)

    pieces = {i: tokenizer.token_bytes(i) for i in range(ROWS)}
    expected = {i for i, piece in pieces.items() if piece is not None and begins_utf8(piece)}
    state = Grammar(vocabulary, ANYTHING).start([tokenizer.eos_id], drops_lead=False)
    assert set(ids_of(state.mask())) == expected | {tokenizer.eos_id}
    assert not expected & tokenizer.special_ids
    assert max(expected) < tokenizer.vocab_size < ROWS


@pytest.mark.parametrize(
    "regex",
    [
        "a",
        "( a){1,3}b",
        "[日本語]{1,4}",
        "(😀|👍🏽|é)+",
        " def [a-z]{1,5}:\n    return x",
        "<tab>?</s>",
    ],
)
def test_tokens_spell_what_the_grammar_says(tokenizer, vocabulary, regex):
    grammar = Grammar(vocabulary, StructuredOutputs(regex=regex))
    texts = [text_of(tokenizer, walk(tokenizer, grammar, i, tokenizer.eos_id)) for i in range(20)]
    assert all(re.fullmatch(regex, text) for text in texts)


def test_choices_are_exact(tokenizer, vocabulary):
    choices = ["yes", " no", 'a"b\\', "c\nd\te", "/x/", "😀", "<|end|></s>", "ye", ""]
    grammar = Grammar(vocabulary, StructuredOutputs(choice=choices))
    found = {text_of(tokenizer, walk(tokenizer, grammar, i, tokenizer.eos_id)) for i in range(200)}
    assert found == set(choices)


@pytest.mark.parametrize(
    "grammar",
    ['root ::= "é" [0-9]{2} ("," [0-9]{2})? "x"', 'start: "é" N ("," N)? "x"\nN: /[0-9]{2}/'],
)
def test_grammars_of_both_notations(tokenizer, vocabulary, grammar):
    grammar = Grammar(vocabulary, StructuredOutputs(grammar=grammar))
    for seed in range(10):
        text = text_of(tokenizer, walk(tokenizer, grammar, seed, tokenizer.eos_id))
        assert re.fullmatch(r"é\d{2}(,\d{2})?x", text)


def test_an_end_is_allowed_where_the_output_is_complete_and_is_never_text(tokenizer, vocabulary):
    letters = {i for i in range(ROWS) if tokenizer.token_bytes(i) in (b"a", b"b")}
    a, b = (next(i for i in letters if tokenizer.token_bytes(i) == x) for x in (b"a", b"b"))
    ends = {tokenizer.eos_id, b}
    state = Grammar(vocabulary, StructuredOutputs(regex="[ab]{2,3}")).start(ends, drops_lead=False)
    allowed = []
    for token_id in (a, a, a, b):
        allowed.append(set(ids_of(state.mask())) & (letters | ends))
        state.accept(token_id)
    assert allowed == [letters - ends, letters - ends, letters | ends, ends]


def test_a_token_that_loses_its_space_cannot_begin(tokenizer):
    """After the begin token alone the text starts without the space of its first token."""
    wanted = StructuredOutputs(regex=" ?(def|if|return) ?x")
    prompt = [tokenizer.bos_id]
    for seed in range(8):
        total = finish(tokenizer, params_of(wanted, seed=seed), prompt)
        assert re.fullmatch(wanted.regex, total.text)
        assert total.end == ("stop", tokenizer.eos_id)


def test_a_text_that_the_tokenizer_would_write_in_another_way(tokenizer, monkeypatch):
    """A dummy space in front would make llguidance panic."""
    encode = type(tokenizer).encode_continuation
    for other in (lambda self, text: encode(self, f" {text}"), lambda self, text: [ROWS + 5, 0]):
        monkeypatch.setattr(type(tokenizer), "encode_continuation", other)
        grammar = Grammar(Vocabulary(tokenizer, ROWS), StructuredOutputs(json=SHORT))
        for seed in range(5):
            ids = walk(tokenizer, grammar, seed, tokenizer.eos_id)
            assert 0 <= json.loads(text_of(tokenizer, ids))["n"] <= 99


def test_a_vocabulary_that_cannot_spell_it(tokenizer, monkeypatch):
    whole = type(tokenizer).token_bytes
    monkeypatch.setattr(
        type(tokenizer), "token_bytes", lambda self, i: (whole(self, i) or b"").strip(b"q")
    )
    with pytest.raises(ValueError, match=r"no token spells b'q'|NoExtension"):
        Grammar(Vocabulary(tokenizer, ROWS), StructuredOutputs(regex="qq"))


# Threads


def test_a_prepared_mask_is_the_same(tokenizer, vocabulary):
    grammar = Grammar(
        vocabulary, StructuredOutputs(json={"type": "array", "items": SHORT, "maxItems": 3})
    )
    ids = walk(tokenizer, grammar, 0, tokenizer.eos_id)
    alone, prepared = (grammar.start([tokenizer.eos_id], drops_lead=False) for _ in range(2))
    for token_id in ids:
        prepared.prepare()
        prepared.prepare()
        assert (prepared.mask() == alone.mask()).all()
        alone.accept(token_id)
        prepared.accept(token_id)


def test_a_forked_child_can_go_on(tokenizer, vocabulary):
    grammar = Grammar(
        vocabulary, StructuredOutputs(json={"type": "array", "items": SHORT, "maxItems": 3})
    )
    ids = walk(tokenizer, grammar, 0, tokenizer.eos_id)
    states = [grammar.start([tokenizer.eos_id], drops_lead=False) for _ in range(20)]
    for state in states:
        state.accept(ids[0])
        state.prepare()
    child = os.fork()
    masks = b"".join(state.mask().tobytes() for state in states)
    if child == 0:
        states[0].accept(ids[1])
        states[0].prepare()
        states[0].mask()
        same = masks == states[1].mask().tobytes() * len(states)
        os._exit(0 if same else 1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0
    assert masks == states[1].mask().tobytes() * len(states)


def test_the_last_grammars_are_kept(tokenizer):
    cached = Grammars(tokenizer, ROWS)
    wanted = [StructuredOutputs(regex=f"a{{{i + 1}}}") for i in range(MAX_GRAMMARS + 1)]
    first = cached.get(wanted[0])
    for one in wanted[:-1]:
        cached.get(one)
    assert cached.get(wanted[0]) is first  # and now the youngest
    second = cached.get(wanted[1])
    for one in wanted[2:]:
        cached.get(one)
    assert cached.get(wanted[1]) is second
    assert cached.get(wanted[0]) is not first
    second.is_broken = True
    assert cached.get(wanted[1]) is not second


# In the engine


def test_outputs_of_random_schemas_are_valid(tokenizer):
    """500 of them were tried as well: `schemas=500`."""
    check_schemas(tokenizer, range(25))


def check_schemas(tokenizer, seeds):
    engine, schemas = make_engine(tokenizer), {str(seed): random_schema(seed) for seed in seeds}
    for name, schema in schemas.items():
        engine.add_request(name, PROMPT, params_of(StructuredOutputs(json=schema), seed=int(name)))
    gained = drain(engine)
    checker = jsonschema.Draft202012Validator.FORMAT_CHECKER
    finished = {key: total for key, total in gained.items() if total.end[0] == "stop"}
    for (name, _), total in finished.items():
        value = json.loads(total.text)
        jsonschema.Draft202012Validator(schemas[name], format_checker=checker).validate(value)
    assert {total.end[0] for total in gained.values()} <= {"stop", "length"}
    assert len(finished) >= 0.9 * len(schemas)
    return finished


def test_the_tokens_do_not_depend_on_the_batch(tokenizer):
    forms = [StructuredOutputs(json=random_schema(i)) for i in range(6)]
    alone = [finish(tokenizer, params_of(form, seed=i)).token_ids for i, form in enumerate(forms)]
    engine = make_engine(tokenizer, max_num_batched_tokens=7, max_num_seqs=4)
    for i in range(6):
        wanted = StructuredOutputs(json=random_schema(i))
        engine.add_request(str(i), PROMPT, params_of(wanted, seed=i, n=2))
    gained = drain(engine)
    assert [gained[str(i), 0].token_ids for i in range(6)] == alone
    assert [gained[str(i), 1].token_ids for i in range(6)] != alone


def test_steps_that_raise_anywhere_can_be_repeated(tokenizer):
    def run(faults=None, step=None):
        engine = make_engine(tokenizer, max_num_batched_tokens=8)
        engine.add_request("a", PROMPT, params_of(StructuredOutputs(json=SHORT), n=2))
        engine.add_request("b", PROMPT, params_of(StructuredOutputs(regex="[ab]{9}"), stop=["bb"]))
        return drain_interrupted(engine, faults, step)

    expected = run()
    for at in range(0, 500, 23):
        assert run(Faults(at, KeyboardInterrupt), step=5) == expected


def test_an_error_inside_ends_its_request_alone(tokenizer, monkeypatch):
    """llguidance tells of it only when asked, and its mask has one token."""
    engine, wanted = make_engine(tokenizer), StructuredOutputs(regex="x{3}(abc|d)+")
    engine.add_request("good", PROMPT, params_of(StructuredOutputs(regex="[ab]{20}")))
    engine.add_request("bad", PROMPT, params_of(wanted, n=2))
    engine.step()
    monkeypatch.setattr(grammars._Spelling, "__call__", lambda self, text: [7, 7, 7])
    gained = drain(engine)
    monkeypatch.undo()
    assert gained["bad", 0].end == gained["bad", 1].end == ("error", None)
    assert "structured_outputs: " in str(gained["bad", 0].error)
    assert re.fullmatch("[ab]{19}", gained["good", 0].text)  # after that of the first step
    engine.add_request("after", PROMPT, params_of(wanted, max_tokens=9))
    assert drain(engine)["after", 0].text.startswith("xxx")


def test_stop_strings_lengths_and_other_restrictions(tokenizer):
    wanted = StructuredOutputs(regex="[ab]{40}")
    cut = finish(tokenizer, params_of(wanted, stop=["ba"]))
    assert cut.end == ("stop", "ba")
    short = finish(tokenizer, params_of(wanted, max_tokens=5))
    assert (short.end, len(short.token_ids)) == (("length", None), 5)
    a = next(i for i in range(ROWS) if tokenizer.token_bytes(i) == b"a")
    only = finish(tokenizer, params_of(wanted, allowed_token_ids=[a, tokenizer.eos_id]))
    assert only.text == "a" * 40
    kept = finish(tokenizer, params_of(StructuredOutputs(choice=["a"]), temperature=0.0))
    assert (kept.text, kept.end) == ("a", ("stop", tokenizer.eos_id))


def test_min_tokens_do_not_lengthen_what_is_complete(tokenizer):
    longer = finish(tokenizer, params_of(StructuredOutputs(regex="[ab]+"), min_tokens=20))
    assert len(longer.token_ids) > 20
    failed = finish(tokenizer, params_of(StructuredOutputs(choice=["a"]), min_tokens=20))
    assert failed.end == ("error", None)
    assert re.search("structured_outputs and min_tokens", str(failed.error))


def test_logprobs_are_those_of_the_raw_logits(tokenizer):
    free = finish(tokenizer, params_of(None, max_tokens=1, logprobs=20))
    total = finish(tokenizer, params_of(StructuredOutputs(choice=["a"]), logprobs=20))
    shared = set(free.logprobs[0]) & set(total.logprobs[0])
    assert len(shared) >= 20
    assert all(free.logprobs[0][i] == total.logprobs[0][i] for i in shared)


def test_what_the_engine_refuses(tokenizer, monkeypatch):
    engine = make_engine(tokenizer)
    params = params_of(StructuredOutputs(choice=["a"]), ignore_eos=True)
    with pytest.raises(ValueError, match="need a token that ends the output; leave ignore_eos off"):
        engine.add_request("r", PROMPT, params)
    with pytest.raises(ValueError, match="structured_outputs need a tokenizer"):
        engine_of(tokenizer=False).add_request("r", PROMPT, params)
    with pytest.raises(ValueError, match="structured_outputs: regex cannot be used"):
        engine.add_request("r", PROMPT, params_of(StructuredOutputs(regex="(")))
    with monkeypatch.context() as without:
        without.setitem(sys.modules, "llguidance", None)
        with pytest.raises(ImportError, match=r"install 'codellama_rt\[structured\]'"):
            engine.add_request("r", PROMPT, params_of(StructuredOutputs(choice=["b"])))
    assert not engine.has_unfinished()
    stopped = finish(tokenizer, replace(params, stop_token_ids=[9]))
    assert stopped.end == ("stop", 9)


def test_processors_of_the_engine_come_before_those_of_a_request(tokenizer):
    calls = []

    def of_engine(token_ids, logits):
        calls.append("engine")
        logits[5] = 50.0
        return logits

    def of_request(token_ids, logits):
        calls.append("request")
        logits[6 if logits[5] == 50.0 else 7] = 60.0
        return logits

    engine = make_engine(tokenizer, logits_processors=[of_engine])
    engine.add_request("a", PROMPT, SamplingParams(max_tokens=2, logits_processors=[of_request]))
    assert drain(engine)["a", 0].token_ids == [6, 6]
    assert calls == ["engine", "request"] * 2
    engine.add_request("b", PROMPT, SamplingParams(max_tokens=2))
    assert drain(engine)["b", 0].token_ids == [5, 5]
    with pytest.raises(TypeError, match=r"logits_processors\[0\] must be callable"):
        make_engine(tokenizer, logits_processors=[3])


# Hostile specifications

HOSTILE = Path(__file__).parents[1] / "helpers" / "hostile_grammars.py"


def test_hostile_specifications_are_bounded(tmp_path):
    """None takes 500 MB, and none hangs; the helper asserts the rest."""
    command = [sys.executable, str(HOSTILE), str(model_file(tmp_path))]
    found = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert found.returncode == 0, found.stdout[-2000:] + found.stderr[-2000:]


# With speculation


@pytest.mark.parametrize("seed", range(3))
def test_outputs_are_the_same_with_proposed_tokens(tokenizer, seed):
    rng = np.random.default_rng(seed)
    forms = [
        StructuredOutputs(json=random_schema(seed)),
        StructuredOutputs(json=SHORT),
        StructuredOutputs(regex="(ab|cd){2,40}x"),
        StructuredOutputs(choice=("abcabc", "abcabd", "xyz")),
    ]
    requests = {str(i): params_of(form, n=2, seed=seed) for i, form in enumerate(forms)}
    expected = {}
    for name, params in requests.items():
        engine = make_engine(tokenizer)
        engine.add_request(name, PROMPT, params)
        expected |= {key: (t.token_ids, t.text, t.end) for key, t in drain(engine).items()}
    engine = make_engine(tokenizer, speculation="suffix")

    def outputs(sequence):
        return expected[str(sequence.order[1]), sequence.order[2]][0]

    propose_right_and_wrong(engine, rng, outputs)
    for name, params in requests.items():
        engine.add_request(name, PROMPT, params)
    gained = {key: (t.token_ids, t.text, t.end) for key, t in drain(engine).items()}
    assert gained == expected
    assert 0 < engine.stats()["accepted_tokens"] < engine.stats()["draft_tokens"]
