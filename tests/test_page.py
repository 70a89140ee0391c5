"""The page that chats, in a browser, as somebody uses it who talks to a server of its own."""

import re
import shutil
import signal
import sys
from pathlib import Path

import pytest
import torch

from kvprune import PrunedCache, demo
from kvprune.cache.models import cache_argument
from kvprune.demo.task import RecallGenerator, decode
from kvprune.policy.registry import parse
from measuring.servers import Serving

playwright = pytest.importorskip("playwright.sync_api", reason="needs a browser: make test-browser")
pytestmark = pytest.mark.browser

CHAT = "{% for message in messages %}{{ message.content }} {% endfor %}"
KEY, POLICY = "sesame", "kivi:bits=4"
RECALL = RecallGenerator(3).document(200, 6)
DOCUMENT = decode(RECALL.document[1:])
QUESTIONS = [decode(RECALL.question(note)) for note in range(3)]
ARGUMENTS = (
    "--headless --no-sandbox --disable-gpu --disable-quic --no-first-run --disable-background-networking "
    "--disable-component-update --disable-sync"
).split()


@pytest.fixture(scope="module")
def browser():
    names = ("chromium", "chromium-browser", "google-chrome")
    path = next((found for name in names if (found := shutil.which(name))), None)
    with playwright.sync_playwright() as started:
        if path is None and not Path(path := started.chromium.executable_path).exists():
            pytest.skip("there is no Chromium: .venv/bin/playwright install chromium")
        opened = started.chromium.launch(executable_path=path, args=ARGUMENTS)
        yield opened
        opened.close()


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    folder = tmp_path_factory.mktemp("served")
    (folder / "chat.jinja").write_text(CHAT)
    command = [
        *(sys.executable, "-m", "kvprune", "serve", "--model", "demo", "--policy", "keydiff", "--budget", "0.5"),
        *("--chat-template", str(folder / "chat.jinja"), "--api-key", KEY, "--max-new-tokens", "4000"),
    ]
    serving = Serving(command, folder / "log")
    serving.start()
    yield serving
    serving.stop()


class Page:
    """What somebody sees and does. wrong: what the page's script stumbled over."""

    def __init__(self, browser, url, width=900):
        self.page = browser.new_page(viewport={"width": width, "height": 667})
        self.page.set_default_timeout(60_000)
        self.wrong = []
        self.page.on("pageerror", lambda error: self.wrong.append(error))
        self.page.goto(url)

    def write(self, text):
        self.page.fill("#text", text)
        self.page.keyboard.press("Enter")

    def says(self, kind, text):
        """Wait until the newest of a kind says that."""
        playwright.expect(self.page.locator(kind).last).to_have_text(text, timeout=60_000)

    def set(self, **fields):
        if self.page.locator("#details").get_attribute("open") is None:
            self.page.click("summary")
        for name, text in fields.items():
            self.page.fill(f"#{name}", text)

    def unlock(self):
        self.says(".error", "This server wants an API key: write it above.")
        self.page.keyboard.type(KEY)  # the field has the focus
        self.page.keyboard.press("Enter")
        self.says("#served", re.compile(r"^demo, KeyDiff\(budget=0.5"))


@pytest.fixture
def page(browser, server):
    opened = Page(browser, server.url)
    opened.unlock()
    yield opened
    assert not opened.wrong
    opened.page.close()


def generated(parts):
    """What `generate()` writes after texts that are read one after the other, of which the first is a prefix."""
    model, tokenizer = demo.load()
    cache = PrunedCache(model, parse(POLICY))
    read = tokenizer(parts[0], add_special_tokens=False, return_tensors="pt")["input_ids"]
    rest = tokenizer("".join(parts[1:]), add_special_tokens=False, return_tensors="pt")["input_ids"]
    with torch.no_grad():
        model(read, **cache_argument(cache))
    ids = torch.cat([read, rest], 1)
    output = model.generate(ids, attention_mask=torch.ones_like(ids), **cache_argument(cache), max_new_tokens=100)
    return tokenizer.decode(output[0, ids.shape[1] :], skip_special_tokens=True)


def test_two_questions_about_a_document(page):
    page.set(document=DOCUMENT, policy=POLICY)
    said = []
    for question in QUESTIONS[:2]:
        expected = generated([f"{DOCUMENT} ", *said, f"{question} "])
        page.write(question)
        page.says(".assistant", expected)
        page.says(".user", question)
        said += [f"{question} ", f"{expected} "]
        page.says(".cost", re.compile(rf"^KIVI\(bits=4\): \d+ prompt tokens.*, {len(expected.split()) + 1} new; cache"))
    assert [page.page.locator(kind).count() for kind in (".user", ".assistant", ".cost")] == [2, 2, 2]
    page.says(".cost", re.compile(r"\(\d+ not read again\)"))
    page.page.click("#new")
    assert page.page.locator(".turn").count() == 0


def test_an_answer_is_stopped_and_the_talk_goes_on(page):
    page.write(DOCUMENT)  # no question: the model goes on with such a text
    playwright.expect(page.page.locator(".assistant")).to_have_text(re.compile(r"\w+ \w+ \w+ "))
    page.page.click("#stop")
    page.says(".cost", "Stopped.")
    said = page.page.locator(".assistant").inner_text()
    page.write(QUESTIONS[0])
    playwright.expect(page.page.locator("#send")).to_be_visible()
    assert page.page.locator(".assistant").first.inner_text() == said
    page.says(".cost", re.compile(r"new"))


def test_a_mistake_is_shown_and_the_question_stays(page):
    page.set(policy="a3sf")
    question = f"{DOCUMENT} {QUESTIONS[0]}"
    page.write(question)
    page.says(".error", re.compile("there is no policy named 'a3sf'. Did you mean 'a2sf'"))
    assert page.page.input_value("#text") == question
    assert page.page.locator(".user").count() == 0
    page.set(policy="")
    page.page.click("#send")
    page.says(".cost", re.compile("^KeyDiff"))
    assert page.page.locator(".error").count() == 0


def test_it_fits_on_a_phone(browser, server):
    page = Page(browser, server.url, width=375)
    page.unlock()
    page.write("word" * 100 + " " + DOCUMENT)
    page.page.click("#stop")
    page.set(document=DOCUMENT)
    for size in ("page.scrollWidth <= innerWidth", "page.scrollHeight <= innerHeight"):
        assert page.page.evaluate(f"(page => {size})(document.documentElement)")
    playwright.expect(page.page.locator("#send")).to_be_in_viewport()


def test_a_server_that_is_gone_is_told(browser, server):
    page = Page(browser, server.url)
    page.unlock()
    page.write(DOCUMENT)
    playwright.expect(page.page.locator(".assistant")).to_have_text(re.compile(r"\w+ \w+ "))
    server.process.send_signal(signal.SIGKILL)
    page.says(".error", "The answer broke off: the server is gone.")
    page.write(QUESTIONS[0])
    page.says(".error", "The server does not answer: is it running?")
    assert page.page.input_value("#text") == QUESTIONS[0]
