"""The data set of a run: all sources' records, looked at beforehand, encoded when they are asked for."""

import hashlib
import json
import multiprocessing
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from torch import Tensor
from torch.utils.data import DataLoader, Dataset
from tqdm import tqdm
from transformers.utils import logging

from ..files import replace_file
from ..modeling_mgllava import MGLlavaModel
from .encode import BLANK, Encoder
from .errors import UNWRITABLE, BadRecord, CheckpointError, DataError
from .features import FeatureStore
from .records import RecordSource, check_record

__all__ = ["DataReport", "TrainingSamples"]

logger = logging.get_logger(__name__)

NO_LABEL = "no token of an answer is left within the text limit"
DETAILS_SHOWN = 3  # for each reason
_RECORDS_PER_TASK = 64
SAMPLES_ASKED = 8


@dataclass
class DataReport:
    """What the look at the data found.

    Attributes:
        records: how many there are.
        unlabelled: how many have nothing to learn from once cut to the text limit; they are left out.
        bad: how many cannot be used, for each reason; they are left out, up to the share the recipe allows.
        details: the first few of each reason.
    """

    records: int
    unlabelled: int = 0
    bad: Counter[str] = field(default_factory=Counter)
    details: dict[str, list[str]] = field(default_factory=dict)

    def add(self, reason: str, detail: str) -> None:
        self.bad[reason] += 1
        shown = self.details.setdefault(reason, [])
        if len(shown) < DETAILS_SHOWN:
            shown.append(detail)

    def lines(self) -> list[str]:
        lines = [f"{self.records} records, {self.records - self.unlabelled - self.bad.total()} to train on"]
        if self.unlabelled:
            lines.append(f"{self.unlabelled} left out: {NO_LABEL}")
        for reason, count in self.bad.most_common():
            lines.append(f"{count} left out: {reason} ({'; '.join(self.details[reason])})")
        return lines

    def check(self, max_bad_share: float) -> None:
        """Raise DataError if more records are bad than allowed, or none is left."""
        allowed = int(max_bad_share * self.records)
        if self.bad.total() > allowed:
            raise DataError(
                f"{self.bad.total()} of {self.records} records cannot be used, more than the {allowed} that "
                f"max_bad_share: {max_bad_share} allows:\n" + "\n".join(self.lines()[1:])
            )
        if self.records == self.unlabelled + self.bad.total():
            raise DataError("no record is left to train on:\n" + "\n".join(self.lines()))


class TrainingSamples(Dataset):
    """All records of a run that can be trained on.

    Every record of the sources that ask for it is tokenised, and its picture's file opened, before training. A
    picture that turns out to be damaged only when it is decoded is replaced by the next sample, the same one
    whenever the run is repeated, and counted.

    Args:
        sources: where the records are.
        encoder: makes samples of them.
        max_bad_share: share of records that may be bad, between 0 and 1.
        workers: processes that look at the records; 0 looks in this one.
        cache: file that keeps what was found, for the next start with the same data. None: looks again.
        begun: a run has begun on what `cache` holds; records of other lengths would go on in another order.
        progress: show a progress bar.

    Attributes:
        lengths: (samples,) int32, tokens without object tokens, negative for text alone.
        report: what was found.

    Raises:
        DataError: more records are bad, or none is left; or they are others than those the run began on.
    """

    def __init__(
        self,
        sources: Sequence[RecordSource],
        encoder: Encoder,
        *,
        max_bad_share: float = 0.0,
        workers: int = 0,
        cache: Path | None = None,
        begun: bool = False,
        progress: bool = False,
    ) -> None:
        self._sources = list(sources)
        self._workers = workers
        self._starts = np.cumsum([0, *(len(source) for source in self._sources)])
        self._encoder = encoder
        fingerprint = self._fingerprint()
        found = None if cache is None else _read_cache(cache, fingerprint)
        lengths, self.report = found or self._look(workers, progress)
        self.report.check(max_bad_share)
        if begun and cache is not None and found is None:
            _check_same_lengths(cache, lengths)
        # Not before: what is too bad to be trained on is mended, and then looked at again.
        if cache is not None and found is None:
            _write_cache(cache, fingerprint, lengths, self.report)
        self._kept = np.flatnonzero(lengths)
        self.lengths = lengths[self._kept]
        self._allowed = int(max_bad_share * self.report.records)
        # One byte a record, shared by all workers: a damaged one comes up again in every epoch, and as a substitute.
        self._replaced = multiprocessing.Array("b", self.report.records)

    def __len__(self) -> int:
        return len(self._kept)

    @property
    def replaced(self) -> np.ndarray:
        """Which records turned out to be bad since the start, for all workers of this process: (records,) bool."""
        return np.frombuffer(self._replaced.get_obj(), dtype=bool)

    def __getitem__(self, index: int) -> dict[str, Any]:
        if not 0 <= index < len(self):
            raise IndexError(f"index is {index}; there are {len(self)} samples")
        for step in range(len(self)):
            number = int(self._kept[(index + step) % len(self)])
            try:
                sample = self._encoder(self._record(number))
                if not any(label >= 0 for label in sample["labels"]):
                    raise BadRecord(NO_LABEL, f"record {number}")
                return sample
            except BadRecord as error:
                self._count_replaced(number, error)
        raise DataError("no record can be read")

    def store_features(self, store: FeatureStore, model: MGLlavaModel, *, progress: bool) -> None:
        """Encode all pictures that the store does not have.

        Raises:
            CheckpointError: the disk is full.
        """
        if self._encoder.show == "low_res" and BLANK not in store:
            store.fill(model, [self._encoder.blank_to_store()])
        data = hashlib.sha256(self._fingerprint().encode() + self._kept.tobytes()).hexdigest()
        pictures = _Pictures(self, store)
        # Files may have changed, and cost little to look at; of what code makes a few show whether the code has.
        if all(source.is_checked for source in self._sources) and store.is_complete(data):
            some = np.linspace(0, len(self) - 1, SAMPLES_ASKED).astype(int)
            if all(pictures[int(index)] is None for index in some):
                return
        loader = DataLoader(
            pictures,
            batch_size=_RECORDS_PER_TASK,
            num_workers=self._workers,
            collate_fn=list,
        )
        found = (picture for task in loader for picture in task)
        bar = tqdm(found, total=len(self), desc="features of pictures", disable=not progress)
        unreadable: list[str] = []

        def readable() -> Iterator[tuple[str, dict[str, Tensor]]]:
            for picture in bar:
                if isinstance(picture, str):
                    unreadable.append(picture)
                elif picture is not None:
                    yield picture

        store.fill(model, readable())
        if not unreadable:  # which may be mended until the next start
            store.mark_complete(data)

    def read_features(self, store: FeatureStore) -> None:
        """From now on samples hold features in place of pictures."""
        self._encoder.features = store

    def check_replaced(self, replaced: int, last: BadRecord | None = None) -> None:
        """Raise DataError if more records are bad than allowed.

        Args:
            replaced: how many turned out to be bad since the start, here or in all training processes.
            last: the last of them.
        """
        bad = self.report.bad.total() + replaced
        if bad > self._allowed:
            raise DataError(
                f"{bad} of {self.report.records} records cannot be used, more than the {self._allowed} that "
                f"max_bad_share allows" + (f"; the last one: {last}" if last else "")
            ) from last

    def _count_replaced(self, number: int, error: BadRecord) -> None:
        with self._replaced.get_lock():
            self._replaced[number] = 1
        logger.warning(f"the next sample takes the place of a record: {error}")
        self.check_replaced(int(self.replaced.sum()), error)

    def _record(self, number: int):
        source = int(np.searchsorted(self._starts, number, side="right")) - 1
        return self._sources[source][number - int(self._starts[source])]

    def _look(self, workers: int, progress: bool) -> tuple[np.ndarray, DataReport]:
        report = DataReport(int(self._starts[-1]))
        # One token and a picture is what a record that is not looked at counts as.
        lengths = np.ones(report.records, dtype=np.int32)
        for source, first in zip(self._sources, self._starts, strict=False):
            if source.is_checked:
                continue
            loader = DataLoader(
                _Looks(source, self._encoder),
                batch_size=_RECORDS_PER_TASK,
                num_workers=workers,
                collate_fn=list,
            )
            looks = tqdm(
                (look for task in loader for look in task),
                total=len(source),
                desc="checking records",
                disable=not progress,
            )
            for number, (length, reason, detail) in enumerate(looks, start=int(first)):
                lengths[number] = length
                if reason == NO_LABEL:
                    report.unlabelled += 1
                elif reason:
                    report.add(reason, detail)
        return lengths, report

    def _fingerprint(self) -> str:
        processor = self._encoder.processor
        facts = [
            [source.fingerprint for source in self._sources],
            sorted(processor.tokenizer.get_vocab().items()),
            processor.chat_template,
            self._encoder.text_limit,
        ]
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


class _Pictures(Dataset):
    """For each sample the key and the picture; None for text alone and for what is stored, and as text the reason why
    a picture cannot be read."""

    def __init__(self, samples: TrainingSamples, store: FeatureStore) -> None:
        self._samples = samples
        self._store = store
        self._seen: set[str] = set()

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, index: int) -> tuple[str, dict[str, Tensor]] | str | None:
        encoder = self._samples._encoder
        try:
            record = self._samples._record(int(self._samples._kept[index]))
            if (
                record.image is None
                or (key := encoder.picture_key(record)) in self._store
                or key in self._seen
            ):
                return None
            picture = encoder.encode_picture_to_store(record)
        except BadRecord as error:
            return str(error)  # it is replaced, and counted, when its turn comes
        self._seen.add(key)
        return key, picture


class _Looks(Dataset):
    """For each record its length, 0 if it is left out, and then reason and detail."""

    def __init__(self, source: RecordSource, encoder: Encoder) -> None:
        self._source = source
        self._encoder = encoder

    def __len__(self) -> int:
        return len(self._source)

    def __getitem__(self, index: int) -> tuple[int, str, str]:
        try:
            record = self._source[index]
            check_record(record)
            text = self._encoder.encode_text(record)
            self._encoder.check_room(record, text)
        except BadRecord as error:
            return 0, error.reason, error.detail
        if not text.has_labels:
            return 0, NO_LABEL, ""
        if text.image_position is None:
            return -len(text.input_ids), "", ""
        return len(text.input_ids) - 1 + self._encoder.processor.num_image_tokens, "", ""


def _check_same_lengths(cache: Path, lengths: np.ndarray) -> None:
    """Raise DataError unless these are the lengths that an earlier look found, whatever made it look again."""
    before = _read_cache(cache)
    if before is not None and not np.array_equal(before[0], lengths):
        raise DataError(
            f"{cache.parent} holds a run that began on other records, {len(before[0])} then and {len(lengths)} now, or "
            "on other texts; restore them, or choose another output"
        )


def _write_cache(path: Path, fingerprint: str, lengths: np.ndarray, report: DataReport) -> None:
    metadata = {
        "fingerprint": fingerprint,
        "unlabelled": str(report.unlabelled),
        "bad": json.dumps(report.bad),
        "details": json.dumps(report.details),
    }
    try:
        with replace_file(path) as scratch:
            save_file({"lengths": lengths}, scratch, metadata=metadata)
    except UNWRITABLE as error:
        raise CheckpointError(f"{path} cannot be written: {error}") from error


def _read_cache(path: Path, fingerprint: str | None = None) -> tuple[np.ndarray, DataReport] | None:
    """What an earlier look found; None if there was none, or at other data than of this fingerprint."""
    try:
        with safe_open(path, "np") as file:
            facts = file.metadata()
            lengths = file.get_tensor("lengths")
    except (OSError, SafetensorError):
        return None
    if fingerprint is not None and facts.get("fingerprint") != fingerprint:
        return None
    report = DataReport(
        len(lengths),
        int(facts["unlabelled"]),
        Counter(json.loads(facts["bad"])),
        json.loads(facts["details"]),
    )
    return lengths, report
