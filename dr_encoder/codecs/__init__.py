"""One file a family; importing this package registers them all."""

from dr_encoder.codecs import autoencoder, coordinate, identity, linear  # noqa: F401
from dr_encoder.codecs.base import CODECS, Codec, load, register, save

__all__ = ["CODECS", "Codec", "load", "register", "save"]
