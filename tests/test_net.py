import copy
import re

import pytest
import torch
from conftest import ROOT, run_script
from torch import nn
from torchvision.models.resnet import BasicBlock

from engine.checkpoints import load_weights
from model import UserError
from model.encoders import ENCODERS, _recomputed
from model.inference import fold_batch_norm
from model.net import BR, FCN_GCN, GCN, HEADS, _upsample


def network(**options) -> FCN_GCN:
    return FCN_GCN(**{"num_classes": 4, "pretrained": False, "encoder": "resnet18"} | options)


def test_layer_table_is_the_published_one_row_for_row():
    printed = run_script("model/net.py")
    assert printed.stdout.splitlines() == (ROOT / "tests" / "architecture.txt").read_text().splitlines()


@pytest.mark.parametrize("encoder", ENCODERS)
def test_every_encoder_has_heads_of_its_width(encoder):
    with torch.device("meta"):
        model = network(encoder=encoder)
        assert model(torch.empty(2, 3, 50, 70)).shape == (2, 4, 50, 70)
    ends = [list(layer[-1].modules()) for layer in (model.layer1, model.layer2, model.layer3, model.layer4)]
    widths = [[m.num_features for m in end if isinstance(m, nn.BatchNorm2d)][-1] for end in ends]
    assert [head.conv_l1.in_channels for head in (model.gcn1, model.gcn2, model.gcn3, model.gcn4)] == widths


@pytest.mark.parametrize(
    ("encoder", "precision"),
    [("resnet18", torch.float32), ("resnet18", torch.bfloat16), ("resnext50_32x4d", torch.float32)],
    ids=str,
)
def test_folding_batch_norm_changes_no_logits(encoder, precision):
    torch.manual_seed(0)
    model = network(encoder=encoder, stem_maxpool=True).eval().to(memory_format=torch.channels_last)
    norms = [module for module in model.modules() if isinstance(module, nn.BatchNorm2d)]
    for norm in norms:
        nn.init.uniform_(norm.running_mean, -0.5, 0.5)
        nn.init.uniform_(norm.running_var, 0.5, 2)
        nn.init.uniform_(norm.weight, 0.2, 0.8)
        nn.init.uniform_(norm.bias, -0.5, 0.5)
    images = torch.randn(2, 3, 40, 48)

    def logits() -> torch.Tensor:
        with torch.inference_mode(), torch.autocast("cpu", precision, enabled=precision != torch.float32):
            return model(images).float()

    before = logits()
    fold_batch_norm(model)
    assert norms and not any(isinstance(module, nn.BatchNorm2d) for module in model.modules())
    tolerance = 1e-5 if precision == torch.float32 else 0.05
    assert (logits() - before).abs().max() < tolerance * before.abs().max()


@pytest.mark.parametrize("frozen", [False, True])
def test_activation_checkpointing_changes_neither_gradients_nor_statistics(frozen):
    options = {"freeze_encoder_statistics": frozen, "zero_init_residual": True}
    plain, images = network(**options).train(), torch.randn(2, 3, 32, 48)
    saving = network(**options, activation_checkpointing=True).train()
    saving.load_state_dict(plain.state_dict())
    kept = []
    for model in (plain, saving):
        with torch.autograd.graph.saved_tensors_hooks(lambda x: kept[-1].append(x.numel()) or x, lambda x: x):
            kept.append([])
            loss = model(images).square().mean()
        loss.backward()
    assert all(torch.equal(a.grad, b.grad) for a, b in zip(plain.parameters(), saving.parameters(), strict=True))
    assert all(torch.equal(a, b) for a, b in zip(plain.buffers(), saving.buffers(), strict=True))
    assert sum(kept[1]) < 0.7 * sum(kept[0])


def test_recomputed_layers_compile_to_the_same_gradients_and_statistics():
    plain, x = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU()), torch.randn(2, 3, 8, 8)
    saving = copy.deepcopy(plain)
    plain(x).square().mean().backward()
    torch.compile(lambda x: _recomputed(saving, x), backend="aot_eager")(x).square().mean().backward()
    for name, parameter in plain.named_parameters():
        torch.testing.assert_close(saving.get_parameter(name).grad, parameter.grad, rtol=1e-3, atol=1e-6)
    for name, buffer in plain.named_buffers():
        torch.testing.assert_close(saving.get_buffer(name), buffer)


def test_frozen_statistics_are_those_of_the_encoder_in_training_too():
    model = network(freeze_encoder_statistics=True).train()
    before = {name: buffer.clone() for name, buffer in model.named_buffers()}
    trained, scored = (
        model.train(mode)(torch.randn(2, 3, 64, 64, generator=torch.Generator().manual_seed(1)))
        for mode in (True, False)
    )
    assert torch.equal(trained, scored) and model.training is False
    assert all(torch.equal(before[name], buffer) for name, buffer in model.named_buffers())
    assert model.train().training and not model.layer1[0].bn1.training and not model.bn0.training


@pytest.mark.parametrize("size", [(32, 32), (33, 47), (70, 35)])
@pytest.mark.parametrize("options", [{}, {"gcn_padding": "same", "stem_maxpool": True}, {"kernel_size": 15}])
def test_logits_have_the_size_of_the_input(size, options):
    logits = network(**options).eval()(torch.randn(2, 3, *size))
    assert logits.shape == (2, 4, *size)
    assert logits.isfinite().all()


def test_every_parameter_is_trained_at_the_smallest_size():
    model = network()
    model(torch.randn(2, 3, 32, 32)).square().mean().backward()
    assert [name for name, parameter in model.named_parameters() if parameter.grad is None] == []


def test_an_image_gets_the_same_logits_alone_and_in_a_batch():
    model, images = network().double().eval(), torch.randn(3, 3, 48, 64, dtype=torch.float64)
    torch.testing.assert_close(model(images)[1:2], model(images[1:2]))


def test_two_networks_share_no_tensor():
    networks = [network(), network()]
    first, second = ({tensor.data_ptr() for tensor in model.state_dict().values()} for model in networks)
    assert first.isdisjoint(second)


@pytest.mark.parametrize("padding", ["same", "swapped"])
def test_gcn_sees_a_dense_square_of_its_kernel_size(padding):
    gcn = GCN(2, 3, kernel_size=5, padding=padding).double()
    x = torch.randn(1, 2, 17, 17, dtype=torch.float64, requires_grad=True)
    gcn(x)[0, :, 8, 8].sum().backward()
    seen = x.grad[0].abs().sum(0) > 0
    expected = torch.zeros(17, 17, dtype=torch.bool)
    expected[6:11, 6:11] = True
    assert torch.equal(seen, expected)


def test_same_padding_is_the_rank_two_convolution_it_stands_for():
    gcn = GCN(2, 3, kernel_size=5, padding="same").double()
    for conv in (gcn.conv_l1, gcn.conv_l2, gcn.conv_r1, gcn.conv_r2):
        nn.init.zeros_(conv.bias)
    left = torch.einsum("omj,mik->oikj", gcn.conv_l2.weight[:, :, 0], gcn.conv_l1.weight[..., 0])
    right = torch.einsum("omk,mij->oikj", gcn.conv_r2.weight[..., 0], gcn.conv_r1.weight[:, :, 0])
    x = torch.randn(1, 2, 11, 12, dtype=torch.float64)
    dense = nn.functional.conv2d(x, left + right, padding=2)
    torch.testing.assert_close(gcn(x), dense)


def test_swapped_padding_leaves_the_outer_columns_without_the_right_branch():
    gcn = GCN(2, 3, kernel_size=7, padding="swapped").double()
    x = torch.randn(1, 2, 10, 12, dtype=torch.float64)
    right = gcn(x) - gcn.conv_l2(gcn.conv_l1(x))
    outside = torch.cat([right[..., :3], right[..., -3:]], dim=-1)
    bias = gcn.conv_r2.bias.view(1, 3, 1, 1).expand_as(outside)
    torch.testing.assert_close(outside, bias)
    assert (right[..., 3:-3] - gcn.conv_r2.bias.view(1, 3, 1, 1)).abs().min() > 0


@pytest.mark.parametrize("width", [1, 2, 4, 6])
def test_a_map_narrower_than_a_swapped_kernel_is_continued_with_zeros(width):
    def right(x):
        return gcn(x) - gcn.conv_l2(gcn.conv_l1(x))

    gcn = GCN(2, 3, kernel_size=7, padding="swapped").double()
    wide, start = torch.zeros(1, 2, 5, 7, dtype=torch.float64), (7 - width) // 2
    wide[..., start : start + width] = torch.randn(1, 2, 5, width, dtype=torch.float64)
    narrow = wide[..., start : start + width]
    torch.testing.assert_close(right(narrow), right(wide)[..., start : start + width])


@pytest.mark.parametrize(
    ("head", "weights"),
    [
        ("gcn", lambda k: 2 * (512 * 21 * k + 21 * 21 * k)),
        ("conv1x1", lambda k: 512 * 21),
        ("conv", lambda k: 512 * 21 * k * k),
        ("stack", lambda k: (k // 2 - 1) * 9 * 512**2 + 9 * 512 * 21),
    ],
)
@pytest.mark.parametrize("k", [3, 7])
def test_heads_have_the_number_of_weights_of_their_definition(head, weights, k):
    with torch.device("meta"):
        head = network(num_classes=21, head=head, kernel_size=k).gcn4
    assert sum(p.numel() for name, p in head.named_parameters() if name.endswith("weight")) == weights(k)


@pytest.mark.parametrize("head", ["conv", "stack"])
def test_the_other_heads_see_the_same_square_as_the_gcn(head):
    layer = network(head=head, kernel_size=5).gcn1.double()
    x = torch.randn(1, 64, 11, 11, dtype=torch.float64, requires_grad=True)
    layer(x)[0, :, 5, 5].sum().backward()
    rows, columns = (x.grad[0].abs().sum(0) > 0).nonzero().T
    assert (rows.min(), rows.max(), columns.min(), columns.max()) == (3, 7, 3, 7)


def test_upsampling_carries_a_ramp_from_corner_to_corner():
    small, large = (torch.linspace(0, 1, n).view(1, 1, 1, n).expand(1, 1, 3, n) for n in (4, 10))
    torch.testing.assert_close(_upsample(small, size=large.shape[-2:]), large)


def test_zero_init_residual_lets_every_residual_block_begin_as_its_shortcut():
    for zero in (True, False):
        blocks = [
            module for module in network(zero_init_residual=zero).modules() if isinstance(module, BasicBlock | BR)
        ]
        changed = []
        for block in blocks:
            x = torch.rand(2, block.conv1.in_channels, 6, 6)
            shortcut = getattr(block, "downsample", None) or nn.Identity()
            changed.append(not torch.equal(block(x), shortcut(x).relu()))
        assert len(blocks) == 8 + 9 and changed == [not zero] * 17


@pytest.mark.parametrize("head", HEADS)
def test_zero_init_heads_lets_the_logits_begin_at_zero_whatever_the_maps(head):
    for zero in (True, False):
        model = network(head=head, kernel_size=3, boundary_refinement=False, zero_init_heads=zero)
        assert not [name for name in model.state_dict() if name.startswith("br")]
        logits = model(100 * torch.randn(2, 3, 32, 32))
        assert bool(logits.any()) != zero
        nn.functional.cross_entropy(logits, torch.zeros(2, 32, 32, dtype=torch.long)).backward()
        assert model.gcn4.state_dict().keys() and any(p.grad.any() for p in model.gcn4.parameters())  # it learns


def test_dropout_exists_only_above_zero_and_only_in_training():
    assert not [m for m in network().modules() if isinstance(m, nn.Dropout2d)]
    model, x = network(dropout_rate=0.5), torch.randn(1, 3, 32, 32)
    assert torch.equal(model.eval()(x), model(x))
    for module in model.modules():
        if isinstance(module, nn.Dropout2d):
            module.train()
    assert not torch.equal(model(x), model(x))


@pytest.mark.parametrize("options", [{"kernel_size": 4}, {"kernel_size": 1}, {"encoder": "nonesuch"}], ids=str)
def test_options_out_of_range_are_named_with_what_is_allowed(options):
    ((key, value),) = options.items()
    with pytest.raises(UserError, match=rf"{key} is '?{value}'?; allowed: "):
        network(**options)


def original_state_dict() -> dict[str, torch.Tensor]:
    """The tensors of the original implementation's checkpoint: ours, and a batch norm in every BR that nothing uses."""
    state = network(num_classes=21).state_dict()
    for block in range(1, 10):
        for name, tensor in nn.BatchNorm2d(21).state_dict().items():
            state[f"br{block}.bn.{name}"] = tensor
    return state


def as_the_original(model: FCN_GCN, x: torch.Tensor) -> torch.Tensor:
    """The original implementation's way through the same layers: br9 works at twice the size of the stem's map."""

    def resized(x: torch.Tensor, **size) -> torch.Tensor:
        return nn.functional.interpolate(x, **size, mode="bilinear", align_corners=True)

    stem = model.relu(model.bn0(model.conv1(x)))
    maps = [stem]
    for stage in (model.layer1, model.layer2, model.layer3, model.layer4):
        maps.append(stage(maps[-1]))
    scores = [getattr(model, f"br{i}")(getattr(model, f"gcn{i}")(maps[i])) for i in (1, 2, 3, 4)]
    s1, s2, s3, y = scores
    for br, score in ((model.br5, s3), (model.br6, s2), (model.br7, s1)):
        y = br(score + resized(y, size=score.shape[2:]))
    y = model.br9(resized(model.br8(y), scale_factor=2))
    return resized(y, size=x.shape[2:])


@pytest.mark.parametrize("size", [(64, 96), (97, 64), (33, 65)], ids=str)
def test_the_network_computes_what_the_original_computes_also_at_odd_sides(size):
    model, x = network(num_classes=21).eval(), torch.randn(2, 3, *size)
    with torch.no_grad():
        assert torch.equal(model(x), as_the_original(model, x))


def test_a_checkpoint_of_the_original_implementation_loads():
    state, model = original_state_dict(), network(num_classes=21)
    load_weights(model, state, "original.pth.tar")
    assert all(torch.equal(tensor, state[name]) for name, tensor in model.state_dict().items())


def test_a_tensor_that_is_surplus_missing_or_of_another_shape_is_refused_by_name():
    state = original_state_dict()
    for surplus in ("br10.bn.weight", "fc.weight"):
        with pytest.raises(UserError, match=re.escape(f'Unexpected key(s) in state_dict: "{surplus}"')):
            load_weights(network(num_classes=21), state | {surplus: torch.zeros(1)}, "x.pth.tar")
    with pytest.raises(UserError, match=r"mismatch for gcn1\.conv_l1\.weight: .*\[21, 64, 7, 1\]"):
        load_weights(network(), state, "x.pth.tar")
    del state["gcn3.conv_r1.bias"]
    with pytest.raises(UserError, match=r'x\.pth\.tar .*Missing key\(s\) in state_dict: "gcn3\.conv_r1\.bias"'):
        load_weights(network(num_classes=21), state, "x.pth.tar")
