"""Sketches: what they say of models, and what they take."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

from p2pfl.runtime import sketch as module
from p2pfl.runtime.sketch import BLOCK, WIDTH, distances, sketch

LENGTHS = (1, WIDTH, WIDTH + 1, 5000, BLOCK, BLOCK + 1, 2 * BLOCK + 77)


@pytest.mark.parametrize("d", LENGTHS)
def test_sketches_are_linear_and_of_every_row_alone(d):
    params = torch.randn(3, d, dtype=torch.float64, generator=torch.Generator().manual_seed(d))
    found = sketch(params)
    assert found.shape == (3, WIDTH)
    torch.testing.assert_close(sketch(params[1:2]), found[1:2])
    torch.testing.assert_close(sketch(2 * params[:1] - params[2:]), 2 * found[:1] - found[2:])


@pytest.mark.parametrize("d", LENGTHS)
def test_every_number_counts_once_with_its_sign(d):
    signs = module._signs(d) if d > WIDTH else torch.ones(d)
    params = torch.arange(1.0, d + 1, dtype=torch.float64)
    expected = torch.zeros(WIDTH, dtype=torch.float64)
    expected.index_add_(0, torch.arange(d) % WIDTH, params * signs)
    torch.testing.assert_close(sketch(params.unsqueeze(0))[0], expected)


def test_signs_are_not_the_same_in_every_block():
    one, two, three = module._signs(3 * BLOCK).float().split(BLOCK)
    error = BLOCK**-0.5
    for some in (one, two, three, one * two, two * three, one * three, one[:-1] * one[1:]):
        assert abs(float(some.mean())) < 4 * error


def test_norms_are_kept_on_average():
    draw = torch.Generator().manual_seed(5)
    params = torch.randn(400, 3000, generator=draw)
    ratio = sketch(params).square().sum(1) / params.square().sum(1)
    spread = (2 / WIDTH) ** 0.5
    assert abs(float(ratio.mean()) - 1) < 4 * spread / 20
    assert 0.8 * spread < float(ratio.std()) < 1.2 * spread


def test_half_precision_is_summed_in_single():
    params = torch.ones(1, 4 * WIDTH, dtype=torch.bfloat16)
    assert sketch(params).dtype == torch.float32


def test_distances_pass_over_what_is_unknown():
    sketches = torch.zeros(3, WIDTH)
    sketches[0, 0], sketches[1, 0], sketches[2] = 1.0, -1.0, torch.nan
    assert distances(sketches)[:2].tolist() == [1.0, 1.0]


LARGE = """
from pathlib import Path
import torch
from p2pfl.runtime.sketch import sketch

def peak():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) / 1000

sketch(torch.ones(1, 1000))
params = torch.ones(1, 20_000_000)
before = peak()
sketch(params), sketch(params)
print(peak() - before)
"""


@pytest.mark.processes
@pytest.mark.skipif(sys.platform != "linux", reason="asks Linux how much memory was in use")
def test_the_sketch_of_a_large_model_takes_little_beside_it():
    done = subprocess.run([sys.executable, "-c", LARGE], capture_output=True, text=True, check=True)
    assert float(done.stdout) < 50  # MB: a byte for each of 20 million signs, and some blocks
