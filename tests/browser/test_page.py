"""The page of `jaxgen serve`, driven in a real browser (extra `browser`, and Chromium): `.ci/run --only serve`."""

import re
import threading
import time

import httpx2 as httpx
import numpy as np
import pytest
import uvicorn
from selenium.webdriver import ActionChains
from selenium.webdriver.common.keys import Keys

import jaxgen
from jaxgen import demo
from jaxgen.engine.handle import Handle, Tokens
from jaxgen.errors import EngineFullError, JaxgenError
from jaxgen.serve.app import application
from jaxgen.serve.records import Call
from jaxgen.serve.service import Service
from tests.browser.chromium import Page, chromium

pytestmark = pytest.mark.slow

ASK = "How many helicopters can a human eat in one sitting?"
KEY = "a key"
HOSTILE = '<img src=x onerror="window.harmed = 1"> </div> & <b>x</b> <script>window.harmed = 1</script>\n'
FOREIGN = "Здравствуй 日本語 😀 👩‍👩‍👧 مرحبا é\n"


@pytest.fixture(scope="module")
def model():
    return jaxgen.AutoModelForCausalLM.from_pretrained(demo.path(), dtype="float32")


@pytest.fixture(scope="module")
def service(model):
    service = Service(jaxgen.Engine(model, rows=4, slots=256, chunk=16, top_logprobs=5), "demo")
    service.prepare()
    yield service
    service.close(0)


def served(app):
    """Serve in a thread; gives the address, then the server."""
    server = uvicorn.Server(uvicorn.Config(app, port=0, lifespan="off", log_level="warning"))
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    yield f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}/"
    server.should_exit = True
    thread.join()


@pytest.fixture(scope="module")
def url(service):
    yield from served(application(service))


@pytest.fixture(scope="module")
def locked(service):
    yield from served(application(service, key=KEY))


@pytest.fixture(scope="module")
def downloads(tmp_path_factory):
    return tmp_path_factory.mktemp("browser")


@pytest.fixture(scope="module")
def window(downloads):
    with chromium(downloads) as window:
        yield window


@pytest.fixture
def page(window, url):
    page = Page(window, url)
    page.fill("#most", "40")
    yield page
    page.online(True)
    errors = [entry for entry in window.get_log("browser") if entry["source"] != "network"]
    assert not errors  # nothing that the script did not catch, and nothing that the policy of the page forbids


def scripted(service, monkeypatch, said, *, tokens_apart=True, end=None, ends=True):
    """The server's own way from tokens to events, with a model that says just this."""
    tokenizer = service.tokenizer
    ids = [*tokenizer.encode(said, add_special_tokens=False), tokenizer.eos_token_id]

    def submit(field, prompts, new, samples, **options):
        handle = Handle(np.array(prompts[0].ids), options["seed"], tokenizer, (), True, True)
        for part in [[token] for token in ids] if tokens_apart else [ids]:
            values = np.full(len(part), -1.5, np.float32)
            handle.give(
                Tokens(
                    np.array(part),
                    values,
                    values,
                    np.array([[token, 5] for token in part]),
                    -values[:, None] * [[-1, -2]],
                )
            )
        if ends:
            handle.end("eos" if end is None else "error", end)
        return [Call(prompts[0].ids, 0, {**options, "max_new_tokens": 200}, [handle])]

    monkeypatch.setattr(service, "submit", submit)
    return ids


def test_a_seed_is_shown_and_its_text_comes_again(page, url, model, downloads):
    page.fill("#seed", str(1 << 70))
    page.fill("#temperature", "1.5")
    text = page.send(ASK)
    body = {"messages": [{"role": "user", "content": ASK}], "seed": 1 << 70, "temperature": 1.5, "max_tokens": 40}
    answer = httpx.post(f"{url}v1/chat/completions", json=body).json()
    assert text == answer["choices"][0]["message"]["content"]
    assert f"seed {1 << 70}" in page.text(".note") and f"{answer['usage']['completion_tokens']} tokens" in page.text(
        ".note"
    )
    page.fill("#seed", "4")  # of the next message, not of this
    assert page.press(".again") == text and "the same text" in page.text(".note")
    page.find(".record").click()
    page.wait(lambda: list(downloads.glob("chatcmpl-*.json")))
    [record] = downloads.glob("chatcmpl-*.json")
    assert jaxgen.replay(record, model).message == "identical"
    page.find("#fresh").click()
    assert re.fullmatch(r"\d+", page.find("#seed").get_property("value"))


def test_a_conversation_goes_on(page, service, monkeypatch):
    """The second message is asked with the first and its answer; one that failed is left out."""
    asked = []
    real = service.encoded
    monkeypatch.setattr(
        service, "encoded", lambda field, given, **more: asked.append(given) or real(field, given, **more)
    )
    first = page.send("1, 2, 3")
    page.fill("#temperature", "0")
    page.fill("#most", "4000")
    page.send("too much")
    assert "max_tokens=4000" in page.text(".note .wrong")
    page.fill("#most", "10")
    page.send("4, 5, 6")
    said = [(message["role"], message["content"]) for message in asked[-1]]
    assert said == [("user", "1, 2, 3"), ("assistant", first), ("user", "4, 5, 6")]
    page.find("#clear").click()
    assert page.count(".turn") == 0 and page.visible("#hello")


def test_tokens_are_coloured_and_say_what_else_could_have_come(page, service):
    page.fill("#seed", "7")
    page.send(ASK)
    doubts = [
        float(token.get_attribute("style").split(":")[1].rstrip("%; "))
        for token in page.window.find_elements("css selector", "#turns .token")
    ]
    assert 0 <= min(doubts) < 10 and max(doubts) <= 70
    ActionChains(page.window).move_to_element(page.find("#turns .token")).perform()
    assert page.visible("#tip") and page.count("#tip div") == 5 and page.count("#tip .chosen") == 1
    shown = [float(row.text.split()[0]) for row in page.window.find_elements("css selector", "#tip div")]
    assert shown == sorted(shown, reverse=True)
    page.find(".text").send_keys(Keys.ESCAPE)
    assert not page.visible("#tip")
    page.find(".text").send_keys(Keys.ARROW_RIGHT * 3)
    assert page.visible("#tip") and page.count(".shown") == 1
    tokens = page.window.find_elements("css selector", "#turns .token")
    assert tokens[2].get_attribute("class") == "token shown"


@pytest.mark.parametrize("apart", [True, False])
@pytest.mark.parametrize("said", [HOSTILE, FOREIGN])
def test_any_text_is_shown_as_it_is(page, service, monkeypatch, said, apart):
    """HTML is text, characters in several tokens are whole, the end token is not shown."""
    ids = scripted(service, monkeypatch, said, tokens_apart=apart)
    assert page.send(f"{said.strip()} {'long' * 60}") == said
    assert page.script("return window.harmed") is None and page.count("#turns img, #turns b, #turns script") == 0
    assert f"{len(ids)} tokens" in page.text(".note")
    assert (
        page.script(
            "return [...document.querySelectorAll('#turns .text')].pop().querySelectorAll('span:not(.token)').length"
        )
        == 0
    )
    if said == FOREIGN:
        [smile] = [token for token in page.window.find_elements("css selector", "#turns .token") if token.text == "😀"]
        smile.click()
        assert page.text("#tip").count("<F0>") == 1 and page.count("#tip .first") > 1
    for width in (1100, 390):
        page.size(width, 760)
        assert page.script(
            "return document.documentElement.scrollWidth <= innerWidth"
            " && document.getElementById('chat').scrollWidth <= innerWidth"
        )


def test_errors_are_said_and_can_be_mended(page, service, monkeypatch):
    page.fill("#seed", "7a")
    page.find("#ask").send_keys("hello" + Keys.ENTER)
    assert page.text("#said") == "The seed is a whole number." and page.count(".turn") == 0
    assert page.find("#seed").get_attribute("aria-invalid") == "true"
    assert page.find("#ask").get_property("value") == "hello"  # not lost
    page.fill("#seed", "-7")
    page.online(False)
    page.send("")
    assert page.text(".note .wrong") == "The server cannot be reached." and not page.visible("#said")
    page.online(True)
    with monkeypatch.context() as full:
        full.setattr(service, "submit", _full)
        page.press(".again")
    assert "come again later" in page.text(".note .wrong")
    with monkeypatch.context() as broken:
        scripted(service, broken, "A half", end=JaxgenError("it broke"))
        assert page.press(".again").startswith("A ") and page.text(".note .wrong") == "it broke"
    page.fill("#most", "5")  # also this is mended by now
    page.press(".again")
    assert "seed -7" in page.text(".note") and "5 tokens" in page.text(".note")


def _full(*_, **__):
    raise EngineFullError("1024 requests wait already, as many as may; come again later")


def test_keys_stop_and_lines(page, service, monkeypatch):
    scripted(service, monkeypatch, "one two three", ends=False)
    page.find("#ask").send_keys("1, 2" + Keys.SHIFT + Keys.ENTER + Keys.NULL + "3, 4")
    assert page.find("#ask").get_property("value") == "1, 2\n3, 4" and page.count(".turn") == 0
    page.find("#ask").send_keys(Keys.ENTER)
    assert page.text("#send") == "Stop" and page.text(".user") == "1, 2\n3, 4"
    page.wait(lambda: page.text(".text"))
    page.find("#ask").send_keys("kept" + Keys.ENTER)  # one at a time
    page.find("#send").click()
    page.wait(lambda: "stopped" in page.text(".note"))
    assert page.count(".turn") == 1 and page.count(".record") == 0 and page.find("#ask").get_property("value") == "kept"


def test_a_key_is_asked_for_where_one_is_needed(window, locked, downloads):
    page = Page(window, locked)
    assert page.visible("#key") and "key" in page.text("#said")
    page.fill("#key", KEY + Keys.TAB)
    page.wait(lambda: page.text("#model") == "demo")
    page.fill("#most", "5")
    assert page.send(ASK)
    before = len([*downloads.glob("*.json")])
    page.find(".record").click()
    page.wait(lambda: len([*downloads.glob("*.json")]) == before + 1)
    assert KEY not in page.script("return JSON.stringify([location.href, {...localStorage}, document.cookie])")


def test_it_is_readable_in_the_dark_on_a_phone_and_by_other_means(page):
    page.send(ASK)
    for scheme in ("light", "dark"):
        page.media(scheme, "reduce")
        for selector in (".text", ".user", ".note", "#model", "#send", "#settings label", "#seed"):
            assert contrast(page, selector) >= 4.5, (scheme, selector)
        page.script("document.querySelectorAll('.token').forEach(token => token.style.setProperty('--doubt', '70%'))")
        assert contrast(page, ".token") >= 4.5, scheme
    assert page.script("return getComputedStyle(document.body).backgroundColor") == "rgb(21, 23, 27)"
    page.size(390, 760)
    assert page.script("return document.documentElement.scrollWidth <= innerWidth")
    for field in ("#ask", "#send", "#seed", "#most", "#clear"):
        box = page.find(field).rect
        assert box["x"] >= 0 and box["x"] + box["width"] <= 390 and box["y"] + box["height"] <= 760
    unnamed = "input, textarea, button, [role]"
    names = [
        element.accessible_name or element.aria_role for element in page.window.find_elements("css selector", unnamed)
    ]
    assert all(names)
    page.find("#seed").click()
    assert page.style("#seed", "outline-style") == "solid"
    loaded = page.script("return performance.getEntriesByType('resource').map(entry => new URL(entry.name).origin)")
    assert set(loaded) == {page.script("return location.origin")}


def contrast(page, selector):
    """WCAG's ratio of an element's colour to what is behind it."""
    colours = page.script(f"""
      const over = (top, low) => top.map((x, i) => i < 3 ? x * top[3] + low[i] * (1 - top[3]) : 1);
      const parse = text => {{
        const c = document.createElement("canvas").getContext("2d", {{ willReadFrequently: true }});
        c.fillStyle = text; c.fillRect(0, 0, 1, 1);
        const [r, g, b, a] = c.getImageData(0, 0, 1, 1).data;
        return [r, g, b, a / 255];
      }};
      const found = document.querySelectorAll({selector!r}), element = found[found.length - 1], behind = [];
      for (let e = element; e; e = e.parentElement) behind.push(parse(getComputedStyle(e).backgroundColor));
      const back = behind.reverse().reduce((low, top) => over(top, low), [255, 255, 255, 1]);
      return [over(parse(getComputedStyle(element).color), back), back];""")

    def light(colour):
        parts = [c / 12.92 if (c := x / 255) <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4 for x in colour[:3]]
        return 0.2126 * parts[0] + 0.7152 * parts[1] + 0.0722 * parts[2]

    low, high = sorted(map(light, colours))
    return (high + 0.05) / (low + 0.05)
