"""What this machine has: memory, disk, GPUs, and how fast it is, by a short probe."""

from __future__ import annotations

import os
import shutil
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from accord.diffusion.architectures import Architecture
from accord.doctor.simulate import Rows, build, parameters, predict

_CGROUP = Path("/sys/fs/cgroup")
_WHOLE_BYTES = 2**29
"""A UNet up to this size is timed as a whole; of a larger one, a block."""
_PROBE_S = 1.0


@dataclass(frozen=True)
class Gpu:
    name: str
    total_bytes: int
    free_bytes: int


@dataclass(frozen=True)
class Speed:
    """Floating point operations a second of work like the UNet's, and how that was found out."""

    flops_per_s: float
    how: str


def available_memory() -> int:
    """Bytes of host memory that a new process can have: what the system calls available, within the
    container's limit. 0 where neither can be read."""
    free = _meminfo("MemAvailable")
    limit, used = _number(_CGROUP / "memory.max"), _number(_CGROUP / "memory.current")
    if limit is not None and used is not None:
        within = limit - used + _inactive_file()
        free = within if free is None else min(free, within)
    return max(free or 0, 0)


def resident_memory() -> int:
    """Bytes that this process holds now; 0 where that cannot be read."""
    try:
        for line in Path("/proc/self/status").read_text().splitlines():
            if line.startswith("VmRSS:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def free_disk(path: Path) -> int:
    """Bytes that can be written at `path`, which need not be there yet."""
    while not path.exists():
        path = path.parent
    return shutil.disk_usage(path).free


def gpus() -> list[Gpu]:
    """The CUDA devices of this machine."""
    if not torch.cuda.is_available():
        return []
    found = []
    for number in range(torch.cuda.device_count()):
        free, total = torch.cuda.mem_get_info(number)
        found.append(Gpu(torch.cuda.get_device_name(number), total, free))
    return found


def probe(architecture: Architecture, batch: Rows, device: str, *, half: bool) -> Speed:
    """Times the UNet, or a block of a large one, with random weights for about a second. `half`: bfloat16."""
    dtype = torch.bfloat16 if half else torch.float32
    whole = parameters(architecture)["unet"] * 4 <= _WHOLE_BYTES
    with torch.device("meta"):
        unet = build(architecture, "unet")
    if whole:
        network = _filled(unet, device, dtype)

        def run() -> None:
            predict(architecture, network, batch, dtype, device)
    else:
        run = _block_run(unet, architecture, batch, device, dtype)
    with torch.inference_mode():
        with FlopCounterMode(display=False) as counter:
            run()
        seconds = _time(run, device)
    what = "a step of this UNet" if whole else "a block of this UNet"
    kind = "bfloat16" if half else "float32"
    how = f"measured: {what} in {kind}, here, for a second"
    load, cores = os.getloadavg()[0], os.cpu_count() or 1
    if device == "cpu" and load > cores / 2:
        how += f". It is busy (load {load:.0f} on {cores} cores): they may be many times too long"
    return Speed(counter.get_total_flops() / seconds, how)


def _block_run(
    unet: Any, architecture: Architecture, batch: Rows, device: str, dtype: torch.dtype
) -> Callable[[], None]:
    """The widest-but-one block with attention, at the size that it has in the UNet: a mean of all."""
    widths = architecture["unet"]["block_out_channels"]
    level = min(1, len(widths) - 1)
    block = _filled(unet.down_blocks[level], device, dtype)
    cell = 2 ** (len(architecture["vae"]["block_out_channels"]) - 1) * 2**level
    shape = (batch.rows, widths[max(level - 1, 0)], batch.height // cell, batch.width // cell)
    hidden = torch.randn(shape, device=device, dtype=dtype)
    embedding = torch.randn(batch.rows, widths[0] * 4, device=device, dtype=dtype)
    text = torch.randn(
        batch.rows, 77, int(architecture["unet"]["cross_attention_dim"]), device=device, dtype=dtype
    )

    def run() -> None:
        block(hidden_states=hidden, temb=embedding, encoder_hidden_states=text)

    return run


def _filled(network: Any, device: str, dtype: torch.dtype) -> Any:
    network = nn.Module.to(network, dtype).to_empty(device=device).eval()
    for tensor in network.parameters():
        nn.init.normal_(tensor, std=0.02)
    return network


def _time(run: Callable[[], None], device: str) -> float:
    """Seconds a run: the least of as many as fit in about a second, at least two (other work only adds)."""
    taken: list[float] = []
    begun_s = time.perf_counter()
    while len(taken) < 2 or time.perf_counter() - begun_s < _PROBE_S:
        started_s = time.perf_counter()
        run()
        if device == "cuda":
            torch.cuda.synchronize()
        taken.append(time.perf_counter() - started_s)
    return min(taken)


def _meminfo(key: str) -> int | None:
    try:
        for line in Path("/proc/meminfo").read_text().splitlines():
            if line.startswith(f"{key}:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return None


def _number(file: Path) -> int | None:
    try:
        return int(file.read_text())
    except (OSError, ValueError):  # "max" is no limit
        return None


def _inactive_file() -> int:
    """Bytes of cached files that the container's system would give back."""
    try:
        for line in (_CGROUP / "memory.stat").read_text().splitlines():
            if line.startswith("inactive_file "):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
