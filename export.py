"""Write a checkpoint as an ONNX file, once onnxruntime finds the same logits with it as PyTorch on a photo of val."""

import argparse
import copy
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tabulate import tabulate
from torch import Tensor, nn
from torchvision.transforms.functional import pil_to_tensor

from engine.checkpoints import agreed_class_names, checkpoint_path, load_network
from engine.cli import add_restore_file, experiment_parser, require, run_main
from engine.devices import pick_device
from engine.evaluation import find_data
from engine.run import git_commit, records
from model import UserError, cores, first_line
from model.layouts import find_split
from model.net import FCN_GCN
from model.photos import read_photo
from model.transforms import to_input, to_square
from params import Params
from utils import RunFailed, replacing

PACKAGES = ("onnx", "onnxscript", "onnxruntime")  # what PyTorch needs for ONNX, and what the check needs
TOLERANCE = 1e-4  # of the largest logit; what rounding in another order makes is about 1e-6


def parse_args() -> argparse.Namespace:
    parser = experiment_parser(__doc__)
    parser.set_defaults(device="cpu")  # where PyTorch computes what the file is held against
    add_restore_file(parser)
    output = "the file to write (default: <restore_file>.onnx in model_dir)"
    parser.add_argument("--output", type=Path, metavar="FILE", help=output)
    return parser.parse_args()


def onnx_metadata(model: FCN_GCN, params: Params, names: list[str], epoch: int | None) -> dict[str, str]:
    """Return what the file says of itself beside the network, each value as JSON."""
    values = {
        **{"class_names": names, "mean": model.mean, "std": model.std},
        **{"image_size": params.image_size, "resize": params.resize, "padding": model.encoder.padding},
        **{"multiple": model.encoder.exported_multiple, "epoch": epoch, "git_commit": git_commit()},
    }
    return {key: json.dumps(value) for key, value in values.items()}


def pad_statically(model: Any) -> None:
    """Let convolutions with TensorFlow's padding pad as for sides that are multiples of their stride, in place.

    How much they pad depends on the photo's size otherwise, and torch.export would work at that for hours. Raises
    UserError for other layers that pad so.
    """
    for name, layer in [*model.named_modules()]:
        if not type(layer).__name__.endswith("Same"):
            continue
        if type(layer).__name__ != "Conv2dSame":
            raise UserError(f"{name} is {type(layer).__name__}, which cannot be exported; choose another encoder")
        layer.__class__ = nn.Conv2d  # whose own padding is 0
        shapes = zip(layer.kernel_size, layer.stride, layer.dilation, strict=True)
        down, across = (max(0, (kernel - 1) * dilation + 1 - stride) for kernel, stride, dilation in shapes)
        pad = nn.ZeroPad2d((across // 2, across - across // 2, down // 2, down - down // 2))
        model.set_submodule(name, nn.Sequential(pad, layer))


def write_onnx(model: FCN_GCN, file: Path, metadata: dict[str, str]) -> None:
    """Write a network as one file: float32 "images" (B, 3, H, W) to "logits" (B, num_classes, H, W).

    B, H and W are free; H and W at least 32, as the network's, and multiples of what its encoder says.
    """
    # At a size at which no map has an axis of 1, which torch.export would take for fixed.
    example = torch.zeros(2, 3, 224, 256)
    multiple = model.encoder.exported_multiple
    model = copy.deepcopy(model)  # that of the caller is what the file is held against
    if multiple > 1:
        pad_statically(model)

    def side(name: str) -> Any:
        return name if multiple == 1 else multiple * torch.export.Dim(f"{name}_by_{multiple}", min=1, max=512)

    shapes = ({0: "batch", 2: side("height"), 3: side("width")},)
    names: dict[str, Any] = {"input_names": ["images"], "output_names": ["logits"]}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # about PyTorch's own insides
        try:
            program = torch.onnx.export(
                model.eval(), (example,), dynamo=True, dynamic_shapes=shapes, verbose=False, **names
            )
        except ImportError as error:  # an onnxscript that is older than this PyTorch
            raise UserError(f"{error}: pip install --upgrade -r requirements-export.txt") from None
    assert program is not None
    for node in program.model.graph.all_nodes():
        node.metadata_props.clear()  # stack traces, with the paths of this machine
    program.model.metadata_props.clear()
    program.model.metadata_props.update(metadata)
    program.save(file, external_data=False)


def open_onnx(file: Path) -> Any:
    """Open a file in onnxruntime, on the CPU. Raises RunFailed if it is not valid ONNX or the runtime refuses it."""
    import onnx
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = cores()  # left to itself it pins threads to cores that it may not use
    try:
        onnx.checker.check_model(str(file), full_check=True)
        return onnxruntime.InferenceSession(str(file), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # both have classes of their own
        raise RunFailed(f"the ONNX file cannot be run ({first_line(error)}) and is not kept") from None


def photo_batches(path: Path, model: FCN_GCN, params: Params) -> list[Tensor]:
    """Return a photo and its mirror image, uint8 (2, 3, H, W): at image_size, and at another size that is no square."""
    size, multiple = params.image_size, model.encoder.exported_multiple
    if size % multiple:
        raise UserError(f'"image_size" is {size}, and an exported "{params.encoder}" takes multiples of {multiple}')
    odd = int(1.25 * size) | 1, max(int(0.75 * size), 32) | 1
    other = odd if multiple == 1 else (size + multiple, max(size - multiple, multiple))
    photo, batches = read_photo(path), []
    for height, width in ((size, size), other):
        square, _ = to_square(photo, None, max(height, width), params.resize, model.encoder.padding)
        image = pil_to_tensor(square)[:, :height, :width]
        batches.append(torch.stack([image, image.flip(-1)]))
    return batches


@torch.inference_mode()
def compare(session: Any, model: nn.Module, images: Tensor) -> dict[str, Any]:
    """Return a row of the table: how far the logits of onnxruntime are from those of PyTorch for the network's input.

    Raises RunFailed if they differ by more than TOLERANCE times the largest logit.
    """
    expected = model(images).cpu().numpy()
    (logits,) = session.run(["logits"], {"images": images.cpu().numpy()})
    row = {
        "images": " x ".join(map(str, images.shape)),
        "largest logit": np.abs(expected).max().item(),
        "largest difference": np.abs(logits - expected).max().item(),
        "pixels of another class": (logits.argmax(1) != expected.argmax(1)).mean().item(),
    }
    if not row["largest difference"] <= TOLERANCE * row["largest logit"] < math.inf:  # false for NaN too
        raise RunFailed(
            f"for images {row['images']} onnxruntime and PyTorch differ by {row['largest difference']:.2g} where the "
            f"largest logit is {row['largest logit']:.2g}; the file is not kept"
        )
    return row


def main(args: argparse.Namespace) -> None:
    for package in PACKAGES:
        require(package, "an ONNX file", "--upgrade -r requirements-export.txt")
    output = args.output or args.model_dir / f"{args.restore_file}.onnx"
    if output.suffix != ".onnx" or not output.parent.is_dir():
        raise UserError(f"--output {output}: give the name of a file that ends in .onnx, in a folder that is there")
    device = pick_device(args.device)
    model, params, checkpoint = load_network(args.model_dir, args.restore_file, torch.device("cpu"))
    model.to(memory_format=torch.contiguous_format)
    try:
        _, split, names = find_data(params, checkpoint, args)
    except UserError:
        if args.data_dir is not None or os.path.isdir(records(args.model_dir)[-1].get("data_dir") or ""):
            raise  # there is a data set, and something is wrong with it
        split, file = find_split("sample", Path("data"), "val"), checkpoint_path(args.model_dir, args.restore_file)
        names = agreed_class_names(checkpoint, file, None, params.num_classes)
    metadata = onnx_metadata(model, params, names, checkpoint.get("epoch"))
    batches = photo_batches(split.images[0], model, params)

    with replacing(output) as temporary:
        write_onnx(model, temporary, metadata)
        session = open_onnx(temporary)
        model.to(device)
        torch.backends.cudnn.allow_tf32 = False  # a GPU would round to 10 bits
        inputs = [to_input(batch, device, mean=model.mean, std=model.std, channels_last=False) for batch in batches]
        rows = [compare(session, model, part) for images in inputs for part in (images[:1], images)]
    print(tabulate(rows, headers="keys", tablefmt="pipe", floatfmt=".2g"))
    print(f"\nonnxruntime against PyTorch on {split.images[0]}, epoch {checkpoint.get('epoch')} -> {output}")


if __name__ == "__main__":
    raise SystemExit(run_main(lambda: main(parse_args())))
