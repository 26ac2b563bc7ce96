"""What generation_config.json recommends, and what is refused of it by name."""

import json

import pytest

from klquant.engine.request import SamplingParams, default_params, end_tokens
from klquant.errors import UserError

RECOMMENDED = {"temperature": 0.6, "top_k": 20, "top_p": 0.9, "min_p": 0.1, "repetition_penalty": 1.1}


@pytest.fixture
def says(tmp_path):
    """A folder whose generation_config.json says what is given."""

    def write(content):
        (tmp_path / "generation_config.json").write_text(content if isinstance(content, str) else json.dumps(content))
        return tmp_path

    return write


def test_a_folder_without_recommendation_is_greedy_and_ends_with_config_json(tmp_path):
    assert default_params(tmp_path) == SamplingParams() and SamplingParams().greedy
    assert end_tokens(tmp_path, (7,)) == {7}


@pytest.mark.parametrize(
    ("content", "params"),
    [
        (RECOMMENDED, SamplingParams(**RECOMMENDED)),
        (RECOMMENDED | {"do_sample": False}, SamplingParams(**RECOMMENDED | {"temperature": 0.0})),
        ({"do_sample": True}, SamplingParams(temperature=1.0)),
        ({"temperature": None, "top_k": None, "max_length": 10}, SamplingParams()),
    ],
)
def test_what_is_recommended_is_the_default(says, content, params):
    assert default_params(says(content)) == params


@pytest.mark.parametrize(("ids", "more"), [(None, set()), (5, {5}), ([5, 6], {5, 6}), ([], set())])
def test_an_answer_ends_with_the_tokens_of_both_files(says, ids, more):
    assert end_tokens(says({"eos_token_id": ids}), (7,)) == {7} | more


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"top_p": 1.5}, "top_p is 1.5, expected above 0 and at most 1"),
        ({"top_k": "50"}, "top_k is '50', expected a number"),
        ({"temperature": [1]}, r"temperature is \[1\], expected a number"),
        ({"min_p": True}, "min_p is True, expected a number"),
        ("[]", "not a JSON object"),
        ('{"top_k": ', "not valid JSON"),
    ],
)
def test_a_recommendation_that_cannot_be_used_is_refused_by_name(says, content, message):
    with pytest.raises(UserError, match=rf"generation_config\.json: {message}"):
        default_params(says(content))


@pytest.mark.parametrize(
    ("name", "values", "wanted"),
    [
        ("temperature", (-1.0, 1e-5, 1e39, float("inf"), float("nan")), r"0 \(the likeliest token\), or from 0\.0001"),
        ("top_k", (-1, 2.5, 1 << 70), "a whole number"),
        ("repetition_penalty", (0.0, -1.0, 1e39, float("nan")), "from 0.000001 to"),
    ],
)
def test_what_no_distribution_has_is_refused(name, values, wanted):
    for value in values:
        with pytest.raises(UserError, match=f"{name} is .*, expected {wanted}"):
            SamplingParams(**{name: value})
    SamplingParams(temperature=1e-4, top_k=1)


@pytest.mark.parametrize("ids", ["</s>", [1, "</s>"], [1, None], -1, True, 1.0, {"id": 1}])
def test_end_tokens_that_are_no_ids_are_refused(says, ids):
    with pytest.raises(UserError, match=r"generation_config\.json: eos_token_id is .*, expected a token id or a list"):
        end_tokens(says({"eos_token_id": ids}), (7,))
