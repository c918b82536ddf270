"""The wire format: what is packed comes back, and nothing else gets in."""

import dataclasses
import hashlib
import json
import struct

import numpy as np
import pytest
import safetensors
import safetensors.numpy

from dr_encoder import message as wire

EXPECTED = wire.Expected(run="quickstart-1", round=3, codec="0123456789abcdef", code_size=128, dtype="int16", scale=0.1 / 3, clients=2000)
CODE = np.random.default_rng(0).integers(-32767, 32768, 128).astype(np.int16)


def header(**changes) -> wire.Header:
    fields = {"run": "quickstart-1", "round": 3, "client": 17, "codec": "0123456789abcdef", "scale": 0.1 / 3}
    return wire.Header(**{**fields, **changes})


def dumped(content: object) -> bytes:
    return json.dumps(content, sort_keys=True, separators=(",", ":")).encode()


def framed(content: object, body: bytes) -> bytes:
    text = dumped(content)
    text += b" " * (-len(text) % 8)
    return struct.pack("<Q", len(text)) + text + body


def parts(packed: bytes) -> tuple[dict, bytes]:
    end = 8 + struct.unpack("<Q", packed[:8])[0]
    return json.loads(packed[8:end]), packed[end:]


def edited(key: str, value: object) -> bytes:
    """The valid message with one metadata value replaced and nothing else put right."""
    content, body = parts(wire.pack(header(), CODE))
    content["__metadata__"][key] = value
    return framed(content, body)


def forged(packed: bytes, body: bytes, **changes: str) -> bytes:
    """What a hostile client can build: any body and metadata, with both checksums put right."""
    content, _ = parts(packed)
    fields = content["__metadata__"]
    fields.update(changes, sha256=hashlib.sha256(body).hexdigest())
    del fields["check"]
    fields["check"] = hashlib.sha256(dumped(content)).hexdigest()[:16]
    return framed(content, body)


@pytest.mark.parametrize("dtype", ["int8", "int16", "float32", "float64"])
def test_what_is_packed_comes_back(dtype):
    code = np.arange(-64, 64).astype(dtype)
    client, back = wire.unpack(wire.pack(header(), code), dataclasses.replace(EXPECTED, dtype=dtype))
    assert client == 17
    assert back.dtype == code.dtype
    np.testing.assert_array_equal(back, code)


def test_any_safetensors_reader_opens_it(tmp_path):
    path = tmp_path / "message.safetensors"
    path.write_bytes(wire.pack(header(), CODE))
    np.testing.assert_array_equal(safetensors.numpy.load(path.read_bytes())["code"], CODE)
    with safetensors.safe_open(path, "np") as reader:
        metadata = reader.metadata()
    assert {"protocol", "run", "round", "client", "codec", "scale", "sha256"} <= set(metadata)
    assert metadata["sha256"] == hashlib.sha256(CODE.tobytes()).hexdigest()
    assert float(metadata["scale"]) == EXPECTED.scale


def test_whole_message_of_a_256_byte_body_is_small():
    name = "n" * 40
    longest = header(run=name, codec=name, client=10**17, round=10**6, scale=1.2345678901234567e-17)
    assert CODE.nbytes == 256
    assert len(wire.pack(header(), CODE)) <= 640
    assert len(wire.pack(longest, CODE)) <= 700
    assert len(wire.pack(longest, CODE)) <= EXPECTED.byte_limit


@pytest.mark.parametrize(
    ("change", "refusal"),
    [
        ({"protocol": "2"}, wire.WrongVersion),
        ({"run": "other"}, wire.WrongRun),
        ({"round": 2}, wire.WrongRound),
        ({"codec": "fedcba9876543210"}, wire.WrongCodec),
        ({"scale": 0.5}, wire.WrongScale),
        ({"client": 2000}, wire.WrongClient),
    ],
)
def test_each_wrong_header_has_its_own_refusal(change, refusal):
    with pytest.raises(refusal):
        wire.unpack(wire.pack(header(**change), CODE), EXPECTED)


def test_wrong_bodies_have_their_own_refusal():
    packed = wire.pack(header(), CODE)
    for damaged, refusal in [
        (wire.pack(header(), CODE[:127]), wire.WrongLength),
        (wire.pack(header(), CODE.astype(np.float32)), wire.WrongDtype),
        (packed[:-1], wire.Truncated),
        (packed[:100], wire.Truncated),
        (b"", wire.Truncated),
        (packed + b"\0", wire.Oversized),
        (packed + bytes(10_000), wire.Oversized),
        (packed[:-1] + bytes([packed[-1] ^ 1]), wire.WrongChecksum),
        (edited("client", "18"), wire.WrongChecksum),
        (edited("client", "+17"), wire.Malformed),
        (edited("client", 17), wire.Malformed),
        (edited("extra", "1"), wire.Malformed),
        (struct.pack("<Q", 20_000_000) + packed[8:], wire.Truncated),
        (struct.pack("<Q", 600) + b"[" * 600 + bytes(256), wire.Malformed),
    ]:
        with pytest.raises(refusal):
            wire.unpack(damaged, EXPECTED)


def test_a_float_code_that_is_not_finite_is_refused():
    code = np.ones(128, np.float32)
    packed = wire.pack(header(), code)
    assert forged(packed, code.tobytes()) == packed
    code[5] = np.nan
    with pytest.raises(ValueError, match="NaN"):
        wire.pack(header(), code)
    with pytest.raises(wire.NotFinite):
        wire.unpack(forged(packed, code.tobytes()), dataclasses.replace(EXPECTED, dtype="float32"))


def test_checksums_do_not_stop_a_forger():
    """The documented limit: a well-formed lie is accepted. If this changes, the module's docstring must too."""
    lie = np.full(128, 32767, np.int16)
    client, code = wire.unpack(forged(wire.pack(header(), CODE), lie.tobytes(), client="18"), EXPECTED)
    assert client == 18
    np.testing.assert_array_equal(code, lie)


@pytest.mark.parametrize(
    "content",
    [
        [],
        {},
        {"__metadata__": list(parts(wire.pack(header(), CODE))[0]["__metadata__"]), "code": {}},
        {**parts(wire.pack(header(), CODE))[0], "code": ["dtype", "shape", "data_offsets"]},
        {**parts(wire.pack(header(), CODE))[0], "code": {"dtype": "I16", "shape": [128], "data_offsets": [[], {}]}},
        {**parts(wire.pack(header(), CODE))[0], "more": {"dtype": "I16", "shape": [0], "data_offsets": [0, 0]}},
    ],
)
def test_json_of_another_shape_is_malformed(content):
    with pytest.raises(wire.Malformed):
        wire.unpack(framed(content, CODE.tobytes()), EXPECTED)


def test_a_header_in_another_spelling_is_refused():
    """Same content, valid safetensors, another byte order of keys: only one spelling is accepted."""
    packed = wire.pack(header(), CODE)
    content, body = parts(packed)
    text = packed[8 : -len(body)]
    respelled = json.dumps(dict(reversed(content.items())), separators=(",", ":")).encode().ljust(len(text))
    assert sorted(respelled) == sorted(text)
    with pytest.raises(wire.Malformed):
        wire.unpack(packed[:8] + respelled + body, EXPECTED)


def test_inbox_counts_each_client_once():
    inbox = wire.Inbox(EXPECTED)
    inbox.accept(wire.pack(header(), CODE))
    with pytest.raises(wire.Duplicate):
        inbox.accept(wire.pack(header(), np.zeros(128, np.int16)))
    assert inbox.accept(wire.pack(header(client=18), CODE))[0] == 18


def test_a_refused_message_does_not_use_up_the_clients_turn():
    inbox = wire.Inbox(EXPECTED)
    packed = wire.pack(header(), CODE)
    with pytest.raises(wire.MessageError):
        inbox.accept(packed[:-1])
    assert inbox.accept(packed)[0] == 17


@pytest.mark.parametrize("change", [{"run": 'a"b'}, {"run": ""}, {"round": -1}, {"client": 1.5}, {"scale": 0.0}, {"scale": float("nan")}])
def test_no_message_is_packed_that_no_server_accepts(change):
    with pytest.raises(ValueError):
        wire.pack(header(**change), CODE)


def mutate(packed: bytes, rng: np.random.Generator) -> bytes:
    """One random damage: bits flipped, bytes cut, inserted, replaced or swapped, or a header character changed."""
    data = bytearray(packed)
    header_end = 8 + struct.unpack("<Q", packed[:8])[0]
    at = int(rng.integers(len(data)))
    match int(rng.integers(7)):
        case 0:
            for place in rng.integers(8 * len(data), size=rng.integers(1, 4)):
                data[place // 8] ^= 1 << (place % 8)
        case 1:
            del data[at:]
        case 2:
            del data[at : at + int(rng.integers(1, 9))]
        case 3:
            data[at:at] = rng.bytes(int(rng.integers(1, 9)))
        case 4:
            data[int(rng.integers(header_end))] = int(rng.choice(list(b'0123456789abcdef"{}[],: \t')))
        case 5:
            data[at : at + 8] = rng.bytes(8)
        case 6:
            other = int(rng.integers(len(data)))
            data[at], data[other] = data[other], data[at]
    return bytes(data)


def test_no_mutation_of_a_valid_message_is_accepted():
    rng = np.random.default_rng(7)
    packed = wire.pack(header(), CODE)
    wire.unpack(packed, EXPECTED)
    refusals = set()
    tried = 0
    while tried < 10_000:
        damaged = mutate(packed, rng)
        if damaged == packed:
            continue
        tried += 1
        with pytest.raises(wire.MessageError) as refusal:
            wire.unpack(damaged, EXPECTED)
        refusals.add(refusal.type)
    assert len(refusals) >= 8


def test_every_single_bit_matters():
    packed = wire.pack(header(), CODE)
    for place in range(8 * len(packed)):
        damaged = bytearray(packed)
        damaged[place // 8] ^= 1 << (place % 8)
        with pytest.raises(wire.MessageError):
            wire.unpack(bytes(damaged), EXPECTED)
