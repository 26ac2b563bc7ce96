"""lm-eval's tasks: found, loaded with their data, asked and scored. What goes wrong is one line.

Its evaluation loop is repeated here in the few lines that matter, because the items' own scores are needed to pair
models, and because the questions must be known before any model answers them.
"""

import difflib
import hashlib
import json
import logging
import os
import random
from collections import defaultdict
from collections.abc import Mapping, Sequence
from contextlib import contextmanager, redirect_stderr
from importlib.metadata import version
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

from klquant.errors import UserError
from klquant.evaluate.options import TaskOptions, Watcher
from klquant.evaluate.tasks.model import TaskModel
from klquant.evaluate.tasks.record import TaskPart, TaskResult, TaskValue
from klquant.evaluate.tasks.scores import task_value
from klquant.evaluate.tasks.text import TaskText

if TYPE_CHECKING:
    from lm_eval.api.task import Task

RESAMPLES = 1000  # bootstrap for metrics that are no mean over items
GUESSED = ("acc", "acc_norm")  # metrics of multiple choice that guessing gets 1 / choices in

Scores = Mapping[tuple[str, str], Sequence[Any]]  # (metric, filter) → what each item gave


class Harness:
    """lm-eval with its tasks. Raises UserError where it is not installed or does not know one of `names`."""

    def __init__(self, names: Sequence[str], own: Sequence[str], options: TaskOptions) -> None:
        """`own`: names that are not lm-eval's but may be meant."""
        os.environ["HF_ALLOW_CODE_EVAL"] = "1" if options.run_code else "0"
        if not options.run_code:
            os.environ["HF_EVALUATE_OFFLINE"] = "1"  # metrics that lie on the hub are programs
        try:
            from lm_eval.tasks import TaskManager
        except ImportError as error:
            near = [(name, match) for name in names for match in difflib.get_close_matches(name, own, n=1)]
            task = f"{near[0][0]} (did you mean {near[0][1]}?)" if near else names[0]
            raise UserError(
                f"task {task} needs lm-eval ({error}): pip install 'klquant[tasks]'; of klquant's own there is "
                f"{', '.join(own)}"
            ) from None
        for logger in ("lm_eval", "huggingface_hub", "datasets"):
            logging.getLogger(logger).setLevel(logging.ERROR)
        self.options = options
        self.manager = TaskManager(include_defaults=not all(map(_is_file, names)))
        for name in names:
            if _is_file(name):
                if not Path(name).is_file():
                    raise UserError(f"{name}: no such file")
            elif name not in self.manager.task_index:
                near = difflib.get_close_matches(name, [*own, *self.manager.all_tasks], n=3)
                hint = f"near it: {', '.join(near)}" if near else "`lm-eval ls tasks` names all"
                raise UserError(f"no task {name!r}; {hint}")

    def load(self, name: str) -> "HarnessTask":
        """The task or group with its data, and its questions."""
        entry = self.manager.task_index.get(name)
        if entry is not None and (entry.cfg or {}).get("unsafe_code"):
            self._require_consent(name)
        with _one_line(name):
            random.seed(self.options.seed)
            loaded = self.manager.load([name])
        tasks = loaded["tasks"]
        for task in tasks.values():
            if getattr(task, "UNSAFE_CODE", False):
                self._require_consent(name)
            if self.options.few_shot is not None and task.get_config("num_fewshot") != 0:
                task.set_config(key="num_fewshot", value=self.options.few_shot)
            elif task.get_config("num_fewshot") is None:
                task.set_config(key="num_fewshot", value=0)
            task.set_fewshot_seed(seed=self.options.seed)
        group = next((g for g in loaded.get("groups", {}).values() if g.name == name and g.has_aggregation), None)
        means = {m.metric: m.weight_by_size for m in group.aggregate_metric_list} if group else {}
        return HarnessTask(name, tasks, means, self.options)

    def _require_consent(self, name: str) -> None:
        if not self.options.run_code:
            raise UserError(
                f"task {name} runs programs that the model writes, and a metric's program from the hub, on this "
                "machine; allow it with --run-code, in a container"
            )


class HarnessTask:
    """A task, or a group of them. `means`: metrics that a group is judged by, and whether its parts weigh by size."""

    def __init__(self, name: str, tasks: Mapping[str, "Task"], means: Mapping[str, bool], options: TaskOptions) -> None:
        self.name = Path(name).stem if _is_file(name) else name
        self.tasks, self.means, self.options = tasks, means, options
        self.writes = any(task.OUTPUT_TYPE == "generate_until" for task in tasks.values())

    @property
    def version(self) -> str:
        own = sorted({str(task.VERSION) for task in self.tasks.values() if task.VERSION is not None})
        return f"lm-eval {version('lm_eval')}, task {' and '.join(own) or 'without version'}"

    def ask(self, text: TaskText) -> str:
        """Build all questions; returns the SHA-256 (hex) of them."""
        from klquant.evaluate.tasks.adapter import Adapter

        render = Adapter.apply_chat_template
        digest = hashlib.sha256()
        for name, task in self.tasks.items():
            with _one_line(name):
                task.build_all_requests(
                    limit=self.options.limit, rank=0, world_size=1, apply_chat_template=self.options.chat,
                    fewshot_as_multiturn=self.options.chat,
                    chat_template=lambda *a, **k: render(_Renderer(text), *a, **k),
                )  # fmt: skip
            for request in task.instances:
                asked = [name, request.request_type, request.doc_id, request.idx, *request.args]
                digest.update(json.dumps(asked, default=str).encode())
                if request.request_type == "generate_until" and _samples(request.args[1]):
                    raise UserError(f"task {name} samples its answers; only greedy ones can be compared, leave it out")
        return digest.hexdigest()

    def run(self, model: TaskModel, text: TaskText, watcher: Watcher, stage: str, sha256: str) -> list[TaskResult]:
        from klquant.evaluate.tasks.adapter import Adapter

        adapter, text.cut = Adapter(model, text, watcher, self.name, stage), 0
        by_kind = defaultdict(list)
        for task in self.tasks.values():
            for request in task.instances:
                request.resps, request.filtered_resps = [], {}
                by_kind[request.request_type] += [request] * request.repeats
        for kind, requests in by_kind.items():
            for request, answer in zip(requests, getattr(adapter, kind)(requests), strict=True):
                request.resps.append(answer)
        scores = {name: _score(task) for name, task in self.tasks.items()}
        results = self._together(scores, sha256) if self.means else self._apart(scores, sha256)
        return [r.model_copy(update={"cut": text.cut}) for r in results]

    def _together(self, scores: Mapping[str, Scores], sha256: str) -> list[TaskResult]:
        """One result for the group in each of its metrics."""
        keys = [key for key in next(iter(scores.values())) if key[0] in self.means]
        results = []
        for key in dict.fromkeys(keys):
            parts = {name.removeprefix(f"{self.name}_"): x[key] for name, x in scores.items() if key in x}
            weighted_by = "items" if self.means[key[0]] else "parts"
            value = task_value(parts, weighted_by)
            results.append(self._result(self.name, list(self.tasks.values()), key, value, weighted_by, sha256))
        return results

    def _apart(self, scores: Mapping[str, Scores], sha256: str) -> list[TaskResult]:
        return [
            self._result(name, [self.tasks[name]], key, _value(self.tasks[name], key[0], items), "items", sha256)
            for name, by_metric in scores.items()
            for key, items in by_metric.items()
        ]

    def _result(
        self, name: str, tasks: list["Task"], key: tuple[str, str], value: TaskValue, weighted_by: str, sha256: str
    ) -> TaskResult:
        metric, how = key
        shots = {task.get_config("num_fewshot") for task in tasks}
        return TaskResult(
            **dict(value), task=name, metric=metric if how == "none" else f"{metric}, {how}",
            higher_is_better=bool(tasks[0].higher_is_better().get(metric, True)),
            chance=_chance(tasks) if metric in GUESSED else None, weighted_by=weighted_by,
            items=sum(p.items for p in value.parts), cut=0, few_shot=shots.pop() if len(shots) == 1 else None,
            limit=self.options.limit, seed=self.options.seed, chat=self.options.chat, version=self.version,
            sha256=sha256,
        )  # fmt: skip


class _Renderer:
    """As much of an Adapter as rendering a chat needs."""

    def __init__(self, text: TaskText) -> None:
        self.text = text


def _score(task: "Task") -> Scores:
    """Answers → what each item gives in every metric, through the task's filters."""
    task.apply_filters()
    by_item = defaultdict(list)
    for request in task.instances:
        by_item[request.doc_id].append(request)
    found = defaultdict(list)
    for how in task.instances[0].filtered_resps:
        for requests in by_item.values():
            requests.sort(key=lambda r: r.idx)
            given = task.process_results(requests[0].doc, [r.filtered_resps[how] for r in requests])
            for metric, value in given.items():
                found[metric, how].append(value)
    return found


def _value(task: "Task", metric: str, items: Sequence[Any]) -> TaskValue:
    from lm_eval.api.metrics import mean, stderr_for_metric

    aggregate = task.aggregation().get(metric, mean)
    if aggregate is mean and all(isinstance(x, int | float) for x in items):
        return task_value({task.task_name: items}, "items")
    spread = stderr_for_metric(aggregate, RESAMPLES)
    value, error = float(aggregate(items)), spread(items) if spread is not None and len(items) > 1 else None
    part = TaskPart(name=task.task_name, items=len(items), value=value, standard_error=error, scores=None)
    return TaskValue(value=value, standard_error=error, parts=[part])


def _chance(tasks: Sequence["Task"]) -> float | None:
    """What guessing gets right of multiple choice."""
    shares = []
    for task in tasks:
        if task.OUTPUT_TYPE != "multiple_choice":
            return None
        choices = defaultdict(set)
        for request in task.instances:
            choices[request.doc_id].add(request.args)
        shares += [1 / len(c) for c in choices.values()]
    return sum(shares) / len(shares)


def _samples(settings: Mapping[str, Any]) -> bool:
    """What a task says of its writing, as lm-eval understands it."""
    return bool(settings.get("do_sample", (settings.get("temperature") or 0) > 0))


def _is_file(name: str) -> bool:
    return name.endswith((".yaml", ".yml"))


@contextmanager
def _one_line(name: str):
    """lm-eval, datasets and a task's own code raise and print what they like; a user gets one line with what to do."""
    try:
        with redirect_stderr(StringIO()):
            yield
    except UserError:
        raise
    except ModuleNotFoundError as error:
        raise UserError(f"task {name} needs the package {error.name}, which is not installed") from None
    except (ConnectionError, FileNotFoundError) as error:
        raise UserError(
            f"task {name}: its data is neither cached nor in reach ({_first(error)}); run it once with network, or "
            "bring a Hugging Face cache (HF_HOME) that has it"
        ) from None
    except Exception as error:
        raise UserError(f"task {name} cannot be loaded: {type(error).__name__}: {_first(error)}") from None


def _first(error: Exception) -> str:
    return next(iter(str(error).splitlines()), "")[:160]
