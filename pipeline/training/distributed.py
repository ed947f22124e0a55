"""Data-parallel training of one seed in the processes that torchrun starts, or in one process."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function

from pipeline.core.errors import UserError, first_line


@dataclass(frozen=True)
class ProcessGroup:
    """The processes of a training; all must call the same methods in the same order.

    With one process, every method returns its argument.
    """

    rank: int = 0
    count: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this process writes files and logs."""
        return self.rank == 0

    def local_slice(self, rows: int) -> slice:
        """Return this process's slice of a batch of `rows` rows."""
        return slice(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of the tensors of all processes."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def all_reduce_max(self, number: int) -> int:
        """Return the maximum of the numbers of all processes."""
        if self.count == 1:
            return number
        maximum = torch.tensor(number)
        distributed.all_reduce(maximum, distributed.ReduceOp.MAX)
        return int(maximum)

    def broadcast_object(self, content: Any) -> Any:
        """Return the object of the main process."""
        if self.count == 1:
            return content
        objects = [content]
        distributed.broadcast_object_list(objects)
        return objects[0]

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Wrap the network so that its backward pass averages the gradients of all processes."""
        if self.count == 1:
            return network
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.forward = partial(_batch_norm, module)  # type: ignore[method-assign]
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    def gradient_sync(self, network: nn.Module, *, now: bool) -> AbstractContextManager[None]:
        """Average the gradients in the block's backward pass only if `now`; else accumulate them locally."""
        return nullcontext() if self.count == 1 or now else network.no_sync()  # type: ignore[operator]


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """Initialize the process group that torchrun describes in the environment: NCCL on CUDA, Gloo on the CPU.

    Raises:
        UserError: there are fewer GPUs than processes, or the processes do not connect.
    """
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ProcessGroup()
        return
    if torch.cuda.is_available():  # NCCL refuses to share a GPU
        gpus, local_count = torch.cuda.device_count(), int(os.environ.get("LOCAL_WORLD_SIZE", count))
        if gpus < local_count:
            raise UserError(
                f"{local_count} processes, but visible GPUs for only {gpus}; run: torchrun --nproc-per-node {gpus}, "
                "or set CUDA_VISIBLE_DEVICES= to train on CPUs"
            )
    try:
        if torch.cuda.is_available():
            torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    except (KeyError, ValueError, RuntimeError) as error:
        raise UserError(
            f"WORLD_SIZE is {count}, but the processes do not connect: {first_line(error)}; start them with torchrun, "
            "or unset WORLD_SIZE to train in one process"
        ) from error
    try:
        yield ProcessGroup(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()


class _AllReduceSum(Function):
    """Differentiable sum of the tensors of all processes."""

    @staticmethod
    def forward(_: Any, values: Tensor) -> Tensor:
        total = values.clone()
        distributed.all_reduce(total)
        return total

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        total = gradient.clone()
        distributed.all_reduce(total)
        return total


def _batch_norm(norm: nn.BatchNorm2d, images: Tensor) -> Tensor:
    """Normalize with the statistics of the whole batch; torch's SyncBatchNorm does not support the CPU."""
    if not norm.training:
        return type(norm).forward(norm, images)
    dims = (0, 2, 3)
    inputs = images.float()  # lower precision under autocast
    # Filled on the device: a copy from the host would wait for it.
    count = _AllReduceSum.apply(inputs.new_full((), inputs.numel() // inputs.shape[1]))
    mean = _AllReduceSum.apply(inputs.sum(dims)) / count
    centered = inputs - mean.view(1, -1, 1, 1)
    variance = _AllReduceSum.apply(centered.square().sum(dims)) / count
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        norm.running_mean.lerp_(mean, norm.momentum)  # type: ignore[union-attr, arg-type]
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)  # type: ignore[union-attr, arg-type]
    scale = norm.weight * (variance + norm.eps).rsqrt()
    normalized = (centered * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)).to(images.dtype)
    # timm's batch norm includes dropout and the activation.
    for name in ("drop", "act"):
        normalized = getattr(norm, name, nn.Identity())(normalized)
    return normalized  # type: ignore[no-any-return]
