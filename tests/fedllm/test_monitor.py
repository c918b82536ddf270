import io
import sys

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from fedllm import monitor
from fedllm.monitor import SCALARS, Monitor


def scalars(folder):
    """tag -> [(step, value)] as TensorBoard reads them."""
    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return {
        tag: [(event.step, event.value) for event in events.Scalars(tag)] for tag in events.Tags()["scalars"]
    }, events


def test_tensorboard_holds_every_round_the_config_and_the_plot(tmp_path, fake_results):
    results = fake_results()
    with Monitor(tmp_path, 4, quiet=True) as shown:
        shown.config("seed: null\nmethod: dr_encoder\n")
        for record in results["history"]:
            shown.round(record)
        path = shown.finish(results, results["history"])
    found, events = scalars(tmp_path)
    assert path == tmp_path / "rounds.png" and path.stat().st_size > 10_000
    for tag, key in SCALARS.items():
        expected = [(record["round"], record[key]) for record in results["history"] if record.get(key) is not None]
        assert [step for step, _ in found[tag]] == [step for step, _ in expected]
        assert [value for _, value in found[tag]] == pytest.approx([value for _, value in expected])
    assert events.Tags()["images"] == ["rounds"]
    text = events.Tensors("config/text_summary")[0].tensor_proto.string_val[0].decode()
    assert "    method: dr_encoder" in text


def test_missing_figures_are_left_out(tmp_path):
    with Monitor(tmp_path, 1, quiet=True) as shown:
        shown.round({"round": 1, "accuracy": None, "loss": 0.5, "epsilon_release": None, "epsilon_server": 0.0})
    found, _ = scalars(tmp_path)
    assert found == {"public/loss": [(1, 0.5)], "epsilon/server": [(1, 0.0)]}


@pytest.mark.parametrize("resume_at", [0, 2])
def test_resume_drops_rounds_that_are_done_again(tmp_path, resume_at):
    with Monitor(tmp_path, 4, quiet=True) as shown:
        for done in (1, 2, 3):
            shown.round({"round": done, "loss": 1.0})
    with Monitor(tmp_path, 4, resume_at=resume_at, quiet=True) as shown:
        for done in range(resume_at + 1, 5):
            shown.round({"round": done, "loss": 0.5})
    found, _ = scalars(tmp_path)
    assert found["public/loss"] == [(done, 1.0 if done <= resume_at else 0.5) for done in (1, 2, 3, 4)]


class Clock:
    def __init__(self):
        self.now = 0.0

    def __call__(self):
        return self.now


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(monitor.time, "monotonic", clock)
    return clock


def test_plain_lines(tmp_path, capsys, clock):
    with Monitor(tmp_path, 3, resume_at=1) as shown:
        with shown.phase("local training", total=113) as advance:
            for _ in range(113):
                clock.now += 0.5
                advance(1)
        clock.now += 3.5
        record = {"round": 2, "accuracy": 0.8125, "loss": 0.4, "epsilon_release": 7.991, "epsilon_server": 812.2}
        shown.round(record)
        shown.say("stopped [early]")
    out, err = capsys.readouterr()
    assert out == ""
    assert err.splitlines() == [
        "local training",
        "local training: 35 %, about 36.5 s left",
        "local training: 70 %, about 16.5 s left",
        "round 2/3: accuracy 81.2 %, loss 0.400, ε 8.00 release, ε 813 server, about 60.0 s left",
        "stopped [early]",
    ]


def test_last_round_and_first_record_promise_no_time(tmp_path, capsys, clock):
    with Monitor(tmp_path, 1) as shown:
        shown.round({"round": 0, "loss": 0.5})
        clock.now += 9
        shown.round({"round": 1, "loss": 0.4})
    assert capsys.readouterr().err.splitlines() == ["round 0/1: loss 0.500", "round 1/1: loss 0.400"]


class Terminal(io.StringIO):
    def isatty(self):
        return True


def test_bars_on_a_terminal(tmp_path, monkeypatch):
    terminal = Terminal()
    monkeypatch.setattr(sys, "stderr", terminal)
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "100")
    with Monitor(tmp_path, 2) as shown:
        with shown.phase("local training", total=113) as advance:
            advance(57)
            shown._display._progress.refresh()
        shown.round({"round": 1, "accuracy": 0.8, "loss": 0.4, "epsilon_release": 3.2})
        shown.say("stopped [early]")
        shown._display._progress.refresh()
    text = terminal.getvalue()
    assert "round 1/2: accuracy 80.0 %, loss 0.400, ε 3.20 release" in text and "stopped [early]" in text
    assert "local training" in text and "50%" in text.replace(" ", "")
    assert "113" not in text and "57" not in text  # a count could tell the realised cohort


def test_quiet_shows_nothing(tmp_path, capsys):
    with Monitor(tmp_path, 1, quiet=True) as shown:
        with shown.phase("evaluation", total=2) as advance:
            advance(1)
        shown.round({"round": 1, "loss": 0.5})
        shown.say("something")
    assert capsys.readouterr() == ("", "")
