"""The engine as a whole: answers do not depend on who else is served, how prompts are cut, or what was there before."""

from dataclasses import replace

import pytest
import torch

from klquant.calibrate.chat import ChatTemplate
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.checkpoint.quantized import QuantizedReader
from klquant.checkpoint.reader import CheckpointReader
from klquant.engine.build import OneDevice
from klquant.engine.engine import Engine
from klquant.engine.limits import Limits
from klquant.engine.load import load_weights
from klquant.engine.request import SamplingParams
from klquant.engine.session import Chat, Session
from klquant.errors import UserError
from klquant.model.forward import Model

LIMITS = Limits(max_context=256, max_batch=3, cache_tokens=512, chunk=31)
GREEDY = SamplingParams(max_new_tokens=12, ignore_eos=True)
DRAWN = SamplingParams(max_new_tokens=12, temperature=1.0, seed=4, ignore_eos=True)


@pytest.fixture(scope="module")
def loaded(tiny):
    """Weights and tokenizer, once."""
    with Engine.from_pretrained(tiny, devices="cpu") as engine:
        yield engine.runner.weights, engine.tokenizer


def make(loaded, ahead=False, **changes):
    return Engine(*loaded, replace(LIMITS, **changes), ahead=ahead)


@pytest.fixture
def engine(loaded):
    return make(loaded)


def random_ids(length, seed=0):
    return torch.randint(3, 259, (length,), generator=torch.Generator().manual_seed(seed)).tolist()


PROMPTS = [random_ids(n, seed=n) for n in (1, 63, 64, 65, 130, 7, 30)]


def singles(loaded, params):
    return [make(loaded, chunk=1000).generate([ids], p)[0].tokens for ids, p in zip(PROMPTS, params, strict=True)]


def test_greedy_tokens_are_the_models(loaded, tiny):
    model = Model.load(CheckpointReader.open(tiny), torch.float32, "cpu")
    for ids, answer in zip(PROMPTS[:4], make(loaded).generate(PROMPTS[:4], GREEDY), strict=True):
        with torch.no_grad():
            logits = model.logits(torch.tensor([[*ids, *answer.tokens]]))[0]
        assert list(answer.tokens) == logits[len(ids) - 1 : -1].argmax(-1).tolist()


@pytest.mark.parametrize("ahead", [False, True])
def test_answers_are_those_of_each_prompt_alone(loaded, ahead):
    """More prompts than slots, prompts cut into odd chunks, greedy and drawn, sorted and not, all mixed."""
    kinds = (GREEDY, DRAWN, replace(DRAWN, top_p=0.9, seed=5), replace(DRAWN, max_new_tokens=3, logprobs=2))
    params = [kinds[i % 4] for i in range(len(PROMPTS))]
    answers = make(loaded, ahead).generate(PROMPTS, params)
    assert [a.tokens for a in answers] == singles(loaded, params)
    assert all(a.finish == "length" and a.error is None for a in answers)


def test_everything_is_free_afterwards(engine):
    engine.generate(PROMPTS, GREEDY)
    list(engine.stream(PROMPTS[3], GREEDY))
    next(iter(engine.stream(PROMPTS[4], GREEDY)))
    assert engine.loop.scheduler.pages.free == LIMITS.pages and engine.loop.scheduler.slots.free == LIMITS.max_batch
    assert not engine.loop.jobs and not engine.loop.step()


def test_answers_survive_poisoned_memory(loaded):
    """NaN in all pages and slots that are free: what was given back is not read."""
    params = [GREEDY] * len(PROMPTS)
    engine = make(loaded)
    engine.generate(PROMPTS, GREEDY)
    for stage in engine.runner.stages:
        for pages in stage.state.latent.values():
            pages.data.fill_(float("nan"))
        for kda in stage.state.kda.values():
            kda.s.fill_(float("nan")), kda.conv.fill_(float("nan"))
    assert [a.tokens for a in engine.generate(PROMPTS, GREEDY)] == singles(loaded, params)


def test_streams_side_by_side(loaded):
    engine = make(loaded, ahead=True)
    streams = [engine.stream(ids, GREEDY) for ids in PROMPTS[:3]]
    tokens = [[], [], []]
    for parts in zip(*streams, strict=True):
        for got, part in zip(tokens, parts, strict=True):
            got += part.tokens
    assert [tuple(t) for t in tokens] == singles(loaded, [GREEDY] * len(PROMPTS))[:3]


def test_a_seed_is_drawn_and_reported(engine):
    first, second = engine.generate([PROMPTS[1]] * 2, replace(DRAWN, seed=None))
    assert first.seed != second.seed
    again = engine.generate([PROMPTS[1]], replace(DRAWN, seed=first.seed))[0]
    assert again.tokens == first.tokens


def test_logprobs_are_the_models(loaded, tiny):
    answer = make(loaded).generate([PROMPTS[2]], replace(DRAWN, logprobs=3))[0]
    model = Model.load(CheckpointReader.open(tiny), torch.float32, "cpu")
    with torch.no_grad():
        logp = model.logits(torch.tensor([[*PROMPTS[2], *answer.tokens]]))[0].log_softmax(-1)[len(PROMPTS[2]) - 1 : -1]
    for row, token, found in zip(logp, answer.tokens, answer.logprobs, strict=True):
        assert found.token == token and found.logprob == pytest.approx(row[token].item(), abs=1e-4)
        assert [t for t, _ in found.top] == row.topk(3).indices.tolist()


def test_stop_texts_and_end_tokens_end_an_answer(loaded):
    engine = make(loaded)
    whole = engine.generate([PROMPTS[1]], replace(GREEDY, max_new_tokens=40))[0]
    stop = whole.text[9:12]
    at = whole.text.index(stop)
    for ahead in (False, True):
        parts = list(make(loaded, ahead).stream(PROMPTS[1], replace(GREEDY, max_new_tokens=40, stop=("zzz", stop))))
        assert "".join(p.text for p in parts) == whole.text[:at] and parts[-1].finish == "stop"
    end = whole.tokens[5]
    first = whole.tokens.index(end)
    ending = Engine(*loaded, LIMITS, ends=frozenset([end]))
    answer = ending.generate([PROMPTS[1]], replace(GREEDY, ignore_eos=False))[0]
    assert answer.finish == "eos" and answer.tokens == whole.tokens[: first + 1]
    assert ending.generate([PROMPTS[1]], GREEDY)[0].finish == "length"


def test_text_is_that_of_the_tokens(engine):
    answer = engine.generate(["Größe: 5 €"], replace(DRAWN, max_new_tokens=60))[0]
    assert answer.text == engine.tokenizer.decode(answer.tokens)


def test_the_context_ends_an_answer(engine):
    answer = engine.generate([random_ids(250)], GREEDY)[0]
    assert answer.finish == "context" and len(answer.tokens) == 6


def test_refusals_name_what_is_wrong(loaded, tiny):
    engine = make(loaded, cache_tokens=128)
    for prompt, message in (
        ("", "the prompt is empty"), ([], "the prompt is empty"), ([5, 400], "token id 400 is outside"),
        (random_ids(256), "the prompt has 256 tokens, which fills the context of 256"),
        (random_ids(200), "needs 4 cache pages of 64 tokens, the engine has 2: 2 missing"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            engine.generate([PROMPTS[0], prompt], GREEDY)
        with pytest.raises(UserError, match=message):
            engine.stream(prompt, GREEDY)
    assert not engine.loop.jobs
    for options, message in (
        ({"devices": "cuda:7"}, "cuda:7"), ({"devices": "tpu"}, "unknown device 'tpu'"),
        ({"max_context": 5000}, "max_context 5,000 is beyond the model's own limit of 4,096"),
        ({"max_memory": {"cpu": 100_000}}, "GiB are missing"), ({"max_batch": 0}, "max_batch is 0"),
        ({"cache_bits": 4}, "cache_bits is 4, expected 16 or 8"),
    ):  # fmt: skip
        with pytest.raises(UserError, match=message):
            Engine.from_pretrained(tiny, **{"devices": "cpu", **options})


def test_logits_that_are_no_numbers_end_only_their_own_answer(loaded, tiny):
    """Token 300 has an embedding of NaN: who says it fails, and the others do not notice."""
    broken, tokenizer = Engine.from_pretrained(tiny, devices="cpu").runner.weights, loaded[1]
    broken.embedding_VC[300] = float("nan")
    for ahead in (False, True):
        engine = Engine(broken, tokenizer, LIMITS, ahead=ahead)
        answers = engine.generate([PROMPTS[1], [5, 300, 6], PROMPTS[2]], GREEDY)
        assert answers[1].finish == "error" and "model.embed_tokens is the first" in answers[1].error
        assert not answers[1].tokens
        want = singles(loaded, [GREEDY] * len(PROMPTS))
        assert [answers[0].tokens, answers[2].tokens] == want[1:3]
        assert engine.loop.scheduler.pages.free == LIMITS.pages


@pytest.mark.parametrize("ahead", [False, True])
def test_a_second_turn_is_one_prompt_of_everything(loaded, ahead):
    engine = make(loaded, ahead)
    with Session(engine) as session:
        ids = random_ids(70)
        for seed in (1, 2, 3):
            list(session.stream(ids, DRAWN))
            computed = session.computed
            assert computed >= len(ids)
            ids = [*session.tokens, *random_ids(9, seed)]
        list(session.stream(ids, DRAWN))
        assert tuple(session.tokens[len(ids) :]) == make(loaded).generate([ids], DRAWN)[0].tokens
        assert session.computed > computed
        # Another beginning: the state is of no use, and not used.
        other = random_ids(40, 8)
        list(session.stream(other, DRAWN))
        assert tuple(session.tokens[40:]) == make(loaded).generate([other], DRAWN)[0].tokens
    assert engine.loop.scheduler.pages.free == LIMITS.pages and engine.loop.scheduler.slots.free == LIMITS.max_batch


@pytest.mark.parametrize("goes_on", [True, False])
def test_a_refused_prompt_leaves_a_session_as_it_was(loaded, goes_on):
    engine = make(loaded)
    with Session(engine) as session:
        list(session.stream(random_ids(40), DRAWN))
        before = session.answer(), session.tokens, session.computed
        start = session.tokens if goes_on else random_ids(40, 8)
        with pytest.raises(UserError, match="fills the context"):
            session.stream([*start, *random_ids(256)], DRAWN)
        assert (session.answer(), session.tokens, session.computed) == before
        ids = [*session.tokens, *random_ids(9)]
        list(session.stream(ids, DRAWN))
        assert session.answer().tokens == make(loaded).generate([ids], DRAWN)[0].tokens
    assert all_free(engine)


def test_a_turn_computes_only_what_is_new(loaded, monkeypatch):
    engine = make(loaded, chunk=1000)
    seen = []
    real = engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda spans: seen.extend(len(s.ids) for s in spans) or real(spans))
    chat = Chat(engine)
    for text in ("hello", "more", "and more"):
        list(chat.ask(text, GREEDY))
    tokenizer = engine.tokenizer
    added = [len(tokenizer.encode(f"\n\nuser: {text}\n\nassistant: ")) for text in ("more", "and more")]
    # The last token of an answer was never fed.
    assert seen[1:] == [1 + n for n in added]
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 3
    chat.reset()
    assert engine.loop.scheduler.slots.free == LIMITS.max_batch


@pytest.mark.parametrize("ahead", [False, True])
def test_an_end_token_that_the_template_writes_is_computed_once(loaded, ahead, monkeypatch):
    """Launched ahead, the state has seen the end token already; otherwise it is the first of what is new."""
    weights, plain = loaded
    first = make(loaded).generate(["u:hello;a:"], replace(GREEDY, max_new_tokens=60))[0]
    end = next(t for t in first.tokens[2:] if plain.decode([t]).isascii() and plain.decode([t]).isalnum())
    source = (
        "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}u:{{ m.content }};a:"
        f"{{% else %}}{{{{ m.content }}}}{plain.decode([end])}{{% endif %}}{{% endfor %}}"
    )
    tokenizer = replace(plain, template=ChatTemplate(source, "here"))
    engine = Engine(weights, tokenizer, LIMITS, ends=frozenset([end]), ahead=ahead)
    seen, real = [], engine.runner.prefill
    monkeypatch.setattr(engine.runner, "prefill", lambda spans: seen.extend(list(s.ids) for s in spans) or real(spans))
    chat = Chat(engine)
    params = replace(GREEDY, max_new_tokens=60, ignore_eos=False)
    list(chat.ask("hello", params))
    assert chat.session.answer().finish == "eos"
    list(chat.ask("more", params))
    assert seen[-1] == ([] if ahead else [end]) + plain.encode("u:more;a:")
    said = chat.session.answer().tokens
    assert engine.generate([chat.session.tokens[: -len(said)]], params)[0].tokens == said


def test_a_conversation_goes_on_after_being_cancelled(loaded):
    engine = make(loaded)
    chat = Chat(engine)
    answer = chat.ask("hello", GREEDY)
    said = "".join(next(answer).text for _ in range(4))
    answer.close()
    assert chat.session.answer().finish == "cancelled" and chat.messages[1]["content"].startswith(said)
    computed = chat.session.computed
    list(chat.ask("more", GREEDY))
    text = engine.tokenizer.decode(chat.session.tokens)
    assert text.endswith(chat.messages[-1]["content"]) and "\n\nuser: more\n\nassistant: " in text
    assert len(chat.session.answer().tokens) == GREEDY.max_new_tokens and chat.session.computed > computed


def test_asking_on_ends_the_answer_before(loaded):
    chat = Chat(make(loaded))
    first = chat.ask("hello", GREEDY)
    said = next(first).text
    list(chat.ask("more", GREEDY))
    assert [m["role"] for m in chat.messages] == ["user", "assistant"] * 2
    assert chat.messages[1]["content"].startswith(said) and not list(first)


def test_what_a_stop_text_cut_off_was_not_said(loaded):
    engine = make(loaded)
    chat = Chat(engine)
    whole = "".join(delta.text for delta in chat.ask("hello", replace(GREEDY, max_new_tokens=40)))
    stop = whole[len(whole) // 2 :][:1]
    chat.reset()
    list(chat.ask("hello", replace(GREEDY, max_new_tokens=40, stop=(stop,))))
    list(chat.ask("more", GREEDY))
    said = whole[: whole.index(stop)]
    assert chat.messages[1]["content"] == said
    assert chat.session.answer().tokens == engine.generate([chat.messages[:-1]], GREEDY)[0].tokens


def all_free(engine):
    scheduler = engine.loop.scheduler
    return not engine.loop.jobs and scheduler.pages.free == LIMITS.pages and scheduler.slots.free == LIMITS.max_batch


def test_a_sessions_older_stream_does_not_end_its_newer_one(loaded):
    engine = make(loaded)
    with Session(engine) as session:
        older = session.stream(random_ids(10), GREEDY)
        next(older)
        newer = session.stream(random_ids(12), GREEDY)
        older.close()
        assert [d.finish for d in newer][-1] == "length"
    assert all_free(engine)


def test_a_stream_that_nobody_looked_at_can_be_closed(loaded):
    engine = make(loaded)
    engine.stream(PROMPTS[0], GREEDY).close()
    assert all_free(engine)
    chat = Chat(engine)
    chat.ask("one", GREEDY)
    answer = list(chat.ask("two", GREEDY))
    assert answer[-1].finish == "length" and [m["content"] for m in chat.messages[:3]] == ["one", "", "two"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, torch.OutOfMemoryError])
def test_a_step_that_fails_ends_what_had_begun_and_nothing_else(loaded, monkeypatch, error):
    """In the middle of a prompt of a session, beside an answer, before a request that waits."""
    engine = make(loaded, max_batch=2)
    ids = random_ids(100)
    with Session(engine) as session:
        beside, turn = engine.stream(PROMPTS[0], GREEDY), session.stream(ids, GREEDY)
        waiting = engine.stream(PROMPTS[1], GREEDY)
        next(beside)

        def fail(*_):
            raise error

        with monkeypatch.context() as patch, pytest.raises(error):
            patch.setattr(engine.runner, "prefill", fail)
            list(turn)
        assert session.computed == 0
        assert [d.finish for d in beside][-1] == "error"
        assert "".join(d.text for d in waiting) == make(loaded).generate([PROMPTS[1]], GREEDY)[0].text
        list(session.stream([*ids, 7], GREEDY))
        assert session.answer().tokens == make(loaded).generate([[*ids, 7]], GREEDY)[0].tokens
    assert not engine.loop.jobs and engine.loop.scheduler.slots.free == 2


def test_closing_an_engine_ends_its_streams(loaded):
    engine = make(loaded)
    stream, session = engine.stream(PROMPTS[0], GREEDY), Session(engine)
    next(stream)
    session.stream(PROMPTS[1], GREEDY)
    engine.close()
    engine.close()
    assert [d.finish for d in stream][-1] == "cancelled"
    session.reset()


def test_a_second_thread_is_refused(loaded):
    engine = make(loaded)
    with engine.loop._stepping, pytest.raises(RuntimeError, match="another thread is at a step"):
        engine.generate([PROMPTS[0]], GREEDY)
    assert all_free(engine)


def test_idle_sessions_do_not_make_others_wait_for_ever(loaded):
    engine = make(loaded, cache_tokens=256)
    with Session(engine) as session:
        list(session.stream(random_ids(120), GREEDY))
        answer = engine.generate([random_ids(130)], GREEDY)[0]
        assert answer.finish == "error" and "2 cache pages of 64 tokens are missing: open sessions" in answer.error
    assert engine.generate([random_ids(130)], GREEDY)[0].finish == "length"


def test_packed_weights_answer_as_their_values_do(tiny, loaded):
    """The CPU holds plain values; packed ones, as on a GPU, go through the kernels' references."""
    reader = QuantizedReader.open(tiny)
    packed = load_weights(reader, OneDevice(torch.device("cpu"), reader.config.num_layers), torch.float32)
    engine = Engine(packed, load_tokenizer(tiny), LIMITS)
    assert [a.tokens for a in engine.generate(PROMPTS[:3], GREEDY)] == singles(loaded, [GREEDY] * len(PROMPTS))[:3]


def test_memory_is_reported_by_part(tiny):
    with Engine.from_pretrained(tiny, devices="cpu", max_context=256, max_batch=3) as engine:
        actual = {row.part: row.actual for row in engine.usage()}
        cfg = engine.cfg
    assert actual["latent_cache"] == 256 * cfg.latent_dim * 4
    assert actual["kda_state"] == 3 * 3 * (cfg.kda_heads * cfg.kda_dim**2 * 4 + 3 * cfg.kda_width * 3 * 4)


def test_an_answer_stops_from_outside(loaded):
    """As a signal handler does it."""
    engine = make(loaded)
    session = Session(engine)
    parts = []
    for part in session.stream(PROMPTS[3], GREEDY):
        parts.append(part)
        if len(parts) == 4:
            session.stop()
    assert parts[-1].finish == "cancelled" and len(session.answer().tokens) == 4
    assert not engine.loop.jobs
    session.reset()
    assert engine.loop.scheduler.slots.free == LIMITS.max_batch


@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_that_begins_with_an_earlier_one_computes_the_rest(loaded, ahead, monkeypatch):
    """And is answered as by an engine that computes all of it, whatever ran in between."""
    engine, other = make(loaded, ahead, prefixes=2), make(loaded, cache_tokens=1024)
    prefilled, prefill = [], engine.runner.prefill
    monkeypatch.setattr(
        engine.runner, "prefill", lambda spans: prefilled.extend(len(s.ids) for s in spans) or prefill(spans)
    )
    ids, reused = random_ids(70), []
    for turn in range(3):
        for params in (GREEDY, DRAWN):
            prefilled.clear()
            job = engine.submit(ids, params)
            list(engine.follow(job))
            assert job.answer().tokens == other.generate([ids], params)[0].tokens
            reused.append(job.scheduled.reused)
            assert sum(prefilled) == len(ids) - reused[-1]
        engine.generate([random_ids(9, seed=turn + 100)], GREEDY)
        ids = [*ids, *job.answer().tokens, *random_ids(20, seed=turn)]
    assert reused == [0, 70, 70, 102, 102, 134]


def test_two_that_begin_alike_share_what_they_begin_with_and_nothing_more(loaded):
    engine = make(loaded, prefixes=3)
    first = random_ids(40)
    engine.generate([first], GREEDY)
    both = [[*first, *random_ids(n, seed=n)] for n in (5, 33)]
    jobs = [engine.submit(ids, GREEDY) for ids in both]
    for job in jobs:
        list(engine.follow(job))
    assert [job.scheduled.reused for job in jobs] == [40, 40]
    assert [job.answer().tokens for job in jobs] == [make(loaded).generate([ids], GREEDY)[0].tokens for ids in both]


@pytest.mark.parametrize("cache_bits", [16, 8])
def test_prompts_that_begin_alike_are_read_once_up_to_there(loaded, cache_bits):
    """Such as those with the same instructions: the second finds where they part, the third goes on from there."""
    changes = {"cache_bits": cache_bits, "cache_tokens": 1024}
    engine, system, reused = make(loaded, prefixes=4, **changes), random_ids(150), []
    for n in range(4):
        ids = [*system, *random_ids(10 + n, seed=n)]
        job = engine.submit(ids, GREEDY)
        list(engine.follow(job))
        assert job.answer().tokens == make(loaded, **changes).generate([ids], GREEDY)[0].tokens
        reused.append(job.scheduled.reused)
    assert reused == [0, 0, 128, 128]
    again = engine.generate([ids] * 3, [replace(DRAWN, seed=seed) for seed in (1, 2, 3)])
    want = make(loaded, **changes).generate([ids] * 3, [replace(DRAWN, seed=seed) for seed in (1, 2, 3)])
    assert [a.tokens for a in again] == [a.tokens for a in want]


def test_an_answer_that_was_cut_short_leaves_its_prompt(loaded):
    engine, ids = make(loaded, prefixes=1), random_ids(40)
    stream = engine.stream(ids, GREEDY)
    next(stream)
    stream.close()
    job = engine.submit([*ids, 5, 6], GREEDY)
    list(engine.follow(job))
    assert job.scheduled.reused == 40
    assert job.answer().tokens == make(loaded).generate([[*ids, 5, 6]], GREEDY)[0].tokens


@pytest.mark.parametrize("ahead", [False, True])
def test_a_prompt_that_was_given_up_is_gone_on_with(loaded, ahead):
    """As when a client loses patience, and asks again."""
    engine, ids = make(loaded, ahead, prefixes=2), random_ids(100)
    job = engine.submit(ids, GREEDY)
    engine.loop.step()
    engine.loop.step()
    engine.cancel(job)
    for expected in (62, 100):
        job = engine.submit(ids, GREEDY)
        list(engine.follow(job))
        assert job.scheduled.reused == expected
        assert job.answer().tokens == make(loaded).generate([ids], GREEDY)[0].tokens


def test_what_failed_leaves_nothing(loaded, monkeypatch):
    engine, ids = make(loaded, prefixes=1), random_ids(40)

    def broken(*_):
        raise RuntimeError("no more memory")

    with monkeypatch.context() as patch:
        patch.setattr(engine.runner, "first_tokens", broken)
        with pytest.raises(RuntimeError, match="no more memory"):
            engine.generate([ids], GREEDY)
    scheduler = engine.loop.scheduler
    assert not scheduler.prefixes and scheduler.slots.free == scheduler.slots.count
    assert scheduler.pages.free == scheduler.pages.count


def test_a_step_that_is_interrupted_while_it_is_planned_leaves_nothing(loaded, monkeypatch):
    """What it was about to copy was not."""
    engine, first = make(loaded, prefixes=2, chunk=100), random_ids(40)
    with monkeypatch.context() as patch:
        asked, branch_of = [], engine.loop.scheduler._branch_of

        def interrupted(sequence):
            asked.append(sequence)
            if len(asked) == 2:
                raise KeyboardInterrupt
            return branch_of(sequence)

        patch.setattr(engine.loop.scheduler, "_branch_of", interrupted)
        with pytest.raises(KeyboardInterrupt):
            engine.generate([first, random_ids(30, seed=9)], GREEDY)
    scheduler = engine.loop.scheduler
    assert scheduler.slots.free == scheduler.slots.count and scheduler.pages.free == scheduler.pages.count
    engine.generate([random_ids(50, seed=3)], GREEDY)
    job = engine.submit([*first, 5, 6], GREEDY)
    list(engine.follow(job))
    assert job.scheduled.reused == 0
    assert job.answer().tokens == make(loaded).generate([[*first, 5, 6]], GREEDY)[0].tokens


def test_a_bad_prefix_fails_once_and_neighbours_keep_their_latents(loaded):
    engine, system = make(loaded, prefixes=4, cache_tokens=1024), random_ids(130)
    for n in range(2):
        engine.generate([[*system, *random_ids(9, seed=n)]], GREEDY)
    (shared,) = [prefix for prefix in engine.loop.scheduler.prefixes if len(prefix.tokens) == 128]
    neighbour = engine.submit([*system, *random_ids(9, seed=5)], GREEDY)
    engine.loop.step()
    assert neighbour.scheduled.pages[:2] == shared.pages
    latents = [stage.state.latent for stage in engine.runner.stages]
    before = [pages.data[shared.pages].clone() for each in latents for pages in each.values()]
    for stage in engine.runner.stages:
        for state in stage.state.kda.values():
            state.s[shared.slot] = float("nan")
    ids = [*system, *random_ids(9, seed=6)]
    (failed,) = engine.generate([ids], GREEDY)
    assert failed.finish == "error" and "they do not come again" in failed.error
    after = [pages.data[shared.pages] for each in latents for pages in each.values()]
    assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True))
    assert engine.generate([ids], GREEDY)[0].tokens == make(loaded).generate([ids], GREEDY)[0].tokens
    assert neighbour.finish == "length"
