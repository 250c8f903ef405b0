"""``neox-ledger document D``: every step that consumed a document."""

import argparse

from megatron.cli.ledger.consumers import add_consumer_options, opened_question, print_consumers
from megatron.ledger.queries.consumers import choose_dataset, consumers_of_document

EPILOG = """examples:
  neox-ledger document 81234 --run runs/pythia
  neox-ledger document 17 --dataset books_text_document --run runs/blend --abandoned"""


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options."""
    parser.add_argument("document", type=int, metavar="D", help="its number in the dataset, from 0")
    parser.add_argument(
        "--dataset", metavar="NAME", help="path or name of its dataset, if the run reads several"
    )
    add_consumer_options(parser)


def run(options: argparse.Namespace) -> int:
    """List the steps."""
    question = opened_question(options)
    identity = choose_dataset(question.datasets, options.dataset)
    found = question.ask(
        lambda course: consumers_of_document(course, question.data, identity, options.document)
    )
    path = question.datasets[identity].path
    print_consumers(
        question,
        found,
        {"dataset": path, "document": options.document, "stream": options.stream},
        as_json=options.json,
        what=f"document {options.document} of {path}",
    )
    return 0
