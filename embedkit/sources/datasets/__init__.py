"""Images in Hugging Face datasets."""

from embedkit.sources.datasets.listing import is_dataset_folder, list_dataset, parse_dataset

__all__ = ["is_dataset_folder", "list_dataset", "parse_dataset"]
