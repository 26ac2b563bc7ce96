"""Our models as lm-eval sees them. Importing this file imports lm-eval."""

import logging
from collections.abc import Sequence

from lm_eval.api.instance import Instance
from lm_eval.api.model import LM
from lm_eval.utils import get_rolling_token_windows, make_disjoint_window

from klquant.evaluate.options import Watcher
from klquant.evaluate.tasks.generate import Prompt, generate
from klquant.evaluate.tasks.model import Answer, Query, TaskModel, require_resident
from klquant.evaluate.tasks.text import TaskText

MOST_NEW = 256  # tokens of an answer where a task does not say; lm-eval's own default for local models
_MOST = ("max_gen_toks", "max_new_tokens", "max_tokens", "max_completion_tokens")  # a task's names for it

logging.getLogger("lm_eval").setLevel(logging.ERROR)  # what a user should know of it is in the result


class Adapter(LM):
    """Answers lm-eval's requests for one task; `stage` is what a watcher hears of it."""

    def __init__(self, model: TaskModel, text: TaskText, watcher: Watcher, task: str, stage: str) -> None:
        super().__init__()
        self.model, self.text, self.watcher, self.task, self.stage = model, text, watcher, task, stage

    @property
    def tokenizer_name(self) -> str:
        return str(self.text.tokenizer.file)

    def apply_chat_template(self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True) -> str:
        return self.text.render(chat_history, add_generation_prompt)

    def loglikelihood(self, requests: Sequence[Instance]) -> list[tuple[float, bool]]:
        """Continuations of the same context pass together."""
        wanted: dict[tuple[int, ...], list[list[int]]] = {}
        places = []
        for request in requests:
            context, continuation = self.text.pair(*request.args[:2])
            continuations = wanted.setdefault(tuple(context), [])
            places.append((tuple(context), len(continuations)))
            continuations.append(continuation)
        queries = [Query(list(context), continuations) for context, continuations in wanted.items()]
        answers = dict(zip(wanted, self._answer(queries), strict=True))
        return [tuple(answers[context][k]) for context, k in places]

    def loglikelihood_rolling(self, requests: Sequence[Instance]) -> list[float]:
        """log p of whole documents, in windows of the longest sequence where they exceed it."""
        queries, owners = [], []
        for i, request in enumerate(requests):
            windows = get_rolling_token_windows(
                self.text.encode(request.args[0]), self.text.tokenizer.bos_id, self.text.room - 1, 1
            )
            for context, continuation in map(make_disjoint_window, windows):
                queries.append(Query(context, [continuation]))
                owners.append(i)
        sums = [0.0] * len(requests)
        for i, (answer,) in zip(owners, self._answer(queries), strict=True):
            sums[i] += answer.logprob
        return sums

    def generate_until(self, requests: Sequence[Instance]) -> list[str]:
        require_resident(self.model.runner, self.task)
        prompts, stops = [], []
        for request in requests:
            context, settings = request.args[0], request.args[1]
            until = settings.get("until") or []
            stops.append([until] if isinstance(until, str) else list(until))
            most = next((int(settings[name]) for name in _MOST if settings.get(name) is not None), MOST_NEW)
            ids = self.text.fitted(self.text.context(context), most)
            prompts.append(Prompt(ids, most, lambda written, stop=stops[-1]: self._ended(written, stop)))
        self.watcher.begin(self.stage, len(prompts))
        written = generate(self.model, prompts, self.watcher.advance)
        return [self._cut(ids, stop) for ids, stop in zip(written, stops, strict=True)]

    def _answer(self, queries: Sequence[Query]) -> list[list[Answer]]:
        batches = self.model.plan(queries)
        self.watcher.begin(self.stage, self.model.work(batches))
        return self.model.answer(queries, batches, self.watcher.advance)

    def _ended(self, written: list[int], stops: list[str]) -> bool:
        if written[-1] in self.text.ends:
            return True
        text = self.text.tokenizer.decode(written)
        return any(stop in text for stop in stops)

    def _cut(self, ids: list[int], stops: list[str]) -> str:
        if ids and ids[-1] in self.text.ends:
            ids = ids[:-1]
        text = self.text.tokenizer.decode(ids)
        return text[: min((at for stop in stops if (at := text.find(stop)) >= 0), default=len(text))]
