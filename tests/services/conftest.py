"""One deployment for all tests of the services: real weights of the shapes world, a real port."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from accord import tokens
from accord.config import resolve_path
from accord.diffusion.model import load_diffusion_model, save_diffusion_model
from accord.reward.features import ClipEncoder
from accord.reward.head import RewardHead
from accord.reward.model import RewardModel
from tests.services.deployment import Deployment

BASE = "pkg://accord.shapes/weights/diffusion"
CLIP = "pkg://accord.shapes/weights/clip"
SCOPES = {
    "all": ["generate", "score"],
    "other": ["generate", "score"],
    "scores": ["score"],
    "slow": ["generate"],
    "narrow": ["generate"],
}


@pytest.fixture(scope="session")
def reward_directory(session_dir: Path) -> Path:
    """A reward model that prefers what its CLIP finds similar, with a spread that ranks."""
    encoder = ClipEncoder(CLIP)
    head = RewardHead(encoder.dim, combine="adapter")
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        head.image_map.copy_(0.05 * torch.randn(encoder.dim, encoder.dim, generator=generator))
        head.offset.fill_(-0.3)
    RewardModel(head, encoder).save(session_dir / "reward", inputs={}, config={}, seed=3)
    return session_dir / "reward"


@pytest.fixture(scope="session")
def rolled_directory(session_dir: Path) -> Path:
    """Another diffusion model: the base with other weights at its end."""
    model = load_diffusion_model(resolve_path(BASE))
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(0.9)
    save_diffusion_model(model, session_dir / "rolled", inputs={}, config={}, seed=0)
    return session_dir / "rolled"


@pytest.fixture(scope="session")
def broken_directory(session_dir: Path) -> Path:
    """A model whose weights are finite and whose samples are not."""
    model = load_diffusion_model(resolve_path(BASE))
    with torch.no_grad():
        model.unet.conv_out.weight.mul_(1e30)
    save_diffusion_model(model, session_dir / "broken", inputs={}, config={}, seed=0)
    return session_dir / "broken"


def serve_config(reward_directory: Path) -> dict[str, Any]:
    quick = {"health_check_period_s": 1.0, "graceful_shutdown_timeout_s": 60.0}
    return {
        "generation": {
            **quick,
            "num_cpus": 0.5,
            "engine": {"options": {"max_batch": 32}, "retire_after_s": 0.0},
            "user_config": {"models": {"base": BASE}, "default": "base"},
        },
        "reward": {
            **quick,
            "num_cpus": 0.25,
            "retire_after_s": 0.0,
            "user_config": {"models": {"learned": str(reward_directory), "clip": CLIP}, "default": "learned"},
        },
        "gateway": {
            **quick,
            "num_cpus": 0.25,
            "user_config": {
                "limits": {
                    "default": {"requests_per_second": 1000.0, "burst": 1000},
                    "tokens": {
                        "slow": {"requests_per_second": 0.05, "burst": 2},
                        "narrow": {"concurrent_candidates": 2},
                    },
                    "parallel_candidates": 16,
                    "max_side_pixels": 64,
                    "max_image_bytes": 1_000_000,
                    "max_image_pixels": 100_000,
                    "max_request_bytes": 8_000_000,
                    "max_watches": 2,
                },
                "sampler": {"steps": 4, "guidance_scale": 3.0, "scheduler": "DDIMScheduler"},
            },
        },
    }


@pytest.fixture(scope="session")
def deployment(session_dir: Path, reward_directory: Path, root: Path) -> Iterator[Deployment]:
    token_file = session_dir / "tokens.yaml"
    texts = {name: tokens.add(token_file, name, scopes) for name, scopes in SCOPES.items()}
    config = serve_config(reward_directory)
    config["gateway"]["tokens"] = str(token_file)
    environment = {**os.environ, "PYTHONPATH": str(root), "RAY_BACKEND_LOG_LEVEL": "fatal"}
    with open(session_dir / "server.log", "w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "tests.services.server", str(token_file), str(session_dir / "token")],
            cwd=root,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=log,
            text=True,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        process.stdin.write(json.dumps(config) + "\n")
        process.stdin.flush()
        ready = process.stdout.readline()
        assert ready, (session_dir / "server.log").read_text()[-4000:]
        running = Deployment(process, config, texts, json.loads(ready))
        try:
            yield running
        finally:
            running.channel.close()
            process.stdin.close()
            try:
                process.wait(90)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
