"""results.html: one file with tables, figures and photos, read as text and, where there is one, in a browser."""

import json
import re
import shutil
import subprocess
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
from conftest import make_data
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure

from comparing import Counts, Difference
from model.voc import CLASS_NAMES
from results_page import (
    PHOTOS,
    RUNS,
    Scored,
    Section,
    choose_each_once,
    classes_figure,
    curves_figure,
    differences_figure,
    draw_figures,
    draw_gallery,
    styles,
    write_page,
)
from synthesize_results import Comparison

BROWSERS = ("chromium-headless-shell", "chromium", "google-chrome", "chrome")
BROWSER = next(filter(None, map(shutil.which, BROWSERS)), None)
ODD = "<b>&|$x$"  # a name that HTML, Markdown and matplotlib might each take for their own


class Page(HTMLParser):
    """The elements of a page: tags with their attributes, ids, and its text."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source, self.elements, self.words = path.read_text(), list[tuple[str, dict]](), list[str]()
        self.feed(self.source)
        self.text = " ".join(" ".join(self.words).split())

    def handle_starttag(self, tag, attrs):
        self.elements.append((tag, dict(attrs)))

    def handle_data(self, data):
        self.words.append(data)


def section(rows: list[str], *, photos: int = 20, title: str = "data, 4 classes") -> Section:
    """A section of rows of which the first is the baseline, each of two seeds."""
    table = pd.DataFrame(
        {"name": rows, "difference": (["-", "+0.020 (+0.010 to +0.030) better", "-0.10", "+0.3"] * 3)[: len(rows)]}
    )
    others = {row: {"mIoU": Difference(0.02, 0.01, 0.03, 0.001)} for row in rows[1:]}
    words = {row: {"mIoU": "better" if photos >= 10 else "few photos"} for row in others}
    classes = {row: [(0.5, 0.4, 0.6), (0.2, 0.1, 0.3), None, (0.9, 0.8, 1.0)] for row in rows}
    names = ["sky", "sea", "boat", "<gull>"]
    in_photos = [photos, 3, 0, photos]
    doubts = dict.fromkeys(rows, "optimistic")
    found = Comparison("val", rows[0], names, ["mIoU"], "photos", in_photos, others, doubts, words, {}, classes)
    pixels = np.zeros((2, 4, 4), np.int64)
    pixels[0, 0], pixels[1, 1, 1] = [30, 10, 0, 0], 7
    runs = [Scored(rows[0], Path("a"), "val", Counts(["1", "2"], names, pixels))]
    curves = {row: [[0.1, 0.2, 0.3], [0.2, None, 0.4]] for row in rows}
    return Section(title, table, curves, "mIoU", [found], runs)


def written(path: Path, *sections: Section, gallery=None) -> Page:
    write_page(path / "results.html", sections, ["One note & more."], gallery)
    return Page(path / "results.html")


# ---------------------------------------------------------------------------------------- tables and figures


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Page:
    """Two data sets: two rows, one of them oddly named, and a dozen; written twice with the same bytes."""
    many = section([f"row {number}" for number in range(12)], title="other data")
    pages = [written(tmp_path_factory.mktemp("same"), section(["base", ODD]), many) for _ in range(2)]
    assert pages[0].source.replace("same0", "same1") == pages[1].source
    return pages[0]


def test_a_page_has_the_cells_and_the_names_as_they_are(page):
    for words in (ODD, "+0.020 (+0.010 to +0.030) better", "One note & more.", f"{ODD}: better", "<gull>"):
        assert words in page.text
    assert "b" not in {tag for tag, _ in page.elements}


def test_a_page_needs_no_network(page):
    addresses = [value for _, given in page.elements for key, value in given.items() if key.endswith(("src", "href"))]
    assert addresses and all(address.startswith("#") for address in addresses)
    assert not re.search(r"@import|url\((?!#)", page.source)


def test_ids_of_figures_do_not_collide(page):
    ids = [given["id"] for _, given in page.elements if "id" in given]
    assert len(ids) == len({*ids})
    assert {*re.findall(r'(?:url\(|href=")#([^)"]+)', page.source)} <= {*ids}


def test_confusion_has_per_cents_of_each_class_and_its_IoU(page):
    cells = page.text.split("IoU sky")[1].split()
    assert cells[:8] == ["75", "25", "0.750", "sea", "100", "0.412", "boat", "-"]


def test_of_many_rows_each_looks_different_and_the_classes_are_of_a_few(page):
    assert f"of {RUNS} of the 12 rows" in page.text
    strokes = re.findall(r'<path d="[^"]*" clip-path="[^"]*" style="fill: none; (.*?stroke-width: 1.8)', page.source)
    assert len(strokes) == 14 and len({*strokes}) == 12  # the two sections have the same ones


def segments(figure: Figure) -> int:
    """The intervals that a figure draws."""
    collections = [each for each in figure.axes[0].collections if isinstance(each, LineCollection)]
    return sum(len(ends) == 2 for each in collections for ends in each.get_segments())


def test_the_curves_are_those_of_every_run_and_the_means_of_the_rows():
    rows = section(["three", "_$x$"])
    rows.curves = {"three": [[0.1, 0.3], [0.2, 0.2, 0.9], [0.3, 0.1]], "_$x$": [[0.4]]}
    figure = curves_figure(rows, styles(rows))
    *runs, mean = [line.get_ydata() for line in figure.axes[0].lines[:4]]
    np.testing.assert_array_equal(runs, [[0.1, 0.3, np.nan], [0.2, 0.2, 0.9], [0.3, 0.1, np.nan]])
    assert mean == pytest.approx([0.2, 0.2, 0.9]) and figure.axes[0].lines[5].get_ydata() == [0.4]
    assert [text.get_text() for text in figure.legends[0].texts] == ["three", r" _\$x\$"]
    colours = [line.get_color() for line in figure.axes[0].lines]
    assert colours == colours[:1] * 4 + colours[-1:] * 2 and colours[0] != colours[-1]


def test_the_baseline_is_among_the_rows_whose_classes_are_drawn():
    (found,) = section([f"row {number}" for number in range(12)]).comparisons
    figure = classes_figure(found, {f"row {number}": "C0-" for number in reversed(range(12))})
    assert [text.get_text() for text in figure.legends[0].texts] == [f"row {n}" for n in (0, 11, 10, 9, 8, 7)]


def test_intervals_are_drawn_and_differences_at_all_unless_photos_are_few():
    for photos, intervals in ((20, 2 * 2), (9, 0)):
        rows = section(["base", "other"], photos=photos)
        (found,) = rows.comparisons
        colours = styles(rows)
        assert segments(classes_figure(found, colours)) == intervals
        assert any("Difference" in caption for caption in draw_figures(rows, "key")) == bool(intervals)
    assert segments(differences_figure(section(["base", "other"]).comparisons[0], "mIoU", colours)) == 1


# ---------------------------------------------------------------------------------------- photos


def test_each_photo_is_chosen_once():
    scores = np.array([0.5, np.nan, *np.linspace(0, 1, 14)])
    chosen = choose_each_once(scores)
    places = [place for kind in chosen.values() for place in kind]
    assert [*map(len, chosen.values())] == [PHOTOS] * 4 and len({*places}) == len(places) and 1 not in places
    assert chosen["worst"] == [2, 3, 4] and chosen["best"] == [15, 14, 13] and 0 in chosen["median"]
    assert choose_each_once(np.array([0.5, np.nan])) == {"worst": [0], "median": [], "best": [], "random": []}


@pytest.fixture
def scored(experiment, trained) -> Scored:
    """A run and the counts of val, which are drawn by lot but of its photos."""
    ids = (trained[1] / "val.txt").read_text().split()
    pixels = np.random.default_rng(0).integers(1, 9, (len(ids), 21, 21))
    return Scored("run <1>", experiment, "val", Counts(ids, [*CLASS_NAMES], pixels))


def test_a_gallery_has_photo_truth_and_one_or_two_predictions(scored, tmp_path):
    for runs in ([scored], [scored, Scored("run 2", scored.folder, "val", scored.counts)]):
        gallery = draw_gallery(runs)
        page = written(tmp_path, gallery=gallery)
        assert len(gallery.groups["worst"]) == len(scored.counts.ids) == 3
        images = [given["src"] for tag, given in page.elements if tag == "img"]
        assert len(images) == 3 * (2 + len(runs)) and all(each.startswith("data:image/jpeg;base64,") for each in images)
        assert len([tag for tag, _ in page.elements if tag == "input"]) == 3 * (len(runs) - 1)
        for words in (*scored.counts.ids, *(run.name for run in runs), "background", "void"):
            assert words in page.text


def test_a_gallery_without_its_data_says_why(scored, tmp_path):
    record = json.loads((scored.folder / "run.json").read_text())
    (scored.folder / "run.json").unlink()
    (scored.folder / "run.json").write_text(json.dumps(record | {"data_dir": str(tmp_path / "gone")}))
    page = written(tmp_path, gallery=draw_gallery([scored]))
    assert f"was trained on {tmp_path / 'gone'}, which is not there" in page.text
    other = make_data(tmp_path / "other", val=4)
    (scored.folder / "run.json").write_text(json.dumps(record | {"data_dir": str(other)}))
    assert "the list val is not the one that run <1> was scored on" in draw_gallery([scored]).note


# ---------------------------------------------------------------------------------------- in a browser

CLICKS = """<script>
const names = () => [...document.querySelectorAll("tbody td:first-child")].map(cell => cell.textContent), found = {};
for (const click of [1, 1, 0, 0]) {
  document.querySelectorAll(".sortable button")[click].click();
  found[`${Object.keys(found).length}`] = names().join(" ");
}
const slider = document.querySelector("input"), picture = document.querySelectorAll(".slider img")[1];
slider.value = 80;
slider.dispatchEvent(new Event("input", { bubbles: true }));
found.clip = getComputedStyle(picture).clipPath;
dispatchEvent(new Event("beforeprint"));
found.open = document.querySelectorAll("details[open]").length;
found.wide = document.documentElement.scrollWidth - innerWidth;
document.title = JSON.stringify(found);
</script>"""


@pytest.mark.skipif(BROWSER is None, reason="no Chromium")
def test_in_a_browser_a_click_sorts_and_the_slider_moves(scored, tmp_path):
    gallery = draw_gallery([scored, Scored("run 2", scored.folder, "val", scored.counts)])
    page = written(tmp_path, section(["b", "c10", "a", "c9"]), gallery=gallery)
    (tmp_path / "clicked.html").write_text(page.source + CLICKS)
    options = ["--no-sandbox", "--disable-gpu", "--window-size=390,800", f"--user-data-dir={tmp_path / 'profile'}"]
    command = [BROWSER, "--headless", *options, "--dump-dom", (tmp_path / "clicked.html").as_uri()]
    shown = subprocess.run(command, capture_output=True, text=True, timeout=120, check=True).stdout
    found = json.loads(re.search("<title>(.*?)</title>", shown)[1])
    sorted_rows = ["c9 c10 a b", "a c10 c9 b", "a b c9 c10", "c10 c9 b a"]
    assert [found[key] for key in "0123"] == sorted_rows
    assert found["clip"] == "inset(0px 0px 0px 80%)" and found["open"] == 1 and found["wide"] <= 0
