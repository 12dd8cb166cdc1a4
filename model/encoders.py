"""Encoders: ResNets of torchvision, and any model of timm with a pyramid of maps.

Another kind of encoder is one more function that returns an Encoder, and a line in build(). All other code asks the
Encoder and knows no kind by name.
"""

import difflib
import importlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, compiler, fx, hub, is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.nn.utils.fusion import fuse_conv_bn_eval
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model, get_model_weights
from torchvision.ops import StochasticDepth

from model import UserError, first_line
from model.parallel import is_plain_batch_norm
from model.transforms import IMAGENET_MEAN, IMAGENET_STD
from model.weights import installed_weights, matched, no_weights, read_weights

ENCODERS = (  # of torchvision's ResNet family
    *("resnet50", "resnet18", "resnet34", "resnet101", "resnet152"),
    *("resnext50_32x4d", "resnext101_32x8d", "resnext101_64x4d", "wide_resnet50_2", "wide_resnet101_2"),
)
TIMM = "timm/"  # begins the name of an encoder that is a model of timm
PYRAMID = (4, 8, 16, 32)  # strides that a timm model must have maps of


@dataclass(frozen=True)
class Encoder:
    """What the network, its training and its use must know of an encoder, whose modules are children of the network.

    Attributes:
        names: of these children.
        maps: of the network and normalized images (B, 3, H, W) the four maps (B, C, h, w), from fine to coarse.
        channels: C of each map.
        strides: H / h of each map.
        mean, std: what photos in [0, 1] were normalized with, by channel, when its weights were trained.
        weights: the file or address that they came from, None without.
        exported_multiple: what the sides of photos must be multiples of once it is exported.
    """

    names: tuple[str, ...]
    maps: Callable[[Any, Tensor], list[Tensor]]
    channels: tuple[int, ...]
    strides: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    weights: str | None = None
    exported_multiple: int = 1

    def owns(self, name: str) -> bool:
        """Return whether a layer or a tensor of this name in the network belongs to the encoder."""
        return name.split(".", 1)[0] in self.names

    @property
    def padding(self) -> tuple[int, ...]:
        """The mean as a colour, of values from 0 to 255: what lies beside a photo in a square."""
        return tuple(round(255 * value) for value in self.mean)


def build(name: str, *, pretrained: bool | str, options: Mapping[str, bool]) -> tuple[Encoder, dict[str, nn.Module]]:
    """Build an encoder. Returns it and its modules, to become children of the network under these names.

    No encoder draws random numbers: dropout and stochastic depth inside of it are switched off, so that several
    processes compute what one does, and recomputed activations are those of the forward pass.

    Args:
        name: one of ENCODERS, or "timm/NAME".
        pretrained: start from ImageNet weights, which are installed or downloaded; or from a file, see read_weights().
        options: stem_maxpool, zero_init_residual, freeze_encoder_statistics and activation_checkpointing, see FCN_GCN.

    Raises:
        UserError: there is no such encoder, it does not honour an option, or its weights are not to be had.
    """
    if name.startswith(TIMM):
        encoder, modules = _timm(name, pretrained, options)
    elif name in ENCODERS:
        encoder, modules = _resnet(name, pretrained, options)
    else:
        raise UserError(f'encoder is {name!r}; allowed: {", ".join(ENCODERS)}, or "{TIMM}NAME" for a model of timm')
    for module in modules.values():
        _draw_nothing(module)
    return encoder, modules


def built_without_memory(name: str) -> bool:
    """Return whether an encoder can be built on the meta device, all its tensors then coming from a checkpoint."""
    return name in ENCODERS


def _draw_nothing(module: nn.Module) -> None:
    parts: list[Any] = [*module.modules()]
    for part in parts:
        if isinstance(part, _DropoutNd | StochasticDepth):
            part.p = 0.0
        elif hasattr(part, "drop_prob"):  # timm's DropPath, DropBlock2d
            part.drop_prob = 0.0


# ResNets, of torchvision


def _resnet(name: str, pretrained: bool | str, options: Mapping[str, bool]) -> tuple[Encoder, dict[str, nn.Module]]:
    resnet = get_model(name, weights=None, zero_init_residual=options["zero_init_residual"] and not pretrained)
    source = None
    if pretrained:
        published = get_model_weights(name).IMAGENET1K_V1
        state = read_weights(pretrained) if isinstance(pretrained, str) else _downloaded(name, published)
        source = pretrained if isinstance(pretrained, str) else published.url
        own = resnet.state_dict()
        resnet.load_state_dict(own | matched(state, own, ("fc",), source))
    modules = {
        "conv1": resnet.conv1,
        "bn0": resnet.bn1,
        "relu": resnet.relu,
        "maxpool": resnet.maxpool if options["stem_maxpool"] else nn.Sequential(),
        **{stage: getattr(resnet, stage) for stage in ("layer1", "layer2", "layer3", "layer4")},
    }
    width = resnet.fc.in_features  # of the last stage, each as wide as two of the one before
    encoder = Encoder(
        names=tuple(modules),
        maps=_resnet_maps,
        channels=(width // 8, width // 4, width // 2, width),
        strides=(4, 8, 16, 32) if options["stem_maxpool"] else (2, 4, 8, 16),
        mean=IMAGENET_MEAN,
        std=IMAGENET_STD,
        weights=source,
    )
    return encoder, modules


def _resnet_maps(net: Any, images: Tensor) -> list[Tensor]:
    x, maps = net.maxpool(net.relu(net.bn0(net.conv1(images)))), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = _recomputed(stage, x) if net.activation_checkpointing and net.training and is_grad_enabled() else stage(x)
        maps.append(x)
    return maps


def _recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x), of which nothing but x is kept for the backward pass."""
    # A compiled layer writes no statistics in its repetition.
    contexts = {"context_fn": lambda: (nullcontext(), _statistics_kept(layer))}
    options: dict[str, Any] = {} if compiler.is_compiling() else contexts
    return checkpoint(layer, x, use_reentrant=False, preserve_rng_state=False, **options)


@contextmanager
def _statistics_kept(layer: nn.Module) -> Iterator[None]:
    """Let the running statistics of batch norm be afterwards what they are now."""
    before = [buffer.clone() for buffer in layer.buffers()]
    try:
        yield
    finally:
        for buffer, value in zip(layer.buffers(), before, strict=True):
            buffer.data.copy_(value)  # .data: autograd does not need them and must not take them for changed


def _downloaded(name: str, weights: Any) -> dict[str, Tensor]:
    try:
        return weights.get_state_dict(check_hash=True)
    except Exception as error:  # no network, a full disk; in the cache a damaged file, an empty one, an HTML page
        place = f"{hub.get_dir()}/checkpoints/{weights.url.rsplit('/', 1)[-1]}"
        raise no_weights(name, name, error, f"put {weights.url} at {place}") from error


# Models of timm, which is imported only where one is named: that takes seconds


def _timm(name: str, pretrained: bool | str, options: Mapping[str, bool]) -> tuple[Encoder, dict[str, nn.Module]]:
    backbone = _timm_pyramid(name)
    _set_timm_options(backbone, name, options)
    strides, channels = backbone.feature_info.reduction(), backbone.feature_info.channels()
    places = [len(strides) - 1 - strides[::-1].index(stride) for stride in PYRAMID]  # the last one of each stride
    channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    maps = partial(_timm_maps, places=places, channels_last=channels_last)
    maps = partial(maps, multiple=_padding_multiple(backbone, name, maps))
    source = None
    if pretrained:
        with torch.random.fork_rng(devices=[]):  # all processes draw alike, and only rank 0 reads weights
            source = _load_timm_weights(backbone, name, pretrained)
    encoder = Encoder(
        names=("backbone",),
        maps=maps,
        channels=tuple(channels[place] for place in places),
        strides=PYRAMID,
        mean=tuple(backbone.pretrained_cfg["mean"]),
        std=tuple(backbone.pretrained_cfg["std"]),
        weights=source,
        exported_multiple=PYRAMID[-1],
    )
    return encoder, {"backbone": backbone}


def _set_timm_options(backbone: Any, name: str, options: Mapping[str, bool]) -> None:
    """Let a pyramid honour the options. Raises UserError naming the first that it cannot."""

    def refused(option: str, reason: str) -> UserError:
        return UserError(f'"{option}" is not for the encoder "{name}": {reason}; set it to false')

    reasons = {
        "stem_maxpool": "its maps have strides 4 to 32 already",
        "zero_init_residual": "timm initializes its blocks",
    }
    if not any(isinstance(module, _BatchNorm) for module in backbone.modules()):
        reasons["freeze_encoder_statistics"] = "it has no batch norm"
    elif not options["freeze_encoder_statistics"]:
        reasons["activation_checkpointing"] = (
            'its batch norm would count every batch twice unless "freeze_encoder_statistics" is true'
        )
    for option, reason in reasons.items():
        if options[option]:
            raise refused(option, reason)
    if options["activation_checkpointing"]:
        try:
            backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError):
            raise refused("activation_checkpointing", "timm cannot recompute its activations") from None


def _timm_maps(net: Any, images: Tensor, *, places: Sequence[int], channels_last: bool, multiple: int) -> list[Tensor]:
    height, width = images.shape[-2:]
    fits = multiple == 1 or compiler.is_exporting()  # an exported network is for sides that are multiples
    if not fits:
        images = F.pad(images, (0, -width % multiple, 0, -height % multiple), mode="replicate")
    maps = net.backbone(images)
    maps = [maps[place].permute(0, 3, 1, 2) if channels_last else maps[place] for place in places]
    if fits:
        return maps
    sizes = [((height - 1) // stride + 1, (width - 1) // stride + 1) for stride in PYRAMID]
    return [x[..., :rows, :columns] for x, (rows, columns) in zip(maps, sizes, strict=True)]


@torch.inference_mode()
def _padding_multiple(backbone: nn.Module, name: str, maps: Callable[..., list[Tensor]]) -> int:
    """Return what the sides of photos must be padded to multiples of, tried on odd sides.

    That is the last stride where a side of a map is not that of the photo by the stride, rounded up; else 1. Raises
    UserError where padding is no help.
    """
    net, reason = SimpleNamespace(backbone=backbone.eval()), ""
    for multiple, height, width in ((1, 33, 65), (PYRAMID[-1], 64, 96)):
        try:
            found = [tuple(x.shape[-2:]) for x in maps(net, torch.zeros(1, 3, height, width), multiple=1)]
        except Exception as error:  # the models raise what they like
            reason = first_line(error)
            continue
        if found == [(-(-height // stride), -(-width // stride)) for stride in PYRAMID]:
            backbone.train()
            return multiple
        reason = f"of a photo of {height} x {width} its maps are {', '.join(f'{h} x {w}' for h, w in found)}"
    raise UserError(f'encoder "{name}" does not take photos of every size ({reason})')


def _timm_pyramid(name: str) -> Any:
    """Return a model of timm that gives a list of maps. Raises UserError where a stride of PYRAMID has none."""
    create = partial(_timm_library(name).create_model, name.removeprefix(TIMM), features_only=True)
    try:
        try:
            model = create(strict_img_size=False)  # Swin's size would be fixed otherwise
        except TypeError as error:
            if "strict_img_size" not in str(error):
                raise
            model = create()  # most models have no such argument
        strides = model.feature_info.reduction()
    except Exception as error:  # the models raise what they like
        raise UserError(f'encoder "{name}" gives no maps of several sizes ({first_line(error)})') from error
    if missing := [stride for stride in PYRAMID if stride not in strides]:
        raise UserError(
            f'encoder "{name}" has no map of stride {missing[0]} but of {", ".join(map(str, strides))}; '
            f"take one with a pyramid of strides {', '.join(map(str, PYRAMID))}"
        )
    return model


def _timm_library(name: str) -> ModuleType:
    """Import timm. Raises UserError where it is not installed, or has no model of this name, which begins with TIMM."""
    try:
        timm = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f'encoder "{name}" needs timm ({error}): pip install timm') from None
    short = name.removeprefix(TIMM)
    if not timm.is_model(short):
        nearest = difflib.get_close_matches(short, timm.list_models(), n=3)
        hint = f"did you mean {' or '.join(nearest)}?" if nearest else "timm.list_models() gives their names"
        raise UserError(f'encoder is "{name}", but timm {timm.__version__} has no model {short}; {hint}')
    return timm


def _load_timm_weights(backbone: nn.Module, name: str, pretrained: bool | str) -> str:
    """Load weights into a pyramid from the whole model, which they are for. Returns where they come from."""
    timm, short = _timm_library(name), name.removeprefix(TIMM)
    file = pretrained if isinstance(pretrained, str) else installed_weights(short)
    cfg = timm.get_pretrained_cfg(short)
    address = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    try:
        whole = timm.create_model(short, pretrained=file is None)
    except Exception as error:  # huggingface_hub has errors of its own, and so have damaged files in its cache
        raise no_weights(name, short, error, address) from error
    state = whole.state_dict()
    if file is not None:
        classifier = whole.pretrained_cfg.get("classifier") or ()
        classifier = (classifier,) if isinstance(classifier, str) else classifier
        state |= matched(read_weights(file), state, classifier, file)

    def key(tensor: str) -> str:  # timm writes stages_0 of a pyramid for stages.0, and may put model. before it
        return tensor.removeprefix("model.").replace("_", ".")

    by_key = {key(tensor): value for tensor, value in state.items()}
    if missing := [tensor for tensor in backbone.state_dict() if key(tensor) not in by_key]:
        raise UserError(f'the weights of "{name}" cannot be told apart: timm calls {missing[0]} otherwise elsewhere')
    backbone.load_state_dict({tensor: by_key[key(tensor)] for tensor in backbone.state_dict()})
    return str(file or address)


def pad_statically(model: Any) -> None:
    """Let convolutions with TensorFlow's padding pad as for sides that are multiples of their stride, in place.

    How much they pad depends on the photo's size otherwise, and torch.export would work at that for hours. Raises
    UserError for other layers that pad so.
    """
    layers: list[tuple[str, Any]] = [*model.named_modules()]
    for name, layer in layers:
        if not type(layer).__name__.endswith("Same"):
            continue
        if type(layer).__name__ == "Conv2dSame":
            layer.__class__ = nn.Conv2d  # whose own padding is 0
        elif hasattr(layer, "same_pad") and isinstance(layer, nn.Conv2d):  # StdConv2dSame, ScaledStdConv2dSame
            if not layer.same_pad:
                continue
            layer.same_pad = False  # type: ignore[assignment]
        else:
            raise UserError(f"{name} is {type(layer).__name__}, which cannot be exported; choose another encoder")
        shapes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        down, across = (max(0, (kernel - 1) * dilation + 1 - stride) for kernel, stride, dilation in shapes)
        pad = nn.ZeroPad2d((across // 2, across - across // 2, down // 2, down - down // 2))
        model.set_submodule(name, nn.Sequential(pad, layer))


# Folding


def fold_batch_norm(model: Any) -> None:
    """Multiply the encoder's batch norm, in evaluation mode, into the convolutions before it, in place.

    The maps stay the same but for rounding. The network is then one to predict with, not to train or to save. Batch
    norm stays where it does not follow a convolution of its own, and where torch.fx cannot trace the encoder.
    """
    try:
        graph = _Tracer().trace(_Maps(model))
    except Exception:  # as for control flow that depends on values; torch.fx and the models raise what they like
        return
    calls = [node for node in graph.nodes if node.op == "call_module"]
    once = {target for target, count in Counter(node.target for node in calls).items() if count == 1}
    for node in calls:
        convolution = node.args[0]
        alone = isinstance(convolution, fx.Node) and len(convolution.users) == 1
        if not alone or not once >= {node.target, convolution.target}:
            continue
        names = [str(target).removeprefix("model.") for target in (convolution.target, node.target)]
        before, norm = map(model.get_submodule, names)
        if isinstance(before, nn.Conv2d) and is_plain_batch_norm(norm):
            model.set_submodule(names[0], fuse_conv_bn_eval(before, norm))
            model.set_submodule(names[1], getattr(norm, "act", nn.Identity()))


class _Maps(nn.Module):
    """The encoder of a network, for torch.fx."""

    def __init__(self, model: Any):
        super().__init__()
        self.model = model

    def forward(self, images: Tensor) -> list[Tensor]:
        return self.model.encoder.maps(self.model, images)


class _Tracer(fx.Tracer):
    def is_leaf_module(self, module: nn.Module, name: str) -> bool:
        return isinstance(module, nn.Conv2d | _BatchNorm) or super().is_leaf_module(module, name)
