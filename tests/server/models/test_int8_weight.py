"""Weights in int8: what one product is, and what memory it takes."""

from __future__ import annotations

import os
import subprocess
import sys
import weakref
from typing import TYPE_CHECKING

import pytest
import torch
from support.native import layer_ops
from support.rounding import rounded, spread_matrix

from kvfold_server.kv.backends.native import NativeBackend
from kvfold_server.models.int8_rows import Int8Kernels, PlainKernels, block_size
from kvfold_server.models.int8_weight import int8_refusal, quantize_weight
from kvfold_server.models.packed_weight import pack_weight

if TYPE_CHECKING:
    from kvfold_server.kv.native.layer_ops import LayerOps

DTYPES = [torch.float32, torch.bfloat16, torch.float16]
WIDTHS = [576, 96, 48, 7]
"""Blocks of 64, 32, 16 and 1: every vector size, the plain path included."""

ROWS = 300
"""Enough rows for several threads."""


@pytest.fixture(scope="module")
def ops() -> LayerOps:
    found = layer_ops(NativeBackend.name)
    assert found is not None
    return found


@pytest.fixture(params=["plain", "native"])
def kernels(request: pytest.FixtureRequest) -> Int8Kernels:
    if (reason := int8_refusal("cpu")) is not None:
        pytest.skip(reason)
    return PlainKernels() if request.param == "plain" else request.getfixturevalue("ops")


def random(*shape: int, dtype: torch.dtype = torch.float32, seed: int = 0) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)).to(dtype)


def relative_error(found: torch.Tensor, expected: torch.Tensor) -> float:
    return float((found.double() - expected.double()).norm() / expected.double().norm())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_is_that_of_what_int8_holds(kernels: Int8Kernels, width: int, dtype: torch.dtype) -> None:
    weight, bias = random(80, width, dtype=dtype), random(80, dtype=dtype, seed=1)
    hidden = random(2, ROWS, width, dtype=dtype, seed=2)
    found = quantize_weight(weight, kernels).multiply(hidden, bias)
    assert found.dtype == dtype
    expected = rounded(hidden) @ rounded(weight).T + bias.double()
    # Beside the last rounding, a value on the border of two steps may go either way.
    assert relative_error(found, expected) < torch.finfo(dtype).eps + 2e-4


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_product_is_close_to_the_exact_one(kernels: Int8Kernels, width: int, dtype: torch.dtype) -> None:
    weight, hidden = random(80, width, dtype=dtype), random(2, ROWS, width, dtype=dtype, seed=2)
    found = quantize_weight(weight, kernels).multiply(hidden, None)
    assert relative_error(found, hidden.double() @ weight.double().T) < 0.015


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", WIDTHS)
def test_a_row_in_8_bits_is_off_by_half_a_step_at_most(kernels: Int8Kernels, width: int, dtype: torch.dtype) -> None:
    hidden = 3 * random(ROWS, width, dtype=dtype)
    rows = kernels.quantize(hidden, block_size(width))
    turned = hidden.double() @ spread_matrix(width) * block_size(width) ** 0.5
    found = (rows.numbers.double() - 128) * rows.steps[:, None]
    assert bool(((found - turned).abs() <= 0.501 * rows.steps[:, None]).all())
    assert set(rows.numbers.double().sub(128).abs().amax(-1).tolist()) == {127}


def test_one_large_value_does_not_hide_the_others(kernels: Int8Kernels) -> None:
    hidden = random(ROWS, 576)
    hidden[:, 5] = 200.0
    weight = random(80, 576, seed=1)
    weight[:, 5] = 0.0  # so that all of the result comes from the others
    exact = hidden.double() @ weight.double().T
    step = 200.0 / 127
    without_spreading = (hidden / step).round() * step
    found = quantize_weight(weight, kernels).multiply(hidden, None)
    assert 3 * relative_error(found, exact) < relative_error(without_spreading.double() @ weight.double().T, exact)


def test_what_a_row_gets_does_not_depend_on_the_others_to_the_bit(kernels: Int8Kernels) -> None:
    weight = quantize_weight(random(96, 576), kernels)
    hidden = random(ROWS, 576, seed=1)
    together = weight.multiply(hidden, None)
    for rows in (slice(17, 18), slice(40, 48), slice(100, 164)):
        assert torch.equal(weight.multiply(hidden[rows], None), together[rows])


def test_some_outputs_are_the_same_numbers(kernels: Int8Kernels) -> None:
    weight, hidden = quantize_weight(random(96, 64), kernels), random(5, 64, seed=1)
    assert torch.equal(weight.outputs(32, 64).multiply(hidden, None), weight.multiply(hidden, None)[:, 32:64])


@pytest.mark.parametrize("outputs", [96, 5000])
def test_the_dense_weight_is_what_int8_holds(outputs: int) -> None:
    weight = random(outputs, 576)
    assert relative_error(quantize_weight(weight, PlainKernels()).dense(), rounded(weight)) < 2e-4


def test_zeros_stay_zeros(kernels: Int8Kernels) -> None:
    weight = random(80, 64)
    weight[3] = 0.0
    hidden = random(4, 64, seed=1)
    hidden[2] = 0.0
    found = quantize_weight(weight, kernels).multiply(hidden, None)
    assert not found[2].any()
    assert not found[:, 3].any()


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
def test_a_row_with_no_number_gives_none_and_leaves_the_others(kernels: Int8Kernels, value: float) -> None:
    weight, hidden = quantize_weight(random(80, 64), kernels), random(4, 64, seed=1)
    expected = weight.multiply(hidden, None)
    hidden[1, 40] = value
    found = weight.multiply(hidden, None)
    assert not found[1].isfinite().any()
    assert torch.equal(found[[0, 2, 3]], expected[[0, 2, 3]])


def test_no_rows_give_no_rows(kernels: Int8Kernels) -> None:
    assert quantize_weight(random(80, 64), kernels).multiply(random(1, 0, 64), None).shape == (1, 0, 80)


def test_rows_that_do_not_lie_side_by_side_are_taken_too(kernels: Int8Kernels) -> None:
    weight, hidden = quantize_weight(random(80, 64), kernels), random(9, 128, seed=1)
    assert torch.equal(weight.multiply(hidden[::2, :64], None), weight.multiply(hidden[::2, :64].contiguous(), None))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_native_rows_are_those_of_plain_torch(ops: LayerOps, dtype: torch.dtype) -> None:
    hidden = random(ROWS, 576, dtype=dtype)
    native, plain = ops.quantize(hidden, 64), PlainKernels().quantize(hidden, 64)
    torch.testing.assert_close(native.steps, plain.steps, rtol=1e-6, atol=0.0)
    differences = (native.numbers.int() - plain.numbers.int()).abs()
    assert int(differences.max()) <= 1  # on the border of two steps
    assert float(differences.float().mean()) < 1e-4


def test_int8_takes_half_the_memory_of_bf16_and_frees_it() -> None:
    packed = pack_weight(random(960, 576, dtype=torch.bfloat16), None)
    before = weakref.ref(packed.form)
    part = weakref.ref(packed.part(0, 576))
    form = quantize_weight(packed.form.dense(), PlainKernels())
    packed.change_form(form)
    assert before() is part() is None
    assert form.packed_bytes == 960 * 576 + 960 * 4
    hidden = random(3, 576, dtype=torch.bfloat16)
    assert torch.equal(packed.part(0, 576)(hidden), form.outputs(0, 576).multiply(hidden, None))


def test_a_device_without_int8_products_is_refused_with_the_reason() -> None:
    assert int8_refusal("cuda") == "int8 weights run on cpu, not on cuda"


def test_a_processor_whose_int8_products_overflow_is_refused() -> None:
    script = "from kvfold_server.models.int8_weight import int8_refusal; print(int8_refusal('cpu'))"
    environment = os.environ | {"ONEDNN_MAX_CPU_ISA": "AVX2"}  # what oneDNN does on a processor that has no more
    found = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True, env=environment)
    assert found.stdout.startswith("int8 weights need a processor with exact int8 products")
