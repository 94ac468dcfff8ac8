"""A plausible run to lay a report out with: numbers of a usual size, and drawn pictures."""

import io
import math
import random
from typing import Any

from PIL import Image, ImageDraw

from accord.evaluation.report import BestOfCard, Gallery, PairCard, RankedImage, Served

MODELS = ("base", "control", "aligned")
SPLITS = ("seen", "unseen_combination", "unseen_object")
CATEGORIES = ("count", "colour", "background", "combination")
COLOURS = {"red": "#d8342c", "green": "#2f9e44", "blue": "#2b5fd9", "yellow": "#f2c51d", "purple": "#8a3fc7"}
BACKGROUNDS = {
    "in the sky": "#9fd0f2",
    "on grass": "#7fb560",
    "in the desert": "#e3c48d",
    "at night": "#1c2340",
    "in the snow": "#eef3f7",
}


def estimate(value: float, half: float, n: int = 144, floor: float = -1.0, **more: Any) -> dict[str, Any]:
    return {
        "value": round(value, 6),
        "low": round(max(floor, value - half), 6),
        "high": round(min(1.0, value + half), 6),
        "n": n,
        **more,
    }


def example_summary() -> dict[str, Any]:
    """Every number that the report knows to show."""
    level = {"base": 0.38, "control": 0.39, "aligned": 0.48}
    harder = {"seen": 0.0, "unseen_combination": -0.03, "unseen_object": -0.12}
    by_category = {"overall": 0.0, "count": -0.15, "colour": 0.12, "background": 0.24, "combination": -0.2}
    success = {
        model: {
            split: {
                category: estimate(
                    level[model] + harder[split] + by_category[category],
                    0.06 if category == "overall" else 0.11,
                    144 if category == "overall" else 36,
                    floor=0.0,
                )
                for category in by_category
            }
            for split in SPLITS
        }
        for model in MODELS
    }
    gain = {
        model: {
            split: {
                category: estimate(gained - (0.06 if category == "count" else 0), half)
                for category in by_category
            }
            for split, half in (
                ("all", 0.05),
                ("seen", 0.06),
                ("unseen_combination", 0.07),
                ("unseen_object", 0.12),
            )
        }
        for model, gained in (("control", 0.01), ("aligned", 0.1))
    }
    scales = (1.0, 1.5, 2.0, 3.0, 5.0)
    start = {"base": (176.0, 0.13), "control": (168.0, 0.14), "aligned": (166.0, 0.22)}
    frontier = [
        {
            "group": "choice",
            "model": model,
            "guidance": scale,
            "success": estimate(
                start[model][1] + 0.29 * (1 - math.exp(-1.1 * i)) - (0.02 if i == 4 else 0), 0.05
            ),
            "frechet": start[model][0] + (1.1 * i) ** 3,
            "kid": 0.02 + 0.01 * i,
            "readable": estimate(0.72, 0.04),
            "diversity": estimate(0.71, 0.02),
            "n": 144,
        }
        for model in MODELS
        for i, scale in enumerate(scales)
    ]
    return {
        "success": success,
        "gain": gain,
        "net_win": {
            "alignment": {
                split: estimate(net, 0.14, 36, wins=wins, losses=losses, ties=36 - wins - losses)
                for split, net, wins, losses in zip(
                    SPLITS, (0.39, 0.28, 0.11), (17, 14, 9), (3, 4, 5), strict=True
                )
            },
            "fidelity": {
                split: estimate(net, 0.12, 36, wins=wins, losses=losses, ties=36 - wins - losses)
                for split, net, wins, losses in zip(
                    SPLITS, (-0.06, 0.0, -0.11), (5, 6, 3), (7, 6, 7), strict=True
                )
            },
        },
        "best_of": {
            model: {
                n: estimate(value, half, 36, perfect=perfect, guidance=scale)
                for n, value, half, perfect in zip(
                    ("1", "4", "16"), values, (0.05, 0.08, 0.09), ideal, strict=True
                )
            }
            for model, scale, values, ideal in (
                ("base", 3.0, (0.38, 0.63, 0.8), (0.38, 0.76, 0.93)),
                ("aligned", 2.0, (0.46, 0.66, 0.79), (0.46, 0.74, 0.89)),
            )
        },
        "reward": {
            split: _scorer(auc, bins=bins)
            for split, auc, bins in zip(
                SPLITS,
                (0.87, 0.85, 0.74),
                ((0, 0.02, 0.05, 0), (0.01, 0.06, -0.03, 0), (0.1, 0.12, -0.1, -0.16)),
                strict=True,
            )
        },
        "reward_no_auxiliary": {
            split: _scorer(auc, bins=(0.06, 0.08, -0.05, -0.12))
            for split, auc in zip(SPLITS, (0.85, 0.81, 0.69), strict=True)
        },
        "clip": {
            split: _scorer(auc) | {"ece": None, "reliability": []}
            for split, auc in zip(SPLITS, (0.74, 0.73, 0.7), strict=True)
        },
        "fidelity": {
            "base": {"frechet": 196.2, "kid": 0.041, "n": 432, "features": "shapes-cnn"},
            "control": {"frechet": 191.7, "kid": 0.039, "n": 432, "features": "shapes-cnn"},
            "aligned": {"frechet": 203.4, "kid": 0.043, "n": 432, "features": "shapes-cnn"},
        },
        "diversity": {m: estimate(v, 0.02, 108) for m, v in zip(MODELS, (0.712, 0.709, 0.683), strict=True)},
        "change": {
            "control": {"diversity": estimate(-0.003, 0.02), "readable": estimate(0.007, 0.02)},
            "aligned": {"diversity": estimate(-0.029, 0.02), "readable": estimate(-0.012, 0.02)},
        },
        "frontier_gain": {
            "control": {
                "at_equal_guidance": estimate(0.01, 0.03),
                "at_equal_frechet": estimate(0.02, 0.03),
                "moved": False,
            },
            "aligned": {
                "at_equal_guidance": estimate(0.09, 0.04),
                "at_equal_frechet": estimate(0.07, 0.05),
                "moved": True,
            },
        },
        "reward_gain": {
            "clip": {split: estimate(0.1 - 0.04 * i, 0.05) for i, split in enumerate(SPLITS)},
            "reward_no_auxiliary": {split: estimate(0.02, 0.03) for split in SPLITS},
        },
        "protocol": {
            "prompts": 108,
            "images": dict.fromkeys(MODELS, 432),
            "images_per_prompt": 4,
            "raters": 9,
            "quorum": 7,
            "guidance_scales": list(scales),
            "confidence_level": 0.95,
            "bootstrap_resamples": 1000,
            "seed": 0,
        },
        "guards": {
            "decision": {
                "tripped": True,
                "step": 100,
                "best_step": 50,
                "reason": "from step 50 to step 100 the held-out reward fell by 0.100",
            },
            "measures": {
                "held_out": [[0, 0.5], [50, 0.6], [100, 0.5]],
                "reward": [[0, 0.4], [50, 0.5], [100, 0.6]],
                "too_many_objects": [[0, 0.1], [50, None], [100, 0.3]],
            },
        },
        "readable": {m: estimate(v, 0.03, 432) for m, v in zip(MODELS, (0.914, 0.921, 0.902), strict=True)},
        "frontier": frontier,
        "guidance": {"base": 3.0, "control": 3.0, "aligned": 2.0},
        "raters": {
            "count": 3,
            "items": 1019,
            "alpha": 0.8137,
            "by_rater": {
                f"panel/{name}": {"judgements": 1024, "good": good, "bad": 0.99 - good, "skip": 0.01}
                for name, good in (("ben", 0.452), ("edith", 0.461), ("hugo", 0.467))
            },
        },
        "feedback": {
            name: {
                "candidates": n,
                "judgements": 3 * n,
                "good": good,
                "bad": bad,
                "skip": round(1 - good - bad, 3),
            }
            for name, n, good, bad in (
                ("background", 180, 0.671, 0.317),
                ("colour", 216, 0.682, 0.262),
                ("combination", 304, 0.301, 0.658),
                ("count", 324, 0.343, 0.612),
                ("total", 1024, 0.46, 0.501),
            )
        },
        "labels": {
            "right": estimate(0.978, 0.009, 1024),
            "reward": {"label": estimate(0.901, 0.02, 1024), "truth": estimate(0.912, 0.02, 1024)},
        },
        "agreement": estimate(0.934, 0.015, 1024, kappa=0.87),
        "digests": {
            name: f"{i:x}" * 64 for i, name in enumerate(("base", "clip", "snapshot", "reward", "aligned"), 1)
        },
        "seconds": {
            "collect": 21.4,
            "judge": 2.6,
            "learn_reward": 9.8,
            "score": 3.1,
            "finetune": 61.0,
            "evaluate": 48.2,
        },
    }


def _scorer(auc: float, bins: tuple[float, ...] = ()) -> dict[str, Any]:
    reliability = [
        {
            "low": i / 4,
            "high": (i + 1) / 4,
            "predicted": (i + 0.5) / 4,
            "observed": (i + 0.5) / 4 + off,
            "n": 80 - 18 * i,
        }
        for i, off in enumerate(bins)
    ]
    return {
        "auc": estimate(auc, 0.03),
        "auc_within_category": estimate(auc - 0.05, 0.04),
        "pairwise_accuracy": estimate(auc - 0.06, 0.05),
        "ece": round(0.9 - auc, 3),
        "reliability": reliability,
        "n": 216,
        "good": 97,
    }


def draw(prompt: str, seed: int, *, right: bool, size: int = 64) -> bytes:
    """A plain picture of a prompt of the shapes grammar; if not `right`, colour and count are off."""
    chance = random.Random(f"{prompt}/{seed}")
    words = prompt.split()
    counts = {"one": 1, "two": 2, "three": 3, "four": 4}
    count = next((counts[word] for word in words if word in counts), 1)
    colour = next(
        (COLOURS[word] for word in words if word in COLOURS), chance.choice(sorted(COLOURS.values()))
    )
    ground = next((colour for phrase, colour in BACKGROUNDS.items() if phrase in prompt), "#9fd0f2")
    if not right:
        count, colour = count % 4 + 1, chance.choice([c for c in COLOURS.values() if c != colour])
    scale = 4
    image = Image.new("RGB", (size * scale, size * scale), ground)
    canvas = ImageDraw.Draw(image)
    corners = chance.sample([(0.28, 0.28), (0.72, 0.3), (0.3, 0.72), (0.7, 0.7)], count)
    for x, y in corners if count > 1 else [(0.5, 0.5)]:
        radius = (0.15 if count > 1 else 0.26) * size * scale
        _shape(canvas, prompt, x * size * scale, y * size * scale, radius, colour)
    buffer = io.BytesIO()
    image.resize((size, size), Image.Resampling.BOX).save(buffer, "PNG")
    return buffer.getvalue()


def _shape(canvas: ImageDraw.ImageDraw, prompt: str, x: float, y: float, radius: float, colour: str) -> None:
    if "circle" in prompt or "heart" in prompt:
        canvas.ellipse((x - radius, y - radius, x + radius, y + radius), fill=colour)
        return
    corners = 10 if "star" in prompt else 3 if "triangle" in prompt else 4
    points = []
    for i in range(corners):
        reach = radius * (0.42 if corners == 10 and i % 2 else 1.1)
        angle = 2 * math.pi * i / corners - math.pi / 2 + (math.pi / 4 if corners == 4 else 0)
        points.append((x + reach * math.cos(angle), y + reach * math.sin(angle)))
    canvas.polygon(points, fill=colour)


def example_gallery() -> Gallery:
    prompts = {
        "seen": ["two red stars", "green square", "triangle in the desert", "three blue circles at night"]
        * 2,
        "unseen_combination": [
            "four yellow stars on grass",
            "purple triangle",
            "two squares in the snow",
            "blue square",
        ],
        "unseen_object": ["red heart", "three hearts", "two purple hearts in the desert", "heart at night"],
    }
    pairs = []
    for split, texts in prompts.items():
        for seed, prompt in enumerate(texts):
            before, after = seed % 4 == 1, seed % 4 != 3
            pairs.append(
                PairCard(
                    prompt,
                    split,
                    seed,
                    draw(prompt, seed, right=before),
                    draw(prompt, seed, right=after),
                    0.74 if before else 0.18 + 0.04 * seed,
                    0.81 - 0.03 * seed if after else 0.29,
                    before,
                    after,
                )
            )
    strips = []
    for model, prompt in (
        ("base", "three purple triangles in the desert"),
        ("aligned", "two green stars at night"),
    ):
        ranked = [
            RankedImage(
                draw(prompt, seed, right=seed not in (4, 6) and seed < 8),
                0.93 - 0.055 * seed,
                seed not in (4, 6) and seed < 8,
            )
            for seed in range(16)
        ]
        strips.append(BestOfCard(prompt, model, ranked))
    return Gallery(
        pairs,
        strips,
        note="The first prompts of each split, with their first seed: none was picked by its result.",
        served=_served(strips),
    )


def _served(strips: list[BestOfCard]) -> Served:
    """The same pictures, of which only the reward is known."""
    cards = [
        BestOfCard(
            card.prompt, card.model, [RankedImage(png, reward, None) for png, reward, _ in card.ranked]
        )
        for card in strips
    ]
    command = "accord serve --model runs/demo/aligned --reward-model runs/demo/reward"
    return Served(cards, "Each answered within 2.1 s. The outlined image is what a client gets.", command)


def example_run_info() -> dict[str, Any]:
    return {
        "name": "sandbox-demo",
        "recipe": "name: sandbox-demo\nseed: 0\ncollect:\n  batch_size: 64\n",
        "command": "accord loop --recipe recipes/sandbox/demo.yaml --set seed=0",
        "seed": 0,
        "code_version": "0.1.0+g1a2b3c4",
        "machine": "2 CPU cores, 8 GB",
        "started": "2026-11-22 17:33 UTC",
    }
