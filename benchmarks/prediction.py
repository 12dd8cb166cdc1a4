"""Photos per second of training and prediction, against other networks with the same encoder on the same photos.

python benchmarks/prediction.py --data_dir data [--encoder resnet50] prints the table, on the device that there is.
Weights are random. DeepLabV3Plus and Unet are those of segmentation_models.pytorch.
"""

import argparse
import statistics
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import torch
import torch.nn.functional as F
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50

from benchmarks.common import in_turn, machine, make_parser
from engine.devices import autocast, pick_device, resolve_precision, reuse_memory, to_device
from model.encoders import ENCODERS, TIMM
from model.layouts import find_split
from model.net import FCN_GCN
from model.photos import read_photo
from model.transforms import squares, to_input
from model.voc import CLASS_NAMES
from params import Params
from predict import make_segmenter

OURS = "this program"
PHOTOS = 16  # that are predicted


def parse_args() -> argparse.Namespace:
    parser = make_parser(__doc__)
    parser.add_argument("--data_dir", type=Path, default=Path("data"), help="(default: %(default)s)")
    parser.add_argument("--encoder", default="resnet50", help="as in params.json (default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=16, help="of training (default: %(default)s)")
    return parser.parse_args()


def other_networks(encoder: str) -> dict[str, nn.Module]:
    """Return the networks to compare with, those that are installed and have this encoder."""
    networks = {}
    if encoder == "resnet50":
        options = {"weights": None, "weights_backbone": None, "num_classes": len(CLASS_NAMES)}
        networks["torchvision fcn_resnet50"] = fcn_resnet50(**options)
        networks["torchvision deeplabv3_resnet50"] = deeplabv3_resnet50(**options)
    try:
        from segmentation_models_pytorch import DeepLabV3Plus, Unet
    except ImportError:
        print("without DeepLabV3Plus and Unet: pip install segmentation-models-pytorch", file=sys.stderr)
        return networks
    name = encoder.replace(TIMM, "tu-")
    for network in (DeepLabV3Plus, Unet):
        made = network(name, encoder_weights=None, classes=len(CLASS_NAMES))
        networks[f"segmentation_models.pytorch {network.__name__}"] = made
    return networks


def logits_of(found: Tensor | dict[str, Tensor]) -> Tensor:
    """Return float32 logits; torchvision's networks return a dict."""
    return (found["out"] if isinstance(found, dict) else found).float()


def training_step(model: nn.Module, params: Params, device: torch.device) -> Callable[[], None]:
    """Return a step of AdamW on cross-entropy, the same for all networks, with random photos and labels."""
    count, size = params.batch_size, params.image_size
    images = to_input(torch.randint(256, (count, 3, size, size), dtype=torch.uint8), device)
    labels = torch.randint(len(CLASS_NAMES), (count, size, size), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with autocast(device, params.precision):
            logits = logits_of(model(images))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


@torch.inference_mode()
def class_map(model: nn.Module, params: Params, device: torch.device, file: Path) -> Tensor:
    """Predict a photo as a short script would: squashed, through the network, upsampled to its own size, argmax."""
    photo = read_photo(file)
    with autocast(device, params.precision):
        logits = logits_of(model(to_input(squares([photo], [params.image_size], "squash")[0], device)))
    return F.interpolate(logits, (photo.height, photo.width), mode="bilinear").argmax(1)[0].to(torch.uint8).cpu()


def measure(files: list[Path], params: Params, device: torch.device, repeats: int) -> list[tuple]:
    """Return rows of photos per second: in training, and photo by photo from the file to the class map."""
    models = {OURS: FCN_GCN(**params.network_options(), pretrained=False), **other_networks(params.encoder)}
    for model in models.values():
        to_device(model.train(), params, device)
    steps = [training_step(model, params, device) for model in models.values()]
    trained = in_turn(*steps, repeats=repeats, device=device)

    segmenter = make_segmenter(models[OURS].eval(), params, device)
    predict = {name: partial(class_map, model.eval(), params, device) for name, model in models.items()}
    predict[OURS] = lambda file: segmenter.segment(read_photo(file)).cpu()
    passes = [partial(lambda each: [each(file) for file in files], each) for each in predict.values()]
    predicted = in_turn(*passes, repeats=repeats, device=device)

    columns = []
    for photos, seconds in ((params.batch_size, trained), (len(files), predicted)):
        medians = [statistics.median(each) for each in seconds]
        columns += [[f"{photos / median:.3g}" for median in medians]]
        columns += [[f"{median / medians[0]:.2f}" for median in medians]]
    return list(zip(models, *columns, strict=True))


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    files = find_split("voc", args.data_dir, "val").images[:PHOTOS]
    recipe = {"encoder": args.encoder, "pretrained": False, "gcn_padding": "same"}
    recipe |= {"stem_maxpool": args.encoder in ENCODERS}  # timm's have no such option
    params = resolve_precision(Params(**recipe, image_size=args.image_size, batch_size=args.batch_size), device)
    torch.manual_seed(0)
    reuse_memory(device)
    rows = measure(files, params, device, args.repeats)
    print(
        f"{machine(device)}; {args.image_size}x{args.image_size}, {params.precision}; photos per second, by the median "
        f"of {args.repeats}; ratio: how many times as fast this program is\n"
    )
    headers = ("", f"training, batch {args.batch_size}", "ratio", "file to class map", "ratio")
    print(tabulate(rows, headers=headers, tablefmt="pipe", disable_numparse=True))


if __name__ == "__main__":
    main(parse_args())
