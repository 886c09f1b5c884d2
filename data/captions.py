"""Caption tokenizer: captions -> token ids, and training of a small BPE. The one door to `tokenizers` and the hub.

    encoder = CaptionEncoder("corpus/tokenizer.json", context=32)
    encoder.encode(["a red heart"])          # int64 (1, 32): [[510, 261, 270, 301, 511, 0, 0, ...]]

The demo trains a byte-level BPE on its own captions; the real presets take CLIP's tokenizer.json from a file or from
the hub. Either way a row is

    [start-of-text] words... [end-of-text] 0 0 0

and the text tower pools at argmax(row), so end-of-text must be the largest id of the vocabulary: checked.

Cleaning, before the tokenizer's own normalisation: text past 64 characters per slot is cut off (a caption may
be megabytes long, a row cannot); control characters and lone surrogates become spaces. Text that spells a
special token is tokenised as text: no caption can contain an end-of-text of its own.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors, trainers

from configs import UserError
from configs.data import ImageTextData
from configs.section import require_digest

# A batch of captions takes about a millisecond on one thread, and the loader has threads of its own: a second
# pool would fight it for cores, and warns when a process forks.
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

START, END, PAD = "<|startoftext|>", "<|endoftext|>", "<|pad|>"
PAD_ID = 0
CHARACTERS_PER_SLOT = 64  # CLIP's longest word pieces have 36 characters
UNREADABLE = re.compile("[\x00-\x1f\x7f-\x9f\ud800-\udfff]")  # controls and lone surrogates
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def train_bpe(captions: Iterable[str], vocab_size: int) -> Tokenizer:
    """Train a byte-level, lower-case BPE: id 0 is padding, then bytes, merges, start-of-text, end-of-text.

    The same captions give the same vocabulary. It has fewer ids than `vocab_size` where the captions hold no
    more pairs that occur twice. Raises UserError below 259 ids: 256 bytes and three special tokens.
    """
    if vocab_size < 259:
        raise UserError(f"vocabulary of {vocab_size}: 256 bytes and 3 special tokens need 259; ask for more")
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.Sequence(
        [
            normalizers.NFC(),
            normalizers.Replace(Regex(r"\s+"), " "),
            normalizers.Lowercase(),
            normalizers.Strip(),
        ]
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=True)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size - 2,
        min_frequency=2,
        special_tokens=[PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(map(clean_caption, captions), trainer)
    tokenizer.add_special_tokens([START, END])  # added last, so end-of-text has the largest id
    start, end = tokenizer.token_to_id(START), tokenizer.token_to_id(END)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{START} $A {END}", special_tokens=[(START, start), (END, end)]
    )
    return tokenizer


def clean_caption(caption: str, limit: int | None = None) -> str:
    """Return at most `limit` characters of the caption, with spaces for control characters and lone surrogates."""
    return UNREADABLE.sub(" ", caption[:limit])


class CaptionEncoder:
    """Turns captions into rows of ids. Can be pickled; one instance may serve several threads.

    `source` is a tokenizer.json file or a hub name, `owner/name` or `owner/name@revision`. `context` is the row length
    C. Raises UserError, in which `key` names the setting, where the source cannot be read or its end-of-text is not
    the largest id.
    """

    def __init__(self, source: str, context: int, key: str = "data.tokenizer") -> None:
        if context < 3:
            raise UserError(f"context={context}: start, end and one word need 3 slots; raise model.text.context")
        self.context = context
        self.source, self._setting = source, f"{key}={source}"
        self._tokenizer = _load(source, self._setting)
        self._prepare()

    def _prepare(self) -> None:
        self._tokenizer.no_truncation()
        self._tokenizer.no_padding()
        self._tokenizer.encode_special_tokens = True  # not stored in a tokenizer's pickle
        largest = max(self._tokenizer.get_vocab(with_added_tokens=True).values())
        frame = self._tokenizer.encode("").ids
        if not frame or frame[-1] != largest:
            raise UserError(
                f"{self._setting} ends an empty text as {frame}, its largest id is {largest}: "
                "the text tower pools at the largest id, so every text must end with it; use a CLIP-like one"
            )
        self._frame = frame

    def __getstate__(self) -> dict[str, Any]:
        return {
            "context": self.context,
            "source": self.source,
            "_setting": self._setting,
            "_tokenizer": self._tokenizer,
        }

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._prepare()

    @property
    def vocab_size(self) -> int:
        """Number of ids, which the token embedding needs rows for: one more than the largest."""
        return self.end_of_text_id + 1

    @property
    def end_of_text_id(self) -> int:
        """The id at the end of every caption."""
        return int(self._frame[-1])

    def encode(self, captions: list[str]) -> torch.Tensor:
        """Encode n captions as (n, C) int64 ids. A long caption loses its tail and keeps its end-of-text."""
        limit = CHARACTERS_PER_SLOT * self.context
        texts = [clean_caption(caption, limit) for caption in captions]
        rows = torch.full((len(texts), self.context), PAD_ID, dtype=torch.int64)
        start, end = self._frame[:-1], self._frame[-1]
        room = self.context - len(self._frame)
        encodings = self._tokenizer.encode_batch(texts, add_special_tokens=False)
        for row, encoding in zip(rows, encodings, strict=True):
            words = [token for token in encoding.ids if token != end][:room]
            row[: len(words) + len(self._frame)] = torch.tensor([*start, *words, end])
        return rows


def with_tokenizer_digest(data: ImageTextData) -> ImageTextData:
    """Return the section with tokenizer_sha256 filled in: the digest of the tokenizer.json file, also for a hub name.

    Raises UserError where the file is missing, or does not have the digest that the section gives.
    """
    found = tokenizer_digest(data.tokenizer)
    require_digest("data.tokenizer", data.tokenizer, "data.tokenizer_sha256", data.tokenizer_sha256, found)
    return data.model_copy(update={"tokenizer_sha256": found})


def tokenizer_digest(source: str, key: str = "data.tokenizer") -> str:
    """Return the sha256 of the tokenizer.json of `source`, a path or a hub name. Raises UserError without one."""
    try:
        return hashlib.sha256(_tokenizer_file(source, f"{key}={source}").read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{key}={source} cannot be read ({error.strerror}); check its permissions") from None


def _tokenizer_file(source: str, setting: str) -> Path:
    path = Path(source)
    if path.is_file():
        return path
    if path.exists() or path.suffix == ".json" or not HUB_NAME.fullmatch(source):
        raise UserError(
            f"{setting} is no file: give the path of a tokenizer.json, or a hub name such as "
            "openai/clip-vit-large-patch14"
        )
    return _download(source, setting)


def _load(source: str, setting: str) -> Tokenizer:
    path = _tokenizer_file(source, setting)
    try:
        return Tokenizer.from_file(str(path))
    except Exception as error:  # the Rust side raises bare Exception for every malformed file
        raise UserError(f"{setting} is not a tokenizer.json that `tokenizers` can read: {error}") from None


def _download(name: str, setting: str) -> Path:
    """Download the tokenizer.json of a hub repository, or find it in the local hub cache."""
    from huggingface_hub import hf_hub_download

    repository, _, revision = name.partition("@")
    try:
        return Path(hf_hub_download(repository, "tokenizer.json", revision=revision or None))
    except Exception as error:  # the hub and its transport raise many types
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise UserError(
            f"{setting} is no file and the hub did not deliver it ({reason}); check the name "
            "and the network, or download its tokenizer.json once and give its path"
        ) from None
