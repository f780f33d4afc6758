"""Registers the method in PEFT, whose methods are the members of a closed enum.

``register_peft_method`` accepts a third-party method only if ``PeftType`` has a member of its name,
and PEFT has no entry points. So a member is added to the enum here, and every way of looking it up
is verified: a PEFT that works differently raises on import instead of failing later.
"""

from __future__ import annotations

import enum
from typing import Any

import peft
from peft.utils import register_peft_method
from peft.utils.peft_types import PeftType

NAME = "neuroada"
PREFIX = "neuroada_"


def add_member(kind: type[enum.Enum], name: str) -> None:
    """Add the member ``name``, with the value ``name``, to ``kind``, an enum of strings.

    Raises
    ------
    TypeError
        If ``kind`` is no such enum, or if a way of looking up members misses the new one.
    """
    if not (isinstance(kind, enum.EnumMeta) and issubclass(kind, str)):
        raise TypeError(f"{kind.__name__}: expected an enum of strings")
    if name in kind.__members__:
        raise TypeError(f"{kind.__name__}: has {name} already")
    internal: Any = kind
    member = str.__new__(internal, name)
    member._name_ = member._value_ = name
    member.__objclass__ = kind
    member._sort_order_ = len(kind)
    type.__setattr__(kind, name, member)
    internal._member_names_.append(name)
    internal._member_map_[name] = member
    internal._value2member_map_[name] = member
    if hasattr(kind, "_hashable_values_"):  # Python 3.13
        internal._hashable_values_.append(name)
    found = [internal(name), internal[name], getattr(kind, name), *list(kind)[-1:]]
    if any(one is not member for one in found) or member not in kind:
        raise TypeError(f"{kind.__name__}: has another form than enums of Python 3.10 to 3.13")


def register(config: type, model: type) -> None:
    """Make ``neuroada`` a method of PEFT.

    Raises
    ------
    ImportError
        If this PEFT cannot be extended, or already has a method of that name.
    """
    try:
        add_member(PeftType, NAME.upper())
        register_peft_method(name=NAME, config_cls=config, model_cls=model, prefix=PREFIX)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ImportError(
            f"peft {peft.__version__} takes no method {NAME!r} the way that peft 0.21 does: {error}"
        ) from error
