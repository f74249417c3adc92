"""Fused GAN operations: Triton kernels on NVIDIA GPUs, plain differentiable torch functions elsewhere."""

from .adam_step import adam_step
from .batch_norm_act import batch_norm_act
from .channel_layer_norm_act import channel_layer_norm_act
from .conv_norm_act import conv_norm_act
from .conv_transpose_norm_act import conv_transpose_norm_act
from .crop_images import crop_images
from .instance_norm_act import instance_norm_act
from .reflect_pad2d import reflect_pad2d
from .residual_block import residual_block

__all__ = [
    "adam_step",
    "batch_norm_act",
    "channel_layer_norm_act",
    "conv_norm_act",
    "conv_transpose_norm_act",
    "crop_images",
    "instance_norm_act",
    "reflect_pad2d",
    "residual_block",
]
