"""Several processes that train one network: who there is, and what they add up.

``torchrun --nproc-per-node 4 -m embedkit finetune ...`` starts the processes; each learns from its share of every
batch. The gradients are added up in one sum after the backward pass and weighted by images, not inside it by PyTorch's
DistributedDataParallel: so a process may run out of memory and split its share, blocks may thaw between epochs, and a
last batch may be of any size, and the result is still exactly the gradient of the whole batch.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta

import torch
from torch import Tensor, nn
from torch import distributed as processes

from embedkit.errors import FinetuneError

# One process embeds, writes or fits alone while the others wait, and that may take days. Of a process that dies they
# learn at once, from its connections and from torchrun. 2^31 milliseconds, the most that some timers hold, are 24 days.
_PATIENCE = timedelta(days=20)


@dataclass(frozen=True)
class World:
    """The processes of a run.

    Parameters
    ----------
    rank : int, default 0
        This one; the first writes what is written.
    size : int, default 1
        How many there are.
    """

    rank: int = 0
    size: int = 1

    @property
    def first(self) -> bool:
        """Whether this process writes files and speaks."""
        return self.rank == 0

    def total(self, values: Tensor) -> Tensor:
        """Return the sum over all processes of a tensor that has one shape in all of them."""
        if self.size > 1:
            values = values.clone()
            processes.all_reduce(values)
        return values

    def wait(self) -> None:
        """Wait until every process is here."""
        if self.size > 1:
            processes.barrier()  # On whatever they speak by: NCCL adds up nothing that lies on the processor.

    def rows(self, values: Tensor) -> Tensor:
        """Return the rows (n, ...) of all processes under one another, by rank; each may have another number."""
        if self.size == 1:
            return values
        counts = torch.zeros(self.size, dtype=torch.int64, device=values.device)
        counts[self.rank] = len(values)
        lengths = [int(count) for count in self.total(counts)]
        padded = values.new_zeros((max(lengths), *values.shape[1:]))
        padded[: len(values)] = values
        found = [torch.empty_like(padded) for _ in lengths]
        processes.all_gather(found, padded)
        return torch.cat([part[:length] for part, length in zip(found, lengths, strict=True)])

    def share_values(self, module: nn.Module) -> None:
        """Give every process the first one's parameters and buffers."""
        if self.size > 1:
            for value in module.state_dict().values():
                contiguous = value.contiguous()
                processes.broadcast(contiguous, src=0)
                value.copy_(contiguous)

    def add_gradients(self, parameters: Iterable[nn.Parameter], images: int, loss: Tensor) -> tuple[int, Tensor]:
        """Turn every process's mean gradients into those of the mean over all images, in all processes alike.

        Parameters
        ----------
        parameters : iterable of nn.Parameter
            Those that learn, in one order in all processes.
        images : int
            What this process's gradients and loss are the mean over; may be 0.
        loss : Tensor
            Of this process, ().

        Returns
        -------
        tuple of int and Tensor
            Images in all processes, and their mean loss.
        """
        if self.size == 1:
            return images, loss
        learning = [parameter for parameter in parameters if parameter.requires_grad]
        head = torch.tensor([images, *(parameter.grad is not None for parameter in learning)], dtype=torch.float32)
        parts = [head.to(loss.device), (loss.float() * images).reshape(1)]
        parts += [(torch.zeros_like(p) if p.grad is None else p.grad * images).float().flatten() for p in learning]
        flat = torch.cat(parts)
        processes.all_reduce(flat)
        total = max(1, int(flat[0]))
        place = len(head) + 1
        for parameter, somewhere in zip(learning, flat[1 : len(head)].tolist(), strict=True):
            # Where no process had a gradient there is none: zeros would let the weights decay.
            summed = flat[place : place + parameter.numel()].view(parameter.shape) / total
            parameter.grad = torch.empty_like(parameter).copy_(summed) if somewhere else None
            place += parameter.numel()
        return int(flat[0]), flat[len(head)] / total


@contextmanager
def join_world(device: str = "cpu") -> Iterator[World]:
    """Join the processes that torchrun started, and part from them at the end; alone, do nothing.

    Parameters
    ----------
    device : str, default "cpu"
        What they compute on: with "cuda", and "auto" where there is a GPU, "cuda" means from now on the GPU of the
        process's local rank, and they speak NCCL; otherwise Gloo.

    Raises
    ------
    FinetuneError
        When a machine has more processes than accelerators.

    Examples
    --------
    >>> with join_world() as world:
    ...     world
    World(rank=0, size=1)
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1 or processes.is_initialized():
        yield World(processes.get_rank(), processes.get_world_size()) if processes.is_initialized() else World()
        return
    accelerated = device.startswith("cuda") or (device == "auto" and torch.cuda.is_available())
    if accelerated:
        local = int(os.environ.get("LOCAL_RANK", "0"))
        if local >= torch.cuda.device_count():
            raise FinetuneError(
                f"torchrun started process {local + 1} on this machine, which has {torch.cuda.device_count()} "
                "accelerators; choose --nproc-per-node accordingly, or --device cpu"
            )
        torch.cuda.set_device(local)
    processes.init_process_group("nccl" if accelerated else "gloo", timeout=_PATIENCE)
    try:
        yield World(processes.get_rank(), processes.get_world_size())
    finally:
        processes.destroy_process_group()
