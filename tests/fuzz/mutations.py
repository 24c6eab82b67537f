"""Valid content -> content that a hostile or broken file could hold, by the draws of a `Random`."""

import copy
import json
import struct
from collections.abc import Callable
from random import Random
from typing import Any

import numpy as np

Mutation = Callable[[Random, bytes], bytes]
"""Draws, and the bytes of a valid file -> the bytes of another."""

RAW = (
    "[" * 100_000 + "]" * 100_000, '{"a":' * 100_000 + "1" + "}" * 100_000, "9" * 5000, "1e999",
    "-0", "1e3", "01", "NaN", "Infinity", "-Infinity", "tru", '"\\ud800"', '"\\u0000"', "1.",
)  # fmt: skip
"""Texts of JSON values that `json.dumps` does not write."""

ODD: tuple[Any, ...] = (
    None, True, False, 0, 1, 2, -1, 7, 2**31, 2**32 - 1, 2**62, 2**63, 2**64, 10**12, 10**30,
    0.5, -1.5, 1e308, -1e308, 5e-324, "", "x", "1", "q", "../x", "/etc/passwd", "~", "\x1b[2J\x07",
    "a\u2028b\x85", "x" * 70_000, [], {}, [[]], [1, 2, 3], [None], {"a": 1}, [-1, -1], [[[[1]]]],
)  # fmt: skip

INTEGERS = (0, 1, 2, 3, 7, 255, 2**15, 2**16, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**62, 2**63)


def flipped(rng: Random, data: bytes) -> bytes:
    """One to four changes that know nothing of the format."""
    out = bytearray(data)
    for _ in range(rng.choice((1, 1, 1, 2, 4))):
        at, size = rng.randrange(len(out) + 1), rng.choice((1, 1, 2, 4, 8, 64))
        match rng.randrange(9):
            case 0 | 1 | 2 if at < len(out):
                out[at] ^= 1 << rng.randrange(8)
            case 3:
                out[at : at + size] = rng.randbytes(size)
            case 4:
                width = rng.choice("HIQ")
                limit = 256 ** struct.calcsize(width)
                number = struct.pack(f"<{width}", rng.choice(INTEGERS) % limit)
                out[at : at + len(number)] = number
            case 5:
                del out[at : at + size]
            case 6:
                out[at:at] = rng.choice((bytes(size), rng.randbytes(size), out[at : at + size]))
            case 7:
                del out[at:]
            case _:
                out += rng.choice((bytes(size), rng.randbytes(size), b"\n", data[: size * 8]))
    return bytes(out)


def as_json(rng: Random, data: bytes) -> bytes:
    """One to three changes of the values of a JSON text, or of the text itself."""
    if rng.random() < 0.2:
        return flipped(rng, data)
    content, raw = json.loads(data), []
    for _ in range(rng.choice((1, 1, 2, 3))):
        content = _changed(rng, content, raw)
    text = json.dumps(content, ensure_ascii=rng.random() < 0.5)
    for number, odd in enumerate(raw):
        text = text.replace(f'"raw {number}"', odd)
    return _spelled(rng, text)


def json_lines(rng: Random, data: bytes) -> bytes:
    """Changes of one line of JSON lines, or of what is between them."""
    lines = data.splitlines()
    at = rng.randrange(len(lines))
    match rng.randrange(8):
        case 0:
            return flipped(rng, data)
        case 1:
            lines.insert(at, rng.choice((b"", b" ", b"null", b"[]", b"\xe2\x80\xa8", b"{")))
        case 2:
            del lines[at:]
        case _:
            lines[at] = as_json(rng, lines[at])
    return rng.choice((b"\n", b"\n", b"\n", b"\r\n", b"\n\n")).join(lines) + b"\n"


def odd_array(rng: Random, array: np.ndarray) -> np.ndarray:
    """Of another type, shape or value; of the original's numbers else."""
    match rng.randrange(4):
        case 0:
            return array.astype(rng.choice(("f2", "f4", "f8", "i4", "i8", "u1", "?")))
        case 1:
            return np.resize(
                array, rng.choice(((2, 3), (0,), (1, 1, 1), array.shape[::-1], (4, 1)))
            )
        case 2:
            return np.ascontiguousarray(array[::-1] if rng.random() < 0.5 else array[:-1])
    changed = array.copy()
    odd = (-1, 0, 1, 7, 100, -0.5) + (np.nan, np.inf, -np.inf, 1e308) * (array.dtype.kind == "f")
    with np.errstate(all="ignore"):
        changed.flat[rng.randrange(changed.size)] = np.array(rng.choice(odd)).astype(array.dtype)
    return changed


def _changed(rng: Random, content: Any, raw: list[str]) -> Any:
    """A copy in which one value, name or item is another. raw: gains texts for `"raw N"`."""
    content = copy.deepcopy(content)
    places = list(_places(content))
    if not places or rng.random() < 0.05:
        return _odd(rng, content, raw)
    parent, key = rng.choice(places)
    value = parent[key]
    match rng.randrange(8):
        case 0:
            del parent[key]
        case 1 if isinstance(parent, dict):
            parent[f"{key}{rng.choice(('', ' ', 'x'))}"] = parent.pop(key)
        case 1:
            parent.insert(key, copy.deepcopy(value))
        case 2:
            other, place = rng.choice(places)
            parent[key] = copy.deepcopy(other[place])
        case 3 if isinstance(parent, dict):
            raw.append(f"{json.dumps(value)}, {json.dumps(key)}: {json.dumps(_odd(rng, 0, raw))}")
            parent[key] = f"raw {len(raw) - 1}"
        case 4:
            parent[key] = rng.choice(([value], {"a": value}, str(value), repr(value)))
        case 5 if isinstance(value, int | float):
            near = (value + 1, value - 1, -value, value * 2, value / 2, float(value))
            parent[key] = rng.choice(near)
        case _:
            parent[key] = _odd(rng, value, raw)
    return content


def _odd(rng: Random, value: Any, raw: list[str]) -> Any:
    if rng.random() < 0.3:
        raw.append(rng.choice(RAW))
        return f"raw {len(raw) - 1}"
    return rng.choice(ODD)


def _places(content: Any) -> Any:
    """Container and key of every value inside a value."""
    if not isinstance(content, dict | list):
        return
    for key in list(content) if isinstance(content, dict) else range(len(content)):
        yield content, key
        yield from _places(content[key])


def _spelled(rng: Random, text: str) -> bytes:
    """The text as bytes, in one case of eight as no writer of ours spells them."""
    data = text.encode("utf-8", "surrogatepass")
    match rng.randrange(40):
        case 0:
            return b"\xef\xbb\xbf" + data
        case 1:
            return text.encode("utf-16", "surrogatepass")
        case 2:
            return data[: rng.randrange(len(data))]
        case 3:
            return data + rng.choice((b"}", b"\0", b" ", b"{}", b"\n", b"\xff"))
        case 4:
            return b" \t" + data
    return data
