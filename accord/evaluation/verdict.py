"""What a summary says, in plain sentences: what improved, by how much, and what did not.

"Improved" means that the interval of a difference lies above zero; everything else is said not to be shown.
The first sentence stands alone as the headline.
"""

from collections.abc import Mapping
from typing import Any, NamedTuple

_SPLITS = {
    "seen": "seen prompts",
    "unseen_combination": "unseen combinations",
    "unseen_object": "unseen objects",
}
_CATEGORIES = ("count", "colour", "background", "combination")


class _Estimate(NamedTuple):
    value: float
    low: float | None
    high: float | None

    @property
    def up(self) -> bool:
        return self.low is not None and self.low > 0

    @property
    def down(self) -> bool:
        return self.high is not None and self.high < 0

    def points(self) -> str:
        """A difference of shares: "+5.2 points (+1.0 to +9.4)"."""
        return f"{_signed(100 * self.value)} points{self._span(100)}"

    def number(self, digits: int = 3) -> str:
        """A difference of other numbers: "+0.040 (-0.010 to +0.090)"."""
        return f"{_signed(self.value, digits)}{self._span(1, digits)}"

    def _span(self, scale: float, digits: int = 1) -> str:
        if self.low is None or self.high is None:
            return ""
        return f" ({_signed(scale * self.low, digits)} to {_signed(scale * self.high, digits)})"


def compute_verdict(summary: Mapping[str, Any]) -> list[str]:
    """Sentences about the aligned model, the headline first; numbers in brackets are intervals.

    Works on any part of a summary: what is missing or null is not spoken of.
    """
    sentences = [
        _headline(summary),
        _frontier(summary),
        _control(summary),
        _by_group(summary),
        _votes(summary, "alignment"),
        _votes(summary, "fidelity"),
        _fidelity(summary),
        _readable(summary),
        _diversity(summary),
        _best_of(summary),
        _reward(summary, "clip", "CLIP similarity"),
        _reward(summary, "reward_no_auxiliary", "the same reward without the auxiliary loss"),
    ]
    return [sentence for sentence in sentences if sentence]


def _headline(summary: Mapping[str, Any]) -> str:
    gain = _estimate(summary, "gain", "aligned", "all", "overall")
    if gain is None:
        return "Base and aligned model were not measured on the same prompts, so nothing is claimed."
    scales = [_number(summary, "guidance", model) for model in ("aligned", "base")]
    at = f", each at its own best guidance ({scales[0]:g} and {scales[1]:g})" if None not in scales else ""
    if gain.down:
        return f"The aligned model fits prompts less often than the base{at}: {gain.points()}."
    if not gain.up:
        return f"The aligned model is not shown to fit prompts more often than the base{at}: {gain.points()}."
    moved = _moved(summary)
    but = {
        True: ", and more often at equal fidelity too",
        False: ", but not shown to at equal fidelity",
        None: "",
    }[moved]
    return f"The aligned model fits prompts more often than the base{at}: {gain.points()}{but}."


def _frontier(summary: Mapping[str, Any]) -> str:
    same = _estimate(summary, "frontier_gain", "aligned", "at_equal_guidance")
    equal = _estimate(summary, "frontier_gain", "aligned", "at_equal_frechet")
    if equal is None or same is None:
        return ""
    numbers = f"at equal Fréchet distance {equal.points()}, at equal guidance {same.points()}"
    if equal.up:
        return f"The frontier of success against Fréchet distance moved: {numbers}."
    if equal.down:
        return f"The frontier moved the wrong way: {numbers}. The base's guidance scale is the cheaper way."
    if same.up:
        return (
            f"The frontier is not shown to have moved: {numbers}. So the gain may be merely "
            "distilled guidance: at the same Fréchet distance, by a higher guidance scale, the base is not "
            "shown to do worse."
        )
    return f"The frontier of success against Fréchet distance is not shown to have moved: {numbers}."


def _control(summary: Mapping[str, Any]) -> str:
    control = _estimate(summary, "gain", "control", "all", "overall")
    if control is None:
        return ""
    if control.up:
        return (
            f"The control, fine-tuned without any reward, improved too ({control.points()}), so not all of a "
            "gain is the reward's doing."
        )
    change = "got worse" if control.down else "did not measurably change"
    return f"The control, fine-tuned without any reward, {change} ({control.points()})."


def _by_group(summary: Mapping[str, Any]) -> str:
    """Which splits, and which categories on which split, improved; the rest is named as not improved."""
    cells = [(split, "overall", name) for split, name in _SPLITS.items()]
    cells += [
        (split, category, f"{category} on {name}")
        for split, name in _SPLITS.items()
        for category in _CATEGORIES
    ]
    up, down, unclear = [], [], []
    for split, cell, name in cells:
        gain = _estimate(summary, "gain", "aligned", split, cell)
        if gain is not None and gain.up:
            up.append(f"{name} {gain.points()}")
        elif gain is not None and gain.down:
            down.append(f"{name} {gain.points()}")
        elif gain is not None:
            unclear.append(name)
    if not up + down + unclear:
        return ""
    # Many looks: some intervals miss zero by chance, and a reader should know how many looks there were.
    parts = [
        f"Of {len(up + down + unclear)} comparisons by split and category, improved: "
        f"{'; '.join(up) or 'none'}.",
        f"Got worse: {'; '.join(down)}." if down else "",
        f"No improvement shown: {', '.join(unclear)}." if unclear else "",
    ]
    return " ".join(part for part in parts if part)


def _votes(summary: Mapping[str, Any], question: str) -> str:
    found = {split: _estimate(summary, "net_win", question, split) for split in _SPLITS}
    results = []
    for split, net in found.items():
        if net is None:
            continue
        word = "wins" if net.up else "loses" if net.down else "is level"
        results.append(f"{word} on {_SPLITS[split]}, net {net.points()}")
    if not results:
        return ""
    asked = "fits the prompt" if question == "alignment" else "looks better"
    return f"Asked which set {asked}, raters say the aligned model {'; '.join(results)}."


def _fidelity(summary: Mapping[str, Any]) -> str:
    before, after = (_number(summary, "fidelity", model, "frechet") for model in ("base", "aligned"))
    change = _estimate(summary, "change", "aligned", "frechet")
    if before is None or after is None or change is None:
        return ""
    word = (
        "rose, which is worse"
        if change.up
        else "fell, which is better"
        if change.down
        else "did not measurably change"
    )
    return f"The Fréchet distance to real images {word}: {before:.1f} to {after:.1f}, {change.number(1)}."


def _readable(summary: Mapping[str, Any]) -> str:
    change = _estimate(summary, "change", "aligned", "readable")
    if change is None:
        return ""
    word = "rose" if change.up else "fell" if change.down else "did not measurably change"
    return f"The share of readable images {word}: {change.points()}."


def _diversity(summary: Mapping[str, Any]) -> str:
    change, base = (
        _estimate(summary, "change", "aligned", "diversity"),
        _number(summary, "diversity", "base", "value"),
    )
    if change is None or not base:
        return ""
    word = "rose" if change.up else "fell" if change.down else "did not measurably change"
    return f"Diversity within a prompt {word} ({_signed(100 * change.value / base)}%)."


def _best_of(summary: Mapping[str, Any]) -> str:
    found = _node(summary, "best_of", "base")
    sizes = sorted(int(n) for n in found if str(n).isdigit()) if isinstance(found, Mapping) else []
    largest = _number(summary, "best_of", "base", str(sizes[-1]), "value") if sizes else None
    single = _number(summary, "best_of", "aligned", "1", "value")
    if largest is None or single is None or sizes[-1] < 2:
        return ""
    both = _number(summary, "best_of", "aligned", str(sizes[-1]), "value")
    word = "beats" if largest > single else "does not beat"
    sentence = (
        f"Keeping the best of {sizes[-1]} base images by reward {word} one image of the aligned model: "
        f"{100 * largest:.1f}% against {100 * single:.1f}%"
    )
    return (
        f"{sentence}; the best of {sizes[-1]} aligned images reaches {100 * both:.1f}%."
        if both
        else f"{sentence}."
    )


def _reward(summary: Mapping[str, Any], other: str, name: str) -> str:
    better: list[str] = []
    level: list[str] = []
    worse: list[str] = []
    for split, where in _SPLITS.items():
        gain = _estimate(summary, "reward_gain", other, split)
        if gain is None:
            continue
        group = better if gain.up else worse if gain.down else level
        group.append(f"{where} {gain.number()}")
    parts = [
        f"better on {'; '.join(better)}" if better else "",
        f"not shown to be better on {'; '.join(level)}" if level else "",
        f"worse on {'; '.join(worse)}" if worse else "",
    ]
    said = ", ".join(part for part in parts if part)
    return (
        f"As a ranking of labelled images within categories (AUC), the reward against {name} is {said}."
        if said
        else ""
    )


def _moved(summary: Mapping[str, Any]) -> bool | None:
    equal = _estimate(summary, "frontier_gain", "aligned", "at_equal_frechet")
    return None if equal is None or equal.low is None else equal.up


def _node(tree: Any, *path: str) -> Any:
    for key in path:
        tree = tree.get(key) if isinstance(tree, Mapping) else None
    return tree


def _number(tree: Any, *path: str) -> float | None:
    found = _node(tree, *path)
    is_number = isinstance(found, int | float) and not isinstance(found, bool) and found == found
    return float(found) if is_number else None


def _estimate(tree: Any, *path: str) -> _Estimate | None:
    value = _number(tree, *path, "value")
    return (
        None if value is None else _Estimate(value, _number(tree, *path, "low"), _number(tree, *path, "high"))
    )


def _signed(value: float, digits: int = 1) -> str:
    text = f"{abs(value):.{digits}f}"
    sign = "" if float(text) == 0 else "−" if value < 0 else "+"
    return sign + text
