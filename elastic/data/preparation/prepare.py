"""`solvent prepare`: text in, a folder of token shards out.

One pass trains the tokenizer (unless one is given), one encodes. Documents stream through a window of batches, so
memory holds one shard of each split and the batches in flight, however large the corpus. The result does not depend on
the number of processes. It is written beside the target and renamed at the end: the folder is complete or not there.
"""

import logging
import os
import shutil
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from multiprocessing import get_context
from pathlib import Path
from typing import Literal

import numpy as np
from tokenizers import Tokenizer

from elastic.data.preparation.chat.conversations import ChatKind
from elastic.data.preparation.chat.preparing import describe_counted, describe_left_out, open_chat
from elastic.data.preparation.documents import Source, find_sources
from elastic.data.preparation.encoder import Encoded, Encoder, build_encoder, find_division, split_text
from elastic.data.preparation.entropy import cross_entropy_nats
from elastic.data.preparation.parts import Part, choose_sources, join_parts, parse_part, write_counts
from elastic.data.preparation.rows import Tally
from elastic.data.preparation.sieve import Duplicates, Sieve
from elastic.data.preparation.target import check_target, stage_folder
from elastic.data.preparation.writer import SplitWriter
from elastic.data.prepared.checksums import write_stamp
from elastic.data.prepared.format import (
    DATASET_FILE,
    SPLITS,
    TOKENIZER_FILE,
    DatasetInfo,
    Split,
    hash_file,
    read_info,
    write_block_sums,
    write_info,
)
from elastic.data.prepared.tokenizer import SpecialTokens, load_tokenizer, train_tokenizer
from elastic.errors import DataError

log = logging.getLogger(__name__)

SHARD_TOKENS = 1 << 27
"""256 MiB of 16-bit tokens; a corpus of 2 T tokens makes 15 000 files."""
TOKENIZER_CHARS = 1 << 29
"""A tokenizer is trained on at most so much text, an equal share from the head of each file."""
BATCH_CHARS = 1 << 20
"""Text that one process encodes at a time."""
SMALL_CORPUS_BYTES = 64 << 20
"""Below this, starting processes takes longer than it saves."""
MAX_MISSING = 0.1
"""The share of rows without text that is let pass."""


@dataclass(frozen=True, kw_only=True)
class PrepareProgress:
    """How far `prepare` has come in its present stage."""

    stage: Literal["tokenizer", "tokens"]
    num_files: int
    files_done: int = 0
    num_documents: int = 0
    num_tokens: int = 0


OnProgress = Callable[[PrepareProgress], None]
OnNote = Callable[[str], None]


def _ignore_progress(_: PrepareProgress) -> None:
    pass


def prepare(
    inputs: Sequence[str | Path],
    out: str | Path,
    *,
    tokenizer: str | Path | None = None,
    eot_token: str | None = None,
    bos_token: str | None = None,
    special_tokens: SpecialTokens = "text",
    vocab_size: int = 4096,
    val_fraction: float = 0.05,
    num_processes: int = 0,
    text_key: str = "text",
    chat: ChatKind | None = None,
    max_tokens: int = 0,
    max_missing: float = MAX_MISSING,
    duplicates: Duplicates = "keep",
    part: str = "",
    shard_tokens: int = SHARD_TOKENS,
    overwrite: bool = False,
    on_progress: OnProgress | None = None,
    on_note: OnNote = log.info,
) -> DatasetInfo:
    """Turn text into a folder of token shards.

    A script that lets this start processes needs the usual `if __name__ == "__main__":`.

    Args:
        inputs: files, folders, globs, URIs such as s3://bucket/folder, or `kjv:` (the demo's text).
        out: the folder to make.
        tokenizer: a Hugging Face `tokenizer.json`; None trains a byte-level BPE of `vocab_size` on the training split.
        eot_token: the token between documents; None takes the tokenizer's own.
        bos_token: the token that begins a document; None takes what the tokenizer itself puts there, empty none.
        special_tokens: what a special token written out in a text is: text, or the token.
        val_fraction: share of the documents that is held out, chosen by content. 0: none, to train without validation.
        num_processes: 0 takes one per core, or none besides this one for a small corpus.
        text_key: the field (json) or column (parquet) that holds the text.
        chat: rows are conversations of this kind, written by the template beside the tokenizer; only what assistants
            have to write counts for the loss. `text_key` then says where the turns are, if not where they usually are.
        max_tokens: conversations that are longer are left out. 0: none is.
        max_missing: the share of rows without text that is left out; more end the job.
        duplicates: drop: of documents with the same text, only the first is taken.
        part: such as 3/8: prepare this part of the files, for one of 8 machines (see `parts.py`); a tokenizer must be
            given, so that all have the same.
        overwrite: replace a folder that an earlier `prepare` made.
        on_progress: called now and then from this thread.
        on_note: takes what the user should know of the inputs, a line each.

    Raises:
        DataError: an input, the tokenizer or the target cannot be used, or there is no text.
    """
    if "://" in str(out):
        raise DataError(
            f"out={out} is not a local folder, and shards are memory-mapped. Write to a disk that nodes share."
        )
    whole, own = Path(out).absolute(), parse_part(part) if part else None
    if own and tokenizer is None:
        raise DataError(
            f"--part={part} needs --tokenizer: each part would train another. Prepare some of the text first, and give "
            "all parts its tokenizer.json."
        )
    out = whole
    if own and (overwrite or not (whole / DATASET_FILE).exists()):
        (whole / DATASET_FILE).unlink(missing_ok=True)  # what was joined before is no more
        out = own.get_folder(whole)
        if (out / DATASET_FILE).exists() and not overwrite:
            return _join(whole, own, read_info(out), on_note)
    report = on_progress or _ignore_progress
    if not 0 <= val_fraction < 1:
        raise DataError(f"val_fraction={val_fraction} is a share of the documents. Use 0 or more, and less than 1.")
    check_target(out, overwrite=overwrite)
    talk = open_chat(chat, tokenizer, key=text_key, max_tokens=max_tokens, part=part) if chat else None
    tokenizer = talk.tokenizer_file if talk else tokenizer
    sources = find_sources(inputs, text_key=talk.take if talk else text_key, on_note=on_note)
    if own:
        sources = choose_sources(sources, own)
    num_processes = num_processes or _choose_num_processes(sources)
    texts = _read_all(sources, Tally(max_missing))
    divide = find_division(texts, val_fraction) if val_fraction and not own and not chat else "documents"

    with stage_folder(out) as folder:
        path = folder / TOKENIZER_FILE
        if tokenizer is None:
            report(PrepareProgress(stage="tokenizer", num_files=len(sources)))
            heads = _sample(sources, TOKENIZER_CHARS, Tally(max_missing))
            parts = (part for text in heads for part in split_text(text, val_fraction, divide))
            learned = train_tokenizer((text for split, text in parts if split == "train"), vocab_size=vocab_size)
            path.write_text(learned.to_str(pretty=True), encoding="utf-8")
        else:
            load_tokenizer(Path(tokenizer))
            shutil.copyfile(tokenizer, path)
        encoder = build_encoder(
            path,
            eot_token=eot_token,
            bos_token=bos_token,
            special_tokens=special_tokens,
            val_fraction=val_fraction,
            divide=divide,
        )
        encoder = talk.extend(encoder) if talk else encoder
        on_note(_describe_documents(load_tokenizer(path), encoder))
        writers: dict[Split, SplitWriter] = {
            split: SplitWriter(folder, split, encoder, shard_tokens) for split in SPLITS
        }
        tally = Tally(max_missing)
        sieve = Sieve(duplicates)
        read = partial(_read_kept, sieve, tally)
        info = _write_tokens(
            sources, encoder, writers, read=read, tally=tally, num_processes=num_processes, report=report
        )
        left_out = list(describe_left_out(list(writers.values()), max_missing))
        if own:
            write_counts(folder, {split: writer.counts for split, writer in writers.items()})
        write_block_sums(folder, info)
        write_info(folder, info)
        write_stamp(folder, info)
    told = (describe_counted(list(writers.values())), sieve.describe(), _describe_special(writers, encoder))
    for note in filter(None, (*tally.finish(), *left_out, *told, _describe_validation(info, encoder))):
        on_note(note)
    return _join(whole, own, info, on_note) if own else info


def _choose_num_processes(sources: Sequence[Source]) -> int:
    is_small = sum(source.size_bytes for source in sources) < SMALL_CORPUS_BYTES
    return 1 if is_small else os.cpu_count() or 1


def _join(out: Path, part: Part, info: DatasetInfo, on_note: OnNote) -> DatasetInfo:
    joined = join_parts(out, part.of)
    if isinstance(joined, DatasetInfo):
        on_note(f"all {part.of} parts are joined in {out}")
        return joined
    on_note(f"part {part.number} is in {part.get_folder(out)}; missing: {', '.join(map(str, joined))} of {part.of}")
    return info


def _read_kept(sieve: Sieve, tally: Tally, source: Source) -> Iterator[str]:
    return sieve.read(tally.read(source.read()))


def _describe_documents(tokenizer: Tokenizer, encoder: Encoder) -> str:
    end = tokenizer.id_to_token(encoder.eot_id)
    if encoder.has_counted:
        return f"conversations are written by the chat template, and each ends with {end}"
    begin = "" if encoder.bos_id is None else f"begins with {tokenizer.id_to_token(encoder.bos_id)} and "
    return f"each document {begin}ends with {end}"


def _describe_special(writers: Mapping[Split, SplitWriter], encoder: Encoder) -> str:
    names = sorted(frozenset[str]().union(*(writer.spelled for writer in writers.values())))
    if not names:
        return ""
    num = sum(writer.num_spelled for writer in writers.values())
    how = (
        "and were read as text; --special-tokens parse makes them the tokens"
        if encoder.special_tokens == "text"
        else "and became the tokens; --special-tokens text reads them as text"
    )
    more = f" and {len(names) - 5} more" if len(names) > 5 else ""
    return f"special tokens stand written out in {num:,} documents ({', '.join(names[:5])}{more}) {how}"


def _describe_validation(info: DatasetInfo, encoder: Encoder) -> str:
    if not info.val.num_tokens:
        wanted = "; to have one, raise --val-fraction" if encoder.val_fraction else ""
        return f"nothing is held out: training on this data computes no validation loss{wanted}"
    if encoder.divide == "inside":
        return "too few documents to hold out whole ones: the end of each is held out"
    return ""


def _write_tokens(
    sources: Sequence[Source],
    encoder: Encoder,
    writers: Mapping[Split, SplitWriter],
    *,
    read: Callable[[Source], Iterator[str]],
    tally: Tally,
    num_processes: int,
    report: OnProgress,
) -> DatasetInfo:
    files_done = 0

    def read_all() -> Iterator[str]:
        nonlocal files_done
        for source in sources:
            yield from read(source)
            files_done += 1

    for encoded in _encode_all(encoder, _batches(read_all()), num_processes):
        for split, part in encoded.items():
            writers[split].add(part)
        report(
            PrepareProgress(
                stage="tokens",
                num_files=len(sources),
                files_done=files_done,
                num_documents=sum(writer.num_documents for writer in writers.values()),
                num_tokens=sum(writer.num_tokens for writer in writers.values()),
            )
        )
    train, val = writers["train"], writers["val"]
    if not train.num_tokens:
        tally.finish()  # may say better why; or this
        list(describe_left_out(list(writers.values()), tally.max_missing))
        raise DataError(
            f"the inputs hold no text to train on (files: {len(sources)}, documents with text: {val.num_documents}"
            f"{', all held out' if val.num_documents else ''}). Name files with text in them, or lower val_fraction."
        )
    return DatasetInfo(
        vocab_size=encoder.vocab_size,
        eot_id=encoder.eot_id,
        bos_id=encoder.bos_id,
        largest_id=int(np.flatnonzero(train.counts + val.counts)[-1]),
        tokenizer_sha256=hash_file(encoder.tokenizer_file),
        train_entropy_nats=cross_entropy_nats(train.counts, train.counts),
        val_cross_entropy_nats=cross_entropy_nats(val.counts, train.counts + 1) if val.num_tokens else None,
        has_counted=encoder.has_counted,
        has_block_sums=True,
        train=train.finish(),
        val=val.finish(),
    )


def _read_all(sources: Iterable[Source], tally: Tally) -> Iterator[str]:
    """Yield the documents that have text."""
    for source in sources:
        yield from (text for text in tally.read(source.read()) if text and not text.isspace())


def _sample(sources: Sequence[Source], max_chars: int, tally: Tally) -> Iterator[str]:
    """Yield the head of every source, sharing the budget equally among those still to come."""
    for i, source in enumerate(sources):
        share = max_chars // (len(sources) - i)
        for text in tally.read(source.read()):
            if share <= 0:
                break
            share -= len(text)
            max_chars -= len(text)
            yield text


def _batches(texts: Iterable[str]) -> Iterator[list[str]]:
    """Group documents into batches of some BATCH_CHARS, leaving out those without text."""
    batch: list[str] = []
    num_chars = 0
    for text in texts:
        if not text or text.isspace():
            continue
        batch.append(text)
        num_chars += len(text)
        if num_chars >= BATCH_CHARS:
            yield batch
            batch, num_chars = [], 0
    if batch:
        yield batch


def _encode_all(encoder: Encoder, batches: Iterable[list[str]], num_processes: int) -> Iterator[dict[Split, Encoded]]:
    """Encode batches in order; with processes, at most two batches per process are in flight."""
    if num_processes == 1:  # the tokenizer's own threads use the other cores
        yield from map(encoder.encode, batches)
        return
    pool = ProcessPoolExecutor(
        num_processes,
        mp_context=get_context("spawn"),  # forking a process that has threads (arrow, tokenizers) can hang
        initializer=_enter_worker,
    )
    try:
        pending: deque[Future[dict[Split, Encoded]]] = deque()
        for batch in batches:
            if len(pending) == 2 * num_processes:
                yield pending.popleft().result()
            pending.append(pool.submit(encoder.encode, batch))
        while pending:
            yield pending.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)


def _enter_worker() -> None:
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # the library's only switch; processes share the cores already
