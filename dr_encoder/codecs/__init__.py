"""One file a family; importing this package registers them all."""

from dr_encoder.codecs import allocation, autoencoder, chain, coordinate, identity, kronecker, linear, powersgd, sketch, topk  # noqa: F401
from dr_encoder.codecs.base import CODECS, Codec, load, register, save

__all__ = ["CODECS", "Codec", "load", "register", "save"]
