"""Which part of a tensor a rank owns: said without knowing the rank, in torch's words."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TypeAlias

from streamload.errors import OptionError

__all__ = ["Absent", "Experts", "PackedShard", "Placement", "Ranks", "Replicate", "Shard"]


@dataclass(frozen=True, slots=True)
class Replicate:
    """Every rank has all of the tensor."""


@dataclass(frozen=True, slots=True)
class Absent:
    """This rank has nothing of the tensor."""


@dataclass(frozen=True, slots=True)
class Shard:
    """Each tensor-parallel rank has an equal share of one dimension, in the order of the ranks.

    Attributes:
        dim: The dimension; negative counts from the last one.
        replicas: So many neighbouring ranks have the same share: of key and value heads, where there are more ranks
            than heads.
    """

    dim: int
    replicas: int = 1

    def __post_init__(self) -> None:
        _check_count("replicas", self.replicas)


@dataclass(frozen=True, slots=True)
class PackedShard:
    """Several matrices lie one after another in one dimension; each is shared out by itself.

    A rank's shares lie one after another too: of a fused gate and up projection it has its share of the gate, then its
    share of the up projection.

    Attributes:
        dim: The dimension; negative counts from the last one.
        parts: How large each matrix is along it, in the whole tensor; or how many there are, of equal size.
        replicas: For each part, how many neighbouring ranks have the same share; none given: one each.
    """

    dim: int
    parts: int | tuple[int, ...]
    replicas: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        if not isinstance(self.parts, int):
            object.__setattr__(self, "parts", tuple(self.parts))
        object.__setattr__(self, "replicas", tuple(self.replicas))
        if isinstance(self.parts, int):
            _check_count("parts", self.parts)
            count = self.parts
        else:
            count = len(self.parts)
            if not count or min(self.parts) < 0:
                raise OptionError(f"parts={self.parts} are not the sizes of the matrices")
        for replicas in self.replicas:
            _check_count("replicas", replicas)
        if self.replicas and len(self.replicas) != count:
            raise OptionError(f"replicas={self.replicas} are for {len(self.replicas)} parts, and there are {count}")


@dataclass(frozen=True, slots=True)
class Experts:
    """The first dimension counts experts, and a rank has some of them, whole or in part.

    Attributes:
        owned: Which ones, in the order in which the rank has them; None: an equal share for each expert-parallel rank,
            in the order of the ranks.
        within: How each expert is shared out among the tensor-parallel ranks. Its dimensions are those of the whole
            tensor, the experts' included.
    """

    owned: tuple[int, ...] | None = None
    within: Replicate | Shard | PackedShard = Replicate()

    def __post_init__(self) -> None:
        if self.owned is not None:
            object.__setattr__(self, "owned", tuple(self.owned))
            if len(set(self.owned)) != len(self.owned):
                raise OptionError(f"an expert is owned twice: {list(self.owned)}")


Placement: TypeAlias = Replicate | Shard | PackedShard | Experts | Absent


@dataclass(frozen=True, slots=True)
class Ranks:
    """Which rank this is, in each way in which a model is divided.

    Attributes:
        tp_rank: Among the ranks that share tensors.
        tp_size: How many those are.
        pp_rank: Among the ranks that share layers.
        pp_size: How many those are.
        ep_rank: Among the ranks that share experts.
        ep_size: How many those are.
    """

    tp_rank: int = 0
    tp_size: int = 1
    pp_rank: int = 0
    pp_size: int = 1
    ep_rank: int = 0
    ep_size: int = 1

    def __post_init__(self) -> None:
        for kind in ("tp", "pp", "ep"):
            rank, size = getattr(self, f"{kind}_rank"), getattr(self, f"{kind}_size")
            for name, value in ((f"{kind}_rank", rank), (f"{kind}_size", size)):
                if type(value) is not int:
                    raise OptionError(f"{name}={value!r} is not a whole number")
            if not 0 <= rank < size:
                raise OptionError(f"{kind}_rank={rank} is not one of {size} ranks, which begin at 0")


def _check_count(name: str, value: int) -> None:
    if type(value) is not int or value < 1:
        raise OptionError(f"{name}={value!r} is not a whole number of at least 1")
