"""One file per system: settings, presets, networks and two pure loss functions."""

from fastgan.recipes.base import Recipe
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.pix2pix import Pix2Pix

RECIPES: dict[str, type[Recipe]] = {"cyclegan": CycleGAN, "pix2pix": Pix2Pix}
