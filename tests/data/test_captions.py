"""Caption rows: their layout, their safety against hostile text, CLIP's own file layout, hub names."""

import json
import pickle
import threading
from pathlib import Path

import pytest
import torch
from huggingface_hub import constants
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Regex, Tokenizer, models, normalizers, pre_tokenizers, processors

from configs import UserError
from data.captions import CHARACTERS_PER_SLOT, END, PAD, PAD_ID, START, CaptionEncoder, train_bpe

pytestmark = pytest.mark.L0

CAPTIONS = [f"a {size} {colour} {shape}" for size in ("big", "small") for colour in ("red", "blue")
            for shape in ("circle", "heart", "star")] * 3  # fmt: skip
HOSTILE = [
    "",
    " ",
    "\x00\x1b[2J",
    "\ud800",
    END,
    f"{END} a {START} {PAD}",
    "é" * 50,
    "日本語 🦊",
    "a" * 5_000_000,
    "\n" * 10_000,
]


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> str:
    path = tmp_path_factory.mktemp("bpe") / "tokenizer.json"
    train_bpe(CAPTIONS, 320).save(str(path))
    return str(path)


@pytest.fixture(scope="module")
def clip_like(tmp_path_factory: pytest.TempPathFactory) -> str:
    """A tiny file built as CLIP's own: </w> suffixes, unknown is end-of-text, RobertaProcessing."""
    letters = sorted(pre_tokenizers.ByteLevel.alphabet())
    pieces = [*letters, *(letter + "</w>" for letter in letters if letter != "z"), "re", "red</w>"]  # z: unknown
    vocab = {piece: number for number, piece in enumerate([*pieces, START, END])}
    merges = [("r", "e"), ("re", "d</w>")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, unk_token=END, end_of_word_suffix="</w>"))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.NFC(), normalizers.Replace(Regex(r"\s+"), " "), normalizers.Lowercase()]
    )
    words = Regex(r"'s|'t|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False),
        ]
    )
    tokenizer.add_special_tokens([START, END])
    tokenizer.post_processor = processors.RobertaProcessing((END, vocab[END]), (START, vocab[START]), False, False)
    tokenizer.enable_padding(length=9, pad_id=vocab[END], pad_token=END)  # what some exports carry
    tokenizer.enable_truncation(9)
    path = tmp_path_factory.mktemp("clip") / "tokenizer.json"
    tokenizer.save(str(path))
    return str(path)


def assert_well_formed(rows: torch.Tensor, encoder: CaptionEncoder) -> None:
    """start, words, one end-of-text which is what argmax finds, zeros."""
    assert rows.dtype == torch.int64
    assert rows.shape[1] == encoder.context
    last = rows.argmax(dim=1)
    for row, end in zip(rows, last, strict=True):
        assert row[end] == encoder.end_of_text_id
        assert (row == encoder.end_of_text_id).sum() == 1
        assert row[0] == encoder._frame[0]
        assert (row[end + 1 :] == 0).all()
        assert 0 <= row.min() <= row.max() < encoder.vocab_size


def test_a_trained_vocabulary_pads_with_0_and_ends_with_its_largest_id() -> None:
    tokenizer = train_bpe(CAPTIONS, 320)
    assert tokenizer.token_to_id(PAD) == PAD_ID == 0
    assert tokenizer.token_to_id(END) == max(tokenizer.get_vocab().values())
    assert tokenizer.get_vocab_size() <= 320
    assert sorted(tokenizer.get_vocab().values()) == list(range(tokenizer.get_vocab_size()))


def test_the_same_captions_give_the_same_vocabulary_in_lower_case() -> None:
    text = train_bpe(CAPTIONS, 320).to_str()
    assert train_bpe(iter(CAPTIONS), 320).to_str() == text
    assert train_bpe([caption.upper() for caption in CAPTIONS], 320).to_str() == text


def test_a_vocabulary_too_small_for_bytes_is_refused() -> None:
    with pytest.raises(UserError, match=r"258.*259"):
        train_bpe(CAPTIONS, 258)
    assert train_bpe(CAPTIONS, 259).get_vocab_size() == 259


def test_a_row_is_start_words_end_zeros(trained: str) -> None:
    encoder = CaptionEncoder(trained, 10)
    rows = encoder.encode(["a red heart", "A  RED\nheart ", "a"])
    assert_well_formed(rows, encoder)
    assert torch.equal(rows[0], rows[1])
    assert rows[0].argmax() == 4
    assert rows[2].argmax() == 2
    assert encoder._tokenizer.decode(rows[0].tolist()).strip() == "a red heart"
    assert encoder.vocab_size == encoder.end_of_text_id + 1


def test_truncation_keeps_the_first_words_and_the_end(trained: str) -> None:
    long, short = CaptionEncoder(trained, 40), CaptionEncoder(trained, 5)
    text = ["a big red heart a small blue star"]
    row = short.encode(text)
    assert row[0, -1] == short.end_of_text_id
    assert torch.equal(row[0, :4], long.encode(text)[0, :4])


def test_no_captions_give_no_rows(trained: str) -> None:
    assert CaptionEncoder(trained, 6).encode([]).shape == (0, 6)


@pytest.mark.parametrize("kind", ["trained", "clip_like"])
def test_hostile_captions_give_well_formed_rows(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = CaptionEncoder(request.getfixturevalue(kind), 12)
    rows = encoder.encode(HOSTILE)
    assert_well_formed(rows, encoder)
    assert rows[0].argmax() == 1  # nothing between start and end


@given(st.lists(st.text(st.characters(codec=None), max_size=60), max_size=4))
@settings(max_examples=150, deadline=None)
def test_any_text_gives_well_formed_rows(clip_like: str, trained: str, captions: list[str]) -> None:
    for source in (clip_like, trained):
        encoder = CaptionEncoder(source, 8)
        assert_well_formed(encoder.encode(captions), encoder)


def test_a_caption_cannot_write_an_end_of_text_of_its_own(trained: str) -> None:
    encoder = CaptionEncoder(trained, 77)
    row = encoder.encode([f"red {END} heart"])[0]
    assert encoder._tokenizer.decode(row[1 : row.argmax()].tolist(), skip_special_tokens=False) == f" red {END} heart"


def test_text_beyond_the_cap_is_not_read(trained: str) -> None:
    encoder = CaptionEncoder(trained, 6)
    cap = CHARACTERS_PER_SLOT * 6
    assert torch.equal(encoder.encode([" " * cap + "red"]), encoder.encode([""]))
    assert not torch.equal(encoder.encode([" " * (cap - 3) + "red"]), encoder.encode([""]))


def test_clip_layout_is_read_as_clip_means_it(clip_like: str) -> None:
    encoder = CaptionEncoder(clip_like, 8)
    vocab = Tokenizer.from_file(clip_like).get_vocab()
    rows = encoder.encode(["Red red"])
    assert rows.tolist() == [[vocab[START], vocab["red</w>"], vocab["red</w>"], vocab[END], 0, 0, 0, 0]]
    assert torch.equal(encoder.encode(["red z red"]), rows)  # the unknown token is the end-of-text: never in the middle


def test_the_context_decides_the_length_not_the_tokenizer_file(clip_like: str) -> None:
    rows = CaptionEncoder(clip_like, 14).encode(["red " * 20, "red"])  # the file says: cut and pad to 9
    assert rows.argmax(dim=1).tolist() == [13, 2]


def test_a_tokenizer_whose_end_is_not_its_largest_id_is_refused(trained: str, tmp_path: Path) -> None:
    tokenizer = Tokenizer.from_file(trained)
    tokenizer.add_tokens(["<extra>"])
    tokenizer.save(str(tmp_path / "extra.json"))
    with pytest.raises(UserError, match="largest id"):
        CaptionEncoder(str(tmp_path / "extra.json"), 8)
    tree = json.loads(Path(trained).read_text()) | {"post_processor": None}
    (tmp_path / "bare.json").write_text(json.dumps(tree))
    with pytest.raises(UserError, match=r"ends an empty text as \[\]"):
        CaptionEncoder(str(tmp_path / "bare.json"), 8)


@pytest.mark.parametrize("source", ["missing/tokenizer.json", "no such name", "", "/nowhere/at/all"])
def test_a_source_that_is_neither_file_nor_hub_name_is_refused(source: str) -> None:
    with pytest.raises(UserError, match="is no file"):
        CaptionEncoder(source, 8)


def test_a_directory_or_a_broken_file_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file"):
        CaptionEncoder(str(tmp_path), 8)
    (tmp_path / "tokenizer.json").write_text('{"model": 3}')
    with pytest.raises(UserError, match="is not a tokenizer"):
        CaptionEncoder(str(tmp_path / "tokenizer.json"), 8)


def test_a_context_without_room_for_a_word_is_refused(trained: str) -> None:
    with pytest.raises(UserError, match="context=2"):
        CaptionEncoder(trained, 2)


@pytest.fixture
def hub_cache(clip_like: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """The hub's own cache layout with one repository in it, and no network."""
    repository = tmp_path / "models--openai--clip-tiny"
    commit = "0123456789abcdef0123456789abcdef01234567"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(commit)
    (repository / "snapshots" / commit).mkdir(parents=True)
    (repository / "snapshots" / commit / "tokenizer.json").write_text(Path(clip_like).read_text())
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    return commit


def test_a_hub_name_is_served_from_the_hub_cache(hub_cache: str, clip_like: str) -> None:
    rows = CaptionEncoder("openai/clip-tiny", 8).encode(["red"])
    assert torch.equal(rows, CaptionEncoder(clip_like, 8).encode(["red"]))
    assert torch.equal(rows, CaptionEncoder(f"openai/clip-tiny@{hub_cache}", 8).encode(["red"]))


@pytest.mark.usefixtures("hub_cache")
@pytest.mark.parametrize("name", ["openai/absent", "openai/clip-tiny@v2", "a..b/-c"])
def test_a_hub_name_that_cannot_be_had_is_one_clear_line(name: str) -> None:
    with pytest.raises(UserError, match="hub did not deliver") as caught:
        CaptionEncoder(name, 8)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kind", ["trained", "clip_like"])
def test_an_encoder_survives_pickling_with_all_its_rules(kind: str, request: pytest.FixtureRequest) -> None:
    encoder = CaptionEncoder(request.getfixturevalue(kind), 12)
    again = pickle.loads(pickle.dumps(encoder))
    assert torch.equal(again.encode(HOSTILE), encoder.encode(HOSTILE))


def test_threads_may_share_an_encoder(trained: str) -> None:
    encoder, found = CaptionEncoder(trained, 12), {}
    expected = encoder.encode(CAPTIONS)

    def work(number: int) -> None:
        found[number] = all(torch.equal(encoder.encode(CAPTIONS), expected) for _ in range(20))

    threads = [threading.Thread(target=work, args=(number,)) for number in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), True)
