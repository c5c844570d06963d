"""The text of classes, beside what the tokenizers themselves make of them."""

import json

import pytest
from language_models import text

from klmetric.saved.errors import InputError
from klmetric.saved.vocabulary import open_vocabulary

tokenizers = pytest.importorskip("tokenizers")
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers

LINES = [*text()[:30_000].splitlines(), "Größe – naïve café, 東京 and 🙂🙃 Ġ", "tabs\tand | pipes"]
SPECIAL = ["<s>", "<|end of text|>"]


def byte_level():
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=600, special_tokens=SPECIAL, initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


def sentencepiece_bpe():
    """As Llama's: spaces are a character of their own, and bytes that are no character are tokens."""
    tokenizer = Tokenizer(models.BPE(byte_fallback=True))
    tokenizer.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    tokenizer.decoder = decoders.Sequence(
        [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    )
    bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=900, special_tokens=[*SPECIAL, *bytes_], show_progress=False)
    tokenizer.train_from_iterator([line.lower() for line in LINES[:-2]], trainer)
    content = json.loads(tokenizer.to_str())
    content["added_tokens"] = [token for token in content["added_tokens"] if token["content"] in SPECIAL]
    return Tokenizer.from_str(json.dumps(content))


def unigram():
    tokenizer = Tokenizer(models.Unigram())
    tokenizer.pre_tokenizer, tokenizer.decoder = pre_tokenizers.Metaspace(), decoders.Metaspace()
    trainer = trainers.UnigramTrainer(vocab_size=400, special_tokens=SPECIAL, unk_token="<s>", show_progress=False)
    tokenizer.train_from_iterator(LINES, trainer)
    return tokenizer


KINDS = {"byte_level": byte_level, "sentencepiece_bpe": sentencepiece_bpe, "unigram": unigram}


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_tokenizer_itself_has_it(kind, tmp_path):
    """Of sequences, so that tokens which are a part of a character are beside the others."""
    tokenizer = KINDS[kind]()
    tokenizer.add_tokens(["<added Ġ>"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    vocabulary = open_vocabulary(tmp_path / "tokenizer.json")
    for line in LINES:
        line = line.lower() if kind == "sentencepiece_bpe" else line
        numbers = tokenizer.encode(line, add_special_tokens=False).ids
        # Those that have put a space at the beginning leave it out again.
        first = "" if kind == "byte_level" else " "
        assert vocabulary.text(numbers).removeprefix(first) == tokenizer.decode(numbers)
    size = tokenizer.get_vocab_size()
    for number in range(size - 1):
        if kind != "sentencepiece_bpe" or number >= len(SPECIAL) + 256:
            theirs = tokenizer.decode([0, number, 0], skip_special_tokens=False)
            assert "\ufffd" in theirs or vocabulary.text([0, number, 0]).split() == theirs.split(), number
    assert vocabulary.text([size - 1]) == "<added Ġ>"
    assert vocabulary.text([0]) == "<s>"
    assert vocabulary.text([size]) is None


def test_parts_of_characters(tmp_path):
    byte_level().save(str(tmp_path / "tokenizer.json"))
    tokenizer, vocabulary = Tokenizer.from_file(str(tmp_path / "tokenizer.json")), open_vocabulary(tmp_path)
    bytes_ = [tokenizer.token_to_id(c) for c in "ðŁĻĥ"]  # of 🙃, as GPT-2 writes them
    assert vocabulary.text(bytes_) == "🙃"
    assert vocabulary.text(bytes_[:2]) == r"\xf0\x9f"
    assert vocabulary.text([tokenizer.token_to_id("Ġ")]) == " "


def test_vocab_json(tmp_path):
    tokenizer = byte_level()
    tokenizer.model.save(str(tmp_path))
    found = open_vocabulary(tmp_path / "vocab.json")
    numbers = tokenizer.encode(LINES[3]).ids
    assert found.text(numbers) == LINES[3]
    (tmp_path / "words.json").write_text('["cat", "dog"]')
    assert open_vocabulary(tmp_path / "words.json").text([1]) == "dog"


def test_a_line_a_token(tmp_path):
    (tmp_path / "vocab.txt").write_bytes("[PAD]\nthe\n##ing\n\x85\n\na b\r\n".encode())
    found = open_vocabulary(tmp_path)
    assert [found.text([k]) for k in range(7)] == ["[PAD]", "the", "##ing", "\x85", "", "a b", None]


def test_the_file_of_a_folder(tmp_path):
    for name, content in (("vocab.txt", "one"), ("vocab.json", '{"two": 0}'), ("tokenizer.json", None)):
        content = content or json.dumps({"model": {"type": "WordLevel", "vocab": {"three": 0}}, "added_tokens": None})
        (tmp_path / name).write_text(content)
    found = []
    for name in ("tokenizer.json", "vocab.json", "vocab.txt"):
        found.append(open_vocabulary(tmp_path).text([0]))
        (tmp_path / name).unlink()
    assert found == ["three", "two", "one"]
    with pytest.raises(InputError, match=r"or a folder with tokenizer\.json, vocab\.json, vocab\.txt\. Got"):
        open_vocabulary(tmp_path)


@pytest.mark.parametrize(
    ("name", "content", "reason"),
    [
        ("v.json", b"{", r"Expecting property name"),
        ("v.json", b"3", r"it holds a int"),
        ("v.json", b'{"a": "b"}', r"it has 'a': 'b', which is no token with its number"),
        ("v.json", b'{"a": true}', r"it has 'a': True"),
        ("v.json", b"[1]", r"it has 1: 0"),
        ("v.json", b'{"model": {"type": "BPE"}}', r"it has no 'vocab'"),
        ("v.json", b'{"model": {"vocab": {}}, "added_tokens": [{"id": 1}]}', r"it has no 'content'"),
        ("v.json", b'{"model": {"vocab": [[]]}}', r"index out of range"),
        ("v.txt", b"\xff", r"invalid start byte"),
    ],
)
def test_what_is_no_vocabulary(tmp_path, name, content, reason):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(
        InputError, match=rf"--vocab must be a tokenizer\.json or a vocab\.json.*Got .*{name}: .*{reason}"
    ):
        open_vocabulary(tmp_path / name)


def test_nothing_there(tmp_path):
    with pytest.raises(InputError, match=r"^--vocab: .*no.json does not exist\.$"):
        open_vocabulary(tmp_path / "no.json")
