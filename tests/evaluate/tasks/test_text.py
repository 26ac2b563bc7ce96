import json
import shutil

import pytest

from klquant.calibrate.tokenizer import load_tokenizer
from klquant.errors import UserError
from klquant.evaluate.tasks.text import TaskText

TEMPLATE = "{{ bos_token }}{% for m in messages %}<{{ m.role }}>{{ m.content }}{{ eos_token }}{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"  # noqa: E501


@pytest.fixture
def text(tiny, tokenizer):
    return TaskText(tokenizer, tiny, 40, False)


@pytest.fixture
def chatty(tiny, tmp_path):
    folder = shutil.copytree(tiny, tmp_path / "chat")
    (folder / "chat_template.jinja").write_text(TEMPLATE)
    return folder


def test_a_pair_is_cut_where_the_whole_text_is(text, tokenizer):
    head, tail = text.pair("Is it so?  ", "yes")
    assert head == [tokenizer.bos_id, *tokenizer.encode("Is it so?")] and tail == tokenizer.encode("  yes")
    assert text.pair("", "yes") == ([tokenizer.bos_id], tokenizer.encode("yes"))


def test_a_seam_inside_a_token_parts_it(testbed):
    text = TaskText(load_tokenizer(testbed), testbed, 100, False)
    for context, continuation in (("def", "ault values"), ("The answer", " is"), ("x", ""), ("New", "ton")):
        head, tail = text.pair(context, continuation)
        assert text.tokenizer.decode(head[1:]) == context and text.tokenizer.decode(tail) == continuation


def test_a_context_without_room_loses_its_beginning_and_is_counted(text, tokenizer):
    head, tail = text.pair("x" * 50 + "the end", "abc")
    assert len(head) + len(tail) == 40 and head[0] == tokenizer.bos_id
    assert tokenizer.decode(head[1:]).endswith("xthe end") and text.cut == 1
    text.pair("short", "abc")
    assert text.cut == 1


def test_a_chat_goes_through_the_template_and_keeps_its_special_tokens(chatty):
    tokenizer = load_tokenizer(chatty)
    text = TaskText(tokenizer, chatty, 100, True)
    said = text.render([{"role": "user", "content": "Hi"}], True)
    assert said == "[BOS]<user>Hi[EOS]<assistant>"
    ids = text.context(said)
    assert ids.count(tokenizer.bos_id) == 1 and ids[0] == tokenizer.bos_id and tokenizer.eos_id in ids
    assert TaskText(tokenizer, chatty, 100, False).context(said).count(tokenizer.eos_id) == 0


def test_answers_end_with_every_token_that_the_model_ends_with(chatty):
    (chatty / "generation_config.json").write_text(json.dumps({"eos_token_id": [7, 1]}))
    assert TaskText(load_tokenizer(chatty), chatty, 100, False).ends == {1, 7}
    (chatty / "generation_config.json").write_text("[]")
    assert TaskText(load_tokenizer(chatty), chatty, 100, False).ends == {1}


def test_a_chat_without_template_is_refused(tiny, tokenizer):
    with pytest.raises(UserError, match="no chat template, but --chat asks for it"):
        TaskText(tokenizer, tiny, 40, True)
