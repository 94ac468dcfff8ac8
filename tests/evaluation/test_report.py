"""The report: complete in one file, honest about what is missing, deaf to what a prompt tries to inject."""

import copy
import io
import json
import re
import shutil
import subprocess
import xml.etree.ElementTree as ET
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from rich.console import Console

from accord.errors import ArtifactError
from accord.evaluation.report import (
    BestOfCard,
    Gallery,
    PairCard,
    RankedImage,
    Served,
    build_report,
    numbers,
    plots,
    replace_served,
    results_table,
    tables,
)
from accord.evaluation.report.guards import guard_plots
from accord.evaluation.report.numbers import DASH, Estimate
from accord.evaluation.summary import build_summary, compute_verdict
from tests.evaluation.report_example import draw, example_gallery, example_run_info, example_summary
from tests.evaluation.test_summary import comparison
from tests.lanes import missing

EMPTY = Gallery([], [])
PYTHON_NULL = re.compile(r"\b(None|nan|NaN|inf)\b")
HEADINGS = [
    "Before and after",
    "In words",
    "Best of many",
    "Served over gRPC",
    "Alignment against fidelity",
    "While it was fine-tuned",
    "Success by split and category",
    "What the raters prefer",
    "Does the reward know?",
    "The feedback",
    "What made this",
]


class Page(HTMLParser):
    """What a browser would find: elements with their attributes, and the text between the tags."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.elements: list[tuple[str, dict[str, str]]] = []
        self.texts: list[str] = []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.elements.append((tag, {name: value or "" for name, value in attrs}))

    def handle_data(self, data: str) -> None:
        self.texts.append(" ".join(data.split()))

    def values(self, name: str) -> list[str]:
        return [attributes[name] for _, attributes in self.elements if name in attributes]


@pytest.fixture(scope="module")
def html() -> str:
    return build_report(example_summary(), example_gallery(), example_run_info())


def test_has_every_section_in_order(html: str) -> None:
    found = [heading for heading in re.findall(r"<h2>([^<]+)</h2>", html) if heading in HEADINGS]
    assert found == HEADINGS
    assert "<h1>What the feedback changed</h1>" in html


def test_says_who_judged_and_how_much_they_agree(html: str) -> None:
    text = " ".join(Page(html).texts)
    assert "3 raters judged." in text
    assert "Krippendorff’s α 0.81" in text
    found = re.findall(r"panel/(\w+) ([\d, .]+)", re.sub(r"\s+", " ", text))
    assert [name for name, _ in found] == ["ben", "edith", "hugo"]
    assert found[0][1].split()[:4] == ["1,024", "45.2", "53.8", "1.0"]
    one = example_summary()
    one["raters"] = {"count": 1, "items": 0, "alpha": None, "by_rater": {}}
    alone = " ".join(Page(build_report(one, example_gallery(), example_run_info())).texts)
    assert "One rater judged." in alone
    assert "Krippendorff" not in alone


def test_says_how_many_labels_are_true_and_what_it_does_to_the_reward(html: str) -> None:
    text = re.sub(r"\s+", " ", " ".join(Page(html).texts))
    assert "Of the raters’ labels 97.8% are what raters would say who make no mistakes" in text
    assert "the reward’s area is 0.901 (" in text
    assert "by the true ones 0.912 (" in text
    people = example_summary()
    people["labels"] = {}  # of people nobody knows
    unknown = " ".join(Page(build_report(people, example_gallery(), example_run_info())).texts)
    assert "make no mistakes" not in unknown


def test_what_was_served_is_put_in_replaced_and_taken_out_again(html: str) -> None:
    served = example_gallery().served
    assert served is not None
    assert served.command in Page(html).texts
    without = replace_served(html, None)
    assert "Served over gRPC" not in without
    assert replace_served(without, served) == html
    assert replace_served(html, served) == html
    other = Served(served.cards[:1], "<b>another</b>", "accord serve")
    changed = replace_served(html, other)
    assert "<b>another" not in changed
    assert changed.count("<h2>Served over gRPC</h2>") == 1
    with pytest.raises(ArtifactError, match="accord report"):
        replace_served("<html></html>", served)


def test_says_every_sentence_of_the_verdict(html: str) -> None:
    sentences = compute_verdict(example_summary())
    assert len(sentences) > 5
    assert set(sentences) <= set(Page(html).texts)


def test_asks_the_network_for_nothing(html: str) -> None:
    page = Page(html)
    assert not re.search(r"https?:", html)
    assert not {tag for tag, _ in page.elements} & {"script", "iframe", "object", "embed", "form", "base"}
    assert all(source.startswith("data:") for source in page.values("src"))
    assert all(target.startswith(("#", "data:")) for target in page.values("href"))
    assert not re.search(r"@import|url\((?!#)", html)
    policy = next(a["content"] for t, a in page.elements if t == "meta" and "http-equiv" in a)
    assert policy.startswith("default-src 'none'")


def test_the_same_input_gives_the_same_bytes(html: str) -> None:
    assert build_report(example_summary(), example_gallery(), example_run_info()) == html


def test_what_json_gives_back_makes_the_same_page(html: str) -> None:
    again = json.loads(json.dumps(example_summary()))
    assert build_report(again, example_gallery(), example_run_info()) == html


def test_ids_are_unique_and_references_resolve(html: str) -> None:
    ids = Page(html).values("id")
    assert len(ids) == len(set(ids))
    assert set(re.findall(r'(?:href="#|url\(#)([^")]+)', html)) <= set(ids)


def test_hostile_text_stays_text() -> None:
    hostile = '"><script>alert(1)</script><img src=x onerror=alert(2)> {{ 7 * 7 }}'
    png = draw("red star", 0, right=True)
    gallery = Gallery(
        [PairCard(hostile, hostile, 0, png, png, 0.1, 0.2, False, True)],
        [BestOfCard(hostile, "base", [RankedImage(png, 0.5, True)])],
        note=hostile,
    )
    summary = example_summary() | {"digests": {hostile: hostile}, "seconds": {hostile: 1.0}}
    page = Page(
        build_report(
            summary, gallery, {"title": hostile, "recipe": hostile, "command": hostile, hostile: hostile}
        )
    )
    assert "script" not in {tag for tag, _ in page.elements}
    assert not page.values("onerror")
    assert "{{ 7 * 7 }}" in " ".join(page.texts)
    alts = [alt for alt in page.values("alt") if "<script>" in alt]
    assert len(alts) == 3


def test_every_image_has_words_for_those_who_cannot_see_it(html: str) -> None:
    images = [attributes for tag, attributes in Page(html).elements if tag == "img"]
    gallery = example_gallery()
    assert gallery.served is not None
    strips = [*gallery.best_of, *gallery.served.cards]
    assert len(images) == 2 * len(gallery.pairs) + sum(len(card.ranked) for card in strips)
    assert images[0]["alt"] == "Base model, “two red stars”, does not fit the prompt"
    assert (images[0]["width"], images[0]["height"], images[0]["class"]) == ("64", "64", "pixelated")


def test_only_small_images_are_shown_as_pixels() -> None:
    large = draw("red star", 0, right=True, size=256)
    html = build_report({}, Gallery([PairCard("x", "seen", 0, large, large, None, None, None, None)], []), {})
    images = [attributes for tag, attributes in Page(html).elements if tag == "img"]
    assert [(image["width"], image.get("class")) for image in images] == [("256", None)] * 2
    assert DASH in html  # the rewards


def test_counts_what_changed_in_the_pictures() -> None:
    png = draw("red star", 0, right=True)
    outcomes = [(False, True), (False, True), (True, False), (True, True), (False, False), (None, True)]
    pairs = [
        PairCard("red star", "seen", i, png, png, 0.5, 0.5, *outcome) for i, outcome in enumerate(outcomes)
    ]
    html = build_report({}, Gallery(pairs, []), {})
    assert "2 became right, 1 became wrong, 1 stayed right, 1 stayed wrong." in html


def nulled(tree: Any, null: float | None = None) -> Any:
    """The same structure with every number missing."""
    if isinstance(tree, dict):
        return {key: nulled(value, null) for key, value in tree.items()}
    if isinstance(tree, list):
        return [nulled(value, null) for value in tree]
    return tree if isinstance(tree, str) else null


def test_nothing_measured_is_no_error_and_no_number() -> None:
    for summary in ({}, nulled(example_summary()), nulled(example_summary(), float("nan"))):
        html = build_report(summary, EMPTY, {})
        assert compute_verdict(summary)[0] in Page(html).texts
        assert not PYTHON_NULL.search(html)
        assert 'class="plot"' not in html


@pytest.mark.parametrize("start", range(3))
def test_any_part_may_be_missing(start: int) -> None:
    summary = example_summary()
    summary |= dict.fromkeys(sorted(summary)[start::3])
    html = build_report(summary, EMPTY, {})
    assert not PYTHON_NULL.search(html)
    assert "</html>" in html


def test_one_missing_number_is_a_dash_among_the_others() -> None:
    summary = example_summary()
    summary["fidelity"]["control"]["frechet"] = None
    rows = {row.mark: [cell.text for cell in row.cells] for row in tables.fidelity(summary)}
    assert rows["control"] == ["3", DASH, "0.039", "0.71", "92"]
    assert rows["base"] == ["3", "196.2", "0.041", "0.71", "91"]
    assert DASH in build_report(summary, EMPTY, {})


def test_reports_a_real_summary() -> None:
    summary = build_summary(**comparison())
    html = build_report(summary, EMPTY, {"name": "made up"})
    assert [h for h in HEADINGS if f"<h2>{h}</h2>" not in html] == [
        "Before and after",
        "Served over gRPC",
        "While it was fine-tuned",
    ]
    assert summary["verdict"][0] in Page(html).texts
    assert len(re.findall(r'class="plot"', html)) >= 8
    gain = numbers.points(numbers.estimate(summary, "gain", "aligned", "seen", "overall"))
    assert re.fullmatch(r"\+\d+ points \([+−]?\d+ to [+−]?\d+\)", gain)
    assert gain in html


@pytest.mark.parametrize(
    ("value", "text"), [(None, DASH), (0.0, "0"), (-0.004, "0"), (0.413, "41"), (-0.06, "−6"), (1.0, "100")]
)
def test_percent(value: float | None, text: str) -> None:
    assert numbers.percent(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(None, DASH), (8.42, "8.4 s"), (96, "96 s"), (725, "12 min"), (7500, "2 h 05 min")]
)
def test_duration(seconds: float | None, text: str) -> None:
    assert numbers.duration(seconds) == text


def test_intervals_show_signs_where_one_end_is_negative() -> None:
    assert numbers.interval(Estimate(0.4, 0.35, 0.48)) == "35–48"
    assert numbers.interval(Estimate(0.0, -0.12, 0.05)) == "−12 to +5"
    assert numbers.interval(Estimate(0.0, None, 0.05)) == ""
    assert numbers.points(Estimate(0.09, 0.03, 0.15)) == "+9 points (+3 to +15)"


def test_finds_numbers_by_text_or_number_keys() -> None:
    assert numbers.number({"a": {16: {"value": 0.5}}}, "a", "16") == 0.5
    assert numbers.number({"a": {"16": 0.5}}, "a", 16) == 0.5
    assert numbers.number({"a": {"16": True}}, "a", 16) is None
    assert numbers.number({"a": 3}, "a", "b", "c") is None


def test_marks_the_best_of_a_group() -> None:
    seen = tables.reward(example_summary())[0]
    assert seen.label == "Seen prompts, 216 images, 97 of them good"
    best = {row.mark: [cell.best for cell in row.cells] for row in seen.rows}
    assert best["reward"] == [True, True, True, True]  # of the errors the lowest
    assert not any(best["clip"] + best["reward_no_auxiliary"])


def circles(svg: str, colour: str) -> list[float]:
    """Heights or positions of the marks of a colour, as the SVG uses them."""
    used = re.findall(r'<use href="#[^"]*" x="([\d.]+)" y="[\d.]+" style="fill: var\(--' + colour, svg)
    return [float(x) for x in used]


def all_plots(summary: dict[str, Any]) -> dict[str, str]:
    splits = ("seen", "unseen_combination", "unseen_object")
    return {
        "frontier": plots.frontier(summary),
        "best_of": plots.best_of_curve(summary),
        "votes": plots.votes(summary, "alignment"),
        **{f"success {split}": plots.success_panel(summary, split) for split in splits},
        **{f"calibration {split}": plots.calibration(summary, split) for split in splits},
        **{f"ranking {metric}": plots.ranking(summary, metric) for metric in ("auc", "pairwise_accuracy")},
        **guard_plots(summary),
    }


def test_plots_are_well_formed_and_take_their_colours_from_the_page() -> None:
    for name, svg in all_plots(example_summary()).items():
        assert ET.fromstring(svg).get("role") == "img", name
        assert not re.search(r"#[0-9a-f]{6}[;\"]", svg), name
        assert "var(--" in svg, name
        assert "font-family" not in svg, name


def test_plots_of_nothing_are_empty() -> None:
    assert set(all_plots({}).values()) == {""}
    assert set(all_plots(nulled(example_summary())).values()) == {""}


def test_guards_are_drawn_only_where_they_measured() -> None:
    summary = example_summary()
    assert list(guard_plots(summary)) == ["Training reward", "Held-out judge", "Too many objects"]
    assert "stroke-dasharray" in guard_plots(summary)["Held-out judge"]
    summary["guards"]["decision"]["tripped"] = False
    assert "stroke-dasharray" not in guard_plots(summary)["Held-out judge"]
    assert guard_plots({}) == {}


def test_a_higher_success_stands_further_right() -> None:
    svg = plots.success_panel(example_summary(), "seen")
    aligned = circles(svg, "aligned")
    assert len(aligned) == 5
    # The rows are drawn from the last category to the first; colour is higher than count, background highest.
    combination, background, colour, count, overall = aligned
    assert combination < count < overall < colour < background


def test_votes_are_shares_of_all_sets() -> None:
    svg = plots.votes(example_summary(), "alignment")
    assert ">47 won<" in svg  # 17 of 36
    assert ">44 tied<" in svg
    assert ">8<" in svg


def test_the_chosen_guidance_scale_is_ringed() -> None:
    summary = example_summary()
    ringed = plots.frontier(summary).count("fill-opacity: 0")
    summary["guidance"] = {}
    assert plots.frontier(summary).count("fill-opacity: 0") < ringed


def shown(summary: dict[str, Any]) -> str:
    console = Console(file=io.StringIO(), width=120, color_system=None)
    console.print(results_table(summary))
    file = console.file
    assert isinstance(file, io.StringIO)
    return file.getvalue()


def row(text: str, name: str) -> list[str]:
    line = next(line for line in text.splitlines() if name in line)
    return [cell.strip() for cell in re.split("[│┃]", line)[2:-1]]


def test_results_table() -> None:
    text = shown(example_summary())
    assert row(text, "success, seen prompts") == ["38 (32–44)", "39 (33–45)", "48 (42–54)"]
    assert row(text, "net wins in fidelity, unseen objects") == ["", "", "−11 (−23 to +1)"]
    assert row(text, "best of 16") == ["80 (71–89)", DASH, "79 (70–88)"]
    assert row(text, "Fréchet") == ["196.2", "191.7", "203.4"]


def test_results_table_of_nothing() -> None:
    text = shown({})
    assert row(text, "success, seen prompts") == [DASH] * 3
    assert "net wins in" not in text


def test_the_example_is_not_changed_by_reporting_it() -> None:
    summary = example_summary()
    before = copy.deepcopy(summary)
    build_report(summary, EMPTY, {})
    shown(summary)
    assert summary == before


def dom(page: Path, profile: Path, *options: str) -> str:
    """The document as Chromium has it after loading `page`."""
    found = [shutil.which(name) for name in ("chromium", "chromium-browser", "google-chrome")]
    browser = next((path for path in found if path), None)
    if browser is None:
        missing("no Chromium is installed")
    quiet = "--headless --no-sandbox --disable-gpu --disable-dev-shm-usage --disable-quic --no-first-run"
    calm = "--disable-background-networking --disable-component-update --disable-sync"
    command = [browser, *quiet.split(), *calm.split(), *options]
    command += [f"--user-data-dir={profile}", "--dump-dom", page.as_uri()]
    done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.browser
def test_a_browser_shows_the_page(html: str, tmp_path: Path) -> None:
    page = tmp_path / "report.html"
    page.write_text(html, "utf-8")
    loaded = dom(page, tmp_path / "profile")
    assert [h for h in re.findall(r"<h2>([^<]+)</h2>", loaded) if h in HEADINGS] == HEADINGS
    assert loaded.count('class="plot"') == html.count('class="plot"')
    assert not re.search(r'(?:src|href|action)="https?:', loaded)


@pytest.mark.browser
@pytest.mark.parametrize("width_px", [360, 820, 1280])
def test_the_page_is_no_wider_than_the_window(html: str, tmp_path: Path, width_px: int) -> None:
    (tmp_path / "report.html").write_text(html, "utf-8")
    frame = tmp_path / "frame.html"
    frame.write_text(
        f'<iframe src="report.html" style="width: {width_px}px; height: 900px; border: 0"></iframe><script>'
        "onload = () => { const page ="
        " document.querySelector('iframe').contentDocument.documentElement;"
        " document.title = page.clientWidth + ' of ' + page.scrollWidth }</script>"
    )
    loaded = dom(frame, tmp_path / "profile", "--allow-file-access-from-files", "--window-size=1600,1000")
    found = re.search(r"<title>(\d+) of (\d+)</title>", loaded)
    assert found is not None
    assert width_px - 20 <= int(found[1]) == int(found[2])  # 20: the scroll bar


def test_the_calibration_that_was_fitted_is_told_when_it_is_known() -> None:
    summary = {**example_summary(), "calibration": {"images": 115, "ece": 0.124, "ece_calibrated": 0.041}}
    text = " ".join(Page(build_report(summary, example_gallery(), example_run_info())).texts)
    assert "On the 115 judged images that learning left out" in text
    assert "was 0.12 as it came, 0.04 once scaled" in text
    summary["calibration"]["ece_calibrated"] = None
    assert "was 0.12 as it came." in build_report(summary, example_gallery(), example_run_info())
    assert "learning left out" not in build_report(example_summary(), example_gallery(), example_run_info())
