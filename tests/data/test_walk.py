"""The walk: which files below a folder or in a zip are pictures, and in which order."""

import os
import pickle
import zipfile
from pathlib import Path

import pytest

from pipelines.common.errors import UserError
from pipelines.data.walk import Pictures, natural, say, walk


def put(root: Path, *names: str) -> Path:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_bytes(name.encode())
    return root


def names(source: Path) -> list[str]:
    return Pictures(str(source), "data.path").names


IN_ORDER = [
    ["1.png", "2.png", "10.png", "100.png"],
    ["a.png", "a1.png", "a2.png", "a10.png"],
    ["photo.png", "photo (2).png", "photo (10).png"],
    ["1.png", "02.png", "3.png"],
    ["01.png", "1.png", "2.png"],  # equal numbers by their text
    ["v1.9.png", "v1.10.png"],
    ["run 2/1.png", "run 10/1.png"],
    ["0001.png", "0002.png", "a/0000.png"],
    ["00000/img00000000.png", "00000/img00000999.png", "00001/img00001000.png"],
    ["9" * 5000 + ".png", "1" + "0" * 5000 + ".png"],  # Python itself refuses to read such a number
    ["x²2.png", "x²10.png"],  # a digit that int() does not know
]


@pytest.mark.parametrize("ordered", IN_ORDER, ids=lambda o: o[0][:20])
def test_order_is_as_a_person_counts(ordered):
    shuffled = ordered[1::2] + ordered[::2]
    assert sorted(shuffled, key=natural) == ordered


def test_every_order_of_writing_gives_the_same_names(tmp_path):
    wanted = ["2.png", "10.png", "b/1.PNG", "b/c/0.jpeg"]
    put(tmp_path / "x", *wanted)
    put(tmp_path / "y", *reversed(wanted))
    assert names(tmp_path / "x") == names(tmp_path / "y") == wanted


HIDDEN = [".a.png", ".git/a.png", "x/.ipynb_checkpoints/a-checkpoint.png", "__MACOSX/a.png", "x/@eaDir/a.png", "#recycle/a.png"]


@pytest.mark.parametrize("packed", [False, True], ids=["folder", "zip"])
def test_hidden_and_tools_files_are_no_pictures(packed, tmp_path):
    source = put(tmp_path / "x", "a.png", "x/b.png", *HIDDEN, "x/Thumbs.db", ".DS_Store", "notes.txt")
    if packed:
        with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
            for file in source.rglob("*"):
                archive.write(file, file.relative_to(source).as_posix())
        source = tmp_path / "x.zip"
    found = Pictures(str(source), "data.path")
    assert found.names == ["a.png", "x/b.png"]
    assert found.others == ["notes.txt"]
    assert len(found.hidden) == 8
    assert found.left_out(used=["notes.txt"]).startswith("left out: 8 hidden or a tool's (")
    assert found.read("x/b.png") == b"x/b.png"


def test_a_hidden_folder_can_be_the_source(tmp_path):
    assert names(put(tmp_path / ".cache/@eaDir", "a.png")) == ["a.png"]


def test_links_are_followed_and_cycles_end(tmp_path):
    store = put(tmp_path / "store", "1.png", "2.png", "deep/3.png")
    root = put(tmp_path / "root", "own/0.png")
    (root / "linked").symlink_to(store)
    (root / "file.png").symlink_to(store / "1.png")
    (store / "deep/up").symlink_to(root)  # a cycle through the link
    (root / "own/self").symlink_to(".")
    assert names(root) == ["file.png", "linked/1.png", "linked/2.png", "linked/deep/3.png", "own/0.png"]
    assert walk(root).again == ["linked/deep/up", "own/self"]
    assert "2 folders met before under another name (linked/deep/up, own/self)" in Pictures(str(root), "x").left_out()


def test_a_folder_counts_under_its_own_name_before_links_to_it(tmp_path):
    root = put(tmp_path / "root", "b/1.png")
    (root / "a").symlink_to(root / "b")
    assert names(root) == ["b/1.png"]


def test_of_several_links_to_a_folder_the_first_counts(tmp_path):
    put(tmp_path / "store", "0.png")
    (tmp_path / "root").mkdir()
    for i in (10, 7, 2, 9, 8, 3, 5):
        (tmp_path / "root" / f"{i}").symlink_to(tmp_path / "store")
    assert names(tmp_path / "root") == ["2/0.png"]


def test_the_source_may_be_a_link(tmp_path):
    put(tmp_path / "store", "1.png")
    (tmp_path / "root").symlink_to(tmp_path / "store")
    assert names(tmp_path / "root") == ["1.png"]


def test_links_to_nothing_are_refused(tmp_path):
    """Pictures that the user believes to be there: an unmounted disk, files of git-annex that were not fetched."""
    root = put(tmp_path / "root", "0.png")
    for i in range(1, 6):
        (root / f"{i}.png").symlink_to(tmp_path / "gone" / f"{i}.png")
    said = r"data.path: 5 pictures in '.*root' are links to files that are not there \(1.png, 2.png, 3.png, ...\)"
    with pytest.raises(UserError, match=said):
        names(root)


def test_a_pipe_is_no_picture(tmp_path):
    put(tmp_path, "0.png")
    os.mkfifo(tmp_path / "1.png")
    found = Pictures(str(tmp_path), "data.path")
    assert (found.names, found.others) == (["0.png"], ["1.png"])


@pytest.mark.parametrize("odd", [b"\xff\xfe.png", b"line\nbreak.png", b"\x1b[31mred.png", "ü\u202e.png".encode(), b"[1]*?.png"])
def test_names_of_any_bytes_are_read_and_shown_printable(odd, tmp_path):
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), odd))).write_bytes(b"content")
    Path(os.fsdecode(os.path.join(os.fsencode(tmp_path), odd + b".txt"))).write_bytes(b"")
    found = Pictures(str(tmp_path), "data.path")
    (name,) = found.names
    assert os.fsencode(name) == odd
    assert found.read(name) == Path(found.file(name)).read_bytes() == b"content"
    assert found.left_out().isprintable()
    found.left_out().encode()


def test_zips_that_are_none_or_ambiguous_are_refused(tmp_path):
    (tmp_path / "half.zip").write_bytes(b"PK\x03\x04 half")
    with pytest.raises(UserError, match=r"data.path: .*half.zip is not a whole zip file \(.*\); copy it again"):
        names(tmp_path / "half.zip")
    with zipfile.ZipFile(tmp_path / "twice.zip", "w") as archive:
        archive.writestr("a.png", b"")
        with pytest.warns(UserWarning, match="Duplicate"):
            archive.writestr("a.png", b"")
    with pytest.raises(UserError, match=r"twice.zip holds 1 names twice \(a.png\)"):
        names(tmp_path / "twice.zip")


def test_a_damaged_or_encrypted_member_is_named(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"content of a")
        archive.writestr("b.png", b"content of b")
    content = (tmp_path / "x.zip").read_bytes()
    (tmp_path / "x.zip").write_bytes(content.replace(b"content of a", b"Content of a"))
    with pytest.raises(UserError, match=r"data.path: 'a.png' of .*x.zip cannot be read: Bad CRC-32"):
        Pictures(str(tmp_path / "x.zip"), "data.path").read("a.png")
    locked = bytearray(content)
    place = content.index(b"PK\x01\x02")
    locked[place + 8] |= 1  # APPNOTE 4.4.4, bit 0: encrypted; central directory
    locked[content.index(b"PK\x03\x04") + 6] |= 1
    (tmp_path / "x.zip").write_bytes(locked)
    with pytest.raises(UserError, match=r"'a.png' of .*x.zip cannot be read: .*encrypted"):
        Pictures(str(tmp_path / "x.zip"), "data.path").read("a.png")


def test_a_member_that_would_fill_the_memory_is_refused(tmp_path, monkeypatch):
    with zipfile.ZipFile(tmp_path / "x.zip", "w") as archive:
        archive.writestr("a.png", b"1234")
    found = Pictures(str(tmp_path / "x.zip"), "data.path")
    monkeypatch.setattr("pipelines.data.walk.LARGEST", 3)
    with pytest.raises(UserError, match=r"data.path: 'a.png' of .*x.zip has more than .* GiB; take it out"):
        found.read("a.png")


@pytest.mark.parametrize(("rank", "lines"), [(None, 1), ("0", 1), ("1", 0)])
def test_of_several_processes_one_speaks(rank, lines, monkeypatch, capsys):
    monkeypatch.delenv("RANK", raising=False)
    if rank is not None:
        monkeypatch.setenv("RANK", rank)
    say("", "line of \udcff\x1b[31m")
    assert capsys.readouterr().err == "line of \\udcff\\x1b[31m\n" * lines


def test_a_zip_can_be_given_to_another_process(tmp_path):
    with zipfile.ZipFile(tmp_path / "x.ZIP", "w") as archive:
        archive.writestr("a.png", b"content")
    found = Pictures(str(tmp_path / "x.ZIP"), "data.path")
    assert found.read("a.png") == pickle.loads(pickle.dumps(found)).read("a.png") == b"content"


def test_folders_of_a_zip_that_windows_made(tmp_path):
    """Between folders such files have "\\": without it all classes would be lost."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as archive:
        for name in ("set\\cat\\0.png", "set\\dog\\0.png"):
            member = zipfile.ZipInfo(name)
            member.create_system = 0
            archive.writestr(member, name.encode())
    pictures = Pictures(str(tmp_path / "a.zip"), "data.path")
    assert (pictures.names, pictures.top) == (["set/cat/0.png", "set/dog/0.png"], "set/")
    assert pictures.file("set/dog/0.png") == b"set\\dog\\0.png"
    assert pickle.loads(pickle.dumps(pictures)).file("set/cat/0.png") == b"set\\cat\\0.png"


def test_empty_folders_are_said(tmp_path):
    """A class without pictures changes the numbers of all after it."""
    for name in ("ant", "bee", "cat"):
        (tmp_path / name).mkdir()
    (tmp_path / "ant" / "0.png").write_bytes(b"x")
    (tmp_path / "cat" / ".DS_Store").write_bytes(b"x")
    assert "2 empty folders (bee, cat)" in Pictures(str(tmp_path), "data.path").left_out()
