"""Tell what prepared data holds: tokens, documents and their lengths, shards, vocabulary."""

import argparse
from typing import TYPE_CHECKING, Any

from cluster.cli._data_target import add_target, find_config, is_folder
from cluster.cli._runs import add_json, print_json

if TYPE_CHECKING:
    from elastic.data.prepared.shards import Dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Take what to look at."""
    add_target(parser)
    add_json(parser)


def run(args: argparse.Namespace) -> int:
    """Print what is there.

    Raises:
        DataError: it cannot be read.
    """
    from dataclasses import asdict

    from elastic.data.corpus import describe_epochs, open_corpus

    config = find_config(args)
    corpus = open_corpus(config)
    sources = [
        {"name": name, "path": str(dataset.folder), **describe(dataset)} for name, dataset in corpus.sources.items()
    ]
    plan = [] if is_folder(args.target) else corpus.plan_epochs()
    if args.json:
        epochs = [{**asdict(one), "epochs": one.epochs} for one in plan]
        print_json({"identity": corpus.identity.name, "sources": sources, "epochs": epochs})
        return 0
    for source in sources:
        _print(source)
    if plan:
        print(f"{config.train.steps:,} steps of {config.train.global_batch:,} samples: {describe_epochs(plan)}")
    return 0


def describe(dataset: "Dataset") -> dict[str, Any]:
    """Return what a prepared folder holds as a JSON object."""
    from dataclasses import asdict

    from elastic.data.inspection import load_own_tokenizer, measure_lengths
    from elastic.data.prepared.format import SPLITS

    info, tokenizer = dataset.info, load_own_tokenizer(dataset)
    splits: dict[str, Any] = {}
    for split in SPLITS:
        part, lengths = info.get_split(split), measure_lengths(dataset, split)
        splits[split] = {
            "tokens": part.num_tokens,
            "documents": part.num_documents,
            "shards": len(part.shards),
            "bytes": sum(shard.size_bytes for shard in part.shards),
            "document_tokens": asdict(lengths) if lengths else None,
        }
    return {
        "identity": info.identity.name,
        "vocab_size": info.vocab_size,
        "largest_id": info.largest_id,
        "eot": tokenizer.id_to_token(info.eot_id),
        "bos": None if info.bos_id is None else tokenizer.id_to_token(info.bos_id),
        "loss_mask": info.has_counted,
        "train_entropy_nats": info.train_entropy_nats,
        "splits": splits,
    }


def _print(found: dict[str, Any]) -> None:
    begin = f"begins with {found['bos']} and " if found["bos"] else ""
    largest = "" if found["largest_id"] is None else f" (the largest id is {found['largest_id']:,})"
    name = f"{found['name']}: " if found["name"] else ""
    print(f"{name}{found['path']}: data {found['identity']}, vocabulary {found['vocab_size']:,}{largest}")
    print(f"each document {begin}ends with {found['eot']}; unigram entropy {found['train_entropy_nats']:.3f} nats")
    if found["loss_mask"]:
        print("some tokens do not count for the loss")
    for split, part in found["splits"].items():
        print(
            f"{split:6} {part['tokens']:>15,} tokens {part['documents']:>12,} documents {part['shards']:>6,} shards "
            f"{part['bytes'] / 2**20:>10,.1f} MiB"
        )
        if lengths := part["document_tokens"]:
            deciles = lengths["deciles"]
            print(
                f"       tokens per document: mean {lengths['mean']:,.0f}, shortest {deciles[0]:,}, 10 % "
                f"{deciles[1]:,}, median {deciles[5]:,}, 90 % {deciles[9]:,}, longest {deciles[10]:,}"
            )
