"""What an object hands over to be saved, and how it is read back: facts, which are JSON, and tensors, both by name.

Nothing that is read is believed: whoever asks for a fact or a tensor says what it must be, before it takes memory.
"""

from __future__ import annotations

import math
import reprlib
from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any, Protocol

import torch
from torch import Tensor

from kvprune.errors import CacheError

MOST_TOKENS = 2**31 - 1  # positions are int32
_MOST_NUMBERS = 2**40


@dataclass
class State:
    """facts: what json.dumps takes. tensors: by name, which begins with the names of the parts they are in."""

    facts: dict[str, Any]
    tensors: dict[str, Tensor] = field(default_factory=dict)

    def add(self, name: str, part: State | None) -> None:
        """Take in the state of a part, which may not be there."""
        self.facts[name] = None if part is None else part.facts
        if part is not None:
            self._name(name, part)

    def add_all(self, name: str, parts: Iterable[State]) -> None:
        """Take in the states of several parts, in their order."""
        parts = list(parts)
        self.facts[name] = [part.facts for part in parts]
        for number, part in enumerate(parts):
            self._name(f"{name}.{number}", part)

    def _name(self, name: str, part: State) -> None:
        self.tensors.update({f"{name}.{inner}": tensor for inner, tensor in part.tensors.items()})


class Tensors(Protocol):
    """The tensors of a file."""

    def refused(self, reason: str) -> CacheError:
        """The error to raise for a file that is not what it must be."""

    def described(self, name: str) -> tuple[tuple[int, ...], torch.dtype] | None:
        """Shape and dtype of a tensor, without reading it; None if there is none of this name."""

    def read(self, name: str) -> Tensor:
        """The tensor, on the CPU, in memory that it may not keep."""


@dataclass(frozen=True)
class Saved:
    """A `State` that comes from a file. Every method raises CacheError for what is missing or cannot be.

    facts: of this part. name: what the names of its tensors begin with. device: where they go.
    """

    file: Tensors
    facts: Any
    name: str = ""
    device: torch.device | None = None

    def refused(self, reason: str) -> CacheError:
        return self.file.refused(f"{self.name or 'its header'} {reason}")

    # -- facts -----------------------------------------------------------------------------------------------------

    def fact(self, name: str, *kinds: type) -> Any:
        """A fact that is of one of these types, None among them for one that may be missing."""
        if not isinstance(self.facts, dict) or name not in self.facts:
            raise self.refused(f"does not say its {name}")
        if type(self.facts[name]) not in kinds:  # a bool is no int here
            raise self.refused(f"has {reprlib.repr(self.facts[name])} as its {name}")
        return self.facts[name]

    def flag(self, name: str) -> bool:
        answer: bool = self.fact(name, bool)
        return answer

    def count(self, name: str, most: int = MOST_TOKENS, least: int = 0) -> int:
        """An int from `least` to `most`."""
        return self._counts(name, [self.fact(name, int)], most, least)[0]

    def counts(self, name: str, most: int = MOST_TOKENS, *, length: int | None = None) -> tuple[int, ...]:
        """Ints from 0 to `most`, so many of them."""
        return self._counts(name, self.fact(name, list), most, 0, length)

    def many_counts(
        self, name: str, most: int = MOST_TOKENS, *, length: int | None = None, width: int | None = None
    ) -> tuple[tuple[int, ...], ...]:
        """Tuples of ints from 0 to `most`: `length` tuples, each of `width`."""
        listed = self.fact(name, list)
        if not all(isinstance(each, list) for each in listed) or (length is not None and len(listed) != length):
            raise self.refused(f"has {reprlib.repr(listed)} as its {name}")
        return tuple(self._counts(name, each, most, 0, width) for each in listed)

    def _counts(
        self, name: str, listed: list[Any], most: int, least: int, length: int | None = None
    ) -> tuple[int, ...]:
        right = all(type(count) is int and least <= count <= most for count in listed)
        if not right or (length is not None and len(listed) != length):
            raise self.refused(f"has {reprlib.repr(self.facts[name])} as its {name}")
        return tuple(listed)

    # -- parts -----------------------------------------------------------------------------------------------------

    def part(self, name: str, device: torch.device | None = None) -> Saved | None:
        facts = self.fact(name, dict, type(None))
        return None if facts is None else Saved(self.file, facts, self._full(name), device or self.device)

    def parts(self, name: str, length: int | None = None) -> list[Saved]:
        """Parts in their order, as many as `length` says."""
        listed = self.fact(name, list)
        if not all(isinstance(facts, dict) for facts in listed) or (length is not None and len(listed) != length):
            raise self.refused(f"has {reprlib.repr(listed)} as its {name}")
        return [
            Saved(self.file, facts, self._full(f"{name}.{number}"), self.device) for number, facts in enumerate(listed)
        ]

    # -- tensors ---------------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return self.file.described(self._full(name)) is not None

    def described(self, name: str) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor."""
        found = self.file.described(self._full(name))
        if found is None:
            raise self.refused(f"lacks the tensor {name}")
        return found

    def numbers(self, name: str, *, ndim: int = 4) -> tuple[tuple[int, ...], torch.dtype]:
        """Shape and dtype of a tensor of floats, of so many dimensions."""
        shape, dtype = self.described(name)
        absurd = math.prod(max(size, 1) for size in shape) > _MOST_NUMBERS  # where one is 0, none costs the file a byte
        if len(shape) != ndim or not dtype.is_floating_point or absurd:
            raise self.refused(f"has {name} of shape {list(shape)} in {dtype}")
        return shape, dtype

    def tensor(
        self,
        name: str,
        shape: tuple[int, ...],
        dtype: torch.dtype,
        *,
        spare: int = 0,
        within: tuple[int, int] | None = None,
    ) -> Tensor:
        """A tensor in storage of its own on the device. spare: zeros to add along dimension 2.

        within: least and largest number it may hold.
        """
        found = self.described(name)
        if found != (tuple(shape), dtype):
            raise self.refused(f"has {name} of shape {list(found[0])} in {found[1]}, not {list(shape)} in {dtype}")
        content = self.file.read(self._full(name))
        if within is not None and content.numel():
            least, largest = (int(number) for number in content.aminmax())
            if least < within[0] or largest > within[1]:
                raise self.refused(f"has {name} from {least} to {largest}, not from {within[0]} to {within[1]}")
        try:
            tensor = torch.zeros((*shape[:2], shape[2] + spare, *shape[3:]) if spare else shape,
                                 dtype=dtype, device=self.device)  # fmt: skip
        except RuntimeError as error:
            raise self.refused(f"has {name} of shape {list(shape)}, for which there is no memory ({error})") from None
        (tensor[:, :, : shape[2]] if spare else tensor).copy_(content)
        return tensor

    def _full(self, name: str) -> str:
        return f"{self.name}.{name}" if self.name else name
