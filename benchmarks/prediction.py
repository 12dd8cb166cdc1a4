"""Photos per second of prediction and training, against other networks with the same encoder on the same photos.

python benchmarks/prediction.py [--encoder resnet50] [--data_dir data] prints the tables, on the device that there is.
Without --data_dir, drawn scenes of the size of VOC's photos stand in for them. Weights are random. DeepLabV3Plus and
Unet are those of segmentation_models.pytorch: pip install segmentation-models-pytorch.
"""

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import torch
import torch.nn.functional as F
import torchvision
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.models.segmentation import deeplabv3_resnet50, fcn_resnet50
from tqdm import tqdm

from benchmarks.run import in_turn, machine, make_scenes
from engine.checkpoints import save_checkpoint
from engine.devices import autocast, resolve_precision, reuse_memory, to_device
from engine.distributed import pick_device
from engine.evaluation import make_segmenter
from model.encoders import ENCODERS, TIMM
from model.layouts import find_split
from model.net import FCN_GCN
from model.photos import read_photo
from model.transforms import squares, to_input
from model.voc import CLASS_NAMES
from params import Params

OURS = "this program"
TRAINED_AT_ONCE = 16


def recipe(encoder: str) -> dict[str, Any]:
    """Return the network's options in experiments/voc2012_sbd."""
    return {"encoder": encoder, "pretrained": False, "stem_maxpool": encoder in ENCODERS, "gcn_padding": "same"}


def parse_args() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_dir", type=Path, help="VOC2012, for real photos")
    parser.add_argument("--encoder", default="resnet50", help="as in params.json (default: %(default)s)")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), default="auto", help="(default: %(default)s)")
    parser.add_argument("--image_size", type=int, default=224, help="(default: %(default)s)")
    parser.add_argument("--batch_size", type=int, default=5, help="(default: %(default)s)")
    parser.add_argument("--photos", type=int, default=100, help="of the commands (default: %(default)s)")
    parser.add_argument("--repeats", type=int, default=5, help="timed runs of each side (default: %(default)s)")
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


@torch.inference_mode()
def plain_class_map(model: nn.Module, file: Path, size: int, device: torch.device, context: Callable) -> Tensor:
    """Predict a photo as a short script would: squashed, through the network, upsampled to its own size, argmax."""
    photo = read_photo(file)
    with context():
        logits = logits_of(model(to_input(squares([photo], [size], "squash")[0], device)))
    return F.interpolate(logits, (photo.height, photo.width), mode="bilinear").argmax(1)[0].to(torch.uint8).cpu()


def training_step(model: nn.Module, params: Params, device: torch.device) -> Callable[[], None]:
    """Return a step of AdamW on cross-entropy, the same for all networks, with random photos and labels."""
    size = params.image_size
    images = to_input(torch.randint(256, (TRAINED_AT_ONCE, 3, size, size), dtype=torch.uint8), device)
    labels = torch.randint(len(CLASS_NAMES), (TRAINED_AT_ONCE, size, size), device=device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-5, fused=True)

    def step() -> None:
        with autocast(device, params.precision):
            logits = logits_of(model(images))
        F.cross_entropy(logits, labels).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def networks_table(files: list[Path], params: Params, device: torch.device, repeats: int) -> list[tuple]:
    """Rows of photos per second: of the network for a batch, and photo by photo from the file to the class map."""
    size, count = params.image_size, params.batch_size
    context = partial(autocast, device, params.precision)
    models = {OURS: FCN_GCN(**params.network_options(), pretrained=False), **other_networks(params.encoder)}
    for model in models.values():
        to_device(model.train(), params, device)
    steps = [training_step(model, params, device) for model in models.values()]
    with tqdm(total=repeats + 1, unit="run") as bar:
        trained = in_turn(*steps, repeats=repeats, bar=bar, device=device)
    for model in models.values():
        model.eval()
    segmenter = make_segmenter(models[OURS], params, device)
    images = to_input(squares([read_photo(file) for file in files[:count]], [size], "squash")[0], device)

    @torch.inference_mode()
    def batch(model: nn.Module) -> None:
        with context():
            model(images)

    def class_map(name: str, photos: Iterator[Path]) -> None:
        if name == OURS:
            segmenter.segment(read_photo(next(photos))).cpu()
        else:
            plain_class_map(models[name], next(photos), size, device, context)

    networks = [partial(batch, model) for model in models.values()]
    wholes = [partial(class_map, name, cycle(files)) for name in models]
    with tqdm(total=4 * repeats + 2, unit="run") as bar:
        alone = in_turn(*networks, repeats=repeats, bar=bar, device=device)
        whole = in_turn(*wholes, repeats=3 * repeats, bar=bar, device=device)
    columns = []
    for photos, seconds in ((TRAINED_AT_ONCE, trained), (count, alone), (1, whole)):
        medians = [statistics.median(each) for each in seconds]
        columns += [[f"{photos / median:.3g}" for median in medians]]
        columns += [[f"{median / medians[0]:.2f}" for median in medians]]
    return list(zip(models, *columns, strict=True))


def run_command(command: list[str]) -> None:
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)


def commands_table(data_dir: Path, params: Params, args: argparse.Namespace, folder: Path) -> list[tuple]:
    """Rows of photos per second of whole commands, their start included."""
    split = find_split("voc", data_dir, "val")
    count = min(args.photos, len(split.ids))
    run, data = folder / "run", folder / "data"
    for new in (run, data):
        new.mkdir()
    (run / "params.json").write_text(json.dumps(recipe(params.encoder) | {"image_size": args.image_size}))
    save_checkpoint(
        {"state_dict": FCN_GCN(**params.network_options(), pretrained=False).state_dict()}, run / "best.pth.tar"
    )
    for name, files in (("JPEGImages", split.images), ("SegmentationClass", split.masks)):
        (data / name).symlink_to(files[0].parent.resolve())
    (data / "val.txt").write_text("".join(f"{id_}\n" for id_ in split.ids[:count]))
    commands = {
        "predict.py": ["predict.py", *split.images[:count], "--output_dir", folder / "out"],
        "evaluate.py --original_size": ["evaluate.py", "--original_size", "--data_dir", data],
    }
    rows = []
    for name, (script, *flags) in commands.items():
        command = [sys.executable, ROOT / script, *flags, "--model_dir", run, "--device", args.device]
        start = time.perf_counter()
        run_command(list(map(str, command)))
        seconds = time.perf_counter() - start
        rows.append((name, count, seconds, count / seconds))
    return rows


def main(args: argparse.Namespace) -> None:
    device = pick_device(args.device)
    params = resolve_precision(
        Params(**recipe(args.encoder), image_size=args.image_size, batch_size=args.batch_size), device
    )
    torch.manual_seed(0)
    reuse_memory(device)
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        data_dir = args.data_dir or make_scenes(folder / "scenes", args.photos)
        networks = networks_table(find_split("voc", data_dir, "val").images, params, device, args.repeats)
        commands = commands_table(data_dir, params, args, folder)
    print(
        f"{machine(device)}, PyTorch {torch.__version__}, torchvision {torchvision.__version__}; "
        f"{args.image_size}x{args.image_size}, {params.precision}; photos per second, by the median of {args.repeats} "
        f"batches and {3 * args.repeats} photos; ratio: how many times as fast this program is\n"
    )
    headers = ("", f"training, batch {TRAINED_AT_ONCE}", "ratio")
    headers += (f"network, batch {args.batch_size}", "ratio", "file to class map", "ratio")
    print(tabulate(networks, headers=headers, tablefmt="pipe", disable_numparse=True))
    print()
    print(tabulate(commands, headers=("", "photos", "seconds", "photos/s"), tablefmt="pipe", floatfmt=".3g"))


if __name__ == "__main__":
    main(parse_args())
