from __future__ import annotations

import subprocess
import sys

import pytest

import embedkit

HEAVY = {"torch", "torchvision", "timm", "faiss", "sklearn", "h5py", "PIL", "scipy"}


def test_the_public_names_are_exactly_these() -> None:
    assert embedkit.__all__ == sorted(embedkit.__all__)
    assert embedkit.__all__ == [
        "Augmentation",
        "Backbone",
        "BackboneError",
        "Distillation",
        "EmbeddingShapeError",
        "EmbeddingSpec",
        "EmbedkitError",
        "EvaluationError",
        "FinetuneError",
        "ImageError",
        "Index",
        "MissingExtraError",
        "Preprocessing",
        "Recipe",
        "Report",
        "SpecMismatchError",
        "Store",
        "StoreBusyError",
        "StoreExistsError",
        "StoreFormatError",
        "StoreNotFoundError",
        "__version__",
        "cluster",
        "compare",
        "comparison_table",
        "distill",
        "estimate",
        "extract",
        "find_duplicates",
        "find_outliers",
        "finetune",
        "list_images",
        "list_models",
        "predict",
        "probe",
        "read_suite",
        "retrieval_report",
        "run_suite",
    ]
    assert dir(embedkit) == embedkit.__all__


@pytest.mark.parametrize("name", embedkit.__all__)
def test_a_name_is_the_same_object_every_time_and_documented(name: str) -> None:
    first = getattr(embedkit, name)
    assert getattr(embedkit, name) is first
    assert name == "__version__" or first.__doc__


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nope'"):
        embedkit.nope  # noqa: B018


def test_every_error_is_ours_and_the_builtin_a_caller_would_guess() -> None:
    builtins = {"StoreNotFoundError": FileNotFoundError, "StoreExistsError": FileExistsError}
    builtins |= {"StoreBusyError": BlockingIOError, "MissingExtraError": ImportError}
    for name in embedkit.__all__:
        if name.endswith("Error") and name != "EmbedkitError":
            error = getattr(embedkit, name)
            assert issubclass(error, embedkit.EmbedkitError)
            assert issubclass(error, builtins.get(name, ValueError))


@pytest.mark.parametrize("statement", ["import embedkit", "from embedkit.cli import main; main(['--help'])"])
def test_import_and_help_load_nothing_heavy(statement: str) -> None:
    code = f"import sys\ntry:\n    {statement}\nexcept SystemExit:\n    pass\nprint('loaded:', *sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert HEAVY.isdisjoint(done.stdout.partition("loaded:")[2].split())
