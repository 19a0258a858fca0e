"""Arguments of public functions are of the kind that their annotations say, or an error names them.

`@checked` stands above what is called a few times: constructors, `plan`, converters, pictures. What runs at each step
of a training looks at its arguments itself.
"""

from __future__ import annotations

import types
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from functools import wraps
from inspect import Parameter, signature
from numbers import Real
from operator import index
from typing import Any, Literal, NamedTuple, SupportsIndex, TypeVar, Union, get_args, get_origin, get_type_hints

import numpy as np
import torch

Function = TypeVar("Function", bound=Callable[..., Any])


class Kind(NamedTuple):
    """What an argument may be, as an error says it; and the argument as the function takes it, or TypeError."""

    name: str
    take: Callable[[Any], Any]


def checked(function: Function) -> Function:
    """The function, which raises TypeError for an argument that is not of its annotated type.

    NumPy's integers and bools, and integer tensors of one element, are taken as Python's. Of containers, what they hold
    is left to the function.
    """
    parameters = signature(function).parameters
    kinds: dict[str, list[Kind]] = {}

    @wraps(function)
    def with_checked_arguments(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():  # a program has no place for looks at annotations
            return function(*args, **kwargs)
        if not kinds:
            kinds.update(kinds_of(function))
        given = [take(name, value, kinds.get(name, [])) for name, value in zip(parameters, args, strict=False)]
        given += args[len(given) :]
        return function(*given, **{name: take(name, value, kinds.get(name, [])) for name, value in kwargs.items()})

    return with_checked_arguments  # type: ignore[return-value]


def check_fields(instance: Any) -> None:
    """The same for the fields of a dataclass that is being made, as the first thing in its `__post_init__`."""
    for name, kinds in kinds_of(type(instance)).items():
        if kinds:
            object.__setattr__(instance, name, take(name, getattr(instance, name), kinds))


def kinds_of(function: Callable[..., Any] | type) -> dict[str, list[Kind]]:
    """What each annotated argument of a function, or field of a dataclass, may be; no kinds are all kinds."""
    if isinstance(function, type):
        return {name: _kinds(hint) for name, hint in get_type_hints(function).items()}
    single = (Parameter.POSITIONAL_OR_KEYWORD, Parameter.KEYWORD_ONLY, Parameter.POSITIONAL_ONLY)
    parameters = {
        name: each
        for name, each in signature(function).parameters.items()
        if each.kind in single and each.annotation is not each.empty
    }
    return {name: _kinds(_evaluated(each.annotation, function)) for name, each in parameters.items()}


def _evaluated(annotation: Any, function: Callable[..., Any]) -> Any:
    """An annotation of the library's own source as an object; Any where it names what only a type checker imports."""
    try:
        return eval(annotation, function.__globals__) if isinstance(annotation, str) else annotation
    except NameError:
        return Any


def take(name: str, value: Any, kinds: Sequence[Kind]) -> Any:
    """The argument as the first of the kinds that it is of; TypeError if it is of none, ValueError for no choice."""
    for kind in kinds:
        try:
            return kind.take(value)
        except TypeError:
            continue
        except OverflowError:
            raise ValueError(f"{name} must be below 2**63 in size (got {shown(value)})") from None
    if not kinds:
        return value
    *others, last = dict.fromkeys(kind.name for kind in kinds)
    wanted = f"{', '.join(others)} or {last}" if others else last
    a_choice = isinstance(value, str) and any(kind.name.startswith((CHOICE, DEVICE)) for kind in kinds)
    raise (ValueError if a_choice else TypeError)(f"{name} must be {wanted} (got {shown(value)})")


def shown(value: object) -> str:
    """A value in an error: as it is written if that is short, else its type."""
    if isinstance(value, type):
        return f"the class {value.__name__}"
    written = repr(value) if isinstance(value, str | Real | complex | None | torch.dtype) else ""
    return written if 0 < len(written) <= 60 else f"a {type(value).__name__}"


# ------------------------------------------------------------------------------------------------ what there is


def _instance(name: str, of: type | tuple[type, ...], but: type | tuple[type, ...] = ()) -> Kind:
    """Whatever is an instance of these classes, as it is."""

    def take(value: Any) -> Any:
        if isinstance(value, of) and not isinstance(value, but):
            return value
        raise TypeError

    return Kind(name, take)


def _integer(value: Any) -> int:
    if isinstance(value, bool | np.bool_) or not isinstance(value, SupportsIndex):
        raise TypeError
    try:
        number = index(value)
    except RuntimeError:  # a tensor of several
        raise TypeError from None
    if not -(2**63) <= number < 2**63:
        raise OverflowError
    return number


def _number(value: Any) -> Any:
    if isinstance(value, bool | np.bool_) or not isinstance(value, Real):
        raise TypeError
    float(value)  # OverflowError for what is too large
    return value


def _boolean(value: Any) -> bool:
    if not isinstance(value, bool | np.bool_):
        raise TypeError
    return bool(value)


def _device(value: Any) -> torch.device:
    if not isinstance(value, torch.device | str):
        raise TypeError
    try:
        return torch.device(value)
    except RuntimeError:
        raise TypeError from None


CHOICE, DEVICE = "one of", "a device that torch knows, such as 'cpu' or 'cuda'"


def _one_of(values: tuple[Any, ...]) -> Kind:
    def take(value: Any) -> Any:
        if any(type(value) is type(each) and value == each for each in values):
            return value
        raise TypeError

    return Kind(f"{CHOICE} {', '.join(map(repr, values))}", take)


SIMPLE = {
    int: Kind("an int", _integer),
    float: Kind("a number", _number),
    bool: Kind("True or False", _boolean),
    str: _instance("a string", str),
    type(None): _instance("None", type(None)),
    torch.dtype: _instance("a torch.dtype", torch.dtype),
    torch.device: _instance("a torch.device", torch.device),
    torch.Tensor: _instance("a tensor", torch.Tensor),
    Mapping: _instance("a mapping", Mapping),
    dict: _instance("a dict", dict),
    Callable: _instance("a function", Callable),  # type: ignore[arg-type]
}
LISTS = (tuple, list, Sequence, Collection, Iterable)


def _kinds(hint: Any) -> list[Kind]:
    """What an annotation allows; nothing where it can't be told."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType):
        if torch.device in get_args(hint) and str in get_args(hint):
            rest = [_kinds(part) for part in get_args(hint) if part not in (torch.device, str)]
            return [Kind(DEVICE, _device), *(k for each in rest for k in each)]
        parts = [_kinds(part) for part in get_args(hint)]
        return [kind for part in parts for kind in part] if all(parts) else []
    if origin is Literal:
        return [_one_of(get_args(hint))]
    plain = origin or hint
    if plain in SIMPLE:
        return [SIMPLE[plain]]
    if plain in LISTS:
        no_list = () if plain is Iterable else (str, torch.Tensor, np.ndarray)
        return [_instance("a list", (list, tuple) if plain in (tuple, list) else plain, no_list)]
    if isinstance(plain, type) and plain.__module__ != "typing" and not getattr(plain, "_is_protocol", False):
        article = "an" if plain.__name__[0] in "AEIOU" else "a"
        return [_instance(f"{article} {plain.__name__}", plain)]
    return []
