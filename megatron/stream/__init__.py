"""Which tokens a run consumes, in which order: everything from a position to bytes of a file.

::

    P.idx, P.bin      indexed_dataset   documents: sizes, byte offsets, tokens
        |
    index_maps        documents and samples shuffled as NeoX does, bit for bit
        |             (index_map_files keeps them in NeoX's cache files and checks them)
    orders            endless orders: a head (NeoX's maps), then tail blocks; blends of several
        |
    streams           what the loader reads: positions in, rows of seq_length + 1 tokens out

NumPy only: no torch, no process groups. Where ranks must wait for each other, a barrier is an
argument. The words (document, sample, position, order, head, tail) are those of ARCHITECTURE.md.
"""
