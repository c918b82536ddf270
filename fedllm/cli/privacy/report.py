"""`fedllm privacy report`: what runs cost, from their ledgers alone."""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.output import JsonFlag, expect_run, print_json, print_table
from fedllm.errors import UserError
from fedllm.formats import claim_meaning, claim_text, delta_text, epsilon_text

PLOT_NAME = "epsilon.png"


def report(
    run_dirs: Annotated[list[Path], typer.Argument(metavar="RUN_DIR", help="Run folders, finished or not.")],
    out: Annotated[Path | None, typer.Option(help="Folder for the plots of epsilon by round; default: each run's own.")] = None,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Both adversaries' epsilon, stage by stage and by every accountant, from the ledgers alone; runs on the same data are composed."""
    if len({folder.resolve() for folder in run_dirs}) < len(run_dirs):
        raise UserError("a run folder is named twice; its releases would be composed with themselves")
    ledgers = [_read(folder) for folder in run_dirs]
    reports = [run_report(str(folder), *ledger) for folder, ledger in zip(run_dirs, ledgers, strict=True)]
    together = composed_reports([str(folder) for folder in run_dirs], ledgers)
    if len({_population(header) for header, _ in ledgers}) > len({header["data"] for header, _ in ledgers}):
        print("note: runs on the same data but with other units or another split are not composed", file=sys.stderr)
    for number, (folder, item) in enumerate(zip(run_dirs, reports, strict=True), start=1):
        item["plot"] = _plot(item, folder / PLOT_NAME if out is None else out / f"{number}-{folder.name}.png")
    if as_json:
        print_json({"runs": reports, "composed": together})
        return
    for item in [*reports, *together]:
        print_table(_title(item), ("", "ε", "meaning"), report_rows(item))
    for item in reports:
        if item["plot"]:
            print(f"epsilon by round: {item['plot']}", file=sys.stderr)


def _plot(report: dict[str, Any], path: Path) -> str | None:
    """Draw epsilon by round; None where there is nothing to draw or the folder cannot be written."""
    from fedllm.privacy.ledger_plot import ledger_figure

    if not any(row["release"] for row in report["by_round"]):
        return None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        return str(ledger_figure(report, path))
    except OSError as error:
        print(f"note: {path}: {error.strerror}; no plot was written", file=sys.stderr)
        return None


def run_report(name: str, header: dict[str, Any], entries: list[dict[str, Any]]) -> dict[str, Any]:
    """Both answers of one ledger by every accountant, stage by stage and by round, and why the run may not be private."""
    from fedllm.privacy import adversaries
    from fedllm.privacy.accountants import names
    from fedllm.privacy.adversaries import epsilon_release, epsilon_server, privacy_marks
    from fedllm.privacy.ledger import counted

    spent = counted(entries)
    private, why = privacy_marks(header, entries)
    took_part = {times: epsilon_server(header, entries, times).as_json() for times in participations(len(spent))}
    return {
        "run": name,
        "private": private,
        "why_not_private": why,
        "target": header["target"],
        "claimed": header.get("claimed"),
        "planned_rounds": header["planned_rounds"],
        "stage1_releases": sum(entry["stage"] in adversaries.STAGE1 for entry in spent),
        "stage2_releases": sum(entry["stage"] not in adversaries.STAGE1 for entry in spent),
        "repeated_attempts": sum(entry["attempt"] > 1 for entry in spent),
        "release": epsilon_release(header, entries).as_json(),
        "server": epsilon_server(header, entries).as_json(),
        "stages": [
            {
                "stage": stage,
                "releases": len(part),
                "release": epsilon_release(header, part).as_json(),
                "server": epsilon_server(header, part).as_json(),
            }
            for stage, part in adversaries.by_stage(spent).items()
        ],
        "accountants": [epsilon_release(header, entries, accountant).as_json() for accountant in names() if accountant != "pld"],
        "by_round": [] if "privacy disabled" in why else adversaries.epsilon_by_round(header, entries),
        "server_took_part": [{"times": times, **answer} for times, answer in took_part.items()],
    }


def participations(releases: int) -> list[int]:
    """1, 2, 5, 10, 20, 50 ... below the number of releases: how often a client may have been in a cohort."""
    series = (digit * 10**power for power in range(len(str(releases))) for digit in (1, 2, 5))
    return [times for times in series if times < releases]


def composed_reports(names: Sequence[str], ledgers: Sequence[tuple[dict, list[dict]]]) -> list[dict[str, Any]]:
    """One report for each set of two or more runs on the same units; delta is the smallest of theirs."""
    groups: dict[str, list[int]] = {}
    for number, (header, _) in enumerate(ledgers):
        groups.setdefault(_population(header), []).append(number)
    return [_composed([(names[i], *ledgers[i]) for i in group]) for group in groups.values() if len(group) > 1]


def _composed(runs: Sequence[tuple[str, dict, list[dict]]]) -> dict[str, Any]:
    headers = [header for _, header, _ in runs]
    # Marked by run: equal entries of two seeded runs are two releases, not one repeated.
    entries = [entry | {"of_run": number} for number, (_, _, part) in enumerate(runs) for entry in part]
    why = sorted({reason for header in headers for reason in _reasons(header)})
    merged = headers[0] | {
        "target": headers[0]["target"] | {"delta": min(header["target"]["delta"] for header in headers)},
        "claimed": None,
        "planned_rounds": sum(header["planned_rounds"] for header in headers),
        "private": all(header["private"] for header in headers),
        "why_not_private": why,
    }
    report = run_report(" + ".join(name for name, _, _ in runs), merged, entries)
    report["target"] = None  # each run had its own; none was made for the sum
    return report


def _reasons(header: dict[str, Any]) -> list[str]:
    from fedllm.privacy.adversaries import privacy_marks

    return privacy_marks(header)[1]


def _population(header: dict[str, Any]) -> str:
    """What two ledgers must share for their costs to fall on the same units: users and examples may be dealt to other clients."""
    clients = header["clients"] if header["unit"] == "client" else None
    return json.dumps([header["data"], header["unit"], clients, header.get("units"), header.get("population")], sort_keys=True)


def report_rows(report: dict[str, Any]) -> list[list[str] | None]:
    """The report as (adversary, epsilon, meaning) rows."""
    rows: list[list[str] | None] = []
    for adversary in ("release", "server"):
        rows.append([f"{adversary} adversary", epsilon_text(report[adversary]["epsilon"]), _meaning(report[adversary])])
    if report["claimed"] is not None:
        rows.append(["claimed", claim_text(report["claimed"]), claim_meaning(report["claimed"])])
    if len(report["stages"]) > 1:
        for stage in report["stages"]:
            figures = f"release; server {epsilon_text(stage['server']['epsilon'])}"
            rows.append([f"{stage['stage']} alone", epsilon_text(stage["release"]["epsilon"]), figures])
    if report["release"]["epsilon"] is not None:
        for other in report["accountants"]:
            rows.append([f"release by {other['accountant']}", epsilon_text(other["epsilon"]), _other_meaning(other)])
    if report["server"]["epsilon"] is not None:
        for part in report["server_took_part"]:
            times = "once" if part["times"] == 1 else f"{part['times']} times"
            rows.append([f"server, took part {times}", epsilon_text(part["epsilon"]), ""])
    target = report["target"]
    if target is not None and report["claimed"] is None and report["release"]["epsilon"] is not None:
        rows.append(["target", epsilon_text(target["epsilon"]), f"{target['adversary']} adversary"])
    if not report["private"]:
        rows += [
            None,
            ["private", "no: " + ", ".join(report["why_not_private"]), "no epsilon of this run is a promise"],
        ]
    return rows


def _meaning(answer: dict[str, Any]) -> str:
    if answer["epsilon"] is None:
        return answer["reason"]
    parts = [f"{answer['kind']} for one {answer['unit']}", answer["relation"], f"δ {delta_text(answer['delta'])}"]
    return ", ".join(filter(None, [*parts, answer["accountant"], answer["reason"]]))


def _other_meaning(answer: dict[str, Any]) -> str:
    if answer["epsilon"] is None:
        return answer["reason"]
    return ", ".join(filter(None, [f"{answer['kind']} ({answer['direction']})", answer["conversion"], answer["reason"]]))


def _title(report: dict[str, Any]) -> str:
    done = f"{report['stage1_releases']} + {report['stage2_releases']} releases (stage 1 + stage 2)"
    again = f", {report['repeated_attempts']} of them repeated" if report["repeated_attempts"] else ""
    return f"{report['run']}: {done}{again}"


def _read(run_dir: Path) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    from fedllm.privacy.ledger import read_ledger

    if not (run_dir / "ledger.jsonl").is_file():
        expect_run(run_dir)
        raise UserError(f"{run_dir}: expected a ledger; there is no ledger.jsonl")
    return read_ledger(run_dir / "ledger.jsonl")
