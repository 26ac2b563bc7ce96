"""Files → documents → windows → calibration, on a byte-level tokenizer where ids can be counted by hand."""

import json
import sys

import pytest
import torch

from klquant.calibrate import windows
from klquant.calibrate.documents import resolve_sources
from klquant.calibrate.text import SELF_BATCH, open_pool, start_tokens
from klquant.calibrate.tokenizer import load_tokenizer
from klquant.calibrate.windows import iter_windows
from klquant.checkpoint.config import KimiLinearConfig
from klquant.errors import UserError
from tests.calibrate.build import calibration_windows, windows_from_texts
from tests.tiny import tiny_config, write_tokenizer

CFG = KimiLinearConfig.from_dict(tiny_config())
CHAT = [{"role": "user", "content": "ping"}, {"role": "assistant", "content": "pong"}]


@pytest.fixture
def tok(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tokenizer")
    write_tokenizer(folder, 320)
    return load_tokenizer(folder)


def jsonl(path, *rows):
    path.write_text("".join(json.dumps(r if isinstance(r, dict) else {"text": r}) + "\n" for r in rows))
    return path


def packed(tok, texts, window):
    """The packing rule spelled out: [BOS] ids [EOS] …, cut from the start."""
    flat = [i for text in texts for i in [tok.bos_id, *tok.encode(text), tok.eos_id]]
    return torch.tensor(flat[: len(flat) // window * window]).reshape(-1, window)


def test_packing(tok):
    texts = ["abc", "de", "é", "fghij klm"]
    assert windows_from_texts(texts, tok, 4).equal(packed(tok, texts, 4))
    assert windows_from_texts(texts, tok, 4)[0].tolist() == [0, *tok.encode("abc")]
    assert windows_from_texts(texts, tok, 4)[1, 0] == 1
    assert windows_from_texts(texts, tok, 4, count=2).shape == (2, 4)
    assert windows_from_texts([], tok, 4).shape == (0, 4)
    assert windows_from_texts(["", " \n", "abc"], tok, 5).equal(packed(tok, ["abc"], 5))  # empty texts are skipped


@pytest.mark.parametrize("limit", [1, 7, 50, 10**6])
def test_windows_do_not_depend_on_the_pieces_a_text_is_encoded_in(tok, monkeypatch, limit):
    text = "para one\nline two\r\n\r\n  indented\n\n\nlast " + "x" * 90 + "\n tail\nno more\n"
    want = packed(tok, [text, "b", text], 8)
    monkeypatch.setattr(windows, "MAX_PIECE", limit)
    assert windows_from_texts([text, "b", text], tok, 8).equal(want)


def test_pieces_end_where_the_kimi_pattern_ends_a_token(monkeypatch):
    import regex

    from klquant.calibrate.tiktoken_bpe import KIMI_PATTERN

    text = "a  \n\n b\n中文\n  c!!\n\n-- d\r\nE's\n\n\n12345\n\t\n\x1c\n\x85x\n'll\n"
    monkeypatch.setattr(windows, "MAX_PIECE", 1)
    pieces = list(windows._pieces(text))
    assert len(pieces) == 6

    def split(part):
        return regex.findall(KIMI_PATTERN, part, flags=regex.V1)

    assert [token for piece in pieces for token in split(piece)] == split(text)


def test_no_more_text_is_read_than_needed(tok):
    seen = []

    def documents():
        for i in range(100):
            seen.append(i)
            yield "x" * 18

    stream = iter_windows(documents(), tok, 10)
    for _ in range(4):
        next(stream)
    assert seen == [0, 1]


def test_equal_shares_in_order(tok, tmp_path):
    files = [jsonl(tmp_path / f"{n}.jsonl", *[f"{n} document {i}" for i in range(20)]) for n in "abcd"]
    cal = calibration_windows(str(tmp_path), tok, CFG, tokens=12 * 16 + 5, window=16)
    assert cal.ids.dtype == torch.int64 and cal.ids.shape == (12, 16)
    assert [s.name for s in cal.sources] == list("abcd") and [s.windows for s in cal.sources] == [3] * 4
    for k, n in enumerate("abcd"):
        want = packed(tok, [f"{n} document {i}" for i in range(20)], 16)[:3]
        assert cal.ids[cal.source_of_window == k].equal(want)
    assert cal.notes == ()
    again = calibration_windows(",".join(map(str, files)), tok, CFG, tokens=12 * 16, window=16)
    assert again.ids.equal(cal.ids) and again.sha256 == cal.sha256


def test_pool_goes_on_where_it_stopped(tok, tmp_path):
    for n in "ab":
        jsonl(tmp_path / f"{n}.jsonl", *[f"{n}{i}" * 9 for i in range(20)])
    whole = open_pool(str(tmp_path), tok, CFG, window=16)
    bits = open_pool(str(tmp_path), tok, CFG, window=16)
    got = torch.cat([bits.take(n) for n in (3, 0, 1, 5)])
    assert whole.take(9).equal(got)
    assert whole.calibration().ids.equal(got) and whole.calibration().sha256 == bits.calibration().sha256
    first = bits.calibration()
    bits.take(2)
    assert bits.calibration().ids[:9].equal(first.ids) and bits.calibration().sha256 != first.sha256


def test_a_short_source_is_used_up_and_named(tok, tmp_path):
    jsonl(tmp_path / "long.jsonl", *["y" * 30] * 20)
    jsonl(tmp_path / "short.jsonl", "z" * 30)
    pool = open_pool(str(tmp_path), tok, CFG, window=16)
    assert pool.take(8).shape == (8, 16)
    cal = pool.calibration()
    assert [s.windows for s in cal.sources] == [6, 2]
    assert [n for n in cal.notes if "'short' is used up: 2 windows where others gave 6" in n]
    assert pool.take(1000).shape == (34, 16) and pool.take(5).shape == (0, 16)
    assert "1013 windows were asked for, the text fills 42" in pool.calibration().notes


def test_a_source_that_no_window_is_left_for_is_named(tok, tmp_path):
    for n in "abc":
        jsonl(tmp_path / f"{n}.jsonl", *[f"{n}{i}" * 9 for i in range(20)])
    pool = open_pool(str(tmp_path), tok, CFG, window=16)
    pool.take(1)
    assert pool.calibration().notes == ("no window was left for 'b', 'c'; give more tokens, or a shorter window",)
    pool.take(2)
    assert pool.calibration().notes == ()


@pytest.mark.parametrize("rows, figures", [(["short", "text"], "13 tokens in 2 documents"), ([], "0 tokens in 0")])
def test_too_little_text_for_one_window(tok, tmp_path, rows, figures):
    file = jsonl(tmp_path / "s.jsonl", *rows)
    with pytest.raises(UserError, match=figures) as error:
        calibration_windows(str(file), tok, CFG, tokens=64, window=16)
    assert str(file) in str(error.value) and "needs 16" in str(error.value)


def test_vocabulary_is_checked(tok, tmp_path):
    small = KimiLinearConfig.from_dict(tiny_config(vocab_size=258))
    with pytest.raises(
        UserError, match=r"tokenizer.json: token ids up to 258 lie beyond the model's vocabulary of 258"
    ):
        calibration_windows("tiny", tok, small, tokens=64, window=16)


def test_hash_covers_ids_and_names_but_not_the_place(tok, tmp_path):
    digests = set()
    for folder, name, text in [("p", "a", "x" * 40), ("q", "a", "x" * 40), ("p", "b", "x" * 40), ("r", "a", "y" * 40)]:
        (tmp_path / folder).mkdir(exist_ok=True)
        file = jsonl(tmp_path / folder / f"{name}.jsonl", text)
        digests.add(calibration_windows(str(file), tok, CFG, tokens=32, window=16).sha256)
    assert len(digests) == 3


def test_chat_rows(tok, tmp_path):
    file = jsonl(tmp_path / "c.jsonl", {"messages": CHAT, "text": "not this"})
    cal = calibration_windows(str(file), tok, CFG, tokens=29, window=29)
    assert cal.ids[0, :2].tolist() == [0, *tok.encode("u")] and tok.decode(cal.ids[0, 1:-1].tolist()) == (
        "user: ping\n\nassistant: pong"
    )
    assert "no chat template" in cal.notes[0]


def test_a_template_that_writes_bos_gets_no_second_one(tok):
    from klquant.calibrate.chat import ChatTemplate

    object.__setattr__(tok, "template", ChatTemplate("{{ bos_token }}{{ messages[0].content }}{{ eos_token }}", "t"))
    assert windows_from_texts([CHAT], tok, 6).tolist() == [[0, *tok.encode("ping"), 1]]
    object.__setattr__(tok, "template", ChatTemplate("{{ messages[0].content }}", "t"))
    assert windows_from_texts([CHAT], tok, 6).tolist() == [[0, *tok.encode("ping"), 1]]


def test_txt_is_one_document(tok, tmp_path):
    (tmp_path / "a.txt").write_bytes("\ufeffone\r\n\r\ntwo".encode())
    assert [list(s.open()) for s in resolve_sources(str(tmp_path / "a.txt"), 0)] == [["one\r\n\r\ntwo"]]


@pytest.mark.parametrize(
    "content, message",
    [
        (b'{"text": "ok"}\n{"text": ', "line 2 is not JSON"),
        (b'{"text": "\xff"}', "line 1 is not JSON in UTF-8"),
        (b'\n\n["a"]', "line 3 is not a JSON object"),
        (b'{"txt": "a"}', "line 1 has neither 'text'"),
        (b'{"text": 3}', "line 1 has neither 'text'"),
        (b'{"text": "a\\ud800"}', "line 1 holds half a surrogate pair"),
        (b'{"messages": [{"role": "user", "content": "a\\ud800"}]}', "line 1 holds half a surrogate pair"),
        (b'{"messages": []}', "line 1: 'messages' must be a list"),
        (b'{"messages": "hi"}', "line 1: 'messages' must be a list"),
        (b'{"messages": [{"content": "a"}]}', "line 1: a message without a 'role'"),
        (b'{"messages": [{"role": "user", "content": null}]}', "line 1: the 'content' of a 'user' message"),
        (b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}', "line 1: the 'content' of a 'user'"),
    ],
)
def test_bad_jsonl_names_file_and_line(tok, tmp_path, content, message):
    file = tmp_path / "bad.jsonl"
    file.write_bytes(content)
    with pytest.raises(UserError) as error:
        calibration_windows(str(file), tok, CFG, tokens=64, window=16)
    assert str(error.value).startswith(str(file)) and message in str(error.value)


def test_bad_specs(tok, tmp_path):
    (tmp_path / "a.pdf").write_text("x")
    (tmp_path / "latin.txt").write_bytes(b"caf\xe9")
    (tmp_path / "empty").mkdir()
    file = jsonl(tmp_path / "a.jsonl", "x")
    for spec, message in [
        ("defualt", r"no mix of that name \(known: tiny, self, default\)"),
        (f"{file},{tmp_path / 'b.jsonl'}", r"b.jsonl': no such file"),
        (str(tmp_path / "a.pdf"), r"a.pdf: text must be .txt"),
        (str(tmp_path / "empty"), "no .txt, .jsonl, .parquet file"),
        (f"{file},{file}", "twice"),
        (",", "names no file"),
        (str(tmp_path / "latin.txt"), r"latin.txt: not UTF-8 text \(byte 3\)"),
        ("self", "needs the model"),
    ]:
        with pytest.raises(UserError, match=message):
            calibration_windows(spec, tok, CFG, tokens=64, window=16)


def test_files_of_the_same_name_are_told_apart(tmp_path):
    for folder in ("p", "q"):
        (tmp_path / folder).mkdir()
        jsonl(tmp_path / folder / "a.jsonl", "x")
    names = [s.name for s in resolve_sources(f"{tmp_path / 'p'},{tmp_path / 'q'}", 0)]
    assert names == [str(tmp_path / "p/a.jsonl"), str(tmp_path / "q/a.jsonl")]


def test_parquet(tok, tmp_path, monkeypatch):
    pa = pytest.importorskip("pyarrow")
    import pyarrow.parquet as pq

    texts = [f"row {i}" for i in range(600)]
    pq.write_table(pa.table({"id": range(600), "text": texts}), tmp_path / "t.parquet")
    pq.write_table(pa.table({"messages": [CHAT]}), tmp_path / "c.parquet")
    pq.write_table(pa.table({"id": [1]}), tmp_path / "n.parquet")
    pq.write_table(pa.table({"text": ["a", None]}), tmp_path / "h.parquet")
    (tmp_path / "b.parquet").write_bytes(b"PAR1 no")

    def read(name):
        return list(resolve_sources(str(tmp_path / name), 0)[0].open())

    assert read("t.parquet") == texts and read("c.parquet") == [CHAT]
    for name, message in [("n", "neither a 'text'"), ("h", "row 2 has neither"), ("b", "not a readable parquet")]:
        with pytest.raises(UserError, match=message):
            read(f"{name}.parquet")


def test_parquet_without_pyarrow(tmp_path, monkeypatch):
    (tmp_path / "t.parquet").write_bytes(b"")
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    with pytest.raises(UserError, match=r"t.parquet: reading parquet needs pyarrow: pip install pyarrow"):
        list(resolve_sources(str(tmp_path / "t.parquet"), 0)[0].open())


def sampler(n_sequences, length, seed):
    return torch.randint(3, 259, (n_sequences, length), generator=torch.Generator().manual_seed(seed))


def test_self(tok):
    whole = open_pool("self", tok, CFG, window=16, seed=5, generate=sampler)
    bits = open_pool("self", tok, CFG, window=16, seed=5, generate=sampler)
    got = whole.take(SELF_BATCH + 3)
    assert got.equal(torch.cat([bits.take(4), bits.take(SELF_BATCH - 1)]))
    assert got.equal(torch.cat([sampler(SELF_BATCH, 16, 5), sampler(SELF_BATCH, 16, 6)])[: SELF_BATCH + 3])
    cal = whole.calibration()
    assert cal.sources[0].windows == cal.sources[0].documents == SELF_BATCH + 3 and cal.notes == ()


def test_start_tokens(tok):
    starts = start_tokens(tok, 64, 1)
    assert starts == start_tokens(tok, 64, 1) != start_tokens(tok, 64, 2)
    assert starts[0::2] == [[tok.bos_id]] * 32
    assert all(s[0] == tok.bos_id and len(s) == 2 for s in starts[1::2]) and len({s[1] for s in starts[1::2]}) > 3


def test_tiny_is_varied_and_works_offline(tok):
    documents = list(resolve_sources("tiny", 0)[0].open())
    texts = [d if isinstance(d, str) else "".join(m["content"] for m in d) for d in documents]
    size = sum(len(t.encode()) for t in texts)
    assert 60_000 <= size <= 100_000
    assert sum(isinstance(d, list) for d in documents) >= 5
    assert sum(any("\u4e00" <= c <= "\u9fff" for c in t) for t in texts) >= 5
    lines = [line for t in texts for line in t.splitlines() if len(line) > 60]
    assert len(set(lines)) == len(lines)  # nothing is repeated to fill space
    cal = calibration_windows("tiny", tok, CFG, tokens=64 * 256, window=256)
    assert cal.ids.shape == (64, 256)
    assert {type(d) for d in documents[:6]} == {str, list}  # kinds alternate, so that a short run sees all of them


def test_testbed_windows(testbed):
    """The window set that the testbed's figures were made with."""
    tok = load_tokenizer(testbed)
    cfg = KimiLinearConfig.from_dict(json.loads((testbed / "config.json").read_text()))
    cal = calibration_windows(str(testbed / "text" / "calib"), tok, cfg, tokens=64 * 2048, window=2048)
    assert [(s.name, s.windows) for s in cal.sources] == [(n, 16) for n in ("book", "code", "tech", "zh")]
    first = {"book": [0, 1255, 326, 2042], "code": [0, 651, 1381, 3469], "tech": [0, 10, 539, 5415], "zh": [0, 10, 228]}
    for k, name in enumerate(first):
        own = cal.ids[cal.source_of_window == k]
        assert own[0, : len(first[name])].tolist() == first[name]
        lines = (testbed / "text" / "calib" / f"{name}.jsonl").read_text().split("\n")[:8]
        texts = [json.loads(line)["text"] for line in lines if line]
        assert own.equal(packed(tok, texts, 2048)[:16])
