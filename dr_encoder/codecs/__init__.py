"""One file a family; importing this package imports every file in it, and with that registers its family."""

import importlib
import pkgutil

for _module in pkgutil.iter_modules(__path__):
    importlib.import_module(f"{__name__}.{_module.name}")

from dr_encoder.codecs.base import CODECS, Codec, decoded_noise_energy, load, register, save  # noqa: E402

__all__ = ["CODECS", "Codec", "decoded_noise_energy", "load", "register", "save"]
