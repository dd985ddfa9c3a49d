"""Text of unknown origin: read as plain data within bounds, and damage to what was sealed is seen."""

from __future__ import annotations

import json
import time

import pytest
import yaml
from hypothesis import given
from hypothesis import strategies as st

from vrpo.config import RunConfig
from vrpo.config_load import to_yaml
from vrpo.untrusted import (
    MAX_DEPTH,
    MAX_YAML_BYTES,
    parse_json,
    parse_yaml,
    printable,
    seal,
    seal_text,
    unseal,
    unseal_text,
)

PLAIN = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text(),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=12,
)


def bomb(levels: int) -> str:
    """Return a YAML text whose last alias stands for 9 ** levels words."""
    lines = ["a0: &a0 [x, x, x, x, x, x, x, x, x]"]
    lines += [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, levels)]
    return "\n".join(lines)


@given(PLAIN)
def test_json_that_python_writes_is_read_back(value: object) -> None:
    assert parse_json(json.dumps(value)) == value


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "[" * 500 + "]" * 500])
def test_deep_json_is_refused(text: str) -> None:
    for form in (text, text.encode()):
        with pytest.raises(ValueError, match=r"deep|Expecting|delimiter"):
            parse_json(form)


def test_json_at_the_limit_is_read() -> None:
    deep = "[" * MAX_DEPTH + "]" * MAX_DEPTH
    assert parse_json(f"[{deep[1:-1]}]") is not None
    with pytest.raises(ValueError, match="deep"):
        parse_json(f"[[{deep}]]")


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (bomb(12), "alias at line"),
        ("a: &a [*a]", "alias at line 1"),
        ("a: !!python/object/apply:os.system [id]", "tag at line 1"),
        ("a: !!int ''", "tag at line 1"),
        ("[" * 2000, "nested more than 64 deep"),
        ("- " * 500 + "x", "nested more than 64 deep"),
        ("a: [1, 2", "not valid"),
        ("\x00", "not valid"),
        ("a: " + "9" * 5000, "digits"),
        ("x" * (MAX_YAML_BYTES + 1), "longer than"),
        ("a: 2001-99-99", "month"),
    ],
)
def test_yaml_that_is_no_plain_data_is_refused_at_once(text: str, words: str) -> None:
    started = time.perf_counter()
    with pytest.raises(ValueError, match=words):
        parse_yaml(text)
    assert time.perf_counter() - started < 5


def test_our_own_yaml_is_plain() -> None:
    text = to_yaml(RunConfig())
    assert parse_yaml(text) == yaml.safe_load(text) == RunConfig().model_dump(mode="json")


@given(st.dictionaries(st.text(), PLAIN, max_size=4).filter(lambda record: "seal" not in record))
def test_a_sealed_record_survives_the_file(record: dict[str, object]) -> None:
    assert unseal(json.loads(json.dumps(seal(record)))) == record


def test_every_flipped_bit_of_a_sealed_record_is_seen() -> None:
    record = {"step": 4, "loss": 1.25, "names": ["cat", "dog"], "seen": True}
    text = json.dumps(seal(record)).encode()
    for bit in range(8 * len(text)):
        changed = bytearray(text)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            read = unseal(parse_json(bytes(changed)))
        except (ValueError, AttributeError):
            continue
        assert read == record  # a flip of white space or within an escape leaves the value


def test_every_flipped_bit_of_sealed_text_is_seen() -> None:
    text = "train:\n  lr: 0.001\n"
    sealed = seal_text(text).encode()
    assert unseal_text(sealed.decode()) == text
    assert parse_yaml(sealed.decode()) == {"train": {"lr": 0.001}}
    for bit in range(8 * len(sealed)):
        changed = bytearray(sealed)
        changed[bit // 8] ^= 1 << bit % 8
        try:
            read = parse_yaml(unseal_text(changed.decode()))
        except ValueError:
            continue
        assert read == {"train": {"lr": 0.001}}, changed


def test_sealed_text_that_was_cut_anywhere_is_seen() -> None:
    sealed = seal_text("name: run\nseed: 0\ntrain:\n  lr: 0.001\n")
    for length in range(1, len(sealed)):
        try:
            read = parse_yaml(unseal_text(sealed[:length]))
        except ValueError:
            continue
        assert read is None, sealed[:length]  # within the first line, of which nothing is read


def test_control_characters_are_escaped() -> None:
    assert printable("cat\x1b[2J\x07 é\n") == "cat\\x1b[2J\\x07 é\n"
