"""The file of names: what it says, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from pipeline.clusters.names import Category, Names, has_names, read_names
from pipeline.errors import ConfigError
from tests.pipeline.label_files import categories
from workers.renaming import NOISE

HEAD = "format: u2label names 1\nfits: {things: abc, stuff: def}\nclasses: {things: 5, stuff: 2}\nnames:\n"
BODY = """\
  1: {"name": "cat"}
  2: {"merge": 1}
  3: {"noise": true}
  4: {"name": "grass", "stuff": true}
  6: {"merge": 4}
"""


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return tmp_path / "names.yaml"


def names_in(file: Path, body: str) -> Names:
    file.write_text(HEAD + body, encoding="utf-8")
    return read_names(str(file))


def test_names_merges_stuff_and_noise_make_new_classes(file: Path) -> None:
    names = names_in(file, BODY)
    assert names.new_categories == (
        Category(1, "cat", True, (1, 2)),
        Category(2, "thing 5", True, (5,)),
        Category(3, "grass", False, (4, 6)),
        Category(4, "stuff 2", False, (7,)),
    )
    assert names.renaming.category_of == (0, 1, 1, NOISE, 3, 2, 3, 4)
    assert (names.renaming.num_things, names.renaming.num_stuff) == (2, 2)
    assert (names.written.things, names.written.stuff) == (2, 2)
    assert names.written.written == {1: 1, 2: 1, 4: 3, 5: 2, 6: 3, 7: 4}


def test_a_merge_of_a_merge_ends_where_the_last_does(file: Path) -> None:
    names = names_in(file, '  1: {"merge": 2}\n  2: {"merge": 3}\n  3: {"name": "dog"}\n')
    assert names.new_categories[0] == Category(1, "dog", True, (1, 2, 3))


def test_the_file_is_written_as_it_was_read(file: Path) -> None:
    body = BODY + '  7: {"name": "Straße \\"nach\\" 北京 🚲"}\n'
    names = names_in(file, body)
    quoted = HEAD.replace("{things: abc, stuff: def}", '{"things": "abc", "stuff": "def"}')
    quoted = quoted.replace("{things: 5, stuff: 2}", '{"things": 5, "stuff": 2}')
    assert names.to_yaml().decode() == quoted + body
    file.write_bytes(names.to_yaml())
    assert read_names(str(file)) == names


def test_names_written_by_hand_are_read(file: Path) -> None:
    names = names_in(file, "  # a remark\n  1:\n    name: ' black cat '\n  5: {name: 747}\n")
    assert [category.name for category in names.new_categories[:5:4]] == ["black cat", "747"]


def test_no_names_are_names_too(file: Path) -> None:
    file.write_text(HEAD.replace("names:", "names: {}"))
    assert [category.name for category in read_names(str(file)).new_categories[4:6]] == ["thing 5", "stuff 1"]


@pytest.mark.parametrize(
    ("body", "message"),
    [
        ("  8: {name: cat}", r"names\.yaml: 8 is none of the classes 1\.\.7"),
        ("  1: {merge: 0}", r"0 is none of the classes 1\.\.7"),
        ("  x: {name: cat}", r"names\.x.*valid integer"),
        ("  1: {merge: 1}", "1 is merged into itself"),
        ("  1: {merge: 2}\n  2: {merge: 3}\n  3: {merge: 1}", "1 -> 2 -> 3 -> 1 are merged in a circle"),
        ("  1: {merge: 2}\n  2: {noise: true}", "1 is merged into 2, which is noise; mark 1 as noise, too"),
        ("  6: {merge: 1}", "6 is stuff, but merged into the things 1; mark 1 as stuff"),
        ("  1: {name: cat}\n  2: {name: Cat}", "1 and 2 are both called 'Cat'; merge one into the other"),
        ("  1: {name: thing 5}", "1 and 5 are both called 'thing 5'"),
        ("  1: {name: cat}\n  1: {name: dog}", r"not valid YAML: '1' comes twice(.|\n)*line 6"),
        ("  1: {name: cat, noise: true}", r"names\.1: has to say one of merge, noise, and name"),
        ("  1: {}", r"names\.1: has to say one of"),
        ("  1: {nam: cat}", r"names\.1\.nam: unknown key \(got 'cat'\)"),
        ("  1: {name: ''}", r"names\.1\.name: must be 1 to 100 printable characters"),
        ('  1: {name: "a\\nb"}', r"names\.1\.name: must be 1 to 100 printable characters on one line"),
        (f"  1: {{name: {'x' * 101}}}", "must be 1 to 100 printable"),
        ("\n".join(f"  {c}: {{noise: true}}" for c in range(1, 8)), "every class is noise; keep one"),
        ("  1: {name: [", "is not valid YAML"),
    ],
)
def test_what_is_wrong_is_told_with_the_class_and_the_remedy(file: Path, body: str, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        names_in(file, body)


def test_more_stuff_than_a_map_holds_is_refused(file: Path) -> None:
    body = "\n".join(f"  {c}: {{stuff: true}}" for c in range(1, 254))
    file.write_text(HEAD.replace("things: 5", "things: 300") + body)
    with pytest.raises(ConfigError, match="255 classes are stuff, and a map holds 254"):
        read_names(str(file))


def test_another_file_is_refused(file: Path) -> None:
    with pytest.raises(ConfigError, match=r"cannot read the names in .*names\.yaml"):
        read_names(str(file))
    file.write_text("- a\n")
    with pytest.raises(ConfigError, match=r"names\.yaml: the file: "):
        read_names(str(file))
    file.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(ConfigError, match="cannot read the names"):
        read_names(str(file))
    file.write_text(HEAD.replace("names 1", "names 2"))
    with pytest.raises(ConfigError, match="format: Input should be 'u2label names 1'"):
        read_names(str(file))


def test_labels_have_the_old_classes_or_the_new_ones_already(file: Path) -> None:
    names = names_in(file, BODY)
    assert not has_names(names, categories(5, 2), "here")
    assert has_names(names, names.listed, "here")
    for others in (categories(4, 2), categories(6, 1), [{"id": 1, "name": "cat", "isthing": 1}]):
        with pytest.raises(ConfigError, match=r"here has . categories, which are neither the 5 things and 2 stuff"):
            has_names(names, others, "here")
