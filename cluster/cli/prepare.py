"""Turn text, JSON lines or Parquet into a tokenizer and token shards.

INPUT is a file, a folder, a glob, a URI such as s3://bucket/folder, or `kjv:`, the text of the demo.
"""

import argparse
import sys
import time
from collections.abc import Generator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from cluster.cli._runs import add_json, print_json

_SAMPLE_TOKENS = 40

if TYPE_CHECKING:
    from elastic.data.preparation.prepare import OnProgress, PrepareProgress


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take what `elastic.data.preparation.prepare.prepare` takes."""
    parser.add_argument("inputs", metavar="INPUT", nargs="+")
    parser.add_argument("--out", metavar="DIR", required=True, help="the folder to make: data.path of a configuration")
    parser.add_argument("--tokenizer", metavar="FILE", help="a Hugging Face tokenizer.json; default: train our own BPE")
    parser.add_argument(
        "--chat",
        choices=("messages", "sharegpt", "alpaca"),
        help="rows are conversations, written by the chat template of --tokenizer HF_DIR; only assistants' turns count",
    )
    parser.add_argument(
        "--max-tokens", metavar="N", type=int, default=0, help="leave longer conversations out (default: none)"
    )
    parser.add_argument("--eot-token", metavar="TOKEN", help="ends a document; default: the tokenizer's own")
    parser.add_argument(
        "--bos-token", metavar="TOKEN", help="begins a document; default: what the tokenizer puts there; '': none"
    )
    parser.add_argument(
        "--special-tokens",
        choices=("text", "parse"),
        default="text",
        help="what a special token written out in a text is (default %(default)s; parse: the token)",
    )
    parser.add_argument(
        "--vocab-size", metavar="N", type=int, default=4096, help="of our own BPE (default %(default)s)"
    )
    parser.add_argument(
        "--val-fraction", metavar="X", type=float, default=0.05, help="held out; 0: none (default %(default)s)"
    )
    parser.add_argument(
        "--text-key",
        metavar="KEY",
        default="text",
        help="where json, parquet and arrow have the text; dots lead inside: messages.0.content (default %(default)s)",
    )
    parser.add_argument(
        "--max-missing",
        metavar="X",
        type=float,
        default=0.1,
        help="share of rows without text, or broken, that is left out; more end the job (default %(default)s)",
    )
    parser.add_argument(
        "--duplicates",
        choices=("keep", "drop"),
        default="keep",
        help="drop: of documents with the same text, take the first alone (default %(default)s)",
    )
    parser.add_argument(
        "--part",
        metavar="I/N",
        default="",
        help="the share of one of N machines; the last one joins them all",
    )
    parser.add_argument("--processes", metavar="N", type=int, default=0, help="default: one per core")
    parser.add_argument("--overwrite", action="store_true", help="replace what an earlier prepare made")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Prepare the data and tell what came out."""
    from elastic.data.preparation.prepare import prepare

    start_s = time.monotonic()
    notes: list[str] = []
    try:
        with _progress_bar() as on_progress:
            info = prepare(
                args.inputs,
                args.out,
                tokenizer=args.tokenizer,
                eot_token=args.eot_token,
                bos_token=args.bos_token,
                special_tokens=args.special_tokens,
                vocab_size=args.vocab_size,
                val_fraction=args.val_fraction,
                num_processes=args.processes,
                text_key=args.text_key,
                chat=args.chat,
                max_tokens=args.max_tokens,
                max_missing=args.max_missing,
                duplicates=args.duplicates,
                part=args.part,
                overwrite=args.overwrite,
                on_progress=on_progress,
                on_note=notes.append,
            )
    finally:
        for note in notes:
            print(note, file=sys.stderr)
    summary = {
        "path": args.out,
        "vocab_size": info.vocab_size,
        "train_tokens": info.train.num_tokens,
        "train_documents": info.train.num_documents,
        "val_tokens": info.val.num_tokens,
        "val_documents": info.val.num_documents,
        "train_entropy_nats": info.train_entropy_nats,
        "seconds": time.monotonic() - start_s,
        "notes": notes,
        "sample": _show_sample(args.out, args.part),
    }
    if args.json:
        print_json(summary)
    else:
        print(
            f"{info.train.num_tokens:,} tokens to train on and {info.val.num_tokens:,} held out, vocabulary "
            f"{info.vocab_size:,}, in {summary['seconds']:.1f} s. Train with data.path={args.out}"
        )
        print(f"the first document begins: {summary['sample']!r}")
    return 0


def _show_sample(out: str, part: str) -> str:
    """Return the beginning of the first document, decoded: what a model will read."""
    from pathlib import Path

    from elastic.data.inspection import load_own_tokenizer
    from elastic.data.preparation.parts import parse_part
    from elastic.data.prepared.shards import open_unchecked

    own = parse_part(part).get_folder(Path(out)) if part else Path(out)
    dataset = open_unchecked(own if own.is_dir() else out)
    num_tokens = min(_SAMPLE_TOKENS, dataset.info.train.num_tokens)
    ids = dataset.read_tokens("train", 0, num_tokens).tolist()
    return load_own_tokenizer(dataset).decode(ids, skip_special_tokens=False)


@contextmanager
def _progress_bar() -> "Generator[OnProgress]":
    """Show files done and tokens made on stderr while the block runs."""
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

    what = TextColumn("{task.description}")
    files = (BarColumn(), MofNCompleteColumn(), TextColumn("files"), TimeElapsedColumn())
    with Progress(what, *files, console=Console(stderr=True)) as bar:
        task = bar.add_task("reading")

        def show(progress: "PrepareProgress") -> None:
            doing = "training the tokenizer" if progress.stage == "tokenizer" else f"{progress.num_tokens:,} tokens"
            bar.update(task, description=doing, completed=progress.files_done, total=progress.num_files)

        yield show
