"""Question benchmarks (MMLU, C-Eval and the like) through lm-eval, of a run's model before and after its adapter, subject by subject."""

from __future__ import annotations

import contextlib
import difflib
import importlib.metadata
import importlib.util
import logging
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

from fedllm.config import load_config
from fedllm.errors import UserError

Phase = Callable[..., AbstractContextManager[Callable[[int], None]]]
INSTALL = "pip install 'dr-encoder[eval]'"
SHOT_SEED = 1234  # lm-eval's own: which examples stand before a question
BATCH = 8
PRIMARY = "acc,none"
_NO_METRIC = ("name", "alias", "sample_len", "sample_count")


def expect_lm_eval() -> None:
    """Raise UserError where lm-eval is not installed."""
    if importlib.util.find_spec("lm_eval") is None:
        raise UserError(f"--tasks: needs lm-eval, which is not installed; {INSTALL}")


def evaluate_tasks(
    run_dir: str | Path,
    names: Sequence[str],
    phase: Phase,
    *,
    files: Path | None = None,
    shots: int | None = None,
    limit: int | None = None,
) -> dict[str, Any]:
    """The run's base model and the same with its saved adapter on tasks and groups of tasks that lm-eval knows.

    files: a folder with task files of one's own (lm-eval's YAML); paths of data in them are relative to it. shots: examples before each
    question, None for what the task says. limit: questions of each task, None for all.
    Raises UserError where the run is not finished or its model answers no questions, for unknown tasks, and for data that cannot be had.
    """
    expect_lm_eval()
    run_dir = Path(run_dir)
    for needed in ("config.yaml", "adapter"):
        if not (run_dir / needed).exists():
            raise UserError(f"{run_dir}: has no {needed}; expected the folder of a finished run (`fedllm resume` finishes one)")
    config = load_config(run_dir / "config.yaml")
    if config.task.kind == "classify":
        raise UserError(f"{run_dir}: a classifier (task.kind=classify) answers no questions; expected a run with task.kind labels or text")
    logging.getLogger("lm_eval").setLevel(logging.ERROR)
    with phase("reading the tasks"):
        loaded = load_tasks(names, files)
    for task in loaded["tasks"].values():
        if shots is not None or task.get_config("num_fewshot") is None:
            task.set_config(key="num_fewshot", value=shots or 0)
        task.set_fewshot_seed(seed=SHOT_SEED)
    with phase("loading the model"):
        model, tokenizer = load(config, run_dir / "adapter")
    with phase("questions before training"), model.disable_adapter():
        before = ask(model, tokenizer, loaded, limit)
    with phase("questions after training"):
        after = ask(model, tokenizer, loaded, limit)
    return {
        "run": str(run_dir),
        "model": config.model.name,
        "method": config.method,
        "limit": limit,
        "lm_eval": importlib.metadata.version("lm-eval"),
        "subjects": [
            {"subject": task.config.task_alias or name, **compared(name, before, after, "results"), "shots": before["n-shot"][name]}
            for name, task in loaded["tasks"].items()
        ],
        "groups": [compared(name, before, after, "groups") for name in after.get("groups", {})],
    }


def load_tasks(names: Sequence[str], files: Path | None) -> dict[str, Any]:
    """lm-eval's tasks and groups of these names, their questions read. Raises UserError."""
    from lm_eval.tasks import TaskManager

    manager = TaskManager(include_path=str(files.resolve()) if files is not None else None)
    for name in names:
        if name not in manager.all_tasks:
            near = difflib.get_close_matches(name, manager.all_tasks, 1, 0.5)
            hint = f"did you mean {near[0]}?" if near else "expected one such as mmlu or ceval-valid, or --task-files FOLDER with your own"
            raise UserError(f"--tasks {name}: lm-eval knows no such task; {hint}")
    try:
        with contextlib.chdir(files or "."):
            return manager.load(list(names))
    except Exception as error:  # the hub client, the reader of data sets and lm-eval raise many types; each means: this cannot be asked
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise UserError(
            f"--tasks {','.join(names)}: the questions cannot be had ({reason}); offline, --task-files FOLDER takes local ones"
        ) from error


def load(config: Any, adapter: Path) -> tuple[Any, Any]:
    """The base with the saved adapter as any PEFT user would load it, and its tokenizer; on a GPU where there is one."""
    from peft import PeftModel

    from fedllm.models import default_device, load_model

    lora = {"r": config.lora.r, "alpha": config.lora.alpha, "targets": config.lora.targets}
    fresh, tokenizer = load_model(config.model.name, "text", dtype=config.model.dtype, device=default_device(), **lora)
    return PeftModel.from_pretrained(fresh.unload(), adapter).eval(), tokenizer


def ask(model: Any, tokenizer: Any, loaded: dict[str, Any], limit: int | None) -> dict[str, Any]:
    """lm-eval's results of one model."""
    from lm_eval.evaluator import evaluate
    from lm_eval.models.huggingface import HFLM

    answering = HFLM(pretrained=model, tokenizer=tokenizer, batch_size=BATCH)
    return evaluate(answering, loaded, limit=limit, log_samples=False, bootstrap_iters=0)


def compared(name: str, before: dict[str, Any], after: dict[str, Any], part: str) -> dict[str, Any]:
    """One task's or group's metric before and after: accuracy where it has one, else its first."""
    metrics = after[part][name]
    keys = [key for key in metrics if key not in _NO_METRIC and "_stderr" not in key]
    metric = PRIMARY if PRIMARY in keys else keys[0]
    first, second = before[part][name][metric], metrics[metric]
    count = after["n-samples"].get(name, {}).get("effective") or metrics.get("sample_len")
    return {"task": name, "questions": count, "metric": metric.partition(",")[0], "before": first, "after": second}
