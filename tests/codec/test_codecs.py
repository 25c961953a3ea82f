"""What every codec must obey, and the constants that theory gives for each."""

from __future__ import annotations

import math

import pytest
import torch
from codec_cases import CASES
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from p2pfl import codec, rng
from p2pfl.codec import CODECS
from p2pfl.codec.bits import pack, unpack
from p2pfl.codec.wavelet import haar, inverse_haar, padded
from p2pfl.errors import RemoteProtocolError
from p2pfl.runtime import wire
from p2pfl.runtime.chunks import Arriving, Outgoing, schema
from p2pfl.runtime.wire import Header, Kind

LAWS = settings(max_examples=15, deadline=None)
D = 1000
SCALES = [1.0, 1e-30, 1e30]


def normal(rows: int, d: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> Tensor:
    made = torch.Generator().manual_seed(seed)
    return torch.randn(rows, d, generator=made, dtype=torch.float64).to(dtype)


def there_and_back(one: codec.Codec, block: Tensor, seed: int = 0) -> Tensor:
    keys = rng.keys(seed, torch.arange(len(block)))
    return one.decode(one.encode(block, keys), block.shape[1])


def lost(block: Tensor, after: Tensor) -> Tensor:
    """The share of each row's squared norm that is lost."""
    return (after - block).square().sum(1) / block.square().sum(1)


def test_the_table_of_cases_is_complete():
    assert {name.split()[0] for name in CASES} == CODECS.keys()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", CASES)
@LAWS
@given(d=st.integers(1, 40), seed=st.integers(0, 99), scale=st.sampled_from(SCALES))
def test_a_row_is_coded_by_itself_and_keeps_its_form(name, dtype, d, seed, scale):
    case, block = CASES[name], normal(3, d, seed, dtype) * scale
    given, keys = block.clone(), rng.keys(seed, torch.arange(3))
    packed = case.codec.encode(block, keys)
    after = case.codec.decode(packed, d)
    assert after.shape == block.shape
    assert after.dtype in (dtype, torch.promote_types(dtype, torch.float32))
    assert torch.equal(block, given)
    for i in range(3):
        alone = case.codec.encode(block[[i]], keys[[i]])
        for field, one in zip(packed, alone, strict=True):
            assert len(field) == 3
            torch.testing.assert_close(field[[i]], one, rtol=1e-6, atol=0)
        again = case.codec.decode(alone, d)
        assert torch.equal(again, case.codec.decode(case.codec.encode(block[[i]], keys[[i]]), d))
    if dtype is torch.float32:
        assert sum(field.nbytes for field in packed) == 3 * case.size(d)


@pytest.mark.parametrize("name", CASES)
def test_zero_is_zero(name):
    after = there_and_back(CASES[name].codec, torch.zeros(2, 20))
    assert torch.equal(after, torch.zeros(2, 20))


@pytest.mark.parametrize("name", CASES)
def test_lots_are_drawn_anew_for_every_key_and_for_nothing_else(name):
    block = normal(1, 60).expand(2, 60)
    one, other = there_and_back(CASES[name].codec, block)
    assert torch.equal(one, other) is not CASES[name].lots
    assert torch.equal(there_and_back(CASES[name].codec, block)[0], one)


# Keeping some entries.


@given(seed=st.integers(0, 99), k=st.integers(1, 12))
@LAWS
def test_top_k_keeps_the_largest_as_they_are(seed, k):
    block = normal(2, 12, seed)
    for one in (codec.top_k(k), codec.top_k(k, indices="bitmap")):
        after = there_and_back(one, block)
        assert ((after == block) | (after == 0)).all()
        assert ((after != 0).sum(1) == k).all()
        assert (lost(block, after) <= 1 - k / 12 + 1e-12).all()
        assert torch.equal(there_and_back(one, after), after)
        for before, row in zip(block.abs(), after, strict=True):
            assert k == 12 or before[row == 0].max() <= before[row != 0].min()


def test_top_k_loses_what_theory_says():
    flat = torch.sign(normal(1, D))
    torch.testing.assert_close(
        lost(flat, there_and_back(codec.top_k(100), flat)), torch.tensor([0.9]).double()
    )
    block = normal(200, D)
    for k, expected in ((100, 0.546), (10, 0.900)):
        # The mean of what normal entries beyond the quantile contribute, 2 (z phi(z) + Phi(-z)).
        z = float(torch.special.ndtri(torch.tensor(1 - k / D / 2).double()))
        kept = 2 * (z * math.exp(-z * z / 2) / math.sqrt(2 * math.pi)) + k / D
        assert float(lost(block, there_and_back(codec.top_k(k), block)).mean()) == pytest.approx(
            1 - kept, abs=0.01
        )
        assert 1 - kept == pytest.approx(expected, abs=0.02)  # of a single such row


@pytest.mark.parametrize("indices", ["list", "seed"])
def test_random_k_loses_its_share_in_the_mean(indices):
    block = normal(1, D).expand(2000, D)
    after = there_and_back(codec.random_k(share=0.1, indices=indices), block)
    each = lost(block, after)
    assert abs(float(each.mean()) - 0.9) < 4 * float(each.std()) / math.sqrt(2000)
    rescaled = lost(block, 10 * after)  # the unbiased form
    assert abs(float(rescaled.mean()) - 9.0) < 4 * float(rescaled.std()) / math.sqrt(2000)
    assert_unbiased(block[:, :50], 10 * after[:, :50])


def test_random_k_is_the_same_with_a_list_and_with_a_seed():
    block = normal(4, 50)
    one = there_and_back(codec.random_k(7), block)
    assert torch.equal(one, there_and_back(codec.random_k(7, indices="seed"), block))


# Fewer bits.


def assert_unbiased(block: Tensor, drawn: Tensor) -> None:
    error = (drawn - block).mean(0)
    spread = drawn.std(0) / math.sqrt(len(drawn))
    assert float((error.abs() / spread.clamp(min=1e-12)).max()) < 4.2  # the largest of fifty


@pytest.mark.parametrize(("levels", "measured"), [(4, 5.29), (127, 0.0104)])
def test_qsgd_is_unbiased_and_varies_as_little_as_promised(levels, measured):
    block = normal(1, D).expand(4000, D)
    after = there_and_back(codec.qsgd(levels), block)
    assert_unbiased(block[:, :50], after[:, :50])
    variance = float(lost(block, after).mean())
    assert variance <= min(D / levels**2, math.sqrt(D) / levels)
    assert variance == pytest.approx(measured, rel=0.05)


def test_a_bucket_of_qsgd_is_a_row_of_its_own():
    block = normal(1, 1024).expand(300, 1024)
    whole = float(lost(block, there_and_back(codec.qsgd(7), block)).mean())
    bucketed = float(lost(block, there_and_back(codec.qsgd(7, bucket=64), block)).mean())
    assert bucketed <= math.sqrt(64) / 7
    assert bucketed < whole / 3


def test_int8_is_unbiased_and_errs_by_less_than_a_level():
    block = normal(1, D).expand(4000, D)
    after = there_and_back(codec.int8(), block)
    level = float(block.abs().max()) / 127
    assert float((after - block).abs().max()) < level * (1 + 1e-12)
    assert float((after - block).square().sum(1).mean()) <= D * level**2 / 4
    assert_unbiased(block[:, :50], after[:, :50])
    largest = block[0].abs().argmax()  # is a level itself, and not clipped
    torch.testing.assert_close(after[:, largest], block[:, largest], rtol=1e-12, atol=0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_the_largest_entry_is_never_beyond_the_last_level(dtype):
    """Whatever the unit is rounded to."""
    block = normal(5000, 2, dtype=dtype)
    packed = codec.int8().encode(block, rng.keys(0, torch.arange(5000)))
    largest = block.abs().amax(1, keepdim=True).double()
    assert bool((packed.unit.double() * 127 >= largest).all())
    assert bool((packed.unit.double() * 127 <= largest * (1 + 1e-6)).all())


@given(seed=st.integers(0, 99), d=st.integers(1, 50), bucket=st.sampled_from([None, 7]))
@LAWS
def test_sign_loses_exactly_what_theory_says(seed, d, bucket):
    block = normal(2, d, seed)
    after = there_and_back(codec.sign(bucket), block)
    assert torch.equal(after > 0, block >= 0)
    for start in range(0, d, bucket or d):
        part = slice(start, start + (bucket or d))
        x, y = block[:, part], after[:, part]
        expected = 1 - x.abs().sum(1) ** 2 / (x.shape[1] * x.square().sum(1))
        torch.testing.assert_close(lost(x, y), expected, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("make", [codec.int8, codec.qsgd, codec.sign])
def test_a_bucket_larger_than_a_row_is_the_row(make):
    block = normal(3, 20)
    whole, bucketed = (there_and_back(make(bucket=size), block) for size in (None, 2**63 - 1))
    torch.testing.assert_close(bucketed, whole, rtol=0, atol=0)


def test_sign_of_normal_entries_and_of_zero():
    block = normal(400, D)
    loss = float(lost(block, there_and_back(codec.sign(), block)).mean())
    assert loss == pytest.approx(1 - 2 / math.pi, abs=0.005)
    some = torch.tensor([[0.0, -2.0, 4.0]])
    assert there_and_back(codec.sign(), some).tolist() == [[2.0, -2.0, 2.0]]


@pytest.mark.parametrize(("one", "bits"), [(codec.half(), 11), (codec.bfloat16(), 8)])
@pytest.mark.parametrize("scale", [1.0, 1e-30, 1e6, 1e37])
def test_two_bytes_err_by_half_of_their_last_bit(one, bits, scale):
    block = normal(3, D, dtype=torch.float32) * scale
    error = (there_and_back(one, block) - block).abs()
    assert bool((error <= block.abs() * 2.0**-bits).all())
    assert bool((error > block.abs() * 2.0 ** -(bits + 2)).any())


def test_half_neither_overflows_nor_loses_small_differences():
    block = torch.tensor([[1e30, 1e21, 0.0], [65504.0, 1.0, -65520.0], [1e-20, -3e-21, 0.0]])
    after = there_and_back(codec.half(), block)
    torch.testing.assert_close(after, block, rtol=2**-11, atol=2**-39 * 1e30)
    torch.testing.assert_close(after[1:], block[1:], rtol=2**-11, atol=0)


# Wavelets.


@given(seed=st.integers(0, 99), d=st.integers(1, 70), levels=st.integers(1, 5))
@LAWS
def test_the_haar_transform_is_an_isometry(seed, d, levels):
    block = normal(2, d, seed)
    coefficients = haar(block, levels)
    assert coefficients.shape == (2, padded(d, levels))
    assert padded(d, levels) % 2**levels == 0
    torch.testing.assert_close(coefficients.norm(dim=1), block.norm(dim=1), rtol=1e-12, atol=0)
    back = inverse_haar(coefficients, levels)
    torch.testing.assert_close(back[:, :d], block, rtol=1e-11, atol=1e-12)
    torch.testing.assert_close(back[:, d:], torch.zeros_like(back[:, d:]), rtol=0, atol=1e-12)
    k = max(1, padded(d, levels) // 3)
    after = there_and_back(codec.wavelet(k, levels=levels), block)
    assert bool((lost(block, after) <= 1 - k / padded(d, levels) + 1e-12).all())


def test_wavelets_say_in_few_numbers_what_is_alike():
    steps = normal(1, 8).repeat_interleave(16, dim=1)
    after = there_and_back(codec.wavelet(8, levels=4), steps)
    torch.testing.assert_close(after, steps)
    assert float(lost(steps, there_and_back(codec.top_k(8), steps))) > 0.5
    coarse = haar(torch.tensor([[1.0, 1.0, 1.0, 1.0, 2.0, 0.0, 0.0, 0.0]]).double(), 2)
    expected = torch.tensor([[2.0, 1.0, 0.0, 1.0, 0.0, 0.0, math.sqrt(2), 0.0]]).double()
    torch.testing.assert_close(coarse, expected)


# What arrives.


@given(bits=st.integers(1, 8), count=st.integers(1, 30), seed=st.integers(0, 99))
@LAWS
def test_bits_come_back(bits, count, seed):
    made = torch.Generator().manual_seed(seed)
    numbers = torch.randint(0, 2**bits, (3, count), generator=made, dtype=torch.uint8)
    octets = pack(numbers, bits)
    assert octets.shape == (3, math.ceil(bits * count / 8))
    assert torch.equal(unpack(octets, bits, count), numbers)
    as_ints = [int.from_bytes(bytes(row.tolist()), "little") for row in octets]
    expected = [sum(n << (bits * i) for i, n in enumerate(row)) for row in numbers.tolist()]
    assert as_ints == expected


def packed(one: codec.Codec, d: int = 12) -> tuple:
    return one.encode(normal(1, d, dtype=torch.float32), rng.keys(0, torch.tensor([0])))


LISTED, MARKED = codec.top_k(3), codec.top_k(3, indices="bitmap")
WRONG = {
    "a column below": (LISTED, {"columns": torch.tensor([[-1, 2, 3]]).int()}),
    "a column beyond": (LISTED, {"columns": torch.tensor([[1, 2, 12]]).int()}),
    "a column twice": (LISTED, {"columns": torch.tensor([[2, 2, 3]]).int()}),
    "columns out of order": (LISTED, {"columns": torch.tensor([[3, 2, 1]]).int()}),
    "fewer columns": (LISTED, {"columns": torch.tensor([[1, 2]]).int()}),
    "more marks": (MARKED, {"marks": torch.tensor([[15, 0]]).to(torch.uint8)}),
    "fewer marks": (MARKED, {"marks": torch.tensor([[3, 0]]).to(torch.uint8)}),
    "marks beyond": (MARKED, {"marks": torch.tensor([[3, 128]]).to(torch.uint8)}),
    "fewer bytes of marks": (MARKED, {"marks": torch.tensor([[7]]).to(torch.uint8)}),
    "a coefficient beyond": (codec.wavelet(1, levels=2), {"columns": torch.tensor([[12]]).int()}),
    "minus 128": (codec.int8(), {"values": torch.full((1, 12), -128).to(torch.int8)}),
    "fewer numbers": (codec.int8(), {"values": torch.zeros(1, 11).to(torch.int8)}),
    "a unit below zero": (codec.int8(), {"unit": torch.tensor([[-1.0]])}),
    "more units": (codec.int8(), {"unit": torch.ones(1, 2)}),
    "fewer units": (codec.int8(bucket=5), {"unit": torch.ones(1, 2)}),
    "a level beyond": (codec.qsgd(4), {"values": torch.full((1, 6), 0x99).to(torch.uint8)}),
    "fewer bytes of levels": (codec.qsgd(4), {"values": torch.zeros(1, 5).to(torch.uint8)}),
    "a norm below zero": (codec.qsgd(4), {"unit": torch.tensor([[-1.0]])}),
    "signs beyond": (codec.sign(), {"values": torch.full((1, 2), 0xFF).to(torch.uint8)}),
    "a mean below zero": (codec.sign(), {"unit": torch.tensor([[-1.0]])}),
    "fewer halves": (codec.half(), {"values": torch.zeros(1, 11).half()}),
    "a power below zero": (codec.bfloat16(), {"unit": torch.tensor([[-1.0]])}),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_nobody_sends_is_refused(name):
    one, changes = WRONG[name]
    message = packed(one)
    one.decode(message, 12)
    with pytest.raises(ValueError, match=r".+"):
        one.decode(message._replace(**changes), 12)


@pytest.mark.parametrize("name", CASES)
def test_every_message_travels_and_only_finite_numbers_do(name):
    message = packed(CASES[name].codec, 50)
    header, form = Header(Kind.CHUNK, b"12345678", 2, 1, 7, 2, 0.5), schema(message)

    def travel(message):
        arriving = Arriving(header, form)
        frames = Outgoing(header, message).chunk(0)
        arriving.take(wire.unpack(bytes(frames[0])), [memoryview(bytes(f)) for f in frames[1:]])
        return arriving.received()

    come = travel(message)
    assert type(come.message) is type(message)
    assert all(map(torch.equal, come.message, message))
    assert form.nbytes == CASES[name].size(50)
    for field, block in message._asdict().items():
        for bad in (math.inf, math.nan) if block.is_floating_point() else ():
            with pytest.raises(RemoteProtocolError, match="not finite"):
                travel(message._replace(**{field: torch.full_like(block, bad)}))


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("bad", [math.inf, math.nan])
def test_a_model_that_has_diverged_is_not_made_finite(name, bad):
    """The next loss tells; what is sent to others is refused there."""
    block = torch.full((2, 16), bad)
    if "random_k" not in name:
        block[:, 3:] = 1.0
    assert not there_and_back(CASES[name].codec, block).isfinite().all()


MISTAKES = [
    (codec.top_k, {}, "either k"),
    (codec.top_k, {"k": 0}, "k = 0"),
    (codec.random_k, {"share": 1.5}, "share = 1.5"),
    (codec.wavelet, {"k": 3, "share": 0.1}, "either k"),
    (codec.wavelet, {"k": 3, "levels": 0}, "levels = 0"),
    (codec.qsgd, {"levels": 128}, "levels = 128"),
    (codec.qsgd, {"bucket": 0}, "bucket = 0"),
    (codec.int8, {"bucket": -1}, "bucket = -1"),
    (codec.sign, {"bucket": 0}, "bucket = 0"),
]


@pytest.mark.parametrize(("factory", "values", "words"), MISTAKES)
def test_mistakes_are_named(factory, values, words):
    with pytest.raises(ValueError, match=words):
        factory(**values)
