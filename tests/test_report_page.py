"""The page and the Markdown of a report: nothing lost, nothing run, nothing fetched, and readable in a browser."""

import base64
import re
from html.parser import HTMLParser

import numpy as np
import pandas as pd
import pytest
from browser import browser, emulate
from hypothesis import given
from hypothesis import strategies as st

from pyro_lrblora.formatting import shown
from pyro_lrblora.plots.canvas import BLUE, canvas
from pyro_lrblora.report import html
from pyro_lrblora.report.document import (
    Details,
    Document,
    Facts,
    Note,
    Picture,
    Section,
    Table,
    Text,
    Verdict,
    Verdicts,
)
from pyro_lrblora.report.html import to_html
from pyro_lrblora.report.markdown import to_markdown
from pyro_lrblora.report.pictures import to_svg

EVIL = "<script>alert('x')</script>\"><img src=x onerror=alert(1)>"


def line(points: int = 20, title: str = "ELBO", width: float = 4.0):
    figure, ((axes,),) = canvas(width, 2.5)
    axes.plot(np.arange(points), np.sin(np.arange(points) * 1.7), ".", color=BLUE, label="bound")
    axes.fill_between([0, 1], 0, 1, hatch="//")  # a hatch is a pattern with an id that others refer to
    axes.set_title(title, fontsize=9)
    axes.legend(frameon=False, fontsize=8)
    return figure


def page_of(*blocks) -> str:
    return to_html(Document("Title", "", [Section("Only section", blocks)]))


def frame() -> pd.DataFrame:
    values = {"NLL": [0.5234567, 12.25, np.nan], "rows": [10, 9, 200], "text": ["b", "a | b", None]}
    return pd.DataFrame(values, index=pd.Index(["low", "diagonal", "full"], name="posterior"))


def sample() -> Document:
    checks = [
        Verdict("joint k-hat", 0.83, 0.7, "bad", "The guide misses **much**.", "Raise `K`."),
        Verdict("ECE", 0.031, 0.05, "good", "Confidence is right."),
        Verdict("calibration", None, "p > 0.01", "not checked", "No refits were asked for."),
        Verdict("noise", 3.4, 2, "warning", "Mostly noise.", "Use more draws."),
    ]
    wide = pd.DataFrame(np.arange(28.0).reshape(2, 14) / 7, columns=[f"a longer name {i}" for i in range(14)])
    return Document(
        "Report on a posterior",
        "Should one **believe** it?",
        [
            Section("Summary", [Text("First.\n\nSecond, with `code`."), Verdicts(checks), Note("No validation rows.")]),
            Section("How it was built", [Facts({"prior": "normal(0.1)", "latents": 2304, "split": None})]),
            Section("Training", [Picture(line(), "the bound rises", "Steps."), Picture(line(), "again", "Again.")]),
            Section(
                "Comparison", [Table(frame(), "Three posteriors."), Table(wide, "Wide."), *[Text("More. " * 200)] * 3]
            ),
            Section("Words & numbers: k-hat", [Details("Open me", [Table(frame(), "Folded.", 1, "A note.")])]),
        ],
    )


class Reader(HTMLParser):
    """Every tag with its attributes, and the text of the page."""

    def __init__(self, page: str):
        super().__init__()
        self.tags, self.text = [], ""
        self.feed(page)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.tags if name in attributes]


def test_text_from_data_is_shown_and_never_run():
    table = pd.DataFrame({EVIL: [EVIL]}, index=pd.Index([EVIL], name=EVIL))
    check = Verdict(EVIL, EVIL, EVIL, "bad", EVIL, EVIL)
    picture = Picture(line(title=EVIL), EVIL, EVIL)
    blocks = [Text(EVIL), Note(f"`{EVIL}` **{EVIL}**"), Facts({EVIL: EVIL}), Verdicts([check]), picture]
    blocks += [Table(table, EVIL, note=EVIL), Details(EVIL, [Text(EVIL)])]
    reader = Reader(to_html(Document(EVIL, EVIL, [Section(EVIL, blocks)])))
    assert [tag for tag, _ in reader.tags].count("script") == 1
    assert not reader.values("onerror")
    assert "x" not in reader.values("src")
    assert reader.text.count("alert('x')") >= 20  # shown everywhere it was given
    assert EVIL in reader.values("aria-label")


def test_the_page_asks_for_nothing_and_its_links_lead_somewhere():
    page = to_html(sample())
    reader = Reader(page)
    ids = reader.values("id")
    assert len(ids) == len(set(ids))
    links = [link for name in ("href", "xlink:href") for link in reader.values(name) if link != "data:,"]
    used = re.findall(r"url\(#([^)]*)\)", page)
    assert len(used) > 4
    assert all(link.startswith("#") for link in links)
    assert {link[1:] for link in links} | set(used) | set(reader.values("aria-labelledby")) <= set(ids)
    assert {"summary", "how-it-was-built", "words--numbers-k-hat"} <= set(ids)
    addresses = re.findall(r"https?://[^\"' ]*", page)
    assert set(addresses) == {"http://www.w3.org/2000/svg", "http://www.w3.org/1999/xlink"}
    assert not [tag for tag, _ in reader.tags if tag in ("iframe", "object", "embed")]
    assert "default-src 'none'" in page


def test_the_same_document_gives_the_same_bytes(tmp_path):
    document = sample()
    assert to_html(document) == to_html(document) == to_html(sample())
    for name in ("a/figures", "b/figures"):
        (tmp_path / name[0]).mkdir()
        (tmp_path / name[0] / "report.md").write_text(to_markdown(document, tmp_path / name))
    first, second = (sorted((tmp_path / name).rglob("*.*")) for name in "ab")
    assert len(first) == 3
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


def test_a_number_is_rounded_for_the_eye_and_kept_whole_for_sorting():
    page = page_of(Table(frame(), "caption", {"NLL": 2}))
    assert '<td class="number" data-value="0.5234567">0.52</td>' in page
    assert '<td class="number" data-value="200">200</td>' in page
    assert page.count('<td class="missing">–</td>') == 2
    assert '<th scope="col" class="number">NLL</th>' in page
    assert '<th scope="col">text</th>' in page


@given(st.floats(-1e300, 1e300), st.integers(0, 6))
def test_a_shown_number_is_within_its_rounding(value, decimals):
    error = abs(float(shown(value, decimals)) - value)
    assert error <= max(0.5000001 * 10**-decimals if abs(value) < 1e7 else 0, 0.0051 * abs(value))
    assert value == 0 or float(shown(value, decimals)) != 0


def test_other_values_read_as_words():
    values = [None, float("nan"), pd.NA, True, np.bool_(False), np.float32(0.5), np.array(2), -np.inf, "a"]
    assert [shown(value, 2) for value in values] == ["–", "–", "–", "yes", "no", "0.50", "2", "-∞", "a"]


def test_tables_with_odd_frames_are_written():
    levels = pd.MultiIndex.from_tuples([("a", 1), ("b", 2)], names=["guide", "K"])
    double = pd.DataFrame([[1.5, 2.5], [3.5, 4.5]], index=levels, columns=["NLL", "NLL"])
    page = page_of(Table(double, "two levels"), Table(frame().iloc[:0], "no rows"), Table(pd.DataFrame(), "nothing"))
    assert '<th scope="row">b / 2</th>' in page
    assert page.count('data-value="2.5"') == 1
    assert to_markdown(Document("t", "", [Section("s", [Table(frame().iloc[:0], "no rows")])])).count("posterior") == 1


def test_ink_follows_the_page_but_words_stay():
    figure = line(title="#333333 url(#a)")
    figure.axes[0].text(0, 0, "black", color="black")
    svg = to_svg(figure, "alt", "_p1-")
    assert ">#333333 url(#a)<" in svg
    assert "#333333" not in svg.replace(">#333333 url(#a)<", "")
    assert "stroke: currentColor" in svg
    assert "fill: currentColor" in svg
    assert BLUE in svg
    assert "fill: #ffffff" not in svg  # no white sheet below


def test_a_picture_of_many_points_becomes_a_png_with_its_words():
    page = page_of(Picture(line(points=4_000), "many 'points'"), Picture(line(), "few"))
    images = [attributes for tag, attributes in Reader(page).tags if tag == "img"]
    assert [image["alt"] for image in images] == ["many 'points'"]
    assert base64.b64decode(images[0]["src"].partition(",")[2]).startswith(b"\x89PNG")
    assert page.count("<svg") == 1


def test_a_page_over_its_size_gives_up_svg_first_and_then_says_so(monkeypatch):
    pictures = [Picture(line(points=2_000), "line")] * 3
    full = len(page_of(*pictures).encode())
    monkeypatch.setattr(html, "PAGE_BYTES", full - 100_000)
    smaller = page_of(*pictures)
    assert "<svg" not in smaller
    assert len(smaller.encode()) <= full - 100_000
    with pytest.raises(ValueError, match="write shorter tables or fewer pictures"):
        page_of(Text("word " * full))


@pytest.mark.parametrize(
    ("build", "words"),
    [
        (lambda: Verdicts([("k-hat", 1, 1, "awful")]), "expected a verdict in"),
        (lambda: Table([1], "caption"), "expected a DataFrame, got list"),
        (lambda: Picture(line(), " "), "expected a text that says what the picture shows"),
        (lambda: Picture("line.png", "alt"), "expected a matplotlib Figure, got str"),
        (lambda: Section("Title", ["text"]), "expected a block such as Text"),
        (lambda: Section("!", []), "expected a title with a letter"),
        (
            lambda: Document("t", "", [Section("A b", []), Section("a B", [])]),
            "expected sections with different titles",
        ),
    ],
    ids=["verdict", "frame", "alt", "figure", "block", "title", "sections"],
)
def test_a_wrong_block_is_one_clear_error(build, words):
    with pytest.raises((ValueError, TypeError), match=words):
        build()


def test_markdown_holds_the_same_numbers_and_links_its_pictures(tmp_path):
    text = to_markdown(sample(), tmp_path / "my figures")
    rows = [[cell.strip() for cell in re.split(r"(?<!\\)\|", row)[1:-1]] for row in text.splitlines() if row[:1] == "|"]
    assert ["diagonal", "12.250", "9", "a \\| b"] in rows
    assert ["full", "–", "200", "–"] in rows
    assert ["joint k-hat", "**bad**", "0.830", "0.700", "The guide misses **much**.", "Raise `K`."] in rows
    assert ["split", "–"] in rows
    assert "## Words \\& numbers: k-hat" in text
    assert "> No validation rows." in text
    links = re.findall(r"!\[([^]]*)\]\(([^)]*)\)", text)
    assert links == [("the bound rises", "my%20figures/training-1.png"), ("again", "my%20figures/training-2.png")]
    written = [path.read_bytes() for path in sorted((tmp_path / "my figures").iterdir())]
    assert len(written) == 2
    assert all(data.startswith(b"\x89PNG") for data in written)
    assert "*Picture: the bound rises*" in to_markdown(sample())


def test_markdown_from_data_stays_text():
    odd = pd.DataFrame({"a|b": ["x\n| y", "<b>", "_em_ *em* log_prob"]})
    blocks = [Table(odd, "c"), Text("# no heading <b>"), Text("1. no list"), Text("`a|b` and **b_ | <i>**")]
    text = to_markdown(Document("t", "", [Section("s", blocks)]))
    assert "x \\| y" in text
    assert "\\<b\\>" in text
    assert "\\_em\\_ \\*em\\* log_prob" in text
    assert "\n\\# no heading \\<b\\>\n" in text
    assert "\n1\\. no list\n" in text
    assert "`a\\|b` and **b\\_ \\| \\<i\\>**" in text


def contrast(one: tuple, other: tuple) -> float:
    """The contrast ratio of two sRGB colours in 0..255 (WCAG 2.1)."""
    luminances = []
    for colour in (one, other):
        share = np.array(colour[:3]) / 255
        linear = np.where(share <= 0.04045, share / 12.92, ((share + 0.055) / 1.055) ** 2.4)
        luminances.append(linear @ [0.2126, 0.7152, 0.0722])
    return (max(luminances) + 0.05) / (min(luminances) + 0.05)


def test_every_pair_of_colours_can_be_read_in_light_and_in_dark():
    sheets = re.findall(r":root \{(.*?)\}", page_of(Text("x")), flags=re.DOTALL)
    assert len(sheets) == 2
    for sheet in sheets:
        colours = {
            name: tuple(bytes.fromhex(value)) for name, value in re.findall(r"--([\w-]+): #([0-9a-f]{6})", sheet)
        }
        pairs = [("ink", "paper"), ("ink", "wash"), ("muted", "paper"), ("muted", "wash"), ("link", "paper")]
        pairs += [(name, f"{name}-wash") for name in ("good", "warning", "bad", "unchecked")]
        assert {pair: contrast(*(colours[name] for name in pair)) for pair in pairs if
                contrast(*(colours[name] for name in pair)) < 4.5} == {}  # fmt: skip


@pytest.fixture(scope="module")
def chromium():
    with browser() as driver:
        yield driver


@pytest.fixture
def opened(chromium, tmp_path):
    (tmp_path / "report.html").write_text(to_html(sample()), encoding="utf-8")
    emulate(chromium, 1280)
    chromium.get((tmp_path / "report.html").as_uri())
    yield chromium
    assert chromium.get_log("browser") == []


def rgb(text: str) -> tuple:
    return tuple(float(number) for number in re.findall(r"[\d.]+", text))


def test_every_picture_is_drawn(opened):
    boxes = opened.execute_script(
        "return [...document.querySelectorAll('.picture svg')].map(each => [each.getBoundingClientRect().width,"
        " each.getBoundingClientRect().height, each.querySelectorAll('path, use').length])"
    )
    assert len(boxes) == 2
    assert all(width > 300 and height > 200 and paths > 10 for width, height, paths in boxes)


def test_a_png_loads(chromium, tmp_path):
    (tmp_path / "report.html").write_text(page_of(Picture(line(points=4_000), "many")), encoding="utf-8")
    chromium.get((tmp_path / "report.html").as_uri())
    assert chromium.execute_script("return document.querySelector('img').naturalWidth") == 600
    assert chromium.get_log("browser") == []


def test_the_contents_lead_to_their_sections(opened):
    links = opened.find_elements("css selector", "nav a")
    assert len(links) == 5
    for link in links:
        link.click()
        top, bottom = opened.execute_script(
            "const box = document.querySelector(':target').getBoundingClientRect(); return [box.top, box.bottom]"
        )
        at_end = opened.execute_script(
            "return innerHeight + scrollY >= document.documentElement.scrollHeight - 2 || scrollY === 0"
        )
        assert -1 <= top <= 40 or (at_end and 0 <= top < bottom <= 901)
    assert opened.execute_script("return scrollY") > 300


def test_a_table_is_sorted_by_its_numbers_and_missing_ones_stay_last(opened):
    table = "document.querySelectorAll('table.sortable:not(.verdicts)')[0]"

    def order():
        return opened.execute_script(f"return [...{table}.tBodies[0].rows].map(row => row.cells[0].textContent)")

    def sort_by(column: int):
        opened.execute_script(f"{table}.tHead.rows[0].cells[{column}].querySelector('button').focus()")
        opened.switch_to.active_element.send_keys("\n")  # as with the keyboard
        return opened.execute_script(f"return {table}.tHead.rows[0].cells[{column}].getAttribute('aria-sort')")

    assert order() == ["low", "diagonal", "full"]
    assert (sort_by(2), order()) == ("ascending", ["diagonal", "low", "full"])  # 9, 10, 200, not "10" < "200" < "9"
    assert (sort_by(2), order()) == ("descending", ["full", "low", "diagonal"])
    assert (sort_by(1), order()) == ("ascending", ["low", "diagonal", "full"])
    assert (sort_by(1), order()) == ("descending", ["diagonal", "low", "full"])
    assert opened.execute_script(f"return {table}.querySelectorAll('[aria-sort]').length") == 1


def test_the_worst_verdicts_come_first_when_sorted(opened):
    opened.execute_script("document.querySelectorAll('.verdicts button')[1].click()")
    words = opened.execute_script("return [...document.querySelectorAll('.verdicts .badge')].map(e => e.textContent)")
    assert words == ["bad", "warning", "not checked", "good"]


@pytest.mark.parametrize("width", [320, 360, 768, 1280])
def test_the_page_never_scrolls_sideways(opened, width):
    emulate(opened, width)
    opened.execute_script("document.querySelector('details').open = true")
    assert opened.execute_script("return document.documentElement.scrollWidth") <= width
    cut = opened.execute_script(
        "return [...document.querySelectorAll('.verdicts')]"
        ".some(each => each.parentNode.scrollWidth > each.parentNode.clientWidth)"
    )
    assert not cut


def test_dark_is_dark_and_its_text_can_be_read(opened):
    papers = []
    for scheme in ("light", "dark"):
        emulate(opened, 1280, scheme=scheme)
        paper, ink, axis = opened.execute_script(
            "const style = each => getComputedStyle(document.querySelector(each));"
            "return [style('body').backgroundColor, style('section p').color, style('.picture svg text').fill]"
        )
        papers.append(rgb(paper))
        assert contrast(rgb(paper), rgb(ink)) > 7
        assert contrast(rgb(paper), rgb(axis)) > 7
    assert sum(papers[0]) > 700 > 150 > sum(papers[1])


def test_paper_is_white_without_contents_and_with_everything_open(opened):
    emulate(opened, 700, scheme="dark", media="print")
    paper, contents = opened.execute_script(
        "return [getComputedStyle(document.body).backgroundColor, document.querySelector('nav').offsetHeight]"
    )
    assert (rgb(paper), contents) == ((255, 255, 255), 0)
    assert opened.execute_script("return document.querySelector('details table').getBoundingClientRect().height") > 50
    assert opened.execute_script("return document.documentElement.scrollWidth") <= 700
