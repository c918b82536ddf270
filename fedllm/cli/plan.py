"""`fedllm plan`: what a run would take, before there are weights or a GPU."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Annotated, Any

import typer

from fedllm.cli.output import JsonFlag, print_json, print_table, stdout_for_result
from fedllm.errors import UserError
from fedllm.formats import bytes_text, claim_text, epsilon_text, times_text

Row = tuple[str, str, str]


def plan(
    config: Annotated[Path, typer.Argument(metavar="CONFIG", help="YAML file, for example configs/quickstart.yaml.")],
    overrides: Annotated[list[str] | None, typer.Argument(metavar="[KEY=VALUE]...", help="Config keys to change.")] = None,
    memory: Annotated[str | None, typer.Option(help="Memory of one rank, such as 24GiB: warns where the run does not fit.")] = None,
    ranks: Annotated[int, typer.Option(help="Processes, one GPU each.")] = 1,
    deepspeed: Annotated[Path | None, typer.Option(help="DeepSpeed file, in place of engine.deepspeed.")] = None,
    model_config: Annotated[Path | None, typer.Option(help="Folder with config.json, in place of model.name.")] = None,
    attention: Annotated[str, typer.Option(help="fused (GPUs) or eager (the CPU).")] = "fused",
    units: Annotated[int | None, typer.Option(help="Users or examples over all clients, with privacy.unit user or example.")] = None,
    signal_share: Annotated[float | None, typer.Option(help="Share of a unit's energy that is the mean update's: public.")] = None,
    noise_to_signal: Annotated[float, typer.Option(help="What a needed cohort and population must reach.")] = 1.0,
    as_json: Annotated[bool, JsonFlag] = False,
) -> None:
    """Without weights or GPU: parameters, code size, bytes, memory per rank, epsilon by round, expected noise, cohort needed."""
    from fedllm.config import load_config

    settings = load_config(config, overrides or [])
    with stdout_for_result():
        from fedllm import plan as planning
        from fedllm import plan_memory
        from fedllm.monitor import open_display

        if attention not in plan_memory.ATTENTIONS:
            raise UserError(f"--attention {attention}: expected one of {', '.join(plan_memory.ATTENTIONS)}")
        for name, value, high in (("ranks", ranks, None), ("signal-share", signal_share, 1.0), ("noise-to-signal", noise_to_signal, None)):
            if value is not None and not 0 < value <= (high or value):
                raise UserError(f"--{name} {value}: expected a number above 0" + (f", at most {high:g}" if high else ""))
        file = deepspeed or getattr(settings.engine, "deepspeed", None)
        mode = settings.parallel.mode
        divided = plan_memory.Ranks(ranks, "clients" if mode == "none" else mode)
        asked = planning.Question(
            model_config=model_config or planning.model_folder(settings, config),
            ranks=plan_memory.read_deepspeed(Path(file), ranks, mode) if file else divided,
            attention=attention,
            limit=plan_memory.parse_bytes(memory) if memory is not None else None,
            units=units,
            threshold=noise_to_signal,
        )
        if signal_share is not None:
            asked = dataclasses.replace(asked, signal_share=signal_share)
        with open_display() as display:
            found = planning.plan(settings, asked, display.phase)
    if as_json:
        print_json(found)
        return
    print_table(title(found), ("", "value", "meaning"), rows(found), [f"warning: {line}" for line in found["warnings"]])


def title(found: dict[str, Any]) -> str:
    """Method, model, clients and rounds in one line."""
    model = f"{found['model']['name']} ({found['model']['class']}, {found['model']['dtype']})"
    return f"{found['method']} · {model} · {found['clients']:,} clients, {found['expected_cohort']:g} a round · {found['rounds']} rounds"


def rows(found: dict[str, Any]) -> list[Row | None]:
    """(quantity, value, what it means); None between the sections."""
    return [*_sizes(found), None, *_traffic(found["bytes"]), None, *_memory(found["memory"]), None, *_privacy(found), None, *_noise(found)]


def _sizes(found: dict[str, Any]) -> list[Row]:
    return [
        ("parameters", f"{found['parameters']:,}", f"of the frozen base, shapes from {found['model']['shapes_from']}"),
        ("trainable", f"{found['trainable_parameters']:,}", "n, numbers of an update"),
        ("code", f"{found['code_size']:,}", f"k, numbers sent: 1/{found['update_size'] / found['code_size']:,.0f} of them"),
    ]


def _traffic(sizes: dict[str, Any]) -> list[Row]:
    raw = f"a whole message per client and round; the update as float32 is {bytes_text(sizes['update'])}"
    first = f", {bytes_text(sizes['message_stage1'])} in stage 1" if sizes["message_stage1"] else ""
    return [
        ("bytes up", bytes_text(sizes["message"]), f"{raw} ({times_text(sizes['compression_ratio'])}){first}"),
        ("bytes down", bytes_text(sizes["down"]), "per client and round: the new adapter, and the codec unless clients fit their own"),
        ("all clients, up", bytes_text(sizes["up_per_round"]), "a round"),
        ("all clients, down", bytes_text(sizes["down_per_round"]), "a round"),
        ("codec", bytes_text(sizes["codec"]), "its file"),
    ]


def _memory(held: dict[str, Any]) -> list[Row]:
    divided = f"{held['ranks']} ranks, {held['parallel']}, ZeRO {held['zero_stage']}" if held["ranks"] > 1 else "one rank"
    batch = f"{held['tokens']:,} tokens, {held['attention']} attention, {held['activations_of_layer_and_token']:,} bytes a layer and token"
    kept = "checkpointed" if held["checkpointing"] else f"{bytes_text(held['activations_checkpointed'])} with checkpointing"
    if held["fits"] is None:
        verdict = "--memory 24GiB says whether it fits"
    else:
        verdict = ("fits into " if held["fits"] else "no: does not fit into ") + bytes_text(held["limit"])
    remembered = f", {bytes_text(held['remembered'])} of earlier ones" if held["remembered"] else ""
    dense = f"; and {bytes_text(held['dense'])} of dense matrices, float32" if held["dense"] else ""
    return [
        ("memory, weights", bytes_text(held["weights"]), divided + (", offloaded" if held["offload"] else "") + dense),
        ("memory, activations", bytes_text(held["activations"]), f"{batch}; {kept}"),
        ("memory, working", bytes_text(held["working"]), "on top, where a batch holds most: gradients in a layer or its norm, or logits"),
        ("memory, optimizer", bytes_text(held["optimizer"]), "gradients of the adapter, the server's copy and moments"),
        ("memory, codec", bytes_text(held["codec"]), f"and {bytes_text(held['codec_fitting'])} while it is fitted"),
        ("memory, updates", bytes_text(held["updates"]), f"and {bytes_text(held['public_gradients'])} of public gradients{remembered}"),
        ("memory, peak", bytes_text(held["total"]), f"in {held['peak_in']}; {verdict}"),
    ]


def _privacy(found: dict[str, Any]) -> list[Row]:
    privacy = found["privacy"]
    lines: list[Row] = []
    for adversary in ("release", "server"):
        answer = privacy[adversary]
        meaning = answer["reason"] or ""
        if answer["epsilon"] is not None:
            said = f"{answer['kind']}, delta {answer['delta']:g}, {answer['relation']} {answer['unit']}, {answer['accountant']}"
            meaning = "; ".join(filter(None, [said, _by_round(privacy["by_round"], adversary), answer["reason"]]))
        lines.append((f"ε, {adversary} adversary", epsilon_text(answer["epsilon"]), meaning))
    if privacy["claimed"]:
        claim = privacy["claimed"]
        lines.append(("ε, claimed", claim_text(claim), f"by the paper at delta {claim['delta']:g}: {claim['statement']}"))
    if not privacy["private"]:
        lines.append(("private", f"no: {', '.join(privacy['why_not_private'])}", "no epsilon of this run is a promise"))
    return lines


def _by_round(by_round: list[dict[str, Any]], adversary: str) -> str:
    stage2 = [row for row in by_round if row["stage"] == "stage2"]
    shown = sorted({round(part * (len(stage2) - 1) / 3) for part in range(4)})
    return "by round: " + ", ".join(f"{epsilon_text(stage2[at][adversary])} after {stage2[at]['round']}" for at in shown)


def _noise(found: dict[str, Any]) -> list[Row]:
    ratio, needed, privacy = found["noise_to_signal"], found["needs"], found["privacy"]
    if ratio is None:
        return [("noise to signal", "none", "no noise")]
    sampled = f"sampling rate {privacy['sampling_rate']:g}" + (f", at most {privacy['max_cohort']}" if privacy["max_cohort"] else "")
    lines = [
        ("noise multiplier", f"{privacy['noise_multiplier']:g}", sampled),
        ("noise to signal", f"{ratio:.3g}", f"expected, where {found['assumption']}"),
    ]
    goal = f"for epsilon {privacy['target']['epsilon']:g} at noise to signal {needed['noise_to_signal']:g}"
    for key, what in (("cohort", f"of {found['clients']:,} clients"), ("population", f"with {found['expected_cohort']:g} clients a round")):
        value = f"{needed[key]:,}" if needed[key] else "none"
        lines.append((f"{key} needed", value, needed["reason"] or f"{goal}, {what}"))
    return lines
