"""FSDP2: weights, gradients and optimiser state spread over the workers, gathered a block at a time.

A sharded tensor is a DTensor; what is not sharded passes through these functions as it is.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor, distribute_tensor

# Gathered as one, and freed when they have run; the rest of the network is one more such unit.
UNITS = frozenset({"BasicTransformerBlock", "ResnetBlock2D"})


def shard(unet: nn.Module) -> nn.Module:
    """Spreads the network over all workers, in place. Needs torch.distributed, and each worker the same
    weights on its device."""
    device = next(unet.parameters()).device
    mesh = init_device_mesh(device.type, (torch.distributed.get_world_size(),))
    for module in list(unet.modules()):
        if type(module).__name__ in UNITS:
            fully_shard(module, mesh=mesh)
    fully_shard(unet, mesh=mesh)
    return unet


@torch.no_grad()
def gathered(tensor: Tensor) -> Tensor:
    """The whole tensor. All workers must ask for it."""
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor


@torch.no_grad()
def local(tensors: Sequence[Tensor]) -> list[Tensor]:
    """This worker's parts, in the same memory."""
    return [tensor.to_local() if isinstance(tensor, DTensor) else tensor for tensor in tensors]


def like(whole: Tensor, tensor: Tensor) -> Tensor:
    """`whole`, a plain tensor that all workers have, laid out as `tensor` is: sharded, on its device, with
    its strides."""
    if isinstance(tensor, DTensor):
        mesh: Any = tensor.device_mesh
        # Nobody sends: each worker takes its part.
        return distribute_tensor(whole.to(tensor.device), mesh, tensor.placements, src_data_rank=None)
    return torch.empty_like(tensor).copy_(whole)
