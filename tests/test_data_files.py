"""The one way to list files: links, hidden parts, names, and what cannot be read."""

import os
import unicodedata

import pytest

from csc_jax.data import files
from csc_jax.errors import UserError

SUFFIXES = (".jpg", ".png")


def make(root, *names):
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(b"x")
    return root


def test_names_are_relative_in_order_and_of_any_case(tmp_path):
    make(tmp_path, "b/1.JPG", "a-b/1.png", "a/2.jpg", "a/10.jpg", "0.Png")
    assert list(files.walk(tmp_path, SUFFIXES).found) == [
        *("0.Png", "a/10.jpg", "a/2.jpg", "a-b/1.png", "b/1.JPG"),
    ]


def test_hidden_files_and_those_of_systems_are_skipped_and_others_counted(tmp_path):
    hidden = (".ipynb_checkpoints/a.jpg", "._a.jpg", ".DS_Store", "__MACOSX/a.jpg", "Thumbs.db")
    hidden += ("@eaDir/a.jpg/thumb.jpg", "desktop.ini", "$RECYCLE.BIN/a.jpg", "x/.git/a.png")
    make(tmp_path, *hidden, "x/a.jpg", "x/b.gif", "x/c.GIF", "x/LICENSE")
    walk = files.walk(tmp_path, SUFFIXES)
    assert list(walk.found) == ["x/a.jpg"]
    assert list(walk.others) == ["x/LICENSE", "x/b.gif", "x/c.GIF"]
    assert walk.passed_over() == "; passed over 1 without suffix, 2 .gif"


def test_a_folder_below_a_hidden_one_is_no_hidden_one(tmp_path):
    root = make(tmp_path / ".cache/data", "a.jpg")
    assert list(files.walk(root, SUFFIXES).found) == ["a.jpg"]


def test_linked_folders_are_followed_once_each(tmp_path):
    make(tmp_path / "elsewhere", "1.jpg", "deep/2.jpg")
    root = make(tmp_path / "root", "z/own.jpg")
    (root / "a").symlink_to(tmp_path / "elsewhere")
    (root / "b").symlink_to("a")
    (root / "c").symlink_to("z")  # its own name goes before that of a link
    (root / "z/loop").symlink_to(root)
    (tmp_path / "elsewhere/up").symlink_to(tmp_path / "elsewhere/deep")
    walk = files.walk(root, SUFFIXES)
    assert list(walk.found) == ["a/1.jpg", "a/deep/2.jpg", "z/own.jpg"]
    assert {link.name for link, _ in walk.repeated} == {"b", "c", "loop", "up"}
    assert "root/c, which is" in walk.passed_over()


def test_a_folder_may_be_a_link_itself_and_end_like_an_image(tmp_path):
    make(tmp_path / "real", "shots.png/1.jpg")
    (tmp_path / "link").symlink_to("real")
    assert list(files.walk(tmp_path / "link", SUFFIXES).found) == ["shots.png/1.jpg"]


def test_a_link_that_leads_nowhere_is_an_image_that_is_not_there_or_an_error(tmp_path):
    (tmp_path / "a.jpg").symlink_to("gone.jpg")
    (tmp_path / "b.jpg").symlink_to("b.jpg")
    walk = files.walk(tmp_path, SUFFIXES)
    assert list(walk.found) == ["a.jpg", "b.jpg"]
    assert all("missing" in files.stamp(path) for path in walk.found.values())
    (tmp_path / "more").symlink_to("/nowhere/images")
    with pytest.raises(UserError, match=r"more is a link to '/nowhere/images', which leads nowh"):
        files.walk(tmp_path, SUFFIXES)


def test_what_cannot_be_read_is_an_error(tmp_path, monkeypatch):
    make(tmp_path, "locked/a.jpg", "b.jpg")
    real = os.scandir

    def scandir(path):  # root may read what modes forbid
        if str(path).endswith("locked"):
            raise PermissionError(13, "Permission denied", str(path))
        return real(path)

    monkeypatch.setattr(os, "scandir", scandir)
    with pytest.raises(UserError, match=r"locked cannot be read: Permission denied \(--images\)"):
        files.walk(tmp_path, SUFFIXES, "--images")


def test_a_pipe_is_no_image(tmp_path):
    os.mkfifo(tmp_path / "a.jpg")
    with pytest.raises(UserError, match=r"a\.jpg is neither a file nor a folder"):
        files.walk(tmp_path, SUFFIXES)


def test_names_come_composed_and_two_forms_of_one_are_an_error(tmp_path):
    composed, apart = (unicodedata.normalize(form, "größe é.jpg") for form in ("NFC", "NFD"))
    make(tmp_path, f"a/{apart}")
    assert list(files.walk(tmp_path, SUFFIXES).found) == [f"a/{composed}"]
    make(tmp_path, f"a/{composed}")
    with pytest.raises(UserError, match="twice, in two Unicode forms"):
        files.walk(tmp_path, SUFFIXES)


@pytest.mark.parametrize(
    "name", [b"a\nb.jpg", b"\xff.jpg", b"a\x1b[2J.jpg", "a\u2028.jpg".encode()]
)
def test_names_that_no_list_can_hold_are_an_error(tmp_path, name):
    with open(os.fsencode(tmp_path) + b"/" + name, "wb"):  # noqa: PTH123 - a path of bytes
        pass
    with pytest.raises(UserError, match=r"line break, a control .* Rename it") as caught:
        files.walk(tmp_path, SUFFIXES)
    assert str(caught.value).isprintable()


def test_blanks_of_other_scripts_are_part_of_a_name(tmp_path):
    names = ["写真\u3000一.jpg", "Screenshot 9.41\u202fPM.png", "\u05e9\u05dc\u05d5\u05dd.jpg"]
    make(tmp_path, *names)
    assert set(files.walk(tmp_path, SUFFIXES).found) == set(names)


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-16-be"])
def test_text_of_every_usual_encoding_is_read(tmp_path, encoding):
    (tmp_path / "list.txt").write_bytes("straße\r\nb\rc\n".encode(encoding))
    assert files.read_text(tmp_path / "list.txt", "field") == "straße\nb\nc\n"


@pytest.mark.parametrize("content", [b"a\xe9b", b"\xff\xfea", b"abc\0d", b"\x89PNG\r\n\x1a\n"])
def test_what_is_no_text_is_an_error(tmp_path, content):
    (tmp_path / "list.txt").write_bytes(content)
    with pytest.raises(UserError, match=r"field .*list\.txt cannot be read as a text file"):
        files.read_text(tmp_path / "list.txt", "field")


@pytest.mark.parametrize("path", ["~nouser/x", "a\0b"])
def test_paths_that_can_be_none_are_an_error(path):
    with pytest.raises(UserError, match=r"data\.root"):
        files.existing_root(path, "images/")


def test_a_link_to_itself_is_no_root(tmp_path):
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(UserError, match=r"data\.root|cannot be read"):
        files.existing_root(str(tmp_path / "loop"), "images/")
