"""Where the recorded corpora lie (tests/data/tokenizer/README.md)."""

from pathlib import Path

RECORDED = Path(__file__).parents[1] / "data" / "tokenizer"
TOKENIZER_JSON = RECORDED / "tok.json"
BIN_SHA256 = {
    "corpus_a": "aecf59a7a702c476a3bfbafb916d63ef3a4accabb0cb3cd8d3baa7057efaec11",
    "corpus_b": "07283264759fc01d56352b4e34cc5c43afb064095a0c9f43b8303f601b9aaabb",
    "corpus_c": "7f446cb3aadb5cbf009833ee914c3508c89ae6244686195f382ae1dbb97d7baa",
}
