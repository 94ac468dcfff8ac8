"""Rows of a tensor in files: in memory while they are few, else mapped, and only those of a batch are read.

Shapes: B rows of a batch.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from accord.errors import ArtifactError

HELD_BYTES = 2**30
"""Of one tensor: up to here it is read into memory, beyond it is mapped."""


class MappedRows:
    """Tensors that differ in their first dimension at most, one after the other, as if they were one on the
    CPU. They stay where they are: in files that are mapped into memory, of which the system keeps in memory
    what was read last, and lets go of it when memory is short.

    Raises ArtifactError when they do not fit each other.
    """

    def __init__(self, parts: Sequence[Tensor]) -> None:
        first = parts[0]
        for part in parts:
            if part.shape[1:] != first.shape[1:] or part.dtype != first.dtype:
                raise ArtifactError(
                    f"encoded rows are {list(first.shape[1:])} of {first.dtype} in one file and "
                    f"{list(part.shape[1:])} of {part.dtype} in another; expected one size and type"
                )
        self._parts = list(parts)
        self._ends = torch.tensor([len(part) for part in parts]).cumsum(0)
        self.shape = torch.Size([int(self._ends[-1]), *first.shape[1:]])
        self.dtype, self.device = first.dtype, first.device
        self.nbytes = sum(part.nbytes for part in parts)

    @property
    def ndim(self) -> int:
        return len(self.shape)

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index_B: Tensor) -> Tensor:
        """A copy of these rows, in this order. Raises IndexError for one that is not there."""
        if len(index_B) and not 0 <= int(index_B.min()) <= int(index_B.max()) < len(self):
            raise IndexError(f"there are {len(self)} rows; {index_B.tolist()} are asked for")
        rows = torch.empty((len(index_B), *self.shape[1:]), dtype=self.dtype)
        part_B = torch.searchsorted(self._ends, index_B, right=True)
        for place, (row, number) in enumerate(zip(index_B.tolist(), part_B.tolist(), strict=True)):
            part = self._parts[number]
            rows[place] = part[row - int(self._ends[number]) + len(part)]
        return rows

    def whole(self) -> Tensor:
        """All of them, in memory."""
        return torch.cat(self._parts)


def open_rows(paths: Sequence[Path], name: str, held_bytes: int = HELD_BYTES) -> Tensor | MappedRows:
    """The tensors called `name` of safetensors files, one after the other: in memory up to `held_bytes`, else
    mapped.

    Raises ArtifactError: a file is missing, is damaged, or does not fit the others.
    """
    parts = []
    for path in paths:
        try:
            with safe_open(path, framework="pt", device="cpu") as file:
                parts.append(file.get_tensor(name))  # mapped: nothing is read yet
        except FileNotFoundError:
            raise ArtifactError(
                f"there is no file {path}, which holds a part of what fine-tuning learns from: remove the "
                "run's work folder and start again, which makes what is missing anew"
            ) from None
        except (SafetensorError, OSError) as error:
            raise ArtifactError(f"{path} is no whole safetensors file with {name!r}: {error}") from None
    rows = MappedRows(parts)
    return rows.whole() if rows.nbytes <= held_bytes else rows
