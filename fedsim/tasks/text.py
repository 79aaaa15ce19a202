"""Language modelling: the next byte of a text, cross-entropy, bits per byte.

The text of the package is the topics of Python's language reference, with its licence in ``python_topics.json``.
"""

from __future__ import annotations

import base64
import copy
import functools
import hashlib
import json
import lzma
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from fedsim.config import FIELDS, Config
from fedsim.data.folder import data_folder, located
from fedsim.data.metric import Metric
from fedsim.data.task import Batch, Dataset, Examples, Task, by
from fedsim.errors import UserError
from strategies.arguments import at_least, at_most, check_fields, kebab

OF_THE_PACKAGE = Path(__file__).with_name("python_topics.json")
HELD_OUT = 10  # a tenth of each document, its end, is for tests
TOKENS = 256
OF_IMAGES = ("augment", "normalize")  # fields that say nothing of a text


class Piece(NamedTuple):
    """A part of one document, and how many windows of it there are: they begin at its first bytes."""

    first: int
    windows: int
    document: int


class Windows(Examples):
    """Pieces of a text on a device, of which windows are cut: `context` bytes, and as targets the byte after each.

    In training a window is cut out of its piece at random; it is tested at the beginning of the piece. Groups are the
    documents.
    """

    def __init__(self, text: Tensor, pieces: Sequence[Piece], context: int) -> None:
        self._text, self._pieces = text, np.array(pieces, np.int64).reshape(-1, 3)
        self._within = torch.arange(context + 1, device=text.device)

    def __len__(self) -> int:
        return len(self._pieces)

    @property
    def device(self) -> torch.device:
        return self._text.device

    @property
    def groups(self) -> Tensor:
        return torch.from_numpy(self._pieces[:, 2])

    def sample(self, index: NDArray[np.int64], words: NDArray[np.uint64]) -> Tensor:
        """(1, B) where the windows begin."""
        first, windows, _ = self._pieces[index].T
        half = np.uint64(32)
        return torch.from_numpy(first + (((words >> half) * windows.astype(np.uint64)) >> half).astype(np.int64))[None]

    def batch(self, drawn: Tensor, keys: Sequence[int], replicas: int = 1) -> tuple[Tensor, Tensor]:
        """(B, K * context) bytes, and (K * B, context) targets."""
        tokens = self._text[drawn[0][:, None] + self._within].long()
        inputs = tokens[:, :-1].view(replicas, -1, len(self._within) - 1)
        return inputs.transpose(0, 1).flatten(1), tokens[:, 1:]

    def plain(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        return self.batch(torch.from_numpy(self._pieces[None, start:stop, 0]).to(self.device), ())

    def subset(self, index: NDArray[np.int64]) -> Windows:
        part = copy.copy(self)
        part._pieces = self._pieces[index]
        return part


@dataclass(frozen=True)
class Text(Task):
    """Windows of `context` bytes of the files NAME.txt at `path`, or of Python's language reference.

    (B, context) bytes -> (B, context, 256) logits of the bytes that follow each.
    """

    path: str = ""
    context: Annotated[int, at_least(1), at_most(10**6)] = 64

    metric = Metric("bits_per_byte", "bits per byte", higher_is_better=False, examples="windows")

    def __post_init__(self) -> None:
        check_fields(self)

    def training_examples(self, config: Config) -> int:
        return len(self._split(config, "cpu").train)

    def whole(self, config: Config) -> Dataset[Windows]:
        return self._split(config, config.device)

    def digests(self, config: Config) -> dict[str, str]:
        return self._split(config, "cpu").sha256

    def verify(self, config: Config) -> None:
        place = self._place(config)
        if digest_of(read_documents(place)) != digest_of(_documents(place)):
            raise UserError(f"dataset = {config.dataset}: {place} has changed since this process read it: start anew")

    def check(self, config: Config) -> None:
        for name in OF_IMAGES:
            if (value := getattr(config, name)) not in ("none", FIELDS[name].default):
                raise UserError(
                    f"{kebab(name)} = {value} is of images, and dataset = {config.dataset} has none: leave it out"
                )

    def outputs(self, config: Config) -> int:
        return TOKENS

    def shape(self, config: Config) -> tuple[int]:
        return (self.context,)

    def trial(self, config: Config, count: int) -> Batch:
        tokens = torch.zeros(count, self.context, dtype=torch.int64)
        return tokens, tokens

    def taken(self, config: Config) -> str:
        return f"the windows of {config.dataset}, {self.context} bytes"

    def problem(self, config: Config, outputs: Any) -> str:
        shape = (2, self.context, TOKENS)
        if not isinstance(outputs, Tensor):
            return f"it gives {type(outputs).__name__}, not a tensor of {by(shape)} logits for two of them"
        found = tuple(outputs.shape)
        return "" if found == shape else f"it gives {by(found)}, not {by(shape)} logits for two of them"

    def forward(self, model: torch.nn.Module, batch: Batch) -> Any:
        outputs = model(batch[0])
        return getattr(outputs, "logits", outputs)  # of a model of Hugging Face's

    def loss(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return F.cross_entropy(outputs.flatten(0, -2), targets.flatten())

    def sums(self, outputs: Tensor, targets: Tensor) -> dict[str, Tensor]:
        loss = self._losses(outputs, targets).sum()
        return {"loss": loss, "bits_per_byte": loss / math.log(2)}

    def values(self, outputs: Tensor, targets: Tensor) -> Tensor:
        return self._losses(outputs, targets) / math.log(2)

    def _losses(self, outputs: Tensor, targets: Tensor) -> Tensor:
        """(B,) the mean loss of each window."""
        of_bytes = F.cross_entropy(outputs.flatten(0, -2), targets.flatten(), reduction="none")
        return of_bytes.view(targets.shape).double().mean(1)

    def _place(self, config: Config) -> Path:
        return located(config.dataset, self.path, str(data_folder(config))) if self.path else OF_THE_PACKAGE

    def _split(self, config: Config, device: str) -> Dataset[Windows]:
        data = _split(self._place(config), self.context, device)
        for name, windows in (("training", data.train), ("tests", data.test)):
            if not len(windows):
                raise UserError(
                    f"dataset = {config.dataset}: no document has {self.context + 1} bytes for {name}, which a window "
                    f"of context = {self.context} and the byte after it are: give a longer text or a smaller context"
                )
        return data


def read_documents(place: Path) -> dict[str, bytes]:
    """The documents at `place`, by their names: a file, the files NAME.txt of a folder, or those of the package."""
    if place == OF_THE_PACKAGE:
        packed = base64.b85decode(json.loads(place.read_text())["xz_base85"])
        return {name: text.encode() for name, text in json.loads(lzma.decompress(packed)).items()}
    try:
        files = sorted(place.rglob("*.txt")) if place.is_dir() else [place]
        documents = {str(file.relative_to(place)): file.read_bytes() for file in files}
    except OSError as error:
        raise UserError(f"dataset: text path = {place} cannot be read ({error.strerror}): give another file") from error
    if not documents:
        raise UserError(f"dataset: text path = {place} holds no file NAME.txt: give a folder that does, or a file")
    if not any(documents.values()):
        raise UserError(f"dataset: text path = {place} is empty: give a text")
    return documents


def digest_of(documents: dict[str, bytes]) -> str:
    """The SHA-256 of the names and contents of documents."""
    digests = [(name, hashlib.sha256(content).hexdigest()) for name, content in documents.items()]
    return hashlib.sha256(json.dumps(digests).encode()).hexdigest()


_documents = functools.lru_cache(maxsize=2)(read_documents)


@functools.lru_cache(maxsize=4)
def _split(place: Path, context: int, device: str) -> Dataset[Windows]:
    documents = _documents(place)
    text = torch.from_numpy(np.frombuffer(b"".join(documents.values()), np.uint8).copy()).to(device)
    train: list[Piece] = []
    test: list[Piece] = []
    first = 0
    for number, content in enumerate(documents.values()):
        held_out = len(content) // HELD_OUT
        middle = first + len(content) - held_out
        train += training_pieces(first, middle, context, number)
        test += [Piece(start, 1, number) for start in range(middle, middle + held_out - context, context)]
        first += len(content)
    digests = {"text": digest_of(documents)}
    return Dataset(Windows(text, train, context), Windows(text, test, context), len(documents), digests)


def training_pieces(first: int, end: int, context: int, document: int) -> list[Piece]:
    """Pieces of 2 * `context` bytes that share none, the last one with the rest; none of a part without any window."""
    windows = end - first - context
    if windows < 1:
        return []
    starts = range(first, max(end - 2 * context, first) + 1, 2 * context)
    ends = [*starts[1:], end]
    return [Piece(start, stop - start - context, document) for start, stop in zip(starts, ends, strict=True)]
