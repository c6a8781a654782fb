"""What each filter leaves out and why, the paper's filters together, settings that are refused."""

import json
import math

import pytest

from data_pipelines import entries, image_folder
from data_pipelines.filters import Column, Filters


def reason(filters, height=512, width=512, caption="a cat", **columns):
    filters.check()
    return filters.reason(entries.Entry("a.png", caption, columns), height, width)


def test_all_are_off_by_default():
    assert reason(Filters(), 1, 1000, "") == ""
    assert Filters().fingerprint() == ""


@pytest.mark.parametrize(
    ("filters", "kept", "left_out", "why"),
    [
        (dict(least_side=512), dict(width=900), dict(width=511), "resolution"),
        (dict(least_pixels=9), dict(height=3, width=3), dict(height=8, width=1), "resolution"),
        (dict(widest=3.0), dict(height=1536), dict(height=1537), "aspect"),
        (dict(widest=3.0), dict(width=1536), dict(width=1537), "aspect"),
        (dict(least_caption=5), dict(caption="a cat"), dict(caption="cats"), "caption"),
        (dict(most_caption=5), dict(caption="a cat"), dict(caption="a cat."), "caption"),
        (dict(least_caption=1), dict(caption="\u732b"), dict(caption=""), "caption"),
    ],
)  # fmt: skip
def test_limits_themselves_are_kept(filters, kept, left_out, why):
    assert reason(Filters(**filters), **kept) == ""
    assert reason(Filters(**filters), **left_out) == why


def test_columns_are_ranges_of_numbers_or_what_reads_as_one():
    filters = Filters(columns=(Column("score", least=5.5), Column("text", most=0.1)))
    assert reason(filters, score=5.5, text=0.1) == ""
    assert reason(filters, score="6.25", text="1e-2") == ""  # of a CSV list
    assert reason(filters, score=5.49, text=0.0) == "column score"
    assert reason(filters, score=9, text=0.11) == "column text"


def test_the_papers_rescue():
    """What is not beautiful stays if it has little text and more than one colour."""
    rescue = Column("text_area", most=0.05), Column("colourfulness", least=10)
    filters = Filters(least_side=512, columns=(Column("aesthetic", least=5.5, rescue=rescue),))
    assert reason(filters, aesthetic=6.0) == ""  # nobody looked for text in it
    assert reason(filters, aesthetic=5.0, text_area=0.01, colourfulness=40) == ""
    assert reason(filters, aesthetic=5.0, text_area=0.2, colourfulness=40) == "column aesthetic"
    assert reason(filters, aesthetic=5.0, text_area=0.01, colourfulness=2) == "column aesthetic"
    assert reason(filters, 511, aesthetic=6.0) == "resolution"


def test_a_record_without_a_number_is_bad():
    filters = Filters(columns=(Column("score", least=5.0),))
    with pytest.raises(image_folder.BadFile, match="^a.png: no column 'score'; it has id, site$"):
        reason(filters, id=3, site="x")
    for value in ("", "high", None, [6.0], math.nan, "nan"):
        with pytest.raises(image_folder.BadFile) as error:
            reason(filters, score=value)
        assert str(error.value) == f"a.png: column 'score' is {value!r}, which is no number"


def test_listed_keys_are_left_out(tmp_path):
    path = tmp_path / "duplicates.jsonl"
    path.write_text(json.dumps({"key": "a.png", "of": "b.png", "distance": 2}) + "\n")
    filters = Filters(duplicates=str(path))
    assert reason(filters) == "duplicate"
    assert filters.reason(entries.Entry("b.png"), 8, 8) == ""
    path.write_text("")
    assert reason(Filters(duplicates=str(path))) == ""


def test_a_fingerprint_changes_with_all_that_decides(tmp_path):
    path = tmp_path / "duplicates.jsonl"

    def listed(*keys):
        path.write_text("".join(json.dumps({"key": key}) + "\n" for key in keys))
        return Filters(duplicates=str(path)).fingerprint()

    column = Column("score", least=5.0)
    made = [
        Filters(least_side=9).fingerprint(),
        Filters(least_pixels=9).fingerprint(),
        Filters(columns=(column,)).fingerprint(),
        Filters(columns=(Column("score", least=5.5),)).fingerprint(),
        Filters(columns=(Column("score", least=5.0, rescue=(column,)),)).fingerprint(),
        listed(),
        listed("a", "b"),
        listed("a"),
    ]
    assert len(set(made)) == len(made) and "" not in made
    moved = path.rename(tmp_path / "moved.jsonl")
    assert Filters(duplicates=str(moved)).fingerprint() == made[-1]


@pytest.mark.parametrize(
    ("filters", "message"),
    [
        (Filters(least_side=-1), "filters: least_side -1 is negative; 0 turns it off"),
        (Filters(widest=0.2), "filters: widest 0.2 is longer to shorter side, so it is 1 or more"),
        (
            Filters(least_caption=9, most_caption=8),
            "filters: least_caption 9 is above most_caption 8; exchange them",
        ),
        (
            Filters(columns=(Column("s", least=2, most=1),)),
            "column s: least 2 is above most 1; exchange them",
        ),
        (
            Filters(columns=(Column("s", least=2, rescue=(Column("t"),)),)),
            "column t has neither least nor most; set one",
        ),
        (
            Filters(duplicates="absent.jsonl"),
            "absent.jsonl does not exist; run configs/duplicates.py, or set no duplicates",
        ),
    ],
)
def test_settings_that_cannot_be_meant(filters, message):
    with pytest.raises(ValueError) as error:
        filters.check()
    assert str(error.value) == message


def test_a_file_of_something_else_is_no_list(tmp_path):
    for text in ("a.png", '{"file": "a.png"}', '["key"]'):
        path = tmp_path / "list.jsonl"
        path.write_text('{"key": "b.png"}\n' + text)
        with pytest.raises(ValueError, match='list.jsonl, line 2 is not {"key": ...}: '):
            Filters(duplicates=str(path)).check()
