"""Weights in every format: what is kept, given out, multiplied and saved, and how a matrix changes its format."""

import numpy as np
import pytest
import torch
from models import TINY, native_only, random_target
from torch import Tensor, nn

from gemma_mtp.backend.native import Memory, floats
from gemma_mtp.weights.base import SCALES, Weight
from gemma_mtp.weights.blocks import KINDS, from_blocks
from gemma_mtp.weights.dense import Dense
from gemma_mtp.weights.device_order import Reordered
from gemma_mtp.weights.formats import FORMATS
from gemma_mtp.weights.fp8 import Fp8
from gemma_mtp.weights.grouped import Grouped
from gemma_mtp.weights.int8 import Int8
from gemma_mtp.weights.matrix import Embedding, Linear, Matrix, matrices
from gemma_mtp.weights.panels import Panels

ALL = [pytest.param(form, marks=native_only if form is Panels else (), id=form.format) for form in FORMATS.values()]
GROUPED = [form for form in FORMATS.values() if issubclass(form, Grouped)]


def randn(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def made(form: type[Weight], *shape: int) -> Weight:
    weight = Dense(randn(*shape).bfloat16())
    assert form.fits(weight)
    return form.of(weight)


@pytest.mark.parametrize("form", ALL)
@torch.inference_mode()
def test_the_interface_agrees_with_itself(form: type[Weight]) -> None:
    """Rows, parts, products and the whole matrix are of the same values."""
    weight, x = made(form, 144, 128), randn(3, 128, seed=1)
    values, dense = weight.values(), weight.dense()
    assert weight.shape == values.shape == dense.shape == (144, 128)
    assert weight.dtype == dense.dtype == torch.bfloat16
    assert (weight.numel(), weight.ndim, weight.device.type) == (144 * 128, 2, "cpu")
    assert weight.nbytes == sum(tensor.nbytes for tensor in weight.kept().values()) > 0
    assert torch.equal(dense, values.bfloat16())
    ids = torch.tensor([[143, 0], [7, 7]])
    assert torch.equal(weight.rows(ids), dense[ids])
    assert torch.equal(weight[ids].values(), values[ids])
    assert torch.equal(weight[3:40].dense(), dense[3:40])
    parts = weight.split([100, 0, 44])
    assert [len(part.dense()) for part in parts] == [100, 0, 44]
    assert torch.equal(torch.cat([part.dense() for part in parts]), dense)
    out = weight.linear(x.to(values.dtype))
    torch.testing.assert_close(out, x.to(values.dtype) @ values.T)
    picked = weight.gathered_linear(x.to(values.dtype), torch.tensor([[1, 5], [2, 2], [143, 0]]))
    torch.testing.assert_close(picked[2], out[2, [143, 0]])


@pytest.mark.parametrize("form", ALL)
def test_a_weight_takes_values_where_it_lies(form: type[Weight]) -> None:
    weight, other = made(form, 144, 128), randn(144, 128, seed=2).bfloat16()
    places = [tensor.data_ptr() for tensor in weight.kept().values()]
    weight.copy_(other)
    assert [tensor.data_ptr() for tensor in weight.kept().values()] == places
    assert torch.equal(weight.dense(), form.of(Dense(other)).dense())


@pytest.mark.parametrize("form", ALL)
def test_what_is_saved_is_whole(form: type[Weight]) -> None:
    """Nothing empty, and enough to make the same weight of."""
    weight = made(form, 144, 128)
    saved = weight.saved("w")
    assert "w" in saved and saved.keys() <= {"w", "w" + SCALES}
    assert all(len(tensor) == 144 and tensor.numel() for tensor in saved.values())
    of_files = form.source if issubclass(form, Reordered) else form
    again = of_files(*saved.values()) if len(saved) > 1 else Dense(*saved.values())
    assert torch.equal(again.dense().bfloat16(), weight.dense())
    assert len(saved) == 1 or torch.equal(again.values(), weight.values())


@pytest.mark.parametrize("form", GROUPED, ids=lambda form: form.format)
def test_room_is_made_on_meta(form: type[Grouped]) -> None:
    with torch.device("meta"):
        linear = Linear(128, 16)
    linear.convert_(form)
    assert linear.stored.shape == (16, 128) and linear.stored.device.type == "meta"
    linear.to_empty(device="cpu")
    linear.stored.copy_(randn(16, 128))
    assert torch.equal(linear.stored.values(), form.of(Dense(randn(16, 128))).values())


def test_formats_have_names_of_their_own() -> None:
    assert {name: form.format for name, form in FORMATS.items()} == {name: name for name in FORMATS}
    assert {"dense", "panels", "int8", "int4"} <= FORMATS.keys()


# -- matrices


def filled(columns: int, rows: int) -> Linear:
    layer = Linear(columns, rows).bfloat16().requires_grad_(False)
    layer.weight.copy_(randn(rows, columns))
    return layer


@pytest.mark.parametrize("form", ALL[1:])
@torch.inference_mode()
def test_a_matrix_changes_its_format(form: type[Weight]) -> None:
    """Nothing is left of the dense weight, which can not be taken for an empty one; and all the way back."""
    table, ids = Embedding(144, 128).bfloat16(), torch.tensor([[3, 143], [0, 64]])
    table.weight.copy_(randn(144, 128))
    exact = table.weight.clone()
    table.convert_(form)
    expected = form.of(Dense(exact))
    assert list(table.parameters()) == [] and not hasattr(table, "weight")
    assert table.stored.format == form.format
    assert (table.dtype, table.device.type) == (torch.bfloat16, "cpu")
    assert torch.equal(table(ids), expected.rows(ids))
    stored = table.stored.kept()
    table.convert_(form)
    assert all(tensor is stored[name] for name, tensor in table.stored.kept().items())
    table.dequantise_()
    assert torch.equal(table.weight, expected.dense())
    assert table.stored.format == "dense" and list(table.buffers()) == []


@native_only
@torch.inference_mode()
def test_a_layer_in_panels_multiplies_with_the_same_bits() -> None:
    layer, x = filled(64, 48), randn(3, 64).bfloat16()
    expected = layer(x)
    layer.convert_(Panels)
    assert layer.stored.format == "panels"
    assert torch.equal(layer(x), expected)


@native_only
def test_a_matrix_in_panels_can_be_quantised() -> None:
    layer = filled(64, 48)
    expected = Int8.of(layer.stored)
    layer.convert_(Panels)
    layer.quantise_("int8")
    assert torch.equal(layer.stored.values(), expected.values())
    layer.convert_(Panels)  # which rounding has put out of reach
    layer.quantise_("int4")
    assert layer.stored.format == "int8"


@native_only
@pytest.mark.parametrize(
    ("N", "K", "dtype"), [(17, 32, torch.bfloat16), (16, 40, torch.bfloat16), (16, 32, torch.float32)]
)
def test_what_does_not_fit_into_panels_stays_as_it_is(N: int, K: int, dtype: torch.dtype) -> None:
    layer = Linear(K, N).to(dtype)
    weight = layer.weight
    layer.convert_(Panels)
    assert layer.stored.format == "dense" and layer.weight is weight


@pytest.mark.parametrize("form", ALL[1:])
def test_a_change_of_dtype_leaves_what_is_held(form: type[Weight]) -> None:
    """Scales keep their bits; what is given out takes the dtype. A checkpoint of the module's tensors has them all."""
    layer = filled(128, 48)
    layer.convert_(form)
    before = {name: tensor.clone() for name, tensor in layer.stored.kept().items()}
    values = layer.stored.values()
    layer.to(torch.float32)
    after = layer.stored.kept()
    assert [tensor.dtype for tensor in after.values()] == [tensor.dtype for tensor in before.values()]
    assert all(torch.equal(after[name], tensor) for name, tensor in before.items())
    assert layer.dtype == torch.float32 and torch.equal(layer.stored.dense(), values.float())
    assert {name.split(".")[-1] for name in layer.state_dict()} == set(before)


@pytest.mark.parametrize("form", ALL)
@torch.inference_mode()
def test_a_matrix_with_its_rows_in_another_order(form: type[Weight]) -> None:
    """Whatever is asked of it is answered as before, and it takes no more memory; in every format, and back."""
    table = Embedding(144, 128).bfloat16()
    table.weight.copy_(randn(144, 128))
    table.convert_(form)
    before, order, x = table.stored, torch.randperm(144, generator=torch.Generator().manual_seed(3)), randn(3, 128)
    table.order_rows_(order)
    stored, ids, picked = table.stored, torch.tensor([[143, 0], [7, 7]]), torch.tensor([[1, 5], [2, 2], [143, 0]])
    assert torch.equal(table.lying.dense(), before.dense()[order])
    assert (stored.shape, stored.dtype, stored.quantised) == (before.shape, before.dtype, before.quantised)
    assert stored.nbytes == before.nbytes == sum(tensor.nbytes for tensor in (*table.parameters(), *table.buffers()))
    assert torch.equal(table(ids), before.rows(ids))
    assert torch.equal(stored.dense(), before.dense()) and torch.equal(stored.values(), before.values())
    assert all(torch.equal(tensor, before.saved("w")[name]) for name, tensor in stored.saved("w").items())
    assert torch.equal(stored[ids].values(), before[ids].values())
    assert torch.equal(stored[3:40].dense(), before[3:40].dense())
    for one, other in zip(stored.split([100, 44]), before.split([100, 44]), strict=True):
        assert torch.equal(one.dense(), other.dense())
    x = x.to(before.values().dtype)
    torch.testing.assert_close(stored.linear(x), before.linear(x))
    assert torch.equal(stored.gathered_linear(x, picked), before.gathered_linear(x, picked))
    lying = table.lying.kept()
    table.order_rows_(order.clone())  # as another backend of the same model does
    assert all(tensor.data_ptr() == lying[name].data_ptr() for name, tensor in table.lying.kept().items())
    table.order_rows_(order.flip(0))
    assert torch.equal(table.stored.dense(), before.dense())
    stored.copy_(newer := randn(144, 128, seed=2).bfloat16())
    assert torch.equal(stored.dense(), form.of(Dense(newer)).dense())


@torch.inference_mode()
def test_a_matrix_in_another_order_can_be_quantised() -> None:
    table = Embedding(144, 128).bfloat16()
    table.weight.copy_(randn(144, 128))
    expected = Int8.of(table.stored).values()
    table.order_rows_(torch.arange(144).flip(0))
    table.quantise_("int8")
    assert isinstance(table.stored, Int8) and torch.equal(table.stored.values(), expected)


def test_matrices_finds_every_one() -> None:
    target = random_target(config=TINY)
    expected = [each for each in target.modules() if isinstance(each, Matrix)]
    assert matrices(target) == expected and len(expected) > 10
    assert matrices(nn.Linear(2, 2)) == []


# -- layouts


@native_only
@pytest.mark.parametrize(("N", "K"), [(16, 32), (64, 128), (64, 320), (144, 96), (208, 288)])
def test_the_order_of_panels(N: int, K: int) -> None:
    """Groups of 64 rows, parts of 128 columns, panels of 16 rows, and two columns after another."""
    w = randn(N, K).bfloat16()
    panels, order = Panels.of(Dense(w)), list[tuple[int, int]]()
    for group in range(0, N, 64):
        for part in range(0, K, 128):
            for panel in range(group, min(group + 64, N), 16):
                for k in range(part, min(part + 128, K), 2):
                    order += [(n, k + i) for n in range(panel, panel + 16) for i in range(2)]
    rows, columns = zip(*order, strict=True)
    assert torch.equal(panels.data.flatten(), w[list(rows), list(columns)])
    assert torch.equal(panels.dense(), w)
    indices = torch.tensor([[N - 1, 0, 7], [N // 2, N - 1, 1]])
    assert torch.equal(panels.rows(indices), w[indices])


@pytest.mark.parametrize("form", [form for form in GROUPED if form is not Fp8], ids=lambda form: form.format)
def test_quantising_rounds_to_the_nearest(form: type[Grouped]) -> None:
    w, group = randn(9, 128), form.group
    w[4, :group] = 0
    error = (form.of(Dense(w)).values() - w).abs().view(9, -1, group)
    largest = w.view(9, -1, group).abs().amax(-1, keepdim=True)
    assert (error[4, 0] == 0).all()
    if form.largest == 127:
        assert (error <= 0.501 * largest / 127).all()
    else:  # clipping the largest must have been worth it
        most = form.largest
        plain = (w.view(9, -1, group) / (largest / most).clamp(min=1e-30)).round() * largest / most
        assert (error.square().sum(-1) <= (plain - w.view(9, -1, group)).square().sum(-1) * 1.0001 + 1e-9).all()


def test_fp8_has_a_scale_a_row() -> None:
    """Its largest magnitude stays, all else is rounded to three binary digits after the first, and rows of zeros, and
    any number of columns, are no matter."""
    w = randn(9, 37)
    w[4] = 0
    weight = Fp8.of(Dense(w))
    largest, error = w.abs().amax(1, keepdim=True), (weight.values() - w).abs()
    assert torch.equal(weight.scales, largest / 448)
    assert (error <= torch.maximum(w.abs() / 16, weight.scales * 2.0**-10) * 1.001).all()
    torch.testing.assert_close(weight.values()[w.abs() == largest], w[w.abs() == largest])


# -- GGUF's blocks


def q8_0_blocks(scales: Tensor, values: Tensor) -> Tensor:
    """uint8 [N, G * 34] of float16 scales [N, G] and int8 values [N, G, 32]."""
    return torch.cat((scales.half()[..., None].view(torch.uint8), values.view(torch.uint8)), -1).flatten(1)


def q4_0_blocks(scales: Tensor, values: Tensor) -> Tensor:
    """uint8 [N, G * 18] of float16 scales [N, G] and values -8 .. 7 [N, G, 32]."""
    halves = (values + 8).to(torch.uint8)
    packed = halves[..., :16] | halves[..., 16:] << 4
    return torch.cat((scales.half()[..., None].view(torch.uint8), packed), -1).flatten(1)


def drawn(kind: str, rows: int, columns: int) -> tuple[Tensor, Tensor]:
    """Blocks with every value that a file may hold, scales of both signs, zero and subnormal; and their values."""
    lowest, highest, packed = {"Q8_0": (-128, 127, q8_0_blocks), "Q4_0": (-8, 7, q4_0_blocks)}[kind]
    generator = torch.Generator().manual_seed(rows * columns)
    values = torch.randint(lowest, highest + 1, (rows, columns // 32, 32), generator=generator, dtype=torch.int8)
    scales = torch.randn(rows, columns // 32, generator=generator).half().float()
    scales[0, 0], scales[-1, -1] = 0, 2.0**-24
    return packed(scales, values), (values * scales[..., None]).flatten(1)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("columns", [64, 640, 96])
def test_blocks_keep_every_value(kind: str, columns: int) -> None:
    """In a quantised format where its blocks fit, else as floats."""
    blocks, values = drawn(kind, 50, columns)
    weight = from_blocks(kind, blocks)
    assert weight.format == ("dense" if columns == 96 else {"Q8_0": "q8_0", "Q4_0": "int4"}[kind])
    assert weight.shape == values.shape
    assert torch.equal(weight.values(), values)
    assert torch.equal(weight.rows(torch.tensor([0, 49])), values[[0, 49]])
    experts = from_blocks(kind, blocks.view(5, 10, -1), torch.bfloat16)
    assert experts.shape == (5, 10, columns) and experts.dtype == torch.bfloat16
    assert torch.equal(experts.dense(), values.view(5, 10, columns).bfloat16())


@pytest.mark.parametrize("kind", KINDS)
def test_blocks_are_ggufs_own(kind: str) -> None:
    """What the gguf package writes and reads."""
    quants = pytest.importorskip("gguf.quants")
    import gguf

    form = gguf.GGMLQuantizationType[kind]
    random, w = drawn(kind, 30, 256)[0].numpy(), randn(30, 256).numpy()
    for blocks in (random, quants.quantize(w, form)):
        ours = from_blocks(kind, torch.from_numpy(blocks.copy())).values()
        assert np.array_equal(ours.numpy(), quants.dequantize(blocks, form))


@native_only
@pytest.mark.parametrize("kind", KINDS)
@torch.inference_mode()
def test_blocks_are_multiplied_natively(kind: str) -> None:
    """The extremes too, -128 and -8, which rounding never gives: exact where activations are whole numbers."""
    from gemma_mtp import _native

    blocks, _ = drawn(kind, 70, 1024)
    weight = from_blocks(kind, blocks)
    assert isinstance(weight, Grouped)
    weight.scales.copy_(2.0 ** torch.randint(-6, 3, weight.scales.shape, generator=torch.Generator().manual_seed(0)))
    x = torch.randint(-127, 128, (9, 1024), generator=torch.Generator().manual_seed(1)).float()
    x.view(9, -1, 32)[..., 0] = 127  # every group is rounded with a step of one
    x[0] = 127
    x[1] = -127
    exact, memory = x.double() @ weight.values().double().T, Memory()
    for isa in _native.isas():
        for rows in (1, 2, 9):
            out = torch.full((rows, 70), torch.nan)
            _native.linear(isa, memory.matrix(weight), floats(x), rows, floats(out))
            assert (out - exact[:rows]).abs().max() <= 1e-6 * exact.abs().max(), isa
