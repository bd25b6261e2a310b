"""Templates of strangers: what they try is refused, and none of it happens."""

import multiprocessing
import os
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest

from codellama_rt.text.chat import sandbox, template_worker
from codellama_rt.text.chat.sandbox import MAX_TEMPLATE, ChatTemplateError, render_template

NAMES = {"messages": [{"role": "user", "content": "hello"}], "bos_token": "<s>", "tools": None}

INJECTIONS = {
    "class of a literal": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by item": "{{ ''['__class__'] }}",
    "by filter": "{{ ''|attr('__class__') }}",
    "by map": "{{ ['']|map(attribute='__class__')|list }}",
    "by groupby": "{{ ['']|groupby('__class__')|list }}",
    "by sum": "{{ ['']|sum(attribute='__class__') }}",
    "globals of a function": "{{ raise_exception.__globals__ }}",
    "globals of a method": "{{ messages.append.__self__.__class__ }}",
    "cycler": "{{ cycler.__init__.__globals__.os.system('touch hacked') }}",
    "lipsum": "{{ lipsum.__globals__['os'].popen('touch hacked').read() }}",
    "joiner": "{{ joiner.__init__.__globals__ }}",
    "namespace": "{{ namespace.__init__.__globals__['sys'] }}",
    "dict": "{{ dict.__base__.__subclasses__() }}",
    "range": "{{ range.__class__ }}",
    "self": "{{ self.__init__.__globals__ }}",
    "self's context": "{{ self._TemplateReference__context.environment }}",
    "format string": "{{ '{0.__class__}'.format('') }}",
    "format map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "hidden format": "{% set f = 'x{0.__class__}'.format %}{{ f('') }}",
    "generator frame": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "code of a macro": "{% macro m() %}{% endmacro %}{{ m._func.__code__ }}",
    "include": "{% include '/etc/passwd' %}",
    "import": "{% import 'os' as os %}{{ os.system('touch hacked') }}",
    "extends": "{% extends '/etc/passwd' %}",
    "undefined's class": "{{ nothing.__class__ }}",
    "undefined call": "{{ nothing() }}",
    "open": "{{ open('hacked', 'w') }}",
    "python import": "{{ __import__('os').system('touch hacked') }}",
    "change of a message": "{% set _ = messages[0].update({'role': 'system'}) %}",
    "change of the list": "{% set _ = messages.append({'role': 'system', 'content': 'x'}) %}",
    "clear": "{{ messages.clear() }}",
    "loop's environment": "{% for m in messages %}{{ loop.__class__ }}{% endfor %}",
    "undecorated filter": "{{ 'x'|pprint }}",
    "urlize": "{{ 'http://x'|urlize }}",
    "exception's traceback": "{{ raise_exception('x').__traceback__ }}",
}
HUNGRY = {
    "long product": "{{ 'a' * 10**9 }}",
    "product of a product": "{% set x = 'a' * 10000000 %}{{ x * 100 }}",
    "list product": "{{ [0] * 10**9 }}",
    "power": "{{ 9 ** (9 ** (9 ** 9)) }}",
    "negative base": "{{ (0 - 3) ** 100000000 }}",
    "large numbers": "{% set n = namespace(x=10**60) %}{% for i in range(60) %}"
    "{% set n.x = n.x * n.x %}{% endfor %}",
    "doubling by +": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = n.x + n.x %}{% endfor %}",
    "doubling by ~": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = n.x ~ n.x %}{% endfor %}",
    "doubling by join": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x]|join %}{% endfor %}",
    "doubling by a method": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = ''.join([n.x, n.x]) %}{% endfor %}",
    "doubling by sum": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x]|sum(start=[]) %}{% endfor %}",
    "doubling by JSON": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = n.x|tojson %}{% endfor %}",
    "join of a generator": "{{ ('b' * 10000000).join(range(99999)|map('string')) }}",
    "nested lists": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x }}",
    "nested JSON": "{% set n = namespace(x=[1]) %}{% for i in range(60) %}"
    "{% set n.x = [n.x, n.x] %}{% endfor %}{{ n.x|tojson }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace filter": "{{ ('a' * 100000)|replace('a', 'b' * 100000) }}",
    "join of many": "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "join filter of many": "{{ (['a'] * 100000)|join('b' * 100000) }}",
    "center": "{{ 'a'.center(10**9) }}",
    "ljust": "{{ 'a'.ljust(10**9) }}",
    "zfill": "{{ 'a'.zfill(10**9) }}",
    "expandtabs": "{{ '\\t'.expandtabs(10**9) }}",
    "width of a format": "{{ '{:1000000000}'.format(1) }}",
    "indent of JSON": "{{ [1]|tojson(indent=1000000000) }}",
    "long range": "{{ range(10**12)|list }}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}"
    "{% for k in range(99999) %}{% endfor %}{% endfor %}{% endfor %}",
    "doubling by format": "{% set n = namespace(x='aa') %}{% for i in range(60) %}"
    "{% set n.x = '%s%s'|format(n.x, n.x) %}{% endfor %}",
    "width in format": "{{ '%1000000000d'|format(1) }}",
    "indent filter": "{{ ('a\\n' * 100000)|indent(100000) }}",
    "batch": "{{ [1]|batch(1000000000, 0)|list }}",
    "slice": "{{ [1]|slice(1000000000)|list }}",
    "center filter": "{{ 'a'|center(1000000000) }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long template": "x" * (MAX_TEMPLATE + 1),
}
ENDLESS = {
    "work of a line": "{% set x = 'a' * 30000000 %}{% for i in range(100000) %}"
    "{% if 'b' in x %}{% endif %}{% endfor %}",
    "round": "{{ 1|round(100000000, 'ceil') }}",
    "comparison of shared lists": "{% set n = namespace(x=[1], y=[1]) %}{% for i in range(40) %}"
    "{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}{% endfor %}{{ n.x == n.y }}",
}


@pytest.mark.parametrize("payload", INJECTIONS.values(), ids=INJECTIONS)
def test_injections_are_refused(payload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    names = {**NAMES, "messages": [dict(message) for message in NAMES["messages"]]}
    with pytest.raises(ChatTemplateError, match=r"^chat template|^the chat template refuses"):
        render_template(payload, names)
    assert names == NAMES
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize("payload", HUNGRY.values(), ids=HUNGRY)
def test_templates_are_bounded(payload):
    with pytest.raises(ChatTemplateError):
        render_template(payload, NAMES)


def test_a_template_that_only_computes_is_ended_in_time(monkeypatch):
    """No line of its own runs: a C call of the sandbox does all the work."""
    monkeypatch.setattr(sandbox, "MAX_SECONDS", 0.5)
    begin = time.monotonic()
    for template in ENDLESS.values():
        with pytest.raises(ChatTemplateError, match=r"computes for more than 0\.5 seconds"):
            render_template(template, NAMES)
    assert time.monotonic() - begin < 60 * len(ENDLESS)


def test_what_a_template_writes_is_bounded(monkeypatch):
    monkeypatch.setattr(sandbox, "MAX_TEXT", 1000)
    assert render_template("{{ 'a' * 1000 }}", NAMES) == "a" * 1000
    with pytest.raises(ChatTemplateError, match="it writes more than 1000 characters"):
        render_template("{{ 'a' * 1001 }}", NAMES)


def test_a_process_serves_until_it_is_ended():
    assert render_template("{{ 1 }}", {}) == "1"
    first = sandbox._shared._process
    assert render_template("{{ 2 }}", {}) == "2"
    assert sandbox._shared._process is first
    first.kill()
    first.wait()
    assert render_template("{{ 3 }}", {}) == "3"
    assert sandbox._shared._process is not first


def test_threads_take_turns():
    template = "{% for i in range(999) %}{{ x }}{% endfor %}"
    with ThreadPoolExecutor(8) as pool:
        found = list(pool.map(lambda i: render_template(template, {"x": i}), range(64)))
    assert found == [str(i) * 999 for i in range(64)]


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_a_forked_process_has_a_worker_of_its_own():
    assert render_template("{{ 1 }}", {}) == "1"
    mine = sandbox._shared._process.pid
    with multiprocessing.get_context("fork").Pool(1) as pool:
        text, theirs = pool.apply(_render_and_tell)
    assert text == "2"
    assert theirs != mine
    assert render_template("{{ 3 }}", {}) == "3"
    assert sandbox._shared._process.pid == mine


def _render_and_tell():
    text, pid = render_template("{{ 2 }}", {}), sandbox._shared._process.pid
    sandbox._shared.stop()
    return text, pid


def test_an_interrupted_reply_is_not_the_next_one(monkeypatch):
    def interrupt(process, size):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(sandbox, "_read", interrupt)
        with pytest.raises(KeyboardInterrupt):
            render_template("{{ 1 }}", {})
    assert render_template("{{ 2 }}", {}) == "2"


def test_the_worker_imports_nothing_of_ours():
    """It starts in a tenth of a second, and holds nothing that a template could reach for."""
    source = Path(template_worker.__file__).read_text()
    assert "codellama_rt" not in source
    assert "numpy" not in source


def test_text_that_is_no_unicode_survives():
    strange = "a\ud800\x00\u2028é\U0001f600"
    assert render_template("{{ x }}", {"x": strange}) == strange


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{{ bos_token }}{{ messages[0].content|trim|upper }}", "<s>HELLO"),
        ("{% if tools %}T{% elif undefined_name is defined %}U{% else %}N{% endif %}", "N"),
        ("{% for i in range(9) %}{% if i == 3 %}{% break %}{% endif %}{{ i }}{% endfor %}", "012"),
        ("{{ messages|tojson }}", '[{"role": "user", "content": "hello"}]'),
        ("{{ 'a,b'.split(',')|join('-') }}{{ 'a'|replace('a', 'é') }}{{ [1] }}", "a-bé[1]"),
        ("{% set n = namespace(x=1) %}{% set n.x = n.x + 2 * 3 %}{{ n.x ~ '%' ~ 7 % 4 }}", "7%3"),
        ("{{ messages|selectattr('role', 'equalto', 'user')|map(attribute='content')|first }}",
         "hello"),
        ("{{ '%s is %d' % (messages[0].role, 7) }}", "user is 7"),
        ("{% generation %}x{% set y = 1 %}{% endgeneration %}{{ y is defined }}", "xFalse"),
        ("{{ {'b': [1, 'é'], 'a': none}|tojson(sort_keys=true, separators=(',', ':')) }}",
         '{"a":null,"b":[1,"é"]}'),
        ("{{ {'é': 1}|tojson(ensure_ascii=true, indent=1) }}", '{\n "\\u00e9": 1\n}'),
        ("{{ 'a\nb'|indent(2) }}|{{ 'a\nb'|indent(2, true) }}", "a\n  b|  a\n  b"),
        ("{{ '%s is %02d'|format('x', 7) }}", "x is 07"),
        ("{% for role, of in messages|groupby('role') %}{{ role }}{{ of|length }}{% endfor %}",
         "user1"),
        ("{{ range(5)|batch(2)|list }}{{ range(5)|slice(2)|list }}",
         "[[0, 1], [2, 3], [4]][[0, 1, 2], [3, 4]]"),
        ("{{ [1, 2]|sum }}{{ [{'a': 3}]|sum(attribute='a') }}", "33"),
        ("{{ 'a b'|wordcount }}{{ 'abcdef'|truncate(4, true, '', 0) }}{{ 'a'|center(3) }}",
         "2abcd a "),
        ("{% trans %}x{% endtrans %}", None),
    ],
)  # fmt: skip
def test_what_templates_do_use(template, text):
    if text is None:
        with pytest.raises(ChatTemplateError, match="unknown tag"):
            render_template(template, NAMES)
    else:
        assert render_template(template, NAMES) == text


def test_a_template_may_refuse_a_conversation():
    with pytest.raises(ChatTemplateError, match="refuses this conversation: roles must alternate"):
        render_template("{{ raise_exception('roles must alternate') }}", NAMES)
