"""Tokenizers: the hub's tiktoken.model on a file made here, tokenizer.json, chat templates."""

import base64
import itertools
import json
import time
from collections import Counter

import pytest
import regex

from klquant.calibrate import tiktoken_bpe
from klquant.calibrate.tiktoken_bpe import KIMI_PATTERN, read_ranks, split_overlong
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.checkpoint.config import KimiLinearConfig
from klquant.errors import UserError
from tests.tiny import tiny_config, write_tokenizer

TEXT = (
    "The quick brown fox doesn't care: it's 12345 metres away, isn't it?\r\n\r\n"
    "def f(x):\n    return x ** 2  # 平方\n\n\tif (a != b) { c += 1; }\n"
    "深度学习模型在训练之后需要量化，这样才能在一张显卡上运行。Kimi模型2025年发布。\n"
    "emoji 😀😀👩‍👩‍👧 Ünïcode ŁÓDŹ русский العربية\u3000全角   \n\n\n   trailing   "
)


def merge(ranks: dict[bytes, int], piece: bytes) -> list[bytes]:
    """Textbook byte-pair merging, slow and plain: always the pair of lowest rank, leftmost first."""
    parts = [piece[i : i + 1] for i in range(len(piece))]
    while True:
        pairs = [(ranks[a + b], i) for i, (a, b) in enumerate(itertools.pairwise(parts)) if a + b in ranks]
        if not pairs:
            return parts
        _, i = min(pairs)
        parts[i : i + 2] = [parts[i] + parts[i + 1]]


def pieces(text: str) -> list[str]:
    """Kimi's split through the `regex` package, an implementation other than tiktoken's."""
    found = regex.findall(KIMI_PATTERN, text, flags=regex.V1)
    assert "".join(found) == text
    return found


def train(text: str, merges: int) -> dict[bytes, int]:
    """A byte-pair vocabulary: the 256 bytes in a shuffled order, then the most frequent pairs of `text`."""
    ranks = {bytes([(i * 37 + 11) % 256]): i for i in range(256)}
    words = Counter(p.encode() for p in pieces(text))
    for _ in range(merges):
        pairs: Counter[bytes] = Counter()
        for word, count in words.items():
            parts = merge(ranks, word)
            for a, b in itertools.pairwise(parts):
                pairs[a + b] += count
        ranks[min(pairs, key=lambda p: (-pairs[p], p))] = len(ranks)
    return ranks


RANKS = train(TEXT, 100)
N = len(RANKS)
SPECIAL = {"[BOS]": N, "[EOS]": N + 1, "<|im_end|>": N + 2, "<|im_user|>": N + 3, "<|im_middle|>": N + 7}


def write_tiktoken(folder, ranks=RANKS, special=SPECIAL, **settings):
    lines = [base64.b64encode(token) + f" {rank}\n".encode() for token, rank in ranks.items()]
    (folder / "tiktoken.model").write_bytes(b"".join(lines))
    added = {str(i): {"content": text, "special": True} for text, i in special.items()}
    settings = {"bos_token": "[BOS]", "eos_token": "[EOS]", "added_tokens_decoder": added} | settings
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


@pytest.fixture
def kimi(tmp_path):
    return load_tokenizer(write_tiktoken(tmp_path))


def test_tiktoken_round_trip(kimi):
    for text in [TEXT, *TEXT.splitlines(keepends=True), "", " ", "\n", "\x1c\x85\ufeff\x00", "x" * 1000 + "字" * 1000]:
        assert kimi.decode(kimi.encode(text)) == text
    assert (kimi.bos_id, kimi.eos_id, kimi.vocab_size) == (N, N + 1, N + 8)


def test_tiktoken_ids_equal_a_plain_implementation(kimi):
    want = [RANKS[part] for piece in pieces(TEXT) for part in merge(RANKS, piece.encode())]
    got = kimi.encode(TEXT)
    assert got == want
    assert len(got) < len(TEXT.encode()) * 0.7  # merges do take place


def test_han_runs_stand_apart():
    assert pieces("Kimi模型2025 it's 好Ab") == ["Kimi", "模型", "202", "5", " it's", " ", "好", "Ab"]


def test_special_tokens_only_where_asked(kimi):
    text = "a<|im_end|>b[EOS]<|reserved_token_999|>"
    plain, special = kimi.encode(text), kimi.backend.encode_special(text)
    assert max(plain) < N and kimi.decode(plain) == text
    assert special.count(N + 2) == special.count(N + 1) == 1 and kimi.decode(special) == text
    unnamed = f"<|reserved_token_{N + 4}|>"
    assert max(kimi.backend.encode_special(unnamed)) < N  # an id without a name is never produced …
    assert kimi.decode([N + 4]) == unnamed  # … but can be shown


def test_overlong_runs_are_cut_like_kimi_does():
    """Against a character-by-character account of the rule, with small limits."""

    def rule(text: str) -> list[str]:
        out = []
        for at in range(0, len(text), 40):
            part, start, run = text[at : at + 40], 0, 0
            for i, char in enumerate(part):
                run = run + 1 if i and char.isspace() == part[i - 1].isspace() else 1
                if run > 7:
                    out.append(part[start:i])
                    start, run = i, 1
            out.append(part[start:])
        return out

    for text in ["", "ab", "a" * 7, "a" * 8, "a" * 200, "a b " * 30, "  " * 9 + "abc" * 10 + "\n" * 22, TEXT]:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(tiktoken_bpe, "MAX_CHARS", 40)
            patch.setattr(tiktoken_bpe, "MAX_RUN", 7)
            assert list(split_overlong(text)) == rule(text)


def test_long_runs_of_one_character_are_fast(kimi):
    start = time.monotonic()
    for text in ["a" * 600_000, "字" * 300_000, " " * 600_000, "=-" * 300_000]:
        assert kimi.decode(kimi.encode(text)) == text
    assert time.monotonic() - start < 10


def test_one_megabyte_takes_a_few_seconds(kimi):
    text = TEXT * (1_000_000 // len(TEXT))
    start = time.monotonic()
    kimi.encode(text)
    assert time.monotonic() - start < 5


@pytest.mark.parametrize(
    "damage, message",
    [
        (lambda lines: [*lines[:9], b"not-base64! 9", *lines[10:]], "line 10 is not"),
        (lambda lines: [*lines[:9], lines[9].split()[0], *lines[10:]], "line 10 is not"),
        (lambda lines: [*lines[:9], lines[9].split()[0] + b" x", *lines[10:]], "line 10 is not"),
        (lambda lines: [*lines[:-1], lines[0].split()[0] + b" %d" % (N - 1)], f"line {N} repeats"),
        (lambda lines: [*lines[:-1], lines[-1].split()[0] + b" 3"], f"line {N} repeats"),
        (lambda lines: lines[:-2] + lines[-1:], "lines are missing"),
        (lambda lines: [b"YWI= 0", b"YWJj 1"], "byte 0x00 is not among"),
        (lambda lines: [], "no tokens"),
    ],
)
def test_corrupt_tiktoken_file_names_the_line(tmp_path, damage, message):
    file = write_tiktoken(tmp_path) / "tiktoken.model"
    file.write_bytes(b"\n".join(damage(file.read_bytes().splitlines())))
    with pytest.raises(UserError, match=message) as error:
        read_ranks(file)
    assert "tiktoken.model" in str(error.value)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"special": SPECIAL | {"<|im_end|>": 5}}, "'<|im_end|>' has id 5"),
        ({"added_tokens_decoder": {"x": {"content": "a"}}}, "added_tokens_decoder entry 'x'"),
        ({"added_tokens_decoder": {"400": "a"}}, "added_tokens_decoder entry '400'"),
        ({"added_tokens_decoder": [1]}, "added_tokens_decoder entry ''"),
        ({"bos_token": "<s>"}, "bos_token '<s>' is not a token"),
        ({"bos_token": ["<s>"]}, "bos_token ['<s>'] is not a token"),
        ({"eos_token": None}, "what eos_token is"),
    ],
)
def test_tokenizer_config_is_checked(tmp_path, changes, message):
    with pytest.raises(UserError) as error:
        load_tokenizer(write_tiktoken(tmp_path, **changes))
    assert message in str(error.value)


def test_ids_beyond_the_vocabulary(tmp_path):
    tok = load_tokenizer(write_tiktoken(tmp_path))
    tok.require_fits(KimiLinearConfig.from_dict(tiny_config(vocab_size=N + 8)))
    with pytest.raises(UserError, match=rf"tiktoken.model: token ids up to {N + 7} .* vocabulary of {N + 7}"):
        tok.require_fits(KimiLinearConfig.from_dict(tiny_config(vocab_size=N + 7)))


def test_bos_from_config_json(tmp_path):
    write_tokenizer(tmp_path, 320)
    (tmp_path / "tokenizer_config.json").unlink()
    (tmp_path / "config.json").write_text(json.dumps({"bos_token_id": 0, "eos_token_id": [1, 2]}))
    tok = load_tokenizer(tmp_path)
    assert (tok.bos_id, tok.eos_id) == (0, 1)


def test_no_or_broken_tokenizer(tmp_path):
    with pytest.raises(UserError, match=r"no tokenizer.json and no tiktoken.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match=r"tokenizer.json: not a readable"):
        load_tokenizer(tmp_path)
    write_tokenizer(tmp_path, 320)
    (tmp_path / "tokenizer_config.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer_config.json: not a JSON object"):
        load_tokenizer(tmp_path)


def test_fast_tokenizer(tmp_path):
    write_tokenizer(tmp_path, 320)
    tok = load_tokenizer(tmp_path)
    assert tok.decode(tok.encode(TEXT)) == TEXT
    assert (tok.bos_id, tok.eos_id, tok.vocab_size) == (0, 1, 259)
    assert min(tok.encode("[BOS]x")) > 2 and tok.backend.encode_special("[BOS]x")[0] == 0
    assert min(tok.encode("[BOS]x")) > 2  # the two modes do not leak into each other


def test_a_maximum_length_in_tokenizer_json_does_not_cut_documents(tmp_path):
    write_tokenizer(tmp_path, 320)
    import tokenizers

    raw = tokenizers.Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    raw.enable_truncation(8)
    raw.enable_padding(length=64)
    raw.save(str(tmp_path / "tokenizer.json"))
    assert len(load_tokenizer(tmp_path).encode("a" * 40)) == 40


MESSAGES = [{"role": "user", "content": "Hi <b>"}, {"role": "assistant", "content": [{"type": "text", "text": "Yes"}]}]
TEMPLATE = """\
{%- macro body(m) -%}
{%- if m.content is string %}{{ m.content }}{% else %}{% for p in m.content %}{{ p['text'] }}{% endfor %}{% endif -%}
{%- endmacro -%}
{{ bos_token }}
{%- for m in messages %}
    {%- if m.role == 'tool' %}{{ raise_exception('no tools, please') }}{% endif %}
<|im_user|>{{ m.get('name') or m.role }}<|im_middle|>{{ body(m) }}<|im_end|>
{%- endfor %}
{{ {'a<': 'é'} | tojson(separators=(',', ':')) }}
{%- if add_generation_prompt %}<|im_user|>{% endif %}
"""
RENDERED = '[BOS]<|im_user|>user<|im_middle|>Hi <b><|im_end|><|im_user|>assistant<|im_middle|>Yes<|im_end|>{"a<":"é"}'


@pytest.mark.parametrize("place", ["file", "text", "list"])
def test_chat_template(tmp_path, place):
    named = [{"name": "tool_use", "template": "no"}, {"name": "default", "template": TEMPLATE}]
    settings = {} if place == "file" else {"chat_template": TEMPLATE if place == "text" else named}
    write_tiktoken(tmp_path, **settings)
    if place == "file":
        (tmp_path / "chat_template.jinja").write_text(TEMPLATE)
    tok = load_tokenizer(tmp_path)
    ids = tok.apply_chat(MESSAGES)
    assert tok.decode(ids) == RENDERED
    assert ids[0] == N and ids.count(SPECIAL["<|im_end|>"]) == 2 and ids.count(SPECIAL["<|im_middle|>"]) == 2
    assert tok.apply_chat(MESSAGES, generation_prompt=True) == [*ids, SPECIAL["<|im_user|>"]]


def test_unreadable_template_files(tmp_path):
    write_tiktoken(tmp_path, chat_template=3)
    with pytest.raises(UserError, match=r"tokenizer_config.json: chat_template is not text"):
        load_tokenizer(tmp_path)
    (tmp_path / "chat_template.jinja").write_bytes(b"caf\xe9")
    with pytest.raises(UserError, match=r"chat_template.jinja: not UTF-8 text"):
        load_tokenizer(tmp_path)


def test_without_a_template(kimi):
    assert kimi.template is None
    assert kimi.decode(kimi.apply_chat(MESSAGES)) == "user: Hi <b>\n\nassistant: Yes"


@pytest.mark.parametrize(
    "template, message",
    [
        ("{% for %}", "does not parse"),
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{{ messages[0].missing.thing }}", "fails on a conversation"),
        ("{{ ''.__class__.__mro__ }}", "unsafe"),
        ("{{ messages.append(1) }}", "fails on a conversation"),
        ("{% include 'config.json' %}", "fails on a conversation"),
    ],
)
def test_bad_or_hostile_template(tmp_path, template, message):
    write_tiktoken(tmp_path, chat_template=template)
    with pytest.raises(UserError, match=message) as error:
        load_tokenizer(tmp_path).apply_chat(MESSAGES)
    assert "tokenizer_config.json" in str(error.value)


def test_template_date_is_fixed(tmp_path):
    tok = load_tokenizer(write_tiktoken(tmp_path, chat_template="{{ strftime_now('%Y-%m-%d') }}"))
    assert tok.decode(tok.apply_chat(MESSAGES)) == "2025-01-01"
