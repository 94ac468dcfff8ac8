"""A rater at the rating page, in a real Chromium, with the keyboard alone."""

import shutil
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from accord.feedback import Campaigns, FeedbackStore
from tests.lanes import missing
from tests.services.feedback.conftest import PROMPTS, Running

pytestmark = pytest.mark.browser

WAIT_MS = 60_000
KEYS = {"g": "good", "b": "bad", "s": "skip"}


@pytest.fixture(scope="module")
def chromium() -> Iterator[Any]:
    """The machine's Chromium; Playwright's own is not downloaded."""
    path = shutil.which("chromium") or shutil.which("chromium-browser")
    if path is None:
        missing("there is no Chromium (Debian: apt-get install chromium)", lane="browser")
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(
            executable_path=path, args=["--no-sandbox", "--disable-dev-shm-usage"], timeout=WAIT_MS
        )
        yield browser
        browser.close()


@pytest.fixture
def page(chromium: Any) -> Iterator[Any]:
    """A page of its own; no script of it may fail."""
    errors: list[str] = []
    context = chromium.new_context(viewport={"width": 1280, "height": 800})
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.on("pageerror", lambda error: errors.append(str(error)))
    yield page
    context.close()
    assert errors == []


class Screen:
    """What a rater sees and presses."""

    def __init__(self, page: Any) -> None:
        self.page = page

    def enter(self, running: Running, rater: str, campaign: str = "shapes") -> None:
        self.page.goto(running.site + running.invite(rater, campaign))
        self.page.wait_for_selector("button:focus")  # it has the focus as soon as the page is drawn
        self.page.keyboard.press("Enter")
        self.page.wait_for_url("**/rate")

    def task(self, other_than: str = "") -> tuple[str, list[str]]:
        """Wait for a task to judge; its id and its images' digests, as they are shown."""
        work = f'#work:not([hidden])[data-task]:not([data-task="{other_than}"])'
        found = self.page.wait_for_selector(work)
        self.page.wait_for_function(
            "() => [...document.querySelectorAll('.picture img')].every((image) => image.naturalWidth > 0)"
        )
        images = self.page.eval_on_selector_all(".picture img", "all => all.map((image) => image.src)")
        return found.get_attribute("data-task"), [image.rpartition("/")[2] for image in images]

    def judge(self, keys: str) -> None:
        """Press the keys, and see each verdict shown on its image."""
        for number, key in enumerate(keys):
            self.page.keyboard.press(key)
            self.page.wait_for_selector(f'.card[data-index="{number}"][data-verdict="{KEYS[key]}"]')

    def save(self) -> None:
        self.page.wait_for_selector("#save:enabled")
        self.page.keyboard.press("Enter")

    def saved(self, count: int) -> None:
        """Wait until the page says that everything is saved, `count` answers in all."""
        self.page.wait_for_selector('#status[data-state="saved"][data-waiting="0"]', state="attached")
        self.page.wait_for_function(
            "count => document.getElementById('count').textContent === `${count} saved by you`", arg=count
        )


def _keys(number: int) -> str:
    """The verdicts of a task; every one of the three, at every place."""
    return ["gbs", "bgg", "sgb", "ggg", "bbs", "gsb"][number % 6]


def test_thirty_images_with_the_keyboard(start: Callable[..., Running], page: Any) -> None:
    """The rater undoes an answer, loses the network, comes back: the store holds what was on the screen."""
    running, screen = start(), Screen(page)
    screen.enter(running, "ann")
    shown: dict[str, str] = {}

    def judge(task: str, images: list[str], keys: str) -> str:
        screen.judge(keys)
        shown.update(zip(images, (KEYS[key] for key in keys), strict=True))
        screen.save()
        return task

    task = ""
    for number in range(3):
        task = judge(*screen.task(task), _keys(number))
    screen.saved(3)
    _undo(screen, task, shown)
    screen.saved(3)
    _lose_the_network(screen, running, judge)
    screen.saved(5)
    for number in range(5, 10):
        task = judge(*screen.task(task), _keys(number))
    page.wait_for_selector('#rest:not([hidden])[data-state="done"]')
    assert "10 answers" in page.inner_text("#rest-text")
    with FeedbackStore(running.url) as store, Campaigns(running.url) as campaigns:
        assert campaigns.get("shapes").complete
        assert {row.image: row.verdict for row in store.judgements()} == shown
        assert len(shown) == len(store.judgements()) == 30
        assert {row.rater for row in store.judgements()} == {"ann"}


def _undo(screen: Screen, last: str, shown: dict[str, str]) -> None:
    """Takes the last answer back: its marks are there again, and are changed."""
    page = screen.page
    page.keyboard.press("u")
    page.wait_for_selector(f'#work[data-task="{last}"]')
    _, images = screen.task()
    before = page.eval_on_selector_all(".card", "all => all.map((card) => card.dataset.verdict)")
    assert before == [shown[image] for image in images]
    page.wait_for_function("() => document.getElementById('count').textContent === '2 saved by you'")
    screen.judge("bsg")
    shown.update(zip(images, ["bad", "skip", "good"], strict=True))
    screen.save()


def _lose_the_network(screen: Screen, running: Running, judge: Callable[[str, list[str], str], str]) -> None:
    """Two tasks are in the browser: both are judged without a network, and sent when it is back."""
    page = screen.page
    task, images = screen.task()
    page.wait_for_function("() => document.body.dataset.held === '2'")
    page.context.set_offline(True)
    page.wait_for_selector('#status[data-state="offline"]')
    task = judge(task, images, "gsb")
    judge(*screen.task(task), "bbs")
    page.wait_for_selector('#rest:not([hidden])[data-state="offline"]')
    page.wait_for_selector('#status[data-state="offline"][data-waiting="2"]')
    assert page.inner_text("#count") == "" or "3 saved" in page.text_content("#count")
    with FeedbackStore(running.url) as store:
        assert len(store.judgements()) == 9
    page.context.set_offline(False)
    page.wait_for_selector('#status[data-state="saved"][data-waiting="0"]')


def test_a_closed_tab_loses_no_answer(start: Callable[..., Running], page: Any) -> None:
    running, screen = start(), Screen(page)
    screen.enter(running, "ann")
    screen.task()
    page.context.set_offline(True)
    page.wait_for_selector('#status[data-state="offline"]')
    screen.judge("gbs")
    screen.save()
    page.wait_for_selector('#status[data-waiting="1"]')
    again = page.context.new_page()
    page.close()
    again.context.set_offline(False)
    again.goto(f"{running.site}/rate")
    Screen(again).saved(1)
    with FeedbackStore(running.url) as store:
        assert sorted(row.verdict for row in store.judgements()) == ["bad", "good", "skip"]


def test_a_refused_answer_stays_visible(start: Callable[..., Running], page: Any) -> None:
    """It says why, and is never called saved."""
    running, screen = start(), Screen(page)
    screen.enter(running, "ann")
    screen.task()
    with Campaigns(running.url) as campaigns:
        campaigns.exclude("ann", "a test")
    screen.judge("ggg")
    screen.save()
    refusal = page.wait_for_selector(".refusal")
    assert "was not saved" in refusal.inner_text()
    assert "excluded" in refusal.inner_text()
    page.wait_for_selector('#status[data-state="refused"]')
    page.click(".refusal button")
    page.wait_for_selector(".refusal", state="detached")
    with FeedbackStore(running.url) as store:
        assert store.judgements(everything=True) == []


def test_a_prompt_is_text(start: Callable[..., Running], page: Any) -> None:
    """It would run if it were HTML: it replaces the title."""
    prompt = PROMPTS[1]
    running, screen = start(prompts=(prompt,)), Screen(page)
    screen.enter(running, "ann")
    screen.task()
    assert page.text_content("#prompt") == prompt
    assert page.query_selector("#prompt *") is None
    assert page.title() == "Shapes & <more> · Accord"


def test_a_comparison_with_zoom_and_guidelines(start: Callable[..., Running], page: Any) -> None:
    running, screen = start(), Screen(page)
    screen.enter(running, "ann", "models")
    first, images = screen.task()
    assert len(images) == 8
    page.keyboard.press("?")
    page.wait_for_selector("#guide[open]")
    page.keyboard.press("a")  # nothing behind the guidelines is judged
    page.keyboard.press("Escape")
    page.wait_for_selector("#guide:not([open])", state="attached")
    assert page.is_disabled("#save")
    page.keyboard.press("6")
    page.wait_for_selector("#zoom[open]")
    assert page.text_content("#zoom-title") == "image 2 of set B"
    page.keyboard.press("ArrowRight")
    page.wait_for_function("() => document.getElementById('zoom-title').textContent === 'image 3 of set B'")
    page.keyboard.press("Escape")
    page.wait_for_selector("#zoom:not([open])", state="attached")
    page.keyboard.press("a")
    page.wait_for_selector('.card[data-side="left"][data-picked="true"]')
    page.keyboard.press("ArrowDown")
    page.wait_for_selector('.verdict[data-value="tie"][aria-pressed="true"]')
    screen.save()
    screen.task(first)
    screen.saved(1)
    with Campaigns(running.url) as campaigns:
        assert [row.tie for row in campaigns.preferences("models")] == [1]


@pytest.mark.parametrize("theme", ["light", "dark"])
@pytest.mark.parametrize("campaign", ["shapes", "models"])
def test_a_phone(start: Callable[..., Running], chromium: Any, theme: str, campaign: str) -> None:
    """With a thumb at 390 pixels: nothing is wider than the screen, what is pressed is large enough."""
    running = start()
    context = chromium.new_context(
        viewport={"width": 390, "height": 844}, has_touch=True, is_mobile=True, color_scheme=theme
    )
    context.set_default_timeout(WAIT_MS)
    page = context.new_page()
    page.goto(running.site + running.invite("ann", campaign))
    page.tap("text=Start rating")
    first, _ = Screen(page).task()
    assert page.evaluate("document.documentElement.scrollWidth") <= 390
    sizes = page.eval_on_selector_all(
        ".verdict, #save", "all => all.map((one) => [one.clientWidth, one.clientHeight])"
    )
    assert min(min(size) for size in sizes) >= 40
    assert _contrast(page, "#prompt") >= 4.5
    for selector in ("#question", '.verdict[data-value]:not([aria-pressed="true"])'):
        assert _contrast(page, selector) >= 4.5
    if campaign == "models":
        page.tap('.verdict[data-value="right"]')
    else:
        for number in range(3):
            page.tap(f'.card[data-index="{number}"] .verdict[data-value="good"]')
    assert _contrast(page, '.verdict[aria-pressed="true"]') >= 4.5
    page.tap("#save")
    Screen(page).task(first)
    Screen(page).saved(1)
    context.close()


def _contrast(page: Any, selector: str) -> float:
    """The contrast of a text with the first opaque ground behind it (WCAG 2)."""
    ratio: float = page.eval_on_selector(
        selector,
        """(element) => {
          const parse = (text) => text.match(/[\\d.]+/g).map(Number);
          const light = (colour) => colour.slice(0, 3)
            .map((v) => v / 255)
            .map((v) => (v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4))
            .reduce((sum, v, i) => sum + v * [0.2126, 0.7152, 0.0722][i], 0);
          let behind = element;
          const ground = () => parse(getComputedStyle(behind).backgroundColor);
          while (ground()[3] === 0 && behind.parentElement) behind = behind.parentElement;
          const [a, b] = [light(parse(getComputedStyle(element).color)), light(ground())];
          return (Math.max(a, b) + 0.05) / (Math.min(a, b) + 0.05);
        }""",
    )
    return ratio
