"""Fused GAN operations: Triton kernels on NVIDIA GPUs, plain differentiable torch functions elsewhere."""

from .instance_norm_act import instance_norm_act
from .reflect_pad2d import reflect_pad2d

__all__ = ["instance_norm_act", "reflect_pad2d"]
