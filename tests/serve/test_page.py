"""The page at /, in headless Chromium: each form fills, and nothing is asked of another host."""

import os
from pathlib import Path
from time import sleep

import pytest
from helpers.browser import browsing
from helpers.served import serving

from codellama_rt import SamplingParams
from codellama_rt.serve import event_stream

# Screenshots to look at; None: of the test's own folder.
_SHOTS = os.environ.get("CODELLAMA_RT_SCREENSHOTS")


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    with browsing(tmp_path_factory.mktemp("profile")) as page:
        page.resize(1000, 800)
        yield page


@pytest.fixture
def page(browser, served):
    browser.requested.clear()
    browser.complaints.clear()
    browser.open(f"{served.url}/")
    browser.wait_for("document.getElementById('model').textContent")
    yield browser
    assert browser.complaints == []
    assert {url.split("/", 3)[2] for url in browser.requested} == {served.url.split("/", 3)[2]}


def choose(page, tab, **fields):
    page.evaluate(f"document.querySelector('[data-tab={tab}]').click()")
    for name, value in {"most": 20, **fields}.items():
        page.evaluate(
            f"""(() => {{
                const field = document.getElementById({name!r});
                field.value = {value!r};
                field.dispatchEvent(new Event("input"));
            }})()"""
        )


def run(page):
    page.evaluate("document.getElementById('go').click()")
    page.wait_for("document.getElementById('stop').disabled")


def texts(page, selector):
    script = f"[...document.querySelectorAll({selector!r})].map(one => one.textContent)"
    return page.evaluate(script)


def shoot(page, tmp_path, name):
    file = Path(_SHOTS or tmp_path) / f"{name}.png"
    page.screenshot(file)
    assert file.read_bytes().startswith(b"\x89PNG")


def test_it_completes(page, llm, tmp_path):
    choose(page, "complete", prompt="def f(x):")
    run(page)
    expected = llm.generate("def f(x):", SamplingParams(max_tokens=20)).pop().text
    assert texts(page, "#out span") == ["def f(x):", expected]
    speed, count, prompt = texts(page, "#facts span")
    assert speed.endswith(" tokens/s")
    assert count == "20 tokens (limit)"
    assert "cached" in prompt
    shoot(page, tmp_path, "complete")


@pytest.mark.parametrize("first", [False, True])
def test_it_shows_the_hole_and_fills_it(page, llm, tmp_path, first):
    choose(page, "fill", prefix="def add(first, ", suffix="):\n    return first")
    assert texts(page, "#out span") == ["def add(first, ", "", "):\n    return first"]
    hole = "getComputedStyle(document.querySelector('.hole'), '::before').content"
    assert page.evaluate(hole) == '"the hole"'
    shoot(page, tmp_path, "hole")
    page.evaluate(f"document.getElementById('spm').checked = {str(first).lower()}")
    run(page)
    expected = llm.infill(
        "def add(first, ", "):\n    return first", SamplingParams(max_tokens=20), suffix_first=first
    )
    filled = ["def add(first, ", expected.text, "):\n    return first"]
    assert texts(page, "#out span") == filled
    shoot(page, tmp_path, "fill")


def test_the_first_hole_ends_before_a_line(page):
    page.evaluate("document.querySelector('[data-tab=fill]').click()")
    assert texts(page, "#out span")[2] == "\n    return result\n"


def test_it_chats(page, llm, tmp_path):
    messages = []
    choose(page, "chat")
    for content in ("Reverse a list.", "And a string?"):
        choose(page, "chat", message=content)
        run(page)
        messages.append({"role": "user", "content": content})
        answer = llm.chat(messages, SamplingParams(max_tokens=20))
        messages.append({"role": "assistant", "content": answer.text})
        shown = [text for one in messages for text in (one["role"], one["content"])]
        assert texts(page, "#out span") == shown
        assert page.evaluate("document.getElementById('message').value") == ""
        speed, count, prompt = texts(page, "#facts span")
        assert speed.endswith(" tokens/s")
        assert count == "20 tokens"
    assert ", 0 cached" not in prompt
    page.resize(420, 800, dark=True)
    shoot(page, tmp_path, "chat")
    page.resize(1000, 800)
    page.evaluate("document.getElementById('clear').click()")
    assert texts(page, "#out span") == []


def test_an_error_is_shown_and_the_message_kept(page):
    choose(page, "chat", message="x" * 20_000)
    run(page)
    [error] = texts(page, "#facts .error")
    assert "tokens" in error
    assert texts(page, "#out span") == []
    assert page.evaluate("document.getElementById('message').value.length") == 20_000
    [complaint] = page.complaints
    assert "400" in complaint
    page.complaints.clear()


@pytest.mark.parametrize("tab", ["complete", "fill", "chat"])
def test_progress_and_stop(browser, open_llm, monkeypatch, tmp_path, tab):
    """A long prompt in slow steps of a token: the bar moves, and Stop ends the request."""
    monkeypatch.setattr(event_stream, "PROGRESS_S", 0.01)
    with open_llm(max_num_batched_tokens=1, max_num_seqs=1) as llm, serving(llm) as server:
        forward = llm.model.forward

        def slow(*arguments):
            sleep(0.1)
            return forward(*arguments)

        monkeypatch.setattr(llm.model, "forward", slow)
        browser.open(f"{server.url}/")
        long = "x " * 900
        choose(browser, tab, prompt=long, prefix=long, message=long)
        browser.evaluate("document.getElementById('go').click()")
        browser.wait_for("document.getElementById('progress').value > 0")
        [told, _] = texts(browser, "#facts span")
        assert told.startswith("reading the prompt: ")
        shoot(browser, tmp_path, f"progress-{tab}")
        browser.evaluate("document.getElementById('stop').click()")
        browser.wait_for("document.getElementById('stop').disabled")
        assert texts(browser, "#facts span") == ["stopped"]
        server.wait_until_idle()
