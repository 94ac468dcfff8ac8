"""Trains the sandbox's base model: a UNet and a CLIP text encoder, in the stock pipeline's format.

What made it learn on two cores is in docs/sandbox.md. In short: targets are posterior means;
the schedule ends in pure noise and many timesteps are drawn there, because only there must the words be
read; captions are right at first and wrong in part at the end.

Legend: N scenes, B batch, C H W latents, T tokens.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch
from diffusers import DDIMScheduler, UNet2DConditionModel
from pydantic import model_validator
from torch import Tensor, nn
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from accord.artifacts import Manifest, artifact_writer, load_tensors, save_tensors, verify
from accord.config import Config
from accord.diffusion.model import DiffusionModel
from accord.diffusion.objectives import add_noise, denoising_loss, denoising_target
from accord.prompts import Grammar
from accord.shapes.captions import PRETRAINING_NOISE, CaptionNoise, caption, corrupt
from accord.shapes.pretraining.data import cosine
from accord.shapes.pretraining.tokenizer import CONTEXT_LENGTH
from accord.shapes.scene import Scene
from accord.training import generator_for, refuse_another_run

CHECKPOINT_KIND = "pretraining_checkpoint"


class DiffusionConfig(Config):
    """Sizes, caption noise and optimisation of the base model."""

    scenes: int = 32_000
    legs: tuple[int, ...] = (8_000, 6_000)
    """Steps of each leg; the learning rate falls to zero in each (Loshchilov & Hutter 2017)."""
    learning_rates: tuple[float, ...] = (1e-3, 5e-4)
    """At the start of each leg."""
    batch_size: int = 64
    """Over all workers."""
    careless_from: int = 5_600
    """The first step with careless captions; the text encoder rests from there on, as Stable Diffusion's."""
    noise: CaptionNoise = PRETRAINING_NOISE
    pure_noise_share: float = 0.2
    prompt_dropout: float = 0.1
    ema_decay: float = 0.998
    channels: tuple[int, ...] = (64, 128)
    heads: int = 4
    text_width: int = 96
    workers: int = 2
    """Share each batch; with more of them the sums of gradients differ in the last bits."""
    seed: int = 5

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if not self.legs or len(self.legs) != len(self.learning_rates):
            raise ValueError(
                f"there are {len(self.legs)} legs and {len(self.learning_rates)} learning_rates; give one "
                "learning rate for each leg"
            )
        if not 0 <= self.careless_from < self.steps:
            raise ValueError(
                f"careless_from is {self.careless_from}, but there are {self.steps} steps: without careless "
                "captions at the end there is nothing to align"
            )
        if self.batch_size % self.workers:
            raise ValueError(f"{self.workers} workers cannot share batch_size {self.batch_size} evenly")
        return self

    @property
    def steps(self) -> int:
        """Of all legs."""
        return sum(self.legs)

    def rate(self, step: int) -> float:
        """The learning rate of a step."""
        for leg, rate in zip(self.legs, self.learning_rates, strict=True):
            if step < leg:
                return rate * cosine(step, leg, warmup=100)
            step -= leg
        return 0.0


def make_scheduler() -> Any:
    """Stable Diffusion's betas, rescaled to end in pure noise (Lin et al. 2023); v-prediction."""
    scheduler: Any = DDIMScheduler  # diffusers is untyped
    return scheduler(
        beta_schedule="scaled_linear",
        beta_start=0.00085,
        beta_end=0.012,
        prediction_type="v_prediction",
        rescale_betas_zero_snr=True,
        timestep_spacing="trailing",
        clip_sample=False,
        set_alpha_to_one=True,
        steps_offset=1,
    )


def make_networks(tokenizer: CLIPTokenizer, config: DiffusionConfig, latents: int) -> tuple[Any, Any]:
    """The UNet, with cross-attention at both levels, and a text encoder of two layers."""
    network: Any = UNet2DConditionModel
    unet = network(
        sample_size=8,
        in_channels=latents,
        out_channels=latents,
        block_out_channels=config.channels,
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D",) * len(config.channels),
        up_block_types=("CrossAttnUpBlock2D",) * len(config.channels),
        cross_attention_dim=config.text_width,
        attention_head_dim=config.heads,
        norm_num_groups=16,
    )
    text = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=len(tokenizer),
            hidden_size=config.text_width,
            intermediate_size=4 * config.text_width,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=CONTEXT_LENGTH,
            projection_dim=config.text_width,
            bos_token_id=tokenizer.bos_token_id,
            eos_token_id=tokenizer.eos_token_id,
            pad_token_id=tokenizer.eos_token_id,
        )
    )
    return unet, text


def draw_timesteps(batch_size: int, pure_noise_share: float, generator: torch.Generator) -> Tensor:
    """t = 1000 sqrt(u), more at high noise, with a share at the last step, which shows the words alone."""
    u_B = torch.rand(batch_size, generator=generator)
    timesteps_B = (1000 * u_B.sqrt()).long().clamp(max=999)
    timesteps_B[torch.rand(batch_size, generator=generator) < pure_noise_share] = 999
    return timesteps_B


class _Denoiser(nn.Module):
    """UNet and text encoder as one network, so that one gradient exchange serves both."""

    def __init__(self, unet: nn.Module, text: nn.Module) -> None:
        super().__init__()
        self.unet, self.text = unet, text

    def forward(self, noisy_BCHW: Tensor, timesteps_B: Tensor, ids_BT: Tensor) -> Tensor:
        text_BTD = self.text(ids_BT).last_hidden_state
        prediction_BCHW: Tensor = self.unet(noisy_BCHW, timesteps_B, text_BTD).sample
        return prediction_BCHW


class DiffusionPretrainer:
    """Denoising (v) on latents, UNet and text encoder jointly; a Learner, as ray_jobs.train has it.

    The batch of step s is drawn whole from (seed, s), and each worker takes every world_size-th sample: so a
    resumed run computes the same as an uninterrupted one. `inputs` names what it learns from by digest.
    """

    def __init__(
        self,
        scenes: Sequence[Scene],
        latents_NCHW: Tensor,
        vae: Any,
        tokenizer: CLIPTokenizer,
        grammar: Grammar,
        config: DiffusionConfig,
        *,
        inputs: Mapping[str, str],
        rank: int = 0,
        world_size: int = 1,
        wrap: Callable[[nn.Module], nn.Module] | None = None,
    ) -> None:
        torch.manual_seed(config.seed)
        self.vae, self.tokenizer, self.grammar, self.config = vae, tokenizer, grammar, config
        self.inputs, self.rank, self.world_size = dict(inputs), rank, world_size
        self.scenes, self.latents_NCHW = scenes, latents_NCHW
        self.scheduler = make_scheduler()
        channels = self.latents_NCHW.shape[1]
        self.trained = _Denoiser(*make_networks(tokenizer, config, channels)).train()
        self.trained.unet.to(memory_format=torch.channels_last)
        self.averaged = _Denoiser(*make_networks(tokenizer, config, channels)).eval().requires_grad_(False)
        self.averaged.load_state_dict(self.trained.state_dict())
        self.forward = wrap(self.trained) if wrap else self.trained
        groups: list[dict[str, Any]] = [
            {"params": list(part.parameters())} for part in (self.trained.unet, self.trained.text)
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=config.rate(0), betas=(0.9, 0.99), weight_decay=0.01)
        self.ids: dict[str, list[int]] = {}
        self.step_index = 0

    @property
    def careless(self) -> bool:
        """Whether captions are wrong in part by now."""
        return self.step_index >= self.config.careless_from

    def step(self) -> dict[str, Tensor]:
        """One optimiser step; the loss is that of this worker's share."""
        config = self.config
        latents, noise, timesteps_B, ids_BT = self._draw()
        alphas_cumprod = self.scheduler.alphas_cumprod
        noisy = add_noise(latents, noise, timesteps_B, alphas_cumprod)
        target = denoising_target(latents, noise, timesteps_B, alphas_cumprod, "v_prediction")
        loss = denoising_loss(self.forward(noisy, timesteps_B, ids_BT), target).mean()
        self.optimizer.zero_grad(set_to_none=True)
        loss.backward()  # type: ignore[no-untyped-call]
        torch.nn.utils.clip_grad_norm_(self.trained.parameters(), 1.0)
        rate = config.rate(self.step_index)
        self.optimizer.param_groups[0]["lr"] = rate
        self.optimizer.param_groups[1]["lr"] = 0.0 if self.careless else rate
        self.optimizer.step()
        decay = min(config.ema_decay, (1 + self.step_index) / (10 + self.step_index))
        averaged: list[Tensor] = list(self.averaged.parameters())
        trained: list[Tensor] = list(self.trained.parameters())
        torch._foreach_lerp_(averaged, trained, 1 - decay)
        self.step_index += 1
        return {"loss": loss.detach()}

    def model(self) -> DiffusionModel:
        """The moving averages as a model."""
        unet, text = self.averaged.unet, self.averaged.text
        return DiffusionModel(unet, self.vae, text, self.tokenizer, self.scheduler, directory="", digest="")

    def save(self, directory: str | Path) -> Manifest:
        """Weights, averages, optimiser state and step: all or nothing."""
        tensors: dict[str, Tensor] = {
            f"averaged.{name}": value for name, value in self.averaged.named_parameters()
        }
        for name, parameter in self.trained.named_parameters():
            tensors[f"trained.{name}"] = parameter
            for key, value in self.optimizer.state.get(parameter, {}).items():
                tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
        tensors = {name: value.detach().contiguous() for name, value in tensors.items()}
        config = self.config.model_dump(mode="json") | {"step": self.step_index}
        with artifact_writer(
            directory, CHECKPOINT_KIND, inputs=self.inputs, config=config, seed=self.config.seed
        ) as temporary:
            save_tensors(temporary / "state.safetensors", tensors)
        return verify(directory, CHECKPOINT_KIND)

    @torch.no_grad()
    def load(self, directory: str | Path) -> None:
        """Goes on from a checkpoint. Raises ConfigError for one of another config or other latents."""
        manifest = verify(directory, CHECKPOINT_KIND)
        stored = dict(manifest.config) | manifest.inputs
        step = int(stored.pop("step"))
        refuse_another_run(stored, self.config.model_dump(mode="json") | self.inputs, directory)
        tensors = load_tensors(Path(directory) / "state.safetensors")
        for name, parameter in self.averaged.named_parameters():
            parameter.copy_(tensors[f"averaged.{name}"])
        names = {id(parameter): name for name, parameter in self.trained.named_parameters()}
        ordered = [names[id(p)] for group in self.optimizer.param_groups for p in group["params"]]
        state = {}
        for number, name in enumerate(ordered):
            self.trained.get_parameter(name).copy_(tensors[f"trained.{name}"])
            keys = ("step", "exp_avg", "exp_avg_sq") if step > 0 else ()
            state[number] = {key: tensors[f"optimizer.{key}.{name}"] for key in keys}
        groups = self.optimizer.state_dict()["param_groups"]
        self.optimizer.load_state_dict({"state": state, "param_groups": groups})
        self.step_index = step

    def _draw(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """This worker's part of the step's batch: latents, noise, timesteps and token ids."""
        config, total = self.config, self.config.batch_size
        generator = generator_for(config.seed, "batch", self.step_index)
        rng = np.random.default_rng([config.seed, self.step_index])
        errors = config.noise if self.careless else CaptionNoise()
        index_B = torch.randint(len(self.scenes), (total,), generator=generator)
        drop_B = rng.random(total) < config.prompt_dropout
        texts = [
            "" if drop else caption(corrupt(self.scenes[i], errors, rng), self.grammar, rng)
            for i, drop in zip(index_B.tolist(), drop_B, strict=True)
        ]
        timesteps_B = draw_timesteps(total, config.pure_noise_share, generator)
        noise = torch.randn((total, *self.latents_NCHW.shape[1:]), generator=generator)
        mine = slice(self.rank, None, self.world_size)
        ids_BT = torch.tensor([self._tokens(text) for text in texts[mine]])
        return self.latents_NCHW[index_B[mine]], noise[mine], timesteps_B[mine], ids_BT

    def _tokens(self, text: str) -> list[int]:
        if text not in self.ids:
            encoded = self.tokenizer(text, padding="max_length", max_length=CONTEXT_LENGTH)
            self.ids[text] = list(encoded.input_ids)
        return self.ids[text]
