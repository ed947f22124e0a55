"""Networks that torchxrayvision pickled as a whole, read without executing anything: as tensors in inert objects.

torch's unpickler for weights makes only tensors, containers, and objects of the classes that it is given. Here, these
stand in for those of torchxrayvision and torch, and do nothing.
"""

import io
import pickle
import pickletools
from collections.abc import Callable, Iterator
from itertools import pairwise
from typing import Any

from torch import Tensor


class PickledModule:
    """Stands in for every class of a pickled network; the unpickler only sets its attributes."""


def take_class(_kind: str, module_class: type, _file: str | None, _source: str | None) -> type:
    """Return the class of a reference that torch before 1.6 wrote: it came with its source code, which is dropped."""
    return module_class


TORCHXRAYVISION_CLASSES = ("DenseNet", "_DenseBlock", "_DenseLayer", "_Transition")
TORCH_CLASSES = (
    "activation.ReLU", "batchnorm.BatchNorm2d", "container.Sequential", "conv.Conv2d", "linear.Linear",
    "pooling.AvgPool2d", "pooling.MaxPool2d",
)  # fmt: skip
PICKLED_CLASSES: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
    *((PickledModule, f"torchxrayvision.models.{name}") for name in TORCHXRAYVISION_CLASSES),
    *((PickledModule, f"torch.nn.modules.{name}") for name in TORCH_CLASSES),
    (PickledModule, "torch.nn.backends.thnn._get_thnn_function_backend"),  # in files of torch before 1.4
    (take_class, f"{take_class.__module__}.{take_class.__name__}"),
]


TAKE_CLASS = pickle.GLOBAL + f"{take_class.__module__}\n{take_class.__name__}\n".encode()  # as pickles refer to it


def state_of(module: PickledModule) -> dict[str, Tensor]:
    """Return the state dict of a pickled network.

    Raises:
        ValueError: a module is in the network twice; nested, such modules give a small file an endless state dict.
    """
    state, todo, seen = dict[str, Tensor](), [("", module)], set[int]()
    while todo:
        prefix, part = todo.pop()
        if id(part) in seen:
            raise ValueError("a module is in the network twice")
        seen.add(id(part))
        for kind in ("_parameters", "_buffers"):
            state |= {prefix + name: tensor for name, tensor in vars(part)[kind].items() if tensor is not None}
        todo += [(f"{prefix}{name}.", child) for name, child in vars(part)["_modules"].items()]
    return state


def inline_classes(data: bytes) -> io.BytesIO:
    """Rewrite a file of torch before 1.6, in which classes are references with their source, to plain classes.

    torch's unpickler for weights refuses such references. A reference (kind, class, file, source) becomes a call of
    `take_class` with them.
    """
    stream, parts, done = io.BytesIO(data), list[bytes](), 0
    for _ in range(4):  # a magic number, a version, a description of the system, and the content
        marks, texts, start, kind = list[tuple[int, Any]](), dict[Any, Any](), 0, None
        operations: Iterator[tuple[Any, Any, Any]] = pickletools.genops(stream)
        for (last, value, place), (opcode, argument, position) in pairwise(operations):
            if last.name == "MARK":
                marks.append((place, argument if opcode.name == "BINUNICODE" else texts.get(argument)))
            if last.name == "BINUNICODE" and opcode.name in ("BINPUT", "LONG_BINPUT"):
                texts[argument] = value
            if opcode.name in ("TUPLE", "APPENDS", "SETITEMS"):
                start, kind = marks.pop()  # of a tuple, what its first element is
            if opcode.name == "BINPERSID" and kind == "module":
                parts += [data[done:start], TAKE_CLASS, data[start:position], pickle.REDUCE]
                done = position + 1
    return io.BytesIO(b"".join([*parts, data[done:]]))
