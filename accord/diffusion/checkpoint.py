"""The fine-tuner's whole state as an artifact: safetensors and JSON, written all or nothing.

It holds what is trained (the UNet, or its adapters), the average of it, the optimiser's state and the step;
the manifest states config, seed, model and data. There is no state of a random generator and no place in the
data: the batch of a step follows from (seed, step) alone (batches.py), on any number of workers.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from accord.artifacts import Manifest, artifact_writer, each_tensor, read_manifest, save_tensors, verify
from accord.diffusion import sharding
from accord.diffusion.settings import FinetuneConfig
from accord.diffusion.trainable import put_weights
from accord.errors import ArtifactError
from accord.training import refuse_another_run

if TYPE_CHECKING:
    from accord.diffusion.finetune import Finetuner

KIND = "finetune_checkpoint"
STATE = "state.safetensors"
MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass(frozen=True)
class Snapshot:
    """A fine-tuner's state after a step, on its way to the disk."""

    tensors: Mapping[str, Tensor]
    identity: Mapping[str, str]
    config: Mapping[str, Any]
    seed: int
    step: int

    def write(self, directory: str | Path) -> Manifest:
        """Raises StorageError for a full disk; then the directory is as it was before."""
        config = dict(self.config) | {"step": self.step}
        with artifact_writer(
            directory, KIND, inputs=self.identity, config=config, seed=self.seed
        ) as temporary:
            save_tensors(temporary / STATE, self.tensors, {"step": str(self.step)})
        return read_manifest(directory)


def snapshot(finetuner: Finetuner, *, copy: bool) -> Snapshot | None:
    """The state as it is now; None on all workers but the first.

    `copy`: in memory of its own, so that training can go on while it is written; without, it must be written
    before the next step. Where weights are sharded all workers must call it.
    """
    tensors: dict[str, Tensor] = {}
    for name, tensor in _state(finetuner):
        whole = sharding.gathered(tensor)
        if finetuner.rank == 0:
            is_new = whole is not tensor or whole.device.type != "cpu"  # then `cpu` waits for the device
            tensors[name] = whole.detach().cpu() if is_new or not copy else whole.detach().clone()
    if finetuner.rank != 0:
        return None
    return Snapshot(
        tensors=tensors,
        identity=finetuner.identity,
        config=finetuner.config.decisive(),
        seed=finetuner.seed,
        step=finetuner.step_index,
    )


def load(finetuner: Finetuner, directory: str | Path) -> None:
    """Raises ArtifactError for a damaged checkpoint, ConfigError for one of another run."""
    manifest = verify(directory, KIND)
    step = _check_run(manifest, directory, finetuner.config, finetuner.identity | {"seed": finetuner.seed})
    names = {name: place for place, name in enumerate(finetuner.names)}
    moments: dict[int, dict[str, Tensor]] = {place: {} for place in names.values()} if step > 0 else {}
    missing = {name for name, _ in _state(finetuner)}
    if step > 0:
        missing |= {f"optimizer.{key}.{name}" for key in MOMENTS for name in names}
    try:
        with torch.no_grad():
            for key, whole in each_tensor(Path(directory) / STATE):
                _put(finetuner, key, whole, names, moments)
                missing.discard(key)
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"{directory}: the checkpoint does not fit this UNet: {error}") from error
    if missing:
        raise ArtifactError(
            f"{directory}: the checkpoint does not fit this UNet: {min(missing)} is missing, with "
            f"{len(missing) - 1} more"
        )
    groups = finetuner.optimizer.state_dict()["param_groups"]
    state = {place: {key: found[key] for key in MOMENTS} for place, found in moments.items()}
    finetuner.optimizer.load_state_dict({"state": state, "param_groups": groups})
    finetuner.step_index = step


def put_trained(unet: nn.Module, directory: str | Path, model_digest: str, config: FinetuneConfig) -> None:
    """Makes `unet`, the reference model's, the one that a checkpoint holds, in place: with the averaged
    weights where there are any, adapters merged. In float32, frozen.

    Raises ArtifactError for a damaged checkpoint, ConfigError for one of another model or config.
    """
    manifest = verify(directory, KIND)
    identity = {**manifest.inputs, "model": model_digest, "seed": manifest.seed}
    _check_run(manifest, directory, config, identity)
    kind = "average." if config.ema_decay > 0 else "unet."
    weights = {
        name.removeprefix(kind): tensor
        for name, tensor in each_tensor(Path(directory) / STATE)
        if name.startswith(kind)
    }
    try:
        put_weights(unet.float(), weights, config)
    except (KeyError, RuntimeError) as error:
        raise ArtifactError(f"{directory}: the checkpoint does not fit this UNet: {error}") from error


def trained(finetuner: Finetuner) -> dict[str, Tensor] | None:
    """The trained tensors by name as put_weights takes them, averaged where there is an average, in memory of
    their own; None on all workers but the first. Where weights are sharded all workers must call it."""
    found: dict[str, Tensor] = {}
    for name, tensor in zip(finetuner.names, finetuner.average or finetuner.parameters, strict=True):
        whole = sharding.gathered(tensor)
        if finetuner.rank == 0:
            found[name] = whole.detach().cpu().clone()
    return found if finetuner.rank == 0 else None


def _state(finetuner: Finetuner) -> Iterator[tuple[str, Tensor]]:
    for name, parameter in zip(finetuner.names, finetuner.parameters, strict=True):
        yield f"unet.{name}", parameter
        for key, value in finetuner.optimizer.state.get(parameter, {}).items():
            yield f"optimizer.{key}.{name}", torch.as_tensor(value)
    for name, average in zip(finetuner.names, finetuner.average, strict=False):
        yield f"average.{name}", average


def _put(
    finetuner: Finetuner,
    key: str,
    whole: Tensor,
    names: Mapping[str, int],
    moments: Mapping[int, dict[str, Tensor]],
) -> None:
    """One tensor of a checkpoint to where it belongs. Raises KeyError when there is no such place."""
    kind, _, name = key.partition(".")
    if kind == "optimizer":
        moment, _, name = name.partition(".")
        place = names[name]
        is_count = moment == "step"
        moments[place][moment] = whole if is_count else sharding.like(whole, finetuner.parameters[place])
    else:
        if kind == "average" and not finetuner.average:
            return
        held: Mapping[str, Sequence[Tensor]] = {"unet": finetuner.parameters, "average": finetuner.average}
        target = held[kind][names[name]]
        (part,) = sharding.local([target])
        (value,) = sharding.local([sharding.like(whole, target)])
        part.copy_(value)


def _check_run(
    manifest: Manifest, directory: str | Path, config: FinetuneConfig, identity: Mapping[str, Any]
) -> int:
    """The step of a checkpoint of this run; raises ConfigError for another run's."""
    stored = {**FinetuneConfig().decisive(), **manifest.config}  # an older version did not know every key
    step = int(stored.pop("step"))
    refuse_another_run(
        {**stored, **manifest.inputs, "seed": manifest.seed}, {**config.decisive(), **identity}, directory
    )
    return step
