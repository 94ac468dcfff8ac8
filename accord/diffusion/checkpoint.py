"""The fine-tuner's whole state as an artifact: safetensors and JSON, written all or nothing."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from accord.artifacts import Manifest, artifact_writer, load_tensors, read_manifest, save_tensors, verify
from accord.errors import ArtifactError
from accord.training import refuse_another_run

if TYPE_CHECKING:
    from accord.diffusion.finetune import Finetuner

KIND = "finetune_checkpoint"
# What may differ between two legs of a run: when it reports, saves, and in how many parts a batch is
# computed.
FREE_KEYS = frozenset({"log_every", "checkpoint_every", "gradient_accumulation", "guards"})


def save(finetuner: Finetuner, directory: str | Path) -> Manifest:
    """Raises StorageError for a full disk; then the directory is as it was before."""
    names = [name for name, _ in finetuner.unet.named_parameters()]
    tensors: dict[str, Tensor] = {f"unet.{n}": p for n, p in zip(names, finetuner.parameters, strict=True)}
    tensors |= {f"average.{n}": a for n, a in zip(names, finetuner.average, strict=False)}
    for name, parameter in zip(names, finetuner.parameters, strict=True):
        for key, value in finetuner.optimizer.state.get(parameter, {}).items():
            tensors[f"optimizer.{key}.{name}"] = torch.as_tensor(value)
    config = _config(finetuner) | {"step": finetuner.step_index}
    with artifact_writer(
        directory, KIND, inputs=finetuner.identity, config=config, seed=finetuner.seed
    ) as temporary:
        save_tensors(temporary / "state.safetensors", tensors, {"step": str(finetuner.step_index)})
    return read_manifest(directory)


def load(finetuner: Finetuner, directory: str | Path) -> None:
    """Raises ArtifactError for a damaged checkpoint, ConfigError for one of another run."""
    manifest = verify(directory, KIND)
    stored = dict(manifest.config) | manifest.inputs | {"seed": manifest.seed}
    step = int(stored.pop("step"))
    refuse_another_run(stored, _config(finetuner) | finetuner.identity | {"seed": finetuner.seed}, directory)
    tensors = load_tensors(Path(directory) / "state.safetensors")
    names = [name for name, _ in finetuner.unet.named_parameters()]
    try:
        with torch.no_grad():
            for i, (name, parameter) in enumerate(zip(names, finetuner.parameters, strict=True)):
                parameter.copy_(tensors[f"unet.{name}"])
                if finetuner.average:
                    finetuner.average[i].copy_(tensors[f"average.{name}"])
        state: dict[int, dict[str, Tensor]] = {}
        if step > 0:
            keys = ("step", "exp_avg", "exp_avg_sq")
            state = {i: {key: tensors[f"optimizer.{key}.{n}"] for key in keys} for i, n in enumerate(names)}
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"{directory}: the checkpoint does not fit this UNet: {error}") from error
    groups = finetuner.optimizer.state_dict()["param_groups"]
    finetuner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    finetuner.step_index = step


def _config(finetuner: Finetuner) -> dict[str, Any]:
    return {k: v for k, v in finetuner.config.model_dump(mode="json").items() if k not in FREE_KEYS}
