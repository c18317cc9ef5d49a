from __future__ import annotations

import dataclasses
import pickle

import pytest

from embedkit import EmbeddingSpec, Preprocessing, SpecMismatchError, StoreFormatError

SPEC = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=512)


def test_equal_facts_give_equal_digests_and_any_other_fact_another() -> None:
    assert dataclasses.replace(SPEC).digest == SPEC.digest
    changes = [
        {"backbone": "resnet34"},
        {"tag": "a1_in1k"},
        {"weights_sha256": "cd" * 32},
        {"dim": 513},
        {"pool": "max"},
        {"arch_kwargs": {"pad_type": "same"}},
        {"preprocessing": Preprocessing(crop_pct=0.9)},
        {"preprocessing": Preprocessing(exif=False)},
        {"preprocessing": Preprocessing(icc=True)},
        {"preprocessing": Preprocessing(truncated="pad")},
        {"preprocessing": Preprocessing(interpolation="bilinear")},
    ]
    digests = {dataclasses.replace(SPEC, **change).digest for change in changes}
    assert len(digests | {SPEC.digest}) == len(changes) + 1


def test_the_digest_of_a_spec_never_changes_between_versions() -> None:
    # A golden value: were it to move, every store in the world would refuse its own backbone.
    assert SPEC.digest == "b722c08b6c9bbc79b239715823b751b4e3e6d39dd60548a8b66240d6bbe0c6de"


def test_what_came_later_is_left_out_where_it_is_as_before() -> None:
    assert not {"icc", "truncated"} & SPEC.to_dict()["preprocessing"].keys()
    later = dataclasses.replace(SPEC, preprocessing=Preprocessing(icc=True, truncated="pad"))
    assert (later.to_dict()["preprocessing"]["icc"], later.to_dict()["preprocessing"]["truncated"]) == (True, "pad")
    assert EmbeddingSpec.from_dict(later.to_dict()) == later


def test_dict_round_trip_keeps_every_field() -> None:
    spec = dataclasses.replace(SPEC, arch_kwargs={"pad_type": "same"}, preprocessing=Preprocessing(mean=(0.5,) * 3))
    assert EmbeddingSpec.from_dict(spec.to_dict()) == spec
    assert hash(EmbeddingSpec.from_dict(spec.to_dict())) == hash(spec)


def test_from_dict_refuses_missing_unknown_and_mistyped_fields() -> None:
    values = SPEC.to_dict()
    for broken in (
        {name: value for name, value in values.items() if name != "dim"},
        values | {"surprise": 1},
        values | {"dim": "512"},
        values | {"preprocessing": None},
        values | {"preprocessing": {**values["preprocessing"], "surprise": 1}},
    ):
        with pytest.raises(StoreFormatError):
            EmbeddingSpec.from_dict(broken)


def test_a_mismatch_names_the_fields_with_both_values_and_survives_pickling() -> None:
    other = dataclasses.replace(SPEC, pool="max", preprocessing=Preprocessing(crop_pct=1.0))
    SPEC.require_same(dataclasses.replace(SPEC), "never raised")
    with pytest.raises(SpecMismatchError, match="cannot compare") as caught:
        SPEC.require_same(other, "cannot compare")
    expected = {"pool": ("default", "max"), "preprocessing.crop_pct": (0.875, 1.0)}
    assert caught.value.differences == expected
    assert "preprocessing.crop_pct: 0.875 != 1.0" in str(caught.value)
    copy = pickle.loads(pickle.dumps(caught.value))
    assert copy.differences == expected and str(copy) == str(caught.value)


def test_differences_show_what_was_chosen_where_the_other_spec_says_nothing() -> None:
    plain = EmbeddingSpec(backbone="resnet18", weights_sha256="ab" * 32, dim=512)
    padded = dataclasses.replace(plain, preprocessing=Preprocessing(truncated="pad", icc=True))
    assert plain.differences(padded) == {
        "preprocessing.truncated": ("fail", "pad"), "preprocessing.icc": (False, True),
    }  # fmt: skip
