"""The Global Convolutional Network of Peng et al., "Large Kernel Matters" (arXiv 1703.02719).

`python -m model.net --encoder resnet50` prints its layer table.
"""

import argparse
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from itertools import pairwise

import torch.nn.functional as F
from torch import Tensor, compiler, nn, sym_max
from torch.nn.modules.batchnorm import _BatchNorm

from model import UserError, encoders
from model.encoders import ENCODERS
from model.parallel import Dropout2d


class Conv2d(nn.Conv2d):
    """nn.Conv2d, fast also where an axis that the kernel does not cover is padded.

    What such padding adds to the result is nothing but the bias. PyTorch's CPU kernels take a path for it that is
    several times slower, so here it is added afterwards.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: tuple[int, int], *, padding: tuple[int, int]):
        super().__init__(in_channels, out_channels, kernel_size, padding=padding)
        self.covered = tuple(pad if side > 1 else 0 for pad, side in zip(padding, kernel_size, strict=True))
        self.uncovered = tuple(0 if side > 1 else pad for pad, side in zip(padding, kernel_size, strict=True))

    def forward(self, x: Tensor) -> Tensor:
        if not any(self.uncovered):
            return super().forward(x)
        height, width = self.uncovered
        y = F.pad(F.conv2d(x, self.weight, None, padding=self.covered), (width, width, height, height))
        return y if self.bias is None else y + self.bias.to(y.dtype).view(1, -1, 1, 1)


GCN_PADDINGS = ("swapped", "same")


class GCN(nn.Module):
    """A dense k x k kernel at the price of four one-dimensional ones (paper, section 3.1 and figure 2B).

    Left branch: k x 1, then 1 x k; right branch: 1 x k, then k x 1; their sum is the score map.

    padding "same" keeps every map at its size. "swapped" is the layout of the widely used first PyTorch
    implementation, needed for its checkpoints: each right convolution pads the axis that it does not cover, so the
    map between the two is k - 1 higher and k - 1 narrower, and the outer k // 2 columns of the result get nothing
    but a bias from the right branch.
    """

    def __init__(self, in_channels: int, out_channels: int, *, kernel_size: int = 7, padding: str = "swapped"):
        super().__init__()
        k, half = kernel_size, kernel_size // 2
        along, across = {"same": ((0, half), (half, 0)), "swapped": ((half, 0), (0, half))}[padding]
        self.conv_l1 = nn.Conv2d(in_channels, out_channels, (k, 1), padding=(half, 0))
        self.conv_l2 = nn.Conv2d(out_channels, out_channels, (1, k), padding=(0, half))
        self.conv_r1 = Conv2d(in_channels, out_channels, (1, k), padding=along)
        self.conv_r2 = Conv2d(out_channels, out_channels, (k, 1), padding=across)
        self.min_width = 1 if padding == "same" else k

    def forward(self, x: Tensor) -> Tensor:  # (B, in, H, W) -> (B, out, H, W)
        left = self.conv_l2(self.conv_l1(x))
        width = x.shape[-1]
        # An exported network is for any width: it must not go the way that fits the one that it is exported with.
        may_be_narrow = self.min_width > 1 and (compiler.is_exporting() or width < self.min_width)
        if not may_be_narrow:
            return left + self.conv_r2(self.conv_r1(x))
        # Narrower than a swapped kernel: continue the map with zeros up to the kernel's width, and crop afterwards.
        missing = sym_max(self.min_width - width, 0)
        before = missing // 2
        wide = F.pad(x, (before, missing - before))  # type: ignore[arg-type]  # an exported size is symbolic
        return left + self.conv_r2(self.conv_r1(wide)).narrow(-1, before, width)


class BR(nn.Module):
    """Boundary refinement: a residual block on the score map (paper, figure 2C); with zero_init at first no change."""

    def __init__(self, channels: int, *, zero_init: bool = False):
        super().__init__()
        self.conv1 = nn.Conv2d(channels, channels, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1)
        if zero_init:
            _zero([self.conv2])

    def forward(self, x: Tensor) -> Tensor:  # (B, C, H, W) -> (B, C, H, W)
        return x + self.conv2(self.relu(self.conv1(x)))


def _stack(in_channels: int, num_classes: int, kernel_size: int, padding: str) -> nn.Module:
    widths = [in_channels] * ((kernel_size - 1) // 2) + [num_classes]
    return nn.Sequential(*(nn.Conv2d(a, b, 3, padding=1) for a, b in pairwise(widths)))


# What makes a score map of an encoder's: of its channels, the classes, k, and GCN's padding.
HEADS: dict[str, Callable[[int, int, int, str], nn.Module]] = {
    "gcn": lambda channels, classes, k, padding: GCN(channels, classes, kernel_size=k, padding=padding),
    "conv1x1": lambda channels, classes, k, padding: nn.Conv2d(channels, classes, 1),
    "conv": lambda channels, classes, k, padding: nn.Conv2d(channels, classes, k, padding="same"),
    "stack": _stack,
}


class FCN_GCN(nn.Module):
    """Encoder, one score map per stage, and a decoder that adds them up from coarse to fine.

    Args:
        encoder: one of ENCODERS, which are torchvision's, or "timm/NAME", see model/encoders.py.
        kernel_size: k of the heads, odd and at least 3 (paper, table 1).
        head: "gcn"; or, as the paper's comparisons, "conv1x1" (table 1), "conv", a plain k x k (table 2), or
            "stack", (k - 1) / 2 layers of 3 x 3 without nonlinearity that keep the width to the last one (table 3).
        boundary_refinement: whether BR blocks follow the heads and the fusions (table 5).
        stem_maxpool: False = a ResNet's output strides are 2 to 16; True = 4 to 32, the paper's and timm's.
        gcn_padding: "swapped" or "same", see GCN.
        dropout_rate: probability of dropping a channel of the maps that enter a head.
        zero_init_residual: let every residual block begin as its shortcut: 0 for BR's second convolution and, unless
            pretrained, for the weight of each encoder block's last batch norm (Goyal et al., arXiv 1706.02677, 5.1).
        zero_init_heads: let the last convolutions of every head begin at 0, so that the first logits do not depend on
            the scale of the encoder's maps, which is large where they come without batch norm, as EfficientNet's.
        freeze_encoder_statistics: the encoder's batch norm uses its running statistics, unchanged, in training too.
        activation_checkpointing: compute the encoder's activations again in the backward pass, with the same result.
        pretrained: start the encoder from ImageNet weights, installed or downloaded once, or from a file of weights.
        normalize: photos are normalized with mean and std, those of the encoder's weights; False: these are 0 and 1.

    Raises UserError for an unusable kernel_size, an option that is not for this encoder, or weights that are not there.
    """

    def __init__(
        self,
        num_classes: int = 21,
        *,
        encoder: str = "resnet50",
        kernel_size: int = 7,
        head: str = "gcn",
        boundary_refinement: bool = True,
        stem_maxpool: bool = False,
        gcn_padding: str = "swapped",
        dropout_rate: float = 0.0,
        zero_init_residual: bool = False,
        zero_init_heads: bool = False,
        freeze_encoder_statistics: bool = False,
        activation_checkpointing: bool = False,
        pretrained: bool | str = True,
        normalize: bool = True,
    ):
        super().__init__()
        if kernel_size < 3 or kernel_size % 2 == 0:
            raise UserError(f"kernel_size is {kernel_size}; allowed: an odd number of at least 3")

        def score(in_channels: int) -> nn.Module:
            layer = HEADS[head](in_channels, num_classes, kernel_size, gcn_padding)
            if zero_init_heads:
                _zero((layer.conv_l2, layer.conv_r2) if isinstance(layer, GCN) else [*layer.modules()][-1:])
            return layer

        def refine() -> nn.Module:
            return BR(num_classes, zero_init=zero_init_residual) if boundary_refinement else nn.Sequential()  # identity

        options = {"stem_maxpool": stem_maxpool, "zero_init_residual": zero_init_residual}
        options["freeze_encoder_statistics"] = freeze_encoder_statistics
        options["activation_checkpointing"] = activation_checkpointing
        self.encoder, modules = encoders.build(encoder, pretrained, options)
        for name, module in modules.items():  # a ResNet's have their old names: conv1, bn0, layer1, ...
            self.add_module(name, module)
        self.freeze_encoder_statistics = freeze_encoder_statistics
        self.activation_checkpointing = activation_checkpointing
        self.mean = self.encoder.mean if normalize else (0.0, 0.0, 0.0)
        self.std = self.encoder.std if normalize else (1.0, 1.0, 1.0)
        self.dropout = Dropout2d(dropout_rate) if dropout_rate > 0 else nn.Sequential()
        self.gcn1, self.gcn2, self.gcn3, self.gcn4 = map(score, self.encoder.channels)
        self.br1, self.br2, self.br3, self.br4 = refine(), refine(), refine(), refine()
        self.br5, self.br6, self.br7, self.br8, self.br9 = refine(), refine(), refine(), refine(), refine()

    def maps(self, images: Tensor) -> list[Tensor]:
        """Return the encoder's four maps (B, C, h, w) of images (B, 3, H, W)."""
        return self.encoder.maps(self, images)

    def forward(self, x: Tensor) -> Tensor:
        """Return logits (B, num_classes, H, W) of normalized images (B, 3, H, W), with H and W at least 32.

        The sizes beside the lines are those of a ResNet without stem_maxpool; otherwise f1 to f4 are half as large.
        """
        f1, f2, f3, f4 = self.maps(x)  # (B, C, H/2, W/2), (B, 2C, H/4, W/4), to (B, 8C, H/16, W/16)

        s1 = self.br1(self.gcn1(self.dropout(f1)))  # (B, num_classes, H/2, W/2)
        s2 = self.br2(self.gcn2(self.dropout(f2)))  # (B, num_classes, H/4, W/4)
        s3 = self.br3(self.gcn3(self.dropout(f3)))  # (B, num_classes, H/8, W/8)
        s4 = self.br4(self.gcn4(self.dropout(f4)))  # (B, num_classes, H/16, W/16)

        y = self.br5(s3 + _upsample(s4, size=s3.shape[-2:]))  # (B, num_classes, H/8, W/8)
        y = self.br6(s2 + _upsample(y, size=s2.shape[-2:]))  # (B, num_classes, H/4, W/4)
        y = self.br7(s1 + _upsample(y, size=s1.shape[-2:]))  # (B, num_classes, H/2, W/2)
        height, width = ((side - 1) // 2 + 1 for side in x.shape[-2:])  # rounded up
        y = self.br8(_upsample(y, size=(height, width)))  # (B, num_classes, H/2, W/2)
        y = self.br9(_upsample(y, size=(2 * height, 2 * width)))  # (B, num_classes, H, W), but for odd sides H+1, W+1
        # An exported network is for any size: it must not go the way that fits the one that it is exported with.
        return _upsample(y, size=x.shape[-2:], always=compiler.is_exporting())  # (B, num_classes, H, W)

    def train(self, mode: bool = True) -> "FCN_GCN":
        super().train(mode)
        if self.freeze_encoder_statistics:
            for name, module in self.named_modules():
                if isinstance(module, _BatchNorm) and self.encoder.owns(name):
                    module.eval()
        return self


def _zero(layers: Iterable[nn.Module]) -> None:
    for layer in layers:
        for parameter in layer.parameters():
            nn.init.zeros_(parameter)


def _upsample(x: Tensor, *, size: Sequence[int], always: bool = False) -> Tensor:
    if not always and x.shape[-2:] == tuple(size):
        return x
    return F.interpolate(x, size=size, mode="bilinear", align_corners=True)


def without_unused(state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Leave out the tensors brN.bn.* that checkpoints of the original implementation hold and no layer uses."""
    return {name: tensor for name, tensor in state_dict.items() if not re.match(r"br[1-9]\.bn\.", name)}


def is_of_score_layer(name: str) -> bool:
    """Return whether a tensor of this name depends on the number of classes: those of the heads and of BR."""
    return re.match(r"(gcn[1-4]|br[1-9])(\.|$)", name) is not None


def class_count(state_dict: Mapping[str, Tensor]) -> int | None:
    """Return the number of classes that weights are for; None where they have no head."""
    biases = [tensor for name, tensor in state_dict.items() if re.fullmatch(r"gcn1\.(.+\.)?bias", name)]
    return len(biases[-1]) if biases and biases[-1].ndim else None  # the last bias of a head has one value per class


if __name__ == "__main__":
    from torchsummary import summary

    parser = argparse.ArgumentParser(description="Print the layers of the network.")
    parser.add_argument("--encoder", choices=ENCODERS, default=ENCODERS[0], help="(default: %(default)s)")
    summary(FCN_GCN(encoder=parser.parse_args().encoder, pretrained=False), (3, 224, 224), device="cpu")
