"""Settings that are flags, too: beside each field of a dataclass stand its default and what ``--help`` says of it.

    @dataclass(frozen=True)
    class TrainConfig:
        lr: float = setting(3e-4, "learning rate", "training")

The parsers of the scripts take them from there (:func:`flags_of`), and nobody writes a default or a help twice.
"""

import dataclasses
from typing import Any, NamedTuple


class Flag(NamedTuple):
    """A flag of a command line. group: the heading that ``--help`` has it under, if any. type: what its text becomes,
    such as ``int | None``, or what converts it; None for the field's annotation or the type of the default."""

    default: Any
    help: str
    group: str = ""
    type: Any = None


def setting(default: Any, help: str, group: str = "", type: Any = None) -> Any:
    """A field of a dataclass that is a flag."""
    return dataclasses.field(default=default, metadata=flag(default, help, group, type))


def flag(default: Any, help: str, group: str, type: Any = None) -> dict[str, Flag]:
    """The metadata of a field that has a default on the command line alone: code says what it wants."""
    return {"flag": Flag(default, help, group, type)}


def flags_of(*classes: Any) -> dict[str, Flag]:
    """The flags among the fields of dataclasses, by name. Of a name that several have, the first one counts."""
    flags: dict[str, Flag] = {}
    for field in (field for cls in classes for field in dataclasses.fields(cls)):
        if "flag" in field.metadata and field.name not in flags:
            found: Flag = field.metadata["flag"]
            default = found.default if field.default is dataclasses.MISSING else field.default
            flags[field.name] = found._replace(default=default, type=found.type or field.type)
    return flags
