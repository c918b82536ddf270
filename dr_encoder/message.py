"""The wire format: one client's quantized code as a safetensors file held in bytes.

Eight bytes of header length, a JSON header, the raw numbers: any safetensors reader opens it, and nothing in it is ever
executed. The header is written here in one canonical form (sorted keys, no spaces, padded to eight bytes), because the
library's own writer orders metadata at random; `unpack` refuses every other spelling of the same content.

Sharp edge: the checksums catch accidents, not malice. A hostile client can build a well-formed message with any numbers
and any client name in it. Its harm is *bounded*, never detected, here: an integer code cannot leave the lattice's
range, and wherever the server clips again no code exceeds the clip. Who sent it is for the transport to authenticate.
"""

import hashlib
import json
import re
import struct
from dataclasses import dataclass

import numpy as np

PROTOCOL = "1"
TENSOR = "code"
_DTYPES = {"int8": "I8", "int16": "I16", "float32": "F32", "float64": "F64"}
_NAME = re.compile(r"[A-Za-z0-9._-]{1,40}")
_COUNT = re.compile(r"0|[1-9][0-9]{0,17}")
_HEADER_ROOM = 640


class MessageError(ValueError):
    """A message that is not accepted; the subclass says why."""


class Truncated(MessageError):
    """Fewer bytes than its own header announces."""


class Oversized(MessageError):
    """More bytes than this round's messages may have, or than its own header announces."""


class Malformed(MessageError):
    """Not the canonical form: keys, spelling, padding or offsets differ from what `pack` writes."""


class WrongVersion(MessageError):
    """Another version of this wire format."""


class WrongRun(MessageError):
    """A message of another run."""


class WrongRound(MessageError):
    """A message of another round, late or replayed."""


class WrongCodec(MessageError):
    """Encoded by another codec than the one this round decodes with."""


class WrongDtype(MessageError):
    """Another number type than agreed."""


class WrongLength(MessageError):
    """Another code length than the codec's."""


class WrongScale(MessageError):
    """Another lattice step than the public one."""


class WrongClient(MessageError):
    """A client number outside the federation."""


class WrongChecksum(MessageError):
    """Body or header differ from what was packed."""


class NotFinite(MessageError):
    """A float code that holds a NaN or an infinity."""


class Duplicate(MessageError):
    """A second message of the same client in the same round."""


@dataclass(frozen=True, kw_only=True)
class Header:
    """What a client states about its code.

    Args:
        run, codec: names of 1 to 40 letters, digits, dots, dashes or underscores; `codec` is the codec's fingerprint.
        round, client: whole numbers >= 0.
        scale: lattice step > 0, public and the same for every client (`quantize.levels`).
    """

    run: str
    round: int
    client: int
    codec: str
    scale: float
    protocol: str = PROTOCOL


@dataclass(frozen=True, kw_only=True)
class Expected:
    """What the server accepts in one round.

    Args:
        dtype: "int8", "int16", "float32" or "float64".
        clients: size of the federation; client numbers must be below it. None allows any.
        max_bytes: upper limit of a whole message; None means the body and 640 bytes of header.
    """

    run: str
    round: int
    codec: str
    code_size: int
    dtype: str
    scale: float
    clients: int | None = None
    max_bytes: int | None = None
    protocol: str = PROTOCOL

    @property
    def body_bytes(self) -> int:
        return self.code_size * np.dtype(self.dtype).itemsize

    @property
    def byte_limit(self) -> int:
        return self.body_bytes + _HEADER_ROOM if self.max_bytes is None else self.max_bytes


def pack(header: Header, code: np.ndarray) -> bytes:
    """One client's message.

    Args:
        code: one quantized code [k] of type int8, int16, float32 or float64, finite.
    Raises:
        ValueError: for a header or a code that no server would accept.
    """
    code = np.ascontiguousarray(code)
    _require(code.ndim == 1 and code.size > 0, f"code has shape {list(code.shape)}, one code [k] is wanted")
    _require(code.dtype.name in _DTYPES, f"code is {code.dtype.name}, expected one of {', '.join(_DTYPES)}")
    _require(bool(np.isfinite(code).all()), "code holds NaN or infinity")
    for key in ("run", "codec", "protocol"):
        value = getattr(header, key)
        _require(_NAME.fullmatch(value) is not None, f"{key}={value!r}, expected 1 to 40 of A-Z a-z 0-9 . _ -")
    for key in ("round", "client"):
        value = getattr(header, key)
        _require(_COUNT.fullmatch(str(value)) is not None, f"{key}={value!r}, expected a whole number >= 0")
    _require(0 < header.scale < float("inf"), f"scale={header.scale!r}, expected a finite number > 0")

    body = code.astype(code.dtype.newbyteorder("<"), copy=False).tobytes()
    fields = {key: str(getattr(header, key)) for key in ("protocol", "run", "round", "client", "codec")}
    fields["scale"] = repr(float(header.scale))
    fields["sha256"] = hashlib.sha256(body).hexdigest()
    return _canonical_header(fields, _DTYPES[code.dtype.name], code.size, len(body)) + body


def unpack(message: bytes, expected: Expected) -> tuple[int, np.ndarray]:
    """The client and its code [k], if the message is exactly what this round expects.

    Raises:
        MessageError: one subclass for each reason; nothing else, whatever the bytes.
    """
    text, body = _split(message, expected)
    fields, tensor = _parse(text)
    client = _check_fields(fields, expected)
    _check_tensor(tensor, expected)
    if len(body) != expected.body_bytes:
        kind = Truncated if len(body) < expected.body_bytes else Oversized
        raise kind(f"body has {len(body)} bytes, expected {expected.body_bytes}")
    if hashlib.sha256(body).hexdigest() != fields["sha256"]:
        raise WrongChecksum("the body does not match its sha256")
    check = fields.pop("check")
    if check != _check_of(fields, tensor):
        raise WrongChecksum("the header does not match its check")
    canonical = _canonical_header(fields, _DTYPES[expected.dtype], expected.code_size, len(body))
    if message[: len(message) - len(body)] != canonical:
        raise Malformed("the header is not in canonical form")
    code = np.frombuffer(body, np.dtype(expected.dtype).newbyteorder("<")).astype(expected.dtype)
    if not np.isfinite(code).all():
        raise NotFinite("the code holds NaN or infinity")
    return client, code


class Inbox:
    """One round's messages as they arrive: each client counts once, the first message wins."""

    def __init__(self, expected: Expected) -> None:
        self.expected = expected
        self._seen: set[int] = set()

    def accept(self, message: bytes) -> tuple[int, np.ndarray]:
        """The client and its code [k]; raises MessageError, `Duplicate` among them."""
        client, code = unpack(message, self.expected)
        if client in self._seen:
            raise Duplicate(f"client {client} has already sent its message of this round")
        self._seen.add(client)
        return client, code


def _split(message: bytes, expected: Expected) -> tuple[bytes, bytes]:
    if len(message) > expected.byte_limit:
        raise Oversized(f"{len(message)} bytes, at most {expected.byte_limit} are accepted")
    if len(message) < 8:
        raise Truncated(f"{len(message)} bytes, a message starts with 8 bytes of header length")
    end = 8 + struct.unpack("<Q", message[:8])[0]
    if end > len(message):
        raise Truncated(f"the header ends at byte {end}, the message at {len(message)}")
    return message[8:end], message[end:]


def _parse(text: bytes) -> tuple[dict[str, str], dict]:
    """Metadata and tensor entry of a safetensors header with exactly our keys."""
    try:
        header = json.loads(text.decode("ascii"))
        fields, tensor = header["__metadata__"], header[TENSOR]
        sound = set(header) == {"__metadata__", TENSOR} and isinstance(fields, dict) and isinstance(tensor, dict)
        sound = sound and set(fields) == {"protocol", "run", "round", "client", "codec", "scale", "sha256", "check"}
        sound = sound and all(isinstance(value, str) for value in fields.values())
        sound = sound and set(tensor) == {"dtype", "shape", "data_offsets"}
    except (ValueError, KeyError, TypeError, RecursionError) as error:
        raise Malformed(f"unreadable header ({type(error).__name__})") from None
    if not sound:
        raise Malformed("the header's keys differ from protocol " + PROTOCOL)
    return fields, tensor


def _check_fields(fields: dict[str, str], expected: Expected) -> int:
    wanted = (
        ("protocol", expected.protocol, WrongVersion),
        ("run", expected.run, WrongRun),
        ("round", str(expected.round), WrongRound),
        ("codec", expected.codec, WrongCodec),
        ("scale", repr(float(expected.scale)), WrongScale),
    )
    for key, value, refusal in wanted:
        if fields[key] != value:
            raise refusal(f"{key} is {fields[key][:40]!r}, expected {value!r}")
    if not _COUNT.fullmatch(fields["client"]):
        raise Malformed(f"client is {fields['client'][:40]!r}, expected a whole number")
    client = int(fields["client"])
    if expected.clients is not None and client >= expected.clients:
        raise WrongClient(f"client {client}, expected a number below {expected.clients}")
    return client


def _check_tensor(tensor: dict, expected: Expected) -> None:
    if tensor["dtype"] != _DTYPES[expected.dtype]:
        raise WrongDtype(f"dtype is {str(tensor['dtype'])[:10]!r}, expected {_DTYPES[expected.dtype]!r}")
    if tensor["shape"] != [expected.code_size]:
        raise WrongLength(f"shape is {str(tensor['shape'])[:40]}, expected [{expected.code_size}]")
    if tensor["data_offsets"] != [0, expected.body_bytes]:
        raise Malformed(f"data_offsets are {str(tensor['data_offsets'])[:40]}, expected [0, {expected.body_bytes}]")


def _check_of(fields: dict[str, str], tensor: dict) -> str:
    """Guards the header as `sha256` guards the body (16 hex digits: against accidents, see the module's docstring)."""
    return hashlib.sha256(_json({"__metadata__": fields, TENSOR: tensor})).hexdigest()[:16]


def _canonical_header(fields: dict[str, str], dtype: str, length: int, body_bytes: int) -> bytes:
    tensor = {"dtype": dtype, "shape": [length], "data_offsets": [0, body_bytes]}
    text = _json({"__metadata__": {**fields, "check": _check_of(fields, tensor)}, TENSOR: tensor})
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _json(value: dict) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)
