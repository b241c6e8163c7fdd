"""benchmarks.scaling: a simulation on paper, held against what can be worked out by hand."""

import json
import math
import re

import pytest

from benchmarks.scaling import PER_NODE, WAYS, Cluster, Work, lines, simulate
from recipe.config import load_run_config
from tests.helpers.runs import ROOT

WORK = Work(blocks=[5_000_000] * 22, rest=40_000_000, microbatches=2, seconds=0.2, update=0.002)
NETWORK = 400e9  # bytes/s of a node: 3200 Gbit/s


@pytest.mark.parametrize("way", WAYS)
def test_one_gpu_sends_nothing(way: str) -> None:
    step, busy = simulate(way, WORK, Cluster(1, NETWORK))
    assert step == pytest.approx(2 * 0.2 + 0.002)
    assert busy == pytest.approx(step)


@pytest.mark.parametrize("way", WAYS)
def test_no_step_is_shorter_than_what_it_computes_and_sends(way: str) -> None:
    for gpus in (8, 64, 512):
        cluster = Cluster(gpus, NETWORK)
        step, busy = simulate(way, WORK, cluster)
        assert step > busy > 0.4
        parameters = sum(WORK.blocks) + WORK.rest
        if way == "ddp":
            assert step > cluster.all_reduce(4.0 * parameters)
        elif "hsdp" not in way:
            assert step > 2 * 2 * cluster.gather(2.0 * sum(WORK.blocks), gpus, False)


def test_what_cannot_be_hidden_is_paid_in_full() -> None:
    """A device that computes in no time: a step is what it sends, one after the other."""
    idle = Work(WORK.blocks, WORK.rest, 1, 1e-12, 0.0)
    cluster = Cluster(64, NETWORK)
    step, _ = simulate("fsdp2", idle, cluster)
    sizes = [4.0 * block for block in WORK.blocks]
    root = 4.0 * WORK.rest
    expected = sum(3 * cluster.gather(size, 64, False) for size in sizes) + 2 * cluster.gather(root, 64, False)
    assert step == pytest.approx(expected + 8 * cluster.all_reduce(8), rel=1e-6)


def test_rings_and_trees_are_nccls() -> None:
    """2 (n - 1) / n bytes through the slowest link, and 2 log2 n hops between nodes for what is short."""
    one = Cluster(8, NETWORK)
    assert one.all_reduce(1e9) == pytest.approx(2 * 7 / 8 * 1e9 / 360e9, rel=0.02)
    many = Cluster(512, NETWORK)
    assert many.all_reduce(8) == pytest.approx(8.4e-6 + 2 * (7 * 4e-6 + math.log2(64) * 14e-6), rel=1e-3)
    assert many.gather(8, 512, False) == pytest.approx(8.4e-6 + 448 * 3.4e-6 + 64 * 14e-6, rel=1e-3)
    assert many.across(1e9) == pytest.approx(2 * 63 / 64 * 1e9 / (NETWORK * 0.85 / PER_NODE), rel=0.02)


def test_the_table_of_the_docs_is_what_the_command_prints() -> None:
    config = load_run_config(ROOT / "configs" / "pretrain" / "modernbert-base.yaml")
    text = (ROOT / "docs" / "gpu.md").read_text()
    for gbit in (3200, 400):
        for line in lines(config, "h100-sxm", [8, 64, 512], gbit * 1e9 / 8):
            assert line["on_paper"]
            cells = f"{line['step_ms']:,.0f} ms, {line['efficiency']:.0%}"
            (row,) = re.findall(rf"^\| {line['gpus']}, {gbit:,} \|.*$", text, re.MULTILINE)
            if line["way"] in ("ddp", "fsdp2", "hsdp"):
                assert row.split("|")[2 + ["ddp", "fsdp2", "hsdp"].index(line["way"])].strip() == cells, json.dumps(
                    line
                )
