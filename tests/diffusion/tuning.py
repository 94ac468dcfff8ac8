"""A small fine-tuning, for tests."""

import torch

from accord.diffusion.encode import encode_prompts
from accord.diffusion.finetune import FinetuneConfig, FinetuneData, Finetuner
from accord.diffusion.model import DiffusionModel


def make_data(model: DiffusionModel, images: int = 6, pretraining: int = 5) -> FinetuneData:
    generator = torch.Generator().manual_seed(1)
    text_KTD = encode_prompts(model, ["red star", "two circles", "blue heart on grass"])
    return FinetuneData(
        latents_NCHW=torch.randn(images, 4, 8, 8, generator=generator),
        text_index_N=torch.arange(images) % 3,
        reward_N=torch.linspace(0.1, 0.9, images),
        pretraining_latents_MCHW=torch.randn(pretraining, 4, 8, 8, generator=generator),
        pretraining_text_index_M=torch.arange(pretraining) % 3,
        pretraining_reward_M=torch.linspace(0.1, 0.9, pretraining),
        text_KTD=text_KTD,
        empty_text_TD=encode_prompts(model, [""])[0],
    )


def config(**changes: object) -> FinetuneConfig:
    small = {
        "steps": 8,
        "learning_rate": 1e-3,
        "batch_size": 5,
        "pretraining_batch_size": 3,
        "ema_decay": 0.9,
    }
    return FinetuneConfig.model_validate(small | changes)


def state(finetuner: Finetuner) -> list[torch.Tensor]:
    moments = [v for p in finetuner.parameters for v in finetuner.optimizer.state[p].values()]
    return [t.detach().clone() for t in (*finetuner.parameters, *finetuner.average, *moments)]
