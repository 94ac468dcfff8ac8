"""What work needs of memory and arithmetic, found by doing it with tensors that hold no data.

The networks are built as diffusers builds them and really run, forwards and backwards, on fake tensors: each
has a shape, a type and a life, but no numbers. So what autograd keeps for the backward pass, what
checkpointing drops and what autocast casts are counted as they happen, and not guessed from a formula.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import FlopCounterMode

from accord.diffusion.architectures import Architecture
from accord.diffusion.conditioning import unet_arguments
from accord.diffusion.settings import FinetuneConfig
from accord.diffusion.trainable import make_trainable

TOKENS = 77
"""Of CLIP's text encoders."""


@dataclass(frozen=True)
class Cost:
    """`peak_bytes`: at the worst moment, above what was there before. `flops`: of the matrix products and
    convolutions (a multiplication and an addition are two)."""

    peak_bytes: int
    flops: int


class _Meter(TorchDispatchMode):
    """Counts the bytes of the storages that are alive, from when an operation makes them until they go."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0
        self._known: dict[int, Any] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        for leaf in tree_leaves(result):
            if isinstance(leaf, Tensor):
                self._see(leaf)
        return result

    def ignore(self, module: nn.Module) -> None:
        """What was there before is no need of the work."""
        for tensor in [*module.parameters(), *module.buffers()]:
            storage = tensor.untyped_storage()
            self._known[storage._cdata] = weakref.ref(storage)

    def _see(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key in self._known:
            return
        size = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        self._known[key] = weakref.ref(storage, lambda _: self._freed(key, size))

    def _freed(self, key: int, size: int) -> None:
        if self._known.pop(key, None) is not None:
            self.live -= size


def parameters(architecture: Architecture) -> dict[str, int]:
    """How many numbers each network holds; built on the meta device."""
    return {
        name: sum(tensor.numel() for tensor in _on_meta(architecture, name).state_dict().values())
        for name in architecture
    }


def build(architecture: Architecture, name: str) -> Any:
    """The network, with the weights that the device of the moment gives it (none, on meta)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = dict(architecture[name])
    if name == "text_encoder":
        return CLIPTextModel(CLIPTextConfig(**config))
    if name == "text_encoder_2":
        return CLIPTextModelWithProjection(CLIPTextConfig(**config))
    network_class: Any = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}[name]
    return network_class.from_config({**config, "_class_name": network_class.__name__})


@dataclass(frozen=True)
class Rows:
    """A batch of the UNet: `rows` samples (with guidance, an image is two) of `height` x `width` pixels."""

    rows: int
    height: int
    width: int


def unet_forward(architecture: Architecture, batch: Rows, dtype: torch.dtype, autocast: bool) -> Cost:
    """One denoising step."""

    def work(unet: Any) -> None:
        with torch.no_grad(), _autocast(autocast):
            predict(architecture, unet, batch, dtype)

    return _cost(architecture, "unet", dtype, lambda unet: unet.requires_grad_(False).eval(), work)


@dataclass(frozen=True)
class Training:
    """A forward and backward pass: the peak is that of activations and gradients together."""

    cost: Cost
    trained_bytes: int
    frozen_bytes: int


def unet_training(architecture: Architecture, batch: Rows, config: FinetuneConfig) -> Training:
    """One pass of the network as the fine-tuner trains it."""
    sizes: list[int] = []

    def prepare(unet: Any) -> Any:
        trained = make_trainable(unet, config.model_copy(update={"compile": False}), seed=0)
        for wanted in (True, False):
            sizes.append(sum(p.nbytes for p in trained.parameters() if p.requires_grad is wanted))
        return trained

    def work(unet: Any) -> None:
        with _autocast(config.precision == "bfloat16"):
            output_BCHW = predict(architecture, unet, batch, torch.float32)
        (output_BCHW.float() ** 2).mean().backward()  # type: ignore[no-untyped-call]

    cost = _cost(architecture, "unet", torch.float32, prepare, work)
    return Training(cost, sizes[0], sizes[1])


def trained_bytes(architecture: Architecture, config: FinetuneConfig) -> int:
    """Of the weights that are trained: all of the UNet's, or its adapters."""
    trained = make_trainable(_on_meta(architecture, "unet"), config.model_copy(update={"compile": False}), 0)
    return sum(p.nbytes for p in trained.parameters() if p.requires_grad)


def vae_pass(architecture: Architecture, batch: Rows, dtype: torch.dtype, *, encode: bool) -> Cost:
    """Images to latents, or latents to images."""

    def work(vae: Any) -> None:
        cell = 2 ** (len(vae.config.block_out_channels) - 1)
        channels = 3 if encode else vae.config.latent_channels
        height, width = (batch.height, batch.width) if encode else (batch.height // cell, batch.width // cell)
        values = torch.zeros(batch.rows, channels, height, width, dtype=dtype)
        with torch.no_grad():
            if encode:
                vae.encode(values).latent_dist.mean.float()
            else:
                vae.decode(values).sample.float()

    return _cost(architecture, "vae", dtype, lambda vae: vae.requires_grad_(False).eval(), work)


def predict(
    architecture: Architecture, unet: Any, batch: Rows, dtype: torch.dtype, device: str = "cpu"
) -> Tensor:
    """The UNet's output for a batch of zeros."""
    cell = 2 ** (len(architecture["vae"]["block_out_channels"]) - 1)
    latents_BCHW = torch.zeros(
        batch.rows,
        int(architecture["unet"]["in_channels"]),
        batch.height // cell,
        batch.width // cell,
        dtype=dtype,
        device=device,
    )
    timesteps_B = torch.zeros(batch.rows, dtype=torch.float32, device=device)
    width = int(architecture["unet"]["cross_attention_dim"])
    conditioning = {"states": torch.zeros(batch.rows, TOKENS, width, dtype=dtype, device=device)}
    if "text_encoder_2" in architecture:
        pooled = int(architecture["text_encoder_2"]["projection_dim"])
        conditioning["pooled"] = torch.zeros(batch.rows, pooled, dtype=dtype, device=device)
    output: Tensor = unet(
        latents_BCHW, timesteps_B, **unet_arguments(conditioning, latents_BCHW, cell), return_dict=False
    )[0]
    return output


def _cost(
    architecture: Architecture,
    name: str,
    dtype: torch.dtype,
    prepare: Callable[[Any], Any],
    work: Callable[[Any], None],
) -> Cost:
    """Runs `work` on the network without data."""
    meter, flops = _Meter(), FlopCounterMode(display=False)
    network = prepare(nn.Module.to(_on_meta(architecture, name), dtype))
    with FakeTensorMode():
        _without_data(network)
        meter.ignore(network)
        with flops, meter:
            work(network)
    return Cost(meter.peak, int(flops.get_total_flops()))


def _on_meta(architecture: Architecture, name: str) -> Any:
    with torch.device("meta"):
        return build(architecture, name)


def _without_data(network: nn.Module) -> None:
    """Puts tensors that pretend to be on the CPU, and so run as there, in the place of those on meta."""
    for module in network.modules():
        for name, tensor in list(module.named_parameters(recurse=False)):
            fake = torch.empty(tensor.shape, dtype=tensor.dtype, device="cpu")
            module._parameters[name] = nn.Parameter(fake, requires_grad=tensor.requires_grad)
        for name, buffer in list(module.named_buffers(recurse=False)):
            module._buffers[name] = torch.empty(buffer.shape, dtype=buffer.dtype, device="cpu")


def _autocast(enabled: bool) -> contextlib.AbstractContextManager[Any]:
    return torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled)
