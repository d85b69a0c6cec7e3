"""Conversion: models from and to other ecosystems' names and layouts."""

from sextant.convert.hf import export_weights, import_weights, spec_from_hf, to_disk
from sextant.convert.maps import FAMILIES

__all__ = ["FAMILIES", "export_weights", "import_weights", "spec_from_hf", "to_disk"]
