"""The dense product onto a y that holds the bypass: one rounding, whatever the processor knows."""

from __future__ import annotations

import pytest
import torch

from neuroada_kernels.backends import _dense

SIXTEEN = {"bfloat16": torch.bfloat16, "float16": torch.float16}


@pytest.mark.parametrize("tokens", [8, 21])  # a whole block of tokens, and two and a half
@pytest.mark.parametrize("bias", [False, True], ids=["", "bias"])
@pytest.mark.parametrize("known", [True, False], ids=["by oneDNN", "widened"])
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_product_and_bias_join_before_the_rounding(dtype, known, bias, tokens, monkeypatch):
    dtype = SIXTEEN[dtype]
    if known and not _dense.has_onednn_gemm(dtype):
        pytest.skip("oneDNN does not multiply this dtype here")
    monkeypatch.setattr(_dense, "has_onednn_gemm", lambda dtype: known)
    monkeypatch.setattr(_dense, "_BLOCK_BYTES", 8 * 2 * 49)
    monkeypatch.setattr(_dense, "_WIDENED_BYTES", (1 << 12, 1 << 12))  # some columns at a time
    torch.manual_seed(0)
    y, x, weight = (torch.randn(s).to(dtype) for s in ((tokens, 49), (tokens, 33), (33, 49)))
    joins = torch.randn(49).to(dtype) if bias else None
    exact = y.double() + x.double() @ weight.double() + (joins.double() if bias else 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        result = _dense.add_dense(y.clone(), x, weight, joins)
    assert result.dtype == dtype
    half_a_place = exact.abs() * torch.finfo(dtype).eps / 2
    assert ((result.double() - exact).abs() <= half_a_place + 1e-5).all()


@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_bias_may_have_any_stride(dtype):
    dtype = SIXTEEN[dtype]
    y, x, weight = (torch.randn(s).to(dtype) for s in ((5, 6), (5, 8), (8, 6)))
    for bias in (torch.randn(12).to(dtype)[::2], torch.ones(1).to(dtype).expand(6)):
        found = _dense.add_dense(y.clone(), x, weight, bias)
        assert found.equal(_dense.add_dense(y.clone(), x, weight, bias.clone()))


@pytest.mark.parametrize("sizes", [(5, 33, 7), (0, 33, 7), (5, 0, 7), (5, 33, 0)], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_a_wide_product_is_not_rounded_to_its_operands(dtype, sizes):
    tokens, m, n = sizes
    x, weight = (torch.randn(shape).to(SIXTEEN[dtype]) for shape in ((tokens, m), (n, m)))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        wide = _dense.wide_product(x, weight.t())
    assert wide.dtype == torch.float32
    assert wide.shape == (tokens, n)
    torch.testing.assert_close(wide, (x.double() @ weight.double().t()).float())


@pytest.mark.parametrize("sizes", [(5, 33, 7), (0, 33, 7), (5, 0, 7), (5, 33, 0)], ids=str)
def test_a_float32_product_with_a_bias_is_that_of_a_linear(sizes):
    tokens, m, n = sizes
    x, weight, bias = torch.randn(tokens, m), torch.randn(n, m), torch.randn(n)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = _dense.wide_product(x, weight.t(), bias)
    assert found.equal(torch.nn.functional.linear(x, weight, bias))


@pytest.mark.parametrize("bias", [None, *SIXTEEN.values()], ids=str)
@pytest.mark.parametrize("dtype", SIXTEEN)
def test_what_is_added_to_a_wide_product_joins_before_the_rounding(dtype, bias, monkeypatch):
    monkeypatch.setattr(_dense, "_WIDE_TOKENS", 8)
    monkeypatch.setattr(_dense, "_WIDE_BYTES", 1)
    y, x, weight = (torch.randn(s).to(SIXTEEN[dtype]) for s in ((21, 49), (21, 33), (33, 49)))
    joins = None if bias is None else torch.randn(49).to(bias)
    exact = y.double() + x.double() @ weight.double() + (0 if joins is None else joins.double())
    result = _dense._add_dense_wide(y, x, weight, joins)
    assert result is y
    half_a_place = exact.abs() * torch.finfo(y.dtype).eps / 2
    assert ((y.double() - exact).abs() <= half_a_place + 1e-5).all()


@pytest.mark.parametrize("width", [0, 1, 1024, 14336, 15000, 1 << 20])
@pytest.mark.parametrize("tokens", [0, 1, 255, 1025, 8000, 8192])
def test_parts_of_a_wide_product_fit_and_are_even(tokens, width):
    parts = list(_dense.wide_parts(tokens, width))
    assert [t for part in parts for t in range(part.start, part.stop)] == list(range(tokens))
    sizes = [part.stop - part.start for part in parts]
    for size in sizes:
        assert size <= 256 or 4 * width * size <= 56 << 20
    assert all(size == sizes[0] and size % 256 == 0 for size in sizes[:-1])
    most = max(1, (56 << 20) // (4 * max(1, width) * 256)) * 256
    assert len(parts) <= -(-tokens // most)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_a_bias_of_32_bits_and_more_joins_the_bypass_and_one_of_16_the_product(dtype):
    wide, narrow = torch.zeros(4, dtype=dtype), torch.zeros(4, dtype=torch.bfloat16)
    assert _dense.bias_for_bypass(wide) == (wide, None)
    assert _dense.bias_for_bypass(narrow) == (None, narrow)
