"""scripts/check_plan.py on a model small enough for every check-in: all its lines but the peak of the process, which needs a larger one."""

import runpy
from pathlib import Path

import pytest

SCRIPT = Path(__file__).parents[2] / "scripts" / "check_plan.py"


@pytest.mark.parametrize("overrides", [[], ["task.kind=text"]], ids=["labels", "text"])
def test_planned_and_measured_agree_within_a_tenth(overrides, tmp_path, one_thread):
    script = runpy.run_path(str(SCRIPT))
    config = script["write"](tmp_path, 4, 64, [*overrides, "engine.batch_tokens=1024", "privacy.target.adversary=server"])
    planned = script["plan"](config, script["Question"](attention="eager"), script["phase"])
    results = script["run"].train(config)
    rows = script["rows_of"](planned, results, script["build"](script["run"].resolve(config), 0))
    assert len(rows) == 10
    for name, guess, found in rows:
        assert guess == pytest.approx(found, rel=script["MOST"]), name
