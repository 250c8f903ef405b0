"""The tensors of a Hugging Face directory by name, wherever they lie.

model.safetensors                   all in one
model.safetensors.index.json        in shards; names them, and what is in which
pytorch_model.bin                   torch's format, likewise
pytorch_model.bin.index.json
"""

from collections.abc import Mapping
from pathlib import Path

import torch

from megatron.base.errors import CheckpointError
from megatron.base.printing import printable
from megatron.checkpoint.hugging_face.hub_directory import has_file, hub_file, read_json
from megatron.checkpoint.hugging_face.safetensors_file import SafetensorsFile
from megatron.checkpoint.reshape.mapped_pages import MappedPages
from megatron.checkpoint.safe_torch import read_torch_file

__all__ = ["INDEX_SUFFIX", "SAFETENSORS", "TORCH", "WeightFiles", "listed"]

SAFETENSORS = "model.safetensors"
TORCH = "pytorch_model.bin"
INDEX_SUFFIX = ".index.json"
_LISTED = 5  # names in one message


class WeightFiles:
    """The weights of one directory. Tensors are mapped, and read when they are looked at.

    Raises:
        CheckpointError: there are none, a shard is missing or damaged, or a shard and the index
            say different things.
    """

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._opened: dict[str, SafetensorsFile | Mapping[str, torch.Tensor]] = {}
        self._pages: dict[Path, MappedPages] = {}
        self.files: dict[str, str] = {}  # tensor name -> file name
        index = self._find()
        if index is not None:
            self._check_index(index)

    def __contains__(self, name: str) -> bool:
        return name in self.files

    def tensor(self, name: str) -> torch.Tensor:
        """Return a tensor; it may be a mapping of its file."""
        opened = self._opened[self.files[name]]
        return opened.tensor(name) if isinstance(opened, SafetensorsFile) else opened[name]

    def release(self) -> None:
        """Let go of the memory of everything read so far."""
        for opened in self._opened.values():
            if isinstance(opened, SafetensorsFile):
                opened.release()
        for pages in self._pages.values():
            pages.release()

    def _find(self) -> Mapping[str, str] | None:
        """Open the files; return what the index says, if there is one."""
        if not self.directory.is_dir():
            raise CheckpointError(f"{self.directory} is not a directory")
        for name in (SAFETENSORS, TORCH):
            if has_file(self.directory, name):
                self._open(name)
                return None
            if has_file(self.directory, name + INDEX_SUFFIX):
                return self._open_shards(name + INDEX_SUFFIX)
        raise CheckpointError(
            f"{self.directory} holds neither {SAFETENSORS} nor {TORCH}, and no {INDEX_SUFFIX} of "
            "such files in shards"
        )

    def _open_shards(self, index_name: str) -> Mapping[str, str]:
        path = self.directory / index_name
        index = read_json(self.directory, index_name).get("weight_map")
        if not isinstance(index, dict) or not all(isinstance(one, str) for one in index.values()):
            raise CheckpointError(f"{path} holds no weight_map from tensors to files")
        shards = sorted(set(index.values()))
        missing = [name for name in shards if not has_file(self.directory, name)]
        if missing:
            needed = [tensor for tensor, shard in index.items() if shard in missing]
            raise CheckpointError(
                f"{self.directory}: {listed(missing)} missing, {len(missing)} of the {len(shards)} "
                f"shards that {index_name} names; they hold {len(needed)} of the {len(index)} "
                f"tensors, {listed(needed)}. Download them"
            )
        for name in shards:
            self._open(name)
        return index

    def _open(self, name: str) -> None:
        path = hub_file(self.directory, name)
        if name.endswith(".safetensors"):
            self._opened[name] = SafetensorsFile(path)
            names = self._opened[name].names
        else:
            content = read_torch_file(path)
            if not isinstance(content, Mapping) or not all(map(torch.is_tensor, content.values())):
                raise CheckpointError(
                    f"{self.directory / name} holds something else than tensors by name"
                )
            self._opened[name] = content
            self._pages.setdefault(path.parent, MappedPages(path.parent))
            names = list(content)
        for tensor in names:
            other = self.files.setdefault(tensor, name)
            if other != name:
                raise CheckpointError(
                    f"{self.directory}: {printable(tensor)} is both in {other} and in {name}"
                )

    def _check_index(self, index: Mapping[str, str]) -> None:
        absent = [name for name in index if self.files.get(name) != index[name]]
        unknown = [name for name in self.files if name not in index]
        if absent or unknown:
            problems = [f"{listed(absent)} not in the shard it names"] * bool(absent)
            problems += [f"{listed(unknown)} not named by it"] * bool(unknown)
            raise CheckpointError(
                f"{self.directory}: the shards are not those of their {INDEX_SUFFIX}: "
                f"{'; '.join(problems)}. Files of different releases are mixed"
            )


def listed(names: list[str]) -> str:
    """Return a few of ``names``, in words."""
    more = len(names) - _LISTED
    return printable(", ".join(names[:_LISTED])) + (f" and {more} more" if more > 0 else "")
