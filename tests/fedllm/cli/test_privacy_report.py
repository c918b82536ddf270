"""`fedllm privacy report`, on ledgers written by hand."""

import json

import pytest

from fedllm import cli
from fedllm.cli.privacy.report import participations
from fedllm.formats import epsilon_text
from fedllm.privacy import accountants
from fedllm.privacy.adversaries import epsilon_release, epsilon_server
from fedllm.privacy.ledger import Ledger, read_ledger

HEADER = {
    "run": "0123456789abcdef",
    "data": "movie-reviews",
    "clients": 2000,
    "units": 2000,
    "unit": "client",
    "target": {"adversary": "release", "epsilon": 8.0, "delta": 1e-4},
    "planned_rounds": 3,
    "private": True,
    "why_not_private": [],
}
ENTRY = {
    "stage": 2,
    "mechanism": "gaussian",
    "noise_multiplier": 1.0,
    "clip": 0.02,
    "sampling_rate": 0.05,
    "max_cohort": 200,
    "shares": 200,
    "noise": "distributed",
    "unit": "client",
    "relation": "add-or-remove-one",
    "codec": "abc",
    "prior": "public:abc",
    "rng": "os",
}


@pytest.fixture
def ledger_folder(tmp_path):
    """make(name, rounds, entry changes, header changes): a run folder with a ledger."""

    def make(name, rounds=3, entry=None, **header):
        folder = tmp_path / name
        folder.mkdir()
        (folder / "config.yaml").write_text("")
        with Ledger.create(folder / "ledger.jsonl", HEADER | header) as ledger:
            for number in range(rounds):
                ledger.append(ENTRY | {"round": number} | (entry or {}))
        return folder

    return make


def report(capsys, *folders):
    assert cli.run(["privacy", "report", *map(str, folders), "--json"]) == 0
    out, err = capsys.readouterr()
    assert err == ""
    return json.loads(out)


def test_both_adversaries_from_the_ledger_alone(ledger_folder, capsys):
    folder = ledger_folder("run")
    (folder / "config.yaml").unlink()
    found = report(capsys, folder)
    assert found["composed"] == []
    run = found["runs"][0]
    ledger = read_ledger(folder / "ledger.jsonl")
    assert run["release"] == epsilon_release(*ledger).as_json()
    assert run["server"] == epsilon_server(*ledger).as_json()
    assert (run["stage1_releases"], run["stage2_releases"], run["repeated_attempts"]) == (0, 3, 0)
    assert [part["times"] for part in run["server_took_part"]] == [1, 2]
    once, twice = (part["epsilon"] for part in run["server_took_part"])
    assert 0 < once < twice < run["server"]["epsilon"]


def test_table(ledger_folder, capsys):
    folder = ledger_folder("run")
    assert cli.run(["privacy", "report", str(folder)]) == 0
    out = capsys.readouterr().out
    for text in (
        "release adversary",
        "server adversary",
        "took part once",
        "took part 2 times",
        "δ 1e-4",
        "one client",
    ):
        assert text in out
    assert "no: " not in out


def test_a_repeated_attempt_counts(ledger_folder, capsys):
    folder = ledger_folder("run")
    before = report(capsys, folder)["runs"][0]
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        ledger.append(ENTRY | {"round": 2})
    after = report(capsys, folder)["runs"][0]
    assert after["repeated_attempts"] == 1
    assert after["release"]["epsilon"] > before["release"]["epsilon"]


def test_a_running_run_and_a_torn_line_can_be_reported(ledger_folder, capsys):
    folder = ledger_folder("run")
    with Ledger.open(folder / "ledger.jsonl"):
        whole = report(capsys, folder)
    with open(folder / "ledger.jsonl", "a") as file:
        file.write('{"v": 1, "id": "stage2/rou')
    assert report(capsys, folder) == whole


def test_not_private(ledger_folder, capsys):
    folder = ledger_folder("run", private=False, why_not_private=["privacy disabled"])
    run = report(capsys, folder)["runs"][0]
    assert run["release"]["epsilon"] is None and run["why_not_private"] == ["privacy disabled"]
    assert cli.run(["privacy", "report", str(folder)]) == 0
    assert "no: privacy disabled" in capsys.readouterr().out


CLAIM = {"epsilon": 25.0, "delta": 1e-4, "statement": "one matrix in one round"}
PUBLISHED = {"claimed": CLAIM, "private": False, "why_not_private": ["published accounting"]}


def test_a_claim_stands_beside_the_truth(ledger_folder, capsys):
    folder = ledger_folder("run", **PUBLISHED)
    run = report(capsys, folder)["runs"][0]
    assert run["claimed"] == CLAIM
    truth, server = epsilon_text(run["release"]["epsilon"]), epsilon_text(run["server"]["epsilon"])
    assert run["why_not_private"] == [f"published: claims 25.00, true is {truth} (release), {server} (server)"]
    assert cli.run(["privacy", "report", str(folder)]) == 0
    shown = capsys.readouterr().out
    assert "as published, δ 1e-4: one matrix in one round" in shown and f"claims 25.00, true is {truth}" in shown


def test_what_was_released_raw_has_no_figure_whatever_else_was_noised(ledger_folder, capsys):
    folder = ledger_folder("run", **PUBLISHED)
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        ledger.append(ENTRY | {"stage": "stage1", "round": 0, "mechanism": "raw_gradients", "noise_multiplier": 0.0})
    run = report(capsys, folder)["runs"][0]
    for answer in (run["release"], run["server"], *run["accountants"]):
        assert answer["epsilon"] is None and "raw gradients" in answer["reason"]
    assert run["why_not_private"] == ["published: claims 25.00, true is none (release), none (server)"]
    assert cli.run(["privacy", "report", str(folder)]) == 0


def test_a_claim_is_not_composed(ledger_folder, capsys):
    both = report(capsys, ledger_folder("a", **PUBLISHED), ledger_folder("b"))["composed"][0]
    assert both["claimed"] is None and both["why_not_private"] == ["published accounting"]


def test_runs_on_the_same_data_are_composed(ledger_folder, capsys):
    seeded = {"rng": "seeded"}
    twins = {"private": False, "why_not_private": ["fixed seed"]}
    folders = [ledger_folder("a", entry=seeded, **twins), ledger_folder("b", entry=seeded, **twins)]
    other = ledger_folder("c", data="drug-reviews")
    found = report(capsys, *folders, other)
    assert len(found["composed"]) == 1
    both = found["composed"][0]
    assert both["stage2_releases"] == 6 and both["why_not_private"] == ["fixed seed"]
    # Six rounds, as one run of six would cost: equal entries of two runs are two releases.
    six = report(capsys, ledger_folder("six", rounds=6))["runs"][0]
    assert both["release"]["epsilon"] == pytest.approx(six["release"]["epsilon"])
    assert both["server"]["epsilon"] == pytest.approx(six["server"]["epsilon"])


@pytest.mark.parametrize("unit", ["user", "example"])
def test_units_inside_clients_are_the_same_in_other_clients(unit, ledger_folder, capsys):
    """An example pays for both runs whoever holds it; a client of another federation is another client."""
    inside = {"unit": unit, "units": 6000}
    folders = [ledger_folder(str(clients), entry={"unit": unit, "max_cohort": None}, clients=clients, **inside) for clients in (1, 10)]
    both = report(capsys, *folders)["composed"]
    assert len(both) == 1 and both[0]["stage2_releases"] == 6
    strangers = (ledger_folder("a"), ledger_folder("b", clients=1000))
    assert cli.run(["privacy", "report", *map(str, strangers), "--json"]) == 0
    out, err = capsys.readouterr()
    assert json.loads(out)["composed"] == [] and "not composed" in err


def test_composition_states_the_smallest_delta(ledger_folder, capsys):
    target = HEADER["target"] | {"delta": 1e-6}
    found = report(capsys, ledger_folder("a"), ledger_folder("b", target=target))
    assert found["composed"][0]["release"]["delta"] == 1e-6


def test_folders_without_a_ledger(tmp_path, capsys):
    assert cli.run(["privacy", "report", str(tmp_path / "none")]) == 2
    assert "no such run folder" in capsys.readouterr().err
    (tmp_path / "config.yaml").write_text("")
    assert cli.run(["privacy", "report", str(tmp_path)]) == 2
    assert "no ledger.jsonl" in capsys.readouterr().err


def test_the_same_run_twice_is_refused(ledger_folder, capsys):
    folder = str(ledger_folder("run"))
    assert cli.run(["privacy", "report", folder, folder]) == 2
    assert "twice" in capsys.readouterr().err


def test_participations():
    assert participations(0) == []
    assert participations(1) == []
    assert participations(10) == [1, 2, 5]
    assert participations(60) == [1, 2, 5, 10, 20, 50]


def test_stage_by_stage_by_every_accountant_and_by_round(ledger_folder, capsys):
    folder = ledger_folder("run")
    with Ledger.open(folder / "ledger.jsonl") as ledger:
        ledger.append(ENTRY | {"stage": "stage1", "round": 0, "noise_multiplier": 3.0})
    run = report(capsys, folder)["runs"][0]
    assert [(stage["stage"], stage["releases"]) for stage in run["stages"]] == [("stage 1", 1), ("stage 2", 3)]
    assert all(stage["release"]["epsilon"] < run["release"]["epsilon"] for stage in run["stages"])
    assert {answer["accountant"] for answer in run["accountants"]} == set(accountants.names()) - {"pld"}
    assert run["by_round"][-1]["release"]["pld"] == run["release"]["epsilon"]
    assert run["by_round"][-1]["server"] == run["server"]["epsilon"]
    assert (folder / "epsilon.png").read_bytes().startswith(b"\x89PNG") and run["plot"] == str(folder / "epsilon.png")


def test_plots_go_where_they_are_asked_to(ledger_folder, tmp_path, capsys):
    folder = ledger_folder("run")
    assert cli.run(["privacy", "report", str(folder), "--out", str(tmp_path / "plots")]) == 0
    assert [path.name for path in (tmp_path / "plots").iterdir()] == ["1-run.png"] and not (folder / "epsilon.png").exists()
    capsys.readouterr()
    (tmp_path / "file").write_text("")
    assert cli.run(["privacy", "report", str(folder), "--out", str(tmp_path / "file")]) == 0
    assert "no plot was written" in capsys.readouterr().err
