"""Encoders: ResNets of torchvision, and any model of timm with a pyramid of maps.

Another kind of encoder is one more function that returns an Encoder, and a line in build().
"""

import difflib
import importlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, compiler, hub, is_grad_enabled, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.dropout import _DropoutNd
from torch.utils.checkpoint import checkpoint
from torchvision.models import get_model, get_model_weights

from model import UserError, first_line
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
    """What the network, its training and its use must know of an encoder, whose modules are children of the network."""

    names: tuple[str, ...]  # of these children
    maps: Callable[[Any, Tensor], list[Tensor]]  # of the network and images (B, 3, H, W) four maps, from fine to coarse
    channels: tuple[int, ...]  # of each map
    mean: tuple[float, ...]  # what photos in [0, 1] were normalized with, by channel, when its weights were trained
    std: tuple[float, ...]
    weights: str | None = None  # the file or address that they came from
    exported_multiple: int = 1  # what the sides of photos must be multiples of once it is exported

    def owns(self, name: str) -> bool:
        """Return whether a layer or a tensor of this name in the network belongs to the encoder."""
        return name.split(".", 1)[0] in self.names

    @property
    def padding(self) -> tuple[int, ...]:
        """The mean as a colour, of values from 0 to 255: what lies beside a photo in a square."""
        return tuple(round(255 * value) for value in self.mean)


def build(name: str, pretrained: bool | str, options: Mapping[str, bool]) -> tuple[Encoder, dict[str, nn.Module]]:
    """Build an encoder. Returns it and its modules, to become children of the network under these names.

    pretrained is True, False or a file of weights, see read_weights(). No encoder draws random numbers: what drops out
    inside of it is switched off, so that several processes compute what one does, and recomputed activations are those
    of the forward pass. Raises UserError where there is no such encoder, it does not honour an option, or its weights
    are not to be had.
    """
    if name.startswith(TIMM):
        return _timm(name, pretrained, options)
    if name in ENCODERS:
        return _resnet(name, pretrained, options)
    raise UserError(f'encoder is {name!r}; allowed: {", ".join(ENCODERS)}, or "{TIMM}NAME" for a model of timm')


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
    channels = (width // 8, width // 4, width // 2, width)
    return Encoder(tuple(modules), _resnet_maps, channels, IMAGENET_MEAN, IMAGENET_STD, source), modules


def _resnet_maps(net: Any, images: Tensor) -> list[Tensor]:
    x, maps = net.maxpool(net.relu(net.bn0(net.conv1(images)))), []
    for stage in (net.layer1, net.layer2, net.layer3, net.layer4):
        x = _recomputed(stage, x) if net.activation_checkpointing and net.training and is_grad_enabled() else stage(x)
        maps.append(x)
    return maps


def _recomputed(layer: nn.Module, x: Tensor) -> Tensor:
    """Return layer(x), keeping nothing but x for the backward pass."""
    options: dict[str, Any] = {"context_fn": lambda: (nullcontext(), _statistics_kept(layer))}
    if compiler.is_compiling():  # a compiled layer writes no statistics in its repetition
        options = {}
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
        raise no_weights(name, name, error, weights.url, _cached(weights.url)) from error


def _cached(address: str) -> Path:
    """Return where PyTorch keeps a file that it has downloaded."""
    return Path(hub.get_dir(), "checkpoints", address.rsplit("/", 1)[-1])


# Models of timm, which is imported only where one is named: that takes seconds


def _timm(name: str, pretrained: bool | str, options: Mapping[str, bool]) -> tuple[Encoder, dict[str, nn.Module]]:
    backbone = _timm_pyramid(name)
    _set_timm_options(backbone, name, options)
    for part in backbone.modules():
        if isinstance(part, _DropoutNd):
            part.p = 0.0
        elif hasattr(part, "drop_prob"):  # DropPath, DropBlock2d
            part.drop_prob = 0.0
    strides, channels = backbone.feature_info.reduction(), backbone.feature_info.channels()
    places = [len(strides) - 1 - strides[::-1].index(stride) for stride in PYRAMID]  # the last one of each stride
    channels_last = getattr(backbone, "output_fmt", "NCHW") == "NHWC"
    maps = partial(_timm_maps, places=places, channels_last=channels_last)
    maps = partial(maps, multiple=_padding_multiple(backbone, name, maps))
    source = None
    if pretrained:
        with torch.random.fork_rng(devices=[]):  # all processes draw alike, and only rank 0 reads weights
            source = _load_timm_weights(backbone, name, pretrained)
    mean, std = (tuple(backbone.pretrained_cfg[key]) for key in ("mean", "std"))
    widths = tuple(channels[place] for place in places)
    encoder = Encoder(("backbone",), maps, widths, mean, std, source, exported_multiple=PYRAMID[-1])
    return encoder, {"backbone": backbone}


def _set_timm_options(backbone: Any, name: str, options: Mapping[str, bool]) -> None:
    """Let a pyramid honour the options. Raises UserError naming the first that it cannot."""
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
    if options["activation_checkpointing"]:
        try:
            backbone.set_grad_checkpointing(True)
        except (AssertionError, AttributeError, NotImplementedError):
            reasons["activation_checkpointing"] = "timm cannot recompute its activations"
    if refused := [option for option in reasons if options[option]]:
        raise UserError(f'"{refused[0]}" is not for the encoder "{name}": {reasons[refused[0]]}; set it to false')


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
    """Return what the sides of photos must be padded to multiples of: 1 where maps of odd sides have the right size.

    That is the photo's by the stride, rounded up. Raises UserError where padding is no help.
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
    """Return a model of timm that gives a list of maps. Raises UserError where it has not all strides of PYRAMID."""
    try:
        timm: Any = importlib.import_module("timm")
    except ImportError as error:
        raise UserError(f'encoder "{name}" needs timm ({error}): pip install timm') from None
    short = name.removeprefix(TIMM)
    tagged = timm.list_models(pretrained=True) if "." in short else []  # names with those of weights
    if not timm.is_model(short) or (tagged and short not in tagged):
        names = difflib.get_close_matches(short, tagged or timm.list_models(), n=3)
        nearest = " or ".join(names) or "one of timm.list_models()"
        raise UserError(f'encoder is "{name}", which timm {timm.__version__} has not; did you mean {nearest}?')
    try:
        try:
            model = timm.create_model(short, features_only=True, strict_img_size=False)  # or Swin's size would be fixed
        except TypeError:  # most models have no such argument
            model = timm.create_model(short, features_only=True)
        strides = model.feature_info.reduction()
    except Exception as error:  # the models raise what they like
        raise UserError(f'encoder "{name}" gives no maps of several sizes ({first_line(error)})') from error
    if missing := [stride for stride in PYRAMID if stride not in strides]:
        raise UserError(f'encoder "{name}" has no map of stride {missing[0]} but of {", ".join(map(str, strides))}')
    return model


def _load_timm_weights(backbone: nn.Module, name: str, pretrained: bool | str) -> str:
    """Load weights into a pyramid from the whole model, which they are for. Returns where they come from."""
    timm, short = importlib.import_module("timm"), name.removeprefix(TIMM)
    file = pretrained if isinstance(pretrained, str) else installed_weights(short)
    cfg = timm.get_pretrained_cfg(short)
    address = f"https://huggingface.co/{cfg.hf_hub_id}" if cfg.hf_hub_id else cfg.url
    try:
        whole = timm.create_model(short, pretrained=file is None)
    except Exception as error:  # huggingface_hub has errors of its own, and so have damaged files in its cache
        hubs = importlib.import_module("huggingface_hub").constants.HF_HUB_CACHE
        cached = Path(hubs, f"models--{cfg.hf_hub_id}".replace("/", "--")) if cfg.hf_hub_id else _cached(cfg.url or "")
        raise no_weights(name, short, error, address, cached) from error
    state = whole.state_dict()
    if file is not None:
        classifier = whole.pretrained_cfg.get("classifier") or ()
        state |= matched(read_weights(file), state, [classifier] if isinstance(classifier, str) else classifier, file)

    def key(tensor: str) -> str:  # timm writes stages_0 of a pyramid for stages.0, and may put model. before it
        return tensor.removeprefix("model.").replace("_", ".")

    by_key = {key(tensor): value for tensor, value in state.items()}
    if missing := [tensor for tensor in backbone.state_dict() if key(tensor) not in by_key]:
        raise UserError(f'the weights of "{name}" cannot be told apart: timm calls {missing[0]} otherwise elsewhere')
    backbone.load_state_dict({tensor: by_key[key(tensor)] for tensor in backbone.state_dict()})
    return str(file or address)
