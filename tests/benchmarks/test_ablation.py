"""The ablation: what it trains, that it resumes, what it shows."""

import json

import pytest
from typer.testing import CliRunner

from benchmarks import ablation


def result(arm, seed, right):
    return {
        "arm": arm,
        "seed": seed,
        "steps": [1, 1],
        "scenes": 8,
        "precision": "float32",
        "minutes": 2.0,
        "scores": {"all": [right, 10], "count_kind": [right // 2, 5]},
    }


@pytest.fixture
def places(tmp_path, monkeypatch):
    for name in ("RESULT", "PLOT", "TABLE"):
        monkeypatch.setattr(ablation, name, tmp_path / getattr(ablation, name).name)
    monkeypatch.setattr(ablation, "RUNS", tmp_path / "runs")
    monkeypatch.setattr(ablation, "STEPS", (1, 1))
    monkeypatch.setattr(ablation, "SCENES", 8)
    return tmp_path


def run(*arguments):
    app = ablation.typer.Typer()
    app.command()(ablation.main)
    return CliRunner().invoke(app, list(arguments), catch_exceptions=False)


def test_arms_differ_in_what_they_say_and_in_nothing_else(places, monkeypatch):
    monkeypatch.setattr(ablation, "parts", lambda folder: {"language_model": "shipped"})
    named = {arm.name: ablation.recipes(arm, 1, places) for arm in ablation.ARMS}
    assert [named[name][0]["show"] for name in ("low_res", "conv_gate", "gate_sum")] == [
        "low_res",
        "no_objects",
        "all",
    ]
    whole = named["gate_sum"]
    for arm in ablation.ARMS:
        assert named[arm.name][0]["parts"]["fusion_variant"] == arm.variant
        for stage, expected in zip(named[arm.name], whole, strict=True):
            own = {"show", "output", "model", "neck", "features", "parts"}
            assert {key: value for key, value in stage.items() if key not in own} == {
                key: value for key, value in expected.items() if key not in own
            }


def test_what_is_done_is_not_done_again_and_all_of_it_is_shown(places, monkeypatch):
    done = []

    def measure(arm, seed):
        if len(done) == 3:
            raise KeyboardInterrupt
        done.append((arm.name, seed))
        return result(arm.name, seed, 5 + seed)

    monkeypatch.setattr(ablation, "measure", measure)
    arguments = ["--arm", "low_res", "--arm", "gate_sum", "--seeds", "2"]
    run(*arguments)
    assert done == [("low_res", 1), ("gate_sum", 1), ("low_res", 2)]
    assert len(json.loads(ablation.RESULT.read_text())) == 3
    done.clear()
    assert run(*arguments).exit_code == 0
    assert done == [("gate_sum", 2)]
    table = ablation.TABLE.read_text()
    assert "| low resolution only | 2 | 2 | 65.0 (60.0 to 70.0) | 60.0 (60.0 to 60.0) |" in table
    assert "| low resolution only → + objects: the whole model | 2 | +0.0 (+0.0 to +0.0) |" in table
    assert "+ Conv-Gate" not in table
    assert ablation.PLOT.stat().st_size > 1000


def test_results_of_another_budget_are_not_mixed_in(places, monkeypatch):
    other = result("low_res", 1, 9) | {"steps": [1, 2]}
    ablation.RESULT.write_text(json.dumps([other, result("gate_sum", 1, 5)]))
    answer = run("--report")
    assert answer.exit_code == 0
    assert "left out, of other settings: 1 of 2 results" in answer.stderr
    table = ablation.TABLE.read_text()
    assert "low resolution only" not in table
    assert "| + objects: the whole model | 1 | 2 | 50.0 |" in table


def test_what_is_committed_shows_what_each_part_adds():
    results = json.loads(ablation.RESULT.read_text())
    totals = {(one["arm"], one["seed"]): one["scores"]["all"] for one in results}
    seeds = [seed for arm, seed in totals if arm == "low_res" and ("gate_sum", seed) in totals]
    assert seeds
    for seed in seeds:
        (low, asked), (whole, same) = totals["low_res", seed], totals["gate_sum", seed]
        assert asked == same == ablation.TEST_SCENES
        assert whole - low >= 0.15 * asked
    assert ablation.TABLE.read_text() == ablation.document(results)


def test_an_arm_that_is_none_is_named(places):
    answer = run("--arm", "guess")
    assert answer.exit_code == 1


def test_an_arm_is_trained_and_scored(places, monkeypatch):
    monkeypatch.setattr(ablation, "SCENES", 16)
    monkeypatch.setattr(ablation, "TEST_SCENES", 10)
    arm = next(arm for arm in ablation.ARMS if arm.name == "concat_raw")
    measured = ablation.measure(arm, 1)
    right, questions = measured["scores"]["all"]
    assert questions == 10
    assert 0 <= right <= 10
    assert {"count_kind", "read_digits"} <= set(measured["scores"])
    config = json.loads((ablation.RUNS / "concat_raw-1" / "stage-2" / "model" / "config.json").read_text())
    assert config["fusion_variant"] == "concat_raw"
