"""fastgan: GAN image-to-image translation, trained and used from the command line or as a library."""

try:
    import fastgan_kernels  # noqa: F401
except ImportError as error:
    raise ImportError("fastgan_kernels is missing: run `pip install -e .` in the repository root") from error

from fastgan.accelerate import accelerate
from fastgan.inference import load
from fastgan.models import PatchDiscriminator, ResnetGenerator, UnetGenerator
from fastgan.recipes import RECIPES
from fastgan.step import Step

__version__ = "0.1.0"
__all__ = ["RECIPES", "PatchDiscriminator", "ResnetGenerator", "Step", "UnetGenerator", "accelerate", "load"]
