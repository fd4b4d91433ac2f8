"The explorer and the widget in a real browser: load, select, slide, drag, and check what changed."
import json
import re
import time

import numpy as np
import pytest
from browser import CHROMIUM, Browser

from patchify.boxes import Regions
from patchify.encoder import load_encoder
from patchify.evaluate import describe, rank
from patchify.pages.explorer import explorer_data, explorer_html
from patchify.pages.site import shell
from patchify.pages.widget import SCRIPT, STYLE, LiveSearch, _requested

pytestmark = pytest.mark.skipif(CHROMIUM is None, reason="no Chromium on this machine")
WIDTHS = pytest.mark.parametrize("width", [1280, 390])


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    pytest.importorskip("websocket", reason="the browser is driven through websocket-client")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def described(data):
    from patchify.data.registry import load

    return describe(load("tiny", data), load_encoder("mini", device="cpu"), Regions(level=3), data / "stores")


@pytest.fixture(scope="module")
def runs(described):
    return {level: rank(described, level) for level in range(4)}


@pytest.fixture(scope="module")
def page(runs, tmp_path_factory):
    "An explorer whose second list holds the ranking of L1."
    data = explorer_data(runs, {"second list": runs[1]}, depth=8)
    file = tmp_path_factory.mktemp("page") / "explorer.html"
    file.write_text(shell("Explorer", "<h1>Explorer</h1>" + explorer_html(data), "index.html"))
    return file.as_uri(), data


def shown_images(browser, data, section=1) -> list[str]:
    "The names of the images of a list, in the order of the page."
    return browser.js(f"[...document.querySelectorAll('#ex-lists section:nth-child({section}) img')].map(image => image.alt)")


def ranked_images(run, query, count=8) -> list[str]:
    return run.described.benchmark.gallery["path"].iloc[run.result.ranks[query, :count]].tolist()


@WIDTHS
def test_a_query_is_chosen_by_its_picture(browser, page, runs, width):
    url, data = page
    browser.open(url, width)
    assert browser.js("document.querySelectorAll('#ex-picker button').length") == len(data["queries"]) > 2
    for number in (0, 2):
        browser.click(f"#ex-picker li:nth-child({number + 1}) button")
        query = data["queries"][number]
        assert shown_images(browser, data) == ranked_images(runs[3], query["row"])
        assert shown_images(browser, data, 2) == ranked_images(runs[1], query["row"])
        assert browser.js("new URLSearchParams(location.hash.slice(1)).get('query')") == query["id"]
        pressed = "[...document.querySelectorAll('#ex-picker [aria-pressed=true]')].map(b => Number(b.dataset.query))"
        assert browser.js(pressed) == [number]
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.errors == []


@WIDTHS
def test_the_level_reorders_exact_search_only(browser, page, runs, width):
    url, data = page
    browser.open(url, width)
    query = data["queries"][0]["row"]
    browser.js("document.querySelector('#ex-level').focus()")
    for level in (2, 1, 0):
        browser.key("ArrowLeft")
        assert shown_images(browser, data) == ranked_images(runs[level], query)
        assert shown_images(browser, data, 2) == ranked_images(runs[1], query)
        assert browser.js("document.querySelector('#ex-numbers [aria-current=true]').innerText").startswith(f"L{level}")
    assert ranked_images(runs[0], query) != ranked_images(runs[3], query)
    assert browser.errors == []


@WIDTHS
def test_pointing_at_a_result_shows_its_thirty_scores(browser, page, runs, width):
    url, data = page
    browser.open(url, width)
    heat = "getComputedStyle(document.querySelector('#ex-lists .ex-card .ex-heat')).opacity"
    assert browser.js(heat) == "0"
    browser.hover("#ex-lists .ex-card")
    browser.until(f"{heat} === '1'")
    texts = browser.js("[...document.querySelectorAll('#ex-detail text')].map(text => Number(text.textContent))")
    query = data["queries"][0]["row"]
    run = runs[3]
    image = run.result.ranks[query, 0]
    descriptors = np.concatenate(list(run.described.gallery.descriptors()))[image].astype(np.float32)
    assert np.allclose(texts, descriptors @ run.described.queries[query], atol=0.006) and len(texts) == 30
    said = browser.js("document.querySelector('#ex-detail p').textContent")
    assert f"score {run.result.scores[query, 0]:.3f}" in said
    assert browser.errors == []


def test_the_threshold_changes_locscore_and_what_counts_as_located(browser, page, runs):
    url, data = page
    browser.open(url)
    columns = "[...document.querySelectorAll('#ex-numbers tbody tr')].map(row => row.lastChild.textContent)"
    for tau, presses in [(0.4, 0), (0.2, 4)]:
        browser.js("document.querySelector('#ex-tau').focus()")
        for _ in range(presses):
            browser.key("ArrowLeft")
        expected = [100 * np.nanmean(run.locscores(tau)) for run in runs.values()]
        assert np.allclose([float(text) for text in browser.js(columns)], expected, atol=0.06)
        marks = browser.js("[...document.querySelectorAll('.ex-card i')].map(mark => mark.textContent)")
        for mark in marks:
            overlap = float(re.search(r"IoU ([\d.]+)", mark)[1])
            assert abs(overlap - tau) < 0.006 or ("located" in mark) == (overlap >= tau)
    assert browser.errors == []


def test_filters_choose_failures_groups_and_near_duplicates(browser, page, runs):
    url, data = page
    browser.open(url)
    select = "(s => {{s.value = '{}'; s.dispatchEvent(new Event('change'))}})(document.querySelector('#ex-{}'))"
    count = "Number(document.querySelector('#ex-count').textContent.split(' ')[0])"
    positives = runs[3].described.benchmark.positives
    right = sum(runs[3].result.ranks[query["row"], 0] in positives[query["row"]] for query in data["queries"])
    for value, expected in [("right", right), ("wrong", len(data["queries"]) - right), ("", len(data["queries"]))]:
        browser.js(select.format(value, "outcome"))
        assert browser.js(count) == expected
    for name in ("scale", "clutter"):
        for group in range(4):
            browser.js(select.format(group, name))
            assert browser.js(count) == sum(group in query[name] for query in data["queries"])
        browser.js(select.format("", name))
    everything = len(shown_images(browser, data))
    browser.js(select.format("hide", "duplicates"))
    hidden = everything - len(shown_images(browser, data))
    browser.js(select.format("only", "duplicates"))
    assert 0 <= hidden < everything and len(shown_images(browser, data)) <= everything
    assert browser.errors == []


def test_an_address_leads_to_a_query_level_and_threshold(browser, page, runs):
    url, data = page
    query = data["queries"][1]
    browser.open(f"{url}#query={query['id']}&level=1&tau=0.25")
    assert shown_images(browser, data) == ranked_images(runs[1], query["row"])
    assert browser.js("document.querySelector('#ex-tau').value") == "0.25"
    browser.js(f"location.hash = 'query={data['queries'][0]['id']}&level=2&tau=0.5'")
    browser.until("document.querySelector('#ex-level').value === '2'")
    assert shown_images(browser, data) == ranked_images(runs[2], data["queries"][0]["row"])
    assert browser.errors == []


HARNESS = """<!doctype html><meta charset=utf-8><meta name=viewport content="width=device-width"><style>{style}</style>
<body><div id=view></div><script type=module>
{script}
class Model {{
  constructor(state) {{ this.state = state; this.heard = {{}}; }}
  get(name) {{ return this.state[name]; }}
  set(name, value) {{ this.state[name] = value; this.changed = name; }}
  save_changes() {{ toPython(JSON.stringify({{query: this.state[this.changed]}})); }}
  send(content) {{ toPython(JSON.stringify(content)); }}
  on(name, call) {{ (this.heard[name] = this.heard[name] || []).push(call); }}
  off(name, call) {{ this.heard[name] = (this.heard[name] || []).filter(other => other !== call); }}
  receive(name, value) {{
    if (name === "answer") this.state.answer = value;
    for (const call of this.heard[name === "answer" ? "change:answer" : "msg:custom"] || []) call(value);
  }}
}}
window.model = new Model({state});
window.leave = render({{model: window.model, el: document.getElementById("view")}});
</script></body>"""


class Widget:
    "The widget's script in a page, answered by a `LiveSearch` as the kernel would."

    def __init__(self, browser, live, folder, width):
        state = {"photographs": live.photographs, "boxes": live.boxes, "images": live.images, "levels": 4, "query": {}, "answer": {}}
        file = folder / "widget.html"
        script = SCRIPT.replace("export default {render};", "")
        file.write_text(HARNESS.format(style=STYLE, script=script, state=json.dumps(state)))
        self.browser = browser
        self.live = live
        browser.calls.clear()
        browser.open(file.as_uri(), width)

    def settle(self) -> dict:
        "Answer what the page asks until it asks no more; the last query."
        last = None
        quiet = time.monotonic()
        while time.monotonic() - quiet < 0.3:
            self.browser.js("new Promise(done => setTimeout(done, 20))")
            while self.browser.calls:
                quiet = time.monotonic()
                call = self.browser.calls.pop(0)
                if "pictures" in call:
                    self.reply("pictures", {"pictures": _requested(self.live, call["pictures"])})
                else:
                    last = call["query"]
                    hits = self.live.search(last["photo"], last["box"], last["level"], 6)
                    self.reply("answer", {"hits": hits, "milliseconds": 5, "number": last["number"], "sent": last["sent"]})
        return last

    def reply(self, name, value):
        self.browser.js(f"model.receive({json.dumps(name)}, {json.dumps(value)})")

    def images(self) -> list[int]:
        return self.browser.js("[...document.querySelectorAll('.px-result')].map(result => Number(result.dataset.image))")


@pytest.fixture(scope="module")
def live(described):
    return LiveSearch.of_benchmark(described)


@WIDTHS
def test_ranking_and_heat_maps_follow_a_dragged_box(browser, live, runs, tmp_path, width):
    widget = Widget(browser, live, tmp_path, width)
    widget.settle()
    assert widget.images() == runs[3].result.ranks[0, :6].tolist()  # of the query's own box
    before = browser.js("document.querySelector('.px-heat').innerHTML")
    left, top, wide, high = browser.place(".px-photo svg")
    browser.drag((left + 0.05 * wide, top + 0.1 * high), (left + 0.4 * wide, top + 0.5 * high))
    query = widget.settle()
    size = browser.js("document.querySelector('.px-photo svg').viewBox.baseVal.width")
    assert np.allclose(np.array(query["box"])[[0, 2]] / size, [0.05, 0.4], atol=0.02)
    assert widget.images() == [hit["image"] for hit in live.search(0, query["box"], 3, 6)]
    assert browser.js("document.querySelector('.px-heat').innerHTML") != before
    assert browser.js("document.querySelectorAll('.px-result:first-child .px-heat rect').length") == 16
    assert "images in 5 ms" in browser.js("document.querySelector('.px output').textContent")
    assert browser.js("[...document.images].every(image => image.naturalWidth > 0)")
    assert browser.js("document.documentElement.scrollWidth") <= width
    assert browser.errors == []


def test_level_keys_and_photographs_of_the_widget(browser, live, tmp_path):
    widget = Widget(browser, live, tmp_path, 1280)
    first = widget.settle()
    browser.js("document.querySelector('.px input[type=range]').focus()")
    browser.key("ArrowLeft")
    assert widget.settle()["level"] == 2
    browser.js("document.querySelector('.px-photo svg').focus()")
    browser.key("ArrowRight")
    moved = widget.settle()
    assert moved["box"][0] > first["box"][0] or moved["box"] == first["box"]
    browser.click(".px-photos [data-photo='2']")
    query = widget.settle()
    assert query["photo"] == 2 and query["box"] == live.boxes[2]
    browser.click(".px input[type=checkbox]")
    assert browser.js("getComputedStyle(document.querySelector('.px-heat')).display") == "none"
    browser.js("leave()")
    assert browser.js("Object.values(model.heard).every(calls => calls.length === 0)")
    assert browser.errors == []


def test_while_one_answer_is_awaited_only_the_latest_box_is_kept(browser, live, tmp_path):
    widget = Widget(browser, live, tmp_path, 1280)
    widget.settle()
    left, top, wide, high = browser.place(".px-photo svg")
    browser.drag((left + 5, top + 5), (left + wide / 2, top + high / 2), steps=20)
    browser.js("new Promise(done => setTimeout(done, 50))")
    assert sum("query" in call for call in browser.calls) == 1
    last = widget.settle()
    assert last["box"][2] > 0.4 * browser.js("document.querySelector('.px-photo svg').viewBox.baseVal.width")
