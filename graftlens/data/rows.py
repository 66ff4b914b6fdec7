"""Rows of a dataset that somebody else made, on this machine or on the hub."""

from datasets import Dataset, DatasetDict, load_dataset, load_from_disk

from graftlens.folder import at_home

#: Suffixes of the files that are read, and what reads them.
_FILES = {".jsonl": "json", ".json": "json", ".parquet": "parquet", ".csv": "csv"}


def read_rows(place: str, split: str) -> Dataset:
    """The rows of a dataset: a folder that `save_to_disk` wrote, another folder, a file or a hub
    id.

    Raises:
        OSError: a dataset or split that does not exist, or cannot be read.
    """
    path = at_home(place)
    local = path.suffix.lower() in _FILES or place.count("/") > 1 or place[:1] in (".", "/", "~")
    try:
        if local and not path.exists():
            raise FileNotFoundError("it does not exist")
        if path.is_file() and path.suffix.lower() in _FILES:
            return load_dataset(_FILES[path.suffix.lower()], data_files=str(path), split="train")
        saved = [path / "state.json", path / "dataset_dict.json"]
        found = (
            load_from_disk(str(path))
            if any(file.is_file() for file in saved)
            else load_dataset(str(path) if path.is_dir() else place, split=split)
        )
        return found[split] if isinstance(found, DatasetDict) else found
    except Exception as error:  # each kind of failure on the way has its own class
        raise OSError(
            f"dataset={place!r}, split={split!r} could not be read ({type(error).__name__}: "
            f"{' '.join(str(error).split())}). Name a folder that save_to_disk wrote, a file "
            f"({' '.join(_FILES)}), or a dataset on the Hugging Face hub."
        ) from None
