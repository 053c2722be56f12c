"""The page as text: every word escaped, every script allowed by its digest, no outside address to fetch."""

import base64
import hashlib
import itertools
import json
import re
from html.parser import HTMLParser

import pytest

from batchlab.core.errors import InputError
from batchlab.viz.blocks import (
    Actions,
    Bullets,
    Chart,
    Choice,
    Paragraph,
    Row,
    Section,
    Table,
    Tiles,
    Verdict,
)
from batchlab.viz.page import data_text, page, policy
from batchlab.viz.style import blank
from batchlab.viz.table import terminal_table

HOSTILE = "</script><script>alert(1)</script><img src=x onerror=alert(2)>\"'`&amp;\u2028\u2029\x00\x1b[31m\ud800{{}}${}"


def chart(name, text="t", figure=None):
    figure = figure or blank("x", "y").add_scatter(x=[1, 2], y=[3, 4], name="line")
    return Chart(name, text, text, figure, Table(text, (text, text), [(text, text)]))


def sections(text="t"):
    return [
        Section("words", text, [Paragraph(text), Paragraph(text, quiet=True), Bullets([text]), Verdict(text, text)]),
        Section(
            "numbers", text, [Actions([(text,) * 3]), Tiles([(text,) * 3]), Table(text, (text,) * 2, [(text,) * 2])]
        ),
        Section(
            "pictures", text, [chart("a", text), Choice(text, [(text, chart("b", text))]), Row([chart("c", text)])]
        ),
    ]


class Elements(HTMLParser):
    def __init__(self, text):
        super().__init__()
        self.tags, self.ids, self.text = [], [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))
        self.ids += [value for name, value in attributes if name == "id"]

    def handle_data(self, data):
        self.text.append(data)


def scripts(text):
    return re.findall(r"<script>(.*?)</script>", text, re.DOTALL)


def test_the_policy_names_exactly_the_scripts_of_the_page():
    text = page("title", sections())
    (content,) = re.findall(r'http-equiv="Content-Security-Policy" content="([^"]*)"', text)
    allowed = re.findall(r"'sha256-([^']*)'", content)
    digests = [base64.b64encode(hashlib.sha256(s.encode()).digest()).decode() for s in scripts(text)]
    assert allowed == digests and len(digests) == 2
    rules = dict(rule.strip().split(" ", 1) for rule in content.split(";"))
    assert rules["default-src"] == "'none'" == rules["base-uri"] == rules["form-action"]
    assert "unsafe" not in rules["script-src"] and rules["img-src"] == "data:"
    assert policy(["a"]) != policy(["b"])


def test_hostile_text_adds_no_element_and_no_attribute():
    plain, hostile = Elements(page("t", sections("t"))), Elements(page(HOSTILE, sections(HOSTILE), subtitle=HOSTILE))
    assert [tag for tag, _ in plain.tags] == [tag for tag, _ in hostile.tags]
    assert [sorted(attributes) for _, attributes in plain.tags] == [sorted(a) for _, a in hostile.tags]
    assert sum("alert(1)" in text for text in hostile.text) > 20  # it is there, as text


def test_the_page_is_writable_as_utf_8_and_has_no_control_characters():
    text = page(HOSTILE, sections(HOSTILE))
    text.encode()
    rest = text
    for script in scripts(text):
        rest = rest.replace(script, "")
    assert not re.search(r"[\x00-\x08\x0b-\x1f\x7f]", rest)


def test_nothing_is_fetched_from_elsewhere():
    text = page("title", sections())
    for script in scripts(text):
        text = text.replace(script, "")
    assert not re.search(r"https?:|//[a-z]|@import|url\(", text)
    for tag, attributes in Elements(text).tags:
        for name in ("src", "href", "action", "srcset"):
            value = attributes.get(name)
            assert value is None or value.startswith("#") or (tag == "link" and value == "data:,"), (tag, value)


def test_data_round_trips_through_the_page():
    figure = blank("x", "y").add_scatter(x=[1.5, 2.5], y=[3.25, float("nan")], name=HOSTILE)
    text = page("t", [Section("s", "t", [chart("a", "t", figure)])])
    (data,) = re.findall(r'<script type="application/json" id="page-data">(.*?)</script>', text, re.DOTALL)
    assert not set("<>&\u2028\u2029") & set(data)
    (trace,) = json.loads(data)["figures"]["a"]["data"]
    assert (trace["x"], trace["y"], trace["name"]) == ([1.5, 2.5], [3.25, None], HOSTILE)


def test_data_text_refuses_what_json_has_no_word_for():
    assert json.loads(data_text({"a": HOSTILE})) == {"a": HOSTILE}
    with pytest.raises(ValueError, match="Out of range float"):
        data_text({"a": float("nan")})


def test_headings_are_in_order_and_ids_unique():
    elements = Elements(page("t", sections()))
    assert len(set(elements.ids)) == len(elements.ids)
    levels = [int(tag[1]) for tag, _ in elements.tags if re.fullmatch("h[1-6]", tag)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(below - above <= 1 for above, below in itertools.pairwise(levels))


@pytest.mark.parametrize("name", ["two words", "", 'a"b', "1a", "numbers"])
def test_names_must_be_plain_and_unique(name):
    with pytest.raises(InputError, match="names on a page must be unique and of letters, digits and hyphens"):
        page("t", [Section("numbers", "t", [chart(name)])])


def test_the_same_input_gives_the_same_page():
    assert page("t", sections()) == page("t", sections())


def test_terminal_text_is_neither_markup_nor_control(capsys):
    from rich.console import Console

    console = Console(width=100, force_terminal=True, color_system=None)
    console.print(terminal_table("[red]run\x1b]0;x\x07", [("name\x1b[2J", "[bold]value[/bold]", "a remark")]))
    shown = capsys.readouterr().out
    assert "[bold]value[/bold]" in shown and "[red]run" in shown
    assert "\x1b]0;x" not in shown and "\x1b[2J" not in shown
