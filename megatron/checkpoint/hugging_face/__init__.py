"""Models of Hugging Face's ``GPTNeoXForCausalLM``, read and written.

    config.json                                  architecture.py: a model's settings and back
    model.safetensors, sharded ones, *.bin       weight_files.py: tensors by name, mapped
    to_neox.py                                   such a directory -> layer files of ours
    from_neox.py                                 a checkpoint of ours or NeoX's -> such a directory

Weights are streamed in pieces of a few megabytes from mapped files; whole tensors are never in
memory. Transformers isn't needed.
"""
