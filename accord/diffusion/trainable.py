"""The network that is trained: the whole UNet in float32, or low-rank adapters in a frozen one.

LoRA (Hu et al. 2021, arXiv 2106.09685) trains A and B of W + (alpha / rank) B A, and never W. A is drawn from
(seed, name of the layer), so that every worker and every resumed run begins with the same; B begins at 0, so
that the network begins as the reference model.
"""

from __future__ import annotations

import contextlib
import copy
import math
from collections.abc import Iterator, Mapping
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from accord.diffusion.settings import FinetuneConfig, LoraConfig
from accord.errors import ConfigError
from accord.training import generator_for

ADAPTER = "default"


def make_trainable(unet: nn.Module, config: FinetuneConfig, seed: int) -> nn.Module:
    """A network to train, made of `unet`, which stays as it is: what is trained of it requires gradients.

    It runs without dropout, the one source of randomness that is not drawn from (seed, step).

    Raises ConfigError when lora.target_modules name no layer.
    """
    if config.parameters == "full":
        trained = copy.deepcopy(unet).float().requires_grad_(True)
    else:
        tensors = [] if config.channels_last else chain(unet.parameters(), unet.buffers())
        trained = copy.deepcopy(unet, {id(tensor): tensor for tensor in tensors})  # shares what is frozen
        _add_adapters(trained, config.lora, seed)
        if config.precision == "bfloat16":
            _halve_frozen(trained)
    trained.train()
    for module in trained.modules():
        if isinstance(module, nn.Dropout):
            module.eval()
    if config.channels_last:
        nn.Module.to(trained, memory_format=torch.channels_last)
    arrange: Any = trained
    if config.gradient_checkpointing:
        arrange.enable_gradient_checkpointing()
    if config.compile:
        arrange.compile_repeated_blocks()
    return trained


@contextlib.contextmanager
def without_adapters(trained: nn.Module) -> Iterator[None]:
    """Inside, the network is the reference model: its adapters add nothing."""
    layers = [layer for _, layer in _adapted(trained)]
    # Not peft's enable_adapters: that also changes what requires gradients, under a graph that needs them.
    for layer in layers:
        layer._disable_adapters = True
    try:
        yield
    finally:
        for layer in layers:
            layer._disable_adapters = False


@torch.no_grad()
def put_weights(unet: nn.Module, weights: Mapping[str, Tensor], config: FinetuneConfig) -> None:
    """Makes the plain `unet` one that was trained, in place, frozen; `weights` are the trained tensors by
    name, as in make_trainable's network. Adapters are merged into the weights that they belong to.

    Raises KeyError or RuntimeError for weights of another network.
    """
    plain = dict(unet.requires_grad_(False).named_parameters())
    if config.parameters == "full":
        for name, parameter in plain.items():
            parameter.copy_(weights[name])
        return
    scale = config.lora.alpha / config.lora.rank
    for name, a in weights.items():
        layer, kind, rest = name.partition(".lora_A.")
        if kind:
            b = weights[f"{layer}.lora_B.{rest}"]
            weight = plain[f"{layer}.weight"]
            change = b.float().flatten(1) @ a.float().flatten(1)
            weight.add_((scale * change).view(weight.shape).to(weight.device, weight.dtype))


def _add_adapters(unet: nn.Module, config: LoraConfig, seed: int) -> None:
    """In place; everything else is frozen."""
    import peft  # takes seconds, and most runs have no adapters

    names = [name for name, _ in unet.named_modules()]
    for target in config.target_modules:
        if not any(name == target or name.endswith(f".{target}") for name in names):
            raise ConfigError(
                f"finetune.lora.target_modules: the UNet has no layer {target!r}; in most UNets the "
                "attention's are to_q, to_k, to_v and to_out.0"
            )
    settings = peft.LoraConfig(
        r=config.rank, lora_alpha=config.alpha, target_modules=list(config.target_modules)
    )
    with torch.random.fork_rng(devices=[]):  # peft draws from the global generator
        try:
            peft.inject_adapter_in_model(settings, unet, adapter_name=ADAPTER)
        except ValueError as error:
            raise ConfigError(f"finetune.lora.target_modules: {error}") from error
    for name, layer in _adapted(unet):
        a, b = layer.lora_A[ADAPTER].weight, layer.lora_B[ADAPTER].weight
        drawn = torch.empty(a.shape)
        nn.init.kaiming_uniform_(drawn, a=math.sqrt(5), generator=generator_for(seed, "lora", name))
        with torch.no_grad():
            a.copy_(drawn)
            b.zero_()
        layer.cast_input_dtype_enabled = False  # autocast does that


def _halve_frozen(unet: nn.Module) -> None:
    """bfloat16 weights for the frozen layers that autocast computes in bfloat16 anyway: the same numbers in
    half the memory. New tensors, since the old ones are shared."""
    for module in unet.modules():
        halved = isinstance(module, nn.Linear | nn.Conv2d)
        for name, parameter in list(module.named_parameters(recurse=False)):
            if not parameter.requires_grad:
                tensor = parameter.to(torch.bfloat16) if halved else parameter.clone()
                setattr(module, name, nn.Parameter(tensor, requires_grad=False))


def _adapted(unet: nn.Module) -> list[tuple[str, Any]]:
    """The layers that have an adapter, by name."""
    return [(name, module) for name, module in unet.named_modules() if hasattr(module, "lora_A")]
