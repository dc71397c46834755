"""Where pictures are found: folders, several roots, archives, tables; and what is never opened."""

from __future__ import annotations

import io
import os
import pickle
import tarfile
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from qformer.data import pictures
from qformer.data.pictures import Pictures, Span, ZipMember, tar_members
from qformer.errors import DataError
from qformer.images import load_image, picture_key
from qformer.sample import Packed


def content(colour: str = "red") -> bytes:
    stream = io.BytesIO()
    Image.new("RGB", (8, 6), colour).save(stream, "PNG")
    return stream.getvalue()


def put(path: Path, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content() if data is None else data)
    return path


def zipped(path: Path, *names: str, data: bytes | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name in names:
            archive.writestr(name, content() if data is None else data)
    return path


def tarred(path: Path, *names: str, mode: str = "w") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, mode) as archive:  # type: ignore[call-overload]
        for name in names:
            member = tarfile.TarInfo(name)
            member.size = len(content())
            archive.addfile(member, io.BytesIO(content()))
    return path


def packed(found: Path | Packed) -> Packed:
    assert isinstance(found, Packed)
    return found


def test_a_file_below_a_single_root_is_not_looked_at_before_it_is_opened(tmp_path: Path) -> None:
    assert Pictures(tmp_path).find("a/b.png") == tmp_path / "a" / "b.png"
    with pytest.raises(DataError, match=r"here: the picture .*b\.png is missing"):
        load_image(tmp_path / "a" / "b.png", 100, "here")


def test_of_several_roots_and_names_the_first_that_is_there_wins(tmp_path: Path) -> None:
    put(tmp_path / "val" / "COCO_val_2.png")
    put(tmp_path / "train" / "COCO_train_1.png")
    found = Pictures([tmp_path / "train", tmp_path / "val"])
    assert found.find("COCO_train_1.png", "COCO_val_1.png") == tmp_path / "train" / "COCO_train_1.png"
    assert found.find("COCO_train_2.png", "COCO_val_2.png") == tmp_path / "val" / "COCO_val_2.png"
    with pytest.raises(DataError, match=r"no picture 'COCO_train_3\.png' or 'COCO_val_3\.png' in .*train or .*val"):
        found.find("COCO_train_3.png", "COCO_val_3.png")


@pytest.mark.parametrize("make", [zipped, tarred])
@pytest.mark.parametrize("member", ["a.png", "train2014/a.png"])
def test_an_archive_may_stand_in_the_place_of_a_folder(tmp_path: Path, make: object, member: str) -> None:
    ending = ".zip" if make is zipped else ".tar"
    archive = make(tmp_path / "coco" / f"train2014{ending}", member)  # type: ignore[operator]
    for root, name in ((tmp_path / "coco" / "train2014", "a.png"), (tmp_path / "coco", "train2014/a.png")):
        found = packed(Pictures(root).find(name))
        assert found.read() == content()
        assert load_image(found, 100, "here").size == (8, 6)
        assert picture_key(found, tmp_path) == f"coco/train2014{ending}/{member}"
        assert pickle.loads(pickle.dumps(found)) == found
    assert packed(Pictures(archive).find("a.png")).read() == content()
    with pytest.raises(DataError, match=r"there is no picture 'b\.png' in .*; check its name, and files\.images of"):
        Pictures(archive).find("b.png")


def test_folders_inside_an_archive_are_followed(tmp_path: Path) -> None:
    zipped(tmp_path / "images.zip", "images/00001/nested/7.png")
    assert packed(Pictures(tmp_path / "images").find("00001/nested/7.png")).read() == content()


def test_a_folder_comes_before_an_archive_of_its_name(tmp_path: Path) -> None:
    zipped(tmp_path / "images.zip", "a.png")
    put(tmp_path / "images" / "a.png")
    assert Pictures(tmp_path / "images").find("a.png") == tmp_path / "images" / "a.png"


@pytest.mark.parametrize("make", [None, zipped, tarred])
@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("../secret.png", r"'\.\./secret\.png' leads out of files\.images"),
        ("a/../../secret.png", "leads out"),
        ("..\\secret.png", "leads out"),
        ("/etc/passwd", "'/etc/passwd' is an absolute path"),
        ("C:\\secret.png", "is an absolute path"),
        ("", "its picture is ''; it must be the path of a file"),
        ("a\0.png", "it must be the path of a file"),
        (7, "its picture is 7; it must be"),
        (None, "its picture is None; it must be"),
    ],
)
def test_a_name_that_leads_out_of_the_root_is_refused(tmp_path: Path, make: object, name: str, message: str) -> None:
    put(tmp_path / "secret.png")
    root = tmp_path / "images"
    if make is None:
        put(root / "a.png")
    else:
        root = make(tmp_path / f"images.{'zip' if make is zipped else 'tar'}", "../secret.png")  # type: ignore[operator]
    with pytest.raises(DataError, match=message):
        Pictures(root).find(name)


def test_a_link_out_of_the_root_is_not_followed(tmp_path: Path) -> None:
    put(tmp_path / "elsewhere" / "a.png")
    root = tmp_path / "images"
    put(root / "inside" / "b.png")
    os.symlink(tmp_path / "elsewhere" / "a.png", root / "file.png")
    os.symlink(tmp_path / "elsewhere", root / "folder")
    os.symlink(root / "inside" / "b.png", root / "within.png")
    zipped(tmp_path / "elsewhere" / "c.zip", "a.png")
    os.symlink(tmp_path / "elsewhere" / "c.zip", root / "c.zip")
    for name in ("file.png", "folder/a.png", "c/a.png"):
        with pytest.raises(DataError, match=r"is a link that leads out of .*make the folder itself .* the link"):
            Pictures(root).find(name)
    assert Pictures(root).find("within.png") == root / "within.png"
    os.symlink(root, tmp_path / "linked")  # the folder that the card names may be one
    assert Pictures(tmp_path / "linked").find("inside/b.png") == tmp_path / "linked" / "inside" / "b.png"


def test_a_link_in_an_archive_is_not_followed(tmp_path: Path) -> None:
    with zipfile.ZipFile(tmp_path / "z.zip", "w") as archive:
        info = zipfile.ZipInfo("a.png")
        info.external_attr = 0o120777 << 16
        archive.writestr(info, "../../secret.png")
    with tarfile.open(tmp_path / "t.tar", "w") as archive:
        for kind, name in ((tarfile.SYMTYPE, "a.png"), (tarfile.LNKTYPE, "b.png")):
            member = tarfile.TarInfo(name)
            member.type, member.linkname = kind, "../../secret.png"
            archive.addfile(member)
    for archive_name, name in (("z.zip", "a.png"), ("t.tar", "a.png"), ("t.tar", "b.png")):
        with pytest.raises(DataError, match=f"'{name}' in .*{archive_name} is a link, and is not followed; pack"):
            Pictures(tmp_path / archive_name).find(name)


def test_a_member_that_claims_to_be_huge_is_not_unpacked(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bomb = zipped(tmp_path / "bomb.zip", "a.png", data=bytes(3_000_000))
    assert bomb.stat().st_size < 5_000
    monkeypatch.setattr(pictures, "LARGEST", 1_000_000)
    with pytest.raises(DataError, match=r"bomb\.zip/a\.png would take 3,000,000 bytes, more than the 1,000,000"):
        packed(Pictures(bomb).find("a.png")).read()
    with pytest.raises(DataError, match="would take 2,000,000 bytes"):
        Span(bomb, "a.png", 0, 2_000_000).read()


def test_a_member_that_lies_about_its_size_is_read_no_further(tmp_path: Path) -> None:
    data = bytearray(zipped(tmp_path / "bomb.zip", "a.png", data=bytes(3_000_000)).read_bytes())
    for place in (data.find(b"PK\3\4") + 22, data.find(b"PK\1\2") + 24):  # the two places that tell the size
        data[place : place + 4] = (100).to_bytes(4, "little")
    put(tmp_path / "liar.zip", bytes(data))
    with pytest.raises(DataError, match=r"liar\.zip/a\.png cannot be unpacked \(Bad CRC-32.*\); fetch it again"):
        packed(Pictures(tmp_path / "liar.zip").find("a.png")).read()


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_a_member_that_could_only_be_unpacked_as_a_whole_is_not(tmp_path: Path, method: int) -> None:
    """Whatever size it claims: Python unpacks bzip2 and LZMA to their end before it cuts them."""
    with zipfile.ZipFile(tmp_path / "x.zip", "w", method) as archive:
        archive.writestr("a.png", content())
    with pytest.raises(DataError, match=r"x\.zip/a\.png is compressed otherwise than by deflate; unpack the archive"):
        packed(Pictures(tmp_path / "x.zip").find("a.png")).read()


def test_a_member_of_negative_size_does_not_lead_back(tmp_path: Path) -> None:
    """Its header would come after itself, for ever."""
    data = bytearray(tarred(tmp_path / "whole.tar", "a.png").read_bytes())
    data[124:136] = b"\xff" + (256**11 - 512).to_bytes(11, "big")
    data[148:156] = b" " * 8
    data[148:156] = b"%06o\0 " % sum(data[:512])
    with pytest.raises(
        DataError, match=r"loop\.tar: it cannot be read as a tar archive \('a\.png' is of negative size\)"
    ):
        Pictures(put(tmp_path / "loop.tar", bytes(data))).find("a.png")


@pytest.mark.parametrize(
    ("name", "data", "message"),
    [
        ("x.zip", b"", "cannot be read as a zip archive .*it may be cut short"),
        ("x.zip", b"PK\3\4 nothing", "cannot be read as a zip archive"),
        ("x.tar", b"", "cannot be read as a tar archive .*it may be cut short"),
        ("x.tar", b"x" * 2000, "cannot be read as a tar archive"),
    ],
)
def test_an_archive_that_is_none_is_named(tmp_path: Path, name: str, data: bytes, message: str) -> None:
    with pytest.raises(DataError, match=message):
        Pictures(put(tmp_path / name, data)).find("a.png")


def test_archives_that_are_cut_short_are_named(tmp_path: Path) -> None:
    whole = zipped(tmp_path / "whole.zip", "a.png", "b.png").read_bytes()
    with pytest.raises(DataError, match="cannot be read as a zip archive"):
        Pictures(put(tmp_path / "cut.zip", whole[:-30])).find("a.png")
    tar = tarred(tmp_path / "whole.tar", "a.png")
    start, size = tar_members(tar)["a.png"]
    cut = put(tmp_path / "cut.tar", tar.read_bytes()[: start + 10])
    with pytest.raises(DataError, match="the archive ends within it"):
        Span(cut, "a.png", start, size).read()
    with pytest.raises(DataError, match="cannot be read"):
        Span(tmp_path / "gone.tar", "a.png", start, size).read()
    with pytest.raises(DataError, match=r"there is no 'z\.png' in "):
        ZipMember(tmp_path / "whole.zip", "z.png").read()


@pytest.mark.parametrize(("mode", "name"), [("w:gz", "gzip"), ("w:bz2", "bzip2"), ("w:xz", "xz")])
def test_a_compressed_tar_says_that_it_must_be_unpacked(tmp_path: Path, mode: str, name: str) -> None:
    with pytest.raises(DataError, match=rf"x\.tar: it is compressed \({name}\), .*unpack it once"):
        Pictures(tarred(tmp_path / "x.tar", "a.png", mode=mode)).find("a.png")


def test_a_picture_in_an_archive_that_is_none_is_named_with_its_record(tmp_path: Path) -> None:
    found = Pictures(zipped(tmp_path / "x.zip", "a.png", data=b"no picture")).find("a.png")
    with pytest.raises(DataError, match=r"set/train/1: the picture .*x\.zip/a\.png is not a picture that can be read"):
        load_image(found, 100, "set/train/1")


@pytest.mark.filterwarnings("ignore:.*fork.*:DeprecationWarning")
def test_each_process_opens_an_archive_of_its_own(tmp_path: Path) -> None:
    """A fork shares the place in an open file: read in turn by both, a shared one would give wrong bytes."""
    names = [f"{number}.png" for number in range(40)]
    archive = zipped(tmp_path / "x.zip", *names)
    found = Pictures(archive)
    assert packed(found.find("0.png")).read() == content()  # open before the fork
    children = []
    for _ in range(2):
        child = os.fork()
        if child == 0:
            try:
                alike = all(packed(found.find(name)).read() == content() for name in names * 5)
                os._exit(0 if alike else 1)
            except BaseException:
                os._exit(2)
        children.append(child)
    assert all(packed(found.find(name)).read() == content() for name in names * 5)
    assert [os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) for child in children] == [0, 0]
