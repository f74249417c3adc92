"""PatchGAN discriminator (Isola et al. 2017, section 3.3): a map of logits, one per patch of the stated
receptive field.

State-dict keys are those of the original release: `model.N` (NLayerDiscriminator), `net.N` for the 1x1
PixelGAN.
"""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial
from typing import Any

import torch
from fastgan_kernels import conv_norm_act
from torch import Tensor, nn

from fastgan.layers import Conv2d, norm_act, skip_idle_biases
from fastgan.stack import run_layers, run_line, run_plain, runs_fused

# receptive field in pixels -> number of convolutions with stride 2
LAYERS = {16: 1, 34: 2, 70: 3, 142: 4, 286: 5}


def smallest_side(receptive_field: int) -> int:
    """Side in pixels below which a discriminator has no logit to give."""
    # n halvings, then two convolutions that take one pixel each
    return 1 if receptive_field == 1 else 3 * 2 ** LAYERS[receptive_field]


class PatchDiscriminator(nn.Module):
    """Image (N, in_channels, H, W) to logits (N, 1, h, w); no sigmoid. 256x256 gives 30x30 at receptive field
    70.

    Args:
        in_channels: channels of the image, with those of the condition where there is one.
        ndf: width of the first layer.
        receptive_field: 1, 16, 34, 70, 142 or 286 pixels.
        norm: "instance", "batch" or "none"; never on the first and last layer.

    Raises:
        ValueError: another receptive field.
    """

    memory = "fast"

    def __init__(
        self, in_channels: int, *, ndf: int = 64, receptive_field: int = 70, norm: str = "instance"
    ) -> None:
        super().__init__()
        self.receptive_field = receptive_field
        bias = norm == "instance"
        if receptive_field == 1:
            layers = [Conv2d(in_channels, ndf, 1), nn.LeakyReLU(0.2, inplace=True)]
            layers += [Conv2d(ndf, 2 * ndf, 1, bias=bias), *norm_act(norm, 2 * ndf, "leaky_relu")]
            self.net = nn.Sequential(*layers, Conv2d(2 * ndf, 1, 1, bias=bias))
        elif receptive_field in LAYERS:
            n = LAYERS[receptive_field]
            layers = [Conv2d(in_channels, ndf, 4, 2, 1), nn.LeakyReLU(0.2, inplace=True)]
            for k in range(1, n + 1):
                cin, cout = ndf * min(2 ** (k - 1), 8), ndf * min(2**k, 8)
                stride = 2 if k < n else 1
                layers += [Conv2d(cin, cout, 4, stride, 1, bias=bias), *norm_act(norm, cout, "leaky_relu")]
            self.model = nn.Sequential(*layers, Conv2d(ndf * min(2**n, 8), 1, 4, 1, 1))
        else:
            fields = ", ".join(str(f) for f in (1, *LAYERS))
            raise ValueError(
                f"PatchDiscriminator: receptive_field must be one of {fields}, got {receptive_field}"
            )
        skip_idle_biases(self)

    @property
    def line(self) -> nn.Sequential:
        """The layers one after the other; see `fastgan.stack`."""
        return self.net if self.receptive_field == 1 else self.model

    def forward(self, x: Tensor) -> Tensor:
        """Logits of x; the smallest side that gives at least one logit is about a third of the receptive
        field."""
        return run_line(self, x)

    def compare(self, condition: Tensor, images: Sequence[Tensor]) -> list[Tensor]:
        """Logits of the pairs (condition, image) for several images (N, C, H, W) of one condition.

        The first convolution is a sum over channels: the condition's part is computed once. With batch norm
        every image keeps statistics of its own.
        """
        first, after, *rest = self.line
        assert isinstance(first, Conv2d) and isinstance(after, nn.LeakyReLU)
        known = condition.shape[1]
        form: dict[str, Any] = {"stride": first.stride[0], "padding": int(first.padding[0])}
        form["recompute"] = self.memory != "fast"
        shared = conv_norm_act(condition, first.weight[:, :known], first.bias, **form)
        form |= {"act": "leaky_relu", "slope": after.negative_slope}
        weight = first.weight[:, known:]
        if any(isinstance(layer, nn.modules.batchnorm._BatchNorm) for layer in rest):
            heads = [conv_norm_act(image, weight, residual=shared, **form) for image in images]
        else:
            repeated = shared.repeat(len(images), 1, 1, 1)
            heads = [conv_norm_act(torch.cat(list(images)), weight, residual=repeated, **form)]
        run = partial(run_layers, [rest]) if runs_fused(condition) else partial(run_plain, rest)
        logits = [run(head, self.memory) for head in heads]
        return logits if len(logits) == len(images) else list(logits[0].chunk(len(images)))
