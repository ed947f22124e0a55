"""The processes that train one seed together, as torchrun starts them; or one process alone."""

import os
from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.autograd import Function


@dataclass(frozen=True)
class ProcessGroup:
    """All processes call the same methods in the same order; alone, each returns what it is given."""

    rank: int = 0
    count: int = 1

    @property
    def is_main_process(self) -> bool:
        """Whether this is the process that writes."""
        return self.rank == 0

    def local_slice(self, rows: int) -> slice:
        """Return this process's share of a batch of so many rows."""
        return slice(self.rank * rows // self.count, (self.rank + 1) * rows // self.count)

    def all_reduce_sum(self, values: Tensor) -> Tensor:
        """Return the sum of every process's tensor."""
        if self.count > 1:
            distributed.all_reduce(values)
        return values

    def all_reduce_max(self, number: int) -> int:
        """Return the highest of every process's number."""
        if self.count == 1:
            return number
        highest = torch.tensor(number)
        distributed.all_reduce(highest, distributed.ReduceOp.MAX)
        return int(highest)

    def broadcast_object(self, content: Any) -> Any:
        """Return what the leading process has."""
        if self.count == 1:
            return content
        parcel = [content]
        distributed.broadcast_object_list(parcel)
        return parcel[0]

    def data_parallel(self, network: nn.Module) -> nn.Module:
        """Return the network whose backward pass gives every process the mean of all gradients."""
        if self.count == 1:
            return network
        for module in network.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.forward = partial(_batch_norm, module)  # type: ignore[method-assign]
        return nn.parallel.DistributedDataParallel(network, broadcast_buffers=False)

    def gradient_sync(self, network: nn.Module, now: bool) -> AbstractContextManager[None]:
        """Exchange gradients in the block's backward pass only when they are all there."""
        return nullcontext() if self.count == 1 or now else network.no_sync()  # type: ignore[operator]


@contextmanager
def init_distributed() -> Iterator[ProcessGroup]:
    """Join the processes that torchrun started; tensors on CUDA travel by NCCL, those on the CPU by Gloo."""
    count = int(os.environ.get("WORLD_SIZE", "1"))
    if count == 1:
        yield ProcessGroup()
        return
    if torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    distributed.init_process_group("cpu:gloo,cuda:nccl" if torch.cuda.is_available() else "gloo")
    try:
        yield ProcessGroup(distributed.get_rank(), count)
    finally:
        distributed.destroy_process_group()


class _AllReduceSum(Function):
    """The sum of every process's tensor, through which gradients flow back to every process."""

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
    """Normalize by the statistics of all processes' images; torch's own SyncBatchNorm knows no CPU."""
    if not norm.training:
        return type(norm).forward(norm, images)
    dims = (0, 2, 3)
    wide = images.float()  # under autocast the images are narrower
    count = _AllReduceSum.apply(wide.new_tensor(wide.numel() // wide.shape[1]))
    mean = _AllReduceSum.apply(wide.sum(dims)) / count
    centered = wide - mean.view(1, -1, 1, 1)
    variance = _AllReduceSum.apply(centered.square().sum(dims)) / count
    with torch.no_grad():
        norm.num_batches_tracked.add_(1)  # type: ignore[union-attr]
        norm.running_mean.lerp_(mean, norm.momentum)  # type: ignore[union-attr, arg-type]
        norm.running_var.lerp_(variance * count / (count - 1), norm.momentum)  # type: ignore[union-attr, arg-type]
    scale = norm.weight * (variance + norm.eps).rsqrt()
    normalized = (centered * scale.view(1, -1, 1, 1) + norm.bias.view(1, -1, 1, 1)).to(images.dtype)
    # timm's batch norm ends with its activation.
    for name in ("drop", "act"):
        normalized = getattr(norm, name, nn.Identity())(normalized)
    return normalized  # type: ignore[no-any-return]
