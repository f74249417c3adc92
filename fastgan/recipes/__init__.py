"""One file per system: settings, presets, networks and two pure loss functions."""

from fastgan.recipes.base import Recipe
from fastgan.recipes.cgan import CGAN
from fastgan.recipes.cyclegan import CycleGAN
from fastgan.recipes.dcgan import DCGAN
from fastgan.recipes.discogan import DiscoGAN
from fastgan.recipes.munit import MUNIT
from fastgan.recipes.pan import PAN
from fastgan.recipes.pix2pix import Pix2Pix
from fastgan.recipes.srgan import SRGAN
from fastgan.recipes.stargan import StarGAN
from fastgan.recipes.style import Style
from fastgan.recipes.wgan import WGAN
from fastgan.recipes.wgan_gp import WGANGP

RECIPES: dict[str, type[Recipe]] = {
    "cyclegan": CycleGAN,
    "pix2pix": Pix2Pix,
    "dcgan": DCGAN,
    "cgan": CGAN,
    "wgan": WGAN,
    "wgan-gp": WGANGP,
    "discogan": DiscoGAN,
    "pan": PAN,
    "stargan": StarGAN,
    "munit": MUNIT,
    "srgan": SRGAN,
    "style": Style,
}
