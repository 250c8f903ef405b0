"""Rotary positions in NeoX's convention: the two halves of the rotated part form the pairs."""

import torch

__all__ = ["RotaryFrequencies", "RotaryTable"]


class RotaryTable(torch.nn.Module):
    """Cosines and sines of all positions; one table serves every layer of a stage.

    The table has the parameters' type, and is not part of a state dict.

    Args:
        seq_length: positions from 0.
        dims: leading dimensions of a head that are rotated.
        base: of the geometric series of frequencies.
        dtype: of the parameters.
        angle_dtype: of frequencies, positions and their product. NeoX's main branch takes float32
            (spec/model.md §5). v1.0 takes the parameters' type, in which large positions round:
            Pythia was trained with angles up to 0.8 rad off, its 1B models 7 (pythia.md §5.5).
    """

    def __init__(
        self,
        seq_length: int,
        dims: int,
        base: float,
        dtype: torch.dtype,
        angle_dtype: torch.dtype = torch.float32,
    ) -> None:
        super().__init__()
        self.dims = dims
        inverse_frequencies = _inverse_frequencies(base, dims)
        positions = torch.arange(seq_length, dtype=torch.float32)
        angles = torch.outer(positions.to(angle_dtype), inverse_frequencies.to(angle_dtype)).float()
        # (sequence, 2 * dims / 2)
        angles = torch.cat([angles, angles], dim=-1)
        self.register_buffer("cosines", angles.cos().to(dtype), persistent=False)
        self.register_buffer("sines", angles.sin().to(dtype), persistent=False)

    def forward(self, heads: torch.Tensor, first: int = 0) -> torch.Tensor:
        """Rotate by position.

        Args:
            heads: queries or keys, (sequence, ..., head_size).
            first: position of the first of them.

        Returns:
            A tensor of the same shape.

        Raises:
            ValueError: the sequence is longer than the table.
        """
        length = heads.shape[0]
        last = first + length
        if last > self.cosines.shape[0]:
            raise ValueError(
                f"a sequence of {last} tokens is longer than the {self.cosines.shape[0]} "
                "positions of the rotary table (seq_length)"
            )
        broadcast = (length,) + (1,) * (heads.dim() - 2) + (self.dims,)
        cosines = self.cosines[first:last].view(broadcast)
        sines = self.sines[first:last].view(broadcast)
        rotated, passed = heads[..., : self.dims], heads[..., self.dims :]
        first, second = rotated.chunk(2, dim=-1)
        turned = torch.cat([-second, first], dim=-1)
        result = rotated * cosines + turned * sines
        return result if passed.shape[-1] == 0 else torch.cat([result, passed], dim=-1)


class RotaryFrequencies(torch.nn.Module):
    """The frequencies as NeoX keeps them in checkpoints under rotary_save_freqs_buffer.

    They are there for others to read; the table is computed without them.
    """

    def __init__(self, dims: int, base: float, dtype: torch.dtype) -> None:
        super().__init__()
        self.register_buffer("inv_freq", _inverse_frequencies(base, dims).to(dtype))


def _inverse_frequencies(base: float, dims: int) -> torch.Tensor:
    return base ** -(torch.arange(0, dims, 2, dtype=torch.float32) / dims)
