"""Which tokens a run consumes, in which order: everything from a position to bytes of a file.

::

    P.idx, P.bin      indexed_dataset   documents: sizes, byte offsets, tokens
        |             identity          what a dataset is, by its content
    index_maps        documents and samples shuffled as NeoX does, bit for bit
        |             (row_maps: documents that aren't cut; map_recipes and index_map_files keep
        |             both in NeoX's cache files and check them)
    orders            endless orders: a head (NeoX's maps), then tail blocks
        |             (mapped_order, sequential_order; blending mixes several)
    sample_stream     positions in; rows of seq_length + 1 tokens, documents and bytes out

    stream_settings   what the configuration names
        |
    descriptions      orders as values: of a new run, or of one that goes on with other data
        |             (order_description, segments: what a ledger keeps)
    opening           from a description to a stream, wherever the datasets lie now
        |
    streams           both steps at once, for a run without a ledger

NumPy only: no torch, no process groups. Where ranks must wait for each other, a barrier is an
argument. The words (document, sample, position, order, head, tail) are those of ARCHITECTURE.md.
"""
