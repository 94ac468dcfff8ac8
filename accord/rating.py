"""The feedback service beside a job, while its images are judged: `feedback.serve` of a recipe.

Simulated raters rate over gRPC, from a process of their own; a person does it in the browser. The service is
a process too. All that counts is in the store: whatever is stopped, at any moment, the next start goes on.
"""

import contextlib
import json
import os
import socket
import subprocess
import sys
import tempfile
import time
import webbrowser
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from accord import tokens
from accord.artifacts import write_file
from accord.children import Child, child, last_line, tethered, wait_for_file
from accord.config import load_object
from accord.errors import ConfigError, FeedbackError
from accord.feedback.campaigns import Campaigns
from accord.recipe import Recipe

DIRECTORY = "feedback"
INVITE = "invite.txt"
TOKEN_NAME = "panel"
START_TIMEOUT_S = 120.0
GOODBYE_S = 5.0
"""How long the service stays after the last answer, so that the person's page can say that all is done."""
_POLL_S = 0.2

OnAnswers = Callable[[int], None]
"""Called with the number of answers that the campaign has."""


@dataclass(frozen=True)
class RatingService:
    """A service that is running, for one recipe's run."""

    recipe: Recipe
    directory: Path
    """Of the run: logs, the secret that signs links, the last invite link."""
    process: Child
    addresses: dict[str, str]
    config: Path
    token_file: Path
    url: str = field(repr=False)

    def panel_rates(self, campaign_id: str, on_answers: OnAnswers) -> None:
        """Has as many of the panel's raters as an image has judgements rate all of a campaign, at once.

        So each of them judges each image, and what they say does not depend on who is quicker.

        Raises:
            ConfigError: the panel has too few raters.
            FeedbackError: the raters could not go on.
        """
        recipe, log = self.recipe, self.directory / "raters.log"
        assert recipe.panel is not None
        command = tethered("services.feedback", "rate", campaign_id, "--address", self.addresses["gRPC"])
        command += ["--token-file", str(self.token_file), "--panel", recipe.panel]
        command += ["--grammar", recipe.grammar, "--seed", str(recipe.seed)]
        for name in raters(recipe):
            command += ["--rater", name]
        with Campaigns(self.url) as campaigns, child(command, log) as rating:
            while rating.poll() is None:
                on_answers(campaigns.get(campaign_id).num_answers)
                time.sleep(_POLL_S)
            on_answers(campaigns.get(campaign_id).num_answers)
        if rating.returncode != 0:
            raise FeedbackError(
                f"the raters ended{last_line(log)}\nTheir log is {log}; give the same command again"
            )

    def invite(self, campaign_id: str) -> str:
        """A new link for the person at the keyboard; also in a file that only this user can read."""
        command = [sys.executable, "-m", "services.feedback", "invite", campaign_id]
        command += [
            self.recipe.feedback.rater,
            "--config",
            str(self.config),
            "--set",
            f"public_url={self.addresses['page']}",
        ]
        made = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True)
        if made.returncode != 0:
            raise FeedbackError(f"no invite link could be made: {made.stderr.strip()}")
        link = made.stdout.split("\t")[-1].strip()
        write_private(self.directory / INVITE, link + "\n")
        return link

    def person_rates(self, campaign_id: str, on_answers: OnAnswers) -> None:
        """Waits until the campaign is complete.

        Raises:
            FeedbackError: the service has ended.
        """
        log = self.directory / "service.log"
        with Campaigns(self.url) as campaigns:
            complete_since: float | None = None
            # Until the service is gone he may take his last answer back.
            while complete_since is None or time.monotonic() - complete_since < GOODBYE_S:
                if self.process.poll() is not None:
                    why = f"the feedback service ended{last_line(log)}\nIts log is {log}"
                    raise FeedbackError(f"{why}; give the same command again")
                campaign = campaigns.get(campaign_id)
                on_answers(campaign.num_answers)
                complete_since = (complete_since or time.monotonic()) if campaign.complete else None
                time.sleep(_POLL_S)


def raters(recipe: Recipe) -> list[str]:
    """The raters of the panel who judge: as many as judgements an image, evenly from the first to the last.

    Raises:
        ConfigError: the panel has too few.
    """
    assert recipe.panel is not None
    names = list(load_object(recipe.panel)(seed=recipe.seed).raters)
    wanted = recipe.feedback.judgements_per_image
    if wanted > len(names):
        raise ConfigError(
            f"feedback.judgements_per_image is {wanted}, but {recipe.panel} has {len(names)} raters"
        )
    return [names[(2 * i + 1) * len(names) // (2 * wanted)] for i in range(wanted)]


@contextlib.contextmanager
def rating_service(recipe: Recipe, run_dir: Path, images: Path) -> Iterator[RatingService]:
    """Runs the feedback service on the run's store during the block.

    Raises:
        AccordError: it ends or is silent instead of serving; says what its log says.
    """
    directory = run_dir / DIRECTORY
    directory.mkdir(parents=True, exist_ok=True)
    # Readable by its owner only: the config's URL may hold a password.
    with tempfile.TemporaryDirectory(prefix="accord-feedback-") as private:
        config, endpoint = Path(private) / "feedback.yaml", Path(private) / "endpoint.json"
        token_file, token_hashes = Path(private) / "token", Path(private) / "tokens.yaml"
        write_private(token_file, tokens.add(token_hashes, TOKEN_NAME, ["rate"]) + "\n")
        settings: dict[str, Any] = {
            "url": recipe.feedback_url(run_dir),
            "images": str(images),
            "state_dir": str(directory),
            "tokens": str(token_hashes),
            "port": _last_port(directory),
            "grpc_port": 0,
            "metrics_port": 0,
        }
        write_private(config, yaml.safe_dump(settings))
        log = directory / "service.log"
        command = tethered("services.feedback", "serve", "--config", str(config))
        with child([*command, "--endpoint-file", str(endpoint)], log) as process:
            wait_for_file(process, endpoint, START_TIMEOUT_S, "the feedback service", log)
            addresses = json.loads(endpoint.read_bytes())
            write_file(directory / "port", addresses["page"].rpartition(":")[2] + "\n")
            yield RatingService(recipe, directory, process, addresses, config, token_file, settings["url"])


def open_browser(link: str) -> bool:
    """Shows the link in the user's browser; False without one, or with one that takes the terminal."""
    graphical = sys.platform in ("darwin", "win32") or any(
        os.environ.get(name) for name in ("DISPLAY", "WAYLAND_DISPLAY", "BROWSER")
    )
    return graphical and webbrowser.open(link)


def write_private(path: Path, text: str) -> None:
    """Writes a file that only its owner can read."""
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
        file.write(text)


def _last_port(directory: Path) -> int:
    """The page's port of the last time, so that a page that is still open goes on; 0 when it is not free."""
    try:
        port = int((directory / "port").read_text())
        with socket.socket() as probe:
            probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            probe.bind(("127.0.0.1", port))
    except (OSError, ValueError, OverflowError):
        return 0
    return port
