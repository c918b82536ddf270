"""Code <-> integer lattice: a public step, stochastic rounding, saturation.

After noise this is post-processing and costs no privacy. Before noise (a trusted server adds it) rounding can lengthen
a code, so the server clips the dequantized code again.
"""

import math

import numpy as np

_DTYPES = {8: "int8", 16: "int16", 32: "float32", 64: "float64"}
_TAIL = 6.0  # noise beyond this many standard deviations saturates: about 2e-9 of the coordinates


def dtype_of(bits: int) -> str:
    """The number type of a code on the wire: 8 -> "int8", 16 -> "int16", 32 -> "float32", 64 -> "float64" (not quantized)."""
    if bits not in _DTYPES:
        raise ValueError(f"Expected bits={bits} in {sorted(_DTYPES)}")
    return _DTYPES[bits]


def levels(clip: float, share_std: float, bits: int) -> float:
    """The lattice's step: the smallest that lets clip + 6 share_std through unsaturated.

    Public: a function of the privacy parameters alone, the same for every client.

    Args:
        clip: clip norm C > 0 of a code; one coordinate alone may reach it.
        share_std: standard deviation >= 0 of the noise on one message.
        bits: 8, 16, or 32 and 64 for codes of floating point, whose step is 1.
    Raises:
        ValueError: for arguments out of range.
    """
    if not 0 < clip < math.inf:
        raise ValueError(f"Expected clip={clip} > 0 and finite")
    if not 0 <= share_std < math.inf:
        raise ValueError(f"Expected share_std={share_std} >= 0 and finite")
    if dtype_of(bits).startswith("float"):
        return 1.0
    return (clip + _TAIL * share_std) / _limit(bits)


def quantize(codes: np.ndarray, step: float, bits: int, uniforms: np.ndarray) -> np.ndarray:
    """Codes on the lattice, unbiased inside its range: E[dequantize(quantize(x))] = x. Beyond it they saturate.

    Args:
        codes: [k] or [clients, k], finite.
        step: from `levels`.
        uniforms: the same shape, independent and uniform on [0, 1); not read for 32 or 64 bits.
    Returns:
        Integers (float32 for 32 bits, float64 for 64) of the codes' shape.
    Raises:
        ValueError: if a code is not finite, or the shapes differ.
    """
    dtype = dtype_of(bits)
    codes = np.asarray(codes, np.float64)
    if not np.isfinite(codes).all():
        raise ValueError("codes hold NaN or infinity")
    if dtype.startswith("float"):
        largest = np.finfo(dtype).max
        return np.clip(codes, -largest, largest).astype(dtype)
    uniforms = np.asarray(uniforms, np.float64)
    if uniforms.shape != codes.shape:
        raise ValueError(f"uniforms have shape {list(uniforms.shape)}, expected {list(codes.shape)}")
    limit = _limit(bits)
    return np.clip(np.floor(codes / step + uniforms), -limit, limit).astype(dtype)


def dequantize(lattice: np.ndarray, step: float) -> np.ndarray:
    """Codes of the same shape in float64; codes of floating point pass through."""
    lattice = np.asarray(lattice)
    return lattice.astype(np.float64) * (step if np.issubdtype(lattice.dtype, np.integer) else 1.0)


def _limit(bits: int) -> int:
    """Symmetric, so that a code and its negative are treated alike."""
    return 2 ** (bits - 1) - 1
