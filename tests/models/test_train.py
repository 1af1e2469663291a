from __future__ import annotations

import csv
import json

import jax
import numpy as np
import pytest

from jaxquant.models import data, train
from tests.models import tiny


def test_the_rate_warms_up_and_decays_to_zero():
    assert train.learning_rate(0.0, 1e-3, 0.1) == 0.0
    np.testing.assert_allclose(train.learning_rate(0.05, 1e-3, 0.1), 5e-4)
    np.testing.assert_allclose(train.learning_rate(0.1, 1e-3, 0.1), 1e-3)
    np.testing.assert_allclose(train.learning_rate(0.55, 1e-3, 0.1), 5e-4)
    np.testing.assert_allclose(train.learning_rate(1.0, 1e-3, 0.1), 0.0, atol=1e-12)


def test_norm_scales_do_not_decay():
    weights = {"norm": {"scale": np.ones(3, np.float32)}, "up": {"kernel": np.ones(3, np.float32)}}
    optimizer = train.optimizer(0.1)
    zeros = jax.tree.map(np.zeros_like, weights)
    updates, _ = optimizer.update(zeros, optimizer.init(weights), weights)
    np.testing.assert_array_equal(updates["norm"]["scale"], 0.0)
    np.testing.assert_allclose(updates["up"]["kernel"], 0.1, rtol=1e-6)


def _run(work, *options: str) -> train.Run:
    args = train.parser().parse_args(
        ["--work-dir", str(work), "--steps", "8", "--batch-size", "4", "--length", "8",
         "--eval-every", "4", *options]
    )  # fmt: skip
    work.mkdir(exist_ok=True)
    rng = np.random.default_rng(0)
    # Counting upwards: learnable, so that the loss must fall.
    streams = {name: (np.arange(600) + rng.integers(50)) % 50 for name in train.MIX}
    config = tiny.CONFIG.replace(num_layers=1, scan_layers=False)
    return train.Run(args, config, streams, streams, work)


@pytest.fixture(scope="module")
def whole(tmp_path_factory) -> train.Run:
    run = _run(tmp_path_factory.mktemp("whole"))
    run.train()
    return run


def test_a_resumed_run_ends_where_an_uninterrupted_one_does(whole, tmp_path):
    _run(tmp_path / "resumed", "--stop-after", "4").train()
    resumed = _run(tmp_path / "resumed")
    assert resumed.step == 4
    resumed.train()
    jax.tree.map(np.testing.assert_array_equal, resumed.weights, whole.weights)
    assert [row["step"] for row in resumed.curve] == [row["step"] for row in whole.curve]


def test_the_loss_falls_and_the_verdict_is_recorded(whole):
    assert whole.curve[-1]["train"] < whole.curve[0]["train"]
    verdict = whole.verdict()
    before, after = verdict["loss_at_nine_tenths"], verdict["loss_at_end"]
    np.testing.assert_allclose(verdict["improvement"], (before - after) / before)
    assert verdict["met"] == (verdict["improvement"] < 0.005)


def test_a_run_out_of_time_plans_fewer_steps(whole, tmp_path):
    run = _run(tmp_path / "short", "--minutes", "1.0", "--steps", "1000")
    run.step, run.seconds = 100, 30.0
    run.curve = [{"step": 50, "minutes": 0.25}, {"step": 100, "minutes": 0.5}]
    run._plan()
    assert run.total == 200
    run.step, run.seconds = 180, 50.0  # 0.9 of the plan: frozen
    run._plan()
    assert run.total == 200


def test_the_export_is_complete(whole, tmp_path):
    (whole.work / "heldout").mkdir(exist_ok=True)
    (whole.work / "heldout" / "json.txt").write_text("{}")
    (whole.work / "tokenizer.json").write_text("{}")
    whole.export(tmp_path, {"json": {}})
    record = json.loads((tmp_path / "training.json").read_text())
    assert record["steps"] == 8
    assert record["tokens"] == 8 * 4 * 8
    assert record["held_out_loss"] == whole.checks["1.0"]
    with open(tmp_path / "loss_curve.csv") as file:
        assert [int(row["step"]) for row in csv.DictReader(file)] == [4, 7, 8]
    assert (tmp_path / "weights.safetensors").stat().st_size > 0
    assert (tmp_path / "heldout" / "json.txt").exists()


def test_the_tokenizer_sees_a_part_of_the_synthetic_slices():
    documents = ("x" * 1_000_000,) * 3
    assert len(data._first_characters(documents, limit=True)) == 2
    assert len(data._first_characters(documents, limit=False)) == 3
