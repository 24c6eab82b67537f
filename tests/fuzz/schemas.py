"""What a JSON file has to be, said once more and strictly: readers are judged by it."""

import json
from pathlib import Path
from typing import Any


def conform(path: Path, schema: Any, *, more: bool = False) -> Any:
    """The content of a JSON file of a schema. Raises ValueError for what is none.

    schema: as for `check`. more: whether the file may name more than the schema.
    """
    return check(json.loads(path.read_bytes().decode()), schema, more=more)


def check(value: Any, schema: Any, *, more: bool = False) -> Any:
    """The value, if it is of a schema: a type, a tuple of choices, [of items] or {name: schema}.

    {type: schema} is an object of any names. float takes integers; a truth value is no number.
    """
    if isinstance(schema, dict):
        _is(value, dict)
        if schema.keys() == {str}:
            return {key: check(item, schema[str]) for key, item in value.items()}
        if not schema.keys() <= value.keys() or (not more and value.keys() - schema.keys()):
            raise ValueError(f"other names than {list(schema)}")
        return value | {key: check(value[key], inner) for key, inner in schema.items()}
    if isinstance(schema, list):
        return [check(item, schema[0]) for item in _is(value, list)]
    if isinstance(schema, tuple):
        for choice in schema:
            try:
                return check(value, choice)
            except ValueError:
                continue
        raise ValueError(f"{value!r} is none of {schema}")
    if schema is None:
        return _is(value, type(None))
    if schema is float and type(value) is int:
        return float(value)
    return value if schema is Any else _is(value, schema)


def _is(value: Any, kind: type) -> Any:
    if type(value) is not kind:
        raise ValueError(f"{value!r} is no {kind.__name__}")
    return value
