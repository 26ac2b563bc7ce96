"""Real lm-eval tasks over local data, against lm-eval's own loop on transformers' logits."""

import json
import random
import shutil
from dataclasses import replace

import pytest
import torch

from klquant.errors import UserError
from klquant.evaluate.options import TaskOptions
from klquant.evaluate.run import evaluate
from tests.evaluate.test_run import Stages

lm_eval = pytest.importorskip("lm_eval", reason="lm-eval is not installed: pip install 'klquant[tasks]'")

from lm_eval import evaluator  # noqa: E402
from lm_eval.api.model import LM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

HEAD = "task: {name}\ndataset_path: json\ndataset_kwargs: {{data_files: {{test: {data}}}}}\ntest_split: test\n"
PICK = """output_type: multiple_choice
doc_to_text: "{{question}}\\nAnswer:"
doc_to_choice: choices
doc_to_target: answer
metric_list: [{metric: acc}, {metric: acc_norm}]
metadata: {version: 3}
"""
WRITE = """output_type: generate_until
doc_to_text: "{{question}}\\nAnswer:"
doc_to_target: word
generation_kwargs: {until: ["e", "\\n"], max_gen_toks: 7}
metric_list: [{metric: exact_match}]
"""
ROLL = """output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: question
metric_list: [{metric: word_perplexity}, {metric: bits_per_byte}]
"""


@pytest.fixture
def home(tmp_path, monkeypatch):
    """No cache but this one, no network."""
    import datasets

    monkeypatch.setattr(datasets.config, "HF_DATASETS_CACHE", str(tmp_path / "cache"))
    return tmp_path


@pytest.fixture
def tasks(home):
    """name → YAML file; `pick` and `more` have questions of their own."""
    files = {}
    for name, body, seed in (("pick", PICK, 0), ("more", PICK, 1), ("write", WRITE, 0), ("roll", ROLL, 0)):
        draw = random.Random(seed)
        rows = []
        for i in range(9 + seed):
            choices = draw.sample(["ab", "cd e", "f", "a long answer", "the end"], 3)
            rows.append({"question": f"Which {'one ' * i}of {draw.random()}?", "choices": choices,
                         "answer": draw.randrange(3), "word": choices[0]})  # fmt: skip
        (home / f"{name}.json").write_text("".join(json.dumps(row) + "\n" for row in rows))
        files[name] = home / f"{name}.yaml"
        files[name].write_text(HEAD.format(name=name, data=home / f"{name}.json") + body)
    return files


class Truth(LM):
    """lm-eval's requests answered one by one by transformers; nothing of klquant's but the tokenizer."""

    def __init__(self, log_probs, tokenizer):
        super().__init__()
        self.log_probs, self.tokenizer = log_probs, tokenizer

    def loglikelihood(self, requests):
        return [self.one(*request.args) for request in requests]

    def one(self, context, continuation):
        head, tail = [0, *self.tokenizer.encode(context)], self.tokenizer.encode(continuation)
        logp = self.log_probs([*head, *tail])[len(head) - 1 : -1]
        wanted = torch.tensor(tail)
        return float(logp.gather(-1, wanted[:, None]).sum()), bool((logp.argmax(-1) == wanted).all())

    def loglikelihood_rolling(self, requests):
        return [self.one("", request.args[0])[0] for request in requests]

    def generate_until(self, requests):
        return [self.written(*request.args) for request in requests]

    def written(self, context, settings):
        ids, text = [0, *self.tokenizer.encode(context)], ""
        start = len(ids)
        while len(ids) - start < settings["max_gen_toks"] and not any(stop in text for stop in settings["until"]):
            ids.append(int(self.log_probs(ids)[-1].argmax()))
            if ids[-1] == 1:
                ids.pop()
                break
            text = self.tokenizer.decode(ids[start:])
        return text[: min((text.find(stop) for stop in settings["until"] if stop in text), default=len(text))]


def run(folder, options, out, names, watcher=None, **asked):
    names = tuple(map(str, names))
    return evaluate(folder, None, out, replace(options, tasks=TaskOptions(names, **asked)), watcher).tasks


def expected(file, truth, tokenizer):
    """lm-eval's own figures by task."""
    loaded = TaskManager(include_defaults=False).load([str(file)])
    return evaluator.evaluate(Truth(truth, tokenizer), loaded, bootstrap_iters=10)["results"]


def test_every_kind_of_task_scores_as_lm_eval_on_transformers(tiny, options, tasks, truth, tokenizer, tmp_path):
    scores = run(tiny, options, tmp_path / "r.json", [tasks[n] for n in ("pick", "write", "roll")])
    assert [(t.task, t.metric, t.items) for t in scores] == [
        ("pick", "acc", 9), ("pick", "acc_norm", 9), ("write", "exact_match", 9),
        ("roll", "word_perplexity", 9), ("roll", "bits_per_byte", 9),
    ]  # fmt: skip
    for t in scores:
        theirs = expected(tasks[t.task], truth, tokenizer)[t.task]
        assert t.value == pytest.approx(theirs[f"{t.metric},none"], rel=1e-5)
        error = theirs[f"{t.metric}_stderr,none"]
        assert t.standard_error == (None if error == "N/A" else pytest.approx(error))
    by_name = {(t.task, t.metric): t for t in scores}
    assert by_name["pick", "acc"].chance == pytest.approx(1 / 3) and by_name["write", "exact_match"].chance is None
    assert by_name["pick", "acc"].version == f"lm-eval {lm_eval.__version__}, task 3"
    assert not by_name["roll", "bits_per_byte"].higher_is_better
    assert by_name["roll", "word_perplexity"].parts[0].scores is None


def test_the_adapters_log_likelihoods_and_texts_are_transformers(tiny, tasks, truth, tokenizer, open_model):
    from klquant.evaluate.options import Silent
    from klquant.evaluate.tasks.adapter import Adapter
    from klquant.evaluate.tasks.text import TaskText

    lm, other = (
        Adapter(open_model(tiny), TaskText(tokenizer, tiny, 4096, False), Silent(), "t", "t"), Truth(truth, tokenizer),
    )  # fmt: skip
    for name in ("pick", "roll", "write"):
        (task,) = TaskManager(include_defaults=False).load([str(tasks[name])])["tasks"].values()
        task.set_config("num_fewshot", 0)
        task.build_all_requests(limit=None, rank=0, world_size=1)
        kind = task.instances[0].request_type
        ours, theirs = getattr(lm, kind)(task.instances), getattr(other, kind)(task.instances)
        if kind == "loglikelihood":
            assert [greedy for _, greedy in ours] == [greedy for _, greedy in theirs]
            ours, theirs = ([logprob for logprob, _ in x] for x in (ours, theirs))
        assert ours == (theirs if kind == "generate_until" else pytest.approx(theirs, rel=1e-5))
        assert len(set(ours)) > 4


def test_a_document_longer_than_the_context_is_scored_whole(tiny, truth, tokenizer, open_model):
    from lm_eval.api.instance import Instance

    from klquant.evaluate.options import Silent
    from klquant.evaluate.tasks.adapter import Adapter
    from klquant.evaluate.tasks.text import TaskText

    document, room = "The quick brown fox " * 5, 30
    lm = Adapter(open_model(tiny), TaskText(tokenizer, tiny, room, False), Silent(), "t", "t")
    (ours,) = lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (document,), 0)])
    ids, total = [0, *tokenizer.encode(document)], 0.0
    for at in range(1, len(ids)):  # each token once, with all or at least the window's context before it
        start = 0 if at < room else min(len(ids), -(-at // (room - 1)) * (room - 1) + 1) - room
        total += float(truth(ids[start : at + 1])[-2, ids[at]])
    assert ours == pytest.approx(total, rel=1e-5)


@pytest.mark.parametrize("by_size", [True, False])
def test_a_group_is_one_row_with_its_parts(
    tiny, options, tasks, truth, tokenizer, home, tmp_path, monkeypatch, by_size
):  # fmt: skip
    (home / "both.yaml").write_text(
        f"group: both\ntask: [pick, more]\naggregate_metric_list: [{{metric: acc, weight_by_size: {by_size}}}]\n"
    )
    manager = TaskManager(include_defaults=False, include_path=home)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    (score,) = run(tiny, options, tmp_path / "r.json", ["both"])
    theirs = evaluator.evaluate(Truth(truth, tokenizer), manager.load(["both"]))["results"]
    assert (score.task, score.metric, score.items) == ("both", "acc", 19)
    assert score.weighted_by == ("items" if by_size else "parts")
    assert {p.name: p.items for p in score.parts} == {"pick": 9, "more": 10}
    assert score.value == pytest.approx(theirs["both"]["acc,none"])
    for part in score.parts:
        assert part.value == pytest.approx(theirs[part.name]["acc,none"])
    if not by_size:  # by size lm-eval pools variances, as if all parts had the same
        assert score.standard_error == pytest.approx(theirs["both"]["acc_stderr,none"])


def test_limit_few_shot_and_seed_are_heeded(tiny, options, tasks, tmp_path):
    def first(**asked):
        return run(tiny, options, tmp_path / "r.json", [tasks["pick"]], **asked)[0]

    plain, few, again, other = first(), first(few_shot=2), first(few_shot=2), first(few_shot=2, seed=5)
    assert (plain.few_shot, few.few_shot, few.items, first(limit=4).items) == (0, 2, 9, 4)
    assert few == again and len({plain.sha256, few.sha256, other.sha256}) == 3


def test_chats_are_asked_through_the_template(tiny, options, tasks, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    plain, chat = (run(folder, options, tmp_path / "r.json", [tasks["pick"]], chat=c)[0] for c in (False, True))
    assert chat.chat and not plain.chat and chat.sha256 != plain.sha256


def test_text_is_refused_before_anything_is_computed_where_the_model_does_not_stay(
    tiny, options, tasks, tmp_path, streamed
):
    watcher = Stages()
    with pytest.raises(UserError, match="task write has the model write text, which needs all of it on the device"):
        run(tiny, options, tmp_path / "r.json", [tasks["write"]], watcher)
    assert [name.split()[0] for name, _ in watcher.stages] == ["questions"]
    assert run(tiny, options, tmp_path / "r.json", [tasks["pick"]])[0].items == 9


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda text: text.replace("write.json", "none.json"), "its data is neither cached nor in reach"),
        (lambda text: text.replace(": json", ": nobody/nothing"), "its data is neither cached nor in reach"),
        (lambda text: text + "unsafe_code: true\n", "runs programs that the model writes.* --run-code"),
        (lambda text: text.replace("max_gen_toks: 7", "do_sample: true"), "samples its answers"),
        (lambda text: "task: [", "cannot be loaded: "),
    ],
)
def test_what_a_user_can_mend_is_one_line(tiny, options, tasks, tmp_path, capfd, edit, message):
    tasks["write"].write_text(edit(tasks["write"].read_text()))
    with pytest.raises(UserError, match=f"write(.yaml)?:? .*{message}") as error:
        run(tiny, options, tmp_path / "r.json", [tasks["write"]])
    assert len(str(error.value).splitlines()) == 1 and not (tmp_path / "r.json").exists()
    assert capfd.readouterr() == ("", "")


def test_a_package_that_a_task_needs_is_named(tiny, options, tasks, tmp_path):
    (tasks["write"].parent / "helper.py").write_text("import rare_package\n")
    tasks["write"].write_text(tasks["write"].read_text() + "process_docs: !function helper.f\n")
    with pytest.raises(UserError, match=r"write\.yaml needs the package rare_package, which is not installed"):
        run(tiny, options, tmp_path / "r.json", [tasks["write"]])


def test_unknown_names_get_near_ones_and_missing_files_are_said(tiny, options, tasks, home, tmp_path, monkeypatch):
    manager = TaskManager(include_defaults=False, include_path=home)
    monkeypatch.setattr("lm_eval.tasks.TaskManager", lambda **_: manager)
    for name, hint in (
        ("writes", "near it: write"),
        ("needel", "near it: needle"),
        ("zzz", "`lm-eval ls tasks` names"),
    ):
        with pytest.raises(UserError, match=rf"no task '{name}'; {hint}"):
            run(tiny, options, tmp_path / "r.json", [name])
    with pytest.raises(UserError, match=r"none\.yaml: no such file"):
        run(tiny, options, tmp_path / "r.json", ["none.yaml"])
