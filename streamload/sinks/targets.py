"""What a checkpoint is loaded into: the tensors that are there already, and which of its tensors goes into which."""

from __future__ import annotations

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from streamload.checkpoint import Catalog, ShardFile, TensorInfo
from streamload.checkpoint.text import brief
from streamload.errors import DeviceError, MismatchError, OptionError
from streamload.shared_memory import Memory, covering, has_memory
from streamload.sinks.dtypes import check_dtypes, require_torch, torch_dtypes, torch_shape

if TYPE_CHECKING:
    import torch

__all__ = ["Target", "Targets", "WholeTarget", "copy_into", "memory_at", "readable", "staged_tensor"]


class Target(ABC):
    """Where the bytes go that are read of one tensor of the checkpoint.

    Attributes:
        direct: Whether they may be read straight into the target's memory.
    """

    direct: bool

    @abstractmethod
    def memory(self) -> memoryview:
        """The memory to read into, of a direct one. It does not keep it: an error's traceback knows loans."""

    @abstractmethod
    def fill(self, tensor: TensorInfo, region: memoryview, start: int) -> torch.Tensor:
        """Take what was staged, and give what is handed out for it. Called on the consumer's thread.

        Args:
            tensor: What was read.
            region: Memory with its bytes, which lives as long as something refers to this very object.
            start: Where they begin. Nobody else will use them.

        Raises:
            DeviceError: It could not be copied to its device.
        """

    @property
    @abstractmethod
    def filled(self) -> tuple[torch.Tensor, ...]:
        """What may be written into; of a direct one, the first is what is handed out."""


class WholeTarget(Target):
    """A tensor that is filled whole.

    Args:
        tensor: What is to be filled, in the shape that the checkpoint's tensor has.
        dtype: The checkpoint's.
    """

    __slots__ = ("direct", "tensor")

    def __init__(self, tensor: torch.Tensor, dtype: torch.dtype) -> None:
        self.tensor = tensor
        self.direct = readable(tensor, dtype) and tensor.is_contiguous()

    def memory(self) -> memoryview:
        return memory_at(self.tensor.data_ptr(), self.tensor.nbytes)

    def fill(self, tensor: TensorInfo, region: memoryview, start: int) -> torch.Tensor:
        found = staged_tensor(region, start, tensor.nbytes, torch_dtypes()[tensor.dtype]).view(torch_shape(tensor))
        copy_into(self.tensor, found, tensor.name)
        return found

    @property
    def filled(self) -> tuple[torch.Tensor, ...]:
        return (self.tensor,)


def readable(tensor: torch.Tensor, dtype: torch.dtype) -> bool:
    """Whether elements of a checkpoint's tensor lie in the file as they lie in this one: a file may be read into it."""
    # Values that torch negates or conjugates when it reads them are not what lies there.
    return tensor.device.type == "cpu" and tensor.dtype == dtype and not (tensor.is_conj() or tensor.is_neg())


def memory_at(address: int, nbytes: int) -> memoryview:
    """So many bytes of memory, which the view does not keep."""
    return memoryview((ctypes.c_ubyte * nbytes).from_address(address)).cast("B")


def staged_tensor(region: memoryview, start: int, nbytes: int, dtype: torch.dtype) -> torch.Tensor:
    """Bytes of a region as a tensor of one dimension, which keeps the region."""
    import torch

    if not nbytes:
        # The device is said: within `with torch.device(...)`, as engines load, torch would put it elsewhere.
        return torch.empty(0, dtype=dtype, device="cpu")
    return torch.frombuffer(region, dtype=torch.uint8, offset=start, count=nbytes).view(dtype)


def copy_into(target: torch.Tensor, source: torch.Tensor, name: str) -> None:
    """Copy a tensor into one that is there already.

    Raises:
        DeviceError: It fails.
    """
    import torch

    try:
        # A tensor that was made in inference mode may be written in it only, and any other one outside of it as well.
        with torch.inference_mode() if target.is_inference() else torch.no_grad():
            target.copy_(source)
    except RuntimeError as error:
        raise DeviceError(f"copying tensor {name!r} into {target.device} failed: {error}") from error


class Targets:
    """Tensors that are to be filled, and, once the checkpoint is known, the checkpoint's tensors that fill them.

    Args:
        model: A module, or tensors by their names. Of a module, what its ``state_dict`` holds: parameters and
            persistent buffers.
        cast: Whether a checkpoint's tensor may have another dtype than its target.
        ignore_unexpected: Whether the checkpoint may hold names that the model does not have.
        wanted: Which names take part; the others are neither filled nor missed.

    Attributes:
        narrowed: Told by `accept`: what filled only a part of its target, in words.

    Raises:
        MissingDependencyError: torch is not installed.
        OptionError: The model is neither, or holds what cannot be filled: a tensor without memory of its own.
    """

    def __init__(
        self,
        model: object,
        *,
        cast: bool = False,
        ignore_unexpected: bool = False,
        wanted: Callable[[str], bool] = lambda _: True,
    ) -> None:
        require_torch()
        for name, value in (("cast", cast), ("ignore_unexpected", ignore_unexpected)):
            if not isinstance(value, bool):
                raise OptionError(f"{name}={value!r} is not True or False")
        self._tensors = {name: tensor for name, tensor in _tensors_of(model).items() if wanted(name)}
        for name, tensor in self._tensors.items():
            _check_fillable(name, tensor)
        self._cast = cast
        self._ignore_unexpected = ignore_unexpected
        self._chosen: dict[str, Target] = {}
        self.narrowed: tuple[str, ...] = ()

    @property
    def devices(self) -> tuple[str, ...]:
        """Where the tensors lie, each device once."""
        return tuple(sorted({str(tensor.device) for tensor in self._tensors.values()})) or ("cpu",)

    def find(self, tensor: TensorInfo) -> Target:
        """Where a tensor goes that `accept` has accepted."""
        return self._chosen[tensor.name]

    def accept(self, catalog: Catalog, whole: Catalog) -> Catalog:
        """Say which of a checkpoint's tensors are to be read, and check that they fit.

        Of targets that share memory, the one that covers the others is filled, of those that the checkpoint has; a name
        that it lacks is not missing where other names fill all of its memory. An empty target is never missing.

        Args:
            catalog: What the checkpoint has, or what this rank needs of it.
            whole: The whole tensors that it is of.

        Returns:
            What is to be read.

        Raises:
            MismatchError: Names are missing or unexpected; a tensor is larger than its target, or has another number of
                dimensions, or another dtype; a slice is smaller than its target, which is then no part of a model that
                is shared out like this.
            UnsupportedDtypeError: torch does not have a tensor's dtype.
        """
        found = {tensor.name: tensor for file in catalog.files for tensor in file.tensors}
        present = {name: tensor for name, tensor in self._tensors.items() if name in found}
        kept = covering(present)
        self._check_names(found, {tensor.name for file in whole.files for tensor in file.tensors}, kept.values())
        empty = {name for name, tensor in present.items() if not tensor.numel()}
        chosen = _only(catalog, {*kept, *empty})
        check_dtypes(chosen)
        self._check_shapes(chosen, whole)
        self._check_dtypes(chosen)
        narrowed = []
        for file in chosen.files:
            for tensor in file.tensors:
                target, shape = self._tensors[tensor.name], torch_shape(tensor)
                if target.shape != shape:
                    narrowed.append(f"{brief(tensor.name)} {list(shape)} in {list(target.shape)}")
                    for dimension, length in enumerate(shape):
                        target = target.narrow(dimension, 0, length)
                self._chosen[tensor.name] = WholeTarget(target, torch_dtypes()[tensor.dtype])
        self.narrowed = tuple(narrowed)
        return chosen

    def _check_names(self, found: Mapping[str, TensorInfo], whole: set[str], filled: Iterable[torch.Tensor]) -> None:
        missing = [name for name in self._tensors if name not in found]
        if missing:
            memory = Memory(filled)
            missing = [name for name in missing if not memory.holds(self._tensors[name])]
        unexpected = [] if self._ignore_unexpected else [name for name in found if name not in self._tensors]
        problems = []
        absent = [name for name in missing if name not in whole]
        elsewhere = [name for name in missing if name in whole]
        if absent:
            problems.append(f"{_number(absent, 'name')} {brief(absent)} of the model missing from the checkpoint")
        if elsewhere:
            problems.append(f"{_number(elsewhere, 'name')} {brief(elsewhere)} of the model not among this rank's")
        if unexpected:
            problems.append(
                f"{_number(unexpected, 'name')} {brief(unexpected)} of the checkpoint not in the model "
                "(ignore_unexpected=True leaves such out)"
            )
        if problems:
            raise MismatchError("; ".join(problems), missing=missing, unexpected=unexpected)

    def _check_shapes(self, chosen: Catalog, whole: Catalog) -> None:
        shapes = {tensor.name: torch_shape(tensor) for file in whole.files for tensor in file.tensors}
        for file in chosen.files:
            for tensor in file.tensors:
                target, shape = self._tensors[tensor.name], torch_shape(tensor)
                if target.shape == shape:
                    continue
                fits = len(shape) == target.ndim
                if not fits or any(length > room for length, room in zip(shape, target.shape, strict=True)):
                    how = "is larger than" if fits else "has not as many dimensions as"
                    _refuse(
                        tensor,
                        file,
                        f"of shape {list(shape)} {how} the one that it is to fill, of shape {list(target.shape)}",
                    )
                if shape != shapes[tensor.name]:
                    _refuse(
                        tensor,
                        file,
                        f"of shape {list(shapes[tensor.name])} is shared out, and this rank's part of shape "
                        f"{list(shape)} does not fill the one of shape {list(target.shape)}: make the model for as "
                        "many ranks",
                    )

    def _check_dtypes(self, chosen: Catalog) -> None:
        for file in chosen.files:
            for tensor in file.tensors:
                target, dtype = self._tensors[tensor.name], torch_dtypes()[tensor.dtype]
                if target.dtype == dtype:
                    continue
                if not self._cast:
                    _refuse(tensor, file, f"is {tensor.dtype}, but is to fill {target.dtype}: cast=True converts it")
                if not _converts(dtype, target.dtype):
                    _refuse(tensor, file, f"is {tensor.dtype}, which torch does not convert to {target.dtype}")


def _tensors_of(model: object) -> dict[str, torch.Tensor]:
    import torch

    if isinstance(model, torch.nn.Module):
        return _state_of(model)
    if not isinstance(model, Mapping):
        raise OptionError(f"a {type(model).__name__} cannot be loaded into: give a module, or tensors by their names")
    for name, tensor in model.items():
        if not isinstance(name, str) or not isinstance(tensor, torch.Tensor):
            raise OptionError(f"what is to be filled holds {name!r}: {type(tensor).__name__}, not a tensor by its name")
    return {name: _detached(name, tensor) for name, tensor in model.items()}


def _state_of(module: torch.nn.Module) -> dict[str, torch.Tensor]:
    import torch

    own = {id(tensor) for tensor in (*module.parameters(), *module.buffers())}
    tensors = {}
    # An extra state is no tensor, and no safetensors file holds one.
    for name, value in module.state_dict(keep_vars=True).items():
        if not isinstance(value, torch.Tensor):
            continue
        if id(value) not in own:
            raise OptionError(
                f"the module's state_dict gives {name!r}, which is none of its parameters and buffers: "
                "give the tensors that are to be filled, by their names"
            )
        tensors[name] = _detached(name, value)
    return tensors


def _detached(name: str, tensor: torch.Tensor) -> torch.Tensor:
    """The same memory, without a gradient."""
    from torch.nn.parameter import UninitializedBuffer, UninitializedParameter

    if isinstance(tensor, UninitializedBuffer | UninitializedParameter):
        raise OptionError(f"{name!r} cannot be loaded into: it has no shape before its module was first called")
    return tensor.detach() if tensor.requires_grad else tensor


def _check_fillable(name: str, tensor: Any) -> None:
    """Refuse what has no memory that a copy could fill.

    Raises:
        OptionError: It names the tensor.
    """
    import torch

    problem = None
    if hasattr(tensor, "to_local"):
        problem = "is distributed: give this rank's part, to_local()"
    elif tensor.layout != torch.strided or tensor.is_quantized or tensor.is_nested:
        problem = "is not a dense tensor"
    elif tensor.device.type == "meta":
        problem = "is on the meta device, where it has no memory: model.to_empty(device=...) gives it some"
    elif any(length > 1 and stride == 0 for length, stride in zip(tensor.shape, tensor.stride(), strict=True)):
        problem = "is expanded: several of its elements are one and the same"
    elif not has_memory(tensor):
        problem = "has no memory of its own: it wraps other tensors, or its storage was given back"
    if problem is not None:
        raise OptionError(f"{name!r} cannot be loaded into: it {problem}")


def _only(catalog: Catalog, names: set[str]) -> Catalog:
    files = []
    for file in catalog.files:
        tensors = tuple(tensor for tensor in file.tensors if tensor.name in names)
        if tensors:
            files.append(file if len(tensors) == len(file.tensors) else replace(file, tensors=tensors))
    return Catalog(tuple(files))


def _converts(source: torch.dtype, target: torch.dtype) -> bool:
    import torch

    try:
        torch.empty(1, dtype=target).copy_(torch.empty(1, dtype=source))
    except (RuntimeError, NotImplementedError):
        return False
    return True


def _number(names: list[str], what: str) -> str:
    return f"{len(names)} {what}{'s' if len(names) > 1 else ''}"


def _refuse(tensor: TensorInfo, file: ShardFile, problem: str) -> None:
    raise MismatchError(f"tensor {brief(tensor.name)} {problem}", object=file.key, start=tensor.start, end=tensor.end)
