"""Number formats: precision, layout and refused shapes."""

import numpy as np
import pytest

from osmium.errors import ConfigError
from osmium.quant import int4, int8
from osmium.quant.expert_layout import ExpertLayout, group_of
from osmium.quant.floats import (
    bf16_from_f32,
    e4m3_from_f32,
    f32_from_bf16,
    f32_from_e4m3,
    quantize_e4m3_rows,
)


def test_every_bf16_survives_the_round_trip() -> None:
    every = np.arange(1 << 16, dtype=np.uint16)
    back = bf16_from_f32(f32_from_bf16(every))
    nan = np.isnan(f32_from_bf16(every))
    assert np.array_equal(back[~nan], every[~nan])
    assert np.isnan(f32_from_bf16(back[nan])).all()


def test_bf16_rounds_to_nearest_and_ties_to_even() -> None:
    one = 1.0 + np.array([0, 2**-8, 3 * 2**-8, 2**-8 + 2**-20, 2**-8 - 2**-20])
    wanted = 1.0 + np.array([0, 0, 2**-6, 2**-7, 0])
    assert np.array_equal(f32_from_bf16(bf16_from_f32(one.astype(np.float32))), wanted)
    assert f32_from_bf16(bf16_from_f32(np.array([3.4e38], np.float32)))[0] == np.inf


def test_every_e4m3_survives_the_round_trip() -> None:
    every = np.arange(256, dtype=np.uint8)
    value = f32_from_e4m3(every)
    assert np.isnan(value[every & 0x7F == 0x7F]).all() and np.isnan(value).sum() == 2
    assert value[np.array([0x00, 0x01, 0x08, 0x38, 0x7E])].tolist() == [0, 2**-9, 2**-6, 1, 448]
    back = e4m3_from_f32(value)
    assert np.array_equal(back, every)
    # an exponent 120 higher makes each a bf16, like the kernels do
    moved = (every.astype(np.uint32) & 0x7F) << 20 | (every.astype(np.uint32) & 0x80) << 24
    finite = ~np.isnan(value)
    assert np.array_equal(moved.view(np.float32)[finite] * np.float32(2.0**120), value[finite])


def test_e4m3_rounds_to_nearest_and_ties_to_even(rng: np.random.Generator) -> None:
    known = f32_from_e4m3(np.arange(127, dtype=np.uint8))
    ties = ((known[1:] + known[:-1]) / 2).astype(np.float32)
    even = np.where(np.arange(126) % 2, known[1:], known[:-1])
    assert np.array_equal(f32_from_e4m3(e4m3_from_f32(ties)), even)
    x = np.exp(rng.uniform(-8, 6.1, 4096)) * rng.choice([-1, 1], 4096)
    x = x.astype(np.float32)
    found = f32_from_e4m3(e4m3_from_f32(x))
    near = np.abs(np.abs(x)[:, None] - known).min(axis=1)
    assert np.array_equal(np.abs(x - found), near)
    assert f32_from_e4m3(e4m3_from_f32(np.array([1e9, -np.inf], np.float32))).tolist() == [
        448,
        -448,
    ]


def test_e4m3_rows_have_scales_that_cover_their_range(rng: np.random.Generator) -> None:
    x = rng.standard_normal((9, 64)).astype(np.float32)
    x *= np.float32(10.0) ** np.arange(-6, 3, dtype=np.float32)[:, None]
    code, scale = quantize_e4m3_rows(x)
    found = f32_from_e4m3(code) * scale.astype(np.float32)[:, None]
    most = np.maximum(np.abs(x) / 16, np.abs(x).max(axis=1, keepdims=True) / 2**18)
    assert (np.abs(found - x) <= 1.001 * np.maximum(most, 2.0**-24)).all()
    assert (scale >= 2.0**-14).all()
    code, scale = quantize_e4m3_rows(np.zeros((2, 64), np.float32))
    assert not code.any() and np.isfinite(scale).all()
    x[0, 0], x[1, 3], x[2, 5] = np.nan, -np.inf, 3e7  # too large for 448 times an f16 scale
    _, scale = quantize_e4m3_rows(x)
    assert np.isnan(scale[:2]).all() and scale[2] == 65504 and np.isfinite(scale[2:]).all()


def test_int4_nibbles_have_the_kernels_order() -> None:
    q = np.arange(8, dtype=np.uint8)[None]
    (word,) = int4.pack(q).view("<u4")[0]
    for i in range(4):
        pair = (word >> (4 * i)) & 0x000F000F
        assert (pair & 0xFFFF, pair >> 16) == (2 * i, 2 * i + 1)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_packing_round_trips(rng: np.random.Generator, group: int) -> None:
    q = rng.integers(0, 16, (3, 5, group), dtype=np.uint8)
    assert np.array_equal(int4.unpack(int4.pack(q)), q)


@pytest.mark.parametrize("group", [32, 64, 128])
def test_int4_error_is_below_round_to_nearest(rng: np.random.Generator, group: int) -> None:
    w = rng.standard_normal((64, 4 * group), np.float32)
    found = int4.dequantize(*int4.quantize(w, group))
    groups = w.reshape(64, 4, group)
    scale = np.abs(groups).max(axis=-1, keepdims=True) / 7
    plain = (np.clip(np.rint(groups / scale), -8, 7) * scale).reshape(w.shape)
    assert np.linalg.norm(found - w) < 0.95 * np.linalg.norm(plain - w)


def test_int4_keeps_a_group_of_zeros_and_a_single_value(rng: np.random.Generator) -> None:
    w = np.zeros((2, 256), np.float32)
    w[1, 130] = -0.37
    packed, scale = int4.quantize(w, 128)
    found = int4.dequantize(packed, scale)
    assert scale[0, 0] == scale[0, 1] == scale[1, 0] == 0
    assert np.array_equal(found[0], np.zeros(256)) and np.count_nonzero(found) == 1
    assert found[1, 130] == pytest.approx(-0.37, rel=1e-3)


def test_int4_refuses_groups_that_do_not_divide() -> None:
    with pytest.raises(ConfigError, match="96"):
        int4.quantize(np.zeros((1, 96), np.float32), 64)
    with pytest.raises(ConfigError, match="100"):
        group_of(100)
    assert [group_of(n) for n in (3072, 192, 96)] == [128, 64, 32]


def test_int8_error_is_at_most_half_a_step(rng: np.random.Generator) -> None:
    w = rng.standard_normal((9, 80), np.float32)
    w[4] = 0
    q, scale = int8.quantize(w)
    assert np.abs(int8.dequantize(q, scale) - w).max() <= scale.max() / 2 * 1.0001
    assert scale[4] == 0 and not q[4].any()


def test_a_packed_expert_of_122b_takes_1188_pages() -> None:
    assert ExpertLayout(4, 3072, 1024).nbytes == 1188 * 4096


@pytest.mark.parametrize("bits", [16, 8, 4])
def test_the_parts_of_an_expert_layout_do_not_overlap(bits: int) -> None:
    for hidden, inner in ((64, 32), (256, 64), (2048, 512), (4096, 1024)):
        r = ExpertLayout(bits, hidden, inner)
        scale = {16: 0, 8: 4, 4: 2}[bits]
        ups = 2 * inner * (hidden // r.up_group if bits == 4 else 1) * scale
        downs = hidden * (inner // r.down_group if bits == 4 else 1) * scale
        assert 2 * inner * hidden * bits // 8 <= r.up_scale
        assert r.up_scale + ups <= r.down
        assert r.down + hidden * inner * bits // 8 <= r.down_scale
        assert r.down_scale + downs <= r.nbytes < r.down_scale + downs + 4096
        assert all(x % 16 == 0 for x in (r.up_scale, r.down, r.down_scale))


def test_an_expert_layout_refuses_sizes_its_format_cannot_hold() -> None:
    with pytest.raises(ConfigError, match="5"):
        ExpertLayout(5, 64, 64)
    with pytest.raises(ConfigError, match="48"):
        ExpertLayout(4, 64, 48)
