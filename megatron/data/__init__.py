"""From text to the tensors of one micro batch. torch appears only at the far edge, in `batch`.

    text files -> documents -> tokenizers -> preprocess -> .bin/.idx     (before training)
    stream positions -> loader -> batch -> inputs, labels, loss mask     (each micro step)

`text_files`  documents of .jsonl/.txt files, compressed or not, in a fixed order
`tokenizers`  the six tokenizer types NeoX knows, and the padded vocabulary size
`preprocess`  documents to indexed datasets, by one process or many, always the same bytes
`dataset_output`, `joined_datasets`  whole datasets or none; several as one
`loader`      which samples a data-parallel rank reads, ahead of time and without end
`batch`       one micro batch on every tensor-parallel rank: broadcast, shift, loss mask
"""
