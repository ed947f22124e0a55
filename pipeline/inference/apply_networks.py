"""Networks over batches of images, with every core of the CPU or with a GPU."""

from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from functools import partial
from itertools import islice
from typing import Literal

import torch
from joblib import cpu_count
from torch import Tensor

from pipeline.core.errors import UserError
from pipeline.core.parallel import map_in_threads
from pipeline.models.classifier import Classifier, predict_group
from pipeline.models.members import average_folds, group_by_backbone

Precision = Literal["float32", "bfloat16"]

# Images per forward pass. The last bits of a probability depend on it, so evaluation and prediction of many files
# share it; serving also uses smaller ones. 16 fit a CPU's caches, and from there on torch computes 1x1 convolutions in
# one thread with oneDNN.
BATCH_SIZES = {"cpu": 16, "cuda": 64}


def predict_members(
    members: Collection[Sequence[Classifier]],
    batches: Iterable[Tensor],
    device: torch.device,
    precision: Precision = "float32",
) -> Iterator[Tensor]:
    """Predict P(positive) by the members of an ensemble for every batch, see `apply_networks`.

    Args:
        members: the networks of each, of which the mean counts; a shared backbone computes its features once.
        batches: gray images (B, S, S), uint8.
        device: where the networks are.
        precision: float32, or autocast to bfloat16.

    Yields:
        For each batch, in order, (B, members), float32, on the CPU.
    """
    groups = group_by_backbone(members)
    methods = [partial(predict_group, group) for group in groups]
    for of_groups in apply_networks(methods, batches, device, precision):
        yield average_folds(members, groups, of_groups)


def apply_networks(
    methods: Sequence[Callable[[Tensor], Tensor]],
    batches: Iterable[Tensor],
    device: torch.device,
    precision: Precision = "float32",
) -> Iterator[list[Tensor]]:
    """Apply methods of networks, such as `Classifier.embed`, to every batch.

    On a CPU, each core applies one method to one batch. A network that is spread over the cores waits in every layer
    for the slowest of them, which another program may be using; and no result depends on the number of cores.

    Args:
        methods: each maps images (B, S, S), uint8, on the device to a tensor (B, ...).
        batches: gray images (B, S, S), uint8.
        device: where the networks are.
        precision: float32, or autocast to bfloat16.

    Yields:
        For each batch, in order, what the methods return, on the CPU.
    """

    def apply(job: tuple[Callable[[Tensor], Tensor], Tensor]) -> Tensor:
        method, pixels = job
        if device.type == "cpu":
            torch.set_num_threads(1)  # OpenMP's number is that of the calling thread
        with torch.autocast(device.type, torch.bfloat16, enabled=precision == "bfloat16"):
            return method(pixels)

    batches = (batch.to(device, non_blocking=True) for batch in batches)
    jobs = ((method, batch) for batch in batches for method in methods)
    if device.type == "cpu":
        results = map_in_threads(apply, jobs, cpu_count(), ahead=2 * cpu_count())
    else:
        results = map(apply, jobs)
    while of_batch := list(islice(results, len(methods))):
        yield [output.cpu() for output in of_batch]


def check_precision(precision: Precision, device: torch.device) -> None:
    """Check that the device computes with this precision.

    Raises:
        UserError: a CPU has no instructions for bfloat16, which would make it slower.
    """
    capabilities = ("avx512_bf16", "amx_bf16", "bf16", "sve_bf16")
    if precision == "bfloat16" and device.type == "cpu":
        found = torch.cpu.get_capabilities()
        if not any(found.get(name) for name in capabilities):
            raise UserError("--precision bfloat16: this processor has no instructions for it; leave the option out")
