"""Print samples as text, with the borders of documents: one by its number, or the very samples of a step."""

import argparse
from typing import TYPE_CHECKING, Any

from cluster.cli._data_target import add_target, find_config
from cluster.cli._runs import add_json, print_json
from elastic.errors import DataError

if TYPE_CHECKING:
    from elastic.data.corpus import Corpus


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take what to look at, and which samples of it."""
    add_target(parser)
    which = parser.add_mutually_exclusive_group()
    which.add_argument("--sample", metavar="N", type=int, help="its number in the split (default 0)")
    which.add_argument("--step", metavar="S", type=int, help="all samples of this step, as metrics.jsonl counts steps")
    parser.add_argument("--split", choices=("train", "val"), default="train", help="(default %(default)s)")
    parser.add_argument("--rows", metavar="N", type=int, help="print so many samples at most")
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print them.

    Raises:
        DataError: there is no such sample or step.
    """
    from elastic.data.corpus import open_corpus

    config = find_config(args)
    corpus = open_corpus(config)
    rows = describe(corpus, args)
    if args.json:
        print_json({"split": args.split, "step": args.step, "samples": rows})
        return 0
    for row in rows:
        print(f"===== {row['title']}")
        for number, passage in enumerate(row["passages"]):
            if passage["begins"]:
                print(f"----- a document begins, {passage['num_tokens']:,} tokens of it")
            elif number == 0:
                print(f"----- {passage['num_tokens']:,} tokens of a document that began before")
            print(passage["text"])
            if passage["uncounted"]:
                print(f"----- of that, not counted for the loss: {passage['uncounted']}")
    return 0


def describe(corpus: "Corpus", args: argparse.Namespace) -> list[dict[str, Any]]:
    """Return the samples asked for as JSON objects."""
    from dataclasses import asdict

    from elastic.data.inspection import decode_sample, load_own_tokenizer

    ids, rows, samples = _choose(corpus, args), list[dict[str, Any]](), corpus.get_samples(args.split)
    tokenizer = load_own_tokenizer(next(iter(corpus.sources.values())))
    for place, sample_id in enumerate(ids[: args.rows]):
        source, number = samples.find(sample_id)
        sample = samples.read(sample_id)
        where = "" if args.step is None else f"step {args.step}, row {place}: "
        of = f"{source}, which is its sample {number}" if source else args.split
        passages = decode_sample(corpus.sources[source], args.split, sample, tokenizer)
        rows.append(
            {
                "title": f"{where}sample {sample_id} of {of}, {len(sample.tokens):,} tokens",
                "id": sample_id,
                "source": source or None,
                "tokens": sample.tokens.tolist(),
                "passages": [asdict(passage) for passage in passages],
            }
        )
    return rows


def _choose(corpus: "Corpus", args: argparse.Namespace) -> list[int]:
    samples = corpus.get_samples(args.split)
    if args.step is None:
        number = args.sample or 0
        if not 0 <= number < len(samples):
            raise DataError(
                f"--sample={number} is not there: {args.split} of {args.target} has {len(samples):,} samples of "
                f"data.seq_len={corpus.config.data.seq_len}. Name one from 0 to {len(samples) - 1}."
            )
        return [number]
    if args.split != "train" or args.step < 1:
        raise DataError(f"--step={args.step} counts the steps of training, from 1, and takes samples of train.")
    return corpus.get_ids(args.step - 1).tolist()
