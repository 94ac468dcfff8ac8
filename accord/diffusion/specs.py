"""What is asked of the engine. No torch here: who asks over a network needs none."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class SampleSpec:
    """One image to make. The same spec and the same model give the same image, whoever shares the batch."""

    model: str
    """The name that the model was loaded under."""
    prompt: str
    seed: int
    steps: int
    guidance_scale: float
    """Classifier-free guidance; 1 or less means none (and half the work)."""
    scheduler: str
    """Class name of a scheduler of diffusers."""
    height: int
    """Pixels."""
    width: int
    negative_prompt: str = ""

    @property
    def guided(self) -> bool:
        return self.guidance_scale > 1.0

    @property
    def rows(self) -> int:
        """Of the UNet's batch."""
        return 2 if self.guided else 1
