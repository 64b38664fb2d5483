"""The cost tables of docs/scale.md: formulas against numbers worked out by hand, and the document itself."""

from dataclasses import replace

import pytest
from places import ROOT

from benchmarks import costs
from benchmarks.costs import Cost, Prices, Rates

DOCUMENT = ROOT / "docs" / "scale.md"
RATES = Rates(jpeg_bytes=0.5, shard_pixels=1e7, gpu_fp32=1e13, gpu_bf16=1e14, utilisation=0.5)


@pytest.fixture(scope="module")
def movi():
    work = costs.workloads()[0]
    assert work.name == "MOVi-E"
    return work


def test_bytes_of_movi(movi):
    assert (movi.clips, movi.full_clips, movi.shards) == (9749 * 6, 9749 * 6, 610)
    shard, cache = costs.shard_cost(movi, RATES), costs.cache_cost(movi, RATES)
    assert shard.stored == shard.written == cache.read == 9749 * 24 * 336 * 336 * 0.5
    assert movi.target_bytes == 4 * 15 * 128 * 4 == 30_720
    assert cache.stored == 58_494 * 4 * 30_720  # four views


def test_requests_of_movi(movi):
    # 225,792 bytes a clip: 5 of them reach 1 MiB, so a video's 6 are two row groups.
    assert costs.row_groups(movi, RATES) == (9749 * 2, 3 * 225_792)
    assert costs.target_group_rows(movi) == 8  # the views of two clips
    shard = costs.shard_cost(movi, RATES)
    assert shard.puts == 610 * (3 + 2) + 4  # 21.6 MB a shard, in three parts
    assert shard.gets == 2 * 9749 + 610 * 2
    cache = costs.cache_cost(movi, RATES)
    assert cache.puts == 610 * (2 + 2) + 2  # 11.8 MB a shard, in two parts
    assert cache.gets == (2 + 2) * 610 + 19_498
    # All footers are 670 bytes for each of 19,498 row groups, 890 for each of 29,247; 4 MiB of each are remembered.
    forgotten = (1 - 4 * 2**20 / (670 * 19_498)) + (1 - 4 * 2**20 / (890 * 29_247))
    distill = costs.distill_cost(movi, RATES)
    assert distill.gets == pytest.approx(4_800_000 * (2 + 2 * forgotten))
    assert distill.read == pytest.approx(4_800_000 * (3 * 225_792 + 8 * 30_720 + forgotten * 65_536))


@pytest.mark.parametrize(
    ("mib", "requests"),
    [(1, 1), (8, 1), (9, 4), (120, 17), (8000, 1002), (8001, 1003), (8016 + 16 * 999, 2002)],
)
def test_large_files_go_up_in_parts(mib, requests):
    assert costs.upload_requests(mib * 2**20) == requests


def test_multiply_accumulates_of_the_teachers_backbone(movi):
    """ViT-B/14 at 336: 576 patches and a class token, 12 blocks of width 768."""
    tokens, width = 577, 768
    block = 12 * width * width * tokens + 2 * tokens * tokens * width
    a_frame = 12 * block + 576 * 14 * 14 * 3 * width
    backbone, rest = costs._encoder_macs(movi.models[0], 4)
    assert backbone == pytest.approx(4 * a_frame, rel=1e-3)
    assert 0 < rest < 0.1 * backbone


def test_hours(movi):
    shard = costs.shard_cost(movi, RATES)
    assert shard.core_hours == pytest.approx(9749 * 24 * 336 * 336 / 1e7 / 3600)
    cache = costs.cache_cost(movi, RATES)
    assert cache.gpu_hours == pytest.approx(58_494 * 4 * costs.teacher_macs(movi) * 2 / 5e12 / 3600)
    half = costs.cache_cost(movi, replace(RATES, utilisation=0.25))
    assert half.gpu_hours == pytest.approx(2 * cache.gpu_hours)


def test_dollars():
    cost = Cost("any", stored=2e9, puts=1000, gets=10_000, core_hours=3, gpu_hours=2)
    prices = Prices(gpu_hour=10, core_hour=0.1, gb_month=0.02, put=0.001, get=0.0001)
    assert cost.dollars(prices) == pytest.approx(2 * 10 + 3 * 0.1 + 1 + 1)
    assert cost.dollars_a_month(prices) == pytest.approx(0.04)


@pytest.mark.parametrize(
    ("value", "unit", "text"),
    [(0, "", "–"), (7.02, "", "7"), (0.25, "", "0.25"), (58_494, "", "58 k"), (9.77e9, "B", "9.8 GB")],
)
def test_amounts(value, unit, text):
    assert costs.amount(value, unit) == text


def test_the_document_holds_what_the_code_prints():
    block = DOCUMENT.read_text().split("<!-- costs -->\n")[1].split("\n<!-- /costs -->")[0]
    assert block == costs.document_block()
