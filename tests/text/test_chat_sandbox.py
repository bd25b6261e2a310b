"""Templates of strangers: what they try is refused, and none of it happens."""

import os
import sys

import pytest

from codellama_rt.text.chat.sandbox import MAX_TEMPLATE, ChatTemplateError, render_template

NAMES = {"messages": [{"role": "user", "content": "hello"}], "bos_token": "<s>", "tools": None}

INJECTIONS = {
    "class of a literal": "{{ ''.__class__ }}",
    "subclasses": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "by item": "{{ ''['__class__'] }}",
    "by filter": "{{ ''|attr('__class__') }}",
    "by map": "{{ ['']|map(attribute='__class__')|list }}",
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
    "percent format": "{{ '%s' % messages }}",
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
    "power": "{{ 9**9**9**9 }}",
    "negative base": "{{ (0 - 3) ** 100000000 }}",
    "large numbers": "{{ 10**60 * 10**60 }}",
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
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "deep brackets": "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}",
    "long template": "x" * (MAX_TEMPLATE + 1),
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


def test_tracing_is_as_before():
    def tracer(frame, event, argument):
        return None

    before = sys.gettrace()
    sys.settrace(tracer)
    try:
        with pytest.raises(ChatTemplateError):
            render_template(HUNGRY["nested loops"], NAMES)
        assert sys.gettrace() is tracer
    finally:
        sys.settrace(before)


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
        ("{% generation %}x", None),
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
