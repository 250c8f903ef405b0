"""One module per command: each wires the layers below and holds no arithmetic of its own."""
