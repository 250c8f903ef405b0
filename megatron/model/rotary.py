"""Rotary positions in NeoX's convention: the two halves of the rotated part form the pairs."""

import torch

__all__ = ["RotaryTable"]


class RotaryTable(torch.nn.Module):
    """Cosines and sines of all positions; one table serves every layer of a stage.

    Angles are float32, the table has the parameters' type (spec/model.md §5). Not part of a
    state dict.
    """

    def __init__(self, seq_length: int, dims: int, base: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.dims = dims
        inverse_frequencies = base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
        angles = torch.outer(torch.arange(seq_length, dtype=torch.float32), inverse_frequencies)
        # (sequence, 2 * dims / 2)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cosines", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sines", angles.sin().to(dtype), persistent=False)

    def forward(self, heads: torch.Tensor) -> torch.Tensor:
        """Rotate by position.

        Args:
            heads: queries or keys, (sequence, ..., head_size), from position 0.

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: the sequence is longer than the table.
        """
        length = heads.shape[0]
        if length > self.cosines.shape[0]:
            raise ValueError(
                f"a sequence of {length} tokens is longer than the {self.cosines.shape[0]} "
                "positions of the rotary table (seq_length)"
            )
        broadcast = (length,) + (1,) * (heads.dim() - 2) + (self.dims,)
        cosines = self.cosines[:length].view(broadcast)
        sines = self.sines[:length].view(broadcast)
        rotated, passed = heads[..., : self.dims], heads[..., self.dims :]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        result = rotated * cosines + turned * sines
        return result if passed.shape[-1] == 0 else torch.cat([result, passed], dim=-1)
