"""Templates that try to fill the memory, never end, reach outside or break the renderer.

Run as a program, this renders them all and prints what came of each, and the peaks of memory. It
is a small process of its own because a worker's peak begins with the size of the process that
starts it: getrusage(2) counts what was before exec.
"""

import json
import resource
import sys
import time
from pathlib import Path

SECONDS = 0.3  # for one template; the real limit is longer
NAMES = {
    "messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "hi"}],
    "bos_token": "<s>",
    "tools": None,
}


def _repeated(change, n=60, start="x='aa'"):
    """Return a template that does `change` n times to a namespace n."""
    return f"{{% set n = namespace({start}) %}}{{% for i in range({n}) %}}{change}{{% endfor %}}"


_SHARED = _repeated("{% set n.x = [n.x, n.x] %}{% set n.y = [n.y, n.y] %}", 45, "x=[1], y=[1]")
_DEEP = _repeated("{% set n.x = [n.x] %}", 99999, "x=[]")
_CYCLE = "{% set n = namespace(x=[]) %}{% set n.me = n %}"

TIME = {
    "round up": "{{ 1|round(10**8, 'ceil') }}",
    "round of a large number": "{{ (10**7 / 8)|round(10**7, 'ceil') }}",
    "round down": "{{ 1.5|round(10**9, 'floor') }}",
    "round by a negative number": "{{ 12345|round(0 - 10**9) }}",
    "tower of powers": "{{ 10**(10**8) }}",
    "power of a variable": "{% set x = 10 %}{{ x ** (x ** (x ** x)) }}",
    "product of powers": "{{ (7**9999999) * (7**9999999) }}",
    "remainder of a power": "{{ 3**99999999 % 7 }}",
    "division of long numbers": "{{ (3**99999999) // (7**1234567) }}",
    "equal shared lists": _SHARED + "{{ n.x == n.y }}",
    "ordered shared lists": _SHARED + "{{ n.x < n.y }}",
    "shared list in a list": _SHARED + "{{ n.x in [n.y] }}",
    "unique shared lists": _SHARED + "{{ [n.x, n.y]|sort|length }}",
    "count of shared lists": _SHARED + "{{ [n.x].count(n.y) }}",
    "index of a shared list": _SHARED + "{{ [n.x].index(n.y) }}",
    "search": "{% set x = 'a' * 30000000 %}{% for i in range(99999) %}"
    "{% if 'b' in x %}{% endif %}{% endfor %}",
    "nested loops": "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}"
    "{% endfor %}",
    "loop over a text": "{% set x = 'a' * 10**7 %}{% for a in x %}{% for b in x %}{% endfor %}"
    "{% endfor %}",
    "doubling macro": "{% macro m(d) %}{% if d %}{{ m(d - 1) }}{{ m(d - 1) }}{% endif %}"
    "{% endmacro %}{{ m(60) }}",
    "recursive loop": "{% for x in [[[1] * 99] * 99] * 99 recursive %}{% if x is sequence %}"
    "{{ loop(x * 99) }}{% endif %}{% endfor %}",
    "filters again and again": "{% for i in range(99999) %}{{ range(99999)|max }}"
    "{{ range(99999)|map('string')|select('equalto', 'x')|list }}{% endfor %}",
    "sort again and again": "{% for i in range(99999) %}"
    "{{ (range(99999)|list|sort(reverse=true))|length }}{% endfor %}",
    "title of a long text": "{% set x = 'a b ' * 999999 %}{% for i in range(999) %}"
    "{{ (x|title|capitalize|trim|upper)|length }}{% endfor %}",
}
MEMORY = {
    "list of long texts": _repeated("{% set n.x = n.x + ['a' * (30000000 + i)] %}", start="x=[]"),
    "dict of long texts": _repeated(
        "{% set n.x = dict(n.x, **{'k' ~ i: 'a' * (9999999 + i)}) %}", start="x={}"
    ),
    "safe doubling": "{% autoescape true %}"
    + _repeated("{% set n.x = n.x ~ n.x %}", 27, "x='aaaaaaaa'|safe")
    + "{{ n.x }}{% endautoescape %}",
    "escaped doubling": "{% autoescape true %}"
    + _repeated("{% set n.x = n.x ~ '<' ~ n.x %}")
    + "{{ n.x }}{% endautoescape %}",
    "escaped output": "{% autoescape true %}{{ '<' * 10**8 }}{% endautoescape %}",
    "product of a text": "{{ 'a' * 10**9 }}",
    "product of a constant's product": "{{ ('a' * 10**4) * 10**6 }}",
    "product of a list": "{{ [[0] * 10**4] * 10**8 }}",
    "product of a tuple": "{{ (1, 2) * 10**9 }}",
    "join of many": "{{ ('b' * 100000).join(['a'] * 100000) }}",
    "join filter": "{{ (['a'] * 100000)|join('b' * 100000) }}",
    "join of shared lists": _SHARED + "{{ n.x|join }}",
    "shared list printed": _SHARED + "{{ n.x }}",
    "shared list as JSON": _SHARED + "{{ n.x|tojson }}",
    "shared list as indented JSON": _SHARED + "{{ n.x|tojson(indent=4) }}",
    "replace": "{{ ('a' * 100000).replace('a', 'b' * 100000) }}",
    "replace by nothing": "{{ ('a' * 10**7)|replace('', 'b' * 1000) }}",
    "center": "{{ 'a'.center(10**10) }}",
    "rjust": "{{ 'a'.rjust(10**9) ~ 'a'.rjust(10**9) }}",
    "zfill": "{{ '1'.zfill(10**10) }}",
    "expandtabs": "{{ '\\t\\t\\t'.expandtabs(10**9) }}",
    "translate": "{{ ('a' * 9999999).translate({97: 'b' * 9999}) }}",
    "width by %": "{{ '%1000000000d' % 1 }}",
    "width as an argument of %": "{{ '%*d' % (1000000000, 1) }}",
    "precision by %": "{{ '%.1000000000f' % 1 }}",
    "width of a format": "{{ '{:1000000000}'.format(1) }}",
    "width as an argument of a format": "{{ '{:{}}'.format(1, 10**9) }}",
    "precision of a format": "{{ '{:.2000000000f}'.format(1.5) }}",
    "long range": "{{ range(10**9)|list }}",
    "many ranges": _repeated("{% set n.x = n.x + range(99999)|list %}", 99999, "x=[]"),
    "endless slices": "{% set x = ('ab' * 10**7)[::-1] %}"
    + _repeated("{% set n.x = n.x + [x[i:]] %}", 999, "x=[]"),
    "split": "{{ (' a' * 10**8).split() }}",
    "list of a text": "{{ ('a' * 10**8)|list }}",
    "many small outputs": "{% for i in range(99999) %}{% for j in range(99999) %}{{ j }}"
    "{% endfor %}{% endfor %}",
    "output of a macro": "{% macro m() %}{{ 'a' * 10**7 }}{% endmacro %}{% for i in range(99) %}"
    "{% set _ = m() %}{{ m() }}{% endfor %}",
    "output of a call": "{% macro m() %}{% for i in range(99999) %}{{ caller() }}{% endfor %}"
    "{% endmacro %}{% call m() %}{{ 'a' * 10**5 }}{% endcall %}",
    "output of a filter block": "{% filter upper %}{{ 'a' * 10**9 }}{% endfilter %}",
    "output of a set block": "{% set x %}{% for i in range(99999) %}{{ 'a' * 10**5 }}{% endfor %}"
    "{% endset %}{{ x }}",
    "text just too long": "{% for i in range(8) %}{{ 'a' * 10**6 }}{% endfor %}b",
    "text just short enough": "{% set x = 'a' * 7999999 %}{{ x }}b",
    "text four bytes each": "{{ '\U0001f600' * 7999999 }}",
    "escapes in JSON": "{{ ('\\x01' * 7999999)|tojson }}",
    "reason": "{{ raise_exception('a' * 10**9) }}",
    "key that is missing": "{{ messages[0]['a' * 10**8].x }}",
    "date": "{{ strftime_now('%1000000000Y') }}",
    "long date": "{{ strftime_now('%c' * 10**7) }}",
    "long number printed": "{{ 10**4300 }}",
    "groups of a cycle": _CYCLE + "{% set n.x = ['a' * 10**8] * 2 %}{{ n.x|join }}",
}
OUTSIDE = {
    "include": "{% include '/etc/passwd' %}",
    "include of many": "{% include ['a', 'b'] ignore missing %}{{ nothing.x }}",
    "import": "{% import 'os' as os %}{{ os.getcwd() }}",
    "from import": "{% from 'os' import getcwd %}{{ getcwd() }}",
    "extends": "{% extends 'base' %}",
    "class": "{{ ''.__class__ }}",
    "class by item": "{{ ''['__class__'] }}",
    "class by a made name": "{{ ''['__cl' ~ 'ass__'] }}",
    "class by escapes": "{{ ''['\\x5f\\x5fclass\\x5f\\x5f'] }}",
    "class by attr": "{{ ''|attr('__class__') }}",
    "class by map": "{{ ['']|map(attribute='__class__')|list }}",
    "class by sort": "{{ [1, 2]|sort(attribute='__class__.__mro__') }}",
    "class by selectattr": "{{ ['']|selectattr('__class__')|list }}",
    "class by a format": "{{ '{0.__class__}'.format('') }}",
    "class by a format's item": "{{ '{0[__class__]}'.format('') }}",
    "class by format_map": "{{ '{a.__class__}'.format_map({'a': ''}) }}",
    "class by a mapped format": "{{ ['{0.__class__}']|map('format', 1)|list }}",
    "wide letters": "{{ ''.__\uff43lass__ }}",
    "frame of a generator": "{{ (messages|map('upper')).gi_frame.f_globals }}",
    "cycler": "{{ cycler.__init__.__globals__ }}",
    "joiner": "{{ joiner('a')() ~ nothing.x }}",
    "lipsum": "{{ lipsum(n=10**9) }}",
    "globals": "{{ raise_exception.__globals__ }}",
    "namespace's attributes": "{{ namespace(a=1)._Namespace__attrs }}",
    "namespace's method": "{% set n = namespace() %}{% set n.__class__ = 1 %}{{ n.__class__ }}",
    "context": "{{ self._TemplateReference__context }}",
    "change of a message": "{{ messages[0].update({'role': 'system'}) }}",
    "change of a list": "{{ messages.append(1) }}",
    "removal": "{{ messages.pop() }}",
}
BROKEN = {
    "deep parentheses": "{{ " + "(" * 150 + "1" + ")" * 150 + " }}{{ nothing.x }}",
    "deeper parentheses": "{{ " + "(" * 90000 + "1" + ")" * 90000 + " }}",
    "deep brackets": "{{ " + "[" * 300 + "]" * 300 + " }}",
    "deep subscripts": "{{ x" + "[0]" * 5000 + " }}",
    "deep not": "{{ " + "not " * 40000 + "1 }}",
    "deep minus": "{{ " + "-" * 90000 + "1 }}",
    "long sum": "{{ " + "x + " * 40000 + "1 }}",
    "long ~": "{{ " + "x ~ " * 40000 + "nothing.x }}",
    "long power": "{{ " + "1 ** " * 30000 + "x }}",
    "long and": "{{ " + "1 and " * 30000 + "nothing.x }}",
    "long filters": "{{ x" + "|d" * 40000 + " }}{{ nothing.x }}",
    "deep blocks": "{% for a in [1] %}" * 25 + "{% endfor %}" * 25 + "{{ nothing.x }}",
    "deep ifs": "{% if 1 %}" * 500 + "{% endif %}" * 500,
    "deep sets": "{% set a %}" * 900 + "{% endset %}" * 900 + "{{ nothing.x }}",
    "many elifs": "{% if nothing %}" + "{% elif nothing %}" * 9000 + "{% endif %}{{ nothing.x }}",
    "many arguments": "{{ namespace(" + ",".join(f"a{i}=1" for i in range(20000)) + ") }}"
    "{{ nothing.x }}",
    "same argument twice": "{{ namespace(a=1, a=2) }}",
    "same parameter twice": "{% macro m(a, a) %}{% endmacro %}",
    "keyword as parameter": "{% macro m(None) %}{% endmacro %}",
    "keyword as a variable": "{% set None = 1 %}",
    "python's keyword": "{{ lambda: 1 }}",
    "reserved names": "{% set self = 1 %}{% set loop = 2 %}{% set varargs = 3 %}{{ self.x.y }}",
    "caller": "{% macro m(caller) %}{% endmacro %}{{ m() }}",
    "break outside": "{% break %}",
    "continue in a macro": "{% for i in [1] %}{% macro m() %}{% break %}{% endmacro %}{% endfor %}"
    "{{ nothing.x }}",
    "block twice": "{% block a %}{% endblock %}{% block a %}{% endblock %}",
    "null": "\x00{{ 1 }}{{ '\x00' }}{{ nothing.x }}",
    "lone surrogate": "{{ '\ud800' }}{{ \ud800 }}",
    "surrogates in a date": "{{ strftime_now('\\ud800') }}{{ nothing.x }}",
    "invalid escape": "{{ '\\x' }}",
    "invalid name": "{{ '\\N{nothing}' }}",
    "invisible identifier": "{{ \u2118 }}{{ \u00b7 }}",
    "huge number": "{{ " + "9" * 150000 + " }}",
    "huge hexadecimal number": "{{ 0x" + "f" * 150000 + " }}",
    "huge float": "{{ 1e999999 }}{{ (1e999999)|int }}",
    "braces": "{" * 199999,
    "opened again and again": "{{" * 99999,
    "comments": "{#" * 99999,
    "minus": "{%-" * 60000,
    "blanks": "{{ 1" + " " * 190000 + "?",
    "lines": "{{ '" + "\n" * 190000,
    "quotes": "{{ " + "'" * 190001,
    "dots": "{{ " + "1." * 90000,
    "raw without end": "{% raw %}" + "{{ x }}" * 20000,
    "block without end": "{% for i in [1] %}",
    "wrong types": "{{ 1|join }}",
    "wrong types of a filter": "{{ 'a'|round('b', 'c') }}",
    "wrong method": "{{ 1.5|round(1, 'sideways') }}",
    "undefined called": "{{ nothing() }}",
    "attribute of undefined": "{{ nothing.x.y }}",
    "division by zero": "{{ 1 / 0 }}",
    "remainder by zero": "{{ 1 % 0 }}",
    "test by zero": "{{ 1 is divisibleby 0 }}",
    "float too large": "{{ 10.0**400 }}",
    "int too large": "{{ 'a' * 10**30 }}",
    "int of infinity": "{{ (9e999 - 9e999)|int(base=99) }}{{ nothing.x }}",
    "sort of mixed types": "{{ [1, 'a', none]|sort }}",
    "list as a key": "{{ {[1]: 2} }}",
    "unpacking": "{% for a, b in [1] %}{% endfor %}",
    "stars": "{{ dict(**1) }}{{ range(*1) }}",
    "loop.changed": "{% for i in [1, 2] %}{{ loop.changed(n=1) }}{% endfor %}",
    "loop outside": "{{ loop.index }}",
    "endless macro": "{% macro m() %}{{ m() }}{% endmacro %}{{ m() }}",
    "endless loop": "{% for i in [1] recursive %}{{ loop([1]) }}{% endfor %}",
    "endless call": "{% macro m() %}{{ caller() }}{{ m(caller=m) }}{% endmacro %}"
    "{% call m() %}{% endcall %}",
    "endless block": "{% block a %}{{ self.a() }}{% endblock %}",
    "deep list printed": _DEEP + "{{ n.x }}",
    "deep list as JSON": _DEEP + "{{ n.x|tojson }}",
    "deep lists compared": _DEEP + "{{ n.x == [n.x] }}",
    "deep list joined": _DEEP + "{{ [n.x, n.x]|join }}",
    "cycle as JSON": _CYCLE + "{{ {'a': n}|tojson }}",
    "undefined as JSON": "{{ nothing|tojson }}",
    "function as JSON": "{{ {'a': range}|tojson }}",
    "indent of another type": "{{ [1]|tojson(indent='a') }}{{ [1]|tojson(indent=[]) }}",
    "refusal of nothing": "{{ raise_exception() }}",
    "refusal with a list": "{{ raise_exception([1, none]) }}",
    "refusal with too much": "{{ raise_exception(1, 2, 3) }}",
    "refusal with a cycle": _CYCLE + "{{ raise_exception(n) }}",
    "date of nothing": "{{ strftime_now() }}",
    "date of a number": "{{ strftime_now(5) }}",
    "date of a null": "{{ strftime_now('%Y\\0') }}{{ nothing.x }}",
    "odd date": "{{ strftime_now('%') }}{{ strftime_now('%-') }}{{ strftime_now('%E' * 9) }}"
    "{{ nothing.x }}",
    "unknown tag": "{% python %}import os{% endpython %}",
    "unknown filter": "{{ 1|pprint }}",
    "unknown test": "{{ 1 is prime }}",
    "unknown escaping": "{% autoescape nothing.x %}{% endautoescape %}",
}  # fmt: skip
KINDS = {"time": TIME, "memory": MEMORY, "outside": OUTSIDE, "broken": BROKEN}
HOSTILE = {f"{kind}: {name}": kinds[name] for kind, kinds in KINDS.items() for name in kinds}


def main():
    """Print each template's result, whether the next one works, and the peaks of memory."""
    from codellama_rt.text.chat import sandbox

    seconds_at_first, results = sandbox.MAX_SECONDS, {}
    for name, template in HOSTILE.items():
        text = ""  # the last reply does not count beside this one
        sandbox.MAX_SECONDS, begin = SECONDS, time.monotonic()
        try:
            kind, text = "text", sandbox.render_template(template, NAMES)
        except BaseException as error:
            kind, text = type(error).__name__, str(error)
        seconds = time.monotonic() - begin
        sandbox.MAX_SECONDS = seconds_at_first
        after = sandbox.render_template("{{ ('a' * 1000)|length }}", NAMES)
        results[name] = {"kind": kind, "text": text[:400], "seconds": seconds, "after": after}
    sandbox._shared.stop()
    own = Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]
    workers = resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss
    peaks = [int(own) * 1024, workers * 1024]
    json.dump({"results": results, "peaks": peaks}, sys.stdout)


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[2]))
    main()
