"""Text from tokens: what is emitted is final, whole, and what decoding everything at once gives."""

from hypothesis import given
from hypothesis import strategies as st

from klquant.engine.text import Detokenizer, StopText


def decode_bytes(ids):
    return bytes(ids).decode("utf-8", errors="replace")


def decode_byte_by_byte(ids):
    """As decoders with byte fallback do: each byte of an incomplete character becomes U+FFFD."""
    out = decode_bytes(ids)
    tail = next((n for n in (3, 2, 1) if n <= len(ids) and _begins_character(bytes(ids[-n:]))), 0)
    return decode_bytes(ids[: len(ids) - tail]) + "\ufffd" * tail if tail else out


def _begins_character(tail: bytes) -> bool:
    lead = tail[:1]
    size = 2 if b"\xc2" <= lead <= b"\xdf" else 3 if b"\xe1" <= lead <= b"\xec" else 4 if lead == b"\xf1" else 0
    return len(tail) < size and all(0x80 <= b < 0xC0 for b in tail[1:])


@given(st.text(max_size=40))
def test_bytes_one_by_one_give_the_text_character_by_character(text):
    for decode in (decode_bytes, decode_byte_by_byte):
        stream = Detokenizer(decode)
        parts = [stream.push(b) for b in text.encode()]
        assert all("\ufffd" not in part for part in parts) or "\ufffd" in text
        assert "".join(parts) + stream.flush() == text


@given(st.lists(st.integers(0, 255), max_size=40))
def test_any_bytes_give_what_decoding_at_once_gives(ids):
    stream = Detokenizer(decode_bytes)
    assert "".join(stream.push(b) for b in ids) + stream.flush() == decode_bytes(ids)


def test_tokens_that_cut_characters():
    text = "a€b😀é漢"
    data = text.encode()
    for size in (1, 2, 3, 5):
        tokens = [data[i : i + size] for i in range(0, len(data), size)]
        stream = Detokenizer(lambda ids, tokens=tokens: b"".join(tokens[i] for i in ids).decode(errors="replace"))
        parts = [stream.push(i) for i in range(len(tokens))]
        assert "".join(parts) + stream.flush() == text
        assert not any("\ufffd" in part for part in parts)


def test_a_decoder_that_looks_left():
    """Words get their space from the word before, as SentencePiece decoders have it."""
    words = ["one", "two", "three"]
    stream = Detokenizer(lambda ids: " ".join(words[i] for i in ids))
    assert [stream.push(i) for i in (0, 1, 2)] == ["one", " two", " three"]


@given(
    st.lists(st.text("ab.", max_size=4), max_size=12),
    st.lists(st.text("ab.", min_size=1, max_size=4), min_size=1, max_size=3),
)
def test_text_ends_before_the_first_stop_text(parts, stops):
    stream = StopText(stops)
    given_text = "".join(stream.push(part) for part in parts)
    whole = "".join(parts)
    at = min((i for stop in stops if (i := whole.find(stop)) >= 0), default=None)
    if stream.stopped:
        assert given_text == whole[: len(given_text)]
        assert any(whole[len(given_text) :].startswith(stop) for stop in stops)
        assert not any(stop in given_text for stop in stops)
    assert stream.stopped == (at is not None)
    if at is None:
        assert given_text + stream.flush() == whole


def test_a_stop_text_across_pushes_never_shows():
    stream = StopText(["END"])
    assert [stream.push(part) for part in ("say E", "N", "ough E", "ND more")] == ["say ", "", "ENough ", ""]
    assert stream.stopped and stream.flush() == ""
